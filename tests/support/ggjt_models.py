"""Tiny Llamas with a SentencePiece vocabulary, as ggjt files; a writer of its own, whose parts a test can break."""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from conftest import random_model

from quantkit.codes.block_types import BLOCK_TYPES, pack_super_blocks
from quantkit.containers.ggjt.read import GgjtSource
from quantkit.containers.ggjt.write import (
    GgjtWriter,
    Kind,
    make_vocabulary,
    plan,
)
from quantkit.containers.source import Source
from quantkit.runs.outputs import staged_files
from quantkit.sources import open_source

LLAMA = json.loads((Path(__file__).parents[1] / "support" / "sentencepiece_ids.json").read_text(encoding="utf-8"))[
    "llama"
]


VOCABULARY = len(LLAMA["tokens"])


SIZES = {"num_key_value_heads": 4, "rms_norm_eps": 5e-6, "intermediate_size": 192}


def tiny(tied: bool = False, **sizes: int) -> Any:
    """A random Llama with as many ids as the vocabulary has."""
    model = random_model("llama", tied=tied, dtype=torch.float32, seed=6, **SIZES | sizes)
    model.resize_token_embeddings(VOCABULARY, mean_resizing=False)
    return model


def write(path: Path, source: Source, kind: Kind = Kind.F32) -> GgjtSource:
    """Write a model with all matrices in one type, and open the file."""
    tensors = plan(source.config, source.tensors, dict.fromkeys(source.tensors, kind))
    vocabulary = make_vocabulary(source.tokenizer(), source.config.vocab_size)
    with (
        staged_files(path, force=True) as folder,
        GgjtWriter(folder / path.name, source.config, vocabulary, tensors) as writer,
    ):
        for tensor in reversed(tensors):
            writer.write(tensor, source.read(tensor.published).numpy())
        writer.finish()
    opened = open_source(path)
    assert isinstance(opened, GgjtSource)
    return opened


@dataclass(frozen=True)
class Parts:
    """A file's parts, each of which a test can break."""

    magic: bytes = b"tjgg"
    version: bytes = struct.pack("<I", 3)
    sizes: tuple[int, ...] = (259, 32, 32, 2, 1, 16, 1)
    tokens: tuple[tuple[bytes, float], ...] = (
        *((" \u2047 ".encode(), 0.0), (b"", 0.0), (b"", 0.0)),
        *((bytes([value]), 0.0) for value in range(256)),
    )
    tensors: tuple[tuple[str, tuple[int, ...], int, bytes], ...] = field(default_factory=lambda: parts_tensors(32, 96))

    def bytes(self) -> bytes:
        data = self.magic + self.version + struct.pack(f"<{len(self.sizes)}I", *self.sizes)
        for text, score in self.tokens:
            data += struct.pack("<I", len(text)) + text + struct.pack("<f", score)
        for name, shape, kind, values in self.tensors:
            label = name.encode()
            data += struct.pack(f"<{3 + len(shape)}I", len(shape), len(label), kind, *reversed(shape)) + label
            data += bytes(-len(data) % 32) + values
        return data

    def changed(self, name: str, shape: tuple[int, ...] | None = None, kind: int | None = None) -> Parts:
        """With another shape or type in one tensor's head, its bytes as they were."""
        tensors = [
            (n, s if shape is None or n != name else shape, k if kind is None or n != name else kind, data)
            for n, s, k, data in self.tensors
        ]
        return replace(self, tensors=tuple(tensors))


def parts_tensors(
    width: int, inner: int, vocabulary: int = 259, kind: Kind = Kind.F16, layers: int = 1, keys: int | None = None
) -> tuple[tuple[str, tuple[int, ...], int, bytes], ...]:
    """All tensors of a model of `layers` layers, of numbers 0, 1, 2 ... as float32 vectors and random blocks."""
    keys = keys or width
    shapes: dict[str, tuple[int, ...]] = {
        "tok_embeddings": (vocabulary, width),
        "norm": (width,),
        "output": (vocabulary, width),
    }
    for layer in range(layers):
        parts = {
            **{"attention.wq": (width, width), "attention.wk": (keys, width), "attention.wv": (keys, width)},
            **{"attention.wo": (width, width), "attention_norm": (width,), "ffn_norm": (width,)},
            **{"feed_forward.w1": (inner, width), "feed_forward.w2": (width, inner), "feed_forward.w3": (inner, width)},
        }
        shapes |= {f"layers.{layer}.{name}": shape for name, shape in parts.items()}
    return tuple((f"{name}.weight", *stored_tensor(shape, kind)) for name, shape in shapes.items())


def stored_tensor(shape: tuple[int, ...], kind: Kind) -> tuple[tuple[int, ...], int, bytes]:
    if len(shape) == 1:
        return shape, Kind.F32, (1 + 0.01 * np.arange(shape[0], dtype=np.float32)).tobytes()
    generator = np.random.default_rng(math.prod(shape))
    if kind in (Kind.F32, Kind.F16):
        return (
            shape,
            kind,
            (0.1 * generator.standard_normal(shape)).astype(f"<f{4 if kind == Kind.F32 else 2}").tobytes(),
        )
    return shape, kind, packed(kind, *shape, generator).tobytes()


def packed(kind: Kind, rows: int, columns: int, generator: np.random.Generator) -> np.ndarray:
    """Rows of a K-quant with values of a usual size."""
    form = BLOCK_TYPES[kind.name]
    codes = generator.integers(0, 2**form.bits, (rows, columns), dtype=np.uint8)
    blocks, subs = columns // 256, columns // form.group
    d = (generator.random((rows, blocks)) * 0.3 / 2 ** (form.bits + form.scale_bits)).astype(np.float16)
    sc = generator.integers(1, 2 ** (form.scale_bits - 1), (rows, subs), dtype=np.int16)
    if not form.has_minimum:
        return pack_super_blocks(kind.name, codes, d, sc)
    return pack_super_blocks(kind.name, codes, d, sc, d * np.float16(2 ** (form.bits - 1)), sc)
