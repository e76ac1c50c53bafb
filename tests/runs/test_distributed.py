"""Several processes: the same codes, the same bytes with --deterministic, and a clear end when one of them is lost."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MakeModel
from safetensors.torch import load_file
from support.forked_ranks import ForkedRanks, Outcome, Request
from support.thread_ranks import together
from support.tolerance import assert_mean_product, summed

from quantkit.blocks.workers import BATCH_TOKENS
from quantkit.codes import take_apart
from quantkit.errors import UsageError
from quantkit.options import QuantSpec
from quantkit.progress import SILENT
from quantkit.quantize import gptq
from quantkit.quantize.hessian import HessianAccumulator
from quantkit.quantize.sharing import Sharing
from quantkit.runs import ranks as parallel
from quantkit.runs import watch
from quantkit.runs.ranks import Ranks, share_of
from quantkit.runs.watch import RankError, Watch

# 3 batches: two processes do not get equally many, and of four one gets none.
BATCHES = 3
DRAWN = ["--samples", str(BATCHES * BATCH_TOKENS // 512), "--seq-len", "512", "--calibration"]
GPTQ = ["gptq", "model", "--out", "out", "--group-size", "32", "--device", "cpu", "--quiet"]

Start = Callable[..., list[Outcome]]


@pytest.fixture(scope="module")
def forked() -> Iterator[ForkedRanks]:
    parent = ForkedRanks()
    yield parent
    parent.close()


@pytest.fixture(scope="module")
def place(make_model: MakeModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model that has experts, a dense one, and texts to calibrate on and to be measured on."""
    folder = tmp_path_factory.mktemp("ranks")
    shutil.copytree(make_model("mixtral", max_position_embeddings=512), folder / "model")
    shutil.copytree(make_model("llama", max_position_embeddings=512, num_hidden_layers=4), folder / "dense")
    words = ("the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "nobody", "asks", "why")
    chosen = np.random.default_rng(0).integers(len(words), size=11000)
    (folder / "calibration.txt").write_text(" ".join(words[i] for i in chosen[:10000]))
    (folder / "held-out.txt").write_text(" ".join(words[i] for i in chosen[10000:]))
    return folder


@pytest.fixture
def start(forked: ForkedRanks, place: Path, tmp_path: Path) -> Start:
    """start(name, ranks, arguments, ...) -> outcomes; works in a folder of that name with the models and texts."""

    def start(name: str, ranks: int, arguments: list[str], **options: Any) -> list[Outcome]:
        folder = tmp_path / name
        if not folder.exists():
            folder.mkdir()
            for path in place.iterdir():
                (folder / path.name).symlink_to(path)
        return forked.run(Request(ranks, arguments, str(folder), **options))

    return start


@pytest.fixture(scope="module")
def one(forked: ForkedRanks, place: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files that one process makes of the model with experts."""
    folder = tmp_path_factory.mktemp("one")
    for path in place.iterdir():
        (folder / path.name).symlink_to(path)
    check_done(forked.run(Request(1, quantize("--deterministic"), str(folder))))
    return contents(folder / "out")


def quantize(*more: str, model: str = "model") -> list[str]:
    arguments = [model if argument == "model" else argument for argument in GPTQ]
    return [*arguments, *DRAWN, "calibration.txt", "--text", "held-out.txt", *more]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def check_done(outcomes: list[Outcome]) -> None:
    assert [outcome.code for outcome in outcomes] == [0] * len(outcomes), [outcome.err for outcome in outcomes]
    for other in outcomes[1:]:
        assert (other.out, other.err) == ("", "")


# -- the same result -------------------------------------------------------------------------------------------------


def test_deterministic_gives_the_same_bytes_for_any_number(start: Start, tmp_path: Path, one: dict[str, bytes]) -> None:
    """Every file: codes, statistics, the evaluation in quantkit.json."""
    record = json.loads(one["quantkit.json"])
    assert record["compute"]["deterministic"] is True
    assert record["evaluation"]["results"][1]["kl_divergence"]["mean"] > 0
    for ranks in (2, 4):
        check_done(start(str(ranks), ranks, quantize("--deterministic")))
        assert contents(tmp_path / str(ranks) / "out") == one, ranks


def test_otherwise_the_codes_are_equal_but_for_a_few(start: Start, tmp_path: Path) -> None:
    """A code on the other side of a tie changes what its row's later columns and all later blocks see: in the first
    block hardly any differ, in the last one some, and the losses are those of one process."""
    for ranks in (1, 4):
        check_done(start(str(ranks), ranks, quantize("--no-eval", model="dense")))
    one, four = (json.loads((tmp_path / ranks / "out/quantkit.json").read_text()) for ranks in ("1", "4"))
    assert "deterministic" not in four["compute"]
    losses = [[layer["loss"] for layer in record["layers"]] for record in (one, four)]
    np.testing.assert_allclose(losses[1], losses[0], rtol=0.02)
    ours, theirs = (load_file(tmp_path / ranks / "out/model.safetensors") for ranks in ("4", "1"))
    names = [name for name in ours if name.endswith("qweight")]
    shifts = torch.arange(0, 32, 4)
    differ = {n: (((ours[n] ^ theirs[n])[..., None] >> shifts) & 15 != 0).float().mean() for n in names}
    assert len(names) == 28
    assert max(share for name, share in differ.items() if ".layers.0." in name) <= 0.002
    assert torch.stack(list(differ.values())).mean() <= 0.05


@pytest.mark.parametrize(
    "more",
    [
        ["--effort", "best"],
        ["--budget", "6bpw"],
        ["--ggml", "q5_0", "--pre", "gpt-2"],
        ["--act-order", "dynamic", "--bits", "8", "--asym"],
        ["--format", "mlx", "--head", "8", "--embeddings", "4"],
        ["--experts", "all", "--effort", "standard"],
    ],
)
def test_deterministic_on_other_grids(start: Start, tmp_path: Path, more: list[str]) -> None:
    arguments = quantize("--deterministic", "--no-eval", *more, model="model" if "--experts" in more else "dense")
    if {"--ggml", "--budget"} & set(more):
        arguments = [a for a in arguments if a not in ("--group-size", "32")]
    for ranks in (1, 3):
        check_done(start(str(ranks), ranks, arguments))
    assert contents(tmp_path / "3" / "out") == contents(tmp_path / "1" / "out")


def test_refining_gives_the_same_bytes_for_any_number(start: Start, tmp_path: Path) -> None:
    """One killed and gone on with by more, too. A step has two windows, so that of four processes two only listen."""
    options = "--deterministic --no-eval --effort fast --bits 2 --refine --refine-steps 8"
    arguments = quantize(*options.split(), model="dense")
    for ranks in (1, 2, 4):
        check_done(start(str(ranks), ranks, arguments))
    whole = contents(tmp_path / "1" / "out")
    refined = json.loads(whole["quantkit.json"])["refined"]
    assert refined["after"] < refined["before"]
    lost = start("killed", 2, arguments, stop=(1, 6, signal.SIGKILL), at="steps")
    assert [outcome.code for outcome in lost] == [1, -signal.SIGKILL]
    kept = [path.name for path in (tmp_path / "killed/.out.unfinished/refined").iterdir()]
    assert kept == ["00004.safetensors"]
    check_done(start("killed", 4, [*arguments, "--resume"]))
    for name in ("2", "4", "killed"):
        assert contents(tmp_path / name / "out") == whole, name


def test_the_first_processor_decides_the_arithmetic_of_all(start: Start, tmp_path: Path) -> None:
    arguments = quantize("--deterministic", "--no-eval", model="dense")
    for name, fast, dtype in (("first", [0], "bfloat16"), ("other", [1], "float32")):
        check_done(start(name, 2, arguments, bfloat16=fast))
        assert json.loads((tmp_path / name / "out/quantkit.json").read_text())["compute"]["dtype"] == dtype
    told = start("told", 2, arguments, last=["--dtype", "float32"], bfloat16=[0, 1])
    assert "dtype" in told[0].err


def test_measuring_gives_the_same_numbers(start: Start, tmp_path: Path) -> None:
    measure = ["--text", "held-out.txt", "--seq-len", "96", "--device", "cpu", "--quiet", "--json"]
    families = {}
    for ranks in (1, 3):
        found = start(str(ranks), ranks, ["perplexity", "dense", "--against", "model", *measure])
        compared = start(str(ranks), ranks, ["compare", "model", "dense", "--out", "report", "--no-plots", *measure])
        check_done(found)
        check_done(compared)
        families[ranks] = found[0].out, compared[0].out, contents(tmp_path / str(ranks) / "report")
    assert json.loads(families[1][0])["tokens"] > 1000
    assert json.loads(families[1][1])["models"][1]["layers"] is None  # of another depth
    assert families[3] == families[1]
    same = ["compare", "model", "out", "--out", "layers", "--no-plots", *measure]
    start("1", 1, quantize("--no-eval"))
    shutil.copytree(tmp_path / "1/out", tmp_path / "3/out")
    one, three = start("1", 1, same), start("3", 3, same)
    assert all(json.loads(one[0].out)["models"][1]["layers"])
    assert three[0].out == one[0].out


def test_torchrun_starts_it(start: Start, tmp_path: Path) -> None:
    """As the README has it; --json on the first process's stdout is one object."""
    arguments = ["perplexity", "dense", "--text", "held-out.txt", "--device", "cpu", "--quiet", "--json"]
    one = start("here", 1, arguments)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "quantkit", *arguments]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path / "here", env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout == one[0].out


# -- one of them is lost ---------------------------------------------------------------------------------------------


def test_killed_and_resumed_with_fewer_gives_the_same_bytes(start: Start, tmp_path: Path) -> None:
    arguments = quantize("--deterministic", "--no-eval", "--checkpoint-every", "1", model="dense")
    check_done(start("whole", 1, arguments))
    lost = start("killed", 3, arguments, stop=(1, 1, signal.SIGKILL))
    assert [outcome.code for outcome in lost] == [1, -signal.SIGKILL, 1]
    assert lost[0].seconds < 60
    assert lost[0].err.startswith("error: rank 1 on ")
    assert "is gone: killed, out of memory, or cut off; go on with --resume" in lost[0].err
    assert lost[0].err.count("\n") == 1
    assert lost[2].err == ""
    assert not (tmp_path / "killed" / "out").exists()
    kept = sorted(path.name for path in (tmp_path / "killed/.out.unfinished/hidden/00002").iterdir())
    assert kept == [f"batch-0000{number}.safetensors" for number in range(BATCHES)]
    check_done(start("killed", 2, [*arguments, "--resume"]))
    assert contents(tmp_path / "killed" / "out") == contents(tmp_path / "whole" / "out")
    assert not (tmp_path / "killed/.out.unfinished").exists()


def test_killed_while_weighing_it_goes_on_with_the_block_before(start: Start, tmp_path: Path) -> None:
    """Whichever is killed, and however many go on."""
    arguments = quantize("--deterministic", "--no-eval", "--checkpoint-every", "1", model="dense")
    check_done(start("whole", 1, arguments))
    for rank, others in ((0, 1), (1, 3)):
        name = f"killed-{rank}"
        lost = start(name, 2, arguments, stop=(rank, 2, signal.SIGKILL), at="weighing")
        assert sorted(outcome.code for outcome in lost) == [-signal.SIGKILL, 1]
        kept = tmp_path / name / ".out.unfinished/weights/gradients"
        assert [len(list(folder.iterdir())) for folder in kept.glob("00002")] == [2 * BATCHES]  # of 512 tokens
        assert len(list(kept.iterdir())) == 1
        check_done(start(name, others, [*arguments, "--resume"]))
        assert contents(tmp_path / name / "out") == contents(tmp_path / "whole/out")


def test_a_lost_process_is_told_where_the_launcher_ends_the_others(start: Start, tmp_path: Path) -> None:
    """torchrun sends the others a SIGTERM as soon as one has died, which may come before they notice it."""
    start("killed", 1, quantize("--no-eval", "--dry-run", model="dense"))  # makes the folder
    arguments = quantize("--no-eval", model="dense")
    request = Request(3, arguments, "", stop=(2, 1, signal.SIGKILL))
    program = [str(Path(__file__).parents[1] / "support" / "forked_ranks.py"), json.dumps(asdict(request))]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "3", *program]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path / "killed", env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert re.search(r"^error: rank 2 on .* is gone: .*; go on with --resume", done.stderr, re.MULTILINE), done.stderr
    assert "interrupted" not in done.stderr
    check_done(start("killed", 1, [*arguments, "--resume"]))


