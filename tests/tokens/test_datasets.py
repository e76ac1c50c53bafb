"""Data sets by name and from the Hub, compressed files, mixtures, and records that the evaluation text holds too."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import json
import lzma
import re
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from conftest import MakeModel, Recorder
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

import quantkit
from quantkit.errors import CalibrationError, UsageError
from quantkit.options import CalibrationSpec
from quantkit.options.values import check_data
from quantkit.progress import SILENT
from quantkit.tokens import (
    KNOWN_NAMES,
    Dataset,
    Mixture,
    Record,
    TextIndex,
    Turn,
    datasets,
    draw,
    load_calibration,
    load_dataset,
    parse_mixture,
    readers,
)
from quantkit.tokens.text import _read as read_text
from quantkit.tokens.text import text_index
from quantkit.tokens.windows import interleaved, shares

PAIRS = [{"instruction": "Q1", "output": "A1"}, {"instruction": "Q2", "output": "A2"}]
LINES = "".join(json.dumps(pair) + "\n" for pair in PAIRS).encode()


def packed(content: bytes) -> bytes:
    """gzip without the time: names of tests that hold it are to be the same in every process."""
    return gzip.compress(content, mtime=0)


def exchange(record_id: str, question: str, answer: str) -> Record:
    return Record(record_id, turns=(Turn("user", question), Turn("assistant", answer)))


READ = (exchange("#0", "Q1", "A1"), exchange("#1", "Q2", "A2"))


def write(folder: Path, name: str, content: bytes) -> str:
    path = folder / name
    path.write_bytes(content)
    return str(path)


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> bytes:
    pa = pytest.importorskip("pyarrow", reason="reading Parquet needs pyarrow")
    from pyarrow import parquet

    parquet.write_table(pa.Table.from_pylist(rows), path)
    return path.read_bytes()


# The Hub


def fake_hub(
    monkeypatch: pytest.MonkeyPatch, folder: Path, files: dict[str, bytes], revision: str | None = None
) -> list[str]:
    """One repository, owner/name, at one revision; returns the list of what will have been downloaded."""
    asked: list[str] = []

    def download(repo_id: str, filename: str, *, repo_type: str, revision: str | None) -> str:
        assert (repo_id, repo_type, revision) == ("owner/name", "dataset", expected)
        asked.append(filename)
        if filename not in files:
            raise LocalEntryNotFoundError(filename)
        path = folder / filename.replace("/", "-")
        path.write_bytes(files[filename])
        return str(path)

    def info(self: object, repo_id: str, *, revision: str | None) -> SimpleNamespace:
        assert revision == expected
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in files])

    expected = revision
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", info)
    return asked


def card(license: str) -> bytes:
    return f"---\nlanguage: en\nlicense: {license}\n---\n# A card\n".encode()


def test_hub_single_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_hub(monkeypatch, tmp_path, {"README.md": card("mit"), "d/a.jsonl": LINES})
    dataset = load_dataset("owner/name")
    assert (dataset.name, dataset.license, len(dataset.records)) == ("owner/name", "mit", 2)
    assert dataset.sha256 == hashlib.sha256(LINES).hexdigest()


@pytest.mark.parametrize(
    ("readme", "license"),
    [
        (card("[cc-by-sa-3.0, gfdl]"), "cc-by-sa-3.0, gfdl"),
        (b"# No metadata\n", None),
        (b"---\nlanguage: en\n---\n", None),
        (b"---\nlicense: [\n---\n", None),
        (None, None),
    ],
)
def test_licence_of_a_named_file_is_that_of_the_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, readme: bytes | None, license: str | None
) -> None:
    fake_hub(monkeypatch, tmp_path, {"a.jsonl": LINES, **({} if readme is None else {"README.md": readme})})
    assert load_dataset("owner/name:a.jsonl").license == license


@pytest.mark.parametrize("revision", ["main", "v1.0", "refs/pr/3", "0" * 40])
def test_hub_data_set_of_a_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, revision: str) -> None:
    fake_hub(monkeypatch, tmp_path, {"README.md": card("mit"), "d/a.jsonl": LINES}, revision)
    for spec in (f"owner/name@{revision}", f"owner/name@{revision}:d/a.jsonl"):
        dataset = load_dataset(spec)
        assert dataset.name == f"owner/name@{revision}"
        assert (dataset.license, dataset.records) == ("mit", READ)


def test_hub_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = fake_hub(monkeypatch, tmp_path, {"a.json": LINES, "b.json": LINES[: LINES.index(b"\n")]})
    with pytest.raises(CalibrationError, match=re.escape("name one as owner/name:FILE. Files: a.json, b.json")):
        load_dataset("owner/name")
    assert asked == []
    assert len(load_dataset("owner/name:b.json").records) == 1


def test_hub_without_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_hub(monkeypatch, tmp_path, {"README.md": b"#"})
    with pytest.raises(CalibrationError, match=re.escape("owner/name holds no .json, .jsonl or .parquet file")):
        load_dataset("owner/name")


def test_hub_train_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        f"data/train-0000{number}-of-00002.parquet": write_parquet(tmp_path / "shard", [pair])
        for number, pair in enumerate(PAIRS)
    }
    fake_hub(monkeypatch, tmp_path, {**dict(reversed(files.items())), "data/test-00000-of-00001.parquet": b""})
    dataset = load_dataset("owner/name")
    assert dataset.records == READ
    assert dataset.sha256 == hashlib.sha256(b"".join(files.values())).hexdigest()


def test_train_shards_of_two_configurations_are_not_mixed() -> None:
    with pytest.raises(CalibrationError, match="several data files"):
        datasets.choose_files("owner/name", ["en/train-00000-of-00001.parquet", "de/train-00000-of-00001.parquet"])


def test_some_of_the_train_shards_are_not_taken_for_all() -> None:
    with pytest.raises(CalibrationError, match="owner/name: only 1 of 3 train shards are there"):
        datasets.choose_files("owner/name", ["data/train-00001-of-00003.parquet"])


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OfflineModeIsEnabled("offline"), "HF_HUB_OFFLINE is set"),
        (LocalEntryNotFoundError("no"), "the Hub cannot be reached and the file is not cached"),
        (OSError("Connection refused\nmore"), "the Hub did not give it (Connection refused)"),
    ],
)
def test_hub_failure_is_one_line(error: Exception, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", fail)
    for spec in ("owner/name", "owner/name@v1:a.json", *datasets.KNOWN_HUB):
        with pytest.raises(CalibrationError, match=re.escape(message)) as caught:
            load_dataset(spec)
        assert "\n" not in str(caught.value)
    with pytest.raises(CalibrationError, match=re.escape("give a local file, as --text wikitext2:FILE")):
        text_index("wikitext2")


COMMIT = "0123456789abcdef" * 2 + "01234567"


@pytest.fixture
def offline_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The Hub client's cache, offline, with one file of owner/name at `COMMIT`, which is main and the tag v1."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "datasets--owner--name"
    for name, content in (("d/a.jsonl", LINES), ("README.md", card("mit"))):
        path = repository / "snapshots" / COMMIT / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    (repository / "refs").mkdir()
    for name in ("main", "v1"):
        (repository / "refs" / name).write_text(COMMIT)
    return repository


@pytest.mark.parametrize("revision", ["", "@main", "@v1", f"@{COMMIT}"])
@pytest.mark.parametrize("file", ["", ":d/a.jsonl"])
def test_offline_a_cached_data_set_is_read(offline_cache: Path, revision: str, file: str) -> None:
    dataset = load_dataset(f"owner/name{revision}{file}")
    assert (dataset.name, dataset.license, dataset.records) == (f"owner/name{revision}", "mit", READ)


@pytest.mark.parametrize("spec", ["owner/name@v2", "owner/name:b.jsonl", "owner/other", "owner/other:a.json", "c4"])
def test_offline_what_is_not_cached_is_one_clear_line(offline_cache: Path, spec: str) -> None:
    with pytest.raises(CalibrationError, match="HF_HUB_OFFLINE is set and the data is not cached: unset it") as caught:
        load_dataset(spec)
    assert "\n" not in str(caught.value)


# Known names


def test_known_names_ask_for_their_file_and_show_their_licence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []

    def download(repo_id: str, filename: str, *, repo_type: str, revision: str | None) -> str:
        assert (repo_type, revision) == ("dataset", None)
        asked.append((repo_id, filename))
        content = json.dumps(PAIRS).encode() if filename.endswith(".json") else packed(b'{"text": "T"}')
        if filename.endswith(".parquet"):
            row = {"instruction": "Q", "input": "", "output": "A"} if "alpaca" in repo_id else {}
            content = write_parquet(tmp_path / "p", [{**row, "text": "T"}])
        return write(tmp_path, "a", content)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    progress = Recorder()
    for name in datasets.KNOWN_HUB:
        load_calibration(name, progress)
    assert asked == [
        ("WizardLMTeam/WizardLM_evol_instruct_70k", "alpaca_evol_instruct_70k.json"),
        ("WizardLMTeam/WizardLM_evol_instruct_V2_196k", "WizardLM_evol_instruct_V2_143k.json"),
        ("tatsu-lab/alpaca", "data/train-00000-of-00001-a09b74b3ef9c3b56.parquet"),
        ("allenai/c4", "en/c4-train.00000-of-01024.json.gz"),
        ("Salesforce/wikitext", "wikitext-2-raw-v1/train-00000-of-00001.parquet"),
    ]
    assert progress.notes == [
        "calibration: WizardLMTeam/WizardLM_evol_instruct_70k (licence mit)",
        "calibration: WizardLMTeam/WizardLM_evol_instruct_V2_196k (licence mit)",
        "calibration: tatsu-lab/alpaca (licence cc-by-nc-4.0)",
        "calibration: allenai/c4 (licence odc-by)",
        "calibration: Salesforce/wikitext (licence cc-by-sa-3.0, gfdl)",
    ]


def test_a_local_copy_of_a_known_set_has_its_licence(tmp_path: Path) -> None:
    dataset = load_dataset(f"evol-instruct-70k:{write(tmp_path, 'mine.json', LINES)}")
    assert (dataset.name, dataset.license, dataset.records) == ("evol-instruct-70k:mine.json", "mit", READ)
    assert dataset.sha256 == hashlib.sha256(LINES).hexdigest()


@pytest.mark.parametrize("file", ["nowhere.json", "0.7", ""])
def test_a_local_copy_that_is_not_there_is_named(file: str) -> None:
    with pytest.raises(UsageError, match=re.escape(f"there is no file {Path(file)}; c4 alone is taken from the Hub")):
        load_dataset(f"c4:{file}")


def test_of_c4_only_the_first_records_are_read(tmp_path: Path) -> None:
    first = datasets.KNOWN_HUB["c4"].first
    assert first is not None
    lines = b"".join(b'{"text": "T%d", "url": "u", "timestamp": "t"}\n' % number for number in range(first + 5))
    # The end of the file is damaged: it is never reached.
    path = write(tmp_path, "c4.json.gz", packed(lines + b"not JSON\n" + b"x" * 200_000)[:-100])
    dataset = load_dataset(f"c4:{path}")
    assert (len(dataset.records), dataset.first, dataset.license) == (first, first, "odc-by")
    assert dataset.records[-1] == Record(f"#{first - 1}", text=f"T{first - 1}")
    assert dataset.sha256 == hashlib.sha256(Path(path).read_bytes()).hexdigest()


def test_the_rows_of_wikitext2_are_the_lines_of_one_text(tmp_path: Path) -> None:
    rows = ["", " = A heading = \n", "", *(f" {letter} {'word ' * 500}\n" for letter in "abc")]
    write_parquet(tmp_path / "train.parquet", [{"text": row} for row in rows])
    dataset = load_dataset(f"wikitext2:{tmp_path / 'train.parquet'}")
    assert dataset.text == "\n\n".join(rows)
    assert dataset.license == "cc-by-sa-3.0, gfdl"
    assert [(record.text or "")[:14] for record in dataset.records] == ["= A heading = ", " c word word w"]


def test_a_local_copy_of_wikitext2_without_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"wiki\.json: .* is lines under the key 'text'"):
        load_dataset(f"wikitext2:{write(tmp_path, 'wiki.json', LINES)}")


# Compressed files


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json.gz", LINES),
        ("a.json.gz", json.dumps(PAIRS, indent=1).encode()),
        ("a.JSONL.GZ", b"\xef\xbb\xbf" + LINES),
    ],
)
def test_compressed_files(tmp_path: Path, name: str, content: bytes) -> None:
    data = packed(content)
    dataset = load_dataset(write(tmp_path, name, data))
    assert (dataset.name, dataset.records, dataset.sha256) == (name, READ, hashlib.sha256(data).hexdigest())


@pytest.mark.parametrize(("suffix", "compress"), [("xz", lzma.compress), ("bz2", bz2.compress)])
def test_an_evaluation_text_of_packed_records(suffix: str, compress: Callable[[bytes], bytes], tmp_path: Path) -> None:
    content = read_text(write(tmp_path, f"a.jsonl.{suffix}", compress(LINES)), SILENT)
    assert isinstance(content, Dataset)
    assert content.records == READ


@pytest.mark.parametrize("suffix", sorted(suffix for _, suffix, _ in readers._PACKED.values()))
def test_a_mistyped_packed_file_is_no_name_on_the_hub(suffix: str) -> None:
    for name in (f"owner/data.jsonl{suffix}", f"data.txt{suffix}"):
        with pytest.raises(UsageError, match="no such data"):
            check_data(name)
        with pytest.raises(UsageError, match="no such data"):
            datasets.find_source(name)
    assert datasets.choose_files("a/b", ["README.md", f"train.jsonl{suffix}"]) == [f"train.jsonl{suffix}"]


def test_compressed_plain_text(tmp_path: Path) -> None:
    assert load_dataset(write(tmp_path, "a.txt.gz", packed(b"one\n\ntwo"))).text == "one\n\ntwo"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (LINES, "a.jsonl.gz: not a readable gz file: "),
        (packed(LINES * 9999)[:-20], "a.jsonl.gz: not a readable gz file: "),
        (packed(LINES)[:12] + b"\xff" * 30, "a.jsonl.gz: not a readable gz file: "),
        (b"", "a.jsonl.gz: the file is empty"),
        (packed(b" \n"), "a.jsonl.gz: the file is empty"),
        (packed(LINES + b"oops\n"), "a.jsonl.gz: line 3 is not JSON"),
    ],
)
def test_bad_compressed_files(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(CalibrationError, match=re.escape(message)) as caught:
        load_dataset(write(tmp_path, "a.jsonl.gz", content))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("suffix", "pack"), [(".xz", lzma.compress), (".bz2", bz2.compress), ("", packed)])
def test_other_compressed_files(suffix: str, pack: Callable[[bytes], bytes], tmp_path: Path) -> None:
    assert load_dataset(write(tmp_path, f"a.jsonl{suffix}", pack(LINES))).records == READ


@pytest.mark.parametrize(
    ("name", "content", "kind"),
    [
        ("val.jsonl.zst", bytes.fromhex("28b52ffd2000010000"), "zstd"),
        ("val.jsonl", bytes.fromhex("28b52ffd2000010000"), "zstd"),
        ("val.zip", b"PK\x03\x04rest", "zip"),
    ],
)
def test_a_file_to_be_unpacked_first(name: str, content: bytes, kind: str, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=rf"{name}: the file is compressed \({kind}\): unpack it"):
        load_dataset(write(tmp_path, name, content))


def test_half_a_surrogate_pair_is_a_replacement_character(tmp_path: Path) -> None:
    line = r'{"instruction": "a \ud83d b", "output": "whole \ud83d\ude80"}'
    (record,) = load_dataset(write(tmp_path, "a.jsonl", line.encode())).records
    assert record.turns is not None
    assert [turn.text for turn in record.turns] == ["a \ufffd b", "whole \U0001f680"]


# Mixtures


PLAIN_NAMES = st.sampled_from(
    [
        *KNOWN_NAMES,
        "c4:dir/file.json.gz",
        "owner/name",
        "owner/name:a/b.json",
        "owner/name@v1:c.parquet",
        "x.txt",
        "a:1",
    ]
)
WEIGHTS = st.floats(1e-6, 1e6).map(lambda value: round(value, 6)).filter(bool)


@given(st.dictionaries(PLAIN_NAMES, WEIGHTS, min_size=2, max_size=5))
def test_a_mixture_is_what_was_written(parts: dict[str, float]) -> None:
    spec = ",".join(f"{data}:{weight:.6f}" for data, weight in parts.items())
    assert dict(parse_mixture(spec)) == parts
    assert parse_mixture(spec.replace(",", " , ")) == parse_mixture(spec)


@given(st.text().filter(lambda text: "," not in text))
def test_without_a_comma_nothing_is_a_mixture(text: str) -> None:
    assert parse_mixture(text) == ((text, 1.0),)


@given(st.text(alphabet="ab:,.01 -e\n", max_size=20))
def test_any_text_is_a_mixture_or_a_usage_error(text: str) -> None:
    try:
        parts = parse_mixture(text)
    except UsageError:
        assert "," in text
        return
    assert len(parts) == 1 + text.count(",")
    assert all(weight > 0 for _, weight in parts)
    assert len({data for data, _ in parts}) == len(parts)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("alpaca:0.7,c4", "calibration: 'c4' has no weight; write a mixture as A:0.7,B:0.3"),
        ("alpaca,c4", "'alpaca' has no weight"),
        ("alpaca:0.7,", "'' has no weight"),
        ("alpaca:0.7,c4:x.json", "'c4:x.json' has no weight"),
        ("alpaca:1,c4:-1", "'c4:-1' has no weight"),
        ("alpaca:1,c4:nan", "'c4:nan' has no weight"),
        ("alpaca:1,c4:0", "the weight of c4 must be a number above 0, not 0"),
        ("alpaca:1,c4:" + "9" * 400, "the weight of c4 must be a number above 0, not inf"),
        ("c4:1,alpaca:1,c4:2", "c4 is in the mixture twice"),
    ],
)
def test_a_mixture_wrongly_written(spec: str, message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        parse_mixture(spec)


def test_a_file_with_a_comma_in_its_name_is_one_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "a:1,b:2", LINES)
    for spec in ("a:1,b:2", "alpaca:a:1,b:2"):
        assert parse_mixture(spec) == ((spec, 1.0),)
    assert isinstance(load_calibration("a:1,b:2"), Dataset)


@given(st.lists(WEIGHTS, min_size=1, max_size=6), st.integers(1, 500))
def test_shares_add_up_and_are_within_one_of_the_weights(weights: list[float], samples: int) -> None:
    counts = shares(weights, samples)
    assert sum(counts) == samples
    total = sum(map(Fraction, weights))
    assert all(abs(count - samples * Fraction(w) / total) < 1 for count, w in zip(counts, weights, strict=True))


@given(st.lists(st.integers(1, 40), min_size=1, max_size=4))
def test_interleaving_keeps_each_parts_order_and_spreads_it(counts: list[int]) -> None:
    order = interleaved(counts)
    for part, count in enumerate(counts):
        places = [place for place, (of, _) in enumerate(order) if of == part]
        assert [number for of, number in order if of == part] == list(range(count))
        assert all(
            abs((place + 0.5) / len(order) - (number + 0.5) / count) < len(counts) / len(order)
            for number, place in enumerate(places)
        )
    assert len(order) == sum(counts)


def numbered(name: str, count: int, license: str | None = "mit") -> Dataset:
    records = tuple(exchange(f"{name}{n}", f"question {n} of {name}", f"answer {n} " * 5) for n in range(count))
    return Dataset(name, hashlib.sha256(name.encode()).hexdigest(), records, license)


def spec(**fields: Any) -> CalibrationSpec:
    return CalibrationSpec(**{"samples": 10, "seq_len": 16, "seed": 3, **fields})


def test_a_part_of_a_mixture_is_what_it_gives_alone(tokenizer: PreTrainedTokenizerFast) -> None:
    first, second = numbered("fox", 40), numbered("dog", 30, "odc-by")
    matrix = draw(Mixture(((first, 0.7), (second, 0.3))), spec(), tokenizer)
    assert tuple(matrix.tokens.shape) == (10, 16)
    alone = [draw(first, spec(samples=7), tokenizer), draw(second, spec(samples=3), tokenizer)]
    order = interleaved([7, 3])
    expected = torch.stack([alone[part].tokens[number] for part, number in order])
    assert torch.equal(matrix.tokens, expected)
    facts = matrix.provenance
    assert (facts.dataset, facts.license, facts.samples, facts.records) == ("fox:0.7,dog:0.3", "mit, odc-by", 10, ())
    assert [(part.dataset, part.weight, part.samples, part.license) for part in facts.parts] == [
        ("fox", 0.7, 7, "mit"),
        ("dog", 0.3, 3, "odc-by"),
    ]
    for part, single in zip(facts.parts, alone, strict=True):
        assert part.records == single.provenance.records
        assert part.dataset_sha256 == single.provenance.dataset_sha256
    assert facts.dataset_sha256 not in {part.dataset_sha256 for part in facts.parts}
    again = draw(Mixture(((first, 7.0), (second, 3.0))), spec(), tokenizer)
    assert torch.equal(again.tokens, matrix.tokens)


def test_a_mixture_with_an_unknown_licence_has_none(tokenizer: PreTrainedTokenizerFast) -> None:
    parts = ((numbered("fox", 40), 1.0), (numbered("dog", 40, None), 1.0))
    assert draw(Mixture(parts), spec(), tokenizer).provenance.license is None


def test_a_weight_too_small_for_a_window_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    mixture = Mixture(((numbered("fox", 40), 0.99), (numbered("dog", 40), 0.01)))
    with pytest.raises(UsageError, match=re.escape("by its weight 0.01, dog has none of 10 windows")):
        draw(mixture, spec(), tokenizer)


def test_a_part_that_is_too_short_is_said(tokenizer: PreTrainedTokenizerFast) -> None:
    progress = Recorder()
    mixture = Mixture(((numbered("fox", 60), 1.0), (numbered("dog", 1), 1.0)))
    facts = draw(mixture, spec(samples=20), tokenizer, progress).provenance
    assert [part.samples for part in facts.parts] == [10, facts.samples - 10]
    assert facts.samples_asked == 20
    assert [warning.partition(" gives ")[0] for warning in progress.warnings] == ["dog"]


# Records that the evaluation text holds too

POEM = " ".join(f"word{n}" for n in range(200))


def words(start: int, stop: int) -> str:
    return " ".join(POEM.split()[start:stop])


def fresh(count: int) -> str:
    return " ".join(f"other{n}" for n in range(count))


@pytest.mark.parametrize(
    ("record", "held"),
    [
        (Record("all of it", text=POEM), True),
        (Record("a stretch", text=f"{fresh(900)} {words(20, 70)} {fresh(900)}"), True),
        (Record("a shorter stretch", text=f"{fresh(900)} {words(20, 69)} {fresh(900)}"), False),
        (Record("case and marks", text=", ".join(words(0, 30).upper().split())), True),
        (Record("one word changed", text=f"{words(0, 14)} changed {words(15, 45)}"), True),
        (Record("half", text=f"{words(0, 24)} {fresh(12)}"), True),
        (Record("less than half", text=f"{words(0, 23)} {fresh(13)}"), False),
        (exchange("the same question", words(5, 19), fresh(300)), True),
        (exchange("the same answer", fresh(300), words(5, 19)), True),
        (exchange("a short question", words(5, 16), fresh(300)), False),
        (exchange("together", words(5, 12), words(12, 19)), True),
        (Record("a short text", text=words(0, 12)), False),
        (Record("repeated", text=f"{words(0, 13)} " * 9 + fresh(40)), False),
        (Record("nothing", text=fresh(60)), False),
        (Record("marks only", text="... !!!"), False),
    ],
    ids=lambda value: value.id if isinstance(value, Record) else "",
)
def test_what_counts_as_occurring(record: Record, held: bool) -> None:
    assert TextIndex("poem", [POEM]).holds(record) is held


def test_a_short_record_must_equal_a_whole_one() -> None:
    index = TextIndex.of(Dataset("d", "", (exchange("e", "What is the capital?", "Paris."),)))
    assert index.holds(exchange("a", "what is THE capital", "Paris"))
    assert not index.holds(exchange("a", "What is the capital?", "Rome."))
    assert not index.holds(exchange("a", "", ""))


def test_text_without_spaces_is_compared_by_character() -> None:
    text = "量化校准数据应当与评测文本分开否则结果不可信"
    assert TextIndex("t", [f"前言{text}"]).holds(Record("r", text=f"{text}。"))
    assert not TextIndex("t", [text[::-1]]).holds(Record("r", text=text))


@given(st.lists(st.text(alphabet="ab ,.\ud800\u4e00", max_size=80), max_size=4), st.integers(0, 3))
def test_a_record_of_the_evaluation_text_occurs_in_it(texts: list[str], number: int) -> None:
    index = TextIndex("t", texts)
    for text in texts:
        assert index.holds(Record("r", text=text)) is bool(re.search(r"\w|\u4e00", text.replace("\ud800", "")))


def test_records_of_the_evaluation_text_are_left_out_and_counted(tokenizer: PreTrainedTokenizerFast) -> None:
    dataset = numbered("fox", 40)
    order = np.random.Generator(np.random.PCG64(3)).permutation(40)
    out = [dataset.records[order[place]] for place in (0, 2, 30)]
    progress = Recorder()
    matrix = draw(dataset, spec(), tokenizer, progress, TextIndex.of(Dataset("judge", "", tuple(out))))
    # The third stands too late in the order to be drawn, so it is not counted.
    assert matrix.provenance.dropped == 2
    assert progress.notes == ["fox: left out 2 records that also occur in judge"]
    expected = [dataset.records[index].id for place, index in enumerate(order) if place not in (0, 2)]
    used = matrix.provenance.records
    assert used == tuple(expected[: len(used)])
    rest = Dataset("fox", dataset.sha256, tuple(r for r in dataset.records if r not in out), "mit")
    assert draw(rest, spec(), tokenizer, exclude=TextIndex("none", [])).provenance.dropped == 0


def test_each_part_of_a_mixture_counts_its_own(tokenizer: PreTrainedTokenizerFast) -> None:
    fox, dog = numbered("fox", 60), numbered("dog", 60)
    index = TextIndex.of(Dataset("judge", "", dog.records[:50]))
    facts = draw(Mixture(((fox, 1.0), (dog, 1.0))), spec(), tokenizer, exclude=index).provenance
    assert facts.parts[0].dropped == 0
    assert facts.parts[1].dropped == facts.dropped > 0
    assert not {record.id for record in dog.records[:50]} & set(facts.parts[1].records)


def test_nothing_but_the_evaluation_text_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    dataset = numbered("fox", 5)
    message = "fox is too short without 5 records that are also in the evaluation text: 0 tokens found"
    with pytest.raises(CalibrationError, match=message):
        draw(dataset, spec(), tokenizer, exclude=TextIndex.of(dataset))


@pytest.mark.parametrize("name", ["judge.txt", "judge.jsonl", "wikitext2:judge.txt", "judge.txt.gz"])
def test_every_kind_of_evaluation_text_is_indexed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "judge.txt", POEM.encode())
    write(tmp_path, "judge.txt.gz", packed(POEM.encode()))
    write(tmp_path, "judge.jsonl", json.dumps({"instruction": POEM, "output": "A"}).encode())
    index = text_index(name)
    assert index.name == name.split(":")[0]
    assert index.holds(Record("r", text=words(50, 120)))
    assert not index.holds(Record("r", text=fresh(100)))


def test_the_held_out_fifth_shares_nothing_with_the_bundled_sample() -> None:
    index = text_index("evol-instruct-sample:heldout")
    assert [r.id for r in load_dataset("evol-instruct-sample").records if index.holds(r)] == []
    held_out = load_dataset("evol-instruct-sample:heldout").records
    assert all(index.holds(record) for record in held_out)


# In a run


@pytest.fixture
def two_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[str]]:
    """fox.jsonl and dog.jsonl in the current folder; the function gives the ids that a set's records will have."""
    monkeypatch.chdir(tmp_path)
    for name in ("fox", "dog"):
        rows = [
            {"id": f"{name}{n}", "instruction": f"what does the {name} do {n}", "output": f"the {name} runs {n} " * 6}
            for n in range(30)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    judged = (tmp_path / "fox.jsonl").read_text().splitlines()[:10]
    (tmp_path / "judge.jsonl").write_text("\n".join(judged))
    return lambda name: [f"{name}{n}" for n in range(30)]


def test_a_run_on_a_mixture_leaves_the_evaluation_text_out(
    two_sets: Callable[[str], list[str]], make_model: MakeModel, tmp_path: Path, recorder: Recorder
) -> None:
    options: dict[str, Any] = {"calibration": "fox.jsonl:2,dog.jsonl:1", "samples": 9, "seq_len": 64, "group_size": 32}
    quantkit.gptq(make_model("llama"), tmp_path / "a", text="judge.jsonl", device="cpu", **options, progress=recorder)
    fox, dog = json.loads((tmp_path / "a" / "quantkit.json").read_text())["calibration"]["parts"]
    assert (fox["samples"], dog["samples"]) == (6, 3)
    assert fox["dropped"] > 0
    assert dog["dropped"] == 0
    assert not set(fox["records"]) & set(two_sets("fox")[:10])
    assert "calibration: fox.jsonl (no licence stated)" in recorder.notes
    assert f"fox.jsonl: left out {fox['dropped']} records that also occur in judge.jsonl" in recorder.notes


def test_a_run_without_evaluation_leaves_nothing_out(
    two_sets: Callable[[str], list[str]], make_model: MakeModel, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"calibration": "judge.jsonl", "samples": 2, "seq_len": 64, "group_size": 32}
    quantkit.gptq(make_model("llama"), tmp_path / "a", text="judge.jsonl", evaluate=False, device="cpu", **options)
    assert json.loads((tmp_path / "a" / "quantkit.json").read_text())["calibration"]["dropped"] == 0
    with pytest.raises(CalibrationError, match=r"judge\.jsonl is too short without 10 records"):
        quantkit.gptq(make_model("llama"), tmp_path / "b", text="judge.jsonl", device="cpu", **options)
    assert not (tmp_path / "b").exists()


def test_samples_shows_the_sets_and_their_licences(two_sets: Callable[[str], list[str]], make_model: MakeModel) -> None:
    model = make_model("llama")
    report = quantkit.samples(model, calibration="alpaca:fox.jsonl:1,dog.jsonl:1", samples=4, seq_len=32)
    lines = list(report.lines(show=0))
    assert lines[0].startswith("2 windows of 32 tokens from ")
    assert "of alpaca:fox.jsonl (licence cc-by-nc-4.0, sha256 " in lines[0]
    assert "of dog.jsonl (no licence stated, sha256 " in lines[1]
    assert lines[2:4] == ["template chat, seed 0", f"tokens sha256 {report.matrix.provenance.tokens_sha256}"]
    assert lines[4].startswith("records: fox")
    assert lines[5].startswith("records: dog")
