"""Who reads what: of every reader its sample, which file of it is damaged and how, and what is done with it then."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch

import quantkit
from quantkit.containers.imatrix import read_imatrix
from quantkit.errors import SourceError, visible
from quantkit.options.values import NEVER
from quantkit.report import Table
from quantkit.runs.answers import appending, begun
from quantkit.runs.landing import find_landed
from quantkit.runs.ledger import Ledger
from quantkit.runs.unfinished import check_unfinished, finished, working
from quantkit.runs.weighing import Weighed
from quantkit.sources import open_source
from quantkit.tokens.readers import load_dataset
from quantkit.tokens.records import render
from quantkit.verbs.eval.code import check_tasks
from quantkit.verbs.generate.prompts import prompt_ids, prompt_text, read_prompts
from quantkit.verbs.recipe import load_recipe
from support.fuzzing import damage
from support.fuzzing.damage import Damage

TEXT = "The quick  brown fox, 2024"
DECIDES = {"recipe": {"bits": 4, "calibration": {"seed": 0, "tokens_sha256": "ab" * 32}}, "source": {"model": "tiny"}}
SETTINGS = {"model": "tiny", "sampling": {"temperature": 0.0, "seed": 0}}


@dataclass(frozen=True)
class Reader:
    """One row.

    Attributes:
        sample: folder of whole files.
        damages: patterns of the files of it that are damaged, one a case, and how.
        read: what is done with the folder. It may write below it and into ``out`` beside it.
        share: of the cases, relative to the others'.
    """

    sample: str
    damages: Mapping[str, Damage]
    read: Callable[[Path, Random], None]
    share: float = 1.0


# -- models -----------------------------------------------------------------------------------------------------------


def everything(model: Path) -> None:
    """Everything that a source offers."""
    source: Any = open_source(model)
    source.config_dict()
    for name, info in source.tensors.items():
        assert tuple(source.read(name).shape) == info.shape, name
        with suppress(SourceError):
            if source.ggml is not None:
                kind, rows = source.blocks(name)
                assert (kind.name, rows.nbytes) == (info.stored_as, info.bytes)
    for module in source.codes.quantized_names() if source.codes is not None else ():
        source.codes.read_codes(module)
    spoken(model)


def spoken(model: Path) -> None:
    """A text through the tokenizer and back, and a conversation through its template."""
    tokenizer = open_source(model).tokenizer()
    tokenizer.decode(tokenizer(TEXT).input_ids)
    if tokenizer.chat_template:
        from quantkit.tokens.records import Record, Turn

        render(Record("1", turns=(Turn("user", TEXT), Turn("assistant", "Yes."))), "auto", tokenizer)


def verified(model: Path) -> None:
    """`verify` finds what is wrong and says it; that nothing stops it is its promise."""
    report = quantkit.verify(model, generate=False)
    for line in report.lines():
        cells = [cell for row in line.rows for cell in row] if isinstance(line, Table) else [line]
        all(visible(cell).encode() for cell in cells if isinstance(cell, str))
    json.dumps(report.as_dict(), allow_nan=False)


def planned(model: Path) -> None:
    """What four verbs would make of it."""
    out = model.parent / "out"
    quantkit.convert(model, out, dry_run=True)
    quantkit.gptq(model, out, dry_run=True, group_size=32, evaluate=False, requantize=True)
    quantkit.imatrix(model, out=out / "imatrix.gguf", dry_run=True)
    quantkit.ggml(model, out / "model.gguf", type="q8_0", dry_run=True, requantize=True, pre=pre_of(model))


def pre_of(model: Path) -> str | None:
    """The pre-tokenizer that a byte-level vocabulary is to be given, which no family's is."""
    return None if model.is_file() or (model / "tokenizer.model").exists() else "gpt-2"


def written(model: Path) -> None:
    """The model as a folder, and as a file."""
    out = model.parent / "out"
    quantkit.convert(model, out / "folder")
    quantkit.ggml(out / "folder", out / "model.gguf", type="q8_0", pre=pre_of(model))


def shown(model: Path) -> None:
    for line in quantkit.inspect(model).lines():
        assert line is not None


def model(folder: Path, dice: Random, name: str = "") -> None:
    """One of the ways to read a model, cheap ones more often."""
    dice.choice((everything, everything, shown, planned, verified, written))(folder / name if name else folder)


def named(folder: Path, dice: Random) -> None:
    """The model that is a file of a folder."""
    (path,) = (path for path in folder.iterdir() if path.is_file())
    model(path, dice)


def tokenizer(folder: Path, dice: Random) -> None:
    dice.choice((spoken, spoken, spoken, verified, written))(folder)


def merged(folder: Path, dice: Random) -> None:
    out = folder.parent / "out"
    quantkit.merge(folder / "base", folder / "delta", out=out, dry_run=dice.random() < 0.5)
    if out.exists() and dice.random() < 0.3:
        quantkit.diff(folder / "base", out, out=folder.parent / "out2")


def adapter(folder: Path, dice: Random) -> None:
    if dice.random() < 0.5:
        return everything(folder / "adapter")
    quantkit.merge(folder / "base", folder / "adapter", out=folder.parent / "out", dry_run=True)


