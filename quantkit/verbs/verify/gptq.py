"""A GPTQ folder's packed tensors against its label: shapes, zeros, scales, groups."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch

from quantkit.codes import contiguous_groups
from quantkit.codes.packing import PACKABLE_BITS, unpack
from quantkit.containers.source import TensorInfo
from quantkit.progress import Progress
from quantkit.runs.atomic import read_json
from quantkit.verbs.verify.companions import check_copies
from quantkit.verbs.verify.findings import Findings, listed
from quantkit.verbs.verify.shards import Table

PARTS = ("qweight", "qzeros", "scales", "g_idx")
LOST = TensorInfo((0, 0, 0), "LOST", 0)
"""Stands for a tensor in a file that is missing or broken: what is known of it is its name."""

_FORMATS = ("gptq", "gptq_v2")
# A weight beyond this, from a scale so many times the usual one of its matrix, is a damaged exponent.
_ABSURD_WEIGHT, _ABSURD_RATIO = 64.0, 1000.0
# How near to a whole step the mean of all codes must lie, in steps, to tell the two readings of the zeros apart.
_NEAR = 0.3
_DECIDABLE_BITS = 4


@dataclass(frozen=True)
class Layout:
    """One Linear as its label has it, with the shapes that its parts then have."""

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
    folder: Path, table: Table, quantization: Mapping[str, Any], found: Findings, progress: Progress
) -> tuple[Mapping[str, TensorInfo], Mapping[str, TensorInfo]]:
    """A folder's label and packed Linears; returns its tensors as a model sees them, and those stored as numbers."""
    stored: Mapping[str, TensorInfo] = {name: entry.info for name, entry in table.entries.items()}
    tensors = {**stored, **dict.fromkeys(table.lost, LOST)}
    with found.guard("quantize_config.json"):
        check_copies(folder, read_json(folder / "config.json"), found)
    if table.entries and check_label(quantization, found):
        tensors = check_packed(table, quantization, found, progress)
    return tensors, {name: info for name, info in stored.items() if name.rpartition(".")[2] not in PARTS}


