"""GPTQ on the grids of GGML's types against llama.cpp: the same types per tensor, the same bytes, the same tokens.

Three files of every type: llama-quantize without and with an importance matrix, and `quantkit gptq --ggml`. The matrix
and GPTQ have the same calibration tokens. Each file is read back by quantkit and compared with the float32 model on
held-out text.

- SmolLM2 with its weights moved off the grid that they come from (`off_grid.py`): the types with blocks of 32.
- SmolLM2 as the package has it: Q4_0.
- The Llama of width 512 that `train_llama.py` makes: the K-quants.

Finished files and rows stay in the work folder, so a run that was broken off goes on where it was. Exits with 1 where
a bar is missed.

    make judges
    python benchmarks/train_llama.py kjv.txt --out build/benchmarks/llama512
    python benchmarks/ggml.py --llama-cpp JUDGES/ggml-11434.0.0/bin --out ggml.json --table ggml.md
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
import off_grid
import torch
from gguf import GGUFReader

import quantkit
from quantkit.blocks.stream import ModelStream
from quantkit.evaluate.scores import TokenScores, score
from quantkit.evaluate.statistics import summarize
from quantkit.options import HELDOUT, EvaluationSpec
from quantkit.sources import default_source, open_source
from quantkit.tokens import TokenMatrix, window_text
from quantkit.tokens.text import evaluation_text
from quantkit.tokens.windows import Windows

SEQ_LEN = 512
PLAIN, IMATRIX, OWN, OURS = "llama.cpp", "llama.cpp, imatrix", "llama.cpp, imatrix, its own types", "quantkit"
BLOCKS_OF_32 = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0")
K_QUANTS = ("q2_k", "q3_k_s", "q3_k_m", "q4_k_s", "q4_k_m", "q5_k_s", "q5_k_m", "q6_k", "q3_k", "q4_k", "q5_k")
# One type for all blocks is no file type of llama.cpp's.
_UNIFORM = {"q3_k": "q3_k_s", "q4_k": "q4_k_s", "q5_k": "q5_k_s"}
# With an importance matrix llama.cpp gives some of their tensors a larger type: a file of its own beside the equal one.
_LIFTED = ("q4_0", "q5_0")
Q4_0_RATIO = 0.80


@dataclass(frozen=True)
class Subject:
    """A model, the types it is judged at, and the text: a data set's name or a file."""

    name: str
    model: Path
    types: tuple[str, ...]
    heldout: str
    calibration: Path | None = None  # None: the bundled sample without what is in the held-out text too


def main() -> None:
    args = _arguments()
    quantkit.tune()
    args.work.mkdir(parents=True, exist_ok=True)
    llama512 = args.llama512 or args.work / "llama512"
    rows: dict[str, Any] = {}
    for subject in subjects(args.work, llama512, args.subjects):
        folder = args.work / f"ggml-{subject.name}"
        folder.mkdir(exist_ok=True)
        for kind in [kind for kind in subject.types if args.types is None or kind in args.types]:
            row = _row(args, subject, folder, kind)
            rows.setdefault(subject.name, {})[kind] = row
            kl = {label: f"{variant['kl']:.4g}" for label, variant in row["variants"].items()}
            print(f"{subject.name} {kind}: mean KL {kl}", flush=True)
    bars = [bar for name, types in rows.items() for kind, row in types.items() for bar in bars_of(name, kind, row)]
    result = {
        "benchmark": "ggml",
        **common.machine(),
        "quantkit": quantkit.__version__,
        "samples": args.samples,
        "seq_len": SEQ_LEN,
        "windows": args.windows,
        "models": rows,
        "bars": bars,
    }
    print("\n" + table(rows))
    for bar in bars:
        print(f"{'met   ' if bar['met'] else 'MISSED'} {bar['bar']}")
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if args.table:
        args.table.write_text(table(rows), encoding="utf-8")
    raise SystemExit(0 if all(bar["met"] for bar in bars) else 1)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/benchmarks"), help="folder for models and files")
    parser.add_argument("--llama-cpp", type=Path, required=True, help="folder with llama-quantize")
    parser.add_argument("--llama512", type=Path, help="what train_llama.py wrote; default: in the work folder")
    parser.add_argument("--subjects", nargs="+", choices=["off-grid", "smollm2", "llama512"], help="default: all")
    parser.add_argument("--types", nargs="+", help="default: all")
    parser.add_argument("--samples", type=int, default=64, help="calibration windows")
    parser.add_argument("--windows", type=int, default=24, help="held-out windows")
    parser.add_argument("--out", type=Path, help="also write the result here, as JSON")
    parser.add_argument("--table", type=Path, help="also write the tables here, as Markdown")
    return parser.parse_args()


