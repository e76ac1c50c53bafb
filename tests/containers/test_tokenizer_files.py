"""Vocabularies as folders have them: a tokenizer.model alone, added tokens beyond a gap, empty special tokens."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from conftest import CHAT_TEMPLATE, MakeModel, Recorder
from tokenizers import normalizers

import quantkit
from quantkit.errors import SourceError
from quantkit.sources import open_source

TEXTS = ("the moon moves the water", "The tides of 1234 days;  two spaces", "caf\u00e9 \u4f60\u597d")


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer.model as LLaMA's, learned by SentencePiece itself: BPE with byte fallback."""
    folder = tmp_path_factory.mktemp("sentencepiece")
    (folder / "text.txt").write_text("\n".join(TEXTS[:2] * 50))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"), model_prefix=str(folder / "tokenizer"), model_type="bpe", vocab_size=310,
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
    )  # fmt: skip
    return folder / "tokenizer.model"


@pytest.fixture
def folder(learned: Path, make_model: MakeModel, tmp_path: Path) -> Path:
    """A Llama of 2023: tokenizer.model and a few words about it, no tokenizer.json."""
    made = tmp_path / "llama"
    shutil.copytree(make_model("llama"), made, ignore=shutil.ignore_patterns("tokenizer*", "special*", "chat*"))
    shutil.copy(learned, made)
    said = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (made / "tokenizer_config.json").write_text(json.dumps({**said, "add_bos_token": True}))
    return made


def test_tokenizer_model_alone_is_read_and_written_with_sentencepieces_ids(folder: Path, learned: Path) -> None:
    quantkit.ggml(folder, out=folder.parent / "tiny.gguf")
    judge = sentencepiece.SentencePieceProcessor(model_file=str(learned))
    for source in (open_source(folder), open_source(folder.parent / "tiny.gguf")):
        for text in TEXTS:
            assert source.tokenizer()(text).input_ids == [judge.bos_id(), *judge.encode(text)]


def test_added_tokens_beyond_a_gap_are_not_numbered_anew(folder: Path) -> None:
    (folder / "added_tokens.json").write_text('{"<|im_end|>": 315}')
    with pytest.raises(SourceError, match=r"added_tokens\.json: '<\|im_end\|>' has the id 315 here, and 310 once"):
        quantkit.ggml(folder, out=folder.parent / "tiny.gguf")
    (folder / "added_tokens.json").write_text('{"<|im_end|>": 310}')
    assert open_source(folder).tokenizer().convert_tokens_to_ids("<|im_end|>") == 310


@pytest.mark.parametrize("token", ["", {"content": ""}], ids=str)
@pytest.mark.parametrize("key", ["bos_token", "eos_token", "unk_token", "pad_token"])
def test_special_tokens_that_are_empty(key: str, token: Any, make_model: MakeModel, tmp_path: Path) -> None:
    copy = shutil.copytree(make_model("llama"), tmp_path / "copy")
    config = json.loads((copy / "tokenizer_config.json").read_text())
    (copy / "tokenizer_config.json").write_text(json.dumps({**config, key: token}))
    if key in ("bos_token", "eos_token"):
        with pytest.raises(SourceError, match=rf'tokenizer_config\.json: {key} is ""'):
            open_source(copy).tokenizer()
    else:
        assert getattr(open_source(copy).tokenizer(), key) is None


def test_a_file_that_cuts_text_otherwise_says_so(folder: Path, make_model: MakeModel, tmp_path: Path) -> None:
    notes = Recorder()
    quantkit.ggml(folder, out=tmp_path / "sound.gguf", progress=notes)
    # transformers takes a space that begins a text for the one that SentencePiece puts there.
    plain = [text for text in notes.warnings if "cuts text otherwise" in text]
    assert [text.partition(": ")[2] for text in plain] == ["' begins with one' and 1 more of 13"]
    tokenizer: Any = open_source(folder).tokenizer()
    backend = tokenizer.backend_tokenizer
    assert backend.normalizer is None
    backend.normalizer = normalizers.NFKC()
    copy = shutil.copytree(folder, tmp_path / "nfkc", ignore=shutil.ignore_patterns("tokenizer.model"))
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(copy)
    said = json.loads((copy / "tokenizer_config.json").read_text())  # LLaMA's own class makes its normalizer anew
    (copy / "tokenizer_config.json").write_text(json.dumps({**said, "tokenizer_class": "PreTrainedTokenizerFast"}))
    quantkit.ggml(copy, out=tmp_path / "nfkc.gguf", progress=notes)
    found = [text for text in notes.warnings if "cuts text otherwise than the model's tokenizer: 'the \ufb01ne" in text]
    assert len(found) == 1


_UNSEEN = {
    "quotes": ("\u2019", "'"),
    "dashes": ("\u2014", "-"),
    "hard spaces": ("\u00a0", " "),
    "wide spaces": ("\u3000", " "),
    "widthless": ("\u200b", ""),
    "hyphens": ("\u00ad", ""),
    "marks": ("\ufeff", ""),
    "nothing": ("\x00", ""),
    "lines": ("\r\n", "\n"),
    "blank lines": ("\n\n\n", "\n\n"),
    "digits": ("5", "S"),
}


@pytest.mark.parametrize("change", _UNSEEN)
def test_a_normalizer_that_a_gguf_reader_lacks_is_warned_of(
    change: str, make_model: MakeModel, tmp_path: Path, recorder: Recorder
) -> None:
    """Of a byte-level vocabulary, which llama.cpp reads without any."""
    folder = shutil.copytree(make_model("llama"), tmp_path / "m")
    tokenizer: Any = open_source(folder).tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace(*_UNSEEN[change])
    tokenizer.save_pretrained(folder)
    quantkit.ggml(folder, out=tmp_path / "m.gguf", pre="gpt-2", progress=recorder)
    assert [text for text in recorder.warnings if "cuts text otherwise" in text]


def test_merges_of_no_tokens_are_refused(make_model: MakeModel, tmp_path: Path) -> None:
    folder = shutil.copytree(make_model("llama"), tmp_path / "m", ignore=shutil.ignore_patterns("tokenizer*"))
    content = json.loads((make_model("llama") / "tokenizer.json").read_text())["model"]
    vocabulary = {token if token != "the" else "them": number for token, number in content["vocab"].items()}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in content["merges"]))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    with pytest.raises(SourceError, match="vocabulary"):
        quantkit.ggml(folder, out=tmp_path / "m.gguf", pre="gpt-2")
