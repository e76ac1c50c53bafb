"""compressed-tensors, AWQ and MLX folders as their own readers have them: the matrix at the end of docs/judges.md."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeModel, token_matrix
from safetensors.torch import load_file
from support.coded import label_of, write_codes
from support.container_matrix import CASES, Case, Rows
from support.judge_env import GPTQMODEL, MLX, Judge, Program, judge_python
from support.streamed import open_stream, streamed_logits

from quantkit.codes import QuantizedLinear
from quantkit.sources import open_source

pytestmark = [pytest.mark.judges, pytest.mark.timeout(1200)]

IDS = token_matrix(2, 16).tokens


@pytest.fixture(scope="module")
def judge() -> Iterator[Callable[[Program], Judge]]:
    """judge(program): one process each. Skips the test where its environment is missing."""
    running: dict[str, Judge] = {}

    def get(program: Program) -> Judge:
        judge_python(program)
        return running.setdefault(program.name, Judge(program))

    yield get
    for one in running.values():
        one.close()


@pytest.fixture(scope="module")
def rows() -> Iterator[Rows]:
    """Collects the matrix's rows; writes them at the end when QUANTKIT_WRITE_MATRIX is set."""
    found = Rows()
    yield found
    if os.environ.get("QUANTKIT_WRITE_MATRIX"):
        found.write()


def decompressed(folder: Path, codes: Mapping[str, QuantizedLinear]) -> dict[str, torch.Tensor]:
    """Weights float32 [out, in] that the compressed-tensors library has."""
    from compressed_tensors.compressors import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationConfig

    tensors, found = load_file(folder / "model.safetensors"), {}
    (scheme,) = QuantizationConfig.model_validate(label_of(folder)).config_groups.values()
    for module in codes:
        held = {name.rpartition(".")[2]: part for name, part in tensors.items() if name.rpartition(".")[0] == module}
        held["weight_scale"] = held["weight_scale"].float()
        found[module] = PackedQuantizationCompressor.decompress(held, scheme)["weight"].float()
    return found


def logits_of(folder: Path, case: Case, ask: Callable[[Program], Judge]) -> torch.Tensor:
    """Logits float32 [2, 16, vocabulary] of the program that loads it."""
    if case.format == "mlx":
        return ask(MLX).logits(folder, IDS)[0]
    if case.format == "awq":
        return ask(GPTQMODEL).logits(folder, IDS, loader="transformers", backend="auto")[0]
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    # Asymmetric codes it expects in another shape unless it makes weights of them at once.
    more: dict[str, Any] = {} if case.sym else {"quantization_config": CompressedTensorsConfig(dequantize=True)}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **more)
    with torch.inference_mode():
        return torch.as_tensor(model(IDS).logits)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_its_own_reader_has_the_same_numbers(
    case: Case, judge: Callable[[Program], Judge], rows: Rows, make_model: MakeModel, tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    codes = write_codes(folder, make_model(), case.spec(), case.format)
    weights: float | None = None
    if case.format != "awq":  # GPTQModel's kernels show their logits alone
        theirs = judge(MLX).weights(folder) if case.format == "mlx" else decompressed(folder, codes)
        assert theirs.keys() == codes.keys()
        weights = max(float((theirs[name] - linear.dequantize()).abs().max()) for name, linear in codes.items())
        assert weights == 0
    source = open_source(folder)
    assert all(torch.equal(source.read(f"{name}.weight"), linear.dequantize()) for name, linear in codes.items())
    ours = streamed_logits(open_stream(folder), [IDS])[0]
    logits, spread = float((logits_of(folder, case, judge) - ours).abs().max()), float(ours.std())
    assert logits < case.most * spread
    rows.record(case, weights, logits, spread)
