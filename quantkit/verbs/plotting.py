"""What the plots of all verbs share, with matplotlib (extra `plots`): the same bytes for the same numbers."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

INK, RULE, PAPER = "#1f2328", "#d8dee4", "#ffffff"
"""Of text and axes, of the grid, of the ground: the only colours that depend on light and dark."""

_WIDTH, _HEIGHT = 5.2, 3.8  # inches; narrow, for text that is still read on a phone
_SETTINGS: Any = {
    "text.parse_math": False,
    "svg.hashsalt": "quantkit",
    "svg.fonttype": "none",
    "font.size": 9.5,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "legend.fontsize": 8.5,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}
_UNITS = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("bytes", 1.0))
LEAST_KL = 1e-6  # nats; below it lies the noise of float32 arithmetic


def files_of(plots: Mapping[str, Callable[[], Any]], families: Sequence[str] = ()) -> dict[str, bytes]:
    """Plots by name, each as PNG and as SVG, by the files' names. `families`: fonts, where more than one is needed."""
    import matplotlib

    files = {}
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # whatever the user's own settings are
        matplotlib.rcParams.update({**_SETTINGS, **({"font.family": list(families)} if families[1:] else {})})
        for name, plot in plots.items():
            figure = plot()
            # No date and no version: equal runs give equal bytes.
            for suffix, metadata in (("png", {"Software": None}), ("svg", {"Date": None, "Creator": None})):
                buffer = io.BytesIO()
                figure.savefig(buffer, format=suffix, dpi=200, metadata=metadata)
                files[f"{name}.{suffix}"] = buffer.getvalue()
    return files


def unit_of(largest: float) -> tuple[str, float]:
    """The unit that a size is shown in, in powers of ten as the Hub has them, and its bytes."""
    return next(scale for scale in _UNITS if largest >= scale[1] or scale[1] == 1.0)


def y_axis(axes: Any, values: Sequence[float]) -> tuple[float, bool]:
    """Make the axis of divergences logarithmic where there are any; returns the least value drawn and whether it is."""
    positive = [value for value in values if value > LEAST_KL]
    if not positive:
        axes.set_ylim(0, LEAST_KL)
        return 0.0, False
    axes.set_yscale("log")
    least = min(positive) / 10 if len(positive) < len(values) else min(positive)
    axes.set_ylim(least / 1.8, max(positive) * 1.8)
    return least, True


def figure_of(title: str, across: str, up: str) -> tuple[Any, Any]:
    """A figure and its axes, with what stands beside them."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, _HEIGHT), layout="constrained", facecolor=PAPER)
    axes = figure.add_subplot(facecolor=PAPER)
    axes.set(title=title, xlabel=across, ylabel=up)
    axes.grid(True)
    axes.set_axisbelow(True)
    return figure, axes


def legend_of(figure: Any) -> None:
    """Below the axes, which keep their height."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    if not handles:
        return
    longest = max(map(len, labels))
    columns = 1 if longest > 28 else 2 if longest > 21 else 3
    figure.set_figheight(_HEIGHT + 0.19 * -(-len(handles) // columns))
    figure.legend(handles, labels, loc="outside lower left", ncols=columns, frameon=False, handlelength=2.6)


def plain_ticks(axis: Any, text: Callable[[float], str] = "{:g}".format) -> None:
    """Ticks of a logarithmic axis as plain numbers; within two decades also between the powers of ten."""
    low, high = axis.get_view_interval()
    between = ("1", "2", "5") if high < 100 * low else ()
    axis.set_major_formatter(lambda value, position: text(value))
    axis.set_minor_formatter(lambda value, position: text(value) if f"{value:e}"[0] in between else "")
