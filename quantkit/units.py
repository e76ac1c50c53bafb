"""Numbers as a person reads them."""

from __future__ import annotations


def duration(seconds: float) -> str:
    """Seconds as a person says them."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def size(count: int) -> str:
    """Bytes in powers of ten, as the Hub shows them."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def significant(value: float, digits: int = 4, sign: bool = False) -> str:
    """A number with this many significant digits, written out where it is of ordinary size."""
    plus = "+" if sign else ""
    text = f"{value:{plus}#.{digits}g}".removesuffix(".")
    if "e" not in text or not 1e-6 <= abs(value) < 1e15:
        return text
    return f"{value:{plus}.0f}" if "e+" in text else f"{value:{plus}.{digits - 1 - int(text.partition('e')[2])}f}"
