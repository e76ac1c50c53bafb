"""Labels beside the points of a plot, placed so that none covers another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

Point = tuple[float, float]

_DISTANCES = (9, 18, 30)  # points from the marker's centre; a label that is far gets a line to it
_SIDES = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1))
_ALIGN = {1: ("left", "bottom"), 0: ("center", "center"), -1: ("right", "top")}
_MOST = 45.0  # cost of a place that is still taken
_MARKER = 6  # half the side of what a marker takes


class _Box(NamedTuple):
    """In points."""

    left: float
    bottom: float
    right: float
    top: float

    def overlap(self, other: _Box) -> float:
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.top, other.top) - max(self.bottom, other.bottom)
        return max(width, 0.0) * max(height, 0.0)

    def outside(self, frame: _Box) -> float:
        across = max(frame.left - self.left, 0.0) + max(self.right - frame.right, 0.0)
        return across + max(frame.bottom - self.bottom, 0.0) + max(self.top - frame.top, 0.0)


def place_labels(
    figure: Any, axes: Any, points: Sequence[Point], labels: Sequence[str], front: Sequence[Point], upright: float
) -> bool:
    """Write each label beside its point, in turn where it covers least of the markers, the labels before it, the line
    through `front` and the upright line at x = `upright`, and stays inside the axes.

    Positions are data coordinates; the figure's layout must not change any more. Returns whether there was room: where
    a label would cover something or be far from its point, none is written.
    """
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    canvas = figure.canvas
    renderer = canvas.get_renderer() if hasattr(canvas, "get_renderer") else figure._get_renderer()
    scale = 72 / figure.dpi
    frame = _Box(*(scale * value for value in axes.get_window_extent(renderer).extents))

    def pixels(point: Point) -> Point:
        x, y = axes.transData.transform(point)
        return scale * x, scale * y

    spots = [pixels(point) for point in points]
    taken = [_Box(x - _MARKER, y - _MARKER, x + _MARKER, y + _MARKER) for x, y in spots]
    at = pixels((upright, points[0][1]))[0]
    lines = [*_along([pixels(point) for point in front]), _Box(at - 1, frame.bottom, at + 1, frame.top)]
    places: list[tuple[int, tuple[int, int]]] = []
    for (x, y), label in zip(spots, labels, strict=True):
        text = axes.text(0, 0, label, fontsize="small")
        extent = text.get_window_extent(renderer)
        text.remove()
        options = list(_options(x, y, scale * extent.width, scale * extent.height))
        cost = [_cost(box, distance, taken, lines, frame) for box, distance, _ in options]
        if min(cost) > _MOST:
            return False
        box, distance, side = options[cost.index(min(cost))]
        taken.append(box)
        places.append((distance, side))
    leader = {"arrowstyle": "-", "color": axes.xaxis.label.get_color(), "linewidth": 0.6, "shrinkA": 1, "shrinkB": 4}
    for point, label, (distance, (dx, dy)) in zip(points, labels, places, strict=True):
        axes.annotate(
            label,
            point,
            (distance * dx, distance * dy),
            textcoords="offset points",
            ha=_ALIGN[dx][0],
            va=_ALIGN[dy][1],
            fontsize="small",
            arrowprops=leader if distance > _DISTANCES[0] else None,
        ).set_in_layout(False)
    return True


def _options(x: float, y: float, width: float, height: float) -> Iterator[tuple[_Box, int, tuple[int, int]]]:
    for distance in _DISTANCES:
        for dx, dy in _SIDES:
            left = x + distance * dx - (0 if dx > 0 else width if dx < 0 else width / 2)
            bottom = y + distance * dy - (0 if dy > 0 else height if dy < 0 else height / 2)
            yield _Box(left, bottom, left + width, bottom + height), distance, (dx, dy)


def _cost(box: _Box, distance: int, taken: Sequence[_Box], lines: Sequence[_Box], frame: _Box) -> float:
    """Other text and the frame's edge weigh most, then lines, then the distance."""
    covered = sum(box.overlap(other) for other in taken)
    crossed = sum(box.overlap(line) for line in lines)
    return 100 * covered + 1000 * box.outside(frame) + 3 * crossed + distance


def _along(points: Sequence[Point]) -> Iterator[_Box]:
    """Small boxes along a line through the points."""
    for (x, y), (to_x, to_y) in pairwise(points):
        steps = max(2, int(max(abs(to_x - x), abs(to_y - y)) / 3))
        for step in range(steps + 1):
            at_x, at_y = x + (to_x - x) * step / steps, y + (to_y - y) * step / steps
            yield _Box(at_x - 1, at_y - 1, at_x + 1, at_y + 1)