def test_the_first_process_killed(start: Start, tmp_path: Path) -> None:
    """It keeps the store that the others ask, and one of them has to speak in its place."""
    arguments = quantize("--no-eval", "--checkpoint-every", "1", model="dense")
    lost = start("killed", 3, arguments, stop=(0, 1, signal.SIGKILL))
    assert [outcome.code for outcome in lost] == [-signal.SIGKILL, 1, 1]
    assert lost[0].seconds < 60
    said = [outcome.err for outcome in lost[1:] if outcome.err]
    assert len(said) == 1
    assert said[0].startswith("error: rank 0 ")
    assert "go on with --resume" in said[0]
    check_done(start("killed", 1, [*arguments, "--resume"]))


def test_a_process_that_hangs_counts_as_gone(start: Start) -> None:
    hung = start("hung", 2, quantize("--no-eval", model="dense"), stop=(1, 0, signal.SIGSTOP), stale=4.0)
    assert hung[0].code == 1
    assert hung[0].seconds < 40
    assert hung[0].err.startswith("error: rank 1 on ")


def test_silence_counts_from_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "_BEAT", 0.02)
    monkeypatch.setattr(watch, "_STALE", 0.2)
    monkeypatch.setattr(watch, "ignore_signals", lambda: None)
    store = torch.distributed.HashStore()
    first = Watch(lambda: store, 0, 2, "", SILENT)

    def look() -> None:
        for _ in range(500):
            first.check()
            time.sleep(0.01)

    with first.waiting():
        try:
            with monkeypatch.context() as quiet:
                quiet.setattr(Watch, "_pulse", lambda self, store: None)  # stopped before its thread runs
                Watch(lambda: store, 1, 2, "", SILENT).stop()
            with pytest.raises(RankError):
                look()
            assert first._failing == "rank 1 no longer answers"
        finally:
            first.stop()


