"""Tasks of lm-evaluation-harness: suites of them, loaded by name with their data, run, and their numbers taken out."""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import chdir, redirect_stdout
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from quantkit.errors import QuantkitError, UsageError, first_line

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")  # owner and name; not a path, nor a kind of file
_NAMED = re.compile(rb"^(?:task|group|tag): *[\"']?([^\s\"'#\[]+)", re.MULTILINE)  # as a task's file says it
_SEED = 1234  # the harness's own choice, which decides on the examples before a question


@dataclass(frozen=True)
class Measure:
    """One number of a suite.

    Attributes:
        task: the harness's name for it.
        folder: where below the harness's tasks it is described.
        title: what the leaderboard calls it.
        fewshot: examples before each question.
        metric: what the leaderboard calls the number.
        key: what the harness does, metric and filter.
        config: of the data set, where the parts of a group have one each.
    """

    task: str
    folder: str
    title: str
    fewshot: int
    metric: str
    key: str
    config: str | None = None


# The Open LLM Leaderboard of 2023 (its first version). Its GSM8k looked for the number after "####": the strict filter.
SUITES: dict[str, tuple[Measure, ...]] = {
    "open-llm-leaderboard": (
        Measure("arc_challenge", "arc", "AI2 Reasoning Challenge (25-Shot)", 25, "acc_norm", "acc_norm,none"),
        Measure("hellaswag", "hellaswag", "HellaSwag (10-Shot)", 10, "acc_norm", "acc_norm,none"),
        Measure("mmlu", "mmlu/default", "MMLU (5-Shot)", 5, "acc", "acc,none", "all"),
        Measure("truthfulqa_mc2", "truthfulqa", "TruthfulQA (0-shot)", 0, "mc2", "acc,none"),
        Measure("winogrande", "winogrande", "Winogrande (5-shot)", 5, "acc", "acc,none"),
        Measure("gsm8k", "gsm8k", "GSM8k (5-shot)", 5, "acc", "exact_match,strict-match"),
    )
}


@dataclass(frozen=True)
class TaskResult:
    """One number.

    Attributes:
        task: the harness's name.
        name: what people call it.
        dataset: its id on the Hub; None for local data.
        split: whose questions were asked.
        fewshot: examples before each question; None where parts of the task differ.
        metric: with the filter's name after a comma, where there is one.
        value: as the harness gives it, a fraction for accuracies.
        stderr: standard error; None where it has none.
        questions: how many were asked.
        config: of the data set; None where it has one only, or parts of the task differ.
    """

    task: str
    name: str
    dataset: str | None
    split: str | None
    fewshot: int | None
    metric: str
    value: float
    stderr: float | None
    questions: int
    config: str | None = None  # files of before have none


def check_names(names: Sequence[str], folder: Path | None) -> None:
    """Refuse names that stand in no file of the harness's tasks nor of `folder`: without importing the harness, or
    reading its thousands of files as YAML, which take many seconds.

    Raises:
        UsageError: no task of a name.
    """
    found = find_spec("lm_eval")
    known, strange = set(), {name.encode() for name in names}
    if found is None:
        return
    for root in [*(found.submodule_search_locations or ()), *([folder] if folder else [])]:
        for path in Path(root).rglob("*.y*ml"):
            if not strange:
                return
            content = path.read_bytes() if path.is_file() else b""
            strange = {name for name in strange if name not in content}
            known.update(_NAMED.findall(content))
    for name in names:
        if name.encode() in strange:
            raise _no_task(name, [one.decode(errors="replace") for one in known])


def _no_task(name: str, known: Sequence[str]) -> UsageError:
    near = ", ".join(difflib.get_close_matches(name, known, 3))
    hint = f"near it are {near}" if near else "`lm_eval ls tasks` lists them"
    return UsageError(f"--task {name}: no such task; {hint}")


def load_tasks(names: Sequence[str], measures: Sequence[Measure], folder: Path | None) -> dict[str, Any]:
    """The harness's tasks of a suite and by name, with their data; `folder` holds more of them, or others of a name.

    Files that tasks in `folder` name are looked for there.

    Raises:
        UsageError: no task of a name.
        QuantkitError: data that cannot be had.
    """
    import lm_eval.tasks
    from lm_eval.tasks import TaskManager

    built_in = Path(lm_eval.tasks.__file__).parent
    places = [built_in / measure.folder for measure in measures] + ([folder] if folder else [])
    wanted = [measure.task for measure in measures] + list(names)
    with redirect_stdout(sys.stderr):  # what the harness prints: standard output is for results
        manager = TaskManager(include_path=places, include_defaults=False)
        if any(name not in manager.all_tasks for name in wanted):  # the index of all tasks takes a while
            manager = TaskManager(include_path=folder)
    for name in wanted:
        if name not in manager.all_tasks:
            raise _no_task(name, manager.all_tasks)
    try:
        with redirect_stdout(sys.stderr), chdir(folder or Path.cwd()):
            loaded: dict[str, Any] = dict(manager.load(wanted))
    except Exception as error:  # whatever the harness and its data library raise on a task's file or data
        raise QuantkitError(
            f"the data of {', '.join(wanted)} cannot be had: {first_line(error)}\n"
            "tasks take their data sets from the Hugging Face Hub, or from files that they name"
        ) from error
    return loaded


