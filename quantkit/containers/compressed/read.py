"""A compressed-tensors folder as a source: packed codes, codes of a byte each, or 8-bit floats with scales."""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from quantkit.codes import contiguous_groups
from quantkit.codes.packing import unpack_rows, words_for
from quantkit.containers.compressed.scheme import Scheme, scheme_of, schemes_of
from quantkit.containers.hf.coded import CodedFolder
from quantkit.containers.hf.fp8 import dequantize
from quantkit.containers.source import HoldsCodes, TensorInfo
from quantkit.errors import SourceError
from quantkit.late import torch

_FLOATS = ("F8_E4M3", "F8_E5M2")
_SCALES = ("F16", "BF16", "F32")


@dataclass(frozen=True)
class _Linear:
    """A Linear that is stored as codes or 8-bit floats: what config.json and the shapes of its tensors say of it."""

    scheme: Scheme
    rows: int
    columns: int
    packed: bool

    @property
    def grid(self) -> tuple[int, int]:
        """Of its scales, [down, across]."""
        if self.scheme.block is not None:
            return -(-self.rows // self.scheme.block[0]), -(-self.columns // self.scheme.block[1])
        return self.rows, 1 if self.scheme.group_size == -1 else -(-self.columns // self.scheme.group_size)


class CompressedSource(CodedFolder):
    """A folder of compressed-tensors' formats pack-quantized, int-quantized or float-quantized.

    `read` gives weights dequantized. Only folders without 8-bit floats have `codes`.
    """

    kind = "compressed-tensors"
    of_linear = (
        *("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx"),
        *("input_scale", "input_zero_point", "output_scale", "output_zero_point"),  # of arithmetic in 8 bits
    )
    scales = "weight_scale"
    stored_as = "INT"

    def __init__(self, folder: Path, label: str | None = None, trust_remote_code: bool = False) -> None:
        super().__init__(folder, label, trust_remote_code)
        self._place = str(self.path / "config.json")
        schemes = schemes_of(self.quantization, self._place)
        stored = self.stored.tensors
        plain = [n.removesuffix("_scale") for n in stored if n.endswith(".weight_scale")]
        self._modules += [n.removesuffix(".weight") for n in plain if n in stored]
        if not self._modules:
            raise SourceError(f"{self._place}: says compressed-tensors, but no tensor is packed or has a scale")
        self._linears = {module: self._linear(module, schemes) for module in self._modules}
        if any(linear.scheme.floats for linear in self._linears.values()):
            self.remarks = (*self.remarks, *_of_activations(self.quantization, self.label))

    @property
    def codes(self) -> HoldsCodes | None:
        return None if any(linear.scheme.floats for linear in self._linears.values()) else self

    @property
    def _schemes(self) -> list[Scheme]:
        """From the most frequent to the least."""
        return [found for found, _ in Counter(linear.scheme for linear in self._linears.values()).most_common()]

    @property
    def scheme(self) -> str:
        order = ", act-order" if self._dynamic else ""
        return f"compressed-tensors {' and '.join(dict.fromkeys(map(str, self._schemes)))}{order}"

    @property
    def _dynamic(self) -> bool:
        return any(name.endswith(".weight_g_idx") for name in self.stored.tensors)

    @property
    def settings(self) -> Mapping[str, Any]:
        first = self._schemes[0]
        told = {"bits": first.bits, "group_size": first.group_size, "sym": first.symmetric}
        return {} if first.floats else {**told, "desc_act": self._dynamic}

    @cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        shown, stored = dict(super().tensors), self.stored.tensors
        for module, linear in self._linears.items():
            if not linear.packed:
                info, scale = stored[f"{module}.weight"], stored[f"{module}.weight_scale"]
                size = info.bytes + scale.bytes
                of_codes = (linear.scheme.bits, self.group_size(module)) if not linear.scheme.floats else (0, 0)
                kind = info.stored_as if linear.scheme.floats else f"INT{linear.scheme.bits}"
                shown[f"{module}.weight"] = TensorInfo(info.shape, kind, size, *of_codes)
        return shown

    def is_coded(self, name: str) -> bool:
        return name.endswith(".weight") and name.removesuffix(".weight") in self._linears

    def read(self, name: str) -> torch.Tensor:
        linear = self._linears.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        if linear is None or not linear.scheme.floats:
            return super().read(name)
        down, across = linear.grid
        block = linear.scheme.block or (1, -(-linear.columns // across))
        scale = self.stored.read(f"{name}_scale")
        return dequantize(
            self.stored.read(name), scale.reshape(1) if scale.numel() == 1 else scale.reshape(down, across), block
        )

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        linear = self._linears.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        if linear is None or not linear.scheme.floats:
            return super().read_rows(name, start, stop)
        return self.read(name)[start:stop]

    def read_words(self, module: str) -> torch.Tensor | None:
        linear = self._linears[module]
        if not linear.packed or linear.scheme.bits != 4 or linear.columns % 8:
            return None
        return self.stored.read(f"{module}.weight_packed").T

    def read_unpacked(self, module: str) -> torch.Tensor:
        linear, bits = self._linears[module], self.bits(module)
        if linear.packed:
            return unpack_rows(self.stored.read(f"{module}.weight_packed"), bits, linear.columns)
        return self._unsigned(module, "weight")

    def read_zeros(self, module: str) -> torch.Tensor:
        linear, bits = self._linears[module], self.bits(module)
        if linear.scheme.symmetric:
            return torch.full(linear.grid, 2 ** (bits - 1), dtype=torch.uint8)
        if not linear.packed:
            zeros = self._unsigned(module, "weight_zero_point")
            return (
                zeros.reshape(1, 1).expand(linear.grid) if zeros.numel() == 1 else zeros.reshape(linear.grid)
            ).contiguous()
        words = self.stored.read(f"{module}.weight_zero_point")
        return unpack_rows(words.T.contiguous(), bits, linear.rows).T.contiguous()

    def read_groups(self, module: str) -> torch.Tensor:
        linear = self._linears[module]
        if f"{module}.weight_g_idx" not in self.stored.tensors:
            return contiguous_groups(linear.columns, linear.scheme.group_size)
        named, count = self.stored.read(f"{module}.weight_g_idx").int(), linear.grid[1]
        if named.numel() and not 0 <= int(named.min()) <= int(named.max()) < count:
            raise SourceError(f"{self.path}: {module}.weight_g_idx names groups beyond its {count}; it is damaged")
        return named

    def oriented_scales(self, module: str) -> torch.Tensor:
        scales, grid = super().oriented_scales(module), self._linears[module].grid
        return scales.reshape(1, 1).expand(grid) if scales.numel() == 1 else scales.reshape(grid)

    def bits(self, module: str) -> int:
        return self._linears[module].scheme.bits

    def shape(self, module: str) -> tuple[int, int]:
        return self._linears[module].rows, self._linears[module].columns

    def group_size(self, module: str) -> int:
        return self._linears[module].scheme.group_size

    def _unsigned(self, module: str, part: str) -> torch.Tensor:
        """Codes or zeros of a byte with a sign each, counted from the lowest. Raises SourceError beyond their bits."""
        bits = self.bits(module)
        values: torch.Tensor = self.stored.read(f"{module}.{part}").short() + 2 ** (bits - 1)
        if values.numel() and not 0 <= int(values.min()) <= int(values.max()) < 2**bits:
            raise SourceError(f"{self.path}: {module}.{part} holds more than {bits} bits, which config.json says")
        return values.to(torch.uint8)

    # -- what config.json and the tensors' shapes must agree on --------------------------------------------------------

    def _linear(self, module: str, schemes: list[Scheme]) -> _Linear:
        scheme = scheme_of(module, schemes, self._place)
        packed = f"{module}.weight_packed" in self.stored.tensors
        part = "weight_packed" if packed else "weight"
        info = self.stored.tensors[f"{module}.{part}"]
        if len(info.shape) != 2 or 0 in info.shape:
            raise SourceError(f"{self.path}: {module}.{part} is {list(info.shape)}; matrices are read")
        wanted = ("I32",) if packed else _FLOATS if scheme.floats else ("I8",)
        if info.stored_as not in wanted or (packed and scheme.floats):
            raise SourceError(f"{self.path}: {module}.{part} is {info.stored_as}, but config.json says {scheme}")
        rows, width = info.shape
        linear = _Linear(scheme, rows, self._columns(module, scheme, width) if packed else width, packed)
        shapes: dict[str, tuple[tuple[int, ...], ...]] = {part: ((rows, width),)}
        if packed:
            shapes[part] = ((rows, words_for(linear.columns, scheme.bits)),)
        whole = scheme.group_size == -1 and scheme.block is None
        one = ((), (1,), (1, 1), (rows,)) if whole else ()
        shapes["weight_scale"] = (linear.grid, *one)
        if scheme.symmetric or scheme.floats:
            self._check_absent(module, scheme)
        else:
            zeros = (words_for(rows, scheme.bits), linear.grid[1])
            shapes["weight_zero_point"] = (zeros,) if packed else shapes["weight_scale"]
        if f"{module}.weight_g_idx" in self.stored.tensors:
            shapes["weight_g_idx"] = ((linear.columns,),)
        for name, known in shapes.items():
            self._check(module, name, known, linear)
        return linear

    def _columns(self, module: str, scheme: Scheme, words: int) -> int:
        """Columns of a packed Linear: as weight_shape says, or else as its words and groups have room for."""
        stored = self.stored.tensors
        if (told := stored.get(f"{module}.weight_shape")) is not None:
            if told.shape != (2,) or told.stored_as not in ("I64", "I32"):
                raise SourceError(f"{self.path}: {module}.weight_shape is {told.stored_as} {list(told.shape)}")
            kind = "<2q" if told.stored_as == "I64" else "<2i"
            rows, columns = struct.unpack(kind, self.stored.octets(f"{module}.weight_shape"))
            own = stored[f"{module}.weight_packed"].shape[0]
            if rows != own or not 0 < columns <= words * 32 // scheme.bits:
                raise SourceError(
                    f"{self.path}: {module}.weight_shape says {rows} x {columns}, but weight_packed has {own} rows of "
                    f"{words} words, for {words * 32 // scheme.bits} columns of {scheme.bits} bits"
                )
            return int(columns)
        scale = stored.get(f"{module}.weight_scale")
        if scheme.group_size != -1 and scale is not None and len(scale.shape) == 2:
            return scale.shape[1] * scheme.group_size
        return words * 32 // scheme.bits

    def _check(self, module: str, part: str, known: tuple[tuple[int, ...], ...], linear: _Linear) -> None:
        info = self.stored.tensors.get(f"{module}.{part}")
        if info is None:
            raise SourceError(f"{self.path}: {module} has no {part}, which config.json's {linear.scheme} needs")
        if info.shape not in known:
            raise SourceError(
                f"{self.path}: {module}.{part} is {list(info.shape)}, but {linear.rows} x {linear.columns} of "
                f"{linear.scheme}, as config.json says, make it {list(known[0])}"
            )
        if part == "weight_scale" and info.stored_as not in _SCALES:
            raise SourceError(f"{self.path}: {module}.{part} is {info.stored_as}; read are {', '.join(_SCALES)}")
        integers = {"weight_zero_point": "I32" if linear.packed else "I8", "weight_g_idx": "I32"}
        if info.stored_as != integers.get(part, info.stored_as):
            raise SourceError(f"{self.path}: {module}.{part} is {info.stored_as}, and must be {integers[part]}")

    def _check_absent(self, module: str, scheme: Scheme) -> None:
        if not scheme.floats and f"{module}.weight_zero_point" in self.stored.tensors:
            raise SourceError(f"{self.path}: {module} has weight_zero_point, but config.json says {scheme}")


def _of_activations(label: Mapping[str, Any], name: str) -> tuple[str, ...]:
    """A remark on programs that compute in 8 bits, where the config asks for it."""
    groups = label["config_groups"].values()
    if not any(group.get("input_activations") for group in groups):
        return ()
    return (f"{name}: its config has activations in 8-bit floats too; here only its weights are",)