def test_an_error_anywhere_is_told_once(start: Start, tmp_path: Path) -> None:
    failed = start("failed", 3, quantize("--no-eval", model="dense"), stop=(2, 1, 0))
    assert [outcome.code for outcome in failed] == [1, 1, 1]
    assert failed[0].err.startswith("error: rank 2 on ")
    assert "a broken weight" in failed[0].err
    assert (failed[1].err, failed[2].err) == ("", "")


def test_one_process_is_interrupted(start: Start) -> None:
    stopped = start("stopped", 2, quantize("--no-eval", model="dense"), stop=(1, 1, signal.SIGTERM))
    assert [outcome.code for outcome in stopped] == [1, 1]
    assert "interrupted; go on with --resume" in stopped[0].err
    assert stopped[1].err == ""


# -- wrong starts ----------------------------------------------------------------------------------------------------


def test_other_commands_run_in_one_process(start: Start) -> None:
    refused = start("refused", 2, ["ggml", "dense", "--out", "x.gguf"])
    assert [outcome.code for outcome in refused] == [2, 2]
    assert "ggml runs in one process, and 2 were started" in refused[0].err
    assert refused[1].err == ""


def test_started_with_different_options(start: Start) -> None:
    refused = start("refused", 2, quantize("--no-eval"), last=["--bits", "8"])
    assert [outcome.code for outcome in refused] == [2, 2]
    assert "rank 1 on " in refused[0].err
    assert "bits is 8 there, 4 on rank 0" in refused[0].err


