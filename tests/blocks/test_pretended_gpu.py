"""Whole runs on a pretended GPU: no stray tensor, no race, and how often the host waits. First, that it sees these."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeModel, Recorder, token_matrix
from support.pretended_gpu import DevicesMeet, PretendedGpus

import quantkit
from quantkit.blocks import workers

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() or sys.platform != "linux", reason="a real GPU is here, or it is not Linux"
)
GPU = torch.device("cuda", 0)


def beside() -> torch.Tensor:
    return torch.ones(8)


def there() -> torch.Tensor:
    return torch.ones(8, device=GPU)


@pytest.mark.parametrize(
    "program",
    [
        lambda: there() + beside(),
        lambda: there() + torch.ones(8, device="cuda:1"),
        lambda: there().view(1, 8) @ beside(),
        lambda: beside()[torch.zeros(1, dtype=torch.long, device=GPU)],
        lambda: there().gather(0, torch.zeros(1, dtype=torch.long)),
        lambda: torch.addcmul(there(), there(), beside()),
        lambda: torch.ones((), device="cpu").add_(there().sum()),
    ],
)
def test_what_cuda_refuses_is_refused(program: Callable[[], Any]) -> None:
    with PretendedGpus(), pytest.raises(DevicesMeet):
        program()


@pytest.mark.parametrize(
    ("program", "waits"),
    [
        (lambda: (there() * torch.tensor(2.0) + 1).relu_().view(2, 4).T.contiguous(), []),
        (lambda: torch.empty(8, device=GPU).copy_(beside().pin_memory(), non_blocking=True), []),
        (lambda: torch.empty(8, device=GPU).copy_(beside(), non_blocking=True), ["copied to the GPU"]),
        (lambda: there().cpu(), ["copied to the host"]),
        (lambda: bool(there().sum() > 1), ["item"]),
        (lambda: there()[there() > 0], ["index by a mask"]),
        (lambda: there()[[1, -1]], ["index of the host"]),
    ],
)
def test_what_the_host_waits_for_is_told(program: Callable[[], Any], waits: list[str]) -> None:
    with PretendedGpus() as gpus, torch.inference_mode():
        program()
    assert [wait.what for wait in gpus.waits] == waits
    assert all("test_pretended_gpu.py" in wait.where for wait in gpus.waits)


def used_on_another(waited: bool, recorded: bool) -> None:
    """A tensor that another stream reads, let go and its memory taken again."""
    x, side = there(), torch.cuda.Stream(GPU)
    if waited:
        side.wait_stream(torch.cuda.current_stream(GPU))
    with torch.cuda.stream(side):
        y = x + 1
    if recorded:
        x.record_stream(side)
    del x
    there()
    torch.cuda.current_stream(GPU).wait_stream(side)
    y + 1


@pytest.mark.parametrize(
    ("waited", "recorded", "races", "early"), [(False, True, 1, 0), (True, False, 0, 1), (True, True, 0, 0)]
)
def test_races_and_memory_let_go_too_early_are_found(waited: bool, recorded: bool, races: int, early: int) -> None:
    with PretendedGpus() as gpus:
        used_on_another(waited, recorded)
    assert (len(gpus.races), len(gpus.early)) == (races, early)


# -- quantkit --------------------------------------------------------------------------------------------------------

# Family, options; waits and launches a block, what the ends cost among them, with a tenth to spare; how many times the
# bytes of the weights go up: for the weights of tokens and to be quantized, and of some blocks or ends for a look.
RUNS: dict[str, tuple[str, dict[str, Any], int, int, float]] = {
    "llama": ("llama", {"group_size": 32}, 190, 3700, 2),
    "mixtral": ("mixtral", {"group_size": 32}, 440, 8400, 2.4),
    "gemma3": ("gemma3_text", {"group_size": 32}, 205, 4200, 2),
    "ggml": ("llama", {"ggml": "q4_0", "pre": "smollm"}, 205, 3900, 3),
}
BLOCKS = 2


@pytest.mark.parametrize(("family", "options", "waits", "launches", "times"), RUNS.values(), ids=RUNS)
@pytest.mark.filterwarnings("ignore:.*experts saw fewer calibration tokens")
def test_a_run_mixes_no_devices_races_nowhere_and_waits_little(
    family: str,
    options: dict[str, Any],
    waits: int,
    launches: int,
    times: float,
    make_model: MakeModel,
    recorder: Recorder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(workers, "BATCH_TOKENS", 32)  # several batches
    model, tokens = make_model(family, dtype="bfloat16"), token_matrix(6, 16)
    with PretendedGpus() as gpus:
        out, given = tmp_path / "out", {"calibration": tokens, "device": "cuda:1", "evaluate": False, **options}
        report = quantkit.gptq(model, out, progress=recorder, **given)
    stored = (model / "model.safetensors").stat().st_size
    told = f"{len(gpus.waits) / BLOCKS} waits and {gpus.launches / BLOCKS} launches a block"
    assert report.layers
    assert not any("gradient" in note for note in recorder.notes), recorder.notes  # stray tensors there are a note
    assert (gpus.races, gpus.early, set(gpus.devices)) == ([], [], {"cuda:1"})
    assert not [
        wait for wait in gpus.waits if wait.where.endswith(" call")
    ]  # a forward waits for experts' numbers alone
    assert len(gpus.waits) <= BLOCKS * waits, told
    assert gpus.launches <= BLOCKS * launches, told
    assert gpus.uploaded <= times * stored
