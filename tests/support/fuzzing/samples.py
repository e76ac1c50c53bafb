"""Whole samples of everything that is read, as small as they can be."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import shutil
import struct
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from conftest import SPECIAL, random_model, token_matrix, train_tokenizer
from safetensors.torch import save_file

import quantkit
from quantkit.options.values import Every
from quantkit.runs.answers import appending, line_of
from quantkit.runs.landing import LandedLinear, keep_states, land_block
from quantkit.runs.ledger import Ledger
from quantkit.runs.places import folder_of
from quantkit.runs.unfinished import working
from quantkit.runs.weighing import Weighed
from quantkit.verbs.generate.prompts import read_prompts
from support import gguf_models
from support.fuzzing.readers import DECIDES, SETTINGS
from support.ggjt_models import LLAMA, Parts, parts_tensors
from support.gguf_models import Quantization, byte_level, sentencepiece
from support.recipes import SMALL, write_recipe
from support.tasks import TASK

SIZES: dict[str, Any] = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 64, "head_dim": 8}
LINE = "the quick brown fox jumps over the lazy dog while the user asks the assistant a question"
RECORDS = [
    {"instruction": LINE, "input": "", "output": LINE, "id": 1},
    {"prompt": LINE, "response": LINE, "skill": "sea"},
    {
        "conversations": [
            {"from": "system", "value": "Be short."},
            {"from": "human", "value": LINE},
            {"from": "gpt", "value": LINE},
        ]
    },
    {"messages": [{"role": "user", "content": LINE}, {"role": "assistant", "content": LINE}]},
    {"text": LINE * 2},
]
ASKED = [
    {"id": 1, "instruction": "What is a fox?"},
    {"prompt": "And a dog?", "id": "b"},
    {"messages": [{"role": "user", "content": "Who are you?"}]},
]
CARD = """---
license: apache-2.0
license_link: LICENSE
language:
- en
- no
tags: [a, b]
datasets: someone/set
model-index:
- name: tiny
  results: []
---
# Tiny, the original

