"""Programs of a model's author, patterns and counts of its files: each ends, with an error that says which it was."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeModel
from jinja2.sandbox import ImmutableSandboxedEnvironment

import quantkit
from quantkit.errors import QuantkitError, SourceError, UsageError
from quantkit.runs import limits
from quantkit.runs.limits import time_limit
from quantkit.sources import open_source
from quantkit.verbs.verify.packed import label_of

ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}x"


@pytest.mark.fast
def test_what_runs_too_long_is_stopped_and_nothing_else_is() -> None:
    def endless() -> None:
        while True:
            with suppress(Exception):  # which a limit is not
                sum(range(1000))

    stopped = pytest.raises(UsageError, match=r"^it takes more than 0\.05 s, and was stopped$")
    with stopped, time_limit(0.05, "it", UsageError):
        endless()
    with time_limit(0.05, "it"):
        pass
    time.sleep(0.1)
    with pytest.raises(KeyError), time_limit(5, "it"):
        raise KeyError("its own")


def test_a_chat_template_without_end(make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "TEMPLATE_SECONDS", 0.2)
    model = shutil.copytree(make_model("llama"), tmp_path / "model")
    (model / "chat_template.jinja").write_text(ENDLESS)
    (tmp_path / "d.jsonl").write_text(json.dumps({"instruction": "a", "output": "b " * 99}) + "\n")
    (problem,) = quantkit.verify(model, generate=False).problems
    assert problem.startswith("the chat template cannot be rendered: the chat template takes more than 0.2 s")
    with pytest.raises(SourceError, match=r"the chat template takes more than 0\.2 s, and was stopped"):
        quantkit.samples(model, calibration=str(tmp_path / "d.jsonl"), samples=1, seq_len=16)
    assert quantkit.card(model, base_model=["a/b"], licence="mit").models
    (tmp_path / "card.md.j2").write_text(ENDLESS)
    with pytest.raises(UsageError, match=r"template=.*card\.md\.j2 takes more than 0\.2 s, and was stopped"):
        quantkit.card(model, template=str(tmp_path / "card.md.j2"), force=True)


@pytest.mark.parametrize("program", ["9 ** (9 ** 9)", "range(10 ** 9) | list", "ns.x"])
def test_a_step_of_a_template_that_nothing_could_stop(program: str, make_model: MakeModel, tmp_path: Path) -> None:
    model = shutil.copytree(make_model("llama"), tmp_path / "model")
    squares = "{% set ns = namespace(x=9) %}{% for i in range(60) %}{% set ns.x = ns.x * ns.x %}{% endfor %}"
    (model / "chat_template.jinja").write_text(f"{squares if 'ns' in program else ''}{{{{ {program} }}}}")
    started = time.monotonic()
    (problem,) = quantkit.verify(model, generate=False).problems
    assert problem.startswith("the chat template cannot be rendered: ")
    assert time.monotonic() - started < 15
    assert ImmutableSandboxedEnvironment.intercepted_binops == frozenset()


@pytest.mark.parametrize("program", ["'a' * 10 ** 10", "'%9999999999d' % 1", "'a' * 10 ** 8", "'x'.ljust(10 ** 10)"])
def test_a_chat_template_that_takes_the_memory(program: str, make_model: MakeModel, tmp_path: Path) -> None:
    model = shutil.copytree(make_model("llama"), tmp_path / "model")
    (model / "chat_template.jinja").write_text(f"{{{{ {program} }}}}")
    (tmp_path / "d.jsonl").write_text(json.dumps({"instruction": "a", "output": "b " * 99}) + "\n")
    said = r"the chat template (takes more than 1\.0 GB of memory, and was stopped|makes 100000000 characters of \d+)"
    before = resource.getrlimit(resource.RLIMIT_AS)
    with pytest.raises(SourceError, match=said):
        quantkit.samples(model, calibration=str(tmp_path / "d.jsonl"), samples=1, seq_len=16)
    (problem,) = quantkit.verify(model, generate=False).problems
    assert re.search(said, problem)
    (tmp_path / "card.md.j2").write_text("{{ 'a' * 10 ** 10 }}")
    with pytest.raises(UsageError, match=r"card\.md\.j2 takes more than 1\.0 GB of memory"):
        quantkit.card(model, template=str(tmp_path / "card.md.j2"), force=True)
    assert resource.getrlimit(resource.RLIMIT_AS) == before


@pytest.mark.fast
@pytest.mark.parametrize(
    "pattern", ["(a|aa)+$", "(", "((a{99}){99}){99}", "(" * 9999, "a" * 200_000, "a{" + "9" * 5000 + "}"]
)
def test_a_pattern_without_end(pattern: str) -> None:
    with pytest.raises(SourceError, match=r"config\.json: the `dynamic` rule '.*' is no pattern: .") as refused:
        label_of("a" * 60 + "b", {"dynamic": {f"-:{pattern}": {}}})
    assert len(str(refused.value)) < 400


@pytest.mark.fast
def test_rules_that_are_none_are_told_and_others_hold() -> None:
    for dynamic in (["x"], {"+:.*": 5}):
        with pytest.raises(SourceError, match="`dynamic` of quantization_config is not patterns"):
            label_of("a", {"dynamic": dynamic})
    assert label_of("model.layers.0.q", {"bits": 4, "dynamic": {"+:.*\\.q$": {"bits": 8}}}) == {
        "bits": 8,
        "dynamic": {"+:.*\\.q$": {"bits": 8}},
    }


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("num_hidden_layers", 10**9, "num_hidden_layers is 1000000000, but there can be 10000 at most"),
        ("num_hidden_layers", 5000, "num_hidden_layers is 5000, but there can be 200 at most"),
        ("num_local_experts", 10**9, "num_local_experts is 1000000000, but there can be 10000 at most"),
    ],
)
def test_a_config_of_more_layers_than_there_can_be(
    key: str, value: Any, said: str, make_model: MakeModel, tmp_path: Path
) -> None:
    model = shutil.copytree(make_model("mixtral"), tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, key: value}))
    started = time.monotonic()
    with pytest.raises(SourceError, match=said):
        quantkit.convert(model, tmp_path / "out")
    assert time.monotonic() - started < 5
    if value > 10**6:
        with pytest.raises(SourceError, match=said):
            open_source(model)
    assert any(said in problem for problem in quantkit.verify(model, generate=False).problems)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "generation_config.json", "chat_template.jinja"])
def test_a_file_that_fills_the_memory_is_not_read(name: str, make_model: MakeModel, tmp_path: Path) -> None:
    model = shutil.copytree(make_model("llama"), tmp_path / "model")
    with (model / name).open("wb") as file:
        file.truncate(10**12)  # with holes: it takes no room
    said = rf"{name}: has 1\.0 TB, and at most 256\.0 MB are read"
    with pytest.raises(SourceError, match=said):
        quantkit.convert(model, tmp_path / "out")
    assert any(re.search(said, problem) for problem in quantkit.verify(model, generate=False).problems)


@pytest.mark.fast
def test_texts_that_are_pipes_or_fill_the_memory(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.gguf")
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(10**12)
    pipe, huge = tmp_path / "pipe.gguf", tmp_path / "huge"
    for run in (
        lambda: quantkit.inspect(pipe),
        lambda: quantkit.verify(pipe),
        lambda: quantkit.release(pipe, tmp_path / "out"),
        lambda: quantkit.release(huge, tmp_path / "out"),
        lambda: quantkit.card(tmp_path, original=huge),
        lambda: quantkit.card(tmp_path, template=str(huge)),
    ):
        with pytest.raises(QuantkitError, match=r"is not opened|at most 256\.0 MB are read"):
            run()