def test_an_output_that_not_all_see(start: Start, tmp_path: Path) -> None:
    """As on machines without a common file system: what was made stays, and is told of."""
    lost = start("apart", 2, quantize(model="dense"), last=["--out", "elsewhere"])
    assert [outcome.code for outcome in lost] == [1, 1]
    assert lost[0].err.startswith("error: rank 1 on ")
    assert "must lie on a file system that all machines share, or use --no-eval" in lost[0].err
    assert "is complete, only its evaluation failed" in lost[0].err
    assert lost[1].err == ""
    assert (tmp_path / "apart/out/quantkit.json").exists()


def test_an_error_before_they_meet_is_told_by_the_first(start: Start) -> None:
    refused = start("refused", 2, quantize("--bits", "5"))
    assert [outcome.code for outcome in refused] == [2, 2]
    assert refused[0].err.count("error:") == 1
    assert refused[1].err == ""


@pytest.mark.parametrize(
    ("variables", "says"),
    [({"WORLD_SIZE": "two"}, "must be numbers"), ({"WORLD_SIZE": "2"}, "RANK is none of 0 .. 1")],
)
def test_an_environment_that_makes_no_sense(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], says: str
) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=says):
        parallel.world_size()


# -- two machines ----------------------------------------------------------------------------------------------------


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    """Two network namespaces that see each other through a pair of virtual links, and nothing else."""
    names = [f"quantkit-{os.getpid()}-{number}" for number in (0, 1)]
    if shutil.which("ip") is None:
        pytest.skip("iproute2 is not installed")
    try:
        for name in names:
            made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
            if made.returncode:
                pytest.skip(f"network namespaces cannot be made here: {made.stderr.strip()}")
        ip = ["ip", "-n", names[0]]
        subprocess.run(
            [*ip, "link", "add", "link0", "type", "veth", "peer", "name", "link0", "netns", names[1]], check=True
        )
        for number, name in enumerate(names):
            subprocess.run(["ip", "-n", name, "addr", "add", f"10.77.0.{number + 1}/24", "dev", "link0"], check=True)
            for link in ("lo", "link0"):
                subprocess.run(["ip", "-n", name, "link", "set", link, "up"], check=True)
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def test_two_hosts_give_the_bytes_of_one(start: Start, tmp_path: Path, hosts: list[str], one: dict[str, bytes]) -> None:
    """Two processes on each, which see each other through that link alone."""
    where = {"namespaces": hosts, "interface": "link0", "address": "10.77.0.1"}
    check_done(start("two", 4, quantize("--deterministic"), **where))
    assert contents(tmp_path / "two" / "out") == one
    measure = ["perplexity", "out", "--text", "held-out.txt", "--device", "cpu", "--quiet", "--json"]
    assert start("two", 2, measure, **where)[0].out == start("two", 1, measure)[0].out


