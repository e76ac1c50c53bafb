"""A file of prompts, JSON lines, into the token ids that a model goes on from."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.errors import CalibrationError, UsageError, first_line
from quantkit.options import TemplateName
from quantkit.runs.panics import panics_as
from quantkit.tokens.datasets import HELD_OUT, read_bundled
from quantkit.tokens.records import Record, Turn, parse_record, render

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CONVERSATIONS = ("messages", "conversations")
# Fields that an answer may stand in already, beside the prompt's: there it is a reference, not part of the prompt.
_ANSWERED = {"instruction": "output", "prompt": "response"}


@dataclass(frozen=True)
class PromptLine:
    """One line of a file of prompts.

    Attributes:
        id: its field `id` or `idx`, or else its place among the prompts, counted from 0.
        given: the line's fields.
        record: the conversation that ends where the answer begins, or plain text to go on with.
        where: file and line, for messages.
    """

    id: Any
    given: Mapping[str, Any]
    record: Record
    where: str

    @property
    def key(self) -> str:
        """The id as text, in which 1 and "1" differ."""
        return json.dumps(self.id, ensure_ascii=False, sort_keys=True)


def asked_prompts(name: Path | str, system: str | None = None) -> list[PromptLine]:
    """The prompts of a file, or those of the bundled records that are never calibrated on, where their name is given.

    Raises as `read_prompts` does.
    """
    if str(name) != HELD_OUT:
        return read_prompts(Path(name).expanduser(), system)
    bundled = read_bundled()
    ((_, path),) = bundled.source.files
    return [prompt for prompt in read_prompts(path, system) if prompt.id in bundled.held_out]


def read_prompts(path: Path, system: str | None = None) -> list[PromptLine]:
    """The prompts of a file of JSON lines.

    A line has `Instruction`, `instruction` (with or without `input`), `prompt` or `text`, or a conversation under
    `messages` or `conversations` whose turns are role and content, or from and value. Where a conversation ends with
    an answer, that one is left out and asked for again. `system` is a system message for those that bring none.

    Raises:
        UsageError: no such file.
        CalibrationError: names the line that is not JSON, has nothing to answer, or an id that another line has.
    """
    prompts: list[PromptLine] = []
    seen: dict[str, str] = {}
    for number, raw in _lines(path):
        prompt = _prompt(raw, len(prompts), f"{path.name}: line {number}", system)
        if prompt.key in seen:
            raise CalibrationError(f"{prompt.where}: its id {prompt.key} is also that of {seen[prompt.key]}")
        seen[prompt.key] = f"line {number}"
        prompts.append(prompt)
    if not prompts:
        raise CalibrationError(f"{path.name}: no prompt in it")
    return prompts


def prompt_text(record: Record, template: TemplateName, tokenizer: PreTrainedTokenizerBase) -> str:
    """The record as the text that the answer follows; template `none` adds nothing at its end.

    Raises `CalibrationError` where the chat template refuses the record.
    """
    text = render(record, template, tokenizer)
    return text.removesuffix("\n\n") if template == "none" else text


def prompt_ids(text: str, template: TemplateName, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of a prompt: with the BOS that the tokenizer adds by itself, but after a chat template, whose own
    text has all that is wanted."""
    with panics_as(CalibrationError, "the prompt cannot be taken apart"):
        ids: list[int] = tokenizer(text, add_special_tokens=template != "chat", verbose=False)["input_ids"]
    eos = tokenizer.eos_token_id
    return ids[:-1] if template != "chat" and ids[-1:] == [eos] and not text.endswith(str(tokenizer.eos_token)) else ids


def stop_ids(declared: Any, template: TemplateName, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that end an answer: the EOS ids of model and tokenizer, and the special token that the chat
    template writes right after an answer, where it writes one.

    `declared` is the model's eos_token_id: an id, several or None.
    """
    ids = {declared} if isinstance(declared, int) else set(declared or ())
    if tokenizer.eos_token_id is not None:
        ids.add(int(tokenizer.eos_token_id))
    if template != "chat":
        return sorted(ids)
    mark = "the answer"
    turns = (Turn("user", "a question"), Turn("assistant", mark))
    try:
        _, found, after = render(Record("stop", turns=turns), "chat", tokenizer).rpartition(mark)
    except CalibrationError:
        return sorted(ids)
    behind: list[int] = tokenizer(after, add_special_tokens=False)["input_ids"] if found else []
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return sorted(ids | (special & set(behind[:1])))


def _lines(path: Path) -> Iterator[tuple[int, Any]]:
    """(number from 1, value) of every line that is not blank."""
    try:
        file = path.open("rb")
    except OSError as error:
        raise UsageError(f"--prompts {path} cannot be read: {error.strerror}") from None
    with file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                value = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"), parse_constant=_no_number)
                json.dumps(value, ensure_ascii=False).encode()
            except UnicodeDecodeError:
                raise CalibrationError(f"{path.name}: line {number} is not UTF-8: save the file as UTF-8") from None
            except UnicodeEncodeError:
                raise CalibrationError(f"{path.name}: line {number} has half of a surrogate pair in it") from None
            except (ValueError, RecursionError) as error:
                reason = getattr(error, "msg", None) or first_line(error)
                raise CalibrationError(f"{path.name}: line {number} is not JSON: {reason}") from None
            yield number, value


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number")


def _prompt(raw: Any, index: int, where: str, system: str | None) -> PromptLine:
    if not isinstance(raw, dict):
        raise CalibrationError(f"{where}: not an object but {type(raw).__name__}; one object a line is wanted")
    record = parse_record(_unanswered(raw), index, where)
    if record.turns is not None:
        turns = record.turns[:-1] if record.turns and record.turns[-1].role == "assistant" else record.turns
        record = replace(record, turns=turns, system=record.system or system)
    if record.is_empty or (record.turns is not None and record.turns[-1].role != "user"):
        raise CalibrationError(f"{where}: nothing to answer in it; a conversation must end with the user's turn")
    given = next((raw[key] for key in ("id", "idx") if raw.get(key) is not None), index)
    return PromptLine(given, raw, record, where)


def _unanswered(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The line as a record that calibration data would have: with an empty answer where its layout has one."""
    for key in _CONVERSATIONS:
        if isinstance(raw.get(key), list) and all(isinstance(message, dict) for message in raw[key]):
            turns = [
                {"role": turn.get("role", turn.get("from")), "content": turn.get("content", turn.get("value"))}
                for turn in raw[key]
            ]
            return {**raw, "messages": turns}
    return {**raw, **{answer: "" for prompt, answer in _ANSWERED.items() if prompt in raw}}
