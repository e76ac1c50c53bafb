"""What in a folder of tasks would run code of its author, and how the harness is kept from it.

lm-evaluation-harness calls functions that a task's YAML names (``!function``), loads metrics that it does not have
itself as programs from the Hub, and renders templates in a jinja2 environment that lets them reach into Python.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from jinja2.sandbox import SandboxedEnvironment

from quantkit.errors import UsageError, first_line

_LONGEST = 4096  # bytes of a path
# Kinds of files that hold values alone; others that the data library reads may be pickles, or programs of their own.
_PLAIN = ("json", "csv", "parquet", "arrow", "text", "xml")


def check_tasks(folder: Path) -> None:
    """Refuse tasks that bring code of their own.

    Raises:
        UsageError: names the file and what of it is code.
    """
    from lm_eval.api.registry import get_metric_aggregation

    get_metric_aggregation("")  # fills the registry of metrics, which `_code_in` looks into
    waiting = sorted(path for path in folder.rglob("*") if path.suffix in (".yaml", ".yml") and not path.is_dir())
    seen: set[Path] = set()
    while waiting:
        path = waiting.pop(0)
        if path.resolve() in seen:
            continue
        seen.add(path.resolve())
        if not path.is_file():
            raise UsageError(f"--tasks-dir: {path}: is no file, so it is not opened")
        try:
            content = yaml.load(path.read_bytes(), Loader=_Loader)
        except OSError as error:
            raise UsageError(f"--tasks-dir: {path}: cannot be read: {error.strerror}") from None
        except _FoundCode as found:
            raise UsageError(_refusal(path, str(found))) from None
        except Exception as error:  # YAML's own, and what its makers of values raise on others than they expect
            raise UsageError(f"--tasks-dir: {path}: no YAML: {first_line(error)}") from None
        try:
            code = next(_code_in(content, set()), None)
        except RecursionError:
            raise UsageError(f"--tasks-dir: {path}: is nested too deeply") from None
        if code is not None:
            raise UsageError(_refusal(path, code))
        included = content.get("include") if isinstance(content, dict) else None
        for name in included if isinstance(included, list) else [included]:
            if isinstance(name, str) and len(name.encode()) < _LONGEST and os.path.exists(path.parent / name):
                waiting.append(path.parent / name)


@contextmanager
def sandboxed() -> Iterator[None]:
    """The harness renders templates where they reach nothing but the values that they are given."""
    from lm_eval import utils

    own = utils.env
    sandbox = SandboxedEnvironment(
        loader=own.loader, undefined=own.undefined, keep_trailing_newline=own.keep_trailing_newline
    )
    sandbox.filters.update(own.filters)
    utils.env = sandbox
    try:
        yield
    finally:
        utils.env = own


class _FoundCode(Exception):
    """A tag that stands for something else than a value; it says which."""


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]  # the one that the harness takes
    """Reads values, and stops at any tag."""


def _stop(loader: Any, suffix: str, node: yaml.Node) -> None:
    value = node.value if isinstance(node, yaml.ScalarNode) else ""
    raise _FoundCode(f"!{suffix} {value}".rstrip())


_Loader.add_multi_constructor("!", _stop)
_Loader.add_multi_constructor("tag:yaml.org,2002:python/", _stop)


def _code_in(task: Any, seen: set[int]) -> Iterator[str]:
    """What of a task, or of the tasks in a group, is code. What aliases have it hold many times is looked at once."""
    from lm_eval.api.registry import metric_registry

    if id(task) in seen:
        return
    seen.add(id(task))
    if isinstance(task, list):
        for one in task:
            yield from _code_in(one, seen)
    if not isinstance(task, dict):
        return
    for key, value in task.items():
        if key == "class":
            yield f"class {value}"
        elif key == "unsafe_code" and value:
            yield key
        elif key == "dataset_path" and isinstance(value, str) and _may_run(value):
            yield f"dataset_path {value}"
        elif key == "metric" and isinstance(value, str) and (task.get("hf_evaluate") or value not in metric_registry):
            yield f"metric {value}, which is a program of the Hub's"
        elif key == "trust_remote_code" and value:
            yield key
        elif isinstance(value, (dict, list)):
            yield from _code_in(value, seen)


def _may_run(dataset: str) -> bool:
    """Whether to read such data may run code: a script, or a kind of files that is not known to hold values alone."""
    from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES

    return dataset.endswith(".py") or (dataset in _PACKAGED_DATASETS_MODULES and dataset not in _PLAIN)


def _refusal(path: Path, what: str) -> str:
    return (
        f"--tasks-dir: {path.name} names code ({what}), which was not run; read it, then give --trust-remote-code, or "
        "leave the task out"
    )
