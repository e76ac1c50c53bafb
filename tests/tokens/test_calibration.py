"""Readers, layouts, templates, drawing, and the bundled data."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from quantkit.errors import CalibrationError, MissingPackageError, UsageError
from quantkit.options import CalibrationSpec, TemplateName
from quantkit.tokens import (
    KNOWN_NAMES,
    Dataset,
    Record,
    Turn,
    datasets,
    draw,
    load_dataset,
    parse_record,
    render,
    resolve,
    token_hash,
    window_text,
    windows_in_order,
)

pytestmark = pytest.mark.fast

REPOSITORY = Path(__file__).parents[2]
MANIFEST = REPOSITORY / "calibration" / "manifest.json"
needs_bundled = pytest.mark.skipif(not MANIFEST.exists(), reason="calibration/manifest.json is not in this checkout")

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
)


class Recorder:
    """A Progress that keeps what it is told."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.warnings: list[str] = []
        self.steps: list[tuple[int, int]] = []

    @contextmanager
    def phase(self, name: str, total: int) -> Iterator[Callable[[int], None]]:
        done = [0]

        def advance(steps: int) -> None:
            done[0] += steps

        yield advance
        self.steps.append((done[0], total))

    def note(self, text: str) -> None:
        self.notes.append(text)

    def warn(self, text: str) -> None:
        self.warnings.append(text)

    def detail(self, text: str) -> None:
        pass


def make_tokenizer(*, adds_bos: bool, chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """A byte-level BPE whose every special token is one id; `adds_bos` as Llama's, else as SmolLM2's."""
    bos = "<s>" if adds_bos else "<|im_start|>"
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=[AddedToken(token, special=True) for token in special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    backend.train_from_iterator(["the quick brown fox jumps over the lazy dog", "user assistant question"], trainer)
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token="</s>")
    tokenizer.chat_template = chat_template
    return tokenizer


@pytest.fixture(scope="module")
def plain() -> PreTrainedTokenizerFast:
    return make_tokenizer(adds_bos=False)


@pytest.fixture(scope="module")
def chatty() -> PreTrainedTokenizerFast:
    return make_tokenizer(adds_bos=False, chat_template=CHATML)


@pytest.fixture(scope="module")
def llama() -> PreTrainedTokenizerFast:
    return make_tokenizer(adds_bos=True, chat_template="<s>" + CHATML)


def exchange(record_id: str, question: str, answer: str) -> Record:
    return Record(record_id, turns=(Turn("user", question), Turn("assistant", answer)))


def numbered(count: int) -> Dataset:
    records = tuple(exchange(f"r{n}", f"question {n} of the fox", f"answer {n} " * 5) for n in range(count))
    return Dataset("numbered", "0" * 64, records)


def write(folder: Path, name: str, content: object) -> str:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return str(path)


# Layouts


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ({"instruction": "Q", "output": "A"}, exchange("#7", "Q", "A")),
        (
            {"id": "x-1", "instruction": "Q", "input": "I", "output": "A", "skill": "law", "round": 2},
            Record("x-1", turns=(Turn("user", "Q\n\nI"), Turn("assistant", "A")), skill="law", input="I"),
        ),
        ({"instruction": "Q", "input": "", "output": "A"}, exchange("#7", "Q", "A")),
        ({"instruction": "Q", "input": None, "output": "A"}, exchange("#7", "Q", "A")),
        (
            {"idx": 0, "conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
            exchange("0", "Q", "A"),
        ),
        (
            {"conversations": [{"from": "system", "value": "S"}, {"from": "user", "value": "Q"}]},
            Record("#7", turns=(Turn("user", "Q"),), system="S"),
        ),
        (
            {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]},
            exchange("#7", "Q", "A"),
        ),
        (
            {"idx": 3, "Skill": "Math", "Difficulty": 5, "Instruction": "Q"},
            Record("3", turns=(Turn("user", "Q"),), skill="Math"),
        ),
        ({"prompt": "Q", "response": "A"}, exchange("#7", "Q", "A")),
        ({"prompt": "Q", "completion": "A"}, exchange("#7", "Q", "A")),
        ({"text": "T"}, Record("#7", text="T")),
    ],
)
def test_layout(raw: dict[str, object], expected: Record) -> None:
    assert parse_record(raw, 7, "f.json") == expected


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (
            {"question": "Q", "reply": "A"},
            "f.json: record #7 has an unknown layout. Keys found: question, reply. Known:",
        ),
        ({"instruction": "Q"}, "instruction + output"),
        (["Q"], "f.json: record #7 is not an object but list"),
        ({"id": "k", "instruction": 5, "output": "A"}, "f.json: record k: 'instruction' must be text, not int"),
        ({"messages": "Q"}, "f.json: record #7: 'messages' must be a list of objects"),
        ({"messages": [{"role": "user", "content": [{}]}]}, "record #7, messages[0]: 'content' must be text, not list"),
        (
            {"conversations": [{"from": "user", "value": "Q"}, {"from": "tool", "value": "A"}]},
            "record #7, conversations[1]: unknown role 'tool' (known: human, user, gpt, assistant, system)",
        ),
    ],
)
def test_bad_record(raw: object, message: str) -> None:
    with pytest.raises(CalibrationError, match=re.escape(message)):
        parse_record(raw, 7, "f.json")


