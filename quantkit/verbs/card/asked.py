"""The form in which a model wants to be asked, for its card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit.errors import QuantkitError, UsageError
from quantkit.sources import open_source
from quantkit.tokens.records import STYLES
from quantkit.verbs.card.facts import Model

_ASKED = "{prompt}"


@dataclass(frozen=True)
class Prompt:
    """A prompt with ``{prompt}`` where the question stands.

    Attributes:
        name: of the template.
        origin: how it is known.
    """

    name: str
    text: str
    origin: str


def prompt_of(folder: Path, models: Sequence[Model], given: str | None, trust: bool = False) -> Prompt | None:
    """The template that is given by name, the chat template that comes with the model, or that of the calibration text.

    Raises:
        UsageError: no template of this name, or none with the model where "chat" is asked for.
    """
    if given not in (None, "auto", "none", "chat", *STYLES):
        raise UsageError(
            f"--prompt-template {given}: choose auto, none, chat, {', '.join(sorted(set(STYLES) - {'none'}))}"
        )
    if given == "none":
        return None
    if given in STYLES:
        return _of_style(str(given), "")
    chat = _chat(folder, models, trust)
    if chat is None and given == "chat":
        raise UsageError("--prompt-template chat: the tokenizer has no chat template; name another one")
    if chat is not None:
        return chat
    used = next((_calibrated_on(model.calibration) for model in models if model.calibration), None)
    return None if used not in STYLES or used == "none" else _of_style(str(used), "calibration")


def _of_style(name: str, origin: str) -> Prompt:
    style = next(style for key, style in STYLES.items() if key == name)
    begin = style.system + style.after_system if style.system else ""
    return Prompt(name, begin + style.user.format(text=_ASKED, input="", eos=""), origin or "given")


def _calibrated_on(calibration: Mapping[str, Any]) -> str | None:
    template = calibration.get("template")
    return template if isinstance(template, str) else None


def _chat(folder: Path, models: Sequence[Model], trust: bool) -> Prompt | None:
    """The tokenizer's own template, where it has one that a single question can be put into."""
    first = models[0]
    place = folder / first.name if first.is_file else folder
    try:
        tokenizer = open_source(place, trust_remote_code=trust).tokenizer()
        if not tokenizer.chat_template:
            return None
        asked = [{"role": "user", "content": _ASKED}]
        text = str(tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True))
    except QuantkitError:  # no tokenizer: `verify` says so
        return None
    except Exception:  # a template is the model's own program and may raise anything
        return None
    return Prompt("chat", text, "chat template") if _ASKED in text else None