def label_of(module: str, quantization: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The label of one module: GPTQModel's `dynamic` rules over the rest; None where they leave it as it is."""
    for pattern, changes in (quantization.get("dynamic") or {}).items():
        if re.match(pattern.removeprefix("-:").removeprefix("+:"), module):
            return None if pattern.startswith("-:") else {**quantization, **changes}
    return quantization


def check_label(quantization: Mapping[str, Any], found: Findings) -> bool:
    """Whether the label is one that can be read at all."""
    known = {"bits": PACKABLE_BITS, "checkpoint_format": _FORMATS, "sym": (True, False), "desc_act": (True, False)}
    given = {"checkpoint_format": "gptq", "desc_act": False, **quantization}
    wrong = [f"{key} {given.get(key)!r}" for key, values in known.items() if given.get(key) not in values]
    size = given.get("group_size")
    if type(size) is not int or not (size == -1 or size > 0):
        wrong.append(f"group_size {size!r}")
    for text in wrong:
        found.problem(f"config.json: quantization_config says {text}, which no GPTQ reader knows; correct it")
    return not wrong


def check_packed(
    table: Table, quantization: Mapping[str, Any], found: Findings, progress: Progress
) -> dict[str, TensorInfo]:
    """Check every packed Linear; returns the tensors as a model sees them, each Linear's parts as one weight."""
    names = {*table.entries, *table.lost}
    modules = sorted({name.rpartition(".")[0] for name in names if name.rpartition(".")[2] in ("qweight", "qzeros")})
    shown = {name: entry.info for name, entry in table.entries.items()} | dict.fromkeys(table.lost, LOST)
    has_groups = any(name.endswith(".g_idx") for name in names)
    zeros = _Zeros()
    with progress.phase("checking codes", len(modules)) as advance:
        for module in modules:
            parts = {part for part in PARTS if shown.pop(f"{module}.{part}", None) is not None}
            shown[f"{module}.weight"] = LOST
            with found.guard(module):
                layout = _check_parts(module, parts, has_groups, table, quantization, found)
                if layout is not None:
                    packed = sum(table.entries[f"{module}.{part}"].info.bytes for part in parts)
                    size = (layout.rows, layout.columns)
                    shown[f"{module}.weight"] = TensorInfo(size, f"GPTQ{layout.bits}", packed, layout.bits)
                    _check_values(layout, parts, table, quantization, zeros, found)
            advance(1)
    if not modules:
        found.problem("config.json says gptq, but no tensor is packed (there is no qweight); download it again")
    _check_plain(shown, quantization, found)
    _check_zeros(zeros, quantization, found)
    return shown


# -- one Linear ------------------------------------------------------------------------------------------------------


def _check_parts(
    module: str, parts: set[str], has_groups: bool, table: Table, quantization: Mapping[str, Any], found: Findings
) -> Layout | None:
    """Which parts there are, and their types and shapes; None where the rest cannot be looked at."""
    for part in PARTS[: 4 if has_groups else 3]:
        if part not in parts:
            found.problem(f"{module} has no {part}, which its other parts need; download it again")
    if not set(PARTS[:3]) <= parts or any(f"{module}.{part}" in table.lost for part in parts):
        return None
    entries = {part: table.entries[f"{module}.{part}"] for part in parts}
    if f"{module}.weight" in table.entries:
        found.problem(f"{module} is stored as codes and as a weight too; remove one of them")
    for part, entry in entries.items():
        wanted = ("F16", "BF16", "F32") if part == "scales" else ("I32",)
        if entry.dtype not in wanted:
            found.problem(f"{module}.{part} is stored as {entry.dtype}, which must be {wanted[0]}; quantize it again")
            return None
    label = label_of(module, quantization)
    if label is None:
        found.problem(f"{module} is packed, but a `dynamic` rule in config.json says that it is not; correct the rule")
        label = quantization
    return _check_shapes(module, {part: entry.shape for part, entry in entries.items()}, label, found)


def _check_shapes(
    module: str, shapes: Mapping[str, tuple[int, ...]], label: Mapping[str, Any], found: Findings
) -> Layout | None:
    if any(len(shapes[part]) != 2 or 0 in shapes[part] for part in PARTS[:3]):
        found.problem(f"{module}: its parts are of shapes {dict(shapes)}, no GPTQ layout; quantize it again")
        return None
    (words, rows), bits = shapes["qweight"], label["bits"]
    own = shapes["qzeros"][1] * 32 // rows
    if own != bits and own in PACKABLE_BITS and shapes["qzeros"][1] * 32 == rows * own:
        found.problem(f"{module}: its tensors are of {own} bits, the label in config.json says {bits}; correct it")
        bits = own
    columns = words * 32 // bits
    size = columns if label["group_size"] == -1 else label["group_size"]
    layout = Layout(module, bits, rows, columns, size)
    wrong = {part: shape for part, shape in shapes.items() if shape != layout.shapes[part]}
    for part, shape in wrong.items():
        found.problem(
            f"{module}.{part} is {list(shape)}; {bits} bits in groups of {label['group_size']}, as config.json says, "
            f"make it {list(layout.shapes[part])}; correct the label or quantize it again"
        )
    return None if wrong else layout


def _check_values(
    layout: Layout,
    parts: set[str],
    table: Table,
    quantization: Mapping[str, Any],
    zeros: _Zeros,
    found: Findings,
) -> None:
    module = layout.module
    _check_scales(layout, table.read(f"{module}.scales").float(), found)
    group = contiguous_groups(layout.columns, layout.group_size)
    if "g_idx" in parts:
        stored = table.read(f"{module}.g_idx")
        if not _check_groups(layout, stored, bool(quantization.get("desc_act")), found):
            return
        group = stored
    raw = unpack(table.read(f"{module}.qzeros"), layout.bits, axis=1)
    half = 2 ** (layout.bits - 1)
    for version, constant in zip(_FORMATS, (half - 1, half), strict=True):
        if bool((raw == constant).all()):
            zeros.constant[version].append(module)
            return
    zeros.varying.append(module)
    if layout.bits <= _DECIDABLE_BITS:
        codes = unpack(table.read(f"{module}.qweight"), layout.bits)
        zeros.means.append(float(codes.float().mean() - raw[group.long()].float().mean()))


def _check_scales(layout: Layout, scales: torch.Tensor, found: Findings) -> None:
    name = f"{layout.module}.scales"
    finite = torch.isfinite(scales)
    if not bool(finite.all()):
        broken = (~finite).nonzero()[0].tolist()
        what = "NaN" if bool(torch.isnan(scales).any()) else "infinity"
        found.problem(
            f"{name}: {int((~finite).sum())} are {what}, the first at {broken}; quantize or download it again"
        )
        return
    sizes = scales.abs()
    if not bool(sizes.any()):
        found.problem(f"{name}: all are 0, so that the layer gives nothing; quantize or download it again")
        return
    largest = float(sizes.max())
    usual = float(sizes.median())
    if largest * 2 ** (layout.bits - 1) > _ABSURD_WEIGHT and largest > _ABSURD_RATIO * usual:
        found.problem(f"{name}: one is {largest:g}, where {usual:.3g} is usual in this layer; download it again")


def _check_groups(layout: Layout, group: torch.Tensor, desc_act: bool, found: Findings) -> bool:
    """Whether g_idx can be indexed with."""
    name = f"{layout.module}.g_idx"
    low, high = int(group.min()), int(group.max())
    if low < 0 or high >= layout.groups:
        found.problem(f"{name}: holds groups {low} to {high}, there are 0 to {layout.groups - 1}; download it again")
        return False
    in_order = bool(torch.equal(group.int(), contiguous_groups(layout.columns, layout.group_size)))
    if not desc_act and not in_order:
        found.problem(
            f"{name}: groups are not in the order of the columns, the label says desc_act false; set it to true"
        )
    if int(torch.bincount(group.long(), minlength=layout.groups).max()) > layout.group_size:
        found.problem(f"{name}: a group has more than {layout.group_size} columns; download it again")
    return True


# -- all of them -----------------------------------------------------------------------------------------------------


def _check_plain(shown: Mapping[str, TensorInfo], quantization: Mapping[str, Any], found: Findings) -> None:
    """Linears that readers will look for as codes, and that are stored as weights."""
    stages = quantization.get("modules_in_block_to_quantize") or []
    names = [name for stage in stages for name in (stage if isinstance(stage, list) else [stage])]
    plain = [
        module
        for name, info in shown.items()
        if name.endswith(".weight") and info.stored_as[:4] not in ("GPTQ", "LOST")
        for module in [name.removesuffix(".weight")]
        if any(module.endswith(f".{wanted}") for wanted in names) and label_of(module, quantization) is not None
    ]
    if plain:
        found.problem(
            f"{listed(plain)}: stored as weights, where the label has them as codes; exclude them by a `dynamic` rule "
            "in config.json, or download it again"
        )
    head = shown.get("lm_head.weight")
    if head is not None and head.stored_as.startswith("GPTQ") and not quantization.get("lm_head"):
        found.problem("lm_head is packed, but config.json says lm_head false; set it to true")


def _check_zeros(zeros: _Zeros, quantization: Mapping[str, Any], found: Findings) -> None:
    """Whether the zeros are of the version that the label says, as far as they tell."""
    label = quantization.get("checkpoint_format", "gptq")
    other = _FORMATS[1 - _FORMATS.index(label)]
    remedy = f"every weight would be one step off; set checkpoint_format to {other!r} in both config files"
    if wrong := zeros.constant[other]:
        found.problem(
            f"{listed(wrong)}: their zeros are those of a symmetric {other} file, the label says {label}; {remedy}"
        )
    wrong = [module for module in zeros.varying if (label_of(module, quantization) or quantization).get("sym")]
    if wrong:
        found.problem(
            f"{listed(wrong)}: their zeros vary, the label says sym true, and kernels for symmetric files do "
            "not look at zeros; set sym to false"
        )
    if not zeros.varying:
        return
    if not zeros.means:
        found.note(f"asymmetric {label}: at this many bits zeros do not tell whether the label's version is right")
        return
    # Trained weights are centred: read rightly, codes lie on both sides of their zeros alike.
    offset = median(zeros.means) - (1 if label == "gptq" else 0)
    if abs(offset - (1 if label == "gptq_v2" else -1)) < _NEAR:
        found.problem(
            f"weights are off by one step of their grids on average ({offset:+.2f}), those of a {other} file labelled "
            f"{label}; {remedy}"
        )
    elif abs(offset) >= _NEAR:
        found.note(f"asymmetric {label}: weights are off centre by {offset:+.2f} steps, which leaves the version open")
