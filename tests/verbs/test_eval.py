"""The verb `eval` and `--model quantkit`, against the harness's own class `hf` on the same weights."""

from __future__ import annotations

import importlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeModel, Recorder
from support.tasks import TASK
from support.tolerance import longest_path, rounding

import quantkit
from quantkit import harness
from quantkit.cli import app as cli
from quantkit.errors import MissingPackageError, QuantkitError, UsageError
from quantkit.runs.atomic import file_sha256
from quantkit.sources import open_source
from quantkit.tokens import TokenMatrix
from quantkit.verbs.eval import EvalReport
from quantkit.verbs.eval.code import check_tasks
from quantkit.verbs.eval.tasks import SUITES

pytest.importorskip("lm_eval", reason="pip install 'quantkit[eval]'")
pytestmark = pytest.mark.filterwarnings("ignore")

TEXT = "the quick brown fox jumps over lazy dog while user asks assistant question sea moon tides follow answer"
WORDS = TEXT.split()
CHOICE = """task: tiny_choice
dataset_path: json
dataset_kwargs:
  data_files:
    test: questions.jsonl
    train: examples.jsonl
output_type: multiple_choice
training_split: train
test_split: test
fewshot_split: train
num_fewshot: 2
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_choice: "{{choices}}"
doc_to_target: "{{label}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
  - metric: acc_norm
    aggregation: mean
    higher_is_better: true
"""
WRITE = """task: tiny_write
dataset_path: json
dataset_kwargs:
  data_files:
    test: questions.jsonl
output_type: generate_until
test_split: test
doc_to_text: "{{question}}"
doc_to_target: "{{label}}"
generation_kwargs:
  until: ["\\n\\n"]
  max_gen_toks: 6
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
filter_list:
  - name: any-number
    filter:
      - function: regex
        regex_pattern: "([0-9]+)"
      - function: take_first
"""
PERPLEXITY = """task: tiny_rolling
dataset_path: json
dataset_kwargs:
  data_files:
    test: questions.jsonl
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list:
  - metric: word_perplexity
    higher_is_better: false
"""
GROUP = """group: tiny_group
task: [tiny_choice, tiny_write]
"""


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The data library's cache in a folder of the tests' own, and no network."""
    import datasets
    from huggingface_hub import constants

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        yield


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of tasks with local data."""
    folder = tmp_path_factory.mktemp("tasks")
    generator = torch.Generator().manual_seed(0)

    def words(count: int) -> str:
        return " ".join(WORDS[int(i)] for i in torch.randint(len(WORDS), (count,), generator=generator))

    for name, count in (("questions", 24), ("examples", 6)):
        rows = [
            {"question": words(5), "choices": [words(1), words(2), words(4)], "label": number % 3}
            for number in range(count)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for name, text in (("choice", CHOICE), ("write", WRITE), ("rolling", PERPLEXITY), ("group", GROUP)):
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def model(make_model: MakeModel) -> Path:
    return make_model("llama", dtype="float32")


def theirs(folder: Path, tasks: Path, names: list[str], monkeypatch: pytest.MonkeyPatch, **options: Any) -> Any:
    """The harness's own results with its own class."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    monkeypatch.chdir(tasks)
    return simple_evaluate(
        model="hf",
        model_args={"pretrained": str(folder), "dtype": "float32", "device": "cpu"},
        tasks=names,
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        log_samples=False,
        **{"batch_size": 4, **options},
    )["results"]


def run(model: Path, out: Path, **options: Any) -> EvalReport:
    return quantkit.eval(model, out=out, device="cpu", **options)


def test_the_model_is_opened_once(model: Path, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []

    def counted(name: Any, *rest: Any) -> Any:
        opened.append(str(name))
        return open_source(name, *rest)

    monkeypatch.setattr("quantkit.blocks.open.open_source", counted)
    run(model, tmp_path / "r.json", task=["tiny_choice"], tasks_dir=tasks, limit=1)
    assert opened == [str(model)]


# -- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 5])
def test_numbers_are_the_harnesss_own(
    batch_size: int, model: Path, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recorder: Recorder
) -> None:
    names = ["tiny_choice", "tiny_write", "tiny_rolling"]
    report = run(model, tmp_path / "r.json", task=names, tasks_dir=tasks, batch_size=batch_size, progress=recorder)
    expected = theirs(model, tasks, names, monkeypatch)
    found = {(task.task, task.metric): task for task in report.tasks}
    assert {key: task.value for key, task in found.items()} == pytest.approx(
        {
            ("tiny_choice", "acc"): expected["tiny_choice"]["acc,none"],
            ("tiny_choice", "acc_norm"): expected["tiny_choice"]["acc_norm,none"],
            ("tiny_write", "exact_match,any-number"): expected["tiny_write"]["exact_match,any-number"],
            ("tiny_rolling", "word_perplexity"): expected["tiny_rolling"]["word_perplexity,none"],
        },
        rel=rounding(longest_path(256)),  # both in float32, in batches of other sizes
    )
    assert found["tiny_choice", "acc"].stderr == expected["tiny_choice"]["acc_stderr,none"]
    assert 0 < found["tiny_choice", "acc"].value < 1
    choice = found["tiny_choice", "acc_norm"]
    assert (choice.fewshot, choice.split, choice.dataset, choice.questions) == (2, "test", None, 24)
    assert recorder.phases[:2] == ["loading tasks", "loading"]
    assert sorted(recorder.phases[2:]) == ["answering", "scoring", "scoring texts"]
    assert report.average is None


def test_examples_before_a_question_can_be_chosen(
    model: Path, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {}
    for count in (0, 4):
        report = run(model, tmp_path / f"{count}.json", task=["tiny_choice"], tasks_dir=tasks, fewshot=count)
        expected = theirs(model, tasks, ["tiny_choice"], monkeypatch, num_fewshot=count)
        values[count] = [task.value for task in report.tasks]
        assert values[count] == [expected["tiny_choice"][key] for key in ("acc,none", "acc_norm,none")]
        assert {task.fewshot for task in report.tasks} == {count}


def test_a_gptq_folder_and_a_gguf_file(
    model: Path, tasks: Path, tiny_gguf: Path, tiny_tokens: TokenMatrix, tmp_path: Path, monkeypatch: Any
) -> None:
    quantkit.gptq(model, tmp_path / "q", calibration=tiny_tokens, group_size=32, evaluate=False)
    for variant in (tmp_path / "q", tiny_gguf):
        quantkit.convert(variant, tmp_path / "plain", dtype="float32", force=True)
        expected = theirs(tmp_path / "plain", tasks, ["tiny_choice"], monkeypatch)["tiny_choice"]
        report = run(variant, tmp_path / "r.json", task=["tiny_choice"], tasks_dir=tasks, force=True)
        assert [task.value for task in report.tasks] == [expected["acc,none"], expected["acc_norm,none"]]


def test_a_base_and_its_delta(make_model: MakeModel, model: Path, tasks: Path, tmp_path: Path) -> None:
    tuned = make_model("llama", dtype="float32", seed=1)
    quantkit.diff(model, tuned, tmp_path / "delta")
    pair = quantkit.eval(
        out=tmp_path / "pair.json", base=model, delta=tmp_path / "delta", task=["tiny_choice"], tasks_dir=tasks
    )
    whole = run(tuned, tmp_path / "whole.json", task=["tiny_choice"], tasks_dir=tasks)
    assert pair.tasks == whole.tasks
    assert set(pair.files) == {"base/model.safetensors", "delta/model.safetensors"}


def test_a_group_has_the_numbers_of_its_tasks(model: Path, tasks: Path, tmp_path: Path) -> None:
    group = run(model, tmp_path / "g.json", task=["tiny_group"], tasks_dir=tasks)
    apart = run(model, tmp_path / "a.json", task=["tiny_choice", "tiny_write"], tasks_dir=tasks)
    assert group.tasks == apart.tasks


# -- the file of results ---------------------------------------------------------------------------------------------


def test_the_file_of_results(model: Path, tasks: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "r.json"
    report = run(model, out, task=["tiny_choice"], tasks_dir=tasks)
    held = json.loads(out.read_text(encoding="utf-8"))
    assert held == {key: value for key, value in report.as_dict().items() if key not in ("out", "seconds")}
    assert list(held) == [
        "quantkit", "model", "files", "harness", "kernels", "suite", "limit", "partial", "tasks", "average",
    ]  # fmt: skip
    assert held["files"] == {"model.safetensors": file_sha256(model / "model.safetensors")}
    assert held["harness"]["name"] == "lm-evaluation-harness"
    assert (held["suite"], held["limit"], held["partial"], held["average"]) == (None, None, False, None)
    assert {"task", "name", "dataset", "split", "fewshot", "metric", "value", "stderr"} < held["tasks"][0].keys()
    assert not any(str(folder) in out.read_text() for folder in (tmp_path, tasks, model))
    with pytest.raises(UsageError, match=r"r.json already exists; use force=True to replace it"):
        run(model, out, task=["tiny_choice"], tasks_dir=tasks)
    before = out.read_bytes()
    run(model, out, task=["tiny_choice"], tasks_dir=tasks, force=True)
    assert out.read_bytes() == before


def test_a_limited_run_is_marked(model: Path, tasks: Path, tmp_path: Path, recorder: Recorder) -> None:
    report = run(model, tmp_path / "r.json", task=["tiny_choice"], tasks_dir=tasks, limit=3, progress=recorder)
    held = json.loads((tmp_path / "r.json").read_text())
    assert (held["limit"], held["partial"], held["tasks"][0]["questions"]) == (3, True, 3)
    assert recorder.warnings == ["limit=3: numbers of so few questions are to try things out, not to compare"]
    assert report.partial


# -- the suite -------------------------------------------------------------------------------------------------------


def stand_in(name: str) -> str:
    """A task of the leaderboard's name on local data."""
    return CHOICE.replace("tiny_choice", name).replace("num_fewshot: 2", "").replace("questions", name)


def test_the_leaderboard_suite(
    model: Path, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recorder: Recorder
) -> None:
    """On local tasks of the same names, whose numbers come out under the leaderboard's."""
    folder = tmp_path / "suite"
    folder.mkdir()
    rows = (tasks / "questions.jsonl").read_text().splitlines(keepends=True)
    many = "".join(rows) * 2
    (folder / "examples.jsonl").write_text(many)
    for number, name in enumerate(("arc_challenge", "hellaswag", "mmlu_part", "truthfulqa_mc2", "winogrande")):
        (folder / f"{name}.jsonl").write_text("".join(rows[number : number + 12]))
        (folder / f"{name}.yaml").write_text(stand_in(name))
    truthful = (folder / "truthfulqa_mc2.yaml").read_text() + "num_fewshot: 0\n"
    (folder / "truthfulqa_mc2.yaml").write_text(truthful)
    group = "group: mmlu\ntask: [mmlu_part]\naggregate_metric_list:\n  - metric: acc\n    weight_by_size: true\n"
    (folder / "mmlu.yaml").write_text(group)
    (folder / "gsm8k.jsonl").write_text("".join(rows[:9]))
    written = WRITE.replace("tiny_write", "gsm8k").replace("questions", "gsm8k").replace("any-number", "strict-match")
    (folder / "gsm8k.yaml").write_text(written)
    report = run(model, tmp_path / "r.json", tasks_dir=folder, progress=recorder)
    shown = [(task.name, task.metric, task.fewshot) for task in report.tasks]
    assert shown == [
        ("AI2 Reasoning Challenge (25-Shot)", "acc_norm", 25),
        ("HellaSwag (10-Shot)", "acc_norm", 10),
        ("MMLU (5-Shot)", "acc", 5),
        ("TruthfulQA (0-shot)", "mc2", 0),
        ("Winogrande (5-shot)", "acc", 5),
        ("GSM8k (5-shot)", "acc", 5),
    ]
    assert report.suite == "open-llm-leaderboard"
    assert report.average == pytest.approx(math.fsum(task.value for task in report.tasks) / 6)
    expected = theirs(model, folder, ["hellaswag"], monkeypatch, num_fewshot=10)["hellaswag"]["acc_norm,none"]
    assert report.tasks[1].value == expected


def test_the_suites_tasks_are_in_the_harness() -> None:
    import lm_eval.tasks
    from lm_eval.tasks import TaskManager

    built_in = Path(lm_eval.tasks.__file__).parent
    for measure in SUITES["open-llm-leaderboard"]:
        manager = TaskManager(include_path=built_in / measure.folder, include_defaults=False)
        assert measure.task in manager.all_tasks


def test_without_the_network_the_suite_ends_in_one_line(model: Path, tmp_path: Path, recorder: Recorder) -> None:
    with pytest.raises(QuantkitError, match=r"the data of arc_challenge, .*gsm8k cannot be had: .*\n.*Hub") as error:
        run(model, tmp_path / "r.json", progress=recorder)
    assert str(error.value).count("\n") == 1
    assert recorder.phases == ["loading tasks"]  # before any weight is read
    assert list(tmp_path.iterdir()) == []


# -- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"suite": "other"}, r"suite=other: choose open-llm-leaderboard"),
        ({"fewshot": 3}, r"fewshot is for tasks given with task"),
        ({"limit": 0}, r"limit=0: give at least 1"),
        ({"batch_size": 0}, r"batch_size=0: give at least 1"),
        ({"task": ["x"], "fewshot": -1}, r"fewshot=-1: give at least 0"),
        ({"tasks_dir": "nowhere"}, r"tasks_dir=nowhere: no such folder"),
        ({"delta": "o/x"}, r"base and delta belong together"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], said: str, model: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=said):
        run(model, tmp_path / "r.json", **options)


