"""A GPTQ checkpoint as a source: codes for whoever wants them, dequantized weights for everybody else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from quantkit.codes import PACKABLE_BITS, QuantizedLinear, unpack
from quantkit.errors import SourceError
from quantkit.sources.base import TensorInfo
from quantkit.sources.hf import FolderSource, read_json, stored_dtype

_PARTS = ("qweight", "qzeros", "scales", "g_idx")


class GptqSource(FolderSource):
    """A folder in the GPTQ layout, v1 or v2, at 2, 3, 4 or 8 bits. `read` gives them dequantized."""

    kind = "gptq"

    def __init__(self, folder: Path, label: str | None = None, trust_remote_code: bool = False) -> None:
        super().__init__(folder, label, trust_remote_code)
        self.quantization: dict[str, Any] = read_json(folder / "config.json")["quantization_config"]
        self.bits = self._checked("bits", PACKABLE_BITS)
        self.checkpoint_format = self._checked("checkpoint_format", ("gptq", "gptq_v2"), "gptq")
        self.dtype = stored_dtype({n: i for n, i in self.stored.tensors.items() if not n.endswith(".scales")})
        self._modules = [n.removesuffix(".qweight") for n in self.stored.tensors if n.endswith(".qweight")]
        for module in self._modules:
            self._check_shapes(module)

    def _checked(self, key: str, known: tuple[Any, ...], default: Any = None) -> Any:
        value = self.quantization.get(key, default)
        if value not in known:
            raise SourceError(
                f"{self.path / 'config.json'}: {key} {value!r} is not one of {', '.join(map(str, known))}"
            )
        return value

    @cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """The dequantized names: a Linear's parts appear as one weight."""
        shown = {n: i for n, i in self.stored.tensors.items() if n.rsplit(".", 1)[-1] not in _PARTS}
        for module in self._modules:
            words = self.stored.tensors[f"{module}.qweight"].shape
            size = sum(self.stored.tensors[f"{module}.{part}"].bytes for part in _PARTS)
            shown[f"{module}.weight"] = TensorInfo((words[1], words[0] * 32 // self.bits), f"GPTQ{self.bits}", size)
        return shown

    def quantized_names(self) -> Iterable[str]:
        """Module names of the quantized Linears."""
        return self._modules

    def read(self, name: str) -> torch.Tensor:
        module = name.removesuffix(".weight")
        if name.endswith(".weight") and f"{module}.qweight" in self.stored.tensors:
            return self.read_codes(module).dequantize()
        return self.stored.read(name)

    def read_codes(self, module: str) -> QuantizedLinear:
        """Codes of one Linear, exactly as they were written.

        Raises:
            SourceError: a part is missing, or its shape disagrees with the others.
        """
        qweight, qzeros, scales, g_idx = (self.stored.read(f"{module}.{part}") for part in _PARTS)
        codes = unpack(qweight, self.bits).T.contiguous()
        zeros = unpack(qzeros, self.bits, axis=1)
        if self.checkpoint_format == "gptq":
            zeros = zeros + 1
        return QuantizedLinear(codes, scales.half().T.contiguous(), zeros.T.contiguous(), g_idx.int(), self.bits)

    def _check_shapes(self, module: str) -> None:
        shapes = {}
        for part in _PARTS:
            info = self.stored.tensors.get(f"{module}.{part}")
            if info is None:
                raise SourceError(f"{self.path}: {module} has qweight but no {part}")
            shapes[part] = info.shape
        words, rows = shapes["qweight"]
        groups = shapes["scales"][0]
        wanted = {
            "qzeros": (groups, rows * self.bits // 32),
            "scales": (groups, rows),
            "g_idx": (words * 32 // self.bits,),
        }
        for part, shape in wanted.items():
            if shapes[part] != shape:
                raise SourceError(f"{self.path}: {module}.{part} is {shapes[part]}, but qweight asks for {shape}")
