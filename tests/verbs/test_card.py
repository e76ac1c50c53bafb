"""card: what it says is what files and reports give, each fact for the file whose hash it names."""

from __future__ import annotations

import ast
import hashlib
import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import yaml
from conftest import MakeModel, Recorder
from huggingface_hub import ModelCard, parse_eval_result_entries
from support import towers
from support.wizard import wizard
from transformers import PreTrainedTokenizerFast

import quantkit
from quantkit.cli import app as cli
from quantkit.errors import SourceError, UsageError, visible
from quantkit.progress import number
from quantkit.tokens.records import STYLES
from quantkit.verbs.card import CardReport, card, fill_template
from quantkit.verbs.card.advice import advice
from quantkit.verbs.card.command import commands_of
from quantkit.verbs.card.facts import ModelFacts
from quantkit.verbs.card.measured import Loss, Measurements
from quantkit.verbs.card.usage import hints
from quantkit.verbs.compare.chooser import Limits
from quantkit.verbs.ggml import ggml
from quantkit.verbs.publish.files import local_files
from quantkit.verbs.verify.programs import Load

REPO = "someone/tiny-GPTQ"
HUB = f"https://huggingface.co/{REPO}"
TEXT = "the quick brown fox jumps over the lazy dog while the user asks the assistant a question about the sea\n"
ORIGINAL = """---
license: apache-2.0
license_link: LICENSE
language:
- en
- fr
tags:
- secret-tag
---
# Tiny, the original

It says: {{ not_a_variable }}.
"""
PNG = b"\x89PNG not really"


