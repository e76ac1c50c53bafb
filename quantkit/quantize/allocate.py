"""Bits where they are worth their bytes: of each Linear's candidates the ones of least predicted divergence that fit.

What a candidate costs the model is `Weighing.divergence` of its error, which adds up over Linears, so that the choice
is a knapsack with one item of each kind: an integer program, solved by HiGHS through scipy. The experts of a block get
one precision, and where vLLM is to load them the Linears that it fuses into one.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from itertools import product
from math import floor, gcd
from typing import get_args

from quantkit.blocks.families import FUSED
from quantkit.blocks.stream import ModelStream
from quantkit.codes import LinearPlan, Plan
from quantkit.codes.kinds import SIZES, Kind
from quantkit.containers import load, of_format
from quantkit.errors import MissingPackageError, UsageError
from quantkit.options import CheckpointFormat, GgmlType, QuantSpec, make
from quantkit.options.grid import Override
from quantkit.options.values import Allowance, parse_allowance
from quantkit.progress import size
from quantkit.quantize.targets import Target, on_grid_of, plan_linears
from quantkit.report import Report

_BITS = {"any": (2, 3, 4, 8), "vllm": (4, 8)}  # that there are kernels for
_GROUPS = (32, 64, 128)
_GAP = 1e-5  # between what is found and the least possible, as a fraction, at which the program may stop
_NODES = 100_000  # that it looks at: a limit in seconds would not find the same twice
_DIGITS = 4  # bytes by which a tensor's entry in a file's head may grow with its numbers


@dataclass(frozen=True)
class Candidate:
    """A precision that is chosen from.

    Attributes:
        changes: bits and group, as an override has them.
        plan: every Linear that it fits.
        bytes: of each of them, with scales, zeros and order.
    """

    changes: Override
    plan: Plan
    bytes: Mapping[str, int]


@dataclass(frozen=True)
class Unit:
    """Linears of a block that have one precision.

    Attributes:
        names: published ones.
        pattern: what overrides call it, before and behind the block's number.
        candidates: those that fit all of its Linears.
    """

    names: tuple[str, ...]
    block: int
    pattern: tuple[str, str]
    candidates: tuple[Candidate, ...]

    @property
    def bytes(self) -> list[int]:
        """Of each candidate."""
        return [sum(candidate.bytes[name] for name in self.names) for candidate in self.candidates]


@dataclass(frozen=True)
class End:
    """The embedding or the output matrix of a GGUF file, or the one that is both.

    Attributes:
        name: published one.
        option: field of `options.Ends` that names its type.
        types: bytes of each type that it may have.
    """

    name: str
    option: str
    types: Mapping[str, int]

    @property
    def bytes(self) -> list[int]:
        """Of each type."""
        return list(self.types.values())


@dataclass(frozen=True)
class Share:
    """How many of the quantized weights have a precision; None: not known yet. `type`: GGML's, in a GGUF file."""

    bits: int
    group_size: int
    weights: float | None = None
    type: str | None = None


@dataclass(frozen=True)
class Spent(Report):
    """What a budget was spent on.

    Attributes:
        asked: as it was given.
        least, most: bytes of the weight files that the candidates allow.
        shares: all candidates, by the weights that have them.
        bits, group_size: of most weights.
        bits_per_weight, bytes: of the output; before it is made, the most that the budget allows.
        predicted: the mean KL divergence, in nats, that the first pass predicts.
        gap: between that and the least that might be possible, as a fraction.
        ends: types that were chosen for embedding and output matrix, by published name.
    """

    asked: str
    least: int
    most: int
    shares: list[Share]
    bits: int
    group_size: int
    bits_per_weight: float
    bytes: int
    predicted: float | None = None
    gap: float | None = None
    ends: Mapping[str, str] = field(default_factory=dict)

    def lines(self) -> list[str]:
        told = sorted(self.shares, key=lambda share: -(share.weights or 0.0))
        if self.predicted is None or self.gap is None:
            bits = ", ".join(map(str, sorted({share.bits for share in told})))
            sizes = sorted({share.group_size for share in told}, key=lambda group: group % 2**31)
            groups = ", ".join("whole rows" if group == -1 else str(group) for group in sizes)
            names = f"{bits} bits in groups of {groups}"
            if told[0].type is not None:
                names = ", ".join(map(_called, told))
            names += "".join(f"; {name} too" for name in self.ends)
            held = f"{size(self.least)} to {size(self.most)}"
            return [f"budget {self.asked}; candidates: {names}, which take {held}"]
        names = ", ".join(f"{share.weights:.0%} {_called(share)}" for share in told if share.weights)
        names += "".join(f"; {name} {type}" for name, type in self.ends.items())
        return [
            f"budget {self.asked} spent on {names}",
            f"KL mean that a first pass predicted for this choice: {self.predicted:.4f}; at most {self.gap:.2g} of it "
            "could be saved by another",
        ]