It says: {{ not_a_variable }}.
"""


def make(root: Path) -> None:
    """All of them, below `root`."""
    tokenizer = train_tokenizer()
    model = random_model("llama", tied=False, dtype=torch.float16, seed=0, **SIZES)
    _models(root, model, tokenizer)
    _files(root, tokenizer)
    _texts(root)
    _records(root)
    for sample in ("gguf", "ggjt"):
        (root / sample / ".one").touch()


def _models(root: Path, model: Any, tokenizer: Any) -> None:
    plain, folder = root / "plain", root / "model"
    model.save_pretrained(plain)
    tokenizer.save_pretrained(plain)
    (plain / "generation_config.json").write_text(
        json.dumps({"bos_token_id": 1, "eos_token_id": [2, 0], "temperature": 0.7, "do_sample": True})
    )
    quantkit.convert(plain, folder, max_shard_size="20KB")
    names = {"bos_token": SPECIAL[1], "eos_token": {"content": SPECIAL[2], "lstrip": False}, "pad_token": SPECIAL[3]}
    (folder / "special_tokens_map.json").write_text(json.dumps(names))
    (folder / "added_tokens.json").write_text(json.dumps({token: number for number, token in enumerate(SPECIAL)}))
    options: dict[str, Any] = {"calibration": token_matrix(4, 16), "group_size": 32, "evaluate": False}
    quantkit.gptq(plain, root / "gptq", bits=4, **options)
    label = json.loads((root / "gptq" / "config.json").read_text())["quantization_config"]
    (root / "gptq" / "quantize_config.json").write_text(json.dumps(label))
    quantkit.gptq(plain, root / "compressed", bits=3, sym=False, format="compressed-tensors", **options)
    quantkit.gptq(plain, root / "awq", sym=False, format="awq", **options)
    quantkit.gptq(plain, root / "mlx", bits=5, format="mlx", **options)
    for name, old in (("bin", False), ("bin-old", True)):
        _pickled(plain, root / name, model.state_dict(), old)
    words = root / "words"
    shutil.copytree(plain, words)
    content = json.loads((words / "tokenizer.json").read_text())["model"]
    (words / "vocab.json").write_text(json.dumps(content["vocab"]))
    (words / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in content["merges"]))
    (words / "tokenizer.json").unlink()
    (words / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "GPT2Tokenizer", "eos_token": SPECIAL[2]})
    )
    _pieces(root / "pieces")
    _deltas(root, model, tokenizer, plain)


def _pickled(plain: Path, folder: Path, state: Mapping[str, torch.Tensor], old: bool) -> None:
    shutil.copytree(plain, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    if old:
        return torch.save(dict(state), folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    names = list(state)
    index = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"pytorch_model-{number:05d}-of-00002.bin"
        torch.save({name: state[name].clone() for name in part}, folder / file)
        index |= dict.fromkeys(part, file)
    content = {"metadata": {"total_size": 1}, "weight_map": index}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(content))


def _pieces(folder: Path) -> None:
    """A folder of 2023: a tokenizer.model alone."""
    import io

    import sentencepiece as sp

    model = random_model("llama", tied=False, dtype=torch.float16, seed=0, **SIZES)
    model.resize_token_embeddings(322, mean_resizing=False)
    model.save_pretrained(folder)
    written = io.BytesIO()
    lines = [f"{LINE} {number}: {word}" for number, word in enumerate(LINE.split() * 30)]
    sp.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=written, vocab_size=320, model_type="bpe", byte_fallback=True,
        hard_vocab_limit=False, minloglevel=2, character_coverage=1.0,
    )  # fmt: skip
    (folder / "tokenizer.model").write_bytes(written.getvalue())
    known = sp.SentencePieceProcessor(model_proto=written.getvalue()).vocab_size()
    (folder / "added_tokens.json").write_text(json.dumps({"<a>": known, "<b>": known + 1}))
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def _deltas(root: Path, model: Any, tokenizer: Any, plain: Path) -> None:
    tuned = random_model("llama", tied=False, dtype=torch.float16, seed=1, **SIZES)
    tuned.save_pretrained(root / "tuned")
    tokenizer.save_pretrained(root / "tuned")
    shutil.copytree(plain, root / "delta" / "base")
    quantkit.diff(plain, root / "tuned", out=root / "delta" / "delta", dtype="float16")
    shutil.rmtree(root / "tuned")
    quantkit.merge(plain, root / "delta" / "delta", out=root / "checked")
    shutil.copytree(plain, root / "adapter" / "base")
    adapter = root / "adapter" / "adapter"
    adapter.mkdir()
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    save_file(
        {f"{name}.lora_A.weight": torch.ones(2, 32), f"{name}.lora_B.weight": torch.ones(32, 2)},
        adapter / "adapter_model.safetensors",
        metadata={"format": "pt"},
    )
    config = {"peft_type": "LORA", "base_model_name_or_path": "someone/base", "r": 2, "lora_alpha": 4}
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "target_modules": ["q_proj"]}))


def _files(root: Path, tokenizer: Any) -> None:
    """GGUF of both versions, both vocabularies, blocks, experts; ggjt; importance matrices of both forms."""
    folder = root / "gguf"
    folder.mkdir()
    sentence = sentencepiece(LLAMA)

    def write(name: str, family: str, vocabulary: Any, kind: Any, **config: Any) -> None:
        model = random_model(
            family, tied=family.startswith("gemma"), dtype=torch.float32, seed=0, **{**SIZES, **config}
        )
        if vocabulary is sentence:
            model.resize_token_embeddings(len(LLAMA["tokens"]), mean_resizing=False)
        gguf_models.write_model(folder / name, model, vocabulary, kind=kind)

    write("llama.gguf", "llama", byte_level(tokenizer, "llama-bpe"), Quantization.Q8_0)
    write("pieces.gguf", "llama", sentence, Quantization.Q4_0)
    yarn = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 64}
    write("qwen2.gguf", "qwen2", byte_level(tokenizer, "qwen2"), Quantization.F16, rope_parameters=yarn)
    write("gemma3.gguf", "gemma3_text", sentence, Quantization.BF16, layer_types=None)
    experts = {"mlp_only_layers": [], "norm_topk_prob": True, "moe_intermediate_size": 32}
    model = random_model("qwen3_moe", tied=False, dtype=torch.float16, seed=0, **{**SIZES, **experts})
    model.save_pretrained(root / "moe")
    tokenizer.save_pretrained(root / "moe")
    quantkit.ggml(root / "moe", folder / "moe.gguf", type="q8_0", pre="gpt-2")
    shutil.rmtree(root / "moe")
    older = (folder / "llama.gguf").read_bytes()
    (folder / "older.gguf").write_bytes(older[:4] + struct.pack("<I", 2) + older[8:])
    (root / "ggjt").mkdir()
    (root / "ggjt" / "parts.bin").write_bytes(Parts(tensors=parts_tensors(32, 96, kind=Quantization.F16)).bytes())
    for name in ("imatrix", "imatrix-dat"):
        shutil.copytree(root / "model", root / name / "model")
    calibration = token_matrix(4, 16)
    quantkit.imatrix(root / "model", out=root / "imatrix" / "imatrix.gguf", calibration=calibration)
    (root / "imatrix-dat" / "imatrix.dat").write_bytes(_dat(root / "imatrix" / "imatrix.gguf"))


def _dat(path: Path) -> bytes:
    """The older form of an importance matrix: count; of each name, calls and values; calls and the data's name."""
    from quantkit.containers.imatrix import read_imatrix

    entries = read_imatrix(path).entries
    written = struct.pack("<i", len(entries))
    for name, values in entries.items():
        row = np.asarray(values, dtype=np.float32).reshape(-1)
        written += struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", 4, len(row)) + (row * 4).tobytes()
    return written + struct.pack("<ii", 4, 8) + b"text.txt"