def subjects(work: Path, llama512: Path, names: Sequence[str] | None) -> Iterable[Subject]:
    """The models that are asked for; SmolLM2's folder is made here, the width-512 one by its own script."""
    wanted = names or ("off-grid", "smollm2", "llama512")
    if "off-grid" in wanted:
        folder = work / "smollm2-off-grid"
        if not folder.exists():
            off_grid.off_grid_folder(folder)
        yield Subject("off-grid", folder, BLOCKS_OF_32, HELDOUT)
    if "smollm2" in wanted:
        package = default_source()
        assert package is not None
        yield Subject("smollm2", package, ("q4_0",), HELDOUT)
    if "llama512" in wanted:
        if not llama512.is_dir():
            raise SystemExit(f"{llama512} is not there; make it with benchmarks/train_llama.py")
        yield Subject("llama512", llama512, K_QUANTS, str(llama512 / "heldout.txt"), llama512 / "train.txt")


def calibration(subject: Subject, samples: int) -> TokenMatrix:
    """int64 [samples, SEQ_LEN]: the bundled sample's, or windows from all over a text."""
    if subject.calibration is None:
        return quantkit.samples(subject.model, samples=samples, seq_len=SEQ_LEN).matrix
    tokenizer = open_source(subject.model).tokenizer()
    text = subject.calibration.read_text(encoding="utf-8")
    found = window_text(text, subject.calibration.name, SEQ_LEN, tokenizer, leading_bos_once=False).tokens
    picked = torch.linspace(0, len(found) - 1, samples).round().long()
    return TokenMatrix.of(found[picked], subject.calibration.name)


# -- the files -------------------------------------------------------------------------------------------------------


def _row(args: argparse.Namespace, subject: Subject, folder: Path, kind: str) -> dict[str, Any]:
    """What a type's files came to; from the work folder where it is there already, for the same tokens."""
    settings = {"samples": args.samples, "windows": args.windows}
    kept = folder / f"{kind}.json"
    if kept.exists():
        row: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))
        if row["settings"] == settings:
            return row
    files = make_files(args, subject, folder, kind)
    types = {label: tensor_types(path) for label, path in files.items()}
    for label in (PLAIN, IMATRIX):
        if types[label] != types[OURS]:
            differing = next(name for name in types[OURS] if types[OURS][name] != types[label].get(name))
            raise SystemExit(
                f"{subject.name} {kind}: {differing} is {types[OURS][differing]} here, "
                f"{types[label].get(differing)} in the file of {label}"
            )
    row = {"settings": settings, **evaluate(subject, files, args.windows)}
    row["types"] = _counted(types[OURS])
    kept.write_text(json.dumps(row, indent=2) + "\n", encoding="utf-8")
    return row


def make_files(args: argparse.Namespace, subject: Subject, folder: Path, kind: str) -> dict[str, Path]:
    """Label -> file. What is in the folder already is not made again."""
    tokens = calibration(subject, args.samples)
    full = folder / "f32.gguf"
    if not full.exists():
        quantkit.ggml(subject.model, full, type="f32", embedding_type="f32", output_type="f32")
    matrix = folder / f"imatrix-{args.samples}.gguf"
    if not matrix.exists():
        quantkit.imatrix(subject.model, matrix, calibration=tokens, device="cpu")
    with_matrix = ["--imatrix", str(matrix)]
    same = ["--tensor-type", f"ffn_down={kind}"] if kind in _LIFTED else []
    mixture, uniform = _UNIFORM.get(kind, kind), []
    if kind in _UNIFORM:
        uniform = ["--tensor-type", f"blk={kind}"]
    files = {
        PLAIN: _quantized(args, full, folder / f"plain-{kind}.gguf", mixture, *uniform),
        IMATRIX: _quantized(
            args, full, folder / f"imatrix-{args.samples}-{kind}.gguf", mixture, *with_matrix, *uniform, *same
        ),
    }
    if kind in _LIFTED:
        own = folder / f"imatrix-own-{args.samples}-{kind}.gguf"
        files[OWN] = _quantized(args, full, own, mixture, *with_matrix)
    ours = folder / f"quantkit-{args.samples}-{kind}"
    if not ours.exists():
        quantkit.gptq(subject.model, ours, ggml=kind, calibration=tokens, device="cpu", evaluate=False)
    [files[OURS]] = ours.glob("*.gguf")
    return files


def _quantized(args: argparse.Namespace, full: Path, out: Path, kind: str, *options: str) -> Path:
    """A file by llama-quantize."""
    if out.exists():
        return out
    partial = out.with_suffix(".partial")
    command = [str(args.llama_cpp / "llama-quantize"), *options, str(full), str(partial), kind.upper(), "2"]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        raise SystemExit(f"llama-quantize failed:\n{(done.stdout + done.stderr)[-2000:]}")
    partial.rename(out)
    return out


def tensor_types(path: Path) -> dict[str, str]:
    """The type of every tensor of a file."""
    return {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(path).tensors}


def _counted(types: dict[str, str]) -> dict[str, int]:
    return {kind: list(types.values()).count(kind) for kind in sorted(set(types.values()))}


# -- judging them ----------------------------------------------------------------------------------------------------


