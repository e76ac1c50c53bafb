"""The verb `chat`: a conversation with a model, word by word."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from quantkit.blocks.open import named, note_source, open_stream
from quantkit.blocks.whole import load_on_kernels
from quantkit.errors import CalibrationError
from quantkit.options import Decoding
from quantkit.options.verbs import Chat
from quantkit.progress import SILENT, Progress
from quantkit.report import Report
from quantkit.tokens.records import Record, Turn
from quantkit.verbs import verb
from quantkit.verbs.generate.speaker import Speaker

if TYPE_CHECKING:
    from transformers import PreTrainedModel

HELP = "/reset forgets the conversation, /system TEXT also sets the system message, /quit (or the end of input) ends it"


class Person(Protocol):
    """Who talks with the model."""

    def hear(self) -> str | None:
        """The next message or command; None ends the conversation."""

    def say(self, piece: str) -> None:
        """Receives an answer's next piece of text."""

    def end(self, finish: str) -> None:
        """An answer is over: "eos", "length" where its room ended, or "interrupted"."""

    def note(self, text: str) -> None:
        """Receives a line that is no answer."""


@dataclass(frozen=True)
class ChatReport(Report):
    """What was said since the last reset."""

    model: str
    template: str
    system: str | None
    turns: tuple[Turn, ...]


@verb(Chat)
def chat(options: Chat, person: Person | None = None, *, progress: Progress = SILENT) -> ChatReport:
    """Answer a person's messages until there are no more; a KeyboardInterrupt ends an answer, which is then kept as far
    as it went. Options are those of `generate`.

    Raises:
        UsageError: options out of range.
        QuantkitError: the model failed.
    """
    if person is None:
        raise TypeError("chat() needs a person to talk with")
    spec = options.part(Decoding)
    stream = open_stream(named(options.model, options.base, options.delta), options)
    note_source(stream.source, progress)
    speaker = Speaker.of(stream.source, options.template, spec)
    loaded = load_on_kernels(stream, options.trust_remote_code, progress)
    progress.note(f"{stream.source.label}, template {speaker.template}: {HELP}")
    talk = _Talk(speaker, loaded.model, person, options.system)
    while (heard := person.hear()) is not None:
        command, _, rest = heard.strip().partition(" ")
        if command == "/quit":
            break
        if command == "/reset":
            talk.reset()
        elif command == "/system":
            talk.set_system(rest.strip())
        elif command == "/help":
            person.note(HELP)
        elif command:
            talk.answer(heard.strip())
    return ChatReport(stream.source.label, speaker.template, talk.system, tuple(talk.turns))


@dataclass
class _Talk:
    """The conversation so far."""

    speaker: Speaker
    model: PreTrainedModel
    person: Person
    system: str | None
    turns: list[Turn] = field(default_factory=list)
    answered: int = 0

    def reset(self) -> None:
        self.turns.clear()
        self.person.note("forgotten")

    def set_system(self, text: str) -> None:
        self.system = text or None
        self.turns.clear()
        self.person.note("system message set" if text else "no system message, but the template's own if it has one")

    def answer(self, message: str) -> None:
        """Answer a message; one that cannot be answered is not kept."""
        turns = (*self.turns, Turn("user", message))
        record, key = Record("chat", turns=turns, system=self.system), f"answer {self.answered}"
        try:
            request = self.speaker.request(record, key, "the conversation")
        except CalibrationError as error:
            self.person.note(f"{error}; /reset begins a new one")
            return
        told = _Told(self.speaker, self.person, record)
        finish = "interrupted"
        try:
            finish = self.speaker.answer(self.model, [request], told.add)[0].finish
        except KeyboardInterrupt:
            pass
        finally:
            told.flush()
            self.person.end(finish)
        self.answered += 1
        self.turns = [*turns, Turn("assistant", told.text)]


class _Told:
    """Turns new ids into text as far as it will not change any more."""

    def __init__(self, speaker: Speaker, person: Person, record: Record) -> None:
        self._speaker, self._person, self._record = speaker, person, record
        self._ids: list[int] = []
        self.text = ""

    def add(self, ids: list[int]) -> None:
        self._ids += [token for token in ids if token not in self._speaker.stops]
        text = self._speaker.text(self._ids, self._record)
        if not text.endswith("\ufffd"):  # half of a character
            self._tell(text)

    def flush(self) -> None:
        self._tell(self._speaker.text(self._ids, self._record))

    def _tell(self, text: str) -> None:
        if len(text) > len(self.text) and text.startswith(self.text):
            self._person.say(text[len(self.text) :])
            self.text = text
