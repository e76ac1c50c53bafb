"""Answers side by side: what every model says to the same prompts, and where a variant's answer parts from REF's."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

from quantkit.blocks.stream import ModelStream
from quantkit.blocks.whole import load_model
from quantkit.containers.source import Source
from quantkit.late import torch
from quantkit.options import Asking, Decoding, TemplateName, make
from quantkit.progress import Progress
from quantkit.runs.answers import Appender, kept_answers
from quantkit.runs.journal import Journal
from quantkit.runs.outputs import staged_folder
from quantkit.runs.unfinished import working
from quantkit.tokens.datasets import HELD_OUT
from quantkit.tokens.text import check_tokens
from quantkit.verbs.generate.decoding import Request
from quantkit.verbs.generate.prompts import PromptLine, asked_prompts
from quantkit.verbs.generate.speaker import Speaker

_BATCH = 8

_Line = Mapping[str, Any]
"""An answer as it is kept: its ids, and what ended it."""


# -- what a report holds ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Said:
    """A model's answer.

    Attributes:
        output: its text, special tokens written out.
        finish_reason: "eos", or "length" where its room ended.
        output_tokens: how many.
        parts_after: tokens that are the reference's before the first that is not; None where all are.
        mark: from and to which character of `output` that token stands; at its end where the answer ends there.
    """

    output: str
    finish_reason: str
    output_tokens: int
    parts_after: int | None = None
    mark: tuple[int, ...] | None = None


@dataclass(frozen=True)
class AskedPrompt:
    """A prompt with its answers by the model's name, the reference's first; `prompt` is its text without a template."""

    id: Any
    skill: str | None
    prompt: str
    prompt_tokens: int
    answers: dict[str, Said]


@dataclass(frozen=True)
class Agreement:
    """How far a variant answers as the reference does.

    Attributes:
        prompts: how many.
        equal: share of answers that are equal to the last token.
        parts_after: the median of equal tokens before the others part; None where none does.
    """

    prompts: int
    equal: float
    parts_after: float | None

    @classmethod
    def of(cls, answers: Sequence[Said]) -> Agreement:
        parted = [said.parts_after for said in answers if said.parts_after is not None]
        equal = fmean(said.parts_after is None for said in answers)
        return cls(len(answers), equal, median(parted) if parted else None)


@dataclass(frozen=True)
class Answers:
    """What all models answered, always with the likeliest token.

    Attributes:
        name: of the file of prompts, or of the bundled records.
        template: what "auto" turned out to be.
        tokens_sha256: of all prompts' ids.
        agreement: by the variant's name.
        skills: the same by skill, of prompts that have one.
        prompts: in order.
    """

    name: str
    template: str
    max_new_tokens: int
    tokens_sha256: str
    agreement: dict[str, Agreement]
    skills: dict[str, dict[str, Agreement]]
    prompts: list[AskedPrompt]


def shown_tokens(count: float | None) -> str:
    """A median of tokens; nothing where there is none."""
    return "" if count is None else f"{count:g} token{'' if count == 1 else 's'}"


# -- asking ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Questions:
    """Prompts as the reference's template and tokenizer make them, for all models.

    Attributes:
        name: of where they come from.
        speaker: the reference's, with the shortest of all models' contexts.
    """

    name: str
    prompts: list[PromptLine]
    requests: list[Request]
    speaker: Speaker

    @classmethod
    def of(cls, options: Asking, template: TemplateName, sources: Sequence[Source]) -> Questions | None:
        """What the models are asked; None where that is nothing.

        Raises:
            UsageError: a template that the reference's tokenizer lacks.
            CalibrationError: names a prompt that cannot be read, rendered or fitted in.
            SourceError: a model that does not embed one of the ids.
        """
        if options.prompts is None:
            return None
        prompts = _spread(asked_prompts(options.prompts), options.prompt_count)
        spec = make(Decoding, greedy=True, max_new_tokens=options.max_new_tokens)
        speaker = Speaker.of(sources[0], template, spec)
        contexts = [getattr(one.config.get_text_config(), "max_position_embeddings", None) for one in sources]
        speaker = replace(speaker, context=min((most for most in contexts if most is not None), default=None))
        requests = speaker.requests(prompts)
        for source in sources:
            check_tokens(torch.tensor([token for request in requests for token in request.ids]), source)
        name = HELD_OUT if str(options.prompts) == HELD_OUT else Path(options.prompts).name
        return cls(name, prompts, requests, speaker)

    @property
    def facts(self) -> dict[str, Any]:
        """What decides the answers, beside the models."""
        ids = json.dumps([list(request.ids) for request in self.requests])
        return {
            "name": self.name,
            "template": self.speaker.template,
            "max_new_tokens": self.speaker.spec.max_new_tokens,
            "tokens_sha256": hashlib.sha256(ids.encode()).hexdigest(),
        }

    @property
    def tokens(self) -> int:
        """How many go through a model: the prompts', and those of the longest answers."""
        return sum(len(request.ids) + request.room for request in self.requests)

    def answered(self, streams: Sequence[ModelStream], journal: Journal, progress: Progress) -> Answers:
        """What all models answer, one whole model after another.

        Args:
            streams: of the models.
            journal: has answers of an earlier run, which are not asked for again, and gets those of this one.
            progress: receives bars.

        Raises:
            QuantkitError: a model or the disk failed.
        """
        found = {}
        for number, stream in enumerate(streams):
            first = number * len(self.prompts)
            before = [json.loads(line) for line in kept_answers(journal)[first : first + len(self.prompts)]]
            found[stream.source.label] = before + self._answers(stream, len(before), journal, progress)
        asked = [
            self._beside(number, {name: lines[number] for name, lines in found.items()})
            for number in range(len(self.prompts))
        ]
        variants = list(found)[1:]
        skills = {one.skill: [other for other in asked if other.skill == one.skill] for one in asked}
        return Answers(
            **self.facts,
            agreement=_agreement(asked, variants),
            skills={skill: _agreement(of_one, variants) for skill, of_one in skills.items() if skill is not None},
            prompts=asked,
        )

    def _answers(self, stream: ModelStream, done: int, journal: Journal, progress: Progress) -> list[_Line]:
        """A model's answers after the first `done`."""
        if done == len(self.prompts):
            return []
        # The stream itself is for the scores: what becomes a whole model cannot be streamed any more.
        model = load_model(stream.source, stream.device, stream.dtype, progress)
        lines: list[_Line] = []
        with progress.phase(f"answering: {stream.source.label}", len(self.prompts) - done) as advance:
            for found in self.speaker.batches(model, self.requests, done, _BATCH):
                lines += [{"ids": new.ids, "finish": new.finish} for new in found]
                Appender(journal).write(lines[-len(found) :])
                advance(len(found))
        return lines

    def _beside(self, number: int, lines: Mapping[str, _Line]) -> AskedPrompt:
        """One prompt with the answers of all models, of which each has a line."""
        record = self.prompts[number].record
        text = record.text if record.turns is None else "\n\n".join(turn.text for turn in record.turns)
        reference = next(iter(lines.values()))
        return AskedPrompt(
            id=self.prompts[number].id,
            skill=record.skill,
            prompt=text or "",
            prompt_tokens=len(self.requests[number].ids),
            answers={name: _said(line, reference, self.speaker.whole_text) for name, line in lines.items()},
        )


