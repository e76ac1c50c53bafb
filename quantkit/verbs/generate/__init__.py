"""The verb `generate`: a file of prompts in, a file of answers out, line by line."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from quantkit.blocks.open import named, note_source, open_stream
from quantkit.blocks.stream import ModelStream
from quantkit.blocks.whole import load_on_kernels, note_room
from quantkit.options import Decoding
from quantkit.options.verbs import Generate
from quantkit.progress import SILENT, Progress, counted
from quantkit.report import Report
from quantkit.runs.answers import appending, begun, check_answers, is_complete, line_of
from quantkit.runs.atomic import absolute_file
from quantkit.runs.record import check_unchanged, origin
from quantkit.verbs import verb
from quantkit.verbs.generate.decoding import Answer, Request
from quantkit.verbs.generate.prompts import asked_prompts
from quantkit.verbs.generate.speaker import Speaker


@dataclass(frozen=True)
class GenerateReport(Report):
    """What `generate` did, or with `dry_run` would do.

    Attributes:
        out: the file of answers.
        template: what "auto" turned out to be.
        kernels: what multiplied quantized weights; None where they were dequantized, or nothing was left to do.
        prompts: how many.
        resumed: how many had their answers before.
        finished: answers of this run by what ended them, "eos" or "length".
        prompt_tokens, output_tokens: of this run's answers, summed; of a dry run the prompts' alone.
        longest_prompt: in tokens.
    """

    out: Path
    template: str
    kernels: str | None
    prompts: int
    resumed: int
    finished: dict[str, int]
    prompt_tokens: int
    output_tokens: int
    longest_prompt: int
    seconds: float = 0.0
    dry_run: bool = False

    def lines(self) -> Iterator[str]:
        if self.dry_run:
            yield (
                f"would answer {counted(self.prompts, 'prompt')} of {counted(self.prompt_tokens, 'token')}, "
                f"{self.longest_prompt} at most, by template {self.template}, into {self.out}"
            )
            return
        before = f", {counted(self.resumed, 'was', 'were')} there before" if self.resumed else ""
        cut = self.finished.get("length", 0)
        ended = f"; {cut} ended for want of room" if cut else ""
        yield f"wrote {self.out}"
        yield f"{counted(sum(self.finished.values()), 'answer')}{before}{ended}"
        yield f"{counted(self.output_tokens, 'token')} in {self.seconds:.0f} s"


@verb(Generate)
def generate(options: Generate, *, progress: Progress = SILENT) -> GenerateReport:
    """Answer every prompt of a file. Each batch of answers is on the disk before the next is begun, for `resume`.

    A line of `out` is its prompt's line with `id`, `output`, `finish_reason` ("eos", or "length" where the room ended),
    `prompt_tokens` and `output_tokens`; lines are in the order of the prompts. Beside it, `OUT.quantkit.json` says how
    they were made. Randomness is each prompt's own, from `seed` and its id.

    Raises:
        UsageError: options out of range, an output in the way, or one that cannot be gone on with.
        CalibrationError: names the line of a prompt that cannot be read, rendered or fitted in.
        QuantkitError: the model or the disk failed; what was answered stays.
        Interrupted: the same of a KeyboardInterrupt.
    """
    started = time.perf_counter()
    spec = options.part(Decoding)
    target, asked = absolute_file(options.out), Path(options.prompts).expanduser()
    check_answers(target, asked, options.resume, options.force, options.dry_run)
    wanted = asked_prompts(options.prompts, options.system)
    stream = open_stream(named(options.model, options.base, options.delta), options)
    note_source(stream.source, progress)
    speaker = Speaker.of(stream.source, options.template, spec)
    progress.note(f"{stream.source.label}: prompts by template {speaker.template}")
    requests = speaker.requests(wanted)
    _note_room(requests, speaker, progress)
    longest = max(len(request.ids) for request in requests)
    report = GenerateReport(target, speaker.template, None, len(wanted), 0, {}, 0, 0, longest, dry_run=options.dry_run)
    if options.dry_run:
        note_room(stream, progress)
        return replace(report, prompt_tokens=sum(len(request.ids) for request in requests))
    settings = {"recipe": _recipe(speaker, stream, options.system), **origin(stream.source)}
    done = begun(target, settings, wanted) if options.resume else 0
    if options.resume and done == len(wanted) and is_complete(target):
        return replace(report, resumed=done, seconds=time.perf_counter() - started)
    loaded = load_on_kernels(stream, options.trust_remote_code, progress)
    settings["recipe"]["kernels"] = loaded.kernels
    if done:
        begun(target, settings, wanted)
    answers: list[Answer] = []
    phase = progress.phase("answering", len(wanted) - done)
    with appending(target, settings, done, options.resume, options.force) as file, phase as advance:
        for found in speaker.batches(loaded.model, requests, done, options.batch_size):
            batch = slice(done + len(answers), done + len(answers) + len(found))
            file.write(
                [
                    line_of(prompt, speaker.text(new.ids, prompt.record), new.finish, len(request.ids), len(new.ids))
                    for prompt, request, new in zip(wanted[batch], requests[batch], found, strict=True)
                ]
            )
            answers += found
            advance(len(found))
        check_unchanged(stream.source)
    return replace(
        report,
        kernels=loaded.kernels,
        resumed=done,
        finished=dict(sorted(Counter(answer.finish for answer in answers).items())),
        prompt_tokens=sum(len(request.ids) for request in requests[done:]),
        output_tokens=sum(len(answer.ids) for answer in answers),
        seconds=time.perf_counter() - started,
    )


def _recipe(speaker: Speaker, stream: ModelStream, system: str | None) -> dict[str, Any]:
    """What decides the answers, beside model and prompts. A batch's size decides on nothing but rounding."""
    return {
        "template": speaker.template,
        "system": system,
        **speaker.spec.model_dump(exclude={"seed"}),
        "seed": speaker.spec.seed,
        "device": stream.device.type,
        "dtype": str(stream.dtype).removeprefix("torch."),
    }


def _note_room(requests: Sequence[Request], speaker: Speaker, progress: Progress) -> None:
    short = [request.room for request in requests if request.room < speaker.spec.max_new_tokens]
    if short:
        progress.note(
            f"{len(short)} of {counted(len(requests), 'prompt')} {'leaves' if len(short) == 1 else 'leave'} less room "
            f"than {speaker.spec.max_new_tokens} tokens in the model's {speaker.context}: the shortest answer ends "
            f"after {counted(min(short), 'token')}"
        )
