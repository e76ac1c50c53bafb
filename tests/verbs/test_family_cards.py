"""card: the cards of a family as a release leaves it, at a real width: merged, GPTQ and GGUF, in both layouts."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from gguf import GGUFReader
from huggingface_hub import ModelCard, parse_eval_result_entries
from support.recipes import write_recipe
from support.wizard import wizard

import quantkit
from quantkit.cli import app as cli
from quantkit.containers import is_imatrix
from quantkit.verbs.eval.tasks import SUITES

RECIPE = """
name: Tiny-Wizard
source: {base: llama, delta: wizard-delta, vocab: mean, dtype: float16}
calibration: {samples: 2, seq_len: 64, template: vicuna}
evaluation: {texts: [text.txt], seq_len: 64, max_kl: 0.4}
variants:
  - {kind: gptq, bits: 8, group_size: 128}
  - {kind: gguf, type: q4_k_m}
  - {kind: gguf, type: q5_k_m, method: round, imatrix: true}
  - {kind: gguf, type: q8_0}
card: {licence: other, prompt_template: vicuna, base_model: [someone/wizard]}
publish: {owner: someone}
"""
PLACES = {"HF": "Tiny-Wizard", "GPTQ": "Tiny-Wizard-GPTQ-8bit-128g", "GGUF": "Tiny-Wizard-GGUF"}
# Of the card of 2023 that the layout is of: data set, its config, split and value.
LEADERBOARD = {
    "arc_challenge": ("allenai/ai2_arc", "ARC-Challenge", "test", 0.5725),
    "hellaswag": ("Rowan/hellaswag", None, "validation", 0.8088),
    "mmlu": ("cais/mmlu", "all", "test", 0.5290),
    "truthfulqa_mc2": ("truthfulqa/truthful_qa", "multiple_choice", "validation", 0.5055),
    "winogrande": ("allenai/winogrande", "winogrande_xl", "validation", 0.7411),
    "gsm8k": ("openai/gsm8k", "main", "test", 0.1387),
}


@dataclass
class Card:
    folder: Path
    head: dict[str, Any]
    body: str

    def part(self, head: str) -> str:
        """What stands under a heading."""
        return re.split(r"^##+ ", self.body.partition(f"\n{head}\n")[2], maxsplit=1, flags=re.MULTILINE)[0]


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("family")
    wizard(folder, hidden_size=256, head_dim=64, intermediate_size=768)
    report = quantkit.release(write_recipe(folder, RECIPE), folder / "out", publishing=False)
    assert {outcome.status for outcome in report.outcomes} == {"done"}, report.outcomes
    return folder / "out"


def scores(place: Path, file: Path, share: float = 1.0) -> Path:
    """Results of `eval` of a file: those of the card of 2023, or a share of each."""
    titled = {measure.task: measure for measure in SUITES["open-llm-leaderboard"]}
    tasks = [
        {
            "task": task,
            "name": titled[task].title,
            "dataset": dataset,
            "config": config,
            "split": split,
            "fewshot": titled[task].fewshot,
            "metric": titled[task].metric,
            "value": share * value,
            "stderr": 0.01,
            "questions": 100,
        }
        for task, (dataset, config, split, value) in LEADERBOARD.items()
    ]
    content = {
        "quantkit": "0.1.0",
        "model": "x",
        "files": {"w": hashlib.sha256(file.read_bytes()).hexdigest()},
        "harness": {"name": "lm-evaluation-harness", "version": "0.4.9"},
        "kernels": None,
        "suite": "open-llm-leaderboard",
        "limit": None,
        "partial": False,
        "tasks": tasks,
        "average": sum(task["value"] for task in tasks) / len(tasks),
    }
    place.write_text(json.dumps(content))
    return place


def write(family: Path, kind: str, template: str, work: Path, **options: Any) -> Card:
    """The card of one repository, with results of its first model and of the one that it was made from."""
    folder, full = family / PLACES[kind], family / "Tiny-Wizard" / "model.safetensors"
    own = {"HF": full, "GPTQ": folder / "model.safetensors", "GGUF": folder / "Tiny-Wizard-Q4_K_M.gguf"}[kind]
    evals = [scores(work / "full.json", full)]
    evals += [] if kind == "HF" else [scores(work / "own.json", own, 0.98)]
    (work / "original.md").write_text("---\nlicense: other\n---\n# The original\n\nIts text.\n")
    given = {
        "reports": [family / "report" / "report.json"],
        "evals": evals,
        "repo": f"someone/Tiny-Wizard-{kind}",
        "base_model": ["someone/wizard"],
        "siblings": [f"someone/Tiny-Wizard-{other}" for other in PLACES if other != kind],
        "original": work / "original.md",
        "prompt_template": "vicuna",
    }
    quantkit.card(folder, template=template, force=True, **{**given, **options})
    content = (folder / "README.md").read_text(encoding="utf-8")
    assert ModelCard(content).data.license == "other"
    _, head, body = content.split("---\n", 2)
    return Card(folder, yaml.safe_load(head), body)


@pytest.mark.parametrize("kind", PLACES)
def test_the_layout_of_2023_ends_with_the_leaderboard(family: Path, tmp_path: Path, kind: str) -> None:
    card = write(family, kind, "thebloke-2023", tmp_path)
    heads = re.findall(r"^#+ .*$", card.body, re.MULTILINE)
    table = {"HF": [], "GPTQ": ["## Provided files, and GPTQ parameters"], "GGUF": ["## Provided files"]}[kind]
    program = {"HF": "vLLM", "GPTQ": "vLLM", "GGUF": "llama.cpp"}[kind]
    wanted = [
        f"# Tiny-Wizard {'fp16' if kind == 'HF' else kind}",
        "## Other repositories available",
        "## Prompt Template: vicuna",
        *table,
        f"## How to use it with {program}",
        "## Provenance",
        "# Original model card: wizard",
        "# The original",
        "# Open LLM Leaderboard Evaluation Results",
    ]
    assert [head for head in heads if head in wanted] == wanted
    assert heads[-1] == wanted[-1]
    said = "They are the sum" if kind == "HF" else "They were made from the sum"
    assert f"{said} of a base and a delta: llama plus wizard-delta" in card.body
    share = 1.0 if kind == "HF" else 0.98
    values = [share * value for *_, value in LEADERBOARD.values()]
    rows = [line.split("|") for line in card.body.rstrip().splitlines()[-9:]]
    assert rows[0] == ["", " Metric ", "Value", ""] or rows[1] == ["", " Metric ", "Value", ""]
    shown = [float(row[2]) for row in rows[-7:]]
    assert shown == pytest.approx([100 * sum(values) / 6, *(100 * value for value in values)], abs=0.006)
    assert card.head["inference"] is False
    (entry,) = [one for one in card.head["model-index"] if len(one["results"]) > 1]
    found = {one["dataset"]["name"]: one for one in entry["results"][1:]}
    configs = [one["dataset"].get("config") for one in found.values()]
    assert configs == [config for _, config, *_ in LEADERBOARD.values()]
    names = [one["metrics"][0].get("name") for one in found.values()]
    assert names == ["normalized accuracy", "normalized accuracy", "accuracy", None, "accuracy", "accuracy"]
    assert all(one["task"] == {"type": "text-generation", "name": "Text Generation"} for one in found.values())
    first = found["AI2 Reasoning Challenge (25-Shot)"]
    assert first["metrics"][0]["value"] == pytest.approx(57.25 * share)
    assert first["dataset"]["args"] == {"num_few_shot": 25}


@pytest.mark.parametrize("kind", PLACES)
def test_todays_card_holds_what_people_look_for(family: Path, tmp_path: Path, kind: str) -> None:
    card = write(family, kind, "default", tmp_path)
    assert "inference" not in card.head
    assert card.head["base_model"] == "someone/wizard"
    assert card.head["base_model_relation"] == ("merge" if kind == "HF" else "quantized")
    tasks = card.part("## Tasks")
    if kind == "HF":
        assert "baseline" not in tasks  # it is the baseline
    else:
        assert "| AI2 Reasoning Challenge (25-Shot) | acc_norm | 56.11 | 1.00 | 57.25 | 98.0 % |" in tasks
        assert "| average | | 53.83 | | 54.93 | 98.0 % |" in tasks
        assert "against Tiny-Wizard, float16:" in card.body
    (results,) = (card.folder / ".eval_results").iterdir()
    entries = parse_eval_result_entries(yaml.safe_load(results.read_text()))
    assert [entry.dataset_id for entry in entries] == [dataset for dataset, *_ in LEADERBOARD.values()]
    assert entries[0].value == pytest.approx(57.25 if kind == "HF" else 56.105)
    made = card.part("## Where it comes from")
    command = {
        "HF": "`quantkit merge llama wizard-delta --dtype float16 --vocab mean`",
        "GPTQ": "`quantkit gptq Tiny-Wizard --bits 8 --group-size 128 --sym --samples 2 --seq-len 64",
        "GGUF": "`quantkit ggml Tiny-Wizard --type q5_k_m",
    }[kind]
    assert f"made by {command}" in made
    merged = json.loads((family / "Tiny-Wizard" / "quantkit.json").read_text())["source"]
    assert "The weights are the sum of a base and a delta: llama plus wizard-delta." in card.body
    for role in ("base", "delta"):
        for file, sha256 in merged[role]["sha256"].items():
            assert f"from {merged[role]['model']}, `{file}`: SHA-256 `{sha256}`" in made
    assert "full precision" not in card.body.lower()
    assert "USER: Why is the sea salty? ASSISTANT:" in card.part("## Loading it")


def test_files_have_links_advice_and_the_types_that_they_hold(family: Path, tmp_path: Path) -> None:
    card = write(family, "GGUF", "default", tmp_path)
    rows = {
        cells[1].strip("` []").partition("`")[0]: [cell.strip() for cell in cells[2:-1]]
        for line in card.part("## Files").splitlines()
        if len(cells := line.split("|")) > 5
    }
    report = json.loads((family / "report" / "report.json").read_text())
    assert (report["budget"], report["max_kl"]) == (None, 0.4)
    kept = [model for model in report["models"] if model["kind"] == "gguf"]
    kl = {model["model"]: model["texts"]["text.txt"]["kl_divergence"]["mean"] for model in kept}
    small = min((model for model in kept if kl[model["model"]] <= 0.4), key=lambda model: model["bytes"])
    for name in ("Q4_K_M", "Q5_K_M", "Q8_0"):
        row = rows[f"Tiny-Wizard-{name}.gguf"]
        assert ("**recommended**" in row[-1]) == (f"Tiny-Wizard-{name}" in small["model"]), (row, small["model"])
    assert rows["Tiny-Wizard-Q4_K_M.gguf"][0] == "Q4_K_M: 13 Q4_K, 3 Q6_K"
    assert rows["Tiny-Wizard-Q8_0.gguf"][0] == "Q8_0"
    assert rows["Tiny-Wizard-Q8_0.gguf"][-1].startswith("indistinguishable")
    assert "Recommended is the smallest with a mean KL divergence of 0.4 or less." in card.body
    link = "https://huggingface.co/someone/Tiny-Wizard-GGUF/blob/main/Tiny-Wizard-Q8_0.gguf"
    assert f"[`Tiny-Wizard-Q8_0.gguf`]({link})" in card.body


def test_gguf_files_are_run_by_what_people_have(family: Path, tmp_path: Path) -> None:
    card = write(family, "GGUF", "default", tmp_path)
    programs = re.findall(r"^\*\*(.*?)\*\*", card.part("## Loading it"), re.MULTILINE)
    assert programs[:4] == ["llama.cpp", "Ollama", "LM Studio", "vLLM"]
    tag = "Q5_K_M" if "llama-server -hf someone/Tiny-Wizard-GGUF:Q5_K_M" in card.body else "Q8_0"
    assert f"\nllama-server -hf someone/Tiny-Wizard-GGUF:{tag}\n" in card.body
    assert f"\nollama run hf.co/someone/Tiny-Wizard-GGUF:{tag}\n" in card.body
    assert f"\nlms get someone/Tiny-Wizard-GGUF@{tag}\n" in card.body
    serve = f"vllm serve someone/Tiny-Wizard-GGUF:{tag} --tokenizer someone/wizard"
    assert f"\npip install vllm-gguf-plugin\n{serve}\n" in card.body


def test_the_importance_matrix_goes_with_the_files(family: Path, tmp_path: Path) -> None:
    folder = family / PLACES["GGUF"]
    assert is_imatrix(folder / "Tiny-Wizard-imatrix.gguf")
    assert "Tiny-Wizard-imatrix.gguf" in json.loads((folder / "quantkit.json").read_text())["files"]
    report = quantkit.verify(folder, generate=False)
    assert (report.problems, len(report.models)) == ([], 3)
    assert "`Tiny-Wizard-imatrix.gguf`: the importance matrix" in write(family, "GGUF", "default", tmp_path).body


@pytest.mark.parametrize("template", ["default", "thebloke-2023"])
def test_numbers_have_the_digits_and_standard_errors_of_the_report(family: Path, tmp_path: Path, template: str) -> None:
    body = write(family, "GGUF", template, tmp_path).body
    told = (family / "report" / "report.md").read_text().splitlines()
    for name in ("Q4_K_M", "Q5_K_M", "Q8_0"):
        cells = next(line for line in told if line.startswith(f"| Tiny-Wizard-{name}")).split("|")
        row = next(line for line in body.splitlines() if f"Tiny-Wizard-{name}.gguf" in line and " ± " in line)
        kl, top1, change = cells[3].strip(), cells[9].strip(), cells[10].strip()
        assert kl.count(" ± ") == top1.count(" ± ") == 1
        assert f"| {kl} |" in row
        assert f"| {change} |" in row
        assert (f"| {top1} |" in row) == (template == "default")


def test_commands_make_the_files_again(family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of every card, one after the other, in a folder that has nothing but base and delta."""
    for name in ("llama", "wizard-delta"):
        (tmp_path / name).symlink_to(family.parent / name)
    monkeypatch.chdir(tmp_path)
    for kind in PLACES:
        made = write(family, kind, "default", tmp_path).part("## Where it comes from")
        for command in re.findall(r"made by `quantkit (.*)`", made):
            name = ["--out", "Tiny-Wizard"] if kind == "HF" else []  # as the recipe calls it
            with pytest.raises(SystemExit) as ended:
                cli.main([*shlex.split(command), *name, "--quiet", *(["--no-eval"] if "gptq" in command else [])])
            assert ended.value.code == 0, command
    for name in ("Tiny-Wizard", PLACES["GPTQ"]):
        assert (Path(name) / "model.safetensors").read_bytes() == (family / name / "model.safetensors").read_bytes()
    weights = Path("Tiny-Wizard-imatrix.gguf")
    assert weights.read_bytes() == (family / PLACES["GGUF"] / weights).read_bytes()
    found = {place.name.removeprefix("Tiny-Wizard-").removeprefix("GPTQ-"): place for place in Path().rglob("*.gguf")}
    for name in ("Q4_K_M", "Q5_K_M", "Q8_0"):
        again, file = found[f"{name}.gguf"], family / PLACES["GGUF"] / f"Tiny-Wizard-{name}.gguf"
        # What the reference's own card says, its licence and base, is in the new one's keys too.
        old, new = (GGUFReader(path).tensors for path in (file, again))
        assert [tensor.name for tensor in old] == [tensor.name for tensor in new]
        assert all(bytes(one.data) == bytes(other.data) for one, other in zip(old, new, strict=True)), name