def test_record_is_turns_or_text() -> None:
    with pytest.raises(ValueError, match="either turns or text"):
        Record("x")
    with pytest.raises(ValueError, match="either turns or text"):
        Record("x", turns=(Turn("user", "Q"),), text="T")


# Readers

PAIRS = [{"instruction": "Q1", "output": "A1"}, {"instruction": "Q2", "output": "A2"}]
LINES = "".join(json.dumps(pair) + "\n" for pair in PAIRS).encode()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", PAIRS),
        ("a.json", {"data": PAIRS}),
        ("a.json", LINES),
        ("a.json", b"\xef\xbb\xbf" + json.dumps(PAIRS, indent=2).encode()),
        ("a.jsonl", LINES),
        ("A.JSONL", b"\n" + LINES.replace(b"\n", b"\r\n\r\n")),
    ],
)
def test_json_files(tmp_path: Path, name: str, content: object) -> None:
    path = write(tmp_path, name, content)
    dataset = load_dataset(path)
    assert dataset.records == (exchange("#0", "Q1", "A1"), exchange("#1", "Q2", "A2"))
    assert dataset.name == name
    assert dataset.sha256 == hashlib.sha256(Path(path).read_bytes()).hexdigest()
    assert dataset.license is None
    assert dataset.text is None


def test_json_lines_are_cut_at_newlines_only(tmp_path: Path) -> None:
    line = json.dumps({"text": "one\u2028two\x85three"}, ensure_ascii=False).encode()
    assert load_dataset(write(tmp_path, "a.jsonl", line)).records[0].text == "one\u2028two\x85three"


def test_parquet(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = str(tmp_path / "a.parquet")
    parquet.write_table(pa.Table.from_pylist([{"messages": [{"role": "user", "content": "Q"}]}]), path)
    assert load_dataset(path).records == (Record("#0", turns=(Turn("user", "Q"),)),)
    with pytest.raises(CalibrationError, match="not a readable parquet file"):
        load_dataset(write(tmp_path, "bad.parquet", b"PAR1 not really"))


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingPackageError, match=re.escape("reading a.parquet needs the package pyarrow")):
        load_dataset(write(tmp_path, "a.parquet", b"PAR1"))


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.raw", "a"])
def test_plain_text_is_cut_at_blank_lines(tmp_path: Path, name: str) -> None:
    paragraphs = [letter * 1500 for letter in "abcd"] + ["e"]
    text = "\n\n" + "\n \n\n".join(paragraphs) + "\n"
    dataset = load_dataset(write(tmp_path, name, text.encode()))
    assert [record.text for record in dataset.records] == ["\n\n".join(paragraphs[:3]), "\n\n".join(paragraphs[3:])]
    assert [record.id for record in dataset.records] == ["#0", "#1"]
    assert dataset.text == text


