"""Processor seconds until the command line answers what needs no arithmetic: mistakes, `inspect`, `publish --dry-run`.

Ten ordinary mistakes of somebody who quantizes SmolLM2-135M, `inspect` of every form that it is in (and of a tiny Llama
as ggjt), and the dry run of publishing its GPTQ folder. Each command is a process of its own; what counts is the
processor time of the interpreter and all its imports, the median of some rounds. `--at` measures another checkout.

    python benchmarks/answers.py --rounds 5
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import common

import quantkit
from quantkit.options import QuantSpec
from quantkit.sources import default_source

MISTAKES = (
    "gptq plain --bits 5",
    "gptq plain --group-size 24",
    "gptq plain --out full",
    "gptq ./nowhere",
    "gptq empty",
    "ggml broken.gguf --type q8_0",
    "imatrix plain --calibration alpacca",
    "convert plain --out prompts.jsonl",
    "generate plain --prompts broken.jsonl --out answers.jsonl",
    "release recipe.yaml",
)
INSPECTED = ("plain", "codes", "model.gguf", "model.ggjt.bin", "someone/model")
MISTAKE_BAR, INSPECT_BAR, PUBLISH_BAR = 1.0, 2.0, 2.0  # seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/benchmarks"), help="folder for models")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--at", type=Path, default=Path(__file__).parents[1], help="the checkout that is measured")
    parser.add_argument("--out", type=Path, help="also write the result here, as JSON")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    desk = furnished(args.work.resolve())
    bars = dict.fromkeys(MISTAKES, MISTAKE_BAR) | dict.fromkeys((f"inspect {one}" for one in INSPECTED), INSPECT_BAR)
    bars["publish codes someone/model --dry-run"] = PUBLISH_BAR
    rows = []
    for command, bar in bars.items():
        times = [seconds_of(command, desk, args.at.resolve()) for _ in range(args.rounds)]
        rows.append({"command": command, "seconds": round(statistics.median(times), 3), "bar": bar})
        print(f"{rows[-1]['seconds']:6.2f} s (bar {bar:g})  quantkit {command}", flush=True)
    result: dict[str, Any] = {"benchmark": "answers", **common.machine(), "quantkit": quantkit.__version__}
    result |= {"rounds": args.rounds, "commands": rows}
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    raise SystemExit(0 if all(row["seconds"] <= row["bar"] for row in rows) else 1)


def seconds_of(command: str, desk: Path, checkout: Path) -> float:
    """Processor time of a command, user's and system's. One that ends otherwise than it should is no measurement."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(checkout),
        "HF_HOME": str(desk / "hub-home"),
        "HF_HUB_OFFLINE": "1",
    }
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    words = [sys.executable, "-m", "quantkit", *command.split()]
    done = subprocess.run(words, cwd=desk, env=environment, capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    broken = "--debug shows where" in done.stderr  # an error of the program itself
    if broken or (done.returncode != 0) != (command in MISTAKES):
        raise SystemExit(f"quantkit {command} ended with {done.returncode}:\n{done.stderr}")
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def furnished(work: Path) -> Path:
    """A folder with SmolLM2 in every form, and with what stands in the way of mistakes; made once."""
    desk, package = work / "answers", default_source()
    if desk.exists():
        return desk
    plain = common.smollm2_folder(work)
    assert package is not None
    made = work / "answers-in-the-making"
    shutil.rmtree(made, ignore_errors=True)
    for name in ("full", "empty"):
        (made / name).mkdir(parents=True)
    (made / "full" / "x").write_text("x")
    (made / "plain").symlink_to(plain)
    (made / "model.gguf").symlink_to(package)
    common.write_rounded(plain, made / "codes", QuantSpec(bits=4, group_size=64))
    (made / "model.ggjt.bin").write_bytes(ggjt())
    (made / "broken.gguf").write_text("no GGUF file")
    (made / "prompts.jsonl").write_text('{"prompt": "why?"}\n')
    (made / "broken.jsonl").write_text("why?\n")
    (made / "recipe.yaml").write_text("name: model\nsource: {model: plain}\nvariants: [{kind: gptq, bitts: 4}]\n")
    cached = made / "hub-home" / "hub" / "models--someone--model"
    (cached / "snapshots").mkdir(parents=True)
    (cached / "snapshots" / ("0" * 40)).symlink_to(plain)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0" * 40)
    made.rename(desk)
    return desk


def ggjt(width: int = 32, inner: int = 96, words: int = 259) -> bytes:
    """A Llama of one block and one head in float16, as a file of 2023; all zeros, which no header tells."""
    data = b"tjgg" + struct.pack("<8I", 3, words, width, 32, 1, 1, width, 1)
    tokens = [" \u2047 ".encode(), b"", b"", *(bytes([value]) for value in range(256))]
    data += b"".join(struct.pack("<I", len(text)) + text + struct.pack("<f", 0.0) for text in tokens)
    ends = {"tok_embeddings": (words, width), "norm": (width,), "output": (words, width)}
    inside = {f"attention.w{part}": (width, width) for part in "qkvo"}
    inside |= {"feed_forward.w1": (inner, width), "feed_forward.w2": (width, inner), "feed_forward.w3": (inner, width)}
    inside |= {"attention_norm": (width,), "ffn_norm": (width,)}
    for name, shape in {**ends, **{f"layers.0.{name}": shape for name, shape in inside.items()}}.items():
        label, plain = f"{name}.weight".encode(), len(shape) == 1
        data += struct.pack(f"<{3 + len(shape)}I", len(shape), len(label), not plain, *reversed(shape)) + label
        data += bytes(-len(data) % 32) + bytes((4 if plain else 2) * shape[0] * (1 if plain else shape[-1]))
    return data


if __name__ == "__main__":
    main()