def test_a_task_that_is_not_there(model: Path, tasks: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"task=tiny_choise: no such task; near it are tiny_choice"):
        run(model, tmp_path / "r.json", task=["tiny_choise"], tasks_dir=tasks)


def test_a_task_whose_file_is_not_there(model: Path, tmp_path: Path) -> None:
    (tmp_path / "choice.yaml").write_text(CHOICE)
    with pytest.raises(QuantkitError, match=r"the data of tiny_choice cannot be had: .*questions.jsonl"):
        run(model, tmp_path / "r.json", task=["tiny_choice"], tasks_dir=tmp_path)


@pytest.mark.parametrize(
    ("labels", "limit", "said"),
    [
        ([None, None, None], None, "3 of 3"),
        (["", "", ""], None, "3 of 3"),
        ([-1, -1, -1], None, "3 of 3"),
        ([0, 2, 1], None, "1 of 3"),
        ([0, 1, None], 2, ""),
    ],
)
def test_questions_without_answers_give_no_number(
    labels: list[Any], limit: int | None, said: str, model: Path, tmp_path: Path
) -> None:
    """As test splits have them; the harness counts each as wrong, and gives 0."""
    rows = [{"question": "a b", "choices": ["a", "b"], "label": label} for label in labels]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tiny.yaml").write_text(TASK)
    options: dict[str, Any] = {"task": ["tiny"], "tasks_dir": tmp_path, "limit": limit}
    if not said:
        assert run(model, tmp_path / "r.json", **options).tasks[0].questions == limit
        return
    with pytest.raises(QuantkitError, match=f"tiny: {said} questions have no answer"):
        run(model, tmp_path / "r.json", **options)
    assert not (tmp_path / "r.json").exists()


