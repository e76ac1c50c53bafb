"""quantkit against GPTQModel, auto-round, llm-compressor and llama.cpp: the same model, calibration tokens, text and
bytes. Every row is a process of its own; every checkpoint is judged by quantkit's reader against the model it is of.

The settings are in contestants.py, the peers' environments are made by peers/environments.sh. A precision is BITS:GROUP
for folders (GPTQ, compressed-tensors; symmetric) or a GGML type for files. Models: SmolLM2 as its package has it
(smollm2), off its grid (smollm2-off-grid, off_grid.py), spread to width 768 (spread, spread.py), and Gemma-3-270M off
its grid (gemma3, off_grid.py, of the GGUF file that `make demo-gemma` installs).

What is finished stays in the work folder and in the record (--out): a run that was broken off, or one with more rows,
makes only what is missing. A row that failed says why in the record, and is tried again with --again.

    benchmarks/peers/environments.sh
    python benchmarks/arena.py --models smollm2 --precisions 4:64 --tools quantkit auto-round --out arena.json
    python benchmarks/arena.py --models spread --precisions q4_k_m --tools quantkit llama.cpp --out arena.json
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import common
import contestants
import numpy as np
import off_grid
import spread
import torch
from contestants import BUDGET, LLAMA_CPP, MIXTURE, PLAIN, QUANTKIT, Cell, slug
from gguf import GGUFReader
from processes import ProgramError, measured

import quantkit
from quantkit.blocks.stream import ModelStream
from quantkit.evaluate.scores import TokenScores, score
from quantkit.evaluate.statistics import summarize
from quantkit.runs.atomic import write_json
from quantkit.sources import open_source
from quantkit.tokens import TokenMatrix

MODELS = ("smollm2", "smollm2-off-grid", "gemma3", "spread")
RIVAL = "standard"  # quantkit's default, which every row of a cell is paired with


def main() -> None:
    args = _arguments()
    quantkit.tune()
    args.work.mkdir(parents=True, exist_ok=True)
    record = Record(args.out or args.work / "arena.json", _settings(args))
    for name in args.models:
        subject = Subject(name, model_folder(args, name), args)
        for precision in args.precisions:
            for seed in range(args.seeds):
                arena = Arena(args, subject, Cell(name, precision, seed), record)
                arena.make()
                arena.judge()
    print("\n" + table(record.rows))
    if args.table:
        args.table.write_text(table(record.rows), encoding="utf-8")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/arena"), help="folder for models and checkpoints")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["smollm2-off-grid"])
    parser.add_argument("--precisions", nargs="+", default=["4:64"], help="BITS:GROUP or GGML types")
    parser.add_argument("--tools", nargs="+", choices=contestants.TOOLS, default=list(contestants.TOOLS))
    parser.add_argument("--settings", nargs="+", help="only these, by their names in contestants.py; default: all")
    parser.add_argument("--seeds", type=int, default=1, help="calibration sets, each of other windows of the data")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--calibration", type=Path, default=common.DATA / "alpaca_en_demo.json")
    parser.add_argument("--eval-tokens", type=int, default=30720)
    parser.add_argument("--text", type=Path, default=common.DATA / "wiki.test.raw", help="text to judge on")
    parser.add_argument("--gemma", type=Path, default=Path(sys.prefix, "gemma-3-270m-q4_k_m.gguf"))
    parser.add_argument("--again", action="store_true", help="try rows that failed again")
    parser.add_argument("--out", type=Path, help="the record, as JSON; default: in the work folder")
    parser.add_argument("--table", type=Path, help="also write the tables here, as Markdown")
    args = parser.parse_args()
    args.work = args.work.absolute()  # contestants run in it
    return args


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    told = {name: getattr(args, name) for name in ("samples", "seq_len", "eval_tokens")}
    return {**told, "calibration": args.calibration.name, "text": args.text.name}


class Record:
    """The rows so far, by their names, written after each. One record has one calibration size and one text; arenas of
    other rows may run beside."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self._path, self._settings = path, settings
        self.rows = self._read()

    def _read(self) -> dict[str, dict[str, Any]]:
        if not self._path.exists():
            return {}
        found = json.loads(self._path.read_text(encoding="utf-8"))
        if found["settings"] != self._settings:
            raise SystemExit(f"{self._path} is of other settings, {found['settings']}: name another --out")
        rows: dict[str, dict[str, Any]] = found["rows"]
        return rows

    def keep(self, name: str, row: dict[str, Any]) -> None:
        """Add to a row, and write all. What failed before is forgotten."""
        kept = self.rows.get(name, {}) | row
        if "failed" not in row:
            kept.pop("failed", None)
        self.rows = self._read() | {name: kept}
        write_json(self._path, {"benchmark": "arena", "settings": self._settings, "rows": self.rows})


