"""Names of models in plots: whatever they hold, files are well-formed and the library has nothing to warn of."""

from __future__ import annotations

import warnings
import xml.dom.minidom

import numpy as np
import pytest

from quantkit.verbs.compare.plots import Drawn, drawable, plot_files

pytest.importorskip("matplotlib", reason="pip install 'quantkit[plots]'")


def test_names_that_no_font_draws_or_that_drive_a_terminal_are_written_out() -> None:
    def drawn(label: str) -> Drawn:
        return Drawn(label, 1000, 0.1, True, [0.1, 0.2], np.linspace(0.001, 1, 50))

    names = ["\u6a21\u578b", "esc\x1b[31m\n", "\U0010ffff$x^2$ <b>&", "caf\u00e9"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        files = plot_files(drawn("reference"), [drawn(name) for name in names])
    assert len(files) == 6
    shown = [
        "".join(
            node.data
            for text in document.getElementsByTagName("text")
            for node in text.childNodes
            if node.nodeType == 3
        )
        for document in (
            xml.dom.minidom.parseString(content) for name, content in files.items() if name.endswith("svg")
        )
    ]
    assert all("esc\\x1b[31m\\x0a" in text and "\\u10ffff$x^2$ <b>&" in text and "caf\u00e9" in text for text in shown)
    assert drawable(["plain"]) == (["plain"], ["DejaVu Sans"])
