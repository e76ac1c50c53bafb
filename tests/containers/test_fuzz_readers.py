"""Damaged GGUF and ggjt files, thousands of them: each is read or refused with quantkit's own error.

A second process reads them, with little more memory than its imports take and a time limit for every file, so that a
crash, a hang or an allocation that a broken number asks for ends that process and fails the test. The file that it
read last stays in the test's folder.
"""

from __future__ import annotations

import faulthandler
import json
import os
import resource
import signal
import struct
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

import quantkit
from quantkit.containers.ggjt.read import MAGIC as GGJT_MAGIC
from quantkit.containers.ggjt.read import GgjtFile
from quantkit.containers.gguf.file import GgufFile
from quantkit.errors import QuantkitError, SourceError
from quantkit.sources import open_source

SECONDS = float(os.environ.get("QUANTKIT_FUZZ_SECONDS", "0"))
"""How long to look for failures with a new seed each time; 0 is the short run, the same in every place."""
EXAMPLES = 300
MEMORY = 2**30
PATIENCE = 5.0  # seconds that one file may take

# What integers are replaced by: nothing, signs and their neighbours, sizes that no memory has.
EXTREMES = (0, 1, 2, 3, 7, 31, 2**8 - 1, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1)


# -- the process that reads them ----------------------------------------------------------------------------------


def exercise(path: Path) -> None:
    """Everything that a reader offers."""
    source: Any = open_source(path)
    source.config_dict()
    for name, info in source.tensors.items():
        assert tuple(source.read(name).shape) == info.shape, name
        with suppress(SourceError):
            kind, rows = source.blocks(name)
            assert (kind.name, rows.nbytes) == (info.stored_as, info.bytes)
    tokenizer = source.tokenizer()
    tokenizer.decode(tokenizer("the quick fox, 2024").input_ids)


Place = tuple[int, int]
"""Where a number is, and its width in bytes."""


def numbers_of(path: Path) -> tuple[list[Place], list[Place]]:
    """Every number of a file's header, and those that are values of keys."""
    base: Any = GgjtFile if path.read_bytes()[:4] == GGJT_MAGIC else GgufFile

    class Recorder(base):  # type: ignore[misc]
        def _read_header(self) -> None:
            self.places: list[Place] = []
            self.values_of_keys: list[Place] = []
            super()._read_header()

        def _number(self, dtype: str) -> Any:
            self.places.append((self._at, np.dtype(dtype).itemsize))
            return super()._number(dtype)

        def _value(self, kind: int, key: str) -> Any:
            before = len(self.places)
            value = super()._value(kind, key)
            if len(self.places) == before + 1 and not isinstance(value, str):
                self.values_of_keys.append(self.places[-1])
            return value

    file = Recorder(path)
    return file.places, file.values_of_keys or file.places[2:9]  # of ggjt the sizes behind magic and version


class Samples:
    """Whole files, and how one is damaged."""

    def __init__(self, paths: list[Path]) -> None:
        self.names = [path.name for path in paths]
        self.data = [path.read_bytes() for path in paths]
        numbers = [numbers_of(path) for path in paths]
        self.integers = [every for every, _ in numbers]
        self.values = [values for _, values in numbers]

    def swept(self) -> Iterator[tuple[str, bytes]]:
        """Each key's number as nothing, as another and as more than there can be; headers cut every few bytes."""
        for name, data, places in zip(self.names, self.data, self.values, strict=True):
            for at, width in places:
                for value in (0, 6, 2**31 - 1, 2**64 - 1):
                    changed = bytearray(data)
                    changed[at : at + width] = struct.pack("<Q", value)[:width]
                    yield name, bytes(changed)
        for name, data, places in zip(self.names, self.data, self.integers, strict=True):
            for length in range(4, places[-1][0] + 64, 97):
                yield name, data[:length]

    def damaged(self, draw: Any) -> tuple[str, bytes]:
        number = draw(st.integers(0, len(self.data) - 1))
        data = bytearray(self.data[number])
        integers = self.integers[number]
        # Lengths of the vocabulary's strings are most of the numbers; counts, shapes and offsets are around them.
        rare = integers[:60] + integers[-150:]
        header = integers[-1][0]
        for _ in range(draw(st.integers(1, 4))):
            what = draw(st.sampled_from(("integer", "integer", "integer", "bytes", "splice", "remove", "cut")))
            if what == "integer":
                at, width = draw(
                    st.sampled_from(self.values[number]) | st.sampled_from(rare) | st.sampled_from(integers)
                )
                value = draw(st.sampled_from(EXTREMES) | st.integers(0, 300) | st.integers(0, 2**64 - 1))
                data[at : at + width] = struct.pack("<Q", value)[:width]
                continue
            at = draw(st.integers(0, header) | st.integers(0, len(data)))
            length = draw(st.integers(1, 64))
            if what == "bytes":
                data[at : at + length] = draw(st.binary(min_size=1, max_size=length))
            elif what == "splice":
                other = self.data[draw(st.integers(0, len(self.data) - 1))]
                start = draw(st.integers(0, header))
                data[at : at + draw(st.sampled_from((0, length)))] = other[start : start + length]
            elif what == "remove":
                del data[at : at + length]
            else:
                del data[at:]
        return self.names[number], bytes(data)


