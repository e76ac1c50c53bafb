"""A GPTQ folder's packed tensors against its label: shapes, zeros, scales, groups."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from quantkit.codes import contiguous_groups
from quantkit.codes.packing import PACKABLE_BITS, unpack
from quantkit.containers.patterns import fits
from quantkit.containers.source import TensorInfo
from quantkit.errors import SourceError
from quantkit.late import torch
from quantkit.progress import Progress
from quantkit.runs.atomic import read_json
from quantkit.verbs.verify.companions import check_copies
from quantkit.verbs.verify.findings import Findings, listed
from quantkit.verbs.verify.stored import LOST, StoredTensors

PARTS = ("qweight", "qzeros", "scales", "g_idx")

_FORMATS = ("gptq", "gptq_v2")
# A weight beyond this, from a scale so many times the usual one of its matrix, is a damaged exponent.
_ABSURD_WEIGHT, _ABSURD_RATIO = 64.0, 1000.0
# How near to a whole step the mean of all codes must lie, in steps, to tell the two readings of the zeros apart.
_NEAR = 0.3
_DECIDABLE_BITS = 4


@dataclass(frozen=True)
class _Linear:
    """A packed Linear as its label has it."""

    module: str
    bits: int
    rows: int
    columns: int
    group_size: int

    @property
    def groups(self) -> int:
        return -(-self.columns // self.group_size)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {
            "qweight": (self.columns * self.bits // 32, self.rows),
            "qzeros": (self.groups, self.rows * self.bits // 32),
            "scales": (self.groups, self.rows),
            "g_idx": (self.columns,),
        }


@dataclass
class _Zeros:
    """What the zeros of all modules say of the format."""

    constant: dict[str, list[str]] = field(default_factory=lambda: {name: [] for name in _FORMATS})
    varying: list[str] = field(default_factory=list)
    means: list[float] = field(default_factory=list)


def check(
    folder: Path, table: StoredTensors, label: Mapping[str, Any], found: Findings, progress: Progress
) -> tuple[Mapping[str, TensorInfo], Mapping[str, TensorInfo]]:
    """A folder's label and packed Linears.

    Returns:
        Its tensors as a model sees them, each Linear's parts as one weight; and those stored as numbers.
    """
    with found.guard("quantize_config.json"):
        check_copies(folder, read_json(folder / "config.json"), found)
    known = {"bits": PACKABLE_BITS, "checkpoint_format": _FORMATS, "sym": (True, False), "desc_act": (True, False)}
    given = {"checkpoint_format": "gptq", "desc_act": False, **label}
    size = given.get("group_size")
    wrong = [f"{key} {given.get(key)!r}" for key, values in known.items() if given.get(key) not in values]
    wrong += [] if type(size) is int and (size == -1 or size > 0) else [f"group_size {size!r}"]
    for text in wrong if table.entries else ():
        found.problem(f"config.json: quantization_config says {text}, which no GPTQ reader knows; correct it")
    readable = table.entries and not wrong
    tensors = _Packed(table, label, found).check(progress) if readable else table.tensors
    plain = {name: entry.info for name, entry in table.entries.items() if name.rpartition(".")[2] not in PARTS}
    return tensors, plain


def label_of(module: str, label: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The label of one module: GPTQModel's `dynamic` rules over the rest; None where they leave it as it is.

    Raises:
        SourceError: the rules are no rules, or one takes too long.
    """
    rules = label.get("dynamic") or {}
    if not isinstance(rules, Mapping) or not all(isinstance(changes, Mapping | None) for changes in rules.values()):
        raise SourceError("config.json: `dynamic` of quantization_config is not patterns and what they change")
    for rule, changes in rules.items():
        pattern = rule.removeprefix("-:").removeprefix("+:")
        if fits(pattern, module, "config.json: the `dynamic` rule"):
            return None if rule.startswith("-:") else {**label, **(changes or {})}
    return label