@dataclass(frozen=True)
class Subject:
    """A model, and what is made of it once for all its cells."""

    name: str
    model: Path
    args: argparse.Namespace

    def tokens(self, seed: int) -> Path:
        """The file of a seed's calibration windows: those after the windows of the seeds before."""
        path = self.args.work / f"{slug(self.name, self.args.samples, self.args.seq_len, seed)}.npy"
        if not path.exists():
            count, source = self.args.samples, open_source(self.model)
            drawn = common.calibration_tokens(source, count * (seed + 1), self.args.seq_len, self.args.calibration)
            np.save(path, drawn.tokens[count * seed :].numpy())
        return path

    @cached_property
    def full(self) -> Path:
        """What llama-quantize reads."""
        path: Path = self.args.work / f"{slug(self.name)}-f32.gguf"
        if not path.exists():
            quantkit.ggml(self.model, path, type="f32", embedding_type="f32", output_type="f32")
        return path

    def matrix(self, seed: int) -> Path:
        """The importance matrix of a seed's windows."""
        tokens = self.tokens(seed)
        path = tokens.with_suffix(".imatrix.gguf")
        if not path.exists():
            drawn = TokenMatrix.of(torch.from_numpy(np.load(tokens)), tokens.name)
            quantkit.imatrix(self.model, path, calibration=drawn, device="cpu")
        return path


def model_folder(args: argparse.Namespace, name: str) -> Path:
    """A model's folder, made where it isn't there."""
    if name == "smollm2":
        return common.smollm2_folder(args.work)
    folder: Path = args.work / name
    if not folder.exists():
        if name == "spread":
            spread.spread_folder(folder)
        elif name == "gemma3":
            off_grid.off_grid_folder(folder, args.gemma)
        else:
            off_grid.off_grid_folder(folder)
    return folder


class Arena:
    """One cell: its rows made, then judged together, so that the model itself runs once."""

    def __init__(self, args: argparse.Namespace, subject: Subject, cell: Cell, record: Record) -> None:
        self.args, self.subject, self.cell, self.record = args, subject, cell, record

    def row(self, tool: str, setting: str) -> str:
        """The name of a row."""
        return f"{self.cell}: {tool}, {setting}"

    def path(self, tool: str, setting: str) -> Path:
        """Where the checkpoint is, or will be."""
        sizes = self.args.samples, self.args.seq_len
        name = slug(self.cell.model, self.cell.precision, *sizes, self.cell.seed, tool, setting)
        path: Path = self.args.work / (f"{name}.gguf" if self.cell.ggml else name)
        return path

    # -- making ------------------------------------------------------------------------------------------------------

    def make(self) -> None:
        """Every row's checkpoint, with what it cost."""
        for tool, setting, options in contestants.chosen(self.cell, self.args.tools):
            name, path = self.row(tool, setting), self.path(tool, setting)
            if self.args.settings and setting not in self.args.settings:
                continue
            if "kl_divergence" in self.record.rows.get(name, {}):
                continue
            if "failed" in self.record.rows.get(name, {}) and not self.args.again:
                continue
            cost = path.with_name(f"{path.name}.cost.json")
            if not (path.exists() and cost.exists()):
                print(f"{name} ...", flush=True)
                partial = path.with_name(f"partial-{path.name}")
                try:
                    spent = self._run(tool, setting, options, partial)
                except ProgramError as error:
                    print(f"{name} failed: {error}", flush=True)
                    self.record.keep(name, {"failed": str(error).strip().splitlines()[-1]})
                    continue
                write_json(cost, spent)
                partial.rename(path)
            told = {"model": self.cell.model, "precision": self.cell.precision, "seed": self.cell.seed}
            self.record.keep(name, {**told, "tool": tool, "setting": setting, **json.loads(cost.read_text())})

    def _run(self, tool: str, setting: str, options: dict[str, Any], out: Path) -> dict[str, Any]:
        if tool == LLAMA_CPP:
            command = self._llama_cpp(setting, out)
        else:
            files = self.subject.model, self.subject.tokens(self.cell.seed), out
            budget = self._budget() if setting == BUDGET else None
            command = contestants.by_script(self.cell, tool, options, files, budget)
        log = out.with_name(f"{out.name}.log")
        return {**common.machine(), **measured(command, log, {"HF_HUB_OFFLINE": "1"})}

    def _llama_cpp(self, setting: str, out: Path) -> list[str]:
        kind, types = self.cell.ggml, None
        assert kind is not None
        matrix = None if setting == PLAIN else self.subject.matrix(self.cell.seed)
        if setting == MIXTURE:
            chosen = self.path(QUANTKIT, BUDGET)
            if not chosen.exists():
                raise ProgramError(f"it takes the types of {chosen.name}, which isn't made")
            types = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(chosen).tensors}
        return contestants.by_llama_cpp(kind, self.subject.full, out, matrix, types)

    def _budget(self) -> str:
        """The bits per weight of the cell's own precision."""
        bits, group = (None, None) if self.cell.ggml else self.cell.grid
        grid = {"ggml": self.cell.ggml} if self.cell.ggml else {"bits": bits, "group_size": group}
        plan = quantkit.gptq(self.subject.model, self.args.work / "dry-run", **grid, device="cpu", dry_run=True)
        return f"{plan.bits_per_weight + 1e-9:.10f}bpw"

    # -- judging -----------------------------------------------------------------------------------------------------

    def judge(self) -> None:
        """All rows that have a checkpoint and no numbers; then every row's difference from quantkit's default."""
        made = {
            name: self.path(row["tool"], row["setting"])
            for name, row in self.record.rows.items()
            if name.startswith(f"{self.cell}: ") and "tool" in row
        }
        missing = {name: path for name, path in made.items() if "kl_divergence" not in self.record.rows[name]}
        if missing:
            self._score(missing)
        rival = _losses(self.path(QUANTKIT, RIVAL))
        for name, path in made.items():
            losses = _losses(path)
            if losses is not None and rival is not None:
                paired = (losses - rival).reshape(-1, self.args.seq_len - 1).mean(1)
                difference = {"mean": float(paired.mean()), "stderr": float(paired.std() / len(paired) ** 0.5)}
                self.record.keep(name, {"kl_less_standard": difference})

    def _score(self, models: dict[str, Path]) -> None:
        paths = [self.subject.model, *models.values()]
        streams = [ModelStream(open_source(path), torch.device("cpu"), torch.float32) for path in paths]
        windows = common.evaluation_windows(streams[0].source, self.args.eval_tokens, self.args.seq_len, self.args.text)
        scores = score(streams, windows, against=True)
        numbers = summarize(["", *models], scores)
        for (name, path), stream, own, row in zip(models.items(), streams[1:], scores[1:], numbers[1:], strict=True):
            kept = path.with_name(f"{path.name}.kl.npy")
            np.save(kept, _kl(own))
            told = {**row.as_dict(), "model": self.cell.model, "source_perplexity": numbers[0].perplexity}
            told["kl_divergence_stderr"] = window_stderr(_kl(own), self.args.seq_len - 1)
            self.record.keep(name, {**told, "bits_per_weight": bits_per_weight(stream), "bytes": tensor_bytes(stream)})
            print(f"{name}: KL {row.kl_divergence.mean:.4f}" if row.kl_divergence else name, flush=True)