# -- the parts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 3, 16, 37])
def test_batches_are_shared_out_once_each(count: int) -> None:
    for size in (1, 2, 3, 7, 16, 20):
        for deterministic in (False, True):
            shares = together(size, lambda ranks, d=deterministic: list(Sharing(ranks, d).batches(count)))
            assert [number for share in shares for number in share] == list(range(count))
            assert shares[0]


@pytest.mark.numerics
@pytest.mark.parametrize("count", [1, 5, 16, 37])
def test_a_hessian_has_the_same_bits_for_any_number(count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    # The third batch is an expert's that nothing was routed to.
    batches = [torch.randn(0 if i == 2 else 24 + i, 40, generator=generator) * 10**i**0.5 for i in range(count)]
    seen_by_all = torch.cat(batches)

    def reduced(ranks: Ranks, deterministic: bool) -> tuple[torch.Tensor, int]:
        sharing = Sharing(ranks, deterministic)
        total = sharing.gathering(partial(HessianAccumulator, 40, torch.device("cpu")), count)
        for i, number in enumerate(sharing.batches(count)):
            total.add(i, batches[number])
        return total.finish("x")

    [(one, tokens)] = together(1, lambda ranks: reduced(ranks, True))
    assert tokens == len(seen_by_all)
    assert_mean_product(one, seen_by_all)
    for size in (2, 3, 4, 5, 8, 16, 19):
        for H, seen in together(size, lambda ranks: reduced(ranks, True)):
            assert torch.equal(H, one), size
            assert seen == tokens
        for H, seen in together(size, lambda ranks: reduced(ranks, False)):
            assert_mean_product(H, seen_by_all)
            assert seen == tokens
    [(H, _)] = together(1, lambda ranks: reduced(ranks, False))
    assert_mean_product(H, seen_by_all)


@pytest.mark.numerics
@pytest.mark.parametrize(
    "spec", [QuantSpec(bits=4, group_size=32), QuantSpec(bits=3, group_size=-1, sym=False, act_order="dynamic")]
)
def test_rows_have_the_same_codes_for_any_number(spec: QuantSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantkit.quantize.sharing._TILE", 4)
    generator = torch.Generator().manual_seed(0)
    W, x = torch.randn(22, 64, generator=generator), torch.randn(300, 64, generator=generator)
    H = x.T @ x / len(x)
    # How much larger than a loss the absolute sum of its terms e_i H_ij e_j can be.
    cancelled = float(torch.linalg.matrix_norm(H.abs(), 2) / torch.linalg.eigvalsh(H)[0])

    def result(ranks: Ranks, deterministic: bool) -> list[torch.Tensor]:
        found = Sharing(ranks, deterministic).solve(gptq, W, H, spec)
        return [*take_apart(found.linear)[0].values(), found.loss, found.rtn_loss]

    for deterministic in (True, False):
        one = together(1, lambda ranks, d=deterministic: result(ranks, d))[0]
        assert one[0].shape == (22, 64)
        for size in (2, 3, 30):  # the last: more than there are rows
            for found in together(size, lambda ranks, d=deterministic: result(ranks, d)):
                if deterministic:
                    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, one, strict=True)), size
                    continue
                *parts, loss, rtn_loss = zip(found, one, strict=True)
                assert all((ours != theirs).float().mean() < 0.01 for ours, theirs in parts), size
                same = (found[0] == one[0]).all(dim=1)  # a code beyond a tie makes its row's loss another one
                for ours, theirs in (loss, rtn_loss):
                    allowed = summed(2 * 64, scale=cancelled * float(theirs.max()))
                    torch.testing.assert_close(ours[same], theirs[same], **allowed)


