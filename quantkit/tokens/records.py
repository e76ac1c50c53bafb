"""One record of instruction or plain text: the layouts it is read from, and the prompt templates it is written in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from quantkit.errors import CalibrationError, SourceError, UsageError, shortened
from quantkit.options import TemplateName
from quantkit.report import called
from quantkit.runs.limits import check_rendered, template_limit

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Role = Literal["user", "assistant"]

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


@dataclass(frozen=True)
class Turn:
    """What one side of a conversation said."""

    role: Role
    text: str = field(metadata=called("content"))


@dataclass(frozen=True)
class Record:
    """A conversation (`turns`) or a piece of plain text (`text`): exactly one of the two.

    `input` is the part of the first turn, at its end after a blank line, that came as a separate input: templates
    with a place of their own for it put it there. `system` is a system message that came with the conversation.
    """

    id: str
    turns: tuple[Turn, ...] | None = None
    text: str | None = None
    skill: str | None = None
    input: str | None = None
    system: str | None = None

    def __post_init__(self) -> None:
        if (self.turns is None) == (self.text is None):
            raise ValueError(f"record {self.id} must have either turns or text")

    @property
    def is_empty(self) -> bool:
        """Whether the text, or any turn, holds nothing but whitespace."""
        texts = [self.text or ""] if self.turns is None else [turn.text for turn in self.turns]
        return not texts or any(not text.strip() for text in texts)


@dataclass(frozen=True)
class _Fields:
    """The fields of one raw record; an error names the file, the record and the field."""

    raw: Mapping[str, object]
    where: str

    def text(self, key: str) -> str:
        """The field's text; an absent or null field is empty."""
        value = self.raw.get(key)
        if value is None:
            return ""
        if not isinstance(value, str):
            raise CalibrationError(f"{self.where}: {key!r} must be text, not {type(value).__name__}")
        return value

    def optional(self, key: str) -> str | None:
        """The field's text, or None where there is nothing to read."""
        return self.text(key) or None

    def messages(self, key: str) -> list[_Fields]:
        value = self.raw.get(key)
        if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
            raise CalibrationError(f"{self.where}: {key!r} must be a list of objects")
        return [_Fields(message, f"{self.where}, {key}[{number}]") for number, message in enumerate(value)]


def _exchange(prompt_key: str, answer_key: str, fields: _Fields, record_id: str) -> Record:
    prompt, extra = fields.text(prompt_key), fields.optional("input")
    turns = (
        Turn("user", f"{prompt}\n\n{extra}" if extra else prompt),
        Turn("assistant", fields.text(answer_key)),
    )
    return Record(record_id, turns=turns, skill=fields.optional("skill"), input=extra)


def _conversation(key: str, role_key: str, text_key: str, fields: _Fields, record_id: str) -> Record:
    turns: list[Turn] = []
    system: list[str] = []
    for message in fields.messages(key):
        role, text = ROLES.get(message.text(role_key)), message.text(text_key)
        if role is None:
            known = ", ".join(ROLES)
            raise CalibrationError(f"{message.where}: unknown role {message.raw.get(role_key)!r} (known: {known})")
        if role == "system":
            system.append(text)
        else:
            turns.append(Turn("user" if role == "user" else "assistant", text))
    return Record(
        record_id, turns=tuple(turns), skill=fields.optional("skill"), system="\n\n".join(system).strip() or None
    )


def _prompt_only(fields: _Fields, record_id: str) -> Record:
    return Record(record_id, turns=(Turn("user", fields.text("Instruction")),), skill=fields.optional("Skill"))


def _plain(fields: _Fields, record_id: str) -> Record:
    return Record(record_id, text=fields.text("text"), skill=fields.optional("skill"))


# The keys that a layout is known by, and what makes a Record of it. The first layout whose keys are all there is taken.
LAYOUTS: tuple[tuple[tuple[str, ...], Callable[[_Fields, str], Record]], ...] = (
    (("messages",), partial(_conversation, "messages", "role", "content")),
    (("conversations",), partial(_conversation, "conversations", "from", "value")),
    (("instruction", "output"), partial(_exchange, "instruction", "output")),
    (("prompt", "response"), partial(_exchange, "prompt", "response")),
    (("prompt", "completion"), partial(_exchange, "prompt", "completion")),
    (("Instruction",), _prompt_only),
    (("text",), _plain),
)

COLUMNS = frozenset(key for keys, _ in LAYOUTS for key in keys) | {"id", "idx", "input", "skill", "Skill"}
"""Every key that a record is read from."""