def evaluate(subject: Subject, files: dict[str, Path], count: int) -> dict[str, Any]:
    """Every file against the float32 model on the first windows of the held-out text."""
    models = {"float32": subject.model, **files}
    streams = [ModelStream(open_source(path), torch.device("cpu"), torch.float32) for path in models.values()]
    windows = heldout(subject, streams, count)
    scores = score(streams, windows, against=True)
    results = summarize(list(models), scores)
    variants = {
        label: {
            "bytes": sum(int(tensor.n_bytes) for tensor in GGUFReader(path).tensors),
            "file_bytes": path.stat().st_size,
            "perplexity": result.perplexity,
            "perplexity_stderr": result.stderr,
            "kl": _kl(scored).mean().item(),
            "kl_stderr": window_stderr(_kl(scored), windows),
            "top1_agreement": result.top1_agreement,
        }
        for (label, path), result, scored in zip(files.items(), results[1:], scores[1:], strict=True)
    }
    by_label = dict(zip(models, scores, strict=True))
    paired = _kl(by_label[OURS]) - _kl(by_label[IMATRIX])
    return {
        "float32_perplexity": results[0].perplexity,
        "tokens": scores[0].nll.numel(),
        "variants": variants,
        "ours_less_imatrix": {"mean": paired.mean().item(), "stderr": window_stderr(paired, windows)},
    }


def heldout(subject: Subject, streams: Sequence[ModelStream], count: int) -> Windows:
    """The first windows of the text. Ends the run where the files' tokenizers disagree on it."""
    spec = EvaluationSpec(text=subject.heldout, seq_len=SEQ_LEN)
    found = [evaluation_text(spec, stream.source.tokenizer()).windows for stream in streams]
    if any(not torch.equal(one.tokens, found[0].tokens) for one in found[1:]):
        raise SystemExit(f"{subject.name}: the files tokenize {subject.heldout} differently")
    if len(found[0].tokens) < count:
        raise SystemExit(f"{subject.heldout} has {len(found[0].tokens)} windows of {SEQ_LEN} tokens, not {count}")
    return Windows(found[0].tokens[:count], found[0].first_scored[:count])


def _kl(scored: TokenScores) -> torch.Tensor:
    assert scored.kl is not None
    return scored.kl.double()


def window_stderr(values: torch.Tensor, windows: Windows) -> float:
    """Standard error of a mean over tokens, from the spread of the windows' means: a window's tokens go together."""
    means = values.reshape(len(windows.tokens), -1).mean(1)
    return float(means.std() / len(means) ** 0.5)


def bars_of(name: str, kind: str, row: dict[str, Any]) -> list[dict[str, Any]]:
    """What a row must show, and whether it does."""
    variants, paired = row["variants"], row["ours_less_imatrix"]
    ours, theirs = variants[OURS]["kl"], variants[IMATRIX]["kl"]
    shown = f"{name} {kind}: {ours:.4g} against {theirs:.4g}"
    bars = []
    if kind == "q8_0":
        met = paired["mean"] <= 2 * paired["stderr"]
        bars.append({"bar": f"{shown}, no worse within two paired errors of {paired['stderr']:.2g}", "met": met})
    elif re.match(r"q[2-5]_", kind):
        bars.append({"bar": f"{shown} of the imatrix, below", "met": ours < theirs})
    if kind == "q4_0":
        bars.append({"bar": f"{shown}, at most {Q4_0_RATIO:.2f} of it", "met": ours <= Q4_0_RATIO * theirs})
    return bars


def table(rows: dict[str, Any]) -> str:
    """Markdown, a table a model."""
    text = ""
    for name, types in rows.items():
        reference = next(iter(types.values()))["float32_perplexity"]
        text += f"{name} (float32: perplexity {reference:.2f})\n\n"
        text += "| type | MB | KL, llama.cpp | KL, imatrix | KL, quantkit | to imatrix | perplexities | same top-1 |\n"
        text += "|---|---:|---:|---:|---:|---:|---:|---:|\n"
        for kind, row in types.items():
            variants = [row["variants"][label] for label in (PLAIN, IMATRIX, OURS)]
            cells = [kind.upper(), f"{variants[2]['bytes'] / 1e6:.1f}"]
            cells += [_shown_kl(variant) for variant in variants]
            cells.append(f"{variants[2]['kl'] / variants[1]['kl']:.2f}")
            cells.append(" / ".join(f"{variant['perplexity']:.2f}" for variant in variants))
            cells.append(" / ".join(f"{100 * variant['top1_agreement']:.1f}" for variant in variants) + " %")
            text += "| " + " | ".join(cells) + " |\n"
            if OWN in row["variants"]:
                own = row["variants"][OWN]
                cells = [f"{kind.upper()}, llama.cpp's own types", f"{own['bytes'] / 1e6:.1f}", "", _shown_kl(own), ""]
                cells += ["", f"{own['perplexity']:.2f}", f"{100 * own['top1_agreement']:.1f} %"]
                text += "| " + " | ".join(cells) + " |\n"
        text += "\n"
    return text


def _shown_kl(variant: dict[str, Any]) -> str:
    return f"{variant['kl']:.3g} ± {variant['kl_stderr']:.1g}"


if __name__ == "__main__":
    main()