def test_what_is_sent_of_a_symmetric_matrix() -> None:
    for size in (1, 5, 64):
        H = torch.randn(size, size)
        sums, copy = (HessianAccumulator(size, torch.device("cpu")) for _ in range(2))
        sums.sum.copy_(H)
        packed = sums.packed()
        copy.unpack(packed)
        assert torch.equal(copy.sum.triu(), H.triu())
        assert packed.numel() <= max(1, 0.6 * size**2) or size < 8
    assert [list(share_of(5, part, 3)) for part in range(3)] == [[0, 1], [2, 3], [4]]


@pytest.mark.parametrize(
    ("gpus", "environment", "taken"),
    [
        (8, {"LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "8"}, "cuda:3"),
        (1, {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}, "cuda:0"),
        (1, {"SLURM_LOCALID": "3", "LOCAL_WORLD_SIZE": "4", "SLURM_GPUS_PER_TASK": "1"}, "cuda:0"),  # its own, of four
        (4, {"SLURM_LOCALID": "3", "LOCAL_WORLD_SIZE": "4"}, "cuda:3"),
        (1, {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, None),
        (2, {"SLURM_LOCALID": "3", "LOCAL_WORLD_SIZE": "4", "SLURM_GPUS_PER_TASK": "1"}, None),
    ],
)
def test_each_process_has_a_gpu_of_its_own(
    gpus: int, environment: dict[str, str], taken: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("LOCAL_RANK", "SLURM_LOCALID", "LOCAL_WORLD_SIZE", "SLURM_GPUS_PER_TASK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    current: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    if taken is None:
        with pytest.raises(UsageError, match=f"processes on a machine with {gpus} GPUs"):
            parallel._own_gpus("auto")
        return
    assert parallel._own_gpus("auto")
    group = parallel._Group(0, 2, None, own_gpus=True)  # type: ignore[arg-type]
    assert group.device("auto") == taken
    assert current == [int(taken.removeprefix("cuda:"))]