def test_a_piece_of_text_has_at_least_4000_characters(tmp_path: Path) -> None:
    exact = "a" * 1999 + "\n\n" + "b" * 1999
    assert len(load_dataset(write(tmp_path, "exact", f"{exact}\n\nc".encode())).records) == 2
    assert len(load_dataset(write(tmp_path, "short", f"{exact[1:]}\n\nc".encode())).records) == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b"", "a.json: the file is empty"),
        ("a.txt", b" \n\n", "a.txt: the file is empty"),
        ("a.json", b"[]", "a.json: no record with text in it"),
        ("a.json", b"[\n{},\n{,}]", "a.json: line 3 is not JSON: "),
        ("a.json", LINES + b"{oops\n", "a.json: line 3 is not JSON: "),
        ("a.json", b"7", "a.json: expected a list of records"),
        ("a.json", b'{"data": 7}', "a.json: expected a list of records"),
        ("a.jsonl", LINES + b"\noops\n", "a.jsonl: line 4 is not JSON: "),
        ("a.jsonl", LINES + b"[1]\n", "a.jsonl: record #2 is not an object but list"),
        ("a.jsonl", LINES + b'{"text": "caf\xe9"}\n', "a.jsonl: line 3 is not UTF-8"),
        ("a.txt", b"one\ntwo\nt\xe9\n", "a.txt: line 3 is not UTF-8"),
        ("a.json", b'[{"q": "Q"}]', "a.json: record #0 has an unknown layout"),
    ],
)
def test_bad_content(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    with pytest.raises(CalibrationError, match=re.escape(message)) as caught:
        load_dataset(write(tmp_path, name, content))
    assert "\n" not in str(caught.value)
    assert str(tmp_path) not in str(caught.value)


def test_empty_records_are_left_out_and_counted(tmp_path: Path) -> None:
    raw = [*PAIRS, {"instruction": "Q3", "output": " \n"}, {"text": ""}, {"messages": []}]
    progress = Recorder()
    dataset = load_dataset(write(tmp_path, "a.json", raw), progress)
    assert [record.id for record in dataset.records] == ["#0", "#1"]
    assert progress.notes == ["a.json: left out 3 of 5 records: empty text"]


def no_network(*args: object, **kwargs: object) -> Any:
    raise AssertionError("the network was asked")


@pytest.mark.parametrize(
    "spec",
    [
        "nope",
        "missing.json",
        "data/missing.json",
        "./data/x",
        "/no/such/file",
        "a/b/c",
        "a/b:",
        "data/my@set.json",
        "data/c4.json.gz",
        "",
    ],
)
def test_unknown_name_lists_what_is_accepted(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", no_network)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", no_network)
    with pytest.raises(UsageError, match="no such data") as caught:
        load_dataset(spec)
    for name in (*KNOWN_NAMES, "owner/name:file"):
        assert name in str(caught.value)


def test_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is a folder: give one file"):
        load_dataset(str(tmp_path))


# Templates

ONE = exchange("one", "Why {this}?", "So.")
TWO = Record("two", turns=(*(ONE.turns or ()), Turn("user", "And?")))
WITH_INPUT = Record("in", turns=(Turn("user", "Sum up.\n\nA text."), Turn("assistant", "Short.")), input="A text.")
WITH_SYSTEM = Record("sys", turns=(Turn("user", "Q"), Turn("assistant", "A")), system="Be brief.")
ALPACA = "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
)


@pytest.mark.parametrize(
    ("record", "template", "expected"),
    [
        (ONE, "vicuna", f"{SYSTEM} USER: Why {{this}}? ASSISTANT: So.</s>"),
        (TWO, "vicuna", f"{SYSTEM} USER: Why {{this}}? ASSISTANT: So.</s>USER: And? ASSISTANT:"),
        (WITH_INPUT, "vicuna", f"{SYSTEM} USER: Sum up.\n\nA text. ASSISTANT: Short.</s>"),
        (WITH_SYSTEM, "vicuna", "Be brief. USER: Q ASSISTANT: A</s>"),
        (ONE, "wizardlm-7b", "Why {this}?\n\n### Response:So.</s>"),
        (ONE, "alpaca", f"{ALPACA}### Instruction:\nWhy {{this}}?\n\n### Response:\nSo.</s>"),
        (
            WITH_INPUT,
            "alpaca",
            f"{ALPACA_INPUT}### Instruction:\nSum up.\n\n### Input:\nA text.\n\n### Response:\nShort.</s>",
        ),
        (TWO, "none", "Why {this}?\n\nSo.\n\nAnd?\n\n"),
        (
            TWO,
            "chat",
            "<|im_start|>user\nWhy {this}?<|im_end|>\n<|im_start|>assistant\nSo.<|im_end|>\n"
            "<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n",
        ),
        (
            WITH_SYSTEM,
            "auto",
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n"
            "<|im_start|>assistant\nA<|im_end|>\n",
        ),
        (Record("t", text="Plain."), "chat", "Plain.\n\n"),
        (Record("t", text="Plain."), "vicuna", "Plain.\n\n"),
    ],
)
def test_template(record: Record, template: TemplateName, expected: str, chatty: PreTrainedTokenizerFast) -> None:
    assert render(record, template, chatty) == expected