@pytest.fixture(scope="session")
def made(make_model: MakeModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny GPTQ folder, evaluated, as `gptq` leaves it."""
    work = tmp_path_factory.mktemp("card")
    records = [{"instruction": TEXT[i:], "output": TEXT * 2} for i in range(12)]
    (work / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (work / "text.txt").write_text(" ".join(reversed(TEXT.split())) * 40)
    quantkit.gptq(
        make_model("llama", num_key_value_heads=4),
        work / "tiny-GPTQ",
        bits=4,
        group_size=32,
        damp=0.05,
        calibration=str(work / "data.jsonl"),
        text=str(work / "text.txt"),
        samples=2,
        seq_len=32,
    )
    return work / "tiny-GPTQ"


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "tiny-GPTQ"))


@pytest.fixture
def files(made: Path, tmp_path: Path) -> Path:
    """A folder of two GGUF files of different models, without anything beside them."""
    ggml(made, tmp_path / "files" / "tiny.Q4_0.gguf", pre="smollm")
    ggml(made, tmp_path / "files" / "tiny.F16.gguf", type="f16", requantize=True, pre="smollm")
    return tmp_path / "files"


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def row(name: str, file: Path, perplexity: float, kl: float | None) -> dict[str, Any]:
    """A model in a report, of a file that may be called otherwise there."""
    values = {"mean": kl, "median": 0.01, "p90": 0.2, "p99": 0.5, "p999": 0.7, "max": 1.5}
    scores = {
        "perplexity": perplexity,
        "stderr": 0.25,
        "delta_ln_ppl": None if kl is None else 0.0123456789012345,
        "delta_ln_ppl_stderr": None if kl is None else 0.0012,
        "kl_divergence": None if kl is None else values,
        "top1_agreement": None if kl is None else 0.9375,
        "kl_divergence_stderr": None if kl is None else 0.00321,
        "top1_agreement_stderr": None if kl is None else 0.0042,
        "worst": [],
    }
    return {
        "model": name,
        "kind": "gguf",
        "scheme": "mostly Q4_0",
        "reference": kl is None,
        "bytes": 1000,
        "bits_per_weight": 4.5,
        "files": {"called-otherwise.bin": sha256(file)},
        "pareto": False,
        "texts": {"wikitext2": scores},
        "layers": None,
    }


def report(place: Path, *rows: dict[str, Any], plots: tuple[str, ...] = ()) -> Path:
    place.mkdir(parents=True, exist_ok=True)
    texts = [{"name": "wikitext2", "tokens": 4096, "seq_len": 2048, "stride": None, "tokens_sha256": "ab" * 32}]
    content = {"quantkit": "0.1.0", "reference": "tiny-fp16", "texts": texts, "models": rows}
    (place / "report.json").write_text(json.dumps({**content, "choice": None, "unmet": None}))
    for name in plots:
        (place / name).write_bytes(PNG + name.encode())
    return place / "report.json"


def evaluated(place: Path, file: Path, limit: int | None = None) -> Path:
    task = {
        "task": "arc_challenge",
        "name": "AI2 Reasoning Challenge (25-Shot)",
        "dataset": "allenai/ai2_arc",
        "split": "test",
        "fewshot": 25,
        "config": "ARC-Challenge",
        "metric": "acc_norm",
        "value": 0.5725255972696246,
        "stderr": 0.0144568322948011,
        "questions": 1172,
    }
    content = {
        "quantkit": "0.1.0",
        "model": "x",
        "files": {"w": sha256(file)},
        "harness": {"name": "lm-evaluation-harness", "version": "0.4.9"},
        "kernels": None,
        "suite": "open-llm-leaderboard",
        "limit": limit,
        "partial": limit is not None,
        "tasks": [task],
        "average": 0.5725255972696246,
    }
    place.write_text(json.dumps(content))
    return place


def write(folder: Path, **options: Any) -> tuple[CardReport, dict[str, Any], str]:
    """The report, the front matter, and the text below it."""
    made = card(folder, **options)
    content = (folder / "README.md").read_text(encoding="utf-8")
    loaded = ModelCard(content)
    assert loaded.data.to_dict().get("inference", True) == (options.get("template") != "thebloke-2023")
    _, head, body = content.split("---\n", 2)
    return made, yaml.safe_load(head), body


# -- from the folder alone -------------------------------------------------------------------------------------------


def test_a_gptq_folder_says_what_its_run_noted(folder: Path, recorder: Recorder) -> None:
    record = json.loads((folder / "quantkit.json").read_text())
    made, head, body = write(folder, repo=REPO, licence="mit", base_model=["someone/tiny"], progress=recorder)
    assert head["license"] == "mit"
    assert (head["base_model"], head["base_model_relation"]) == ("someone/tiny", "quantized")
    assert head["tags"] == ["quantized", "gptq", "4-bit", "quantkit"]
    assert head["library_name"] == "transformers"
    assert recorder.warnings == []
    line = next(line for line in body.splitlines() if line.startswith(f"| [`main`]({HUB}/tree/main) | 4-bit symmetric"))
    assert line.endswith("| 32 | static | false | 0.05 |")
    assert sha256(folder / "model.safetensors") in body
    for value in (*record["source"]["sha256"].values(), record["calibration"]["tokens_sha256"]):
        assert value in body
    assert record["calibration"]["dataset_sha256"] in body
    assert "2 windows of 32 tokens" in body
    assert f"quantkit {record['versions']['quantkit']}, torch {record['versions']['torch']}" in body
    # The run's own comparison with its source, to the last digit.
    own = record["evaluation"]["results"][1]
    (model,) = head["model-index"]
    (text,) = model["results"]
    values = {metric["type"]: metric["value"] for metric in text["metrics"]}
    assert values == {
        "perplexity": own["perplexity"],
        "delta_ln_perplexity": own["delta_ln_ppl"],
        "kl_divergence": own["kl_divergence"]["mean"],
        "top1_agreement": own["top1_agreement"],
    }
    assert model["name"] == "tiny-GPTQ"
    assert made.evaluated == ["tiny-GPTQ"]
    assert "against tiny-llama" in body


def test_memory_is_tensors_and_keys_and_values(folder: Path) -> None:
    from quantkit.verbs.card.facts import models_in

    (model,) = models_in(folder, "main")
    config = json.loads((folder / "config.json").read_text())
    tokens = min(2048, config["max_position_embeddings"])
    width = config["hidden_size"] // config["num_attention_heads"]
    cache = 2 * 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * width * tokens
    from quantkit.verbs.inspect import inspect

    assert model.memory_bytes == inspect(folder).bytes + cache
    assert model.kv_tokens == tokens


def test_what_nobody_measured_is_left_out(folder: Path, recorder: Recorder) -> None:
    record = json.loads((folder / "quantkit.json").read_text())
    (folder / "quantkit.json").write_text(json.dumps({**record, "evaluation": None}))
    made, head, body = write(folder, progress=recorder)
    assert "model-index" not in head
    assert "license" not in head
    assert "base_model" not in head
    assert "base_model_relation" not in head
    assert "quantized_by" not in head
    for word in ("erplexity", "KL", "What it costs", "Tasks", "other forms", "Original model card"):
        assert word not in body
    assert len(made.missing) == len(recorder.warnings) == 3
    assert any("licence" in warning for warning in recorder.warnings)


def test_a_folder_without_quantkit_json_states_no_run(folder: Path) -> None:
    (folder / "quantkit.json").unlink()
    _, head, body = write(folder)
    assert "model-index" not in head
    assert "calibrat" not in body
    assert "| 32 |  | false | 0.05 |" in body


def test_a_record_of_other_weights_is_refused(folder: Path) -> None:
    record = json.loads((folder / "quantkit.json").read_text())
    record["files"] = {**record.get("files", {}), "model.safetensors": "0" * 64}
    (folder / "quantkit.json").write_text(json.dumps(record))
    with pytest.raises(SourceError, match=r"model\.safetensors is another file than quantkit\.json says"):
        card(folder)
    assert not (folder / "README.md").exists()


def test_a_merged_model(make_model: MakeModel, tmp_path: Path) -> None:
    quantkit.diff(make_model("llama"), make_model("llama", seed=1), tmp_path / "delta")
    quantkit.merge(make_model("llama"), tmp_path / "delta", tmp_path / "out")
    made, head, body = write(tmp_path / "out", base_model=["a/base", "b/delta"])
    assert head["base_model"] == ["a/base", "b/delta"]
    assert head["base_model_relation"] == "merge"
    assert head["tags"] == ["quantkit"]
    record = json.loads((tmp_path / "out" / "quantkit.json").read_text())
    for role in ("base", "delta"):
        assert next(iter(record["source"][role]["sha256"].values())) in body
    assert made.models == ["out"]


def test_gguf_files_and_who_loads_them(files: Path) -> None:
    _, head, body = write(files, repo="someone/tiny-GGUF")
    assert head["library_name"] == "gguf"
    assert head["tags"] == ["quantized", "gguf", "quantkit"]
    assert "base_model_relation" not in head
    place = "https://huggingface.co/someone/tiny-GGUF/blob/main"
    assert f"| [`tiny.Q4_0.gguf`]({place}/tiny.Q4_0.gguf) | Q4_0: 14 Q4_0, 2 F16 |" in body
    assert f"| [`tiny.F16.gguf`]({place}/tiny.F16.gguf) | F16 |" in body
    assert 'Llama.from_pretrained("someone/tiny-GGUF", filename="tiny.F16.gguf")' in body
    assert "weights: GPTQ codes" in body
    for other in ("GPTQModel", "AutoGPTQ", "ExLlama**", "gptqmodel"):
        assert other not in body
    # Of a byte-level vocabulary, which programs of 2023 do not read.
    assert "ctransformers" not in body


def test_a_ggjt_file(tmp_path: Path) -> None:
    base, _, delta = wizard(tmp_path)
    ggml(base=base, delta=delta, out=tmp_path / "out" / "wizard.ggmlv3.q4_0.bin", type="q4_0", container="ggjt")
    _, head, body = write(tmp_path / "out", repo="someone/wizard-GGML", base_model=["someone/wizard"])
    assert head["tags"] == ["quantized", "ggml", "quantkit"]
    assert head["base_model_relation"] == "quantized"
    assert "library_name" not in head
    where = "https://huggingface.co/someone/wizard-GGML/blob/main/wizard.ggmlv3.q4_0.bin"
    assert f"| [`wizard.ggmlv3.q4_0.bin`]({where}) | Q4_0" in body
    assert 'model_file="wizard.ggmlv3.q4_0.bin", model_type="llama"' in body
    assert "llama.cpp" not in body
    assert "text-generation-webui" not in body


@pytest.mark.parametrize(
    ("config", "program", "loads"),
    [
        ({"checkpoint_format": "gptq_v2"}, "AutoGPTQ", False),
        ({}, "AutoGPTQ", True),
        ({"sym": False}, "vLLM", False),
        ({}, "vLLM", True),
    ],
)
def test_only_programs_that_load_it_are_named(folder: Path, config: dict[str, Any], program: str, loads: bool) -> None:
    for name in ("config.json", "quantize_config.json"):
        content = json.loads((folder / name).read_text())
        (content.get("quantization_config") or content).update(config)
        (folder / name).write_text(json.dumps(content))
    _, _, body = write(folder, repo=REPO)
    assert (f"**{program}**" in body) == loads


def test_code_names_the_branch(folder: Path) -> None:
    _, _, body = write(folder, repo=REPO, branch="gptq-4bit-32g-actorder_False")
    assert f'from_pretrained("{REPO}", revision="gptq-4bit-32g-actorder_False", device_map="auto")' in body
    assert f"vllm serve {REPO} --revision gptq-4bit-32g-actorder_False" in body


# -- reports ---------------------------------------------------------------------------------------------------------


def test_a_report_counts_for_the_file_with_its_hash(files: Path, tmp_path: Path) -> None:
    """Names in the report are of other files; only hashes say which is which."""
    rows = (
        row("tiny.F16.gguf", files / "tiny.Q4_0.gguf", 12.345678901234567, 0.0987654321098765),
        row("tiny.Q4_0.gguf", files / "tiny.F16.gguf", 11.5, None),
    )
    made, head, body = write(files, repo="someone/tiny-GGUF", reports=[report(tmp_path / "r", *rows)])
    assert made.evaluated == ["tiny.F16.gguf", "tiny.Q4_0.gguf"]
    assert [model["name"] for model in head["model-index"]] == ["tiny-GGUF/tiny.F16.gguf", "tiny-GGUF/tiny.Q4_0.gguf"]
    (text,) = head["model-index"][1]["results"]
    metrics = {metric["type"]: metric for metric in text["metrics"]}
    assert metrics["perplexity"]["value"] == 12.345678901234567
    assert metrics["perplexity"]["args"] == {"stderr": 0.25}
    assert metrics["kl_divergence"]["value"] == 0.0987654321098765
    assert metrics["kl_divergence"]["args"]["p999"] == 0.7
    assert metrics["delta_ln_perplexity"]["value"] == 0.0123456789012345
    assert text["dataset"]["args"] == {"tokens": 4096, "seq_len": 2048, "tokens_sha256": "ab" * 32}
    assert [metric["type"] for metric in head["model-index"][0]["results"][0]["metrics"]] == ["perplexity"]
    assert metrics["kl_divergence"]["args"]["stderr"] == 0.00321
    assert metrics["top1_agreement"]["args"]["stderr"] == 0.0042
    numbers = "12.346 ± 0.250 | +0.0123 ± 0.0012 | 0.0988 ± 0.0032 | 0.0100 | 0.5000 | 1.5000 | 93.8 ± 0.4 %"
    assert f"| `tiny.Q4_0.gguf` | {numbers} |" in body.splitlines()  # as compare's report has them
    assert "On `wikitext2` (4096 tokens scored, windows of 2048), against tiny-fp16:" in body


def test_a_report_as_compare_writes_it(folder: Path, made: Path, make_model: MakeModel, tmp_path: Path) -> None:
    source = make_model("llama", num_key_value_heads=4)
    text = str(made.parent / "text.txt")
    quantkit.compare(source, [folder], out=tmp_path / "r", texts=[text], seq_len=64, plots=False)
    told = json.loads((tmp_path / "r" / "report.json").read_text())["models"][1]
    _, head, _ = write(folder, reports=[tmp_path / "r" / "report.json"])
    metrics = head["model-index"][0]["results"][0]["metrics"]
    (scores,) = told["texts"].values()
    found = {metric["type"]: metric["value"] for metric in metrics}
    assert found["kl_divergence"] == scores["kl_divergence"]["mean"]
    assert found["perplexity"] == scores["perplexity"]


def test_a_report_of_other_files_is_an_error(files: Path, folder: Path, tmp_path: Path) -> None:
    other = report(tmp_path / "r", row("tiny.Q4_0.gguf", folder / "config.json", 12, 0.1))
    with pytest.raises(UsageError, match=r"report\.json: is of none of these files \(tiny\.F16\.gguf, tiny\.Q4"):
        card(files, reports=[other])
    with pytest.raises(UsageError, match="is of none of these files"):
        card(files, evals=[evaluated(tmp_path / "e.json", folder / "config.json")])
    assert not (files / "README.md").exists()


def test_a_report_that_is_none(files: Path, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(UsageError, match=r"x\.json: not a report\.json of `quantkit compare`"):
        card(files, reports=[tmp_path / "x.json"])
    with pytest.raises(UsageError, match=r"x\.json: not results of `quantkit eval`"):
        card(files, evals=[tmp_path / "x.json"])
    with pytest.raises(UsageError, match="no such file"):
        card(files, reports=[tmp_path / "no.json"])


def test_what_is_wrong_in_a_report_is_named(folder: Path, tmp_path: Path) -> None:
    of_it = row("tiny", folder / "model.safetensors", 12, 0.1)
    of_it["texts"]["wikitext2"]["perplexity"] = "12"
    wrong = report(tmp_path / "r", of_it)
    message = r"report\.json: not a .*: models\[0\]\.texts\.wikitext2\.perplexity is '12', not of type float$"
    with pytest.raises(UsageError, match=message):
        card(folder, reports=[wrong], force=True)
    record = json.loads((folder / "quantkit.json").read_text())
    del record["evaluation"]["results"][0]["stderr"]
    (folder / "quantkit.json").write_text(json.dumps(record))
    with pytest.raises(SourceError, match=r"quantkit\.json of tiny.*: evaluation: results\[0\]\.stderr is missing$"):
        card(folder, force=True)


def test_harness_results_are_exact(folder: Path, tmp_path: Path) -> None:
    results = evaluated(tmp_path / "e.json", folder / "model.safetensors", limit=10)
    _, head, body = write(folder, evals=[results])
    found = head["model-index"][0]["results"][-1]
    assert found["dataset"] == {
        "name": "AI2 Reasoning Challenge (25-Shot)",
        "type": "allenai/ai2_arc",
        "config": "ARC-Challenge",
        "split": "test",
        "args": {"num_few_shot": 25, "limit": 10},
    }
    (metric,) = found["metrics"]
    assert metric["value"] == 57.25255972696246  # in per cent, as leaderboards have it
    assert metric["name"] == "normalized accuracy"
    assert metric["args"] == {"stderr": 1.44568322948011}
    assert "| AI2 Reasoning Challenge (25-Shot) | acc_norm | 57.25 | 1.45 |" in body
    assert "| average | | 57.25 | |" in body
    assert not (folder / ".eval_results").exists()  # a trial is nothing to compare
    assert "on the first 10 records of each task only" in body


def test_plots_are_copied_and_linked(folder: Path, tmp_path: Path) -> None:
    place = report(
        tmp_path / "r",
        row("x", folder / "model.safetensors", 12, 0.1),
        plots=("accuracy-size.png", "kl.png", "other.png"),
    )
    made, _, body = write(folder, reports=[place])
    assert made.plots == ["accuracy-size.png", "kl.png"]
    assert (folder / "kl.png").read_bytes() == PNG + b"kl.png"
    assert "![KL divergence against size](accuracy-size.png)" in body
    assert not (folder / "other.png").exists()
    (folder / "README.md").unlink()
    (folder / "kl.png").write_bytes(b"mine")
    with pytest.raises(UsageError, match=r"kl\.png already exists and is another plot"):
        card(folder, reports=[place])
    assert (folder / "kl.png").read_bytes() == b"mine"


def test_branches_are_rows_with_facts_of_their_own(
    folder: Path, made: Path, tmp_path: Path, make_model: MakeModel
) -> None:
    eight = tmp_path / "eight"
    quantkit.gptq(
        make_model("llama", num_key_value_heads=4),
        eight,
        bits=8,
        group_size=-1,
        calibration=str(made.parent / "data.jsonl"),
        samples=2,
        seq_len=32,
        evaluate=False,
    )
    place = report(tmp_path / "r", row("x", eight / "model.safetensors", 12, 0.001))
    _, head, body = write(folder, repo=REPO, branches={"gptq-8bit--1g": eight}, reports=[place])
    assert f"| [`gptq-8bit--1g`]({HUB}/tree/gptq-8bit--1g) | 8-bit symmetric |" in body
    assert "| whole rows | static | false | 0.1 |" in body
    assert [model["name"] for model in head["model-index"]] == ["tiny-GPTQ/main", "tiny-GPTQ/gptq-8bit--1g"]
    assert head["tags"] == ["quantized", "gptq", "4-bit", "8-bit", "quantkit"]


# -- licence, the original card, other repositories ------------------------------------------------------------------


def test_licence_and_language_come_from_the_original_card(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(ORIGINAL)
    made, head, body = write(folder, original=tmp_path / "README.md", siblings=["someone/tiny-GGML", "a/b=What it is"])
    assert made.licence == "apache-2.0"
    assert (head["license"], head["license_link"], head["language"]) == ("apache-2.0", "LICENSE", ["en", "fr"])
    assert "secret-tag" not in head["tags"]
    assert body.endswith("# Tiny, the original\n\nIt says: {{ not_a_variable }}.\n")
    assert (
        "- [someone/tiny-GGML](https://huggingface.co/someone/tiny-GGML): GGML (ggjt) files, for programs of 2023"
        in body
    )
    assert "- [a/b](https://huggingface.co/a/b): What it is" in body
    with pytest.raises(UsageError, match=r"licence=mit: .* under apache-2\.0, which this one inherits"):
        card(folder, original=tmp_path / "README.md", licence="mit", force=True)


def test_licence_of_a_gguf_file(made: Path, tmp_path: Path) -> None:
    source = tmp_path / "tiny"
    shutil.copytree(made, source)
    (source / "README.md").write_text(ORIGINAL)
    ggml(source, tmp_path / "files" / "tiny.gguf", pre="smollm")
    _, head, _ = write(tmp_path / "files")
    assert head["license"] == "apache-2.0"


@pytest.mark.parametrize(
    ("front", "licence", "language"),
    [
        ("license: apache-2.0\nlanguage:\n- no\n- nb\n", "apache-2.0", ["no", "nb"]),
        ("license: mit\nlanguage: on\ndate: 2023-05-01\n", "mit", "on"),
        ("# ---------- licence ---\nlicense: cc-by-nc-4.0\nlanguage: de\n", "cc-by-nc-4.0", "de"),
        ("license: other\nlanguage: 010\n", "other", "010"),
    ],
)
def test_front_matter_is_read_as_the_hub_reads_it(
    front: str, licence: str, language: Any, folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "README.md").write_text(f"---\n{front}---\nThe text.\n")
    with pytest.raises(UsageError, match=f"licence=unlicense: .* is under {licence}"):
        card(folder, original=tmp_path / "README.md", licence="unlicense", force=True)
    write(folder, original=tmp_path / "README.md")
    data = ModelCard.load(folder / "README.md").data
    assert (data.license, data.language) == (licence, language)


@pytest.mark.parametrize("value", ["!!float 1e", "!!bool maybe", "!!timestamp x", "[" * 5000])
def test_front_matter_of_values_that_are_none(value: str, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(f"---\nlicense: {value}\n---\nThe text.\n")
    with pytest.raises(SourceError, match="front matter is no YAML"):
        card(folder, original=tmp_path / "README.md", force=True)


def test_several_licences_and_words_that_look_like_numbers(folder: Path, tmp_path: Path) -> None:
    """A reader of YAML 1.2, as the Hub is, takes 1e3 and 0o17 for numbers where they are not quoted."""
    original = tmp_path / "README.md"
    original.write_text("---\nlicense: [apache-2.0, mit]\nlicense_name: '0o17'\nlanguage:\t[en]\n---\nThe text.\n")
    with pytest.raises(UsageError, match=r"licence=mit: .* is under apache-2\.0 and mit, which"):
        card(folder, original=original, licence="mit", force=True)
    write(folder, original=original, quantized_by="1e3")
    text = (folder / "README.md").read_text()
    data = ModelCard(text).data
    assert (data.license, data.language) == (["apache-2.0", "mit"], ["en"])
    assert "\nlicense_name: '0o17'\n" in text
    assert "\nquantized_by: '1e3'\n" in text


@pytest.mark.parametrize(
    ("family", "task", "auto"),
    [
        ("llama", "text-generation", "AutoModelForCausalLM"),
        ("gemma3", "image-text-to-text", "AutoModelForImageTextToText"),
    ],
)
def test_what_takes_images_is_loaded_by_the_class_for_it(
    family: str, task: str, auto: str, make_model: MakeModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    if family == "llama":
        shutil.copytree(make_model(), folder)
    else:
        towers.write(folder, family, tokenizer)
    _, front, text = write(folder, repo=REPO, licence="mit")
    assert front["pipeline_tag"] == task
    assert f"from transformers import {auto}, AutoTokenizer" in text
    assert f'model = {auto}.from_pretrained("{REPO}"' in text


@pytest.mark.parametrize("front", ["license: {a: b}", "language: [[en]]", "pipeline_tag: 1.5"])
def test_front_matter_whose_values_are_no_words(front: str, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(f"---\n{front}\n---\n")
    with pytest.raises(
        SourceError, match=rf"has a {front.partition(':')[0]} that is neither a word nor a list of words"
    ):
        card(folder, original=tmp_path / "README.md")


def test_an_original_beside_other_weights_is_refused(folder: Path, make_model: MakeModel, tmp_path: Path) -> None:
    for seed, right in ((0, True), (5, False)):
        place = tmp_path / f"source{seed}"
        shutil.copytree(make_model("llama", num_key_value_heads=4, seed=seed), place)
        (place / "README.md").write_text(ORIGINAL)
        if right:
            assert card(folder, original=place).licence == "apache-2.0"
        else:
            with pytest.raises(UsageError, match=r"was made from another model\.safetensors than lies there"):
                card(folder, original=place, force=True)


def test_a_card_that_is_there_is_not_lost(folder: Path) -> None:
    (folder / "README.md").write_text(ORIGINAL)
    with pytest.raises(
        UsageError, match=r"README\.md already exists; force=True replaces it; original .* keeps it below"
    ):
        card(folder)
    assert (folder / "README.md").read_text() == ORIGINAL
    _, head, body = write(folder, original=folder / "README.md")
    assert head["license"] == "apache-2.0"
    assert "# Tiny, the original" in body
    with pytest.raises(UsageError, match=r"README\.md already exists; force=True replaces it$"):
        card(folder)
    with pytest.raises(UsageError, match="quantkit wrote this card"):
        card(folder, original=folder, force=True)
    _, _, body = write(folder, force=True)
    assert "Tiny, the original" not in body


def test_front_matter_that_is_no_yaml(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: [\n---\n")
    with pytest.raises(SourceError, match=r"README\.md: its front matter is no YAML"):
        card(folder, original=tmp_path)
    (tmp_path / "other").mkdir()
    with pytest.raises(UsageError, match="no card there"):
        card(folder, original=tmp_path / "other")


# -- prompts ---------------------------------------------------------------------------------------------------------


def test_prompt_templates(folder: Path, made: Path) -> None:
    _, _, body = write(folder)
    assert "<|im_start|>user\n{prompt}<|im_end|>" in body
    _, _, body = write(folder, prompt_template="vicuna", force=True)
    assert f"{STYLES['vicuna'].system} USER: {{prompt}} ASSISTANT:" in body
    assert "<|im_start|>user" not in body
    _, _, body = write(folder, prompt_template="none", force=True)
    assert "Prompt template" not in body
    (folder / "chat_template.jinja").unlink()
    _, _, body = write(folder, force=True)  # that of the calibration text, which was drawn with the chat template
    assert "Prompt template" not in body
    record = json.loads((folder / "quantkit.json").read_text())
    record["calibration"]["template"] = "vicuna"
    (folder / "quantkit.json").write_text(json.dumps(record))
    _, _, body = write(folder, force=True)
    assert "`vicuna`, the form that the calibration text has:" in body
    with pytest.raises(UsageError, match="the tokenizer has no chat template"):
        card(folder, prompt_template="chat", force=True)
    with pytest.raises(UsageError, match="prompt_template=chatml: choose auto, chat, vicuna"):
        card(folder, prompt_template="chatml", force=True)


# -- templates -------------------------------------------------------------------------------------------------------


def test_the_layout_of_2023(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(ORIGINAL)
    _, _, body = write(
        folder,
        template="thebloke-2023",
        repo=REPO,
        base_model=["someone/tiny"],
        siblings=["someone/tiny-GGML"],
        original=tmp_path / "README.md",
        prompt_template="vicuna",
    )
    heads = [line for line in body.splitlines() if line.startswith("#")]
    wanted = [
        "# tiny GPTQ",
        "## Other repositories available",
        "## Prompt Template: vicuna",
        "## Provided files, and GPTQ parameters",
        "## How to use it with transformers",
        "# Original model card: tiny",
    ]
    assert [head for head in heads if head in wanted] == wanted
    own = json.loads((folder / "quantkit.json").read_text())["evaluation"]["results"][1]
    line = next(
        line
        for line in body.splitlines()
        if line.startswith(f"| [main]({HUB}/tree/main) | 4 | 32 | No | 0.05 | data.jsonl | 32 |")
    )
    told = f"{number(own['kl_divergence']['mean'])} ± {number(own['kl_divergence_stderr'])}"
    assert line.split("|")[10].strip() == told
    assert "\ntransformers (with gptqmodel and optimum):\n" in body


def test_tables_are_whole(files: Path, folder: Path, tmp_path: Path) -> None:
    """Every row has the columns of its head, in both layouts."""
    for template in ("default", "thebloke-2023"):
        for place in (files, folder):
            weights = place / ("tiny.Q4_0.gguf" if place == files else "model.safetensors")
            found = report(tmp_path / "r", row("x", weights, 12, 0.1))
            _, _, body = write(place, template=template, reports=[found], force=True)
            for table in re.findall(r"(?:^\|.*\n)+", body, re.MULTILINE):
                assert len({line.count("|") - line.count("\\|") for line in table.splitlines()}) == 1, table
            assert "\n\n\n" not in body.partition("## Loading")[0]


def test_a_template_of_ones_own(folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "mine.md.j2"
    place.write_text(
        "{{ title }}: {% for model in models %}{{ model.bits }} bits, {{ model.bytes | size }}{% endfor %}\n"
    )
    _, _, body = write(folder, template=str(place), repo=REPO)
    assert re.search(r"\ntiny-GPTQ: 4 bits, [\d.]+ kB\n$", body)


def test_numbers_keep_their_digits() -> None:
    template = (
        "{{ 0.2 | number(3) }} {{ 39.18 | number(5) }} {{ 123456.7 | number(3) }} {{ 1e-7 | number(2, sign=True) }}"
    )
    assert fill_template(template, "x", {}) == "0.200 39.180 123457 +1.0e-07"


@pytest.mark.parametrize(
    ("text", "line", "why"),
    [
        ("fine\n{{ modles }}\n", 2, "'modles' is undefined"),
        ("fine\n\n{% if %}\n", 3, "Expected an expression"),
        ("{{ title.__class__.__mro__ }}\n", 1, "unsafe"),
        ("a\nb\n{{ 1 / 0 }}\n", 3, "division by zero"),
    ],
)
def test_an_error_in_a_template_names_its_line(folder: Path, tmp_path: Path, text: str, line: int, why: str) -> None:
    place = tmp_path / "mine.md.j2"
    place.write_text(text)
    with pytest.raises(UsageError, match=rf"mine\.md\.j2, line {line}: .*{why}"):
        card(folder, template=str(place))
    assert not (folder / "README.md").exists()


def test_a_template_that_is_not_there(folder: Path) -> None:
    with pytest.raises(UsageError, match="template=nice: choose default, thebloke-2023, or name a file"):
        card(folder, template="nice")


# -- what is for the Hub alone ----------------------------------------------------------------------------------------


def test_results_for_the_hub_go_and_come_with_the_card(folder: Path, tmp_path: Path) -> None:
    results = evaluated(tmp_path / "e.json", folder / "model.safetensors")
    place = folder / ".eval_results"
    place.mkdir()
    (place / "mine.yaml").write_text("- mine\n")
    write(folder, evals=[results], repo=REPO)
    (entry,) = parse_eval_result_entries(yaml.safe_load((place / "main.yaml").read_text()))
    assert (entry.dataset_id, entry.task_id, entry.value) == ("allenai/ai2_arc", "ARC-Challenge", 57.25255972696246)
    assert (entry.source_name, entry.notes) == ("lm-evaluation-harness 0.4.9", "acc_norm, 25-shot")
    assert sorted(local_files(folder)) == sorted(
        [
            *(path.name for path in folder.iterdir() if path.is_file()),
            ".eval_results/main.yaml",
            ".eval_results/mine.yaml",
        ]
    )
    write(folder, repo=REPO, force=True)  # without results
    assert [path.name for path in place.iterdir()] == ["mine.yaml"]
    (place / "main.yaml").write_text("- mine too\n")
    (folder / "README.md").unlink()
    with pytest.raises(UsageError, match=r"main\.yaml already exists and is not quantkit's"):
        card(folder, evals=[results], repo=REPO)
    assert not (folder / "README.md").exists()


@pytest.mark.parametrize(
    ("kl", "quality", "marks"),
    [
        ((0.002, 0.2), ("indistinguishable", "usable"), ("recommended", "smallest usable")),
        ((0.03, 0.04), ("good", "good"), ("", "recommended")),
        ((0.2, 0.5), ("usable", "poor"), ("smallest usable", "")),
        ((0.4, 0.5), ("poor", "poor"), ("", "")),
    ],
)
def test_quality_in_words(kl: tuple[float, float], quality: tuple[str, str], marks: tuple[str, str]) -> None:
    facts = [cast(ModelFacts, SimpleNamespace(bytes=size)) for size in (200, 100)]
    measured = [Measurements((cast(Loss, SimpleNamespace(kl_divergence={"mean": mean})),), ()) for mean in kl]
    found = advice(facts, measured, Limits())
    assert tuple(one.quality for one in found) == quality
    assert tuple(one.mark for one in found) == marks
    within = advice(facts, measured, Limits(budget=150))  # what fits, whatever its quality
    assert [one.mark for one in within][1] == "recommended"
    assert within[1].why == "what diverges least within 150 bytes"
    assert advice(facts[:1], measured[:1], Limits())[0].mark == ""  # nothing to choose from


@pytest.mark.parametrize(("template", "best"), [("default", "**recommended**"), ("thebloke-2023", "recommended")])
def test_the_smallest_usable_file_is_called_so_once(files: Path, tmp_path: Path, template: str, best: str) -> None:
    rows = (
        row("q", files / "tiny.Q4_0.gguf", 12, 0.2),
        row("f", files / "tiny.F16.gguf", 12, 0.002),
    )
    _, _, body = write(files, template=template, reports=[report(tmp_path / "r", *rows)])
    ends = {
        name: next(line for line in body.splitlines() if line.startswith("|") and name in line).split("|")[-2].strip()
        for name in ("Q4_0.gguf", "F16.gguf")
    }
    assert ends == {"Q4_0.gguf": "smallest usable", "F16.gguf": f"indistinguishable, {best}"}


# -- the file --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", ["default", "thebloke-2023"])
def test_equal_facts_give_equal_bytes_without_paths(folder: Path, tmp_path: Path, template: str) -> None:
    place = report(tmp_path / "r", row("x", folder / "model.safetensors", 12, 0.1), plots=("kl.png",))
    other = Path(shutil.copytree(folder, tmp_path / "elsewhere" / "tiny-GPTQ"))
    contents = []
    for where in (folder, other):
        write(where, template=template, reports=[place])
        contents.append((where / "README.md").read_bytes())
    assert contents[0] == contents[1]
    assert str(tmp_path).encode() not in contents[0]
    assert b"/tmp" not in contents[0]
    assert sorted(path.name for path in folder.iterdir() if path.name.startswith(".")) == []


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such folder"):
        card(tmp_path / "nothing")
    (tmp_path / "x.txt").write_text("x")
    with pytest.raises(UsageError, match="no model here"):
        card(tmp_path)


def test_the_command(
    folder: Path,
    made: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    run: Callable[..., tuple[int, str, str]],
) -> None:
    place = report(tmp_path / "r", row("x", folder / "model.safetensors", 12, 0.1))
    arguments = ["card", folder, "--report", place, "--repo", REPO, "--licence", "mit", "--sibling", "a/b"]
    code, out, err = run(*arguments, "--with-branch", f"other={made}", "--quantized-by", "someone", "--json")
    assert code == 0
    assert json.loads(out)["models"] == ["tiny-GPTQ", "tiny-GPTQ"]
    assert "the card does not say which model it was made from" in err
    assert "quantized_by: someone" in (folder / "README.md").read_text()
    code, out, err = run(*arguments)
    assert code == 2
    assert "--force replaces it" in err
    code, out, err = run(*arguments, "--force")
    assert code == 0
    assert "1 of 1 measured" in out
    assert run(*arguments, "--with-branch", "other")[0] == 2


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Exit code, stdout and stderr of a command."""

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            cli.main([*map(str, arguments)])
        return (int(exit.value.code or 0), *capsys.readouterr())

    return call


def test_names_are_quoted_for_where_they_stand() -> None:
    hostile = 'a`b|c"; $(touch x) <img src=x> [l](u)\n\x1b[31m'
    text = "{{ n | code }}\n{{ n | cell }}\n{{ f | fence }}"
    code, cell, fence = fill_template(text, "t", {"n": hostile, "f": "a\n````\nb"}).splitlines()
    assert code == '`` a`b\\|c"; $(touch x) <img src=x> [l](u) \\x1b[31m ``'
    assert cell == 'a\\`b\\|c"; $(touch x) \\<img src=x\\> \\[l\\](u) \\\\x1b\\[31m'
    assert fence == "`````"
    assert (
        fill_template(text, "t", {"n": "plain_name-1.gguf", "f": "x"}) == "`plain_name-1.gguf`\nplain_name-1.gguf\n```"
    )
    load = Load("llama.cpp", True)
    loads = load, Load("ctransformers", True)
    facts = SimpleNamespace(
        name="m", branch="main", is_file=True, files={hostile: "0"}, loads=loads, scheme="Q4_0", sees=False
    )
    found = {hint.program: hint.code for hint in hints([cast(ModelFacts, facts)], "o/it's", "s")}
    words = shlex.split(found["llama.cpp"].splitlines()[0])
    assert words == ["llama-server", "-hf", "o/it's", "--hf-file", visible(hostile)]
    parsed = ast.parse(found["ctransformers"])
    strings = [node.value for node in ast.walk(parsed) if isinstance(node, ast.Constant)]
    assert hostile in strings
    assert "o/it's" in strings


@pytest.mark.parametrize(
    ("recipe", "more", "commands"),
    [
        ({"repack": "awq", "group_size": None}, {}, ["quantkit repack m --to awq"]),
        ({"dtype": "bfloat16"}, {}, ["quantkit convert m --dtype bfloat16"]),
        ({"method": "round", "bits": 3}, {"calibration": {}}, ["quantkit gptq m --method round --bits 3"]),
        (
            {"bits": None, "group_size": None, "budget": "4.5bpw", "budget_for": "vllm", "token_weights": True},
            {},
            ["quantkit gptq m --budget 4.5bpw --budget-for vllm"],
        ),
        (
            {"bits": 3, "token_weights": True, "row_feedback": True, "correct": "auto"},
            {},
            ["quantkit gptq m --effort best --bits 3"],
        ),
        ({"bits": 3, "token_weights": True, "correct": 0.5}, {}, ["quantkit gptq m --bits 3 --correct 0.5"]),
        ({"bits": 3, "correct": "auto"}, {}, ["quantkit gptq m --effort fast --bits 3 --correct auto"]),
        ({"type": "q4_k_m", "imatrix": None}, {}, ["quantkit ggml m --type q4_k_m --imatrix i.gguf"]),
        (
            {"bits": 4, "ggml": 5},
            {"written": {}, "calibration": 3},
            ["quantkit gptq m --ggml 5 --effort fast --bits 4"],
        ),
        (
            {"bits": 4, "ggml": "q4_1"},
            {"written": {"type": "q4_1", "container": "ggjt"}},
            [
                "quantkit gptq m --ggml q4_1 --effort fast --bits 4 --out CODES-Q4_1",  # beside those of other types
                "quantkit ggml CODES-Q4_1/m-GPTQ-Q4_1.gguf --type q4_1 --container ggjt",
            ],
        ),
        ({"neither": 1}, {}, []),
    ],
)
def test_commands_of_a_record(recipe: dict[str, Any], more: dict[str, Any], commands: list[str]) -> None:
    assert commands_of({"source": {"model": "m"}, "recipe": recipe, **more}, "i.gguf") == commands
