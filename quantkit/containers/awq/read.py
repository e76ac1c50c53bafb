"""An AWQ folder in AutoAWQ's GEMM layout as a source: 4-bit codes with a zero for each group."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from quantkit.codes import contiguous_groups
from quantkit.codes.packing import unpack_rows
from quantkit.containers.hf.coded import CodedFolder
from quantkit.errors import SourceError
from quantkit.late import torch

BITS, EIGHT = 4, 8
# Which of eight neighbouring outputs each nibble of a word is, from the lowest on.
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_BACK = tuple(ORDER.index(place) for place in range(EIGHT))
_MIDDLE = 2 ** (BITS - 1)


class AwqSource(CodedFolder):
    """A folder of 4-bit codes. `read` gives them dequantized."""

    kind = "awq"
    of_linear = ("qweight", "qzeros", "scales")
    stored_as = "AWQ"

    def __init__(self, folder: Path, label: str | None = None, trust_remote_code: bool = False) -> None:
        super().__init__(folder, label, trust_remote_code)
        place, told = self.path / "config.json", self.quantization
        bits, size = (told.get(key, told.get(old)) for key, old in (("bits", "w_bit"), ("group_size", "q_group_size")))
        layout = told.get("version", told.get("format", "gemm"))
        if str(layout).lower() != "gemm":
            raise SourceError(f"{place}: version {layout!r} of AWQ is not read, only gemm")
        if bits != BITS:
            raise SourceError(f"{place}: bits {bits!r}: AWQ's GEMM layout has {BITS}")
        if type(size) is not int or not (size == -1 or size > 0):
            raise SourceError(f"{place}: group_size {size!r} is no number of columns")
        self._group_size: int = size
        if not self._modules:
            raise SourceError(f"{place}: says awq, but no tensor is packed (there is no qweight)")
        for module in self._modules:
            self._check_shapes(module)

    @cached_property
    def _symmetric(self) -> bool:
        """Whether the zeros of the first Linear are all the middle one: no label says it of zeros that are stored."""
        zeros = f"{self._modules[0]}.qzeros"
        return zeros not in self.stored.tensors or not self.stored.octets(zeros).strip(b"\x88")

    @property
    def scheme(self) -> str:
        group = "whole rows" if self._group_size == -1 else f"group {self._group_size}"
        return f"AWQ {BITS}-bit {'symmetric' if self._symmetric else 'asymmetric'}, {group}"

    @property
    def settings(self) -> Mapping[str, Any]:
        return {"bits": BITS, "group_size": self._group_size, "sym": self._symmetric, "desc_act": False}

    def bits(self, module: str) -> int:
        return BITS

    def shape(self, module: str) -> tuple[int, int]:
        columns, words = self.stored.tensors[f"{module}.qweight"].shape
        return words * EIGHT, columns

    def group_size(self, module: str) -> int:
        return self._group_size

    def read_unpacked(self, module: str) -> torch.Tensor:
        return self._unpack(f"{module}.qweight")

    def read_zeros(self, module: str) -> torch.Tensor:
        if f"{module}.qzeros" in self.stored.tensors:
            return self._unpack(f"{module}.qzeros")
        rows, groups = self.shape(module)[0], self.stored.tensors[f"{module}.scales"].shape[0]
        return torch.full((rows, groups), _MIDDLE, dtype=torch.uint8)

    def read_groups(self, module: str) -> torch.Tensor:
        return contiguous_groups(self.shape(module)[1], self._group_size)

    def oriented_scales(self, module: str) -> torch.Tensor:
        return super().oriented_scales(module).T

    def _unpack(self, name: str) -> torch.Tensor:
        """Nibbles of words int32 [n, out / 8], uint8 [out, n]."""
        words = self.stored.read(name)
        eights = unpack_rows(words, BITS, words.shape[1] * EIGHT).reshape(len(words), -1, EIGHT)
        return eights[..., _BACK].reshape(len(words), -1).T.contiguous()

    def _check_shapes(self, module: str) -> None:
        stored = self.stored.tensors
        for part in self.of_linear:
            info = stored.get(f"{module}.{part}")
            if info is None and (part == "scales" or self.quantization.get("zero_point", True)):
                raise SourceError(f"{self.path}: {module} has qweight but no {part}")
            if info is None:
                continue
            kinds = ("F16", "BF16", "F32") if part == "scales" else ("I32",)
            if len(info.shape) != 2 or 0 in info.shape or info.stored_as not in kinds:
                raise SourceError(
                    f"{self.path}: {module}.{part} is {info.stored_as} {list(info.shape)}: not AWQ's GEMM layout"
                )
        rows, columns = self.shape(module)
        groups = 1 if self._group_size == -1 else columns // self._group_size
        if self._group_size != -1 and columns % self._group_size:
            raise SourceError(
                f"{self.path}: {module} is {columns} columns wide, no multiple of its group of {self._group_size}: it "
                "is damaged"
            )
        for part, shape in {"qzeros": (groups, rows // EIGHT), "scales": (groups, rows)}.items():
            found = stored.get(f"{module}.{part}")
            if found is not None and found.shape != shape:
                raise SourceError(
                    f"{self.path}: {module}.{part} is {list(found.shape)}, but {rows} x {columns} in groups of "
                    f"{self._group_size}, as config.json says, make it {list(shape)}"
                )