def test_a_file_that_an_importance_matrix_rounded_says_by_which(family: Path, tmp_path: Path) -> None:
    made = write(family, "GGUF", "default", tmp_path).part("## Where it comes from")
    (named,) = re.findall(r"columns weighed by (.*)", made)
    assert named == "`Tiny-Wizard-imatrix.gguf`, made on evol-instruct-sample in 2 windows"
    assert (family / PLACES["GGUF"] / "Tiny-Wizard-imatrix.gguf").is_file()
    drawn = json.loads((family / PLACES["GPTQ"] / "quantkit.json").read_text())["calibration"]
    assert made.count(drawn["tokens_sha256"]) == 3  # the two files of GPTQ's codes, and this one


def test_a_card_of_2023_of_a_folder_is_called_after_the_model(family: Path, tmp_path: Path) -> None:
    body = write(family, "GPTQ", "thebloke-2023", tmp_path, repo=None).body
    assert "\n# Tiny-Wizard GPTQ\n" in body


def test_the_models_own_chat_template_is_used(family: Path, tmp_path: Path) -> None:
    folder = family / PLACES["GPTQ"]
    (folder / "chat_template.jinja").write_text("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<a>")
    try:
        loading = write(family, "GPTQ", "default", tmp_path, prompt_template=None).part("## Loading it")
    finally:
        (folder / "chat_template.jinja").unlink()
    assert 'messages = [{"role": "user", "content": "Why is the sea salty?"}]' in loading
    assert "tokenizer.apply_chat_template(" in loading
    assert "/v1/chat/completions" in loading


def test_what_was_rounded_before_is_called_so(family: Path, tmp_path: Path) -> None:
    quantkit.convert(family / PLACES["GGUF"] / "Tiny-Wizard-Q8_0.gguf", tmp_path / "back", dtype="float16")
    quantkit.card(tmp_path / "back")
    content = (tmp_path / "back" / "README.md").read_text()
    assert "Weights in float16 from Q8_0" in content
    assert "| `main` | float16 from Q8_0 |" in content
    variant = family / PLACES["GGUF"] / "Tiny-Wizard-Q4_K_M.gguf"
    text = str(family.parent / "text.txt")
    found = quantkit.compare(tmp_path / "back", [variant], tmp_path / "report", texts=[text], seq_len=64, plots=False)
    assert next(iter(found.lines())) == "reference: back, float16 from Q8_0"
    assert "(reference, float16 from Q8_0)" in (tmp_path / "report" / "report.md").read_text()
    assert "(reference, float16 from Q8_0)" in (tmp_path / "report" / "report.html").read_text()
