"""Folders of codes as readers that are not ours have them: the matrix at the end of docs/judges.md."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import torch
from conftest import MakeModel, token_matrix
from safetensors.torch import load_file
from support.coded import label_of, write_codes
from support.container_matrix import CASES, PROGRAMS, Case, Rows
from support.judge_env import Judge, JudgeError, Program
from support.streamed import open_stream, streamed_logits

import quantkit
from quantkit.blocks.families import FUSED
from quantkit.codes import QuantizedLinear
from quantkit.sources import open_source

pytestmark = [pytest.mark.judges, pytest.mark.timeout(1200)]

IDS = token_matrix(2, 16).tokens
_SECONDS = 900  # GPTQModel compiles its kernels at the first of its jobs
# vLLM's kernels on a CPU take heads of 32 and more and widths of multiples of 32, GPTQModel's whole rows of 128 or 256.
SIZES = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}

AskJudge = Callable[[Program], Judge]
Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def rows() -> Iterator[Rows]:
    """Collects the matrix's rows; writes them at the end when QUANTKIT_WRITE_MATRIX is set."""
    found = Rows()
    yield found
    if os.environ.get("QUANTKIT_WRITE_MATRIX"):
        found.write()


def by_transformers(folder: Path, case: Case, names: Mapping[str, QuantizedLinear]) -> tuple[Weights, torch.Tensor]:
    """Weights [out, in] and logits of compressed-tensors, of symmetric codes with the library's own decompressor."""
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    # Asymmetric codes it expects in another shape unless it makes weights of them at once.
    more = {} if case.sym else {"quantization_config": CompressedTensorsConfig(dequantize=True)}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **more)
    weights = (
        decompressed(folder, names) if case.sym else {name: model.get_submodule(name).weight.detach() for name in names}
    )
    with torch.inference_mode():
        return weights, torch.as_tensor(model(IDS).logits)


def decompressed(folder: Path, names: Mapping[str, QuantizedLinear]) -> Weights:
    from compressed_tensors.compressors import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationConfig

    tensors, found = load_file(folder / "model.safetensors"), {}
    (scheme,) = QuantizationConfig.model_validate(label_of(folder)).config_groups.values()
    for module in names:
        held = {name.rpartition(".")[2]: part for name, part in tensors.items() if name.rpartition(".")[0] == module}
        held["weight_scale"] = held["weight_scale"].float()
        found[module] = PackedQuantizationCompressor.decompress(held, scheme)["weight"].float()
    return found


def theirs(
    folder: Path, case: Case, names: Mapping[str, QuantizedLinear], ask: AskJudge
) -> tuple[Weights | None, torch.Tensor]:
    """Weights [out, in] and logits [2, 16, vocabulary] of the case's reader; vLLM's of Linears that it has fused."""
    if case.reader == "transformers":
        return by_transformers(folder, case, names)
    judge = ask(PROGRAMS[case.reader])
    if case.reader == "GPTQModel":  # its kernels show their logits alone
        return None, judge.logits(folder, IDS, _SECONDS, loader="transformers", backend="auto")[0]
    return judge.weights(folder, _SECONDS), judge.logits(folder, IDS, _SECONDS)[0]


def fused(weights: Weights) -> Weights:
    """Those that vLLM has as one, one below the other, under its name."""
    found = dict(weights)
    for parts, whole in FUSED.items():
        for stem in [name.removesuffix(parts[0]) for name in weights if name.endswith(f".{parts[0]}")]:
            found[stem + whole] = torch.cat([found.pop(stem + part) for part in parts])
    return found


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_reader_has_the_numbers_of_the_codes(
    case: Case, ask: AskJudge, rows: Rows, make_model: MakeModel, tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    sizes = {**SIZES, "intermediate_size": 192} if case.group_size == 128 else SIZES  # for a short last group
    codes = write_codes(folder, make_model(**sizes), case.spec(), case.format)
    source = open_source(folder)
    assert all(torch.equal(source.read(f"{name}.weight"), linear.dequantize()) for name, linear in codes.items())
    if case.reason is not None and case.reason.says is not None:
        with pytest.raises(JudgeError) as refused:
            theirs(folder, case, codes, ask)
        assert re.search(case.reason.says, str(refused.value)), refused.value
        rows.refused(case, case.reason)
        return
    weights, logits = theirs(folder, case, codes, ask)
    ours, compared = {name: linear.dequantize() for name, linear in codes.items()}, folder
    if case.rounds:
        ours = {name: weight.half() for name, weight in ours.items()}
        quantkit.convert(folder, compared := tmp_path / "floats", dtype="float16")
    expected = streamed_logits(open_stream(compared), [IDS])[0]
    if case.reader == "vLLM":
        ours, expected = fused(ours), torch.log_softmax(expected, -1)[:, :-1]
    apart = None
    if weights is not None:
        assert weights.keys() == ours.keys()
        apart = max(float((weights[name].float() - ours[name].float()).abs().max()) for name in ours)
        biases_are_rounded = (case.format, case.sym, case.reader) == ("awq", False, "mlx-lm")
        assert (apart > 0) == (biases_are_rounded or case.reason is not None)
    if case.reason is not None:
        rows.refused(case, case.reason)
        return
    difference, spread = float((logits - expected).abs().max()), float(expected.std())
    assert difference < case.most * spread
    rows.record(case, apart, difference, spread)
