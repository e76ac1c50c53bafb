"""Plots of a comparison, with matplotlib (extra `plots`): the same bytes for the same numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantkit.errors import visible
from quantkit.report import common_start
from quantkit.verbs.labels import place_labels
from quantkit.verbs.plotting import INK, LEAST_KL, PAPER, figure_of, files_of, legend_of, plain_ticks, unit_of, y_axis

# Apart in hue, and of a middling lightness: legible on white and on black.
_COLOURS = (
    *("#2f7fc1", "#d9721e", "#2f9e62", "#d4504f", "#9067c6"),
    *("#9c6b45", "#d165a3", "#7f8890", "#a09a22", "#1fa3b5"),
)
_STYLES = ("-", "--", ":", "-.")
_MARKERS = ("o", "s", "D", "^")
_FONT = "DejaVu Sans"  # matplotlib's own
# Where a name has letters that it lacks.
_FALLBACKS = frozenset(
    (
        *("Noto Sans CJK SC", "Noto Sans CJK JP", "Source Han Sans SC", "WenQuanYi Micro Hei", "WenQuanYi Zen Hei"),
        *("Droid Sans Fallback", "PingFang SC", "Hiragino Sans", "Microsoft YaHei", "Arial Unicode MS", "Noto Emoji"),
    )
)
_LONGEST = 34  # letters of a label


@dataclass(frozen=True)
class Drawn:
    """What plots show of a model.

    Attributes:
        mean_kl: in nats, the mean over texts.
        pareto: whether it is on the Pareto front.
        layers: as in `compare.Scores`.
        kl: float [tokens], divergences of the tokens of all texts.
    """

    label: str
    bytes: int
    mean_kl: float
    pareto: bool
    layers: list[float] | None
    kl: NDArray[Any]


def plot_files(reference: Drawn, variants: Sequence[Drawn]) -> dict[str, bytes]:
    """The plots as files, by name: accuracy-size, layers and kl, each as PNG and as SVG."""
    labels, families = drawable([variant.label for variant in variants])
    names = short_names(labels)
    plots = {"accuracy-size": _accuracy_size, "layers": _layers, "kl": _kl}
    return files_of({name: partial(plot, reference, variants, names) for name, plot in plots.items()}, families)


def drawable(labels: Sequence[str]) -> tuple[list[str], list[str]]:
    """Labels with what no font here can draw written out, and the fonts to draw them with, DejaVu Sans first."""
    from matplotlib.font_manager import FontProperties, findfont, fontManager
    from matplotlib.ft2font import FT2Font

    texts = [visible(label) for label in labels]
    families: list[str] = []
    lacking = {letter for text in texts for letter in text}
    for family in (_FONT, *sorted({font.name for font in fontManager.ttflist} & _FALLBACKS)):
        font = FT2Font(findfont(FontProperties(family=family)))
        drawn = {letter for letter in lacking if font.get_char_index(ord(letter))}
        lacking -= drawn
        if drawn or not families:
            families.append(family)
    unseen = {ord(letter): f"\\u{ord(letter):04x}" for letter in lacking}
    return [text.translate(unseen) for text in texts], families


def short_names(labels: Sequence[str]) -> list[str]:
    """Labels without what all begin with, cut in the middle where they are still long; each stays distinct."""
    names = [label.removeprefix(common_start(labels)) for label in labels]
    short = [name if len(name) <= _LONGEST else f"{name[:16]}…{name[-16:]}" for name in names]
    return short if len(set(short)) == len(short) else names


# -- accuracy against size -------------------------------------------------------------------------------------------


def _accuracy_size(reference: Drawn, variants: Sequence[Drawn], names: Sequence[str]) -> Any:
    largest = max(reference.bytes, *(variant.bytes for variant in variants))
    unit, factor = unit_of(largest)
    labels = f"size of the weight files ({unit})", "mean KL divergence (nats per token)"
    figure, axes = figure_of("Accuracy against size", *labels)
    least, is_log = y_axis(axes, [variant.mean_kl for variant in variants])
    points = [(variant.bytes / factor, max(variant.mean_kl, least)) for variant in variants]
    front = sorted(point for point, variant in zip(points, variants, strict=True) if variant.pareto)
    axes.axvline(reference.bytes / factor, color=INK, linewidth=1, linestyle=(0, (1, 2)), label="size of the reference")
    if front:
        axes.plot(*zip(*front, strict=True), color=INK, linewidth=1, zorder=2, label="Pareto front")
    markers = []
    for number, (point, variant) in enumerate(zip(points, variants, strict=True)):
        colour, marker = _COLOURS[number % 10], _MARKERS[number // 10 % 4]
        face = colour if variant.pareto else PAPER
        markers += axes.plot(*point, marker, color=colour, ms=7, mfc=face, mew=1.6, linestyle="", zorder=3)
    if any(not variant.pareto for variant in variants):
        axes.plot([], [], "o", color=INK, markersize=6, markerfacecolor=PAPER, label="not on the front")
    axes.margins(x=0.12)
    plain_ticks(axes.yaxis) if is_log else axes.set_ylim(bottom=0)
    legend_of(figure)
    shown = [
        name if variant.mean_kl > LEAST_KL else f"{name} (no divergence)"
        for name, variant in zip(names, variants, strict=True)
    ]
    if not place_labels(figure, axes, points, shown, front, reference.bytes / factor):
        for drawn, name in zip(markers, shown, strict=True):
            drawn.set_label(name)
        figure.legends.clear()
        figure.set_layout_engine("constrained")
        legend_of(figure)
    return figure


# -- by layer, and by token ------------------------------------------------------------------------------------------


def _layers(reference: Drawn, variants: Sequence[Drawn], names: Sequence[str]) -> Any:
    figure, axes = figure_of("Error by layer", "decoder block", "relative squared error of its output")
    for number, (variant, name) in enumerate(zip(variants, names, strict=True)):
        if variant.layers is not None:
            values = np.where(np.array(variant.layers) > 0, variant.layers, np.nan)
            marker = "." if len(values) < 80 else ""
            label = name if any(variant.layers) else f"{name} (no error)"
            axes.plot(range(len(values)), values, **_line(number), marker=marker, markersize=4, label=label)
    axes.xaxis.get_major_locator().set_params(integer=True)
    if any(any(variant.layers or []) for variant in variants):
        axes.set_yscale("log")
        plain_ticks(axes.yaxis)
    else:
        _nothing(axes, "no error in any block, or no blocks to compare")
    legend_of(figure)
    return figure


def _kl(reference: Drawn, variants: Sequence[Drawn], names: Sequence[str]) -> Any:
    labels = "KL divergence at a token (nats)", "share of tokens that diverge more"
    figure, axes = figure_of("Distribution of KL divergence", *labels)
    for number, (variant, name) in enumerate(zip(variants, names, strict=True)):
        # Divergences and the share of tokens above each: some hundred points, evenly spread on logarithmic axes.
        ranks = np.unique(np.geomspace(1, len(variant.kl), 300).astype(int))
        values = np.sort(variant.kl)[::-1][ranks - 1]
        values, shares = values[values > LEAST_KL], ranks[values > LEAST_KL] / len(variant.kl)
        axes.plot(values, shares, **_line(number), label=name if len(values) else f"{name} (no divergence)")
    if any((variant.kl > LEAST_KL).any() for variant in variants):
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlim(left=LEAST_KL)
        plain_ticks(axes.xaxis)
        plain_ticks(axes.yaxis, lambda share: f"{100 * share:g} %")
    else:
        _nothing(axes, "no token diverges")
    legend_of(figure)
    return figure


# -- what they share -------------------------------------------------------------------------------------------------


def _line(number: int) -> dict[str, Any]:
    return {"color": _COLOURS[number % 10], "linestyle": _STYLES[number // 10 % 4], "linewidth": 1.6}


def _nothing(axes: Any, text: str) -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center")