@dataclass(frozen=True)
class _Packed:
    """All packed Linears of a folder, of a label that can be read."""

    table: StoredTensors
    label: Mapping[str, Any]
    found: Findings
    zeros: _Zeros = field(default_factory=_Zeros)

    def check(self, progress: Progress) -> dict[str, TensorInfo]:
        shown = self.table.tensors
        has_groups = any(name.endswith(".g_idx") for name in shown)
        split = (name.rpartition(".") for name in shown)
        modules = sorted({module for module, _, part in split if part in ("qweight", "qzeros")})
        with progress.phase("checking codes", len(modules)) as advance:
            for module in modules:
                parts = {part for part in PARTS if shown.pop(f"{module}.{part}", None) is not None}
                shown[f"{module}.weight"] = LOST
                with self.found.guard(module):
                    if linear := self._check_parts(module, parts, PARTS if has_groups else PARTS[:3]):
                        held = sum(self.table.entries[f"{module}.{part}"].info.bytes for part in parts)
                        size, kind = (linear.rows, linear.columns), f"GPTQ{linear.bits}"
                        shown[f"{module}.weight"] = TensorInfo(size, kind, held, linear.bits)
                        self._check_values(linear, parts)
                advance(1)
        if not modules:
            self.found.problem(
                "config.json says gptq, but no tensor is packed (there is no qweight); download it again"
            )
        self._check_plain(shown)
        self._check_zeros()
        return shown

    def _check_parts(self, module: str, parts: set[str], needed: tuple[str, ...]) -> _Linear | None:
        """Which parts there are, and their types and shapes; None where the rest cannot be looked at."""
        problem = self.found.problem
        for part in needed:
            if part not in parts:
                problem(f"{module} has no {part}, which its other parts need; download it again")
        if not set(PARTS[:3]) <= parts or any(f"{module}.{part}" in self.table.lost for part in parts):
            return None
        entries = {part: self.table.entries[f"{module}.{part}"] for part in parts}
        if f"{module}.weight" in self.table.entries:
            problem(f"{module} is stored as codes and as a weight too; remove one of them")
        for part, entry in entries.items():
            wanted = ("F16", "BF16", "F32") if part == "scales" else ("I32",)
            if entry.dtype not in wanted:
                problem(f"{module}.{part} is stored as {entry.dtype}, which must be {wanted[0]}; quantize it again")
                return None
        label = label_of(module, self.label)
        if label is None:
            problem(f"{module} is packed, but a `dynamic` rule in config.json says that it is not; correct the rule")
        return self._check_shapes(module, {part: entry.shape for part, entry in entries.items()}, label or self.label)

    def _check_shapes(
        self, module: str, shapes: Mapping[str, tuple[int, ...]], label: Mapping[str, Any]
    ) -> _Linear | None:
        problem = self.found.problem
        if any(len(shapes[part]) != 2 or 0 in shapes[part] for part in PARTS[:3]):
            problem(f"{module}: its parts are of shapes {dict(shapes)}, no GPTQ layout; quantize it again")
            return None
        (words, rows), bits = shapes["qweight"], label["bits"]
        own, rest = divmod(shapes["qzeros"][1] * 32, rows)
        if own != bits and own in PACKABLE_BITS and not rest:
            problem(f"{module}: its tensors are of {own} bits, the label in config.json says {bits}; correct it")
            bits = own
        columns, size = words * 32 // bits, label["group_size"]
        linear = _Linear(module, bits, rows, columns, columns if size == -1 else size)
        wrong = {part: shape for part, shape in shapes.items() if shape != linear.shapes[part]}
        for part, shape in wrong.items():
            problem(
                f"{module}.{part} is {list(shape)}; {bits} bits in groups of {size}, as config.json says, "
                f"make it {list(linear.shapes[part])}; correct the label or quantize it again"
            )
        return None if wrong else linear

    def _check_values(self, linear: _Linear, parts: set[str]) -> None:
        module, bits, read = linear.module, linear.bits, self.table.read
        self._check_scales(linear, read(f"{module}.scales").float())
        group = contiguous_groups(linear.columns, linear.group_size)
        if "g_idx" in parts:
            stored = read(f"{module}.g_idx")
            if not self._check_groups(linear, stored, in_order=bool(torch.equal(stored.int(), group))):
                return
            group = stored
        raw = unpack(read(f"{module}.qzeros"), bits, axis=1)
        for version, constant in zip(_FORMATS, (2 ** (bits - 1) - 1, 2 ** (bits - 1)), strict=True):
            if bool((raw == constant).all()):
                self.zeros.constant[version].append(module)
                return
        self.zeros.varying.append(module)
        if bits <= _DECIDABLE_BITS:
            codes = unpack(read(f"{module}.qweight"), bits)
            self.zeros.means.append(float(codes.float().mean() - raw[group.long()].float().mean()))

    def _check_scales(self, linear: _Linear, scales: torch.Tensor) -> None:
        problem = self.found.problem
        name, sizes, broken = f"{linear.module}.scales", scales.abs(), (~torch.isfinite(scales)).nonzero()
        largest, usual = float(sizes.max()), float(sizes.median())
        if len(broken):
            what = "NaN" if bool(torch.isnan(scales).any()) else "infinity"
            problem(
                f"{name}: {len(broken)} are {what}, the first at {broken[0].tolist()}; quantize or download it again"
            )
        elif not largest:
            problem(f"{name}: all are 0, so that the layer gives nothing; quantize or download it again")
        elif largest * 2 ** (linear.bits - 1) > _ABSURD_WEIGHT and largest > _ABSURD_RATIO * usual:
            problem(f"{name}: one is {largest:g}, where {usual:.3g} is usual in this layer; download it again")

    def _check_groups(self, linear: _Linear, group: torch.Tensor, in_order: bool) -> bool:
        """Whether g_idx can be indexed with."""
        problem = self.found.problem
        name, low, high = f"{linear.module}.g_idx", int(group.min()), int(group.max())
        if low < 0 or high >= linear.groups:
            problem(f"{name}: holds groups {low} to {high}, there are 0 to {linear.groups - 1}; download it again")
            return False
        if not self.label.get("desc_act") and not in_order:
            problem(
                f"{name}: groups are not in the order of the columns, the label says desc_act false; set it to true"
            )
        if int(torch.bincount(group.long(), minlength=linear.groups).max()) > linear.group_size:
            problem(f"{name}: a group has more than {linear.group_size} columns; download it again")
        return True

    def _check_plain(self, shown: Mapping[str, TensorInfo]) -> None:
        """Linears that readers will look for as codes, and that are stored as weights."""
        stages = self.label.get("modules_in_block_to_quantize") or []
        if not isinstance(stages, list):
            self.found.problem("modules_in_block_to_quantize is no list of names; write the label anew")
            return
        wanted = tuple(f".{name}" for stage in stages for name in (stage if isinstance(stage, list) else [stage]))
        weights = {name.removesuffix(".weight"): info for name, info in shown.items() if name.endswith(".weight")}
        plain = [
            module
            for module, info in weights.items()
            if info.stored_as[:4] not in ("GPTQ", "LOST") and module.endswith(wanted) and label_of(module, self.label)
        ]
        if plain:
            self.found.problem(
                f"{listed(plain)}: stored as weights, where the label has them as codes; exclude them by a `dynamic` "
                "rule in config.json, or download it again"
            )
        if "lm_head" in weights and weights["lm_head"].stored_as.startswith("GPTQ") and not self.label.get("lm_head"):
            self.found.problem("lm_head is packed, but config.json says lm_head false; set it to true")

    def _check_zeros(self) -> None:
        """Whether the zeros are of the version that the label says, as far as they tell."""
        named, zeros, found = self.label.get("checkpoint_format", "gptq"), self.zeros, self.found
        other = _FORMATS[1 - _FORMATS.index(named)]
        remedy = f"every weight would be one step off; set checkpoint_format to {other!r} in both config files"
        if wrong := zeros.constant[other]:
            found.problem(
                f"{listed(wrong)}: their zeros are those of a symmetric {other} file, the label says {named}; {remedy}"
            )
        if wrong := [name for name in zeros.varying if (label_of(name, self.label) or self.label).get("sym")]:
            found.problem(
                f"{listed(wrong)}: their zeros vary, the label says sym true, and kernels for symmetric files "
                "do not look at zeros; set sym to false"
            )
        if zeros.varying and not zeros.means:
            found.note(f"asymmetric {named}: at this many bits zeros do not tell whether the label's version is right")
        if not zeros.means:
            return
        # Trained weights are centred: read rightly, codes lie on both sides of their zeros alike.
        offset = median(zeros.means) - (1 if named == "gptq" else 0)
        if abs(offset - (1 if named == "gptq_v2" else -1)) < _NEAR:
            found.problem(
                f"weights are off by one step of their grids on average ({offset:+.2f}), those of a {other} file "
                f"labelled {named}; {remedy}"
            )
        elif abs(offset) >= _NEAR:
            found.note(
                f"asymmetric {named}: weights are off centre by {offset:+.2f} steps, which leaves the version open"
            )
