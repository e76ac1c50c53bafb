"""A run's refining: steps, judgements on held-out windows, and what a stopped run goes on from."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from quantkit.blocks.budget import Budget
from quantkit.blocks.memory import MemoryPlan, plan_refining
from quantkit.blocks.stream import ModelStream
from quantkit.blocks.workers import worker_count
from quantkit.codes import Codes, put_together
from quantkit.late import torch
from quantkit.progress import Progress
from quantkit.quantize.refine import CodesOf, Course, Refining, Settings, Student, step_share, step_windows
from quantkit.quantize.targets import Target
from quantkit.quantize.token_weights import no_gradient, of_first
from quantkit.runs.journal import Journal
from quantkit.runs.landing import Landed, block_file, land_refining, landed_refining
from quantkit.runs.ranks import ALONE, Ranks

_OF = 8  # windows one is held out, but no more than these
_MOST = 8


@dataclass(frozen=True)
class RefiningReport:
    """What refining did, by the mean divergence on held-out calibration windows, nats.

    Attributes:
        before: of the codes as they were made.
        after: of what was kept.
        step: after how many steps that was; 0 where none made it better.
        steps: how many were taken.
        windows: held out.
    """

    before: float
    after: float
    step: int
    steps: int
    windows: int

    def line(self) -> str:
        """What to show."""
        kept = f"step {self.step} of {self.steps}" if self.step else "no step made it better, none is kept"
        return f"refined: divergence on held-out windows {self.before:.4g} -> {self.after:.4g} ({kept})"


@dataclass(frozen=True)
class Refined:
    """A refined model: gains by published name, as they are to be written, and what was done."""

    gains: Mapping[str, torch.Tensor]
    report: RefiningReport
    _student: Student

    def linear(self, name: str, linear: Codes) -> Codes:
        """The same codes of a Linear, on the refined grid."""
        return self._student.linear(name, linear)


def refine_run(
    landed: Landed,
    journal: Journal | None,
    stream: ModelStream,
    tokens: torch.Tensor,
    target: Target,
    steps: int,
    progress: Progress,
    ranks: Ranks = ALONE,
) -> Refined | None:
    """Refine what all blocks of a run landed as; the target writes gains as they are then. As `refine`."""
    ranks.wait_for(block_file(landed.folder, landed.blocks - 1), "leave --refine out")

    @lru_cache(1)
    def codes(index: int) -> Sequence[tuple[str, Codes]]:
        return [(one.name, put_together(one.tensors, one.fields, stream.device)) for one in landed.linears(index)]

    with _in_float32(stream):
        place, settings = (landed.folder, journal), Settings(steps=steps)
        found = refine(stream, tokens, codes, target.gain_dtype, *place, progress, settings, ranks)
    if found is not None:
        target.changed.update(found.gains)
    return found


def refine(
    stream: ModelStream,
    tokens: torch.Tensor,
    codes: CodesOf,
    gain_dtype: Callable[[str], torch.dtype],
    folder: Path,
    journal: Journal | None,
    progress: Progress,
    settings: Settings | None = None,
    ranks: Ranks = ALONE,
) -> Refined | None:
    """Tune scales and gains of norms; None, and said why, where the model has no gradient.

    All ranks call it alike, each runs its share of the windows, and each gets the same. Not to be run in inference
    mode, whose tensors have no gradients.

    Args:
        stream: the unquantized model.
        tokens: int64 [samples, seq_len], the calibration windows; some are held out.
        codes: of each block, on the stream's device.
        gain_dtype: what a gain is written in, by its published name.
        folder, journal: of the run; what an earlier one of the same left there is gone on from. No journal on all
            ranks but the first.
        settings: how far and how fast; None: as measured to be good.

    Raises:
        UsageError: a budget that was given and is too little.
    """
    if (why := no_gradient(stream, tokens)) is not None:
        progress.note(f"nothing is refined, since {stream.source.config.model_type} {why}")
        return None
    held = held_out(len(tokens))
    others = [i for i in range(len(tokens)) if i not in held]
    if not others:
        progress.note("nothing is refined: one calibration window leaves none to hold out")
        return None
    settings = settings or Settings()
    mine = [window for windows in (held, others) for window in windows[ranks.rank :: ranks.size]]
    memory = _plan(stream, len(mine), tokens.shape[1], stream.budget // ranks.here, ranks)
    memory.note(progress)
    student = Student(stream, codes, settings, gain_dtype)
    refining = Refining(stream, tokens, student, memory, progress, mine=mine, ranks=ranks)
    course = Course(student, settings)
    found = ranks.from_first(lambda: landed_refining(folder, of_first(journal)))
    with progress.phase("refining", settings.steps) as advance:
        if found is not None:
            course.unpack([(int(step), float(value)) for step, value in found[0]["judged"]], found[1])
            progress.note(f"refining goes on after step {course.steps}")
        else:
            course.judge(refining.divergence(held))
        advance(course.steps)
        while not course.done:
            course.step(refining.gradients(step_windows(others, course.steps, tokens.shape[1])))
            if course.due:
                course.judge(refining.divergence(held))
                progress.detail(f"step {course.steps}: divergence on held-out windows {course.judged[-1][1]:.4g}")
                if ranks.first:
                    land_refining(folder, of_first(journal), course.packed(), course.judged)
            advance(1)
    student.offsets = course.best
    step, after = min(course.judged, key=lambda one: math.inf if math.isnan(one[1]) else one[1])
    report = RefiningReport(course.judged[0][1], after, step, course.steps, len(held))
    progress.note(report.line())
    return Refined(student.gains(), report, student)


def held_out(windows: int) -> list[int]:
    """Numbers of those that no step looks at, spread evenly."""
    count = min(_MOST, max(1, windows // _OF))
    return [(2 * i + 1) * windows // (2 * count) for i in range(count)]


def plan_refining_memory(stream: ModelStream, samples: int, seq_len: int) -> MemoryPlan:
    """What `refine` will do for memory with so many calibration windows. Raises UsageError."""
    with _in_float32(stream):
        return _plan(stream, samples, seq_len, stream.budget)


def refining_multiplications(stream: ModelStream, samples: int, seq_len: int, steps: int) -> int:
    """Multiplications, with their additions, of `refine`: the unquantized model once, the judgements, and the steps.

    A step runs the blocks forward twice and back by states and by weights, and the head on five products.
    """
    held = len(held_out(samples))
    blocks = sum(rows * columns for _, (rows, columns) in stream.linears())
    head = stream.vocabulary * int(stream.source.config.get_text_config().hidden_size)
    judgements = 1 + -(-steps // Settings().every)
    tokens = len(step_windows(range(max(1, samples - held)), 0, seq_len)) * seq_len
    judged = held * seq_len * (blocks + 2 * head)
    return samples * seq_len * blocks + judgements * judged + steps * tokens * (4 * blocks + 5 * head)


def _plan(stream: ModelStream, samples: int, seq_len: int, budget: Budget, ranks: Ranks = ALONE) -> MemoryPlan:
    """That of a rank with so many windows."""
    step = step_share(samples, seq_len, ranks)
    return plan_refining(
        *(stream, samples * seq_len, step * seq_len, seq_len, budget), worker_count(stream.device, max(1, step))
    )


@contextmanager
def _in_float32(stream: ModelStream) -> Iterator[None]:
    """While inside the stream computes in float32: a step is often less than what bfloat16 tells apart."""
    before, stream.dtype = stream.dtype, torch.float32
    try:
        yield
    finally:
        stream.dtype = before