def _texts(root: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    lines = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()
    texts = RECORDS[:1] * 8
    made = {
        **{"json": ("data.json", json.dumps({"data": RECORDS}).encode()), "jsonl": ("data.jsonl", lines)},
        **{"gz": ("data.jsonl.gz", gzip.compress(lines, mtime=0)), "xz": ("data.jsonl.xz", lzma.compress(lines))},
        **{"bz2": ("data.txt.bz2", bz2.compress(lines)), "text": ("data.txt", f"{LINE}\n\n".encode() * 40)},
        "parquet": ("data.parquet", b""),
    }
    for kind, (name, content) in made.items():
        folder = root / f"data-{kind}"
        shutil.copytree(root / "model", folder / "model", ignore=shutil.ignore_patterns("quantkit.json", "SHA256SUMS"))
        (folder / name).write_bytes(content)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(texts), root / "data-parquet" / "data.parquet")
    folder = root / "prompts"
    shutil.copytree(root / "model", folder / "model")
    (folder / "prompts.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in ASKED))
    prompts = read_prompts(folder / "prompts.jsonl")
    shutil.copytree(folder, root / "answering")
    answers = [line_of(prompt, "An animal.", "stop", 3, 3) for prompt in prompts[:2]]
    with appending(folder / "answers.jsonl", SETTINGS, 0) as file:
        file.write(answers)
    with suppress(KeyboardInterrupt), appending(root / "answering" / "answers.jsonl", SETTINGS, 0) as file:
        file.write(answers)
        raise KeyboardInterrupt


def _records(root: Path) -> None:
    folder = root / "recipe"
    shutil.copytree(root / "model", folder / "model")
    extras = "card: {licence: mit}\npublish: {owner: someone}\n"
    write_recipe(folder, SMALL + extras)
    (root / "tasks").mkdir()
    (root / "tasks" / "tiny.yaml").write_text(TASK)
    (root / "tasks" / "group.yaml").write_text("group: both\ntask: [tiny]\ninclude: tiny.yaml\n")
    _ledger(root / "ledger")
    _unfinished(root / "unfinished")
    shutil.copytree(root / "gptq", root / "record" / "model")
    shutil.copytree(root / "gptq", root / "front" / "model")
    shutil.copytree(root / "gptq", root / "report" / "model")
    record = json.loads((root / "gptq" / "quantkit.json").read_text())
    (root / "record" / "decides.json").write_text(json.dumps({key: record[key] for key in ("recipe", "source")}))
    (root / "front" / "original").mkdir()
    (root / "front" / "original" / "README.md").write_text(CARD)
    from quantkit.verbs.card import read_template

    (root / "front" / "card.md.j2").write_text(read_template("default"))
    _reports(root / "report", record)


def _ledger(folder: Path) -> None:
    for step in ("reference", "gptq"):
        (folder / step).mkdir(parents=True)
        (folder / step / "model.safetensors").write_bytes(b"weights")
        (folder / step / "config.json").write_text("{}")
    (folder / "text.txt").write_text(LINE)
    (folder / ".release").mkdir()
    ledger = Ledger(folder)
    ledger.read_by([str(folder / "text.txt")])
    ledger.begin("reference", "ab" * 32, folder / "reference")
    ledger.end("reference", folder / "reference")
    ledger.begin("gptq", "ab" * 32, folder / "gptq")


def _unfinished(folder: Path) -> None:
    """A run of two blocks that was stopped after the first."""
    folder.mkdir()
    tensors = {"codes": torch.ones(4, 8, dtype=torch.uint8), "scales": torch.ones(4, 1, dtype=torch.float16)}
    linear = LandedLinear("model.layers.0.q_proj", tensors, {"bits": 4}, {"name": "q", "loss": 0.5})
    with suppress(KeyboardInterrupt), working(folder / "tiny", DECIDES, 2, resume=False, force=False) as run:
        (run.folder / "blocks").mkdir()
        land_block(run.folder, run.journal, 0, [linear])
        keep_states(run.folder, run.journal, 1, [torch.ones(2, 3), torch.ones(2, 3)])
        weighed = Weighed(run.folder, run.journal, Every(blocks=1))
        weighed.reached(2, [torch.ones(2, 3)], {})
        weighed.write(1, {"0.weights": torch.ones(3)})
        weighed.reached(1, [torch.ones(2, 3)], {})
        raise KeyboardInterrupt
    assert (folder_of(folder / "tiny") / "journal").exists()


def _reports(folder: Path, record: Mapping[str, Any]) -> None:
    from support.reports import COMPARE, RESULTS

    (name,) = (path.name for path in (folder / "model").glob("*.safetensors"))
    files = {name: record["files"][name]}
    compared = json.loads(json.dumps(COMPARE.as_dict()))
    compared["models"][1]["files"] = files
    (folder / "report.json").write_text(json.dumps(compared))
    (folder / "eval.json").write_text(json.dumps({**json.loads(json.dumps(RESULTS.as_dict())), "files": files}))
