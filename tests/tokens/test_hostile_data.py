"""Data and tokenizers that make libraries raise what nobody foresees: an error of ours that names the file."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import MakeModel

import quantkit
from quantkit.errors import CalibrationError, QuantkitError, SourceError
from quantkit.runs.panics import panics_as
from quantkit.tokens import load_dataset

NESTED = b"[" * 100_000 + b"]" * 100_000
DIGITS = b"9" * 5000


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        (
            "a.jsonl",
            b'{"text":"x"}\n{"text":' + NESTED + b"}\n",
            "a.jsonl: line 2 is not JSON: maximum recurs",
        ),
        (
            "b.json",
            b'{"text":' + NESTED + b'}\n{"text":"x"}',
            "b.json: is not JSON that can be read: maxi",
        ),
        ("c.jsonl", b'{"id":' + DIGITS + b',"text":"x"}\n', "c.jsonl: line 1 is not JSON: Exceeds the limit"),
        ("d.json", b'[{"id":' + DIGITS + b"}]", "d.json: is not JSON that can be read: Exceeds the limit"),
        ("e.jsonl", b'{"text":"x","deep":' + b"[" * 700 + b"]" * 700 + b"}\n", ""),
    ],
)
def test_json_that_no_value_can_be(name: str, content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    try:
        load_dataset(str(tmp_path / name))
    except CalibrationError as error:
        assert str(error).startswith(said or name)  # noqa: PT017
    else:
        assert not said


def test_parquet_columns_that_nobody_reads_may_hold_anything(tmp_path: Path) -> None:
    text = [f"words {number}" for number in range(5)]
    late = pa.array([2**62] * 5, pa.int64()).cast(pa.timestamp("us"))
    on_mars = pa.array([1] * 5, pa.timestamp("us", tz="Mars/Phobos"))
    pq.write_table(pa.table({"text": text, "late": late, "mars": on_mars}), tmp_path / "a.parquet")
    assert [record.text for record in load_dataset(str(tmp_path / "a.parquet")).records] == text
    pq.write_table(pa.table({"late": late, "mars": on_mars}), tmp_path / "b.parquet")
    with pytest.raises(
        CalibrationError, match=r"b\.parquet: record #0 has an unknown layout. Keys found: late, mars\."
    ):
        load_dataset(str(tmp_path / "b.parquet"))


def test_parquet_columns_that_are_read_say_what_is_wrong(tmp_path: Path) -> None:
    offsets = pa.array([0, 3, 6, 9, 12, 15], pa.int32()).buffers()[1]
    no_text = pa.Array.from_buffers(pa.string(), 5, [None, offsets, pa.py_buffer(b"\xff\xfea" * 5)])
    pq.write_table(pa.table({"text": no_text}), tmp_path / "a.parquet")
    with pytest.raises(CalibrationError, match=r"a\.parquet: not a readable parquet file: .*utf-8"):
        load_dataset(str(tmp_path / "a.parquet"))


# -- panics ----------------------------------------------------------------------------------------------------------


def changed(model: Path, copy: Path, **parts: Any) -> Path:
    """A copy with parts of its tokenizer changed."""
    shutil.copytree(model, copy)
    content = json.loads((copy / "tokenizer.json").read_text(encoding="utf-8"))
    (copy / "tokenizer.json").write_text(json.dumps({**content, **parts}), encoding="utf-8")
    return copy


def test_a_tokenizer_that_panics_is_one_error(
    make_model: MakeModel, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A pattern that looks back without end, and a template of a token that there is not."""
    split = {"type": "Split", "pattern": {"Regex": r"(([a-z ])+)+#"}, "behavior": "Isolated", "invert": False}
    bytes_ = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    endless = changed(
        make_model("llama"),
        tmp_path / "endless",
        pre_tokenizer={"type": "Sequence", "pretokenizers": [split, bytes_]},
    )
    one, other = ({"Sequence": {"id": letter, "type_id": 0}} for letter in "AB")
    template = {"single": [{"SpecialToken": {"id": "<nope>", "type_id": 0}}, one], "pair": [one, other]}
    missing = changed(
        make_model("llama"),
        tmp_path / "missing",
        post_processor={"type": "TemplateProcessing", **template, "special_tokens": {}},
    )
    (tmp_path / "data.jsonl").write_text(json.dumps({"text": "the quick brown fox " * 20}) + "\n")
    said: list[str] = []
    for model in (endless, missing):
        with pytest.raises(QuantkitError, match="its tokenizer gives up") as refused:
            quantkit.samples(model, calibration=str(tmp_path / "data.jsonl"), samples=1, seq_len=16)
        said.append(str(refused.value))
        assert "\n" not in said[-1]
    assert said[1].startswith(str(missing))
    assert any("its tokenizer gives up" in text for text in quantkit.verify(missing, generate=False).problems)
    assert "panicked" not in capfd.readouterr().err


def test_what_others_write_to_stderr_meanwhile_is_kept(capfd: pytest.CaptureFixture[str]) -> None:
    with panics_as(SourceError, "it"):
        os.write(2, b"a warning of a library\n")
    assert capfd.readouterr().err == "a warning of a library\n"
    with pytest.raises(KeyError), panics_as(SourceError, "it"):
        raise KeyError("theirs")