def test_texts_to_be_written_without_answers_give_no_number(model: Path, tmp_path: Path) -> None:
    (tmp_path / "questions.jsonl").write_text('{"question": "a b", "label": null}\n' * 2)
    words = "output_type: generate_until\ngeneration_kwargs: {until: [x], max_gen_toks: 2}\n"
    task = re.sub("output_type: .*\n|doc_to_choice: .*\n|metric_list: .*\n", "", TASK)
    (tmp_path / "tiny.yaml").write_text(f"{task}{words}metric_list: [{{metric: exact_match}}]\n")
    with pytest.raises(QuantkitError, match="tiny: 2 of 2 questions have no answer"):
        run(model, tmp_path / "r.json", task=["tiny"], tasks_dir=tmp_path)


def test_too_few_examples_to_show(model: Path, tasks: Path, tmp_path: Path) -> None:
    with pytest.raises(QuantkitError, match=r"the harness failed: ValueError: Sample larger than population"):
        run(model, tmp_path / "r.json", task=["tiny_choice"], tasks_dir=tasks, fewshot=7)


def test_without_the_harness(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.models", None)
    with pytest.raises(MissingPackageError, match=r"needs the package lm-eval: pip install 'quantkit\[eval\]'"):
        run(model, tmp_path / "r.json")


# -- the command lines -----------------------------------------------------------------------------------------------


def test_the_command(
    model: Path, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], recorder: Recorder
) -> None:
    def command(*options: str) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            cli.main(["eval", str(model), "--tasks-dir", str(tasks), "--device", "cpu", *options])
        return int(exit.value.code or 0), *capsys.readouterr()

    code, out, err = command("--task", "tiny_choice", "--out", str(tmp_path / "a.json"), "--json")
    assert code == 0, err
    printed = json.loads(out)
    assert {key: printed[key] for key in printed if key not in ("out", "seconds")} == json.loads(
        (tmp_path / "a.json").read_text()
    )
    code, out, err = command("--task", "tiny_choice", "--out", str(tmp_path / "b.json"), "--limit", "4")
    assert code == 0, err
    assert out.splitlines()[0] == "tiny-llama, the first 4 questions of each task only"
    assert out.splitlines()[1].split()[:2] == ["tiny_choice", "acc"]
    assert out.splitlines()[-1] == f"wrote {tmp_path / 'b.json'}"


