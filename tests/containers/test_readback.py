"""Bytes that change between writing and the end of the work are found in any tensor of any container, and named."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from conftest import MakeModel
from support.ggjt_models import LLAMA, tiny
from support.gguf_models import sentencepiece, write_model

import quantkit
from quantkit.containers.ggjt.read import GgjtFile
from quantkit.containers.hf.header import read_header
from quantkit.containers.readback import ReadBack
from quantkit.errors import OutputError
from quantkit.tokens import TokenMatrix

Spans = dict[str, tuple[int, int]]


def of_safetensors(path: Path) -> Spans:
    return {name: (stored.start, stored.stop) for name, stored in read_header(path).items()}


def of_gguf(path: Path) -> Spans:
    tensors = gguf.GGUFReader(path).tensors
    return {t.name: (t.data_offset, t.data_offset + t.n_bytes) for t in tensors} | {"its head": (4, 24)}


def of_ggjt(path: Path) -> Spans:
    tensors = GgjtFile(path).tensors
    return {name: (t.offset, t.offset + t.bytes) for name, t in tensors.items()} | {"its header": (4, 36)}


@contextmanager
def two_other_bytes(path: Path, start: int, stop: int, chance: np.random.Generator) -> Iterator[None]:
    """Two of a file's bytes are others for a while."""
    sound = path.read_bytes()
    spoiled = bytearray(sound)
    for at in chance.choice(np.arange(start, stop), size=2, replace=False):
        spoiled[at] ^= chance.integers(1, 256)
    path.write_bytes(spoiled)
    yield
    path.write_bytes(sound)


class Damage:
    """Every tensor in turn is damaged when the work is done but for reading back; the last one stays so."""

    def __init__(self, spans: Callable[[Path], Spans], pattern: str) -> None:
        self.spans, self.pattern = spans, pattern
        self.found: set[str] = set()

    def compare(self, written: ReadBack, read: Any, advance: Any = lambda done: None) -> None:
        chance = np.random.default_rng(0)
        (folder,) = {path.parent for path, _ in written._written}
        for path in sorted(folder.glob(self.pattern)):
            for name, span in self.spans(path).items():
                message = f"^{re.escape(path.name)}: {re.escape(name)}: other data was read back than was written"
                with two_other_bytes(path, *span, chance), pytest.raises(OutputError, match=message):
                    COMPARE(written, read)
                self.found.add(name)
        COMPARE(written, read)
        with two_other_bytes(path, *span, chance):
            COMPARE(written, read, advance)


COMPARE = ReadBack.compare


def write_hf(model: Path, tokens: TokenMatrix, out: Path) -> None:
    quantkit.convert(model, out, max_shard_size="60KB")


def write_gptq(model: Path, tokens: TokenMatrix, out: Path) -> None:
    quantkit.gptq(model, out, calibration=tokens, group_size=32, evaluate=False, max_shard_size="60KB", device="cpu")


def write_gguf(model: Path, tokens: TokenMatrix, out: Path) -> None:
    quantkit.ggml(model, out, type="q8_0", pre="smollm", split_max_size="60KB")


def write_ggjt(model: Path, tokens: TokenMatrix, out: Path) -> None:
    write_model(out.parent / "spm.gguf", tiny(), sentencepiece(LLAMA))
    quantkit.ggml(out.parent / "spm.gguf", out, type="q5_1", container="ggjt")


def write_imatrix(model: Path, tokens: TokenMatrix, out: Path) -> None:
    quantkit.imatrix(model, out, calibration=tokens, device="cpu")


@pytest.mark.parametrize(
    ("write", "spans", "name", "tensors"),
    [
        (write_hf, of_safetensors, "out", 21),
        (write_gptq, of_safetensors, "out", 63),
        (write_gguf, of_gguf, "out.gguf", 22),
        (write_ggjt, of_ggjt, "out.bin", 22),
        (write_imatrix, lambda path: {n: s for n, s in of_gguf(path).items() if n != "its head"}, "out.gguf", 28),
    ],
    ids=["hf", "gptq", "gguf", "ggjt", "imatrix"],
)
def test_two_bytes_damaged_after_writing_are_found(
    write: Callable[[Path, TokenMatrix, Path], None],
    spans: Callable[[Path], Spans],
    name: str,
    tensors: int,
    make_model: MakeModel,
    tiny_tokens: TokenMatrix,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / name
    damage = Damage(spans, {"out": "*.safetensors", "out.gguf": "*.gguf", "out.bin": "*.bin"}[name])
    monkeypatch.setattr(ReadBack, "compare", lambda self, *arguments: damage.compare(self, *arguments))
    with pytest.raises(OutputError, match="other data was read back than was written"):
        write(make_model("llama"), tiny_tokens, out)
    assert len(damage.found) == tensors
    assert not out.exists()
    assert not list(tmp_path.glob("*-00001-of-*"))


def test_each_piece_counts(tmp_path: Path) -> None:
    """In pieces of any size, as many as were written, and none once more."""
    written, asked = ReadBack(), []
    path = tmp_path / "a.bin"
    written.wrote(path, "x", b"ab", np.arange(3, dtype=np.float32))
    content = b"ab" + np.arange(3, dtype=np.float32).tobytes()

    def read(*place: Any) -> list[bytes]:
        asked.append(place)
        return [content[:5], b"", content[5:]]

    done: list[int] = []
    written.compare(read, done.append)
    assert asked == [(path, "x")]
    assert done == [1]
    for other in (content[:-1], content + b"\0", b"", content[::-1]):
        with pytest.raises(OutputError, match=r"^a\.bin: x: other data"):
            written.compare(lambda *_, other=other: [other])
