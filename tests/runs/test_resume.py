"""A run that is stopped, whatever stops it, goes on to the bytes of one that was not, and leaves nothing else."""

from __future__ import annotations

import _imp
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from conftest import MakeModel, Recorder, token_matrix
from support.families import DISCOVERED
from support.folders import contents
from support.recipes import SMALL, write_recipe

import quantkit
from quantkit.blocks.stream import ModelStream
from quantkit.cli.app import main
from quantkit.cli.signals import farewell, heeded
from quantkit.containers.gptq.write import GptqWriter
from quantkit.errors import (
    Interrupted,
    NumericError,
    OutputError,
    SourceError,
    UsageError,
)
from quantkit.options.values import Every, parse_every
from quantkit.quantize import blockwise
from quantkit.runs import landing, outputs
from quantkit.runs import record as provenance
from quantkit.runs.journal import Journal
from quantkit.runs.outputs import ChangedError, Staging
from quantkit.runs.places import folder_of
from quantkit.runs.unfinished import differences, working
from quantkit.verbs.gptq import GptqReport

BLOCKS = 6
TOKENS = token_matrix(12, 32)
OPTIONS: dict[str, Any] = {
    "calibration": TOKENS,
    "group_size": 32,
    "evaluate": False,
    "checkpoint_every": "2",
    "effort": "fast",
}


class Stopped(Recorder):
    """A Progress that raises when a phase has made so many steps."""

    def __init__(self, after: int, error: BaseException | None = None, phase: str = "quantizing blocks") -> None:
        super().__init__()
        self._left, self._error, self._phase = after, error or KeyboardInterrupt(), phase

    @contextmanager
    def phase(self, name: str, total: int) -> Iterator[Callable[[int], None]]:
        self.phases.append(name)

        def advance(steps: int) -> None:
            if name == self._phase:
                self._left -= steps
                if self._left <= 0:
                    raise self._error

        yield advance


@pytest.fixture(scope="module")
def kept(make_model: MakeModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, what a whole run makes of it, and what one leaves that was stopped after five blocks of six."""
    base = tmp_path_factory.mktemp("kept")
    source = Path(shutil.copytree(make_model("llama", num_hidden_layers=BLOCKS), base / "model"))
    run(source, base / "whole" / "out")
    assert stopped(source, base / "begun" / "out", 5, checkpoint_every="1") == f"after block 5 of {BLOCKS}"
    return base


@pytest.fixture
def whole(kept: Path) -> dict[str, str]:
    """The files of a run that was not stopped."""
    return contents(kept / "whole")


@pytest.fixture
def model(kept: Path, tmp_path: Path) -> Path:
    """The model, which may be changed."""
    return Path(shutil.copytree(kept / "model", tmp_path / "model"))


@pytest.fixture
def begun(kept: Path, tmp_path: Path) -> Path:
    """The output that a run did not finish."""
    return Path(shutil.copytree(kept / "begun", tmp_path / "again")) / "out"


@pytest.fixture
def visited(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The blocks whose weights were loaded."""
    found: list[int] = []
    block = ModelStream.block

    def noted(self: ModelStream, index: int) -> Any:
        found.append(index)
        return block(self, index)

    monkeypatch.setattr(ModelStream, "block", noted)
    return found


def run(model: Path, out: Path, **options: Any) -> GptqReport:
    return quantkit.gptq(model, out, **{**OPTIONS, **options})


def stopped(model: Path, out: Path, after: int, **options: Any) -> str:
    """What an interrupt after so many blocks says."""
    with pytest.raises(Interrupted) as interrupt:
        run(model, out, progress=Stopped(after), **options)
    assert not out.exists()
    assert not (folder_of(out) / "staged").exists()
    return str(interrupt.value)


def resumed(model: Path, out: Path, **options: Any) -> Recorder:
    recorder = Recorder()
    run(model, out, resume=True, progress=recorder, **options)
    assert not folder_of(out).exists()
    return recorder


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


# -- the same bytes --------------------------------------------------------------------------------------------------

CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"act_order": "dynamic", "sym": False, "bits": 3}),
    ("llama", {"exclude": ["*.layers.1.*"]}),
    ("llama", {"ggml": "q5_1"}),
    ("llama", {"format": "gptq,mlx,awq"}),
    ("gpt2", {}),
    ("mixtral", {}),
]


