"""A comparison as pages for people: Markdown, and one HTML file that needs no network."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from quantkit.errors import visible as written_out
from quantkit.progress import number, per_cent, size, spread
from quantkit.verbs.compare.answers import shown_tokens
from quantkit.verbs.markdown import cell, code, fence
from quantkit.verbs.plotting import INK, PAPER, RULE

_CAPTIONS = {
    "accuracy-size": "Further down is nearer to the reference, further left is smaller. Where a model is on the Pareto "
    "front, no other is both as small and as near.",
    "layers": "How far a block's output is from the reference's, squared and relative to its size, mean over tokens.",
    "kl": "For each divergence, the share of tokens that diverge more. Further left is better; the right end is the "
    "worst token.",
}
_THEMED = {INK: "var(--ink)", RULE: "var(--rule)", PAPER: "var(--paper)"}


def write_pages(folder: Path, report: Mapping[str, Any], figures: Mapping[str, bytes]) -> None:
    """Write report.md and report.html for the object that report.json holds.

    Args:
        figures: the plots' files by name, as `plots.draw` gives them; those that are there are shown.
    """
    environment = Environment(
        loader=PackageLoader("quantkit.verbs.compare"),
        autoescape=lambda name: name is not None and name.endswith(".html.j2"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"size": size, "number": number, "per_cent": per_cent, "spread": spread}
    environment.filters |= {"cell": cell, "code": code, "visible": visible, "tokens": shown_tokens}
    environment.filters |= {"block": _block, "marked": _marked, "text": partial(written_out, lines=True)}
    shown = [
        {"name": name, "caption": caption, "svg": _inline(name, figures[f"{name}.svg"].decode(), caption)}
        for name, caption in _CAPTIONS.items()
        if f"{name}.svg" in figures
    ]
    for suffix in ("md", "html"):
        page = environment.get_template(f"report.{suffix}.j2").render(**report, figures=shown)
        (folder / f"report.{suffix}").write_text(page, encoding="utf-8")


def visible(text: str) -> str:
    """A token's text with its white space and control characters shown."""
    shown = text.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "␣") or "(nothing)"
    return "".join(letter if letter.isprintable() else "�" for letter in shown)


def _marked(said: Mapping[str, Any]) -> tuple[str, str, str]:
    """An answer before the first token that differs, that token and what follows; all of it before, where none does."""
    text = said["output"]
    start, end = said["mark"] or (len(text), len(text))
    mark = text[start:end] or ("(the end)" if said["mark"] else "")
    before, mark, after = (written_out(part, lines=True) for part in (text[:start], mark, text[end:]))
    return before, mark, after


def _block(text: str) -> str:
    """Text as a block of code of Markdown."""
    text = written_out(text, lines=True)
    return f"{fence(text)}text\n{text}\n{fence(text)}"


def _inline(name: str, svg: str, caption: str) -> Markup:
    """An SVG file as part of a page: as wide as there is room, in the page's colours, its ids its own."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", svg)
    for colour, themed in _THEMED.items():
        svg = svg.replace(colour, themed)
    return Markup(svg.replace("<svg", Markup('<svg role="img" aria-label="{}"').format(caption), 1))