def test_the_harnesss_own_command_line_knows_quantkit(
    model: Path, tasks: Path, tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = theirs(model, tasks, ["tiny_choice", "tiny_write"], monkeypatch)
    options = ["--model_args", f"pretrained={model},dtype=float32", "--device", "cpu", "--batch_size", "4"]
    names = ["--include_path", str(tasks), "--tasks", "tiny_choice,tiny_write", "--output_path", str(tmp_path / "out")]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}

    def command(*program: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *program, "--model", "quantkit", *options, *names],
            cwd=tasks,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )

    done = command("-m", "quantkit.harness")
    assert done.returncode == 0, done.stderr[-2000:]
    (written,) = (tmp_path / "out").rglob("results*.json")
    results = json.loads(written.read_text())["results"]
    for task in ("tiny_choice", "tiny_write"):
        numbers = {key: value for key, value in expected[task].items() if "," in key}
        assert {key: results[task][key] for key in numbers} == numbers
    # The harness has no entry points: without our import it cannot know the name. When it learns to, docs change.
    plain = command("-m", "lm_eval")
    assert plain.returncode != 0
    assert "Unknown model 'quantkit'" in plain.stderr + plain.stdout


def test_registering_is_as_good_twice() -> None:
    from lm_eval.api.registry import get_model

    harness.register()
    harness.register()
    assert get_model("quantkit") is importlib.import_module("quantkit.verbs.eval.model").QuantkitLM


