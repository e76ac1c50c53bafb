"""What a library call changes of its process it puts back; the allocator's settings it leaves to `quantkit.tune`."""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import warnings
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import MakeModel
from support.recipes import SMALL, TEXT, write_recipe
from support.tasks import TASK

import quantkit
from quantkit.blocks import budget
from quantkit.cli.app import main
from quantkit.errors import OutputError

VERBS: dict[str, Callable[[Path, Path], Any]] = {
    "gptq": lambda model, at: quantkit.gptq(model, at / "gptq", samples=4, seq_len=32, group_size=32, evaluate=False),
    "ggml": lambda model, at: quantkit.ggml(model, at / "tiny.gguf", type="q8_0", pre="gpt-2"),
    "repack": lambda model, at: quantkit.repack(at / "gptq", at / "packed", to="compressed-tensors"),
    "convert": lambda model, at: quantkit.convert(model, at / "plain"),
    "merge": lambda model, at: quantkit.merge(model, model, at / "merged"),
    "diff": lambda model, at: quantkit.diff(model, model, at / "delta"),
    "imatrix": lambda model, at: quantkit.imatrix(model, at / "imatrix.gguf", samples=4, seq_len=32),
    "samples": lambda model, at: quantkit.samples(model, samples=4, seq_len=32, evaluate=False),
    "perplexity": lambda model, at: quantkit.perplexity([model], text=str(at / "text.txt"), seq_len=32),
    "compare": lambda model, at: quantkit.compare(
        model, [at / "plain"], out=at / "report", texts=[str(at / "text.txt")], seq_len=32
    ),
    "eval": lambda model, at: quantkit.eval(model, out=at / "eval.json", task=["tiny"], tasks_dir=at),
    "generate": lambda model, at: quantkit.generate(
        model, prompts=at / "prompts.jsonl", out=at / "answers.jsonl", num_beams=2, max_new_tokens=4
    ),
    "chat": lambda model, at: quantkit.chat(model, Quiet(), max_new_tokens=4),
    "inspect": lambda model, at: quantkit.inspect(model),
    "verify": lambda model, at: quantkit.verify(at / "gptq"),
    "card": lambda model, at: quantkit.card(at / "gptq"),
    "publish": lambda model, at: refused(lambda: quantkit.publish(at / "gptq", "somebody/tiny")),
    "release": lambda model, at: quantkit.release(at / "recipe.yaml", at / "release"),
}


def refused(call: Callable[[], Any]) -> None:
    """A call that comes as far as the Hub, which it has no token for."""
    with pytest.raises(OutputError, match="no token for the Hub"):
        call()


class Quiet:
    """A person who says one thing, hears what comes and leaves."""

    def __init__(self) -> None:
        self._says = ["the fox"]

    def hear(self) -> str | None:
        return self._says.pop() if self._says else None

    def say(self, piece: str) -> None:
        pass

    def end(self, finish: str) -> None:
        pass

    def note(self, text: str) -> None:
        pass


class Glibc:
    """In place of the C library: remembers what it was told to set."""

    def __init__(self) -> None:
        self.settings: list[tuple[int, int]] = []

    def mallopt(self, name: int, value: int) -> int:
        self.settings.append((name, value))
        return 1

    def malloc_trim(self, _: int) -> int:
        return 0


def state() -> dict[str, Any]:
    return {
        "collects": (gc.isenabled(), gc.get_threshold(), gc.get_freeze_count()),
        "signals": {number: signal.getsignal(number) for number in signal.Signals},
        "folder": os.getcwd(),
        "output": (sys.stdout, sys.stderr, sys.stdin),
        "hooks": (sys.excepthook, sys.unraisablehook),
        "threads": torch.get_num_threads(),
        "dtype": torch.get_default_dtype(),
        "grad": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "random": torch.random.get_rng_state().tolist(),
        "environment": dict(os.environ),
        "warnings": list(warnings.filters),
        "verbosity": transformers.logging.get_verbosity(),
        "umask": umask(),
    }


def umask() -> int:
    found = os.umask(0o022)
    os.umask(found)
    return found


@pytest.fixture
def glibc(monkeypatch: pytest.MonkeyPatch) -> Glibc:
    """The C library is not to be set."""
    found = Glibc()
    monkeypatch.setattr(budget, "_glibc", lambda: found)
    monkeypatch.setattr(budget, "_tuned", False)
    return found


@pytest.fixture(scope="module")
def at(make_model: MakeModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for one verb after the other, each with what it reads."""
    folder = tmp_path_factory.mktemp("process")
    (folder / "model").symlink_to(make_model("llama", tied=True))
    write_recipe(folder, SMALL.replace("model: model", f"model: {folder / 'model'}"))
    (folder / "text.txt").write_text(TEXT)
    (folder / "prompts.jsonl").write_text('{"prompt": "the fox"}\n')
    (folder / "tiny.yaml").write_text(TASK)
    asked = {"question": "the fox", "choices": ["asks", "answers"], "label": 0}
    (folder / "questions.jsonl").write_text(json.dumps(asked) + "\n")
    return folder


def test_every_verb_is_here() -> None:
    others = {"QuantkitError", "QuantkitWarning", "UsageError", "__version__", "tune"}
    assert set(VERBS) == {*quantkit.__all__, "eval"} - others


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("verb", VERBS)
def test_a_library_call_leaves_the_process_as_it_was(
    verb: str, at: Path, glibc: Glibc, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if verb == "eval":
        pytest.importorskip("lm_eval", reason="pip install 'quantkit[eval]'")
        import_module("lm_eval.evaluator")
        import_module("quantkit.verbs.eval.model")
        import_module("sklearn")  # which lm-eval imports late; it sets a variable
    monkeypatch.chdir(at)
    monkeypatch.setattr("quantkit.verbs.publish.remote.get_token", lambda: None)
    assert getattr(quantkit, verb)  # imported: what libraries set when they are imported is theirs
    before = state()
    VERBS[verb](at / "model", at)
    after = state()
    assert {key: (before[key], value) for key, value in after.items() if value != before[key]} == {}
    assert glibc.settings == []
    assert capsys.readouterr().out == ""


def test_tuning_sets_the_allocator_once(glibc: Glibc) -> None:
    quantkit.tune()
    told = list(glibc.settings)
    quantkit.tune()
    assert told
    assert glibc.settings == told
    with budget.large_apart():
        pass
    assert len(glibc.settings) == len(told) + 2


def test_the_command_line_tunes_its_own_process(
    at: Path, glibc: Glibc, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[bool] = []
    monkeypatch.setattr("quantkit.verbs.ggml.note_source", lambda *_: seen.append(gc.isenabled()))
    with pytest.raises(SystemExit) as done:
        main(["ggml", str(at / "model"), "--out", str(at / "dry.gguf"), "--dry-run", "--pre", "gpt-2", "--type", "f16"])
    assert done.value.code == 0, capsys.readouterr().err
    assert glibc.settings
    assert seen == [False]
    assert gc.isenabled()