def set_fewshot(loaded: Mapping[str, Any], counts: Mapping[str, int]) -> None:
    """Set how many examples tasks are asked with, by the name of a task or group; others keep what they say."""
    for name, count in counts.items():
        for leaf in _leaves(loaded, name):
            loaded["tasks"][leaf].set_config(key="num_fewshot", value=count)
    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=_SEED)


def check_answers(loaded: Mapping[str, Any], limit: int | None) -> None:
    """Refuse tasks with questions that have no answer, as splits of a competition: the harness counts them as wrong.

    Of free text, "" may be an answer, unless all have it. Tasks that reckon by code of their own are left to it.

    Raises:
        QuantkitError: names the task, and how many of its questions have none.
    """
    for name, task in loaded["tasks"].items():
        if not hasattr(task, "config") or callable(getattr(task.config, "process_results", None)):
            continue
        asked = [doc for _, doc in task.doc_iterator(limit=limit)]
        without = sum(not _has_answer(task, doc) for doc in asked)
        if without == len(asked) or (without and task.OUTPUT_TYPE == "multiple_choice"):
            raise QuantkitError(
                f"{name}: {without} of {len(asked)} questions have no answer, so there is no number to give; take a "
                "split that has them"
            )


def _has_answer(task: Any, doc: Any) -> bool:
    """Whether a question has an answer that one can be right about; where a task's own words fail, the harness does."""
    kind = task.OUTPUT_TYPE
    try:
        if kind == "multiple_choice":
            found = task.doc_to_text(doc) if getattr(task, "multiple_input", 0) else task.doc_to_target(doc)
            choices = task.doc_to_choice(doc)
            answers = found if isinstance(found, list) else [found]
            known = [0 <= one < len(choices) if isinstance(one, int) else one in choices for one in answers]
            return bool(known) and all(known)
        if kind in ("generate_until", "loglikelihood"):
            found = task.doc_to_target(doc)
            return str(found).strip() not in ("", "None")  # null as templates have it
    except Exception:  # code and templates of a task
        return True
    return True


def run_tasks(lm: Any, loaded: Mapping[str, Any], limit: int | None) -> dict[str, Any]:
    """The harness's results.

    Raises:
        UsageError: a task that runs code that the model writes, which is not done here.
        QuantkitError: the harness failed, as it does where a task has fewer examples than are to be shown.
    """
    from lm_eval.evaluator import evaluate

    for name, task in loaded["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False):
            raise UsageError(f"--task {name} runs code that the model writes; use python -m quantkit.harness for it")
    try:
        with redirect_stdout(sys.stderr):
            results: dict[str, Any] = evaluate(lm=lm, task_dict=loaded, limit=limit, log_samples=False)
    except QuantkitError:
        raise
    except Exception as error:  # of the harness or of a task's own code
        raise QuantkitError(f"the harness failed: {type(error).__name__}: {first_line(error)}") from error
    return results


def every_number(results: Mapping[str, Any], loaded: Mapping[str, Any], name: str) -> list[TaskResult]:
    """All numbers of a task or group; a group that puts none together has those of its tasks."""
    found = results["results"].get(name, {})
    numbers = (key for key, value in found.items() if isinstance(value, (int, float)))
    keys = [key for key in numbers if "," in key and not key.partition(",")[0].endswith("_stderr")]
    if not keys and name not in loaded["tasks"]:
        return [number for task in _leaves(loaded, name) for number in every_number(results, loaded, task)]
    return [number_of(results, loaded, name, key, name, key.removesuffix(",none")) for key in keys]


def number_of(
    results: Mapping[str, Any], loaded: Mapping[str, Any], task: str, key: str, title: str, metric: str
) -> TaskResult:
    """One number: `key` of a task or group, under the names `title` and `metric`. Raises QuantkitError where the
    harness has none of that name."""
    found = results["results"].get(task, {})
    if key not in found:
        raise QuantkitError(f"{task}: the harness gives no {key}, but {', '.join(found) or 'nothing'}")
    kind, _, chosen = key.partition(",")
    stderr = found.get(f"{kind}_stderr,{chosen}")
    leaves = _leaves(loaded, task)
    config = loaded["tasks"][leaves[0]].config
    held = config.dataset_path or ""
    counts = {loaded["tasks"][leaf].get_config("num_fewshot") for leaf in leaves}
    configs = {loaded["tasks"][leaf].config.dataset_name for leaf in leaves}
    return TaskResult(
        task=task,
        name=title,
        dataset=held if _HUB_ID.fullmatch(held) and not Path(held).exists() else None,
        split=config.test_split or config.validation_split,
        fewshot=counts.pop() if len(counts) == 1 else None,
        metric=metric,
        value=float(found[key]),
        stderr=float(stderr) if isinstance(stderr, (int, float)) else None,
        questions=sum(results["n-samples"][leaf]["effective"] for leaf in leaves),
        config=configs.pop() if len(configs) == 1 else None,
    )


def _leaves(loaded: Mapping[str, Any], name: str) -> list[str]:
    """The tasks of a group, or the task itself, or those that have the name as their tag."""
    if name in loaded["tasks"]:
        return [name]
    if name in loaded["groups"]:
        return [task.task_name for task in loaded["groups"][name].get_all_tasks()]
    tags = {task: getattr(held.config, "tag", None) or [] for task, held in loaded["tasks"].items()}
    return [task for task, own in tags.items() if name in ([own] if isinstance(own, str) else own)] or list(tags)