def _called(share: Share) -> str:
    if share.type is not None:
        return share.type
    return f"{share.bits}-bit " + ("whole rows" if share.group_size == -1 else f"group {share.group_size}")


def group_for(width: int) -> int:
    """The group of a matrix that a budget does not choose for: the largest of them that divides it, or whole rows."""
    return max((group for group in _GROUPS if width % group == 0), default=-1)


def check_solver() -> None:
    """Refuse a budget where nothing can spend it. Raises MissingPackageError."""
    if find_spec("scipy") is None:
        raise MissingPackageError("scipy", "budget", "--budget")


def folder_candidates(
    stream: ModelStream, spec: QuantSpec, format: CheckpointFormat, readers: str = "any"
) -> list[Candidate]:
    """Precisions that a folder of a format can hold: bits by groups that divide a width, or whole rows where none does.

    Raises:
        UsageError: a format that has one precision for all.
    """
    row = of_format(format)
    if row.holds is None or not row.holds.mixed:
        raise UsageError(f"--budget gives Linears different precisions, and {row.one} has one for all")
    layout, source, weights = load(row.writes), stream.source, stream.weights

    @cache
    def fits(shape: tuple[int, int], own: QuantSpec) -> bool:
        whole = own.group_size == -1
        if whole == any(shape[1] % group == 0 for group in _GROUPS) or not (whole or shape[1] % own.group_size == 0):
            return False
        try:
            layout.check({"": LinearPlan(shape, own)})
        except UsageError:
            return False
        return True

    found = []
    asked = plan_linears(stream, spec)
    common = next(iter(asked.values())).spec.model_dump()
    for width, group in product(_BITS[readers], (*_GROUPS, -1)):
        changes = Override(bits=width, group_size=group)
        own = make(QuantSpec, **common | changes.changes())
        plan = {name: LinearPlan(linear.shape, own) for name, linear in asked.items() if fits(linear.shape, own)}
        held: Counter[str] = Counter()
        for tensor in layout.plan(source, weights, plan):
            module, _, part = tensor.name.rpartition(".")
            if module in plan and part != "bias":
                held[module] += tensor.bytes
        if plan:
            found.append(Candidate(changes, plan, held))
    return found