def test_template_without_eos() -> None:
    tokenizer = make_tokenizer(adds_bos=False)
    tokenizer.eos_token = None
    assert render(ONE, "vicuna", tokenizer) == f"{SYSTEM} USER: Why {{this}}? ASSISTANT: So."


def test_resolve(plain: PreTrainedTokenizerFast, chatty: PreTrainedTokenizerFast) -> None:
    assert resolve("auto", chatty) == "chat"
    assert resolve("auto", plain) == "vicuna"
    assert resolve("alpaca", chatty) == "alpaca"
    with pytest.raises(UsageError, match="no chat template; choose one of vicuna, wizardlm-7b, alpaca, none"):
        resolve("chat", plain)


def test_chat_template_that_refuses() -> None:
    tokenizer = make_tokenizer(adds_bos=False, chat_template="{{ raise_exception('roles must alternate') }}")
    with pytest.raises(CalibrationError, match="record one: the tokenizer's chat template refuses it: roles must"):
        render(ONE, "auto", tokenizer)


# Sampling


def spec(**fields: Any) -> CalibrationSpec:
    return CalibrationSpec(**{"samples": 6, "seq_len": 16, **fields})


def test_draw_packs_records_in_drawn_order(chatty: PreTrainedTokenizerFast) -> None:
    dataset = numbered(200)
    matrix = draw(dataset, spec(seed=3, samples=300), chatty)
    assert matrix.tokens.dtype == torch.int64
    assert tuple(matrix.tokens.shape) == (300, 16)
    order = np.random.Generator(np.random.PCG64(3)).permutation(200)
    texts = [render(dataset.records[index], "chat", chatty) for index in order]
    stream = [token for text in texts for token in chatty(text, add_special_tokens=False).input_ids]
    assert matrix.tokens.flatten().tolist() == stream[: 300 * 16]
    used = matrix.provenance.records
    assert used == tuple(dataset.records[index].id for index in order[: len(used)])
    needed = [len(chatty(text, add_special_tokens=False).input_ids) for text in texts]
    assert sum(needed[: len(used) - 1]) < 300 * 16 <= sum(needed[: len(used)])


def test_special_tokens_are_never_cut(chatty: PreTrainedTokenizerFast) -> None:
    matrix = draw(numbered(40), spec(seq_len=11, samples=30), chatty)
    text = chatty.decode(matrix.tokens.flatten().tolist())
    starts = int((matrix.tokens == chatty.convert_tokens_to_ids("<|im_start|>")).sum())
    assert starts == text.count("<|im_start|>") == text.count("im_start") > 10
    assert matrix.provenance.bos == "none"


def test_draw_depends_on_the_seed_alone(chatty: PreTrainedTokenizerFast) -> None:
    torch.manual_seed(1)
    first = draw(numbered(20), spec(seed=0), chatty)
    torch.manual_seed(2)
    np.random.default_rng()
    again = draw(numbered(20), spec(seed=0), chatty)
    other = draw(numbered(20), spec(seed=1), chatty)
    assert torch.equal(first.tokens, again.tokens)
    assert first.provenance == again.provenance
    assert first.provenance.records != other.provenance.records
    assert first.provenance.tokens_sha256 != other.provenance.tokens_sha256