def _spread(prompts: list[PromptLine], count: int) -> list[PromptLine]:
    """At most so many, evenly from the first to the last: files are often sorted by skill."""
    count = min(count, len(prompts))
    return [prompts[number * len(prompts) // count] for number in range(count)]


# -- beside each other -----------------------------------------------------------------------------------------------


def _said(line: _Line, reference: _Line, decode: Callable[[Sequence[int]], str]) -> Said:
    ids, others = line["ids"], reference["ids"]
    text, finish = decode(ids), line["finish"]
    if ids == others:
        return Said(text, finish, len(ids))
    at = _shared(ids, others)
    return Said(text, finish, len(ids), at, _place(ids, at, text, decode))


def _place(ids: Sequence[int], at: int, text: str, decode: Callable[[Sequence[int]], str]) -> tuple[int, ...]:
    """From and to which character token number `at` stands; with those after it where it is a part of a letter."""
    start = _shared(text, decode(ids[:at]))
    ends = (_shared(text, decode(ids[:after])) for after in range(at + 1, len(ids) + 1))
    return start, next((end for end in ends if end > start), start)


def _shared(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How many tokens or letters two begin with."""
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _agreement(asked: Sequence[AskedPrompt], variants: Sequence[str]) -> dict[str, Agreement]:
    return {name: Agreement.of([prompt.answers[name] for prompt in asked]) for name in variants}


# -- kept while they are made ------------------------------------------------------------------------------------------


@contextmanager
def staged_report(
    out: Path,
    questions: Questions | None,
    stream: ModelStream,
    origins: Sequence[Mapping[str, Any]],
    resume: bool,
    force: bool,
) -> Iterator[tuple[Path, Journal | None]]:
    """A folder that becomes `out`, as `staged_folder` has it; with questions a journal, which keeps answers too.

    Raises:
        UsageError: another run is at work here, or left answers that neither `resume` nor `force` goes for.
        ChangedError: what would be gone on with was made with something else.
        OutputError: the disk is full, the place cannot be written to, or was taken meanwhile.
        Interrupted: a KeyboardInterrupt that cost no answer.
    """
    if questions is None:
        with staged_folder(out, force) as folder:
            yield folder, None
        return
    arithmetic = {"device": stream.device.type, "dtype": str(stream.dtype).removeprefix("torch.")}
    sources = [made["source"] for made in origins]
    decides = {"prompts": questions.facts, **arithmetic, "sources": sources, "versions": origins[0]["versions"]}
    with working(out, decides, None, resume, force, "compare") as run:
        yield run.staged, run.journal
