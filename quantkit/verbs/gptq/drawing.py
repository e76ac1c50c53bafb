"""The plot of a budget: what is predicted at any size, with the point that was chosen."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from quantkit.progress import Progress
from quantkit.quantize.trials import Choice
from quantkit.verbs.labels import place_labels
from quantkit.verbs.plotting import INK, PAPER, figure_of, files_of, legend_of, plain_ticks, unit_of, y_axis

NAME = "budget"
_CHOSEN, _ALIKE = "#d9721e", "#2f7fc1"


def draw_budget(choice: Choice, folder: Path, progress: Progress) -> None:
    """Write `budget.png` and `budget.svg` into a folder; a note where matplotlib is missing."""
    if find_spec("matplotlib") is None:
        progress.note("no plot of the budget: it needs matplotlib (pip install 'quantkit[plots]')")
        return
    for name, content in files_of({NAME: partial(_plot, choice)}).items():
        (folder / name).write_bytes(content)


def _plot(choice: Choice) -> Any:
    front, alike, spent = choice.front, choice.alike, choice.spent
    chosen = spent.bytes, spent.predicted or 0.0
    unit, factor = unit_of(max(size for size, _ in front))
    labels = f"size of the weights ({unit})", "predicted KL divergence (nats per token)"
    figure, axes = figure_of("What bits are worth", *labels)
    least, is_log = y_axis(axes, [loss for _, loss in (*front, *alike.values(), chosen)])

    across = spent.bytes / factor

    def points(pairs: Iterable[tuple[int, float]]) -> tuple[list[float], list[float]]:
        sizes, losses = zip(*pairs, strict=True)
        return [size / factor for size in sizes], [max(loss, least) for loss in losses]

    axes.plot(*points(front), color=INK, linewidth=1.4, zorder=2, label="chosen for each size")
    if alike:
        style = {"color": _ALIKE, "markersize": 5, "markerfacecolor": PAPER, "linestyle": "", "zorder": 3}
        axes.plot(*points(alike.values()), "o", **style, label="one for all")
    axes.plot(*points([chosen]), "D", color=_CHOSEN, markersize=7, linestyle="", zorder=4, label=spent.asked)
    if is_log:
        plain_ticks(axes.yaxis)
    legend_of(figure)
    # Where there is no room for the names of all, those that none as small is better than have theirs.
    best = {name: one for name, one in alike.items() if not any(_better(other, one) for other in alike.values())}
    for named in (alike, best):
        places = list(zip(*points(named.values()), strict=True)) if named else []
        if places and place_labels(figure, axes, places, list(named), list(zip(*points(front), strict=True)), across):
            break
    return figure


def _better(one: tuple[int, float], other: tuple[int, float]) -> bool:
    return one != other and one[0] <= other[0] and one[1] <= other[1]