# -- code of a task's author -----------------------------------------------------------------------------------------

ESCAPE = "{{ question.__class__.__mro__[1].__subclasses__() }}"


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (("doc_to_text: ", "doc_to_text: !function utils.text # "), "choice.yaml names code (!function utils.text)"),
        (("task: ", "include: parts/base\ntask: "), "base names code (!function utils.text)"),
        (("task: ", "x: !!python/object/apply:os.getcwd []\ntask: "), "names code (!object/apply:os.getcwd"),
        (("task: ", "class: utils.Task\ntask: "), "names code (class utils.Task)"),
        (("metric: acc_norm", "metric: someone/theirs"), "names code (metric someone/theirs"),
        (("dataset_path: json", "dataset_path: pandas"), "names code (dataset_path pandas)"),
        (("dataset_path: json", "dataset_path: ./data.py"), "names code (dataset_path ./data.py)"),
        (('"Question: {{question}}', f'"{ESCAPE}'), "unsafe"),
    ],
    ids=["function", "included", "python", "class", "metric", "pickle", "script", "template"],
)
def test_tasks_bring_no_code_without_leave(
    changed: tuple[str, str], said: str, model: Path, tasks: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "tasks"
    shutil.copytree(tasks, folder)
    (folder / "parts").mkdir()
    (folder / "parts" / "base").write_text("doc_to_text: !function utils.text\n")
    for place in (folder, folder / "parts"):
        (place / "utils.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\ndef text(doc): return 'x'\n")
    (folder / "choice.yaml").write_text(CHOICE.replace(*changed, 1))
    with pytest.raises(QuantkitError) as refused:
        run(model, tmp_path / "r.json", task=["tiny_choice"], tasks_dir=folder, limit=1)
    assert said in str(refused.value)
    assert not (tmp_path / "ran").exists()
    if "!function utils" in said:
        run(model, tmp_path / "r.json", task=["tiny_choice"], tasks_dir=folder, limit=1, trust_remote_code=True)
        assert (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("metric_list: !!bool maybe\n", "no YAML"),
        ("fewshot_config: " + "[" * 5000, "no YAML"),
        ("include: " + "a" * 5000 + "\n", ""),
        ("metadata: &a [*a]\n", ""),
        ("metadata:\n  a0: &a0 [x]\n" + "".join(f"  a{n}: &a{n} [{f'*a{n - 1}, ' * 9}]\n" for n in range(1, 12)), ""),
    ],
    ids=["value", "nested", "name", "itself", "aliases"],
)
def test_damaged_tasks_are_looked_at_to_their_end(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(TASK + text)
    with pytest.raises(UsageError, match=rf"tiny\.yaml: {said}") if said else nullcontext():
        check_tasks(tmp_path)


def test_a_pipe_among_tasks_is_never_opened(model: Path, tasks: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tasks, tmp_path / "tasks")
    os.mkfifo(folder / "other.yaml")
    with pytest.raises(UsageError, match=r"other\.yaml: is no file, so it is not opened"):
        run(model, tmp_path / "r.json", task=["tiny_choice"], tasks_dir=folder, limit=1)
