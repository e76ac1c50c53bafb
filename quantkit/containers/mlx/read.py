"""An MLX folder as a source: codes with a scale and a bias for each group, of the mode "affine"."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from quantkit.codes import contiguous_groups, grouped
from quantkit.codes.packing import unpack_rows
from quantkit.containers import CONTAINERS
from quantkit.containers.hf.coded import CodedFolder
from quantkit.containers.source import HoldsCodes, TensorInfo
from quantkit.containers.values import all_finite
from quantkit.errors import SourceError
from quantkit.late import torch

AFFINE = "affine"
_FLOATS = ("F16", "BF16", "F32")


class MlxSource(CodedFolder):
    """A folder of MLX's codes. `read` gives scale * code + bias.

    It has `codes` where every bias is -scale * zero for a whole zero, as what quantkit writes is. mlx-lm's own
    rounding has biases of their own: such a folder's weights count as rounded ones.
    """

    kind = "mlx"
    of_linear = ("scales", "biases")
    stored_as = "MLX"

    def __init__(self, folder: Path, label: str | None = None, trust_remote_code: bool = False) -> None:
        super().__init__(folder, label, trust_remote_code)
        self._place = str(self.path / "config.json")
        self._default = self._precision(self.quantization, "")
        if not self._modules:
            raise SourceError(
                f"{self._place}: says that it is quantized for MLX, but no tensor is (there are no scales)"
            )
        self._precisions = {module: self._own(module) for module in self._modules}
        for module in self._modules:
            self._check_shapes(module)

    @property
    def codes(self) -> HoldsCodes | None:
        return self if self._whole else None

    @cached_property
    def _whole(self) -> bool:
        """Whether every bias stands for a whole zero: for what takes codes, of all tensors but the codes."""
        return all(self._zeros(module) is not None for module in self._modules)

    @property
    def scheme(self) -> str:
        found = [one for one, _ in Counter(self._precisions.values()).most_common()]
        return f"MLX {' and '.join(f'{bits}-bit, group {size}' for bits, size in found)}"

    @property
    def settings(self) -> Mapping[str, Any]:
        (bits, size), zeros = self._default, self._zeros(self._modules[0])
        middle = zeros is not None and bool((zeros == 2 ** (self.bits(self._modules[0]) - 1)).all())
        return {"bits": bits, "group_size": size, "sym": middle, "desc_act": False}

    @cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        shown = dict(super().tensors)
        for name in (f"{module}.weight" for module in self._modules):
            shown[name] = replace(shown[name], bytes=shown[name].bytes + self.stored.tensors[name].bytes)
        return shown

    def bits(self, module: str) -> int:
        return self._precisions[module][0]

    def group_size(self, module: str) -> int:
        return self._precisions[module][1]

    def shape(self, module: str) -> tuple[int, int]:
        rows, groups = self.stored.tensors[f"{module}.scales"].shape
        return rows, groups * self.group_size(module)

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        if not self.is_coded(name):
            return self.stored.read_rows(name, start, stop)
        module = name.removesuffix(".weight")
        words, scales, biases = (
            self.stored.read_rows(f"{module}.{part}", start, stop) for part in ("weight", *self.of_linear)
        )
        for part, values in zip(self.of_linear, (scales, biases), strict=True):
            if not all_finite(values):
                raise SourceError(f"{self.path}: {module}.{part} hold NaN or infinity; the model's files are damaged")
        weights = self._unpacked(module, words).float()
        for columns, groups in grouped(weights, self.read_groups(module)):
            columns.mul_(scales[:, groups, None].float()).add_(biases[:, groups, None].float())
        return weights

    def read_stored(self, name: str) -> None:
        """Its biases are added, and no zeros taken off."""

    def read_unpacked(self, module: str) -> torch.Tensor:
        return self._unpacked(module, self.stored.read(f"{module}.weight"))

    def _unpacked(self, module: str, words: torch.Tensor) -> torch.Tensor:
        """Codes uint8 [rows, in] of rows of words."""
        return unpack_rows(words.view(torch.int32), self.bits(module), self.shape(module)[1])

    def read_zeros(self, module: str) -> torch.Tensor:
        zeros = self._zeros(module)
        if zeros is None:
            raise SourceError(f"{self.path}: {module}.biases are no whole multiples of its scales; it has no zeros")
        return zeros

    def read_groups(self, module: str) -> torch.Tensor:
        return contiguous_groups(self.shape(module)[1], self.group_size(module))

    def _zeros(self, module: str) -> torch.Tensor | None:
        """Zeros that a Linear's biases are of, uint8 [out, groups], the middle one where scale and bias are 0; None
        where they are of none."""
        scales, biases = (self.stored.read(f"{module}.{part}").float() for part in self.of_linear)
        zeros = torch.where(scales == 0, float(2 ** (self.bits(module) - 1)), (-biases / scales).round())
        whole = (zeros >= 0) & (zeros <= 255) & (zeros * -scales == biases)
        return zeros.to(torch.uint8) if bool(whole.all()) else None

    # -- what config.json and the tensors' shapes must agree on --------------------------------------------------------

    def _own(self, module: str) -> tuple[int, int]:
        """Bits and group of one module: an entry under its name stands before what is for all."""
        entry = self.quantization.get(module)
        if entry is False:
            raise SourceError(f"{self._place}: says that {module} is not quantized, but it has scales")
        if not isinstance(entry, Mapping):
            return self._default
        return self._precision({**self.quantization, **entry}, f" of {module}")

    def _precision(self, told: Mapping[str, Any], whose: str) -> tuple[int, int]:
        bits, size, mode = told.get("bits"), told.get("group_size"), told.get("mode", AFFINE)
        holds = CONTAINERS["mlx"].holds
        assert holds is not None
        if mode != AFFINE:
            raise SourceError(f"{self._place}: mode {mode!r}{whose} of MLX is not read, only {AFFINE}")
        for key, value, known in (("bits", bits, holds.bits), ("group_size", size, holds.group_sizes)):
            if type(value) is not int or value not in known:
                raise SourceError(f"{self._place}: {key} {value!r}{whose}: MLX has {', '.join(map(str, known))}")
        return bits, size  # type: ignore[return-value]  # the loop has seen to it

    def _check_shapes(self, module: str) -> None:
        stored, (bits, size) = self.stored.tensors, self._precisions[module]
        for part in ("weight", *self.of_linear):
            info = stored.get(f"{module}.{part}")
            if info is None:
                raise SourceError(f"{self.path}: {module} has scales but no {part}")
            if len(info.shape) == 3:
                raise SourceError(f"{self.path}: {module} holds a stack of experts, which is not read of MLX folders")
            if (
                len(info.shape) != 2
                or 0 in info.shape
                or info.stored_as not in (("U32",) if part == "weight" else _FLOATS)
            ):
                raise SourceError(
                    f"{self.path}: {module}.{part} is {info.stored_as} {list(info.shape)}: not MLX's {AFFINE} layout"
                )
        rows, groups = stored[f"{module}.weight"].shape[0], stored[f"{module}.scales"].shape[1]
        wanted = {"weight": (rows, groups * size * bits // 32), "scales": (rows, groups), "biases": (rows, groups)}
        for part, shape in wanted.items():
            if stored[f"{module}.{part}"].shape != shape:
                raise SourceError(
                    f"{self.path}: {module}.{part} is {list(stored[f'{module}.{part}'].shape)}, but {bits} bits in "
                    f"groups of {size}, as config.json says, make it {list(shape)}"
                )