@pytest.mark.parametrize("replayed", [False, True], ids=["paused", "replayed"])
@pytest.mark.parametrize(("family", "options"), CASES, ids=lambda value: str(value))
def test_an_interrupted_run_goes_on_to_the_same_bytes(
    family: str,
    options: dict[str, Any],
    replayed: bool,
    make_model: MakeModel,
    tmp_path: Path,
    visited: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if replayed:
        plan = blockwise.plan_quantizing
        monkeypatch.setattr(blockwise, "plan_quantizing", lambda *args: replace(plan(*args), paused=False))
    given = {"group_size": None, "pre": "gpt-2", **options} if "ggml" in options else options
    source = make_model(family, num_hidden_layers=BLOCKS)
    run(source, tmp_path / "whole" / "out", **given)
    out = tmp_path / "again" / "out"
    assert stopped(source, out, 3, **given) == f"after block 3 of {BLOCKS}"
    visited.clear()
    recorder = resumed(source, out, **given)
    assert visited == [2, 3, 4, 5]  # hidden states that enter block 2 were kept; block 2 landed
    assert f"going on after block 3 of {BLOCKS}" in recorder.notes
    assert not recorder.warnings
    assert contents(out.parent) == contents(tmp_path / "whole")


def test_resumed_again_and_again(model: Path, whole: dict[str, str], tmp_path: Path, visited: list[int]) -> None:
    out = tmp_path / "again" / "out"
    for done in range(1, BLOCKS):
        words = stopped(model, out, done, resume=done > 1)
        assert words == f"after block {done} of {BLOCKS}"
    visited.clear()
    resumed(model, out)
    assert visited == [4, 5]  # blocks of several runs count together for how often hidden states are kept
    assert contents(out.parent) == whole


def test_blocks_that_share_keys_and_values_are_all_run_again(
    make_model: MakeModel, tmp_path: Path, visited: list[int]
) -> None:
    source = make_model("gemma3n_text", **DISCOVERED["gemma3n_text"])
    run(source, tmp_path / "whole" / "out")
    out = tmp_path / "again" / "out"
    assert stopped(source, out, 3, checkpoint_every="1") == "after block 3 of 4"
    assert not list((folder_of(out) / "hidden").iterdir())
    visited.clear()
    resumed(source, out, checkpoint_every="1")
    assert visited == [0, 1, 2, 3]
    assert contents(out.parent) == contents(tmp_path / "whole")


def test_stopped_after_the_last_block_nothing_is_run_again(
    model: Path, whole: dict[str, str], tmp_path: Path, visited: list[int]
) -> None:
    out = tmp_path / "again" / "out"
    with pytest.raises(Interrupted, match=f"after block {BLOCKS} of {BLOCKS}"):
        run(model, out, progress=Stopped(1, phase="writing"))
    visited.clear()
    resumed(model, out)
    assert not visited
    assert contents(out.parent) == whole


@pytest.mark.parametrize(("every", "numbers"), [("1", [4, 5]), ("2", [2, 4]), ("3", [3]), ("10m", []), ("off", [])])
def test_the_two_latest_hidden_states_are_kept(model: Path, tmp_path: Path, every: str, numbers: list[int]) -> None:
    stopped(model, tmp_path / "out", 5, checkpoint_every=every)
    found = sorted((folder_of(tmp_path / "out") / "hidden").iterdir())
    assert [int(path.name) for path in found] == numbers


def test_how_often_is_a_time_or_a_number_of_blocks() -> None:
    assert parse_every("10m") == Every(seconds=600)
    assert parse_every("2h") == Every(seconds=7200)
    assert parse_every("45s") == Every(seconds=45)
    assert parse_every("4") == Every(blocks=4)
    assert parse_every("off") == Every()
    assert Every(seconds=600).due(600.0, 1)
    assert not Every(seconds=600).due(599.0, 100)
    assert Every(blocks=4).due(0.0, 4)
    assert not Every(blocks=4).due(1e9, 3)
    assert not Every().due(1e9, 1000)
    for wrong in ("", "0", "0m", "-4", "4d", "1.5m", "m"):
        with pytest.raises(UsageError, match=r"^--checkpoint-every .*: give minutes such as 10m, a number"):
            parse_every(wrong)


# -- damage ----------------------------------------------------------------------------------------------------------


def harm_record(begun: Path, of: str, number: int, harm: Callable[[Path], None]) -> None:
    """Damage one record of an unfinished run's journal; by `cut` it is the last, and not whole."""
    path = folder_of(begun) / "journal"
    records = Journal(path).records
    at = next(i for i, record in enumerate(records) if record.get(of) == number)
    lines = path.read_bytes().split(b"\n")
    assert b'"%s": %d' % (of.encode(), number) in lines[at]
    rest = [] if harm is cut else lines[at + 1 :]
    part = path.with_name("part")
    part.write_bytes(lines[at])
    harm(part)
    path.write_bytes(b"\n".join([*lines[:at], part.read_bytes(), *rest]))
    part.unlink()


def zeros(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


@pytest.mark.parametrize("what", ["codes", "record"])
@pytest.mark.parametrize("harm", [flip, cut, Path.unlink])
def test_a_damaged_block_is_made_anew(
    model: Path, whole: dict[str, str], begun: Path, visited: list[int], harm: Callable[[Path], None], what: str
) -> None:
    if what == "codes":
        harm(folder_of(begun) / "blocks" / "00003.safetensors")
    elif harm is Path.unlink:  # a disk that gives zeros
        harm_record(begun, "block", 3, zeros)
    else:
        harm_record(begun, "block", 3, harm)
    (folder_of(begun) / "blocks" / ".nfs0001").write_text("of a file system")
    recorder = resumed(model, begun)
    assert "going on after block 3 of 6" in recorder.notes
    gone = harm is cut and what == "record"  # the block never landed, as far as anybody can tell
    assert recorder.warnings == ([] if gone else [
        "block 4 of the unfinished run is damaged: it and what follows are made anew"
    ])  # fmt: skip
    assert visited == [0, 1, 2, 3, 4, 5]  # what is kept was computed with what is gone
    assert contents(begun.parent) == whole


@pytest.mark.parametrize(
    ("harm", "name", "all_of_them"),
    [
        (flip, "batch-00000.safetensors", False),
        (flip, "batch-00000.safetensors", True),
        (Path.unlink, "batch-00000.safetensors", False),
    ],
)
def test_damaged_hidden_states_are_not_used(
    model: Path,
    whole: dict[str, str],
    begun: Path,
    visited: list[int],
    harm: Callable[[Path], None],
    name: str,
    all_of_them: bool,
) -> None:
    (folder_of(begun) / "hidden" / ".DS_Store").write_text("of a system")
    for number in (4, 5) if all_of_them else (5,):
        harm(folder_of(begun) / "hidden" / f"{number:05d}" / name)
    recorder = resumed(model, begun)
    assert visited == ([0, 1, 2, 3, 4, 5] if all_of_them else [4, 5])
    assert len(recorder.warnings) == 1 + all_of_them
    assert "hidden states kept before block 6 are damaged: not used" in recorder.warnings
    assert contents(begun.parent) == whole


@pytest.mark.parametrize("harm", [flip, cut])
def test_a_damaged_record_of_the_run_is_told(
    model: Path, whole: dict[str, str], begun: Path, harm: Callable[[Path], None]
) -> None:
    harm_record(begun, "blocks", BLOCKS, harm)
    before = contents(begun.parent)
    with pytest.raises(ChangedError, match=r"journal is damaged; force=True starts anew"):
        run(model, begun, resume=True)
    assert contents(begun.parent) == before
    run(model, begun, force=True)
    assert contents(begun.parent) == whole


# -- what may not have changed ---------------------------------------------------------------------------------------


def other_config(model: Path) -> dict[str, Any]:
    path = model / "config.json"
    path.write_text(path.read_text().replace("10000.0", "10001.0"))
    assert "10001.0" in path.read_text()
    return {}


def other_weights(model: Path) -> dict[str, Any]:
    flip(model / "model.safetensors")
    return {}


def other_tokenizer(model: Path) -> dict[str, Any]:
    path = model / "tokenizer_config.json"
    path.write_text(path.read_text() + "\n")
    return {}


def other_versions(model: Path) -> dict[str, Any]:
    provenance.transformers.__version__ = "4.0.0"  # type: ignore[attr-defined]
    return {}


CHANGES: list[tuple[Callable[[Path], dict[str, Any]], str]] = [
    (lambda _: {"bits": 8}, "recipe bits: 4 then, 8 now"),
    (lambda _: {"group_size": 64, "damp": 0.2}, "recipe damp: 0.1 then, 0.2 now, recipe group_size: 32 then, 64 now"),
    (lambda _: {"format": "gptq_v2"}, "recipe format: gptq then, gptq_v2 now"),
    (lambda _: {"calibration": token_matrix(12, 32, seed=1)}, "calibration tokens_sha256: "),
    (lambda _: {"dtype": "bfloat16"}, "compute dtype: float32 then, bfloat16 now"),
    (lambda _: {"max_shard_size": "1MB"}, "max_shard_size: 5000000000 then, 1000000 now"),
    (lambda _: {"untie": True}, "untie: False then, True now"),
    (other_weights, "source sha256 model.safetensors: "),
    (other_config, "companions config.json: "),
    (other_tokenizer, "companions tokenizer_config.json: "),
    (other_versions, "versions transformers: "),
]


@pytest.mark.parametrize(("change", "told"), CHANGES, ids=[told.partition(":")[0] for _, told in CHANGES])
def test_what_changed_is_named(
    model: Path, begun: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], dict[str, Any]], told: str
) -> None:
    programs = provenance.transformers  # type: ignore[attr-defined]
    monkeypatch.setattr(programs, "__version__", programs.__version__)  # put back at the end
    before = contents(begun.parent)
    options = change(model)
    with pytest.raises(ChangedError) as refusal:
        run(model, begun, resume=True, **options)
    line = str(refusal.value)
    assert line.startswith(f"resume=True: the unfinished run was made with something else ({told}")
    assert "\n" not in line
    assert contents(begun.parent) == before


