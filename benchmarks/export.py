"""Speed, memory and growth of writing a GPTQ checkpoint as a file for llama.cpp.

- SmolLM2-135M at 4 bits, group 64, to Q4_0: the seconds of `quantkit.ggml` against reading the checkpoint and copying
  the file that comes of it, both to the disk, in turns; once with nothing of either in the page cache, so that reading
  is from the disk, and once with all of it. The codes are plainly rounded, which the layout does not show.
- Peak memory of that above the interpreter and its imports.
- Checkpoints of 1, 2, 4 and 8 times as many blocks, and one of a wider vocabulary: seconds against bytes.

Each export is a process of its own. What a first call imports (transformers loads an architecture's code when it is
asked for) is done before the clock starts, by a dry run; the seconds with it are reported too.

    python benchmarks/export.py --rounds 5
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import quantkit
from quantkit.cli.command import settled
from quantkit.options import QuantSpec

SPEC = QuantSpec(bits=4, group_size=64)
FACTORS = (1, 2, 4, 8)
BLOCKS, WIDTH, VOCABULARY, WIDER = 4, 1024, 4096, 65536
LIMIT_RATIO, LIMIT_BYTES, LIMIT_GROWTH = 2.0, 500e6, 1.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/benchmarks"), help="folder for models and files")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="also write the result here, as JSON")
    parser.add_argument("--once", type=Path, help="export this checkpoint once in this process (internal)")
    parser.add_argument("--cold", action="store_true", help="with --once: none of it in the page cache (internal)")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    if args.once:
        with settled("ggml"):  # as the command line sets its process
            print("RESULT " + json.dumps(export_once(args.once, args.work / "export.gguf", args.cold)))
        return

    smollm2 = args.work / "export-smollm2"
    if not smollm2.exists():
        common.write_rounded(common.smollm2_folder(args.work), smollm2, SPEC)
    rounds = [_round(args, smollm2) for _ in range(args.rounds)]
    median = {key: statistics.median(row[key] for row in rounds) for key in rounds[0]}
    growth = [_growth(args, name, folder) for name, folder in larger(args.work).items()]
    result: dict[str, Any] = {
        "benchmark": "export",
        **common.machine(),
        "quantkit": quantkit.__version__,
        "rounds": rounds,
        "median": median,
        "growth": growth,
        **fit(growth),
    }
    result["bars"] = bars_of(result)
    print(json.dumps({key: value for key, value in result.items() if key != "rounds"}, indent=2))
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    raise SystemExit(0 if all(result["bars"].values()) else 1)


def export_once(checkpoint: Path, out: Path, cold: bool) -> dict[str, float]:
    """Seconds of one export, with and without what the first call imports, and the peak memory before and after."""
    started = time.perf_counter()
    quantkit.ggml(checkpoint, out, type="q4_0", dry_run=True, force=True)
    imported = time.perf_counter()
    before = _peak_bytes()
    out.unlink(missing_ok=True)  # the copy that it is compared with replaces no file either
    if cold:
        forget(*checkpoint.glob("*.safetensors"))
    begun = time.perf_counter()
    quantkit.ggml(checkpoint, out, type="q4_0")
    done = time.perf_counter()
    return {
        "seconds": done - begun,
        "dry_run_seconds": imported - started,
        "peak_bytes_before": before,
        "peak_bytes": _peak_bytes(),
        "bytes": out.stat().st_size,
    }


def forget(*files: Path) -> None:
    """Have the system drop files from its page cache; Linux only."""
    for file in files:
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_and_copy(checkpoint: Path, file: Path, cold: bool) -> float:
    """Seconds of reading a checkpoint's weights and copying a file, to the disk."""
    copy = file.with_suffix(".copy")
    weights = sorted(checkpoint.glob("*.safetensors"))
    if cold:
        forget(file, *weights)
    started = time.perf_counter()
    for path in weights:
        with path.open("rb", buffering=0) as read:
            buffer = bytearray(1 << 24)
            while read.readinto(buffer):
                pass
    with file.open("rb") as source, copy.open("wb") as target:
        shutil.copyfileobj(source, target, 1 << 24)
        target.flush()
        os.fsync(target.fileno())
    seconds = time.perf_counter() - started
    copy.unlink()
    return seconds


def _round(args: argparse.Namespace, checkpoint: Path) -> dict[str, float]:
    row: dict[str, float] = {}
    for cold in (True, False):
        ours = _export(args, checkpoint, cold)
        floor = read_and_copy(checkpoint, args.work / "export.gguf", cold)
        where = "disk" if cold else "cache"
        row |= {
            f"seconds_from_{where}": ours["seconds"],
            f"read_and_copy_seconds_from_{where}": floor,
            f"over_read_and_copy_from_{where}": ours["seconds"] / floor,
        }
    row |= {
        "dry_run_seconds": ours["dry_run_seconds"],
        "bytes": ours["bytes"],
        "peak_above_bytes": ours["peak_bytes"] - ours["peak_bytes_before"],
    }
    print(json.dumps(row), flush=True)
    return row