def _kl(scores: TokenScores) -> Any:
    assert scores.kl is not None
    return scores.kl.double().numpy()


def _losses(path: Path) -> Any:
    kept = path.with_name(f"{path.name}.kl.npy")
    return np.load(kept) if kept.exists() else None


def window_stderr(values: Any, length: int) -> float:
    """Standard error of a mean over tokens, from the spread of the windows' means: a window's tokens go together."""
    means = values.reshape(-1, length).mean(1)
    return float(means.std(ddof=1) / len(means) ** 0.5)


def bits_per_weight(stream: ModelStream) -> float:
    """Of the Linears of the blocks, with their scales, zeros and order."""
    tensors = stream.source.tensors
    shapes = dict(stream.linears())
    held = sum(tensors[f"{name}.weight"].bytes for name in shapes)
    return 8 * held / sum(rows * columns for rows, columns in shapes.values())


def tensor_bytes(stream: ModelStream) -> int:
    """Of all tensors."""
    return sum(info.bytes for info in stream.source.tensors.values())


# -- telling ---------------------------------------------------------------------------------------------------------


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Markdown, a table a cell: the rows by divergence, those that failed last."""
    cells: dict[str, dict[str, dict[str, Any]]] = {}
    for name, row in rows.items():
        cell, _, contestant = name.partition(": ")
        cells.setdefault(cell, {})[contestant] = row
    text = ""
    for cell, found in cells.items():
        judged = {name: row for name, row in found.items() if "kl_divergence" in row}
        perplexities = [row["source_perplexity"] for row in judged.values()]
        text += f"{cell}" + (f" (source: perplexity {perplexities[0]:.3f})" if perplexities else "") + "\n\n"
        text += "| | bits | perplexity | KL mean | less quantkit's default | KL 99 % | processor s | s | GB |\n"
        text += "|---|---:|---:|---:|---:|---:|---:|---:|---:|\n"
        for name, row in sorted(judged.items(), key=lambda pair: float(pair[1]["kl_divergence"]["mean"])):
            text += "| " + " | ".join(_cells(name, row)) + " |\n"
        for name, row in found.items():
            if "failed" in row:
                text += f"| {name} | failed: {row['failed']} | | | | | | | |\n"
        text += "\n"
    return text


def _cells(name: str, row: dict[str, Any]) -> Sequence[str]:
    paired = row.get("kl_less_standard")
    kl = row["kl_divergence"]
    return [
        name,
        f"{row['bits_per_weight']:.3f}",
        f"{row['perplexity']:.3f} ± {row['stderr']:.3f}",
        f"{kl['mean']:.4f} ± {row['kl_divergence_stderr']:.4f}",
        f"{paired['mean']:+.4f} ± {paired['stderr']:.4f}" if paired and paired["mean"] else "",
        f"{kl['p99']:.3f}",
        f"{row['processor_seconds']:.0f}",
        f"{row['seconds']:.0f}",
        f"{row['peak_bytes'] / 1e9:.2f}",
    ]


if __name__ == "__main__":
    main()