class TooSlow(BaseException):
    """A file took more than `PATIENCE`."""


def alarm(*_: object) -> None:
    raise TooSlow


def tried(path: Path, content: bytes) -> None:
    """Read a file within the limits; code that no signal reaches is ended with the process."""
    path.write_bytes(content)
    faulthandler.dump_traceback_later(4 * PATIENCE, exit=True)
    signal.setitimer(signal.ITIMER_REAL, PATIENCE)
    try:
        with suppress(QuantkitError):
            exercise(path)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()


def search(samples: Samples, folder: Path, examples: int, start: int) -> None:
    """Try so many damaged files. The one that fails is in `folder`, and hypothesis says how it was made."""

    @seed(start)
    @settings(
        max_examples=examples, database=None, deadline=None, print_blob=True, suppress_health_check=list(HealthCheck)
    )
    @given(st.data())
    def try_one(data: Any) -> None:
        name, content = samples.damaged(data.draw)
        tried(folder / name, content)

    try_one()


def main() -> None:
    folder = Path(sys.argv[1])
    warnings.simplefilter("ignore")
    paths = sorted((folder / "whole").iterdir())
    for path in paths:  # which loads what is loaded late
        exercise(path)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, hard))
    signal.signal(signal.SIGALRM, alarm)
    samples = Samples(paths)
    for name, content in samples.swept():
        tried(folder / name, content)
    begun, runs = time.monotonic(), 0
    while runs == 0 or time.monotonic() - begun < SECONDS:
        start = 0 if not SECONDS else time.time_ns() % 2**32
        search(samples, folder, EXAMPLES, start)
        runs += 1
    print(json.dumps({"files": runs * EXAMPLES}))


# -- the tests ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(make_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a folder ``whole`` of files: both versions of GGUF, both vocabularies, blocks, experts, ggjt."""
    import torch
    from conftest import random_model, train_tokenizer
    from support import gguf_models
    from support.ggjt_models import LLAMA, Parts, parts_tensors
    from support.gguf_models import Quantization, byte_level, sentencepiece

    def write(name: str, family: str, vocabulary: Any, kind: Any, **config: Any) -> None:
        config = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 64, "head_dim": 8, **config}
        model = random_model(family, tied=family.startswith("gemma"), dtype=torch.float32, seed=0, **config)
        if vocabulary is sentence:
            model.resize_token_embeddings(len(LLAMA["tokens"]), mean_resizing=False)
        gguf_models.write_model(folder / name, model, vocabulary, kind=kind)

    root = tmp_path_factory.mktemp("fuzz")
    folder = root / "whole"
    folder.mkdir()
    sentence, tokenizer = sentencepiece(LLAMA), train_tokenizer()
    write("llama.gguf", "llama", byte_level(tokenizer, "llama-bpe"), Quantization.Q8_0)
    write("pieces.gguf", "llama", sentence, Quantization.Q4_0)
    yarn = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 64}
    write("qwen2.gguf", "qwen2", byte_level(tokenizer, "qwen2"), Quantization.F16, rope_parameters=yarn)
    write("gemma3.gguf", "gemma3_text", sentence, Quantization.BF16, layer_types=None)
    experts = {"mlp_only_layers": [], "norm_topk_prob": True, "num_hidden_layers": 1, "moe_intermediate_size": 32}
    quantkit.ggml(make_model("qwen3_moe", **experts), folder / "moe.gguf", type="q8_0", pre="gpt-2")
    older = (folder / "llama.gguf").read_bytes()
    (folder / "older.gguf").write_bytes(older[:4] + struct.pack("<I", 2) + older[8:])
    (folder / "parts.bin").write_bytes(Parts(tensors=parts_tensors(32, 96, kind=Quantization.F16)).bytes())
    return root


def test_a_damaged_file_is_read_or_refused_and_nothing_else(whole: Path) -> None:
    command = [sys.executable, __file__, str(whole)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    limit = 180 + 2 * SECONDS
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=limit, check=False)
    kept = sorted(path.name for path in whole.iterdir() if path.is_file())
    assert done.returncode == 0, f"{done.stdout}{done.stderr}\nthe file is among {kept} of {whole}"
    assert json.loads(done.stdout.splitlines()[-1])["files"] >= EXAMPLES


if __name__ == "__main__":
    main()