def parse_record(raw: object, index: int, name: str) -> Record:
    """Turn one raw record of the file `name` into a `Record`.

    Its id is the field `id` or `idx`, or `#<index>`, with `index` counted from 0 in the file. Raises `CalibrationError`
    where the layout is unknown or a field holds something other than text.
    """
    if not isinstance(raw, Mapping):
        raise CalibrationError(f"{name}: record #{index} is not an object but {type(raw).__name__}")
    given = next((raw[key] for key in ("id", "idx") if raw.get(key) is not None), None)
    record_id = f"#{index}" if given is None else str(given)
    for keys, build in LAYOUTS:
        if all(key in raw for key in keys):
            return build(_Fields(raw, f"{name}: record {record_id}"), record_id)
    found = shortened(", ".join(map(str, raw)), 500) or "none"
    known = "; ".join(" + ".join(keys) for keys, _ in LAYOUTS)
    raise CalibrationError(f"{name}: record {record_id} has an unknown layout. Keys found: {found}. Known: {known}.")


def whole_characters(value: Any) -> Any:
    """JSON's value with U+FFFD in the place of halves of surrogate pairs, as scraped data has them."""
    if isinstance(value, str):
        return value if value.isascii() else value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, Mapping):
        return {key: whole_characters(item) for key, item in value.items()}
    return [whole_characters(item) for item in value] if isinstance(value, list) else value


# -- as the text that a model of a family was trained on ---------------------------------------------------------------


@dataclass(frozen=True)
class Style:
    """A template as data: format strings with the fields `text`, `input` and `eos`.

    `system` is the text before the first turn, where the record has none of its own; `after_system` follows either.
    `with_input` is the style of a record whose input stands apart from its instruction.
    """

    system: str
    after_system: str
    user: str
    assistant: str
    with_input: Style | None = None


# vicuna: FastChat's v1.1, also WizardLM-13B. wizardlm-7b and alpaca: their training scripts end an answer with EOS.
STYLES: dict[TemplateName, Style] = {
    "vicuna": Style(
        system="A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions.",
        after_system=" ",
        user="USER: {text} ASSISTANT:",
        assistant=" {text}{eos}",
    ),
    "wizardlm-7b": Style(system="", after_system="\n\n", user="{text}\n\n### Response:", assistant="{text}{eos}"),
    "alpaca": Style(
        system="Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.",
        after_system="\n\n",
        user="### Instruction:\n{text}\n\n### Response:\n",
        assistant="{text}{eos}",
        with_input=Style(
            system="Below is an instruction that describes a task, paired with an input that provides further context. "
            "Write a response that appropriately completes the request.",
            after_system="\n\n",
            user="### Instruction:\n{text}\n\n### Input:\n{input}\n\n### Response:\n",
            assistant="{text}{eos}",
        ),
    ),
    "none": Style(system="", after_system="\n\n", user="{text}\n\n", assistant="{text}\n\n"),
}


def resolve(template: TemplateName, tokenizer: PreTrainedTokenizerBase) -> TemplateName:
    """The template that `auto` stands for: the tokenizer's own where it has one, else `vicuna`.

    Raises `UsageError` where `chat` is asked of a tokenizer without a chat template.
    """
    has_template = bool(tokenizer.chat_template)
    if template == "auto":
        return "chat" if has_template else "vicuna"
    if template == "chat" and not has_template:
        raise UsageError(f"template chat: the tokenizer has no chat template; choose one of {', '.join(STYLES)}")
    return template


def render(record: Record, template: TemplateName, tokenizer: PreTrainedTokenizerBase) -> str:
    """The record as one string, special tokens written out, without a BOS but where the chat template writes one.

    A conversation that ends with the user's turn ends where the answer would begin. A record of plain text is the
    text and a blank line, whatever the template. Raises `UsageError` as `resolve` does, `CalibrationError` where the
    chat template refuses the record, and `SourceError` where it takes too long, or makes far too much.
    """
    if record.turns is None:
        return f"{record.text}\n\n"
    template = resolve(template, tokenizer)
    if template == "chat":
        return _render_chat(record, record.turns, tokenizer)
    return _render_style(record, record.turns, STYLES[template], str(tokenizer.eos_token or ""))


def _render_chat(record: Record, turns: tuple[Turn, ...], tokenizer: PreTrainedTokenizerBase) -> str:
    messages = [{"role": "system", "content": record.system}] if record.system else []
    messages += [{"role": turn.role, "content": turn.text} for turn in turns]
    try:
        with template_limit():
            rendered = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=turns[-1].role == "user"
            )
    except SourceError:  # it takes too long or too much, as it would for other records
        raise
    except Exception as error:  # a template is the model's own program and may raise anything
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise CalibrationError(f"record {record.id}: the tokenizer's chat template refuses it: {reason}") from error
    return check_rendered(str(rendered), sum(len(message["content"]) for message in messages))


def _render_style(record: Record, turns: tuple[Turn, ...], style: Style, eos: str) -> str:
    if record.input and style.with_input:
        style = style.with_input
        turns = (Turn("user", turns[0].text.removesuffix(f"\n\n{record.input}")), *turns[1:])
    system = record.system or style.system
    parts = [system + style.after_system] if system else []
    for turn in turns:
        form = style.user if turn.role == "user" else style.assistant
        parts.append(form.format(text=turn.text, input=record.input, eos=eos))
    return "".join(parts)