def test_one_bos_a_window(llama: PreTrainedTokenizerFast) -> None:
    dataset = numbered(20)
    assert render(dataset.records[0], "auto", llama).startswith("<s>")
    for matrix in (
        draw(dataset, spec(), llama),
        draw(dataset, spec(template="vicuna"), llama),
        windows_in_order(dataset, seq_len=16, template="auto", tokenizer=llama),
        window_text("the quick brown fox " * 40, "t", 16, llama, leading_bos_once=False),
        window_text("<s>" + "the quick brown fox " * 40, "t", 16, llama, leading_bos_once=False),
    ):
        assert (matrix.tokens[:, 0] == llama.bos_token_id).all()
        assert not (matrix.tokens[:, 1:] == llama.bos_token_id).any()
        assert matrix.provenance.bos == "window"
        assert matrix.tokens.shape[1] == 16


def test_a_bos_that_the_tokenizer_does_not_add_is_kept(chatty: PreTrainedTokenizerFast) -> None:
    matrix = windows_in_order(numbered(3), seq_len=8, template="auto", tokenizer=chatty)
    assert matrix.tokens[0, 0] == chatty.bos_token_id
    assert int((matrix.tokens == chatty.bos_token_id).sum()) == 6


def test_windows_in_order(plain: PreTrainedTokenizerFast) -> None:
    dataset = numbered(130)
    progress = Recorder()
    matrix = windows_in_order(dataset, seq_len=32, template="none", tokenizer=plain, progress=progress)
    text = "".join(render(record, "none", plain) for record in dataset.records)
    stream = plain(text, add_special_tokens=False).input_ids
    assert matrix.tokens.flatten().tolist() == stream[: len(stream) // 32 * 32]
    assert matrix.provenance.seed is None
    assert matrix.provenance.samples_asked is None
    assert matrix.provenance.records == tuple(f"r{n}" for n in range(130))
    assert progress.steps == [(130, 130)]
    assert progress.warnings == []


def test_provenance_names_no_record_of_the_left_out_tail(plain: PreTrainedTokenizerFast) -> None:
    # Each text and its blank line is nine tokens of one character.
    dataset = Dataset("d", "0" * 64, tuple(Record(name, text="ZZZZZZZ") for name in ("a", "b", "c")))
    kept = windows_in_order(dataset, seq_len=16, template="none", tokenizer=plain).provenance.records
    assert kept == ("a", "b")


def test_window_text_with_special_tokens_once(llama: PreTrainedTokenizerFast, plain: PreTrainedTokenizerFast) -> None:
    text = "\n\nthe quick  brown fox \n" * 20
    once = window_text(text, "wiki", 16, llama, leading_bos_once=True)
    ids = llama(text).input_ids
    assert once.tokens.flatten().tolist() == ids[: len(ids) // 16 * 16]
    assert int((once.tokens == llama.bos_token_id).sum()) == 1
    assert once.provenance.bos == "start"
    assert once.provenance.dataset_sha256 == hashlib.sha256(text.encode()).hexdigest()
    assert once.provenance.records == ()
    for flag in (True, False):
        assert window_text(text, "wiki", 16, plain, leading_bos_once=flag).provenance.bos == "none"


def test_short_data_gives_fewer_windows_and_a_warning(chatty: PreTrainedTokenizerFast) -> None:
    progress = Recorder()
    matrix = draw(numbered(3), spec(samples=50), chatty, progress)
    got = matrix.tokens.shape[0]
    assert 0 < got < 50
    assert (matrix.provenance.samples, matrix.provenance.samples_asked) == (got, 50)
    assert len(progress.warnings) == 1
    assert f"gives {got} windows of 16 tokens, not the 50 asked for" in progress.warnings[0]
    assert len(set(matrix.provenance.records)) == len(matrix.provenance.records) == 3


def test_enough_data_gives_no_warning_and_a_full_bar(chatty: PreTrainedTokenizerFast) -> None:
    progress = Recorder()
    draw(numbered(20), spec(), chatty, progress)
    assert progress.warnings == []
    assert progress.steps == [(96, 96)]


def test_too_short(llama: PreTrainedTokenizerFast) -> None:
    tokens = len(llama(render(numbered(1).records[0], "vicuna", llama), add_special_tokens=False).input_ids)
    message = f"numbered is too short: {tokens} tokens found, 511 needed for one window of 512"
    with pytest.raises(CalibrationError, match=message):
        draw(numbered(1), spec(seq_len=512, template="vicuna"), llama)
    with pytest.raises(CalibrationError, match="t is too short: "):
        window_text("the fox", "t", 512, llama, leading_bos_once=True)


def test_token_hash_is_a_fixed_function() -> None:
    tokens = torch.tensor([[1, 2, 1000]])
    assert token_hash(tokens) == "043f9d6bb37dbc192507fc049d360df75197ae4bbbbb22532f4825a204769eb8"
    assert token_hash(tokens) != token_hash(tokens.T)


def test_provenance_is_complete_and_holds_no_local_path(tmp_path: Path, llama: PreTrainedTokenizerFast) -> None:
    path = write(tmp_path, "mine.json", PAIRS * 20)
    matrix = draw(load_dataset(path), spec(seed=5), llama)
    stored = json.loads(matrix.provenance.model_dump_json())
    records = stored.pop("records")
    assert set(records) <= {f"#{n}" for n in range(40)}
    assert stored == {
        "dataset": "mine.json",
        "dataset_sha256": hashlib.sha256(Path(path).read_bytes()).hexdigest(),
        "license": None,
        "template": "chat",
        "bos": "window",
        "seed": 5,
        "seq_len": 16,
        "samples_asked": 6,
        "samples": 6,
        "tokens_sha256": token_hash(matrix.tokens),
        "first_records": None,
        "dropped": 0,
        "parts": [],
    }
    assert str(tmp_path) not in matrix.provenance.model_dump_json()


# The bundled data


def bundled_rows() -> list[dict[str, Any]]:
    lines = (REPOSITORY / "calibration" / "evol_instruct_sample.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@needs_bundled
def test_held_out_records_are_never_calibrated_on() -> None:
    calibration, held_out = load_dataset("evol-instruct-sample"), load_dataset("evol-instruct-sample:heldout")
    ids, held_ids = [{record.id for record in dataset.records} for dataset in (calibration, held_out)]
    assert not ids & held_ids
    assert ids | held_ids == {row["id"] for row in bundled_rows()}
    assert all(record_id[-2] == "e" for record_id in held_ids)
    assert not any(record_id[-2] == "e" for record_id in ids)
    assert calibration.license == held_out.license == "Apache-2.0"
    assert (calibration.name, held_out.name) == ("evol-instruct-sample", "evol-instruct-sample:heldout")


@needs_bundled
def test_bundled_data_is_what_its_manifest_and_readme_say() -> None:
    rows = bundled_rows()
    manifest = json.loads(MANIFEST.read_text())
    readme = (REPOSITORY / "calibration" / "README.md").read_text()
    data = (REPOSITORY / "calibration" / "evol_instruct_sample.jsonl").read_bytes()
    assert manifest["sha256"] == hashlib.sha256(data).hexdigest()
    assert manifest["sha256"] in readme
    assert manifest["records"] == len(rows) == 360
    assert manifest["heldout"] == [row["id"] for row in rows if row["id"][-2] == "e"]
    assert len(manifest["heldout"]) * 5 == len(rows)
    per_skill = Counter(row["skill"] for row in rows)
    assert len(per_skill) == 24
    assert set(per_skill.values()) == {15}
    skills = readme.partition("15 records each:")[2].partition(".")[0]
    assert [skill.strip() for skill in skills.split(",")] == sorted(per_skill)
    assert f"{len(rows)} instruction records" in readme
    words = {held: sum(word_count(row) for row in rows if (row["id"][-2] == "e") == held) for held in (False, True)}
    counts = [sum(words.values()), words[False], words[True]]
    tables = re.findall(r"^\| (?:calibration|held out|all)\b.*", readme, re.MULTILINE)
    claims = [[int(cell.replace(",", "")) for cell in re.findall(r" ([\d,]+) (?=\|)", line)] for line in tables]
    assert [claim[:2] for claim in claims] == [[288, counts[1]], [72, counts[2]], [360, counts[0]]]
    # Tokens by proxy: English is about 1.3 tokens a word, code, tables and other languages more.
    assert all(1.3 * claim[1] < claim[2] < claim[3] < 2.5 * claim[1] for claim in claims)
    assert [a + b for a, b in zip(claims[0], claims[1], strict=True)] == claims[2]


def word_count(row: dict[str, Any]) -> int:
    return len(row["instruction"].split()) + len(row["output"].split())


@needs_bundled
def test_bundled_records_are_whole_and_distinct() -> None:
    rows = bundled_rows()
    assert all(list(row) == ["id", "skill", "round", "instruction", "output"] for row in rows)
    assert [row["id"] for row in rows] == [
        f"{skill}-{lineage}{number}"
        for skill in sorted({row["skill"] for row in rows})
        for lineage in "abcde"
        for number in range(3)
    ]
    assert all(row["id"] == f"{row['skill']}-{row['id'][-2]}{row['round']}" for row in rows)
    assert len({" ".join(row["instruction"].lower().split()) for row in rows}) == len(rows)
    assert all(row[key] and row[key] == row[key].strip() for row in rows for key in ("instruction", "output"))
    assert not any(re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ufffd]", row["output"]) for row in rows)
    for row in rows:
        assert row["output"].count("```") % 2 == 0, row["id"]
        for language, body in re.findall(r"```(\w*)\n(.*?)```", row["output"], re.DOTALL):
            if language == "python":
                compile(body, row["id"], "exec")
            if language == "json":
                json.loads(body)


@needs_bundled
def test_bundled_records_share_little_text() -> None:
    runs: list[set[tuple[str, ...]]] = []
    owners: defaultdict[tuple[str, ...], list[int]] = defaultdict(list)
    for number, row in enumerate(bundled_rows()):
        words = f"{row['instruction']} {row['output']}".lower().split()
        runs.append({tuple(words[start : start + 5]) for start in range(len(words) - 4)})
        for run in runs[-1]:
            owners[run].append(number)
    shared = Counter(pair for numbers in owners.values() for pair in combinations(numbers, 2))
    assert shared
    assert max(count / len(runs[a] | runs[b]) for (a, b), count in shared.items()) < 0.02


@needs_bundled
def test_changed_bundled_data_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "bundled_folder", lambda: tmp_path)
    with pytest.raises(CalibrationError, match="the bundled data set evol-instruct-sample is incomplete"):
        load_dataset("evol-instruct-sample")
    (tmp_path / "manifest.json").write_bytes(MANIFEST.read_bytes())
    data = (MANIFEST.parent / "evol_instruct_sample.jsonl").read_bytes()
    (tmp_path / "evol_instruct_sample.jsonl").write_bytes(data.replace(b"biology", b"Biology", 1))
    with pytest.raises(CalibrationError, match="sha256 differs"):
        load_dataset("evol-instruct-sample")


def test_bundled_data_of_an_installed_package_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "quantkit" / "calibration"
    package.mkdir(parents=True)
    monkeypatch.setattr(datasets, "__file__", str(package / "datasets.py"))
    assert datasets.bundled_folder() == tmp_path / "calibration"
    (package / "data").mkdir()
    assert datasets.bundled_folder() == package / "data"


ALTERNATE = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{{ m['content'] }}{% endfor %}"
)


def test_conversations_that_the_template_refuses_are_left_out_and_counted(recorder: Recorder) -> None:
    tokenizer = make_tokenizer(adds_bos=False, chat_template=ALTERNATE)
    good = [Record(f"good{i}", turns=(Turn("user", "Why?"), Turn("assistant", "So it is."))) for i in range(8)]
    bad = Record("bad", turns=(Turn("assistant", "So."), Turn("user", "Why?")))
    mixed = Dataset("mixed", "0" * 64, (*good[:4], bad, *good[4:]))
    matrix = windows_in_order(mixed, seq_len=8, template="chat", tokenizer=tokenizer, progress=recorder)
    alone = windows_in_order(Dataset("mixed", "0" * 64, tuple(good)), seq_len=8, template="chat", tokenizer=tokenizer)
    assert torch.equal(matrix.tokens, alone.tokens)
    assert len(recorder.warnings) == 1
    assert recorder.warnings[0].startswith("mixed: left out 1 record that the chat template refuses: record bad: ")
    spec = CalibrationSpec(samples=2, seq_len=8, template="chat")
    assert "bad" not in draw(mixed, spec, tokenizer).provenance.records
    with pytest.raises(CalibrationError, match="roles must alternate; --template vicuna"):
        draw(Dataset("bad", "0" * 64, (bad,)), spec, tokenizer)
