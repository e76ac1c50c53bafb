"""Whole runs on a pretended GPU: no stray tensor, no race, and how often the host waits. First, that it sees these."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeModel, Recorder, token_matrix
from safetensors.torch import load_file, save_file
from support.coded import write_codes
from support.pretended_gpu import DevicesMeet, PretendedGpus

import quantkit
from quantkit.blocks import workers
from quantkit.blocks.stream import ModelStream
from quantkit.codes import GgmlGrid, GgmlLinear, QuantizedLinear, contiguous_groups
from quantkit.codes.carried import Carried
from quantkit.containers.awq.write import AwqWriter
from quantkit.containers.compressed.write import CompressedWriter
from quantkit.containers.gptq.write import GptqWriter
from quantkit.containers.mlx.write import MlxWriter
from quantkit.errors import NumericError
from quantkit.options import QuantSpec
from quantkit.sources import open_source

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


# -- codes to the host, and back -------------------------------------------------------------------------------------


def some_codes(rows: int, columns: int, size: int = 32) -> QuantizedLinear:
    dice = torch.Generator().manual_seed(rows)
    codes = torch.randint(0, 16, (rows, columns), dtype=torch.uint8, generator=dice)
    scales = torch.rand((rows, columns // size), generator=dice).half()
    zeros = torch.randint(1, 16, scales.shape, dtype=torch.uint8, generator=dice)
    return QuantizedLinear(codes, scales, zeros, contiguous_groups(columns, size), 4)


def on_gpu(linear: QuantizedLinear) -> QuantizedLinear:
    parts = (part.to(GPU) for part in (linear.codes, linear.scales, linear.zeros))
    return QuantizedLinear(*parts, linear.group, linear.bits)


def packed(writer: Any, linear: QuantizedLinear) -> dict[str, torch.Tensor]:
    made = writer.__new__(writer)
    made._quantization = {"checkpoint_format": "gptq"}
    return dict(made.pack(linear, QuantSpec(group_size=32, sym=False)))


@pytest.mark.parametrize("writer", [GptqWriter, CompressedWriter, MlxWriter, AwqWriter])
def test_words_go_to_the_host_once_and_nothing_waits_for_them(writer: Any) -> None:
    linear = some_codes(24, 64)
    with PretendedGpus() as gpus, torch.inference_mode():
        there = on_gpu(linear)
        gpus.waits.clear()
        carried = Carried(there)
        assert gpus.waits == []
        carried.wait()
        assert [wait.what for wait in gpus.waits] == ["synchronize"]
        small = linear.scales.nbytes + linear.zeros.nbytes
        assert gpus.downloaded == linear.words.nbytes + small
        found = packed(writer, carried.linear())  # type: ignore[arg-type]
        again = gpus.downloaded - linear.words.nbytes - small
        assert (gpus.races, gpus.early) == ([], [])
    assert again == (linear.words.nbytes if writer is AwqWriter else 0)  # in its own order
    assert all(type(part) is torch.Tensor for part in [*found.values(), *carried.tensors.values()])
    assert torch.equal(carried.tensors["words"], linear.words)
    for name, part in packed(writer, linear).items():
        assert torch.equal(found[name], part), name


def test_codes_of_ggml_go_to_the_host_as_words() -> None:
    codes, half = some_codes(8, 64).codes, torch.rand(8, 2).half()
    expected = GgmlLinear(codes, GgmlGrid("Q4_0", half))
    with PretendedGpus() as gpus, torch.inference_mode():
        there = GgmlLinear(codes.to(GPU), GgmlGrid("Q4_0", half.to(GPU)))
        carried = Carried(there)
        carried.wait()
        assert gpus.downloaded == codes.numel() // 2 + half.nbytes
        found = carried.linear()
    assert isinstance(found, GgmlLinear)
    assert (found.pack() == expected.pack()).all()


def test_on_a_cpu_codes_are_there_already() -> None:
    linear = some_codes(8, 64)
    carried = Carried(linear)
    carried.wait()
    assert carried.linear() is linear


@pytest.mark.parametrize("format", ["gptq", "awq", "compressed-tensors", "mlx"])
def test_codes_of_a_folder_become_floats_on_the_gpu(format: str, make_model: MakeModel, tmp_path: Path) -> None:
    """The same bits as on a CPU, and a byte a weight goes there; MLX adds biases, so its floats are made on the CPU."""
    out, loaded = tmp_path / "out", {}
    write_codes(out, make_model(), {"group_size": 32}, format)
    with PretendedGpus() as gpus, torch.inference_mode():
        for device in (torch.device("cpu"), GPU):
            stream = ModelStream(open_source(out), device, torch.float32)
            before = gpus.uploaded
            with stream.reading_ahead(), stream.block(0) as block:
                loaded[device.type] = {name: part.cpu() for name, part in block.state_dict().items()}
                sent = gpus.uploaded - before
        assert (gpus.races, gpus.early, gpus.uploaded > 0) == ([], [], True)
    assert loaded["cuda"].keys() == loaded["cpu"].keys()
    assert all(torch.equal(loaded["cuda"][name], part) for name, part in loaded["cpu"].items())
    weights = sum(part.numel() for part in loaded["cpu"].values())
    assert sent / weights > 3.5 if format == "mlx" else sent / weights < 3  # two blocks may be on their way


# -- quantkit --------------------------------------------------------------------------------------------------------

# Family, options; waits and launches a block, what the ends cost among them, with a tenth to spare; how many times the
# bytes of the weights go up: for the weights of tokens and to be quantized, and of some blocks or ends for a look.
RUNS: dict[str, tuple[str, dict[str, Any], int, int, float]] = {
    "llama": ("llama", {"group_size": 32}, 115, 2050, 2),
    "mixtral": ("mixtral", {"group_size": 32}, 260, 4300, 2.4),
    "gemma3": ("gemma3_text", {"group_size": 32}, 130, 2560, 2),
    "ggml": ("llama", {"ggml": "q4_0", "pre": "smollm"}, 143, 2220, 3),
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


@pytest.mark.parametrize("method", ["gptq", "round"])
def test_a_scale_beyond_float16_is_told_where_the_losses_are_read(
    method: str, make_model: MakeModel, tmp_path: Path
) -> None:
    """In the words of a CPU, which looks at once."""
    model = make_model(dtype="float32")
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.0.self_attn.o_proj.weight"][3] = 3e6
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    given: dict[str, Any] = {"group_size": 32, "effort": "fast", "dtype": "float32", "evaluate": False}
    given |= {"calibration": token_matrix(2, 16), "method": method}
    line = r"^model\.layers\.0\.self_attn\.o_proj: a group's weights need a scale beyond float16 \(65504\)$"
    with PretendedGpus(), pytest.raises(NumericError, match=line):
        quantkit.gptq(model, tmp_path / "out", device="cuda:1", **given)
    with pytest.raises(NumericError, match=line):
        quantkit.gptq(model, tmp_path / "out", device="cpu", force=True, **given)