def test_a_seed_is_named_and_not_what_follows_from_it(tmp_path: Path, model: Path) -> None:
    data = tmp_path / "data.txt"
    data.write_text("the quick brown fox jumps over the lazy dog while the user asks\n\n" * 200)
    options = {"calibration": str(data), "samples": 8, "seq_len": 32, "effort": "standard"}
    out = tmp_path / "out"
    stopped(model, out, 2, **options)
    with pytest.raises(ChangedError, match=r"\(calibration seed: 0 then, 1 now\)"):
        run(model, out, resume=True, seed=1, **options)


def test_differences_are_few_and_short() -> None:
    before = {"a": 1, "b": {"c": "x" * 99, "d": "0" * 64, "e": None}, "list": [1], "tokens_sha256": "a", "f": 1, "g": 1}
    now = {"a": 2, "b": {"c": "y" * 99, "d": "1" * 64, "e": 1}, "list": [2], "tokens_sha256": "b", "f": 2, "g": 2}
    assert differences(before, before) == ""
    assert differences(before, now) == (
        f"a: 1 then, 2 now, b c: {'x' * 40}... then, {'y' * 40}... now, b d: {'0' * 12} then, {'1' * 12} now, "
        "b e: none then, 1 now, f: 1 then, 2 now, and 1 more"
    )
    assert differences({"list": [1]}, {"list": [2]}) == "list: others now"