def weighed(folder: Path, dice: Random) -> None:
    path = next(path for path in folder.iterdir() if path.name.startswith("imatrix"))
    if dice.random() < 0.7:
        found = read_imatrix(path)
        for name in found.names:
            found.importance(name)
            with suppress(SourceError):
                found.importance(name, (2, 64, 32))
        return
    out = folder.parent / "out.gguf"
    quantkit.ggml(folder / "model", out, type="q4_0", imatrix=path, pre="gpt-2", dry_run=dice.random() < 0.5)


# -- texts ------------------------------------------------------------------------------------------------------------


def data(folder: Path, dice: Random) -> None:
    path = next(path for path in folder.iterdir() if path.is_file())
    if dice.random() < 0.8:
        load_dataset(str(path))
    else:
        options = {"samples": 2, "seq_len": 16, "evaluate": False}
        quantkit.samples(folder / "model", calibration=str(path), **options)


def prompts(folder: Path, dice: Random) -> None:
    known = open_source(folder / "model").tokenizer()
    for prompt in read_prompts(folder / "prompts.jsonl", dice.choice((None, "Be short."))):
        prompt_ids(prompt_text(prompt.record, "chat", known), "chat", known)


def answers(folder: Path, _: Random) -> None:
    asked = read_prompts(folder / "prompts.jsonl")
    done = begun(folder / "answers.jsonl", SETTINGS, asked)
    with appending(folder / "answers.jsonl", SETTINGS, done, resume=True) as file:
        file.write([{"id": 1}])


# -- recipes, records and cards ---------------------------------------------------------------------------------------


def recipe(folder: Path, dice: Random) -> None:
    load_recipe(folder / "recipe.yaml")
    if dice.random() < 0.1:
        quantkit.release(folder / "recipe.yaml", folder.parent / "out", dry_run=True)


def tasks(folder: Path, _: Random) -> None:
    check_tasks(folder)


def ledger(folder: Path, _: Random) -> None:
    found = Ledger(folder)
    for step in ("reference", "gptq"):
        found.knows(step)
        found.hashes(step, "ab" * 32, folder / step)
        found.is_own(folder / step)
    found.read_by(["text.txt", None])
    found.begin("gptq", "cd" * 32, folder / "gptq")
    found.end("gptq", folder / "gptq")
    found.remove(folder / "gptq")


class States(list[torch.Tensor]):
    """Hidden states of two batches."""


def unfinished(folder: Path, _: Random) -> None:
    out = folder / "tiny"
    with suppress(quantkit.errors.UsageError):
        check_unfinished(out, resume=False, force=False)
    if finished(out, DECIDES) is None:
        with working(out, DECIDES, 2, resume=True, force=False) as run:
            landed = find_landed(run)
            for index in range(landed.blocks):
                for linear in landed.linears(index):
                    assert math.prod(linear.tensors["codes"].shape) > 0
            landed.restore(States([torch.zeros(2, 3)] * 2), 0, 2)
            weighed = Weighed(run.folder, run.journal, NEVER)
            if weighed.start is not None:
                assert [gradient.numel() for gradient, _ in weighed.read(range(1))] == [6]


def record(folder: Path, dice: Random) -> None:
    """What asks quantkit.json: cards, verify, a run that goes on."""
    what = dice.choice(("card", "card", "verify", "finished"))
    if what == "card":
        carded(folder, dice)
    elif what == "verify":
        verified(folder / "model")
    else:
        finished(folder / "model", json.loads((folder / "decides.json").read_bytes()))


def carded(folder: Path, _: Random) -> None:
    given: dict[str, Any] = {}
    for key, name in (("reports", "report.json"), ("evals", "eval.json")):
        if (folder / name).exists():
            given[key] = [folder / name]
    for key, name in (("original", "original/README.md"), ("template", "card.md.j2")):
        if (folder / name).exists():
            given[key] = str(folder / name)
    quantkit.card(folder / "model", force=True, **given)
    (folder / "model" / "README.md").read_text(encoding="utf-8")


_WEIGHTS = {"model-*.safetensors": damage.safetensors_of}
_GGUF = damage.of_numbers(damage.numbers_of_gguf)
_TOKENIZER = {
    **dict.fromkeys(("tokenizer.json", "tokenizer_config.json"), damage.json_of),
    **dict.fromkeys(("special_tokens_map.json", "added_tokens.json"), damage.json_of),
    "chat_template.jinja": damage.template_of,
}

