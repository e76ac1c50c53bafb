"""Prompt templates: a record as the text that a model of a given family was trained on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from quantkit.errors import CalibrationError, UsageError
from quantkit.options import TemplateName
from quantkit.tokens.records import Record, Turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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
    text and a blank line, whatever the template. Raises `UsageError` as `resolve` does, and `CalibrationError` where
    the chat template refuses the record.
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
        rendered = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=turns[-1].role == "user"
        )
    except Exception as error:  # a template is the model's own program and may raise anything
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise CalibrationError(f"record {record.id}: the tokenizer's chat template refuses it: {reason}") from error
    return str(rendered)


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
