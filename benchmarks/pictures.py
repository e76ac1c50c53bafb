"""The pictures of README.md, from a recorded comparison: the report's plot and the terminal's table.

    python benchmarks/pictures.py benchmarks/results/2026-11-29-compare-2core-cpu.json

The record is the report.json of

    quantkit compare SMOLLM2 GPTQ-4bit-64g GPTQ-4bit-128g GPTQ-3bit-64g Q4_0.gguf --eval-tokens 4096 \
        --prompt-count 8 --max-new-tokens 64 --prompts --out comparison

with variants that were calibrated on 16 windows of 256 tokens. Equal records give equal pictures.
"""

from __future__ import annotations

import argparse
import io
import json
import re
from pathlib import Path

import numpy as np
from rich.console import Console

from quantkit.cli.tables import lines_of
from quantkit.report import Table
from quantkit.verbs.compare import CompareReport
from quantkit.verbs.compare.plots import Drawn, plot_files

ROOT = Path(__file__).resolve().parents[1]
COLUMNS = 80


def plot(report: CompareReport) -> str:
    """Accuracy against size, as SVG."""
    drawn = [Drawn(one.model, one.bytes, one.mean_kl, one.pareto, one.layers, np.zeros(1)) for one in report.models]
    return plot_files(drawn[0], drawn[1:])["accuracy-size.svg"].decode()


def terminal(report: CompareReport) -> str:
    """What the command shows in a terminal of 80 columns, as SVG that fetches nothing."""
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.print("$ quantkit compare SmolLM2-135M-Instruct.Q4_1.gguf SmolLM2-*", markup=False, highlight=False)
    for shown in report.lines():
        for line in lines_of(shown, COLUMNS) if isinstance(shown, Table) else [str(shown)]:
            console.print(line, markup=False, highlight=False)
    svg = console.export_svg(title="quantkit compare", unique_id="quantkit")
    return re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)


def main() -> None:
    """Draw both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("record", type=Path, help="report.json of a comparison")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images", help="folder of the pictures")
    options = parser.parse_args()
    report = CompareReport.of(json.loads(options.record.read_text(encoding="utf-8")), out=Path("comparison"))
    options.out.mkdir(parents=True, exist_ok=True)
    for name, svg in (("accuracy-size.svg", plot(report)), ("compare.svg", terminal(report))):
        (options.out / name).write_text(svg, encoding="utf-8")


if __name__ == "__main__":
    main()