READERS: dict[str, Reader] = {
    "safetensors": Reader("model", _WEIGHTS, model, 2),
    "index": Reader("model", {"model.safetensors.index.json": damage.json_of}, model),
    "config": Reader("model", {"config.json": damage.json_of}, model, 4),
    "tokenizer": Reader("model", _TOKENIZER, tokenizer, 4),
    "tokenizer-slow": Reader("words", {"vocab.json": damage.json_of, "merges.txt": damage.bytes_of}, tokenizer),
    "sentencepiece": Reader(
        "pieces", {"tokenizer.model": damage.bytes_of, "added_tokens.json": damage.json_of}, tokenizer
    ),
    "generation": Reader(
        "model", {"generation_config.json": damage.json_of}, lambda f, d: d.choice((verified, written))(f)
    ),
    "checksums": Reader(
        "checked", {"SHA256SUMS": damage.bytes_of, "quantkit.json": damage.json_of}, lambda f, _: verified(f)
    ),
    "template": Reader("model", {"chat_template.jinja": damage.template_of}, tokenizer),
    "gptq": Reader("gptq", {"*.safetensors": damage.safetensors_of}, model, 2),
    "gptq-label": Reader("gptq", dict.fromkeys(("config.json", "quantize_config.json"), damage.json_of), model, 2),
    "compressed": Reader("compressed", {"*.safetensors": damage.safetensors_of}, model),
    "awq": Reader("awq", {"*.safetensors": damage.safetensors_of, "config.json": damage.json_of}, model, 2),
    "mlx": Reader("mlx", {"*.safetensors": damage.safetensors_of, "config.json": damage.json_of}, model, 2),
    "compressed-label": Reader("compressed", {"config.json": damage.json_of}, model, 2),
    "bin": Reader("bin", {"pytorch_model*.bin": damage.zip_of}, model, 2),
    "bin-old": Reader("bin-old", {"pytorch_model.bin": damage.bytes_of}, model),
    "bin-index": Reader("bin", {"pytorch_model.bin.index.json": damage.json_of}, model, 0.5),
    "gguf": Reader("gguf", {"*.gguf": _GGUF}, named, 4),
    "ggjt": Reader("ggjt", {"*.bin": _GGUF}, named, 2),
    "imatrix": Reader("imatrix", {"imatrix.gguf": _GGUF}, weighed),
    "imatrix-dat": Reader("imatrix-dat", {"imatrix.dat": damage.bytes_of}, weighed),
    "delta": Reader(
        "delta",
        {
            "delta/*.safetensors": damage.safetensors_of,
            **dict.fromkeys(("delta/quantkit.json", "delta/config.json", "base/config.json"), damage.json_of),
        },
        merged,
        2,
    ),
    "adapter": Reader(
        "adapter",
        {"adapter/adapter_config.json": damage.json_of, "adapter/adapter_model.safetensors": damage.safetensors_of},
        adapter,
    ),
    "data-json": Reader("data-json", {"data.json": damage.json_of}, data),
    "data-jsonl": Reader("data-jsonl", {"data.jsonl": damage.lines_of}, data),
    "data-parquet": Reader("data-parquet", {"data.parquet": damage.bytes_of}, data),
    "data-text": Reader("data-text", {"data.txt": damage.bytes_of}, data, 0.5),
    **{f"data-{kind}": Reader(f"data-{kind}", {"data.*": damage.bytes_of}, data, 0.5) for kind in ("gz", "xz", "bz2")},
    "prompts": Reader("prompts", {"prompts.jsonl": damage.lines_of}, prompts),
    "answers": Reader(
        "prompts", {"answers.jsonl": damage.lines_of, "answers.jsonl.quantkit.json": damage.json_of}, answers
    ),
    "recipe": Reader("recipe", {"recipe.yaml": damage.yaml_of}, recipe, 3),
    "tasks": Reader("tasks", {"*.yaml": damage.yaml_of}, tasks),
    "ledger": Reader("ledger", {".release/journal": damage.journal_of}, ledger, 2),
    "journal": Reader("answering", {".answers.jsonl.unfinished/journal": damage.journal_of}, answers),
    "unfinished": Reader(
        "unfinished",
        {
            ".tiny.unfinished/journal": damage.journal_of,
            ".tiny.unfinished/*/*.safetensors": damage.safetensors_of,
            ".tiny.unfinished/hidden/*/*.safetensors": damage.safetensors_of,
            ".tiny.unfinished/weights/gradients/*/*.safetensors": damage.safetensors_of,
        },
        unfinished,
        2,
    ),
    "record": Reader("record", {"model/quantkit.json": damage.json_of}, record, 2),
    "report": Reader("report", {"report.json": damage.json_of, "eval.json": damage.json_of}, carded, 2),
    "front": Reader("front", {"original/README.md": damage.front_of}, carded),
    "card-template": Reader("front", {"card.md.j2": damage.template_of}, carded),
}


def prepare(reader: Reader, whole: Path, folder: Path, number: int, name: str) -> tuple[Random, str]:
    """Lay out a case: the sample's copy with one file damaged. Returns the rest of its dice, and the file's name."""
    dice = Random(f"{name}:{number}")
    shutil.rmtree(folder, ignore_errors=True)
    sample = whole / reader.sample
    pattern = dice.choice(sorted(reader.damages))
    found = sorted(sample.glob(pattern))
    assert found, (name, pattern)
    path = dice.choice(found)
    place = path.relative_to(sample)
    if (sample / ".one").exists():  # a folder of files, each a sample by itself
        (folder / "case").mkdir(parents=True)
    else:
        shutil.copytree(sample, folder / "case")
    (folder / "case" / place).write_bytes(reader.damages[pattern](dice, path.read_bytes()))
    return dice, place.as_posix()
