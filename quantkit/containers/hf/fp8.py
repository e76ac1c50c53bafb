"""Folders in transformers' `fp8` scheme (DeepSeek-V3, Qwen3-FP8): 8-bit floats with a scale per block of a weight."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

from quantkit.containers.hf.read import FolderSource
from quantkit.containers.source import TensorInfo
from quantkit.errors import SourceError
from quantkit.late import torch
from quantkit.runs.atomic import read_json

# Of `NAME.weight` it is `NAME.weight_scale_inv`; weights are multiplied by it, whatever it is called.
_SCALE = "_scale_inv"
_HIDDEN = (_SCALE, ".activation_scale")  # the latter is for arithmetic in 8 bits


class Fp8Source(FolderSource):
    """A folder of 8-bit float weights. `read` gives them dequantized, in float32."""

    kind = "hf"

    def __init__(self, folder: Path, label: str | None = None, trust_remote_code: bool = False) -> None:
        super().__init__(folder, label, trust_remote_code)
        quantization = read_json(folder / "config.json")["quantization_config"]
        block = quantization.get("weight_block_size", (128, 128))
        pair = isinstance(block, list | tuple) and len(block) == 2 and all(isinstance(n, int) and n > 0 for n in block)
        if block is not None and not pair:
            raise SourceError(f"{self.path / 'config.json'}: weight_block_size {block!r} is not two positive numbers")
        self._block: tuple[int, int] | None = None if block is None else (block[0], block[1])
        for name, info in self.tensors.items():
            self._check(name, info)

    @cached_property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16

    @cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """The weights without their scales, whose bytes count as the weight's."""
        stored = self.stored.tensors
        shown = {}
        for name, info in stored.items():
            if not name.endswith(_HIDDEN):
                scale = stored.get(f"{name}{_SCALE}")
                shown[name] = TensorInfo(info.shape, info.stored_as, info.bytes + (scale.bytes if scale else 0))
        return shown

    def read(self, name: str) -> torch.Tensor:
        weight = self.stored.read(name)
        if f"{name}{_SCALE}" not in self.stored.tensors:
            return weight
        scale = self.stored.read(f"{name}{_SCALE}")
        if scale.dtype == torch.uint8:  # scale_fmt "ue8m0" as bytes: exponents of two
            scale = (scale.float() - 127).exp2()
        return dequantize(weight, scale, self._block)

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        if f"{name}{_SCALE}" in self.stored.tensors:
            return self.read(name)[start:stop]
        return self.stored.read_rows(name, start, stop)

    def _check(self, name: str, info: TensorInfo) -> None:
        scale = self.stored.tensors.get(f"{name}{_SCALE}")
        if scale is None:
            if info.stored_as.startswith("F8"):
                raise SourceError(f"{self.path}: {name} is stored as {info.stored_as}, but {name}{_SCALE} is missing")
            return
        if info.stored_as not in ("F8_E4M3", "F8_E5M2") or len(info.shape) != 2:
            shape = list(info.shape)
            raise SourceError(f"{self.path}: {name} has scales, but is {info.stored_as} {shape}; F8 matrices are read")
        if math.prod(scale.shape) == 1:
            return
        wanted = self._block and tuple(-(-n // b) for n, b in zip(info.shape, self._block, strict=True))
        if scale.shape != wanted:
            block = "the whole weight" if self._block is None else f"blocks of {self._block[0]} x {self._block[1]}"
            raise SourceError(f"{self.path}: {name}{_SCALE} is {list(scale.shape)}, which does not fit {block}")


def dequantize(weight: torch.Tensor, scale: torch.Tensor, block: tuple[int, int] | None) -> torch.Tensor:
    """float32 [out, in] of a weight [out, in] and its scales: one, or [ceil(out/rows), ceil(in/columns)] of a block."""
    if scale.numel() == 1 or block is None:
        return weight.float() * scale.float().reshape(())
    rows, columns = weight.shape
    grid = scale.float().repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :columns]
    return weight.float() * grid
