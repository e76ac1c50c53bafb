"""What each candidate of a Linear would cost the model: a pass over the unquantized one, before anything is quantized.

Stages are gathered as they are for quantizing, and each Linear is quantized to all of its candidates with one factor
of the stage's Hessian; its weight stays as it is. The errors are judged by tokens that were held out (`holdout`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from quantkit.blocks.budget import Budget
from quantkit.blocks.stages import Reading
from quantkit.blocks.stream import ModelStream
from quantkit.codes import Codes, LinearPlan, Plan
from quantkit.codes.kinds import Kind
from quantkit.errors import NumericError, UsageError
from quantkit.late import torch
from quantkit.options import QuantSpec
from quantkit.progress import Progress
from quantkit.quantize.allocate import Allocator, Spent
from quantkit.quantize.blockwise import StageWork, in_batches, quantize_blocks
from quantkit.quantize.ends import Rounded, end_losses
from quantkit.quantize.gptq import SharedFactor
from quantkit.quantize.gptq_grid import check_losses
from quantkit.quantize.hessian import row_losses
from quantkit.quantize.holdout import EVERY, HeldOutSums
from quantkit.quantize.methods import Sums
from quantkit.quantize.sharing import Sharing
from quantkit.quantize.targets import Target
from quantkit.quantize.token_weights import TokenWeights, of_first
from quantkit.runs.atomic import fingerprint
from quantkit.runs.journal import Journal
from quantkit.runs.landing import land_choice, landed_choice
from quantkit.runs.ranks import Ranks
from quantkit.runs.shared_weights import keep_losses, take_losses

_LOSSES = "losses."
# Which fields of a spec trials do without.
_UNTRIED = {"correct", "row_feedback", "refine", "refine_steps", "include", "exclude", "overrides"}

Trials = Mapping[str, Sequence[QuantSpec]]
"""What each Linear is tried with, by its published name; specs differ in grids alone."""

OnCodes = Callable[[str, Codes], None]


def trial_losses(
    stream: ModelStream,
    tokens: torch.Tensor,
    trials: Trials,
    weights: TokenWeights,
    budget: Budget,
    sharing: Sharing,
    progress: Progress,
    on_codes: OnCodes | None = None,
) -> dict[str, list[float]]:
    """The mean KL divergence, in nats, that each candidate of each Linear is predicted to make; alike on all ranks.

    Args:
        tokens: int64 [samples, seq_len], the calibration windows.
        budget: what the pass may take, as `quantize_blocks` has it.
        on_codes: gets each Linear's name and the codes of its candidates, one after another in their order.

    Raises:
        NumericError: an activation that is not finite.
        UsageError: a Linear of which no gradient is known.
    """
    if len(in_batches(tokens, stream.device)) < EVERY:
        progress.warn(
            "too few calibration tokens to hold any out: candidates seem better than they are; more --samples"
        )
    shapes, found = dict(stream.linears()), dict[str, list[float]]()
    plan: Plan = {
        name: LinearPlan(shapes[name], specs[0].model_copy(update={"correct": 0.0})) for name, specs in trials.items()
    }
    work_of = partial(_TrialWork, trials, found, on_codes)
    arguments = stream, tokens, plan, lambda *_: None, budget, progress
    quantize_blocks(*arguments, sharing=sharing, weights=weights, work_of=work_of)
    return found


@dataclass(frozen=True)
class Choice:
    """What was chosen for a run's Linears.

    Attributes:
        target: what their codes are written into.
        spent: what to tell of it.
        planned: each Linear's predicted divergence, in nats, and that of embedding and output matrix.
        front: bytes of the weight files and predicted divergence of what would be chosen from the fewest to the most.
        alike: the same of one candidate for all, by its name.
    """

    target: Target
    spent: Spent
    planned: Mapping[str, float]
    front: Sequence[tuple[int, float]]
    alike: Mapping[str, tuple[int, float]]


def chosen_for(
    allocator: Allocator,
    stream: ModelStream,
    tokens: torch.Tensor,
    weights: TokenWeights | None,
    folder: Path,
    journal: Journal | None,
    sharing: Sharing,
    progress: Progress,
    deciding: str = "",
) -> Choice:
    """The choice that a run has in its folder, made now unless it has. All ranks call it alike.

    Args:
        journal: of the run; None on all ranks but the first.
        deciding: fingerprint of all that decides what candidates lose, but for these; as `journal`.

    Raises:
        UsageError: a model without gradients, by which nothing can be chosen.
    """
    if weights is None:
        raise UsageError("--budget: without gradients nothing tells what bits are worth; give --bits and --group-size")
    ranks = sharing.ranks
    kept = ranks.from_first(lambda: landed_choice(folder, of_first(journal)))
    if kept is None:
        known = _known_losses(stream, tokens, allocator, weights, sharing, progress, deciding)

        def choose() -> dict[str, torch.Tensor]:
            with progress.phase("choosing", 1) as advance:
                chosen, gap = allocator.choose(_losses(known))
                advance(1)
            decided = {**known, "chosen": torch.tensor(chosen, dtype=torch.int32), "gap": torch.tensor([gap])}
            land_choice(folder, of_first(journal), decided)
            return decided

        kept = ranks.from_first(choose)
    found, chosen = _losses(kept), kept["chosen"].tolist()
    spent = allocator.spent(chosen, float(kept["gap"]), found)
    curve = allocator.front(found), allocator.alike(chosen, found)
    return Choice(allocator.target_with(chosen), spent, allocator.planned(chosen, found), *curve)


def losses_of_ends(
    stream: ModelStream,
    tokens: torch.Tensor,
    ends: Mapping[str, Sequence[Rounded]],
    weights: TokenWeights,
    ranks: Ranks,
) -> dict[str, list[float]]:
    """What each of these types or codes of embedding and output matrix, by published name, is predicted to cost: alike
    on all ranks, of which the first finds it; {} where nothing tells."""
    if weights.ends is None or not ends:
        return {}
    known = weights.ends
    return ranks.from_first(lambda: end_losses(stream, known(), tokens.numel(), ends))


def _known_losses(
    stream: ModelStream,
    tokens: torch.Tensor,
    allocator: Allocator,
    weights: TokenWeights,
    sharing: Sharing,
    progress: Progress,
    deciding: str,
) -> dict[str, torch.Tensor]:
    """What candidates lose, float32 by `_LOSSES` and the name of a Linear or an end: as another run has found it, or
    found now."""
    trials = allocator.trials()
    ends = {end.name: [*end.types] for end in allocator.ends}
    kinds = {name: [Kind.__members__[one] for one in types] for name, types in ends.items()}
    tried = {name: [spec.model_dump(exclude=_UNTRIED) for spec in specs] for name, specs in trials.items()}
    budget = stream.budget // sharing.ranks.here

    def shared(what: str, of: object, find: Callable[[], Mapping[str, Sequence[float]]]) -> dict[str, torch.Tensor]:
        key = fingerprint({"decided by": deciding, what: of})
        if (known := sharing.ranks.from_first(lambda: take_losses(key))) is not None:
            progress.note(f"what an earlier variant found that candidates of {what} lose is used")
            return known
        found = {f"{_LOSSES}{name}": torch.tensor(own, dtype=torch.float32) for name, own in find().items()}
        if sharing.ranks.first:
            keep_losses(key, found)
        return found

    known = shared("Linears", tried, lambda: trial_losses(stream, tokens, trials, weights, budget, sharing, progress))
    if ends:
        known |= shared("ends", ends, lambda: losses_of_ends(stream, tokens, kinds, weights, sharing.ranks))
    return known


def _losses(kept: Mapping[str, torch.Tensor]) -> dict[str, list[float]]:
    return {key.removeprefix(_LOSSES): own.tolist() for key, own in kept.items() if key.startswith(_LOSSES)}


class _TrialWork(StageWork):
    """Tries all candidates of a stage's Linears; puts what they lose into `found`."""

    def __init__(
        self, trials: Trials, found: dict[str, list[float]], on_codes: OnCodes | None, *arguments: Any
    ) -> None:
        super().__init__(*arguments)
        self._trials, self._found, self._on_codes = trials, found, on_codes

    def _sums(self, stage: int, columns: int, device: torch.device) -> Callable[[], Sums]:
        return partial(HeldOutSums, columns, device, len(self._stages[stage]))

    def _beside(self, stage: int, batch: int, read: Reading) -> list[Any]:
        own = [self._weighing.own(self._names[name], batch, read) for name in self._stages[stage]]
        return [self._weighing.start + batch, *own]

    def quantize(self, stage: int) -> None:
        modules, (H, judges), tokens, _ = self._finished(stage)
        judge_of = dict(zip((self._names[name] for name in modules), judges, strict=True))
        factor = SharedFactor()
        stacks: dict[tuple[QuantSpec, ...], list[str]] = {}
        for linear in modules:
            stacks.setdefault(tuple(self._trials[self._names[linear]]), []).append(linear)
        for specs, linears in stacks.items():
            names, stored = [self._names[name] for name in linears], [self._stored(name).float() for name in linears]
            for spec in specs:
                try:
                    solved = self._sharing.solve(factor, torch.cat(stored), H, spec)
                except NumericError as error:
                    raise NumericError(f"{', '.join(names)}: {error}") from None
                found: Sequence[Codes] = solved.linear.split([len(W) for W in stored])
                for name, W, codes in zip(names, stored, found, strict=True):
                    if self._on_codes is not None:
                        self._on_codes(name, codes)
                    loss = row_losses(W, codes, judge_of[name])
                    self._found.setdefault(name, []).append(self._predicted(name, loss, tokens))
                    check_losses(self._found[name][-1:], W.device)

    def _predicted(self, name: str, loss: torch.Tensor, tokens: int) -> float:
        predicted = self._weighing.divergence(name, loss)
        if predicted is None and tokens:
            raise UsageError(f"--budget: no gradient is known of {name}, so nothing tells what its bits are worth")
        return predicted or 0.0