def _export(args: argparse.Namespace, checkpoint: Path, cold: bool = False) -> dict[str, float]:
    command = [sys.executable, __file__, "--once", str(checkpoint), "--work", str(args.work)]
    command += ["--cold"] if cold else []
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(
        next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))[len("RESULT ") :]
    )
    return found


def _growth(args: argparse.Namespace, name: str, checkpoint: Path) -> dict[str, Any]:
    runs = [_export(args, checkpoint) for _ in range(args.rounds)]
    row = {
        "checkpoint": name,
        "bytes": runs[0]["bytes"],
        "seconds": statistics.median(run["seconds"] for run in runs),
        "peak_above_bytes": statistics.median(run["peak_bytes"] - run["peak_bytes_before"] for run in runs),
    }
    print(json.dumps(row), flush=True)
    return row


def larger(work: Path) -> dict[str, Path]:
    """Checkpoints of random weights: more blocks each, the first one's again and again; and a wider embedding."""
    made = {}
    for vocabulary in (VOCABULARY, WIDER):
        base = work / f"export-{vocabulary}-1x"
        if not base.exists():
            plain = work / f"export-{vocabulary}-plain"
            _random_model(plain, vocabulary)
            common.write_rounded(plain, base, SPEC)
        made[f"{vocabulary} tokens, 1x"] = base
    for factor in FACTORS[1:]:
        folder = work / f"export-{VOCABULARY}-{factor}x"
        if not folder.exists():
            _repeat_blocks(work / f"export-{VOCABULARY}-1x", folder, factor)
        made[f"{VOCABULARY} tokens, {factor}x"] = folder
    return made


def _random_model(folder: Path, vocabulary: int) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=WIDTH,
        intermediate_size=11 * WIDTH // 4,
        num_hidden_layers=BLOCKS,
        num_attention_heads=WIDTH // 64,
        num_key_value_heads=WIDTH // 128,
    )
    LlamaForCausalLM(config).half().save_pretrained(folder)
    _byte_tokenizer().save_pretrained(folder)


def _byte_tokenizer() -> Any:
    """SentencePiece-like, of the bytes and the space alone; the writer fills the other rows of the vocabulary."""
    names = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    pieces = {name: id_ for id_, name in enumerate(names)}
    backend = Tokenizer(models.BPE(pieces, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


def _repeat_blocks(base: Path, folder: Path, factor: int) -> None:
    """The checkpoint `base` with its blocks `factor` times over."""
    shutil.copytree(base, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    tensors = {}
    for name, values in load_file(base / "model.safetensors").items():
        parts = name.split(".")
        if parts[:2] != ["model", "layers"]:
            tensors[name] = values
            continue
        for again in range(factor):
            number = str(int(parts[2]) + again * BLOCKS)
            tensors[".".join([*parts[:2], number, *parts[3:]])] = values.clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["num_hidden_layers"] = factor * BLOCKS
    config.pop("layer_types", None)
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def fit(growth: list[dict[str, Any]]) -> dict[str, float]:
    """A line through seconds against bytes of the checkpoints with more blocks, and how it bends.

    `growth_of_slope`: seconds a byte from the middle size to the largest over those from the smallest to the middle:
    1 on a line, more where the cost grows faster than the bytes.
    """
    rows = sorted(
        (row for row in growth if not row["checkpoint"].startswith(f"{WIDER} ")), key=lambda row: row["bytes"]
    )
    sizes, seconds = (np.array([row[key] for row in rows]) for key in ("bytes", "seconds"))
    slope, fixed = np.polyfit(sizes, seconds, 1)
    slopes = np.diff(seconds[[0, -2, -1]]) / np.diff(sizes[[0, -2, -1]])
    return {
        "seconds_per_gigabyte": float(slope * 1e9),
        "fixed_seconds": float(fixed),
        "growth_of_slope": float(slopes[1] / slopes[0]),
    }


def bars_of(result: dict[str, Any]) -> dict[str, bool]:
    median = result["median"]
    return {
        f"within {LIMIT_RATIO:g} times reading and copying, {text}": median[f"over_read_and_copy_from_{where}"]
        <= LIMIT_RATIO
        for where, text in (("disk", "from the disk"), ("cache", "all in the page cache"))
    } | {
        f"peak memory under {LIMIT_BYTES / 1e6:.0f} MB above imports": median["peak_above_bytes"] < LIMIT_BYTES,
        "cost grows with bytes": result["growth_of_slope"] <= LIMIT_GROWTH,
    }


def _peak_bytes() -> int:
    """Of this program alone: what getrusage says begins with the peak of the process that started it."""
    status = Path("/proc/self/status")
    if status.exists():
        return 1024 * int(next(line.split()[1] for line in status.read_text().splitlines() if "VmHWM" in line))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


if __name__ == "__main__":
    main()
