"""A run's refining: steps, judgements on held-out windows, and what a stopped run goes on from."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from quantkit.blocks.memory import MemoryPlan, plan_refining
from quantkit.blocks.stream import ModelStream
from quantkit.blocks.workers import worker_count
from quantkit.codes import Codes, put_together
from quantkit.late import torch
from quantkit.progress import Progress
from quantkit.quantize.refine import CodesOf, Course, Refining, Settings, Student, step_windows
from quantkit.quantize.targets import Target
from quantkit.quantize.token_weights import no_gradient
from quantkit.runs.journal import Journal
from quantkit.runs.landing import land_refining, landed_blocks, landed_refining
from quantkit.runs.unfinished import Run

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
    run: Run, stream: ModelStream, tokens: torch.Tensor, target: Target, progress: Progress
) -> Refined | None:
    """Refine what all blocks of a run landed as; the target writes gains as they are then. As `refine`."""
    landed = landed_blocks(run)

    @lru_cache(1)
    def codes(index: int) -> Sequence[tuple[str, Codes]]:
        return [(one.name, put_together(one.tensors, one.fields, stream.device)) for one in landed.linears(index)]

    with _in_float32(stream):
        found = refine(stream, tokens, codes, target.gain_dtype, run.folder, run.journal, progress)
    if found is not None:
        target.changed.update(found.gains)
    return found


def refine(
    stream: ModelStream,
    tokens: torch.Tensor,
    codes: CodesOf,
    gain_dtype: Callable[[str], torch.dtype],
    folder: Path,
    journal: Journal,
    progress: Progress,
    settings: Settings | None = None,
) -> Refined | None:
    """Tune scales and gains of norms; None, and said why, where the model has no gradient.

    Not to be run in inference mode, whose tensors have no gradients.

    Args:
        stream: the unquantized model.
        tokens: int64 [samples, seq_len], the calibration windows; some are held out.
        codes: of each block, on the stream's device.
        gain_dtype: what a gain is written in, by its published name.
        folder, journal: of the run; what an earlier one of the same left there is gone on from.
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
    memory = plan_refining_memory(stream, *tokens.shape)
    memory.note(progress)
    student = Student(stream, codes, settings, gain_dtype)
    refining = Refining(stream, tokens, student, memory, progress)
    course = Course(student, settings)
    found = landed_refining(folder, journal)
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
                land_refining(folder, journal, course.packed(), course.judged)
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
    step = len(step_windows(range(samples), 0, seq_len))
    workers = worker_count(stream.device, step)
    with _in_float32(stream):
        return plan_refining(stream, samples * seq_len, step * seq_len, seq_len, stream.budget, workers)


@contextmanager
def _in_float32(stream: ModelStream) -> Iterator[None]:
    """While inside the stream computes in float32: a step is often less than what bfloat16 tells apart."""
    before, stream.dtype = stream.dtype, torch.float32
    try:
        yield
    finally:
        stream.dtype = before
