"""The model case in small: a Llama with a SentencePiece vocabulary, and a tuned one with [PAD] as a delta on it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

import quantkit
from support.ggjt_models import LLAMA, tiny
from support.gguf_models import sentencepiece, write_model

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Tensors = dict[str, torch.Tensor]


def stored(folder: Path) -> Tensors:
    """Every tensor of a folder, by safetensors' own reader."""
    return {name: tensor for shard in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(shard).items()}


def changed(model: Path, copy: Path, change: Callable[[Tensors], Any], **config: Any) -> Path:
    """A copy of a one-file folder with its tensors, and its config, changed."""
    shutil.copytree(model, copy)
    tensors = stored(copy)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, copy / "model.safetensors")
    settings = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**settings, **config}))
    return copy


def tune(tensors: Tensors, seed: int = 1) -> None:
    """What tuning does: every value changes a little."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in tensors.items():
        noise = 0.01 * torch.randn(tensor.shape, generator=generator)
        tensors[name] = (tensor.float() + noise).to(tensor.dtype)


def tune_with_pad(tensors: Tensors) -> None:
    """The same, after a row for [PAD] was added: the mean of the others, as Alpaca's script does it."""
    tune(tensors)
    for name in (EMBEDDING, HEAD):
        mean = tensors[name].double().mean(0, keepdim=True)
        tensors[name] = torch.cat([tensors[name], (1.05 * mean).to(tensors[name].dtype)])


def wizard(folder: Path, **sizes: int) -> tuple[Path, Path, Path]:
    """Write base, tuned model and delta, as Alpaca's script leaves them: folders `llama`, `wizard`, `wizard-delta`.

    `sizes`: of the config, where they are others than those of most tests.
    """
    base, delta = folder / "llama", folder / "wizard-delta"
    write_model(folder / "llama.gguf", tiny(**sizes), sentencepiece(LLAMA))
    quantkit.convert(folder / "llama.gguf", base)
    (folder / "llama.gguf").unlink()
    tuned = changed(base, folder / "wizard", tune_with_pad, vocab_size=len(LLAMA["tokens"]) + 1)
    tokenizer = AutoTokenizer.from_pretrained(tuned)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(tuned)
    (tuned / "quantkit.json").unlink()
    quantkit.diff(base, tuned, delta, vocab="mean")
    (delta / "quantkit.json").unlink()  # as another program's
    return base, tuned, delta