def ggml_candidates(stream: ModelStream, spec: QuantSpec) -> list[Candidate]:
    """GGML's types that GPTQ runs on; not Q2_0, which few builds of llama.cpp read yet."""
    asked = plan_linears(stream, spec)
    common = next(iter(asked.values())).spec
    found = []
    for kind in (Kind.__members__[name] for name in get_args(GgmlType) if name != "Q2_0"):
        block, held = SIZES[kind]
        own = common.model_copy(update=on_grid_of(kind.name))
        plan = {name: LinearPlan(one.shape, own) for name, one in asked.items() if one.shape[1] % block == 0}
        sizes = {name: one.shape[0] * one.shape[1] // block * held for name, one in plan.items()}
        if plan:
            found.append(Candidate(Override(ggml=own.ggml), plan, sizes))
    return found


class Allocator:
    """Chooses a candidate for every Linear of a model.

    Attributes:
        units: what is chosen for.
        target: what codes would be written into if every unit had its smallest candidate.
        ends: what else has a type to choose; a choice has theirs behind the units'.
        room: bytes that quantized Linears and these may take.
    """

    def __init__(
        self,
        stream: ModelStream,
        spec: QuantSpec,
        allowance: str | int,
        candidates: Sequence[Candidate],
        target_of: Callable[[QuantSpec, Mapping[str, str]], Target],
        readers: str = "any",
        ends: Sequence[End] = (),
    ) -> None:
        """
        Args:
            stream, spec: the model, and what its Linears are quantized to beside bits and groups.
            allowance: as `parse_allowance` reads it.
            candidates: what there is to choose from.
            target_of: what codes are written into, by a spec with overrides, and by types of ends.
            readers: "vllm": Linears that it fuses have one precision.
            ends: of a GGUF file; bits per weight do not count them, and leave them as they are.

        Raises:
            UsageError: a Linear that no candidate fits, or a budget that no choice meets, or all do.
        """
        self._spec, self._target_of, self._asked = spec, target_of, str(allowance)
        self._shapes = {name: linear.shape for name, linear in plan_linears(stream, spec).items()}
        self.units = _units(stream, self._shapes, candidates, FUSED if readers == "vllm" else {})
        self._candidates = [one for one in candidates if any(one in unit.candidates for unit in self.units)]
        allowed = parse_allowance(allowance)
        self.ends = tuple(ends) if allowed.bits_per_weight is None else ()
        self._sizes = [unit.bytes for unit in self.units] + [end.bytes for end in self.ends]
        self.target = self.target_with([sizes.index(min(sizes)) for sizes in self._sizes])
        self._fixed = self.target.bytes - sum(map(min, self._sizes))
        self._heads = self.target.head_bytes + _DIGITS * len(stream.weights.tensors)
        self.room = self._room(allowed)

    def _room(self, allowance: Allowance) -> int:
        weights = sum(rows * columns for rows, columns in self._shapes.values())
        least, most = (sum(map(choose, self._sizes)) for choose in (min, max))
        if allowance.bits_per_weight is not None:
            room = floor(allowance.bits_per_weight * weights / 8)
            said = [f"{8 * bytes / weights:.2f}bpw" for bytes in (least, most)]
        else:
            room = (allowance.bytes or 0) - self._fixed - self._heads
            said = [size(bytes + self._fixed + self._heads) for bytes in (least, most)]
        self._least, self._most, self._weights = least, most, weights
        if room < least:
            raise UsageError(
                f"--budget {self._asked}: the smallest of the candidates take {said[0]}; give at least that"
            )
        if room > most:
            raise UsageError(
                f"--budget {self._asked}: the largest of the candidates take {said[1]}, so there is nothing to choose; "
                "give less, or --bits and --group-size instead"
            )
        return room

    def trials(self) -> dict[str, tuple[QuantSpec, ...]]:
        """What each Linear is to be tried with, in the order of its unit's candidates."""
        return {
            name: tuple(candidate.plan[name].spec for candidate in unit.candidates)
            for unit in self.units
            for name in unit.names
        }

    def choose(self, losses: Mapping[str, Sequence[float]]) -> tuple[list[int], float]:
        """(each unit's candidate and each end's type, the program's gap) of least loss in the room; `losses` by Linear
        or end, and candidate."""
        return least_loss(self._by_row(losses), self._sizes, self.room)

    def _by_row(self, losses: Mapping[str, Sequence[float]]) -> list[list[float]]:
        """Of each unit's candidates, and of each end's types."""
        of_units = [
            [sum(found) for found in zip(*(losses[name] for name in unit.names), strict=True)] for unit in self.units
        ]
        return of_units + [list(losses[end.name]) for end in self.ends]

    def planned(self, chosen: Sequence[int], losses: Mapping[str, Sequence[float]]) -> dict[str, float]:
        """What each Linear and end is predicted to cost by a choice."""
        names = [*(unit.names for unit in self.units), *((end.name,) for end in self.ends)]
        return {name: losses[name][number] for own, number in zip(names, chosen, strict=True) for name in own}

    def front(self, losses: Mapping[str, Sequence[float]], points: int = 60) -> list[tuple[int, float]]:
        """(bytes of the weight files, predicted divergence) of choices that none of as few bytes is better than, from
        the smallest to the largest: those that are best at some price of a byte."""
        import numpy as np

        rows = self._by_row(losses)
        costs = [(np.asarray(row), np.asarray(sizes)) for row, sizes in zip(rows, self._sizes, strict=True)]
        prices = [
            (row[one] - row[other]) / (sizes[other] - sizes[one])
            for row, sizes in costs
            for one, other in product(range(len(row)), repeat=2)
            if sizes[other] > sizes[one] and row[one] > row[other]
        ]
        found = dict[int, float]()
        for price in np.quantile(prices or [0.0], np.linspace(0, 1, points)):
            numbers = [int(np.lexsort((sizes, row + price * sizes))[0]) for row, sizes in costs]
            size = sum(int(sizes[number]) for (_, sizes), number in zip(costs, numbers, strict=True))
            found[size + self._fixed] = float(sum(row[number] for (row, _), number in zip(costs, numbers, strict=True)))
        return sorted(found.items())

    def alike(self, chosen: Sequence[int], losses: Mapping[str, Sequence[float]]) -> dict[str, tuple[int, float]]:
        """The same of each candidate for all units that fits them, by its name, with the ends as they are chosen."""
        found, rows, ends = dict[str, tuple[int, float]](), self._by_row(losses), list(chosen[len(self.units) :])
        for one in self._candidates:
            if all(one in unit.candidates for unit in self.units):
                numbers = [unit.candidates.index(one) for unit in self.units] + ends
                size = sum(sizes[number] for sizes, number in zip(self._sizes, numbers, strict=True))
                own = next(iter(one.plan.values())).spec
                name = _called(Share(own.bits, own.group_size, type=one.changes.ggml))
                lost = sum(row[number] for row, number in zip(rows, numbers, strict=True))
                found[name] = size + self._fixed, lost
        return found

    def target_with(self, chosen: Sequence[int]) -> Target:
        """What codes of a choice are written into."""
        of_units = chosen[: len(self.units)]
        weights: Counter[Override] = Counter()
        for unit, number in zip(self.units, of_units, strict=True):
            weights[unit.candidates[number].changes] += sum(self._size(name) for name in unit.names)
        usual = weights.most_common(1)[0][0]
        blocks: dict[tuple[tuple[str, str], Override], list[int]] = defaultdict(list)
        for unit, number in zip(self.units, of_units, strict=True):
            if (changes := unit.candidates[number].changes) != usual:
                blocks[unit.pattern, changes].append(unit.block)
        overrides = tuple((f"{a}{_either(list(map(str, own)))}{b}", what) for ((a, b), what), own in blocks.items())
        given = self._spec.model_dump(exclude={"overrides"}) | usual.changes()
        ends = {end.option: kind for end, kind in self._types(chosen)}
        target = self._target_of(make(QuantSpec, **given, overrides=overrides), ends)
        wanted = {
            name: unit.candidates[number].plan[name]
            for unit, number in zip(self.units, of_units, strict=True)
            for name in unit.names
        }
        of_blocks = {name: linear for name, linear in target.plan.items() if linear.end is None}
        assert of_blocks == wanted, "the rules say what was chosen"
        return target

    def spent(
        self,
        chosen: Sequence[int] | None = None,
        gap: float | None = None,
        losses: Mapping[str, Sequence[float]] | None = None,
    ) -> Spent:
        """What to tell: before the choice, or of it, by the gap and the losses that it was made with."""
        counts: Counter[Override] = Counter()
        for unit, number in zip(self.units, chosen or (), strict=False):
            counts[unit.candidates[number].changes] += sum(self._size(name) for name in unit.names)
        specs = [(one.changes, next(iter(one.plan.values())).spec) for one in self._candidates]
        shares = [
            Share(own.bits, own.group_size, counts[what] / self._weights if chosen else None, what.ggml)
            for what, own in specs
        ]
        held, predicted, of_ends = self.room, None, sum(min(end.bytes) for end in self.ends)
        ends = dict.fromkeys((end.name for end in self.ends), "")
        if chosen is not None and losses is not None:
            sizes = [own[number] for own, number in zip(self._sizes, chosen, strict=True)]
            held, of_ends = sum(sizes), sum(sizes[len(self.units) :])
            predicted = sum(own[number] for own, number in zip(self._by_row(losses), chosen, strict=True))
            ends = {end.name: kind for end, kind in self._types(chosen)}
        usual = max(shares, key=lambda share: share.weights or 0.0)
        least, most = (bytes + self._fixed for bytes in (self._least, self._most))
        told = usual.bits, usual.group_size, 8 * (held - of_ends) / self._weights, held + self._fixed, predicted, gap
        return Spent(self._asked, least, most, shares, *told, ends)

    def _types(self, chosen: Sequence[int]) -> list[tuple[End, str]]:
        """Each end with the type that a choice gives it."""
        return [(end, [*end.types][number]) for end, number in zip(self.ends, chosen[len(self.units) :], strict=True)]

    def _size(self, name: str) -> int:
        rows, columns = self._shapes[name]
        return rows * columns


def _units(
    stream: ModelStream,
    shapes: Mapping[str, tuple[int, int]],
    candidates: Sequence[Candidate],
    fuses: Mapping[tuple[str, ...], str],
) -> list[Unit]:
    """Linears of a block by what has one precision, in order; `fuses`: by their last names, and what the whole is
    called."""
    fused = {part: (parts, whole) for parts, whole in fuses.items() for part in parts}
    units = []
    for index in range(len(stream.blocks)):
        groups: dict[tuple[str, str], list[str]] = defaultdict(list)
        for name, _ in stream.linears_in(index):
            if name in shapes:
                before, _, inside = name.partition(f".{index}.")
                around, experts, _ = inside.partition(".experts.")
                if experts:
                    groups[f"{before}.", f".{around}.experts*"].append(name)
                    continue
                last = inside.rpartition(".")[2]
                parts, whole = fused.get(last, ((last,), last))
                known = [part for part in parts if f"{name.removesuffix(last)}{part}" in shapes]
                alike = [*known, *([whole] if len(known) == len(parts) > 1 else [])]
                groups[f"{before}.", f".{inside.removesuffix(last)}{_either(alike)}"].append(name)
        for pattern, names in groups.items():
            fitting = tuple(one for one in candidates if all(name in one.plan for name in names))
            if not fitting:
                rows, columns = shapes[names[0]]
                raise UsageError(
                    f"--budget: no candidate fits {names[0]} ({rows} x {columns}); leave it out with --exclude"
                )
            units.append(Unit(tuple(names), index, pattern, fitting))
    return units


def _either(texts: Sequence[str]) -> str:
    """A pattern of one of these."""
    return texts[0] if len(texts) == 1 else f"{{{','.join(texts)}}}"


def least_loss(losses: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]], room: int) -> tuple[list[int], float]:
    """One choice of each row whose sizes fit into `room` and whose losses add up to the least: (choices, gap).

    Args:
        losses: of each choice, at least 0.
        sizes: of each choice, whole numbers above 0.
        room: at least the sum of the smallest sizes.
    """
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    counts = [len(row) for row in losses]
    owner = np.repeat(np.arange(len(counts)), counts)
    one = csr_array((np.ones(len(owner)), (owner, np.arange(len(owner)))))
    unit = gcd(*(size for row in sizes for size in row))
    held = np.concatenate([np.asarray(row, float) / unit for row in sizes])
    cost = np.concatenate([np.asarray(row, float) for row in losses])
    least = sum(min(row) for row in losses)
    cost /= max(least, float(cost.max()) * 1e-9) or 1.0  # a solver's tolerances are about 1
    found = milp(
        cost,
        integrality=np.ones_like(cost),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one, 1, 1), LinearConstraint(held[None], 0, room // unit)],
        options={"mip_rel_gap": _GAP, "node_limit": _NODES},
    )
    assert found.x is not None, found.message
    parts = np.split(found.x, np.cumsum(counts)[:-1])
    chosen = [int(part.argmax()) for part in parts]
    assert sum(row[number] for row, number in zip(sizes, chosen, strict=True)) <= room
    return chosen, float(found.mip_gap or 0.0)