# -- what is in the way ----------------------------------------------------------------------------------------------


def test_an_unfinished_run_is_in_the_way(model: Path, whole: dict[str, str], begun: Path, visited: list[int]) -> None:
    before = contents(begun.parent)
    with pytest.raises(UsageError, match=r"resume=True goes on with it \(5 of 6 blocks\), force=True starts anew"):
        run(model, begun)
    with pytest.raises(UsageError, match="choose one"):
        run(model, begun, resume=True, force=True)
    assert contents(begun.parent) == before
    run(model, begun, force=True)
    assert visited == [0, 1, 2, 3, 4, 5]
    assert contents(begun.parent) == whole


def test_stopped_before_the_first_block_nothing_is_left(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with pytest.raises(KeyboardInterrupt) as interrupt:
        run(model, out, progress=Stopped(1, phase="capturing"))
    assert not isinstance(interrupt.value, Interrupted)
    assert not out.parent.exists()


def test_what_a_kill_before_the_first_block_leaves_is_swept(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (folder_of(out) / "staged").mkdir(parents=True)
    (folder_of(out) / "staged" / "model.safetensors").write_text("half")
    for name in ("lock", "run.json", ".run.json.partial"):  # an older version's, which marked nothing
        (folder_of(out) / name).write_text("" if name == "lock" else "{")
    recorder = resumed(model, out)
    assert "nothing to go on with: starting" in recorder.notes
    assert (out / "quantkit.json").is_file()
    assert "half" not in contents(tmp_path)


def test_two_runs_into_one_output(model: Path, whole: dict[str, str], begun: Path) -> None:
    with (folder_of(begun) / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        for options in ({}, {"resume": True}, {"force": True}):
            with pytest.raises(UsageError, match="another run is writing it"):
                run(model, begun, **options)
    resumed(model, begun)
    assert contents(begun.parent) == whole


def test_an_older_output_stays_until_the_new_one_is_there(model: Path, whole: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "again" / "out"
    run(model, out, bits=8)
    older = contents(out)
    with pytest.raises(Interrupted):
        run(model, out, force=True, progress=Stopped(3))
    assert contents(out) == older
    resumed(model, out)  # it was allowed to replace it
    assert contents(out.parent) == whole


def test_an_older_output_that_was_moved_aside_is_put_back(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(model, out, bits=8)
    older = contents(out)
    with pytest.raises(Interrupted):
        run(model, out, force=True, progress=Stopped(3))
    staging = Staging(out)
    (staging.folder / "replaced").mkdir()
    staging.staged.mkdir()
    inode = staging.staged.stat().st_ino
    staging.journal.append({"placing": None, "of": "out", "inodes": [inode], "carries": None})
    out.rename(folder_of(out) / "replaced" / "out")  # where a kill between two renames leaves it
    with pytest.raises(UsageError, match=r"what was there before is there.*finished output is kept as .*staged"):
        run(model, out)
    assert contents(out) == older
    resumed(model, out)
    assert contents(out) != older


def test_a_complete_output_is_only_told(model: Path, tmp_path: Path, visited: list[int]) -> None:
    out = tmp_path / "out"
    first = run(model, out)
    before = contents(out)
    folder_of(out).mkdir()
    shutil.copytree(out, folder_of(out) / "staged")  # a kill while the rest was being removed
    (folder_of(out) / "lock").touch()
    visited.clear()
    recorder = Recorder()
    report = run(model, out, resume=True, progress=recorder)
    assert not visited
    assert f"{out} is complete already" in recorder.notes
    assert [(layer.name, layer.loss) for layer in report.layers] == [(layer.name, layer.loss) for layer in first.layers]
    assert contents(out) == before
    assert not folder_of(out).exists()
    with pytest.raises(UsageError, match=r"complete, but made otherwise \(recipe bits: 4 then, 8 now\); force=True"):
        run(model, out, resume=True, bits=8)
    assert contents(out) == before


def test_stopped_while_evaluating_only_that_is_done(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog while the user asks\n\n" * 60)
    options = {"evaluate": True, "text": str(text)}
    first = run(model, tmp_path / "whole" / "out", **options)
    out = tmp_path / "again" / "out"
    with pytest.raises(Interrupted, match=r"while evaluating .*/again/out, which is complete"):
        run(model, out, progress=Stopped(1, phase="evaluating"), **options)
    assert json.loads((out / "quantkit.json").read_text())["evaluation"] is None
    assert not folder_of(out).exists()
    monkeypatch.setattr("quantkit.verbs.gptq.run.quantize_blocks", None)
    again = run(model, out, resume=True, **options)
    assert again.evaluation == first.evaluation
    assert contents(out.parent) == contents(tmp_path / "whole")
    monkeypatch.setattr("quantkit.verbs.gptq._evaluate_written", None)
    assert run(model, out, resume=True, **options).evaluation == first.evaluation  # as it was noted


# -- errors ----------------------------------------------------------------------------------------------------------


def test_a_read_error_in_a_shard(model: Path, whole: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "again" / "out"
    shard = model / "model.safetensors"
    intact = shard.read_bytes()

    class Cutting(Recorder):
        @contextmanager
        def phase(self, name: str, total: int) -> Iterator[Callable[[int], None]]:
            if name == "quantizing blocks":
                shard.write_bytes(intact[: len(intact) // 2])
            yield lambda steps: None

    with pytest.raises(SourceError) as error:
        run(model, out, progress=Cutting())
    first, second = str(error.value).split("\n")
    assert first.startswith(f"{shard}: cannot read model.")
    assert re.search(r"of 6 blocks (is|are) kept: resume=True goes on with", second)
    assert not out.exists()
    assert {path.name for path in out.parent.iterdir()} == {folder_of(out).name}
    assert not (folder_of(out) / "staged").exists()
    shard.write_bytes(intact)
    resumed(model, out)
    assert contents(out.parent) == whole


def test_the_source_is_hashed_beside_the_work(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its weights are checked meanwhile."""
    checking = threading.Event()
    real = provenance.file_sha256

    class Telling(Recorder):
        @contextmanager
        def phase(self, name: str, total: int) -> Iterator[Callable[[int], None]]:
            if name == "checking weights":
                checking.set()
            yield lambda steps: None

    def waiting(path: Path, *ended: Any) -> str:
        assert checking.wait(30)
        return real(path, *ended)

    monkeypatch.setattr(provenance, "file_sha256", waiting)
    run(model, tmp_path / "out", progress=Telling())
    recorded = json.loads((tmp_path / "out" / "quantkit.json").read_text())["source"]["sha256"]
    assert recorded == {"model.safetensors": real(model / "model.safetensors")}


def test_hashing_beside_ends_with_what_it_is_beside(tmp_path: Path) -> None:
    """Wherever in a file it is: all of this one would take minutes."""
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.truncate(10**12)
    source: Any = SimpleNamespace(weight_files=lambda: [path])
    source.parts = {"model": source}
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="stopped"), provenance.hashing_beside(source):
        raise RuntimeError("stopped")
    assert time.monotonic() - start < 20
    assert not [thread for thread in threading.enumerate() if "hashing" in thread.name]


def test_a_source_that_cannot_be_hashed_is_no_fault_of_the_output(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path, ended: object) -> str:
        raise OSError(5, os.strerror(5))

    monkeypatch.setattr(provenance, "file_sha256", fail)
    with pytest.raises(SourceError, match=r"model\.safetensors: cannot be read: Input/output error"):
        run(model, tmp_path / "out")
    assert not folder_of(tmp_path / "out").exists()


@pytest.mark.parametrize("where", ["packing", "landing"])
def test_an_error_beside_the_work_ends_it_at_once(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, visited: list[int]
) -> None:
    seen: list[str] = []

    def fail(self: Any, name: Any, *_: Any) -> None:
        seen.append(str(name))
        if where == "landing" or len(seen) == 8:  # the first Linear of the second block
            raise OSError(28, os.strerror(28))

    monkeypatch.setattr(*((GptqWriter, "add_linear") if where == "packing" else (landing.Lander, "_land")), fail)
    monkeypatch.setattr(landing.Lander, "land", slow(landing.Lander.land))
    with pytest.raises(OutputError, match="No space left on device; ") as error:
        run(model, tmp_path / "out")
    assert ("2 of 6 blocks are kept" in str(error.value)) == (where == "packing")
    assert max(visited) <= 3
    assert not [thread for thread in threading.enumerate() if thread.name == "lander"]


def slow(land: Callable[..., None]) -> Callable[..., None]:
    """The work on a block takes longer than landing the one before it."""

    def landed(self: Any, *arguments: Any) -> None:
        land(self, *arguments)
        self._queue.join()

    return landed


def test_numbers_that_would_fail_again_leave_nothing(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize = blockwise.StageWork.quantize
    calls: list[int] = []

    def fail(self: Any, stage: int) -> None:
        calls.append(stage)
        if len(calls) == 10:
            raise NumericError("not finite")
        quantize(self, stage)

    monkeypatch.setattr(blockwise.StageWork, "quantize", fail)
    with pytest.raises(NumericError, match=r"^not finite$"):
        run(model, tmp_path / "new" / "out")
    assert not (tmp_path / "new").exists()


# -- a release -------------------------------------------------------------------------------------------------------


def test_a_stopped_release_loses_a_block_only(make_model: MakeModel, tmp_path: Path) -> None:
    shutil.copytree(make_model("llama"), tmp_path / "model")
    small = write_recipe(tmp_path, SMALL)
    head = SMALL.split("variants:")[0]
    small.write_text(f"{head}variants:\n  - {{kind: gptq, bits: 4, group_size: 32}}\n")
    out = tmp_path / "out"
    of_one = folder_of(out / "Tiny-GPTQ-4bit-32g")
    with pytest.raises(Interrupted, match=r"^after block 1 of 2$"):
        quantkit.release(small, out, progress=Stopped(1))
    assert of_one.is_dir()
    shutil.copytree(out, tmp_path / "other")
    recorder = Recorder()
    assert not quantkit.release(small, out, progress=recorder).failures
    assert "going on after block 1 of 2" in recorder.notes
    assert not list(out.rglob("*.unfinished"))

    # What decides that variant changes, or it is no longer wanted: nothing of it is gone on with, or left.
    small.write_text(f"{head}variants:\n  - {{kind: gptq, bits: 4, group_size: 32, damp: 0.2}}\n")
    shutil.copytree(tmp_path / "other", tmp_path / "third")
    assert not quantkit.release(small, tmp_path / "other", progress=(recorder := Recorder())).failures
    assert [note for note in recorder.notes if "starting anew" in note and "damp: 0.1 then, 0.2 now" in note]
    small.write_text(f"{head}variants:\n  - {{kind: gptq, bits: 8, group_size: 32}}\n")
    assert not quantkit.release(small, tmp_path / "third").failures
    assert not list(tmp_path.rglob("*.unfinished"))


# -- signals ---------------------------------------------------------------------------------------------------------


def test_what_an_interrupt_says() -> None:
    arguments = ["gptq", "my model", "--force", "--out", "x"]
    assert farewell(KeyboardInterrupt(), arguments) == "interrupted; no unfinished output was left"
    assert farewell(Interrupted("after block 2 of 6"), arguments) == (
        "interrupted after block 2 of 6; go on with: quantkit gptq 'my model' --out x --resume"
    )
    assert farewell(KeyboardInterrupt(), [*arguments, "--resume"]) == (
        "interrupted before anything new was done; go on with: quantkit gptq 'my model' --out x --resume"
    )
    again = [*arguments[:2], "--resume"]
    assert farewell(Interrupted("after block 2 of 6"), again).endswith("quantkit gptq 'my model' --resume")
    assert farewell(Interrupted("after block 2 of 6"), ["release", "r.yaml"]) == (
        "interrupted after block 2 of 6; the same command goes on with it"
    )


@pytest.mark.parametrize(("first", "second"), [("SIGINT", "SIGTERM"), ("SIGTERM", "SIGTERM"), ("SIGTERM", "SIGINT")])
def test_the_second_signal_ends_at_once(first: str, second: str) -> None:
    one, two = signal.Signals[first], signal.Signals[second]
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            with heeded(["gptq"]):
                try:
                    os.kill(os.getpid(), one)
                    signal.pause()
                finally:
                    os.kill(os.getpid(), two)
                    signal.pause()
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 128 + two


def interrupted_by(act: Callable[[], object]) -> None:
    """The act has its end, and the interrupt that came in it arrives after."""

    def work() -> None:
        with heeded(["gptq"]):
            act()
            time.sleep(10)

    with pytest.raises(KeyboardInterrupt):
        work()


def test_an_interrupt_while_an_extension_is_imported_waits_for_its_end(
    signals_unheard: None, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def create(spec: Any) -> ModuleType:
        """What numpy's import_array() does in the C code of an extension that uses it, as numba's do."""
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.1)  # the alarm comes more than once
        except KeyboardInterrupt:
            traceback.print_exc()
            raise ImportError("numpy._core.multiarray failed to import") from None
        return ModuleType(spec.name)

    monkeypatch.setattr(_imp, "create_dynamic", create)
    spec = spec_from_file_location("made_in_c", "made_in_c.so", loader=ExtensionFileLoader("made_in_c", "made_in_c.so"))
    assert spec is not None
    made: list[ModuleType] = []
    interrupted_by(lambda: made.append(module_from_spec(spec)))
    assert [module.__name__ for module in made] == ["made_in_c"]
    assert capfd.readouterr().err == ""


def test_an_interrupt_in_a_destructor_is_not_lost(
    signals_unheard: None, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "unraisablehook", sys.__unraisablehook__)  # pytest's own collects them

    class Ending:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGTERM)

    interrupted_by(Ending)
    assert capfd.readouterr().err == ""

    class Faulty:
        def __del__(self) -> None:
            raise ValueError("told as ever")

    with heeded(["gptq"]):
        Faulty()
    assert "ValueError: told as ever" in capfd.readouterr().err
    assert sys.unraisablehook is sys.__unraisablehook__


@pytest.mark.parametrize("moment", ["placed", "half swept"])
def test_an_interrupt_when_the_output_is_complete_leaves_nothing_else(
    moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, name = (Staging, "_finish") if moment == "placed" else (outputs, "remove")
    remove = outputs.remove

    def interrupted(*arguments: Any) -> None:
        monkeypatch.undo()
        if moment == "half swept":
            remove(arguments[0])
        raise KeyboardInterrupt

    def run() -> None:
        with working(tmp_path / "out", {"a": 1}, 1, resume=False, force=False) as work:
            (work.staged / "model").write_text("whole")
            (work.folder / "blocks").mkdir()
            (work.folder / "blocks" / "00000.safetensors").write_text("{}")
            work.journal.append({"block": 0})
            monkeypatch.setattr(owner, name, interrupted)

    with pytest.raises(Interrupted, match=r"when .*/out was complete"):
        run()
    assert [path.relative_to(tmp_path).as_posix() for path in sorted(tmp_path.rglob("*"))] == ["out", "out/model"]


def test_an_interrupt_that_c_code_made_another_error_of_is_one(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    quantize, calls = blockwise.StageWork.quantize, []

    def swallow(self: Any, stage: int) -> None:
        calls.append(stage)
        if len(calls) == 7:
            with suppress(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGTERM)
            raise ValueError("could not determine the shape of object type 'torch.storage.UntypedStorage'")
        quantize(self, stage)

    monkeypatch.setattr(blockwise.StageWork, "quantize", swallow)
    (tmp_path / "text.txt").write_text("The river carries the boats. " * 400)
    capsys.readouterr()
    options = ["--calibration", tmp_path / "text.txt", "--samples", "4", "--seq-len", "32", "--group-size", "32"]
    model = str(make_model("llama"))
    with pytest.raises(SystemExit):
        main(["gptq", model, "--out", str(tmp_path / "out"), "--no-eval", "-q", *map(str, options)])
    said = capsys.readouterr().err
    assert "interrupted after block 1 of 2; " in said
    assert "go on with: quantkit gptq" in said
    assert folder_of(tmp_path / "out").is_dir()


@pytest.fixture
def signals_unheard() -> Iterator[None]:
    """Both as a process in the foreground begins with; a test run in the background has SIGINT ignored."""
    found = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    for number, handler in found.items():
        signal.signal(number, handler)


def test_signals_are_as_they_were_afterwards(signals_unheard: None) -> None:
    def heed() -> tuple[Any, ...]:
        return *map(signal.getsignal, (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)), sys.unraisablehook

    before = heed()
    with heeded(["gptq"]):
        assert all(now is not was for now, was in zip(heed(), before, strict=True))
    assert heed() == before
    with heeded(["chat"]):  # where Ctrl-C stops an answer
        assert signal.getsignal(signal.SIGINT) is before[0]
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a job in the background
    with heeded(["gptq"]):
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


# -- kills at random moments, a full disk ----------------------------------------------------------------------------

COMMON = r"""
import gc, hashlib, os, random, resource, shutil, signal, subprocess, sys, time
from pathlib import Path

import torch
import quantkit
from quantkit import cli
from quantkit.tokens import TokenMatrix

tokens = TokenMatrix.of(torch.randint(4, 300, (12, 32), generator=torch.Generator().manual_seed(0)), "random")
model, data, out, seed = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), int(sys.argv[4])
chance = random.Random(seed)
options = ["--calibration", data, "--samples", "8", "--seq-len", "32", "--group-size", "32", "--no-eval", "--quiet"]


def start(command, *more, log=None, limit=None):
    child = os.fork()
    if child == 0:
        os.dup2(os.open(log or os.devnull, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if limit is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        try:
            command(*more)
        except SystemExit as done:
            os._exit(done.code or 0)
        os._exit(70)
    return child


def code(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def gptq(place, **options_of_start):
    arguments = ["gptq", str(model), "--out", str(place), "--resume", "--checkpoint-every", "2", *options]
    return start(cli.main, arguments, **options_of_start)


def library(place):  # the same, without a command line and a text to draw from
    quantkit.gptq(
        model, place, calibration=tokens, group_size=32, evaluate=False, resume=True, checkpoint_every="2"
    )
    sys.exit()




def moment(child, place):
    # Wait until a random one of a run: until some more blocks have landed, or it writes the rest, and a little longer.
    folder, more = place / ".out.unfinished", chance.choice([0, 0, 1, 1, 2, 3, 9])
    goal = len(list(folder.glob("blocks/*.safetensors"))) + more
    staged = folder / "staged" / "config.json"
    while more and len(list(folder.glob("blocks/*.safetensors"))) < goal and not staged.exists():
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return
        time.sleep(0.002)
    time.sleep(chance.uniform(0, 0.02 if more else 0.3))


def files(folder):
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
            for p in folder.rglob("*") if p.is_file()}


def check(folder, allowed):
    found = {p.name for p in folder.iterdir()}
    assert found <= set(allowed), (folder, found)


try:  # imports and makes once, for all children, what takes the time
    cli.main(["gptq", str(model), "--out", str(out / "first" / "out"), *options])
except SystemExit as done:
    assert not done.code
gc.collect()
gc.freeze()
assert code(gptq(out / "whole" / "out")) == 0
whole = files(out / "whole")
assert "out/quant_log.csv" in whole
"""

KILLED = (
    COMMON
    + r"""
assert code(start(library, out / "lib" / "out")) == 0
whole = files(out / "lib")
kills, places, blocks = int(sys.argv[5]), 0, set()
while kills:
    place = out / f"killed-{places}"
    places += 1
    for _ in range(min(kills, 4)):
        child = start(library, place / "out")
        moment(child, place)
        if os.waitpid(child, os.WNOHANG)[0]:
            break
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        kills -= 1
        if place.exists():
            check(place, ["out", ".out.unfinished"])
        blocks.add(len(list((place / ".out.unfinished").glob("blocks/*.safetensors"))))
    else:
        assert code(start(library, place / "out")) == 0
    assert files(place) == whole, place
    check(place, ["out"])
print(len(blocks))
"""
)

ENDED = (
    COMMON
    + r"""
ends, places, words = int(sys.argv[5]), 0, set()
log = out / "log"
while ends:
    place = out / f"ended-{places}"
    places += 1
    for _ in range(min(ends, 4)):
        child = gptq(place / "out", log=log)
        moment(child, place)
        os.kill(child, signal.SIGTERM)
        status = code(child)
        said = log.read_text()
        if status == 0:
            break
        assert status in (1, -signal.SIGTERM), (status, said)  # the latter before the command has begun
        ends -= 1
        kept = (place / ".out.unfinished" / "journal").exists()
        if place.exists():
            check(place, [".out.unfinished"] if kept else ["out"])
        if kept:
            check(place / ".out.unfinished", ["lock", "journal", "blocks", "hidden", "weights"])
        if status == 1:
            words.add(said.partition(" ")[2][:11])
            assert said.count("\n") == 1 and said.startswith("interrupted"), said
            assert f"; go on with: quantkit gptq {model} --out" in said and said.endswith("--resume\n"), said
            assert kept or "after block" not in said, said
    else:
        assert code(gptq(place / "out")) == 0
    assert files(place) == whole, place
    check(place, ["out"])
for number in range(4):  # another command, which has nothing to go on with
    place = out / f"converted-{number}"
    place.mkdir()
    child = start(cli.main, ["convert", str(model), "--out", str(place / "out"), "--quiet"], log=log)
    time.sleep(chance.uniform(0, 0.3))
    os.kill(child, signal.SIGTERM)
    code(child)
    check(place, ["out"])
    assert not (place / "out").exists() or (place / "out" / "quantkit.json").exists()
print("after block" in words)
"""
)

FULL = (
    COMMON
    + r"""
disk, log = Path(sys.argv[5]), out / "log"
need = sum(p.stat().st_size for p in (out / "whole").rglob("*") if p.is_file())
kept = 0
for number in range(10 if disk.name != "none" else 4):
    size = chance.randrange(need // 8, 2 * need)
    if disk.name != "none":
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", disk], check=True)
    place = disk / "here" if disk.name != "none" else out / f"full-{number}"
    status = code(gptq(place / "out", log=log, limit=None if disk.name != "none" else size // 4))
    said = log.read_text()
    if status:
        assert status == 1 and said.count("\n") == 1, said
        assert "No space left on device" in said or "File too large" in said, said
        unfinished = place / ".out.unfinished"
        assert not (place / "out").exists()
        assert unfinished.exists() == ("kept: --resume goes on with" in said), said
        kept += unfinished.exists()
    if disk.name != "none":
        subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
    assert code(gptq(place / "out")) == 0
    assert files(place) == whole, place
    check(place, ["out"])
    if disk.name != "none":
        subprocess.run(["umount", disk], check=True)
print(kept)
"""
)


@pytest.fixture
def torture(make_model: MakeModel, tmp_path: Path) -> Callable[..., str]:
    """Run a script on a model of some blocks; returns the last line that it printed."""
    source = make_model("llama", num_hidden_layers=BLOCKS)
    data = tmp_path / "data.txt"
    data.write_text("the quick brown fox jumps over the lazy dog while the user asks\n\n" * 60)
    (tmp_path / "runs").mkdir()

    def start(script: str, seed: int, last: str | Path, *before: str) -> str:
        arguments = [str(source), str(data), str(tmp_path / "runs"), str(seed), str(last)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
        command = [*before, sys.executable, "-c", script, *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=540)
        assert done.returncode == 0, done.stderr
        return done.stdout.split("\n")[-2]

    return start


def test_fifty_kills(torture: Callable[..., str]) -> None:
    assert int(torture(KILLED, 11, "50")) >= 4  # numbers of blocks that had landed


def test_twenty_times_sigterm(torture: Callable[..., str]) -> None:
    assert torture(ENDED, 12, "20") == "True"


def test_ten_full_disks(torture: Callable[..., str], tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["unshare", "--mount"]
    can = (
        shutil.which("unshare")
        and not subprocess.run(
            [*mount, "mount", "-t", "tmpfs", "-o", "size=1m", "none", str(disk)], capture_output=True
        ).returncode
    )
    assert int(torture(FULL, 13, disk, *mount) if can else torture(FULL, 13, "none")) >= 3


def test_four_limits_of_file_size(torture: Callable[..., str]) -> None:
    assert int(torture(FULL, 15, "none")) >= 1
