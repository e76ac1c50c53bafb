"""The corrected target: its formula, its part by folds, and that whatever stops or shares a run changes nothing."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MakeModel, Recorder, token_matrix
from support.failing import failing_at
from support.families import DISCOVERED
from support.folders import contents
from support.replaying import replaying

import quantkit
from quantkit.blocks.stages import Reading
from quantkit.errors import UsageError
from quantkit.quantize import gptq
from quantkit.quantize.correction import CorrectionSums, Corrector, difference_of

OPTIONS: dict[str, Any] = {"calibration": token_matrix(12, 256), "group_size": 32, "evaluate": False, "device": "cpu"}
CORRECTED: dict[str, Any] = {**OPTIONS, "token_weights": True, "correct": "auto"}
CPU = torch.device("cpu")


def fold(rng: np.random.Generator, drift: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(x, x_q, weights) of a batch, float32; x_q differs from x by a map that all tokens share, and by noise."""
    x = rng.normal(size=(200, 12))
    x_q = x + x @ drift + 0.1 * rng.normal(size=x.shape)
    return x.astype(np.float32), x_q.astype(np.float32), rng.gamma(0.5, size=200).astype(np.float32)


@pytest.fixture
def folds() -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(0)
    drift = 0.2 * rng.normal(size=(12, 12))
    return [fold(rng, drift) for _ in range(4)]


def gathered(folds: list[Any], count: int) -> CorrectionSums:
    sums = CorrectionSums(12, CPU, count)
    for number, (x, x_q, weights) in enumerate(folds):
        part = CorrectionSums(12, CPU, count)
        part.add(*map(torch.from_numpy, (x_q, weights, x - x_q)), number)
        sums.merge(part)
    again = CorrectionSums(12, CPU, count)
    again.unpack(sums.packed())
    again.tokens = sums.tokens
    return again


def moments(folds: list[Any]) -> tuple[np.ndarray, np.ndarray]:
    """(H, C) by their definitions, float64."""
    x, x_q, w = (np.concatenate(part).astype(float) for part in zip(*folds, strict=True))
    return (w[:, None] * x_q).T @ x_q / w.sum(), (w[:, None] * (x - x_q)).T @ x_q / w.sum()


def step(W: np.ndarray, folds: list[Any]) -> np.ndarray:
    H, C = moments(folds)
    return W @ C @ np.linalg.inv(H + 0.1 * np.diag(H).mean() * np.eye(12))


def test_the_target_is_that_of_the_formula(folds: list[Any]) -> None:
    W = np.random.default_rng(1).normal(size=(5, 12))
    target, part = Corrector(gathered(folds, 1).finish("x"), 0.1, 0.5).target(torch.from_numpy(W))
    np.testing.assert_allclose(target.numpy(), W + 0.5 * step(W, folds), rtol=1e-4, atol=1e-5)
    assert part == 0.5


def test_auto_takes_what_each_half_tells_of_the_other(folds: list[Any]) -> None:
    W = np.random.default_rng(1).normal(size=(5, 12))
    halves = folds[0::2], folds[1::2]
    parts = []
    for here, there in (halves, halves[::-1]):
        D, (H, C) = step(W, here), moments(there)
        parts.append(np.trace(W @ C @ D.T) / np.trace(D @ H @ D.T))
    expected = float(np.clip(parts, 0, 1).mean())
    assert 0.5 < expected <= 1
    target, part = Corrector(gathered(folds, 2).finish("x"), 0.1, None).target(torch.from_numpy(W))
    assert part == pytest.approx(expected, rel=1e-3)
    np.testing.assert_allclose(target.numpy(), W + part * step(W, folds), rtol=1e-4, atol=1e-5)


def test_what_is_only_noise_is_left_alone() -> None:
    rng = np.random.default_rng(0)
    x = [rng.normal(size=(64, 12)).astype(np.float32) for _ in range(4)]
    noise = [(a, a + rng.normal(size=a.shape).astype(np.float32), np.ones(64, np.float32)) for a in x]
    # Noise in x_q pulls weights towards 0, which is right for other tokens too; noise in x tells nothing of them.
    told = [(a + 3 * rng.normal(size=a.shape).astype(np.float32), a, np.ones(64, np.float32)) for a, _, _ in noise]
    W = torch.from_numpy(rng.normal(size=(64, 12)))
    assert Corrector(gathered(noise, 2).finish("x"), 0.1, None).target(W)[1] > 0.8
    assert Corrector(gathered(told, 2).finish("x"), 0.1, None).target(W)[1] < 0.3
    nothing = [(a, a, np.ones(64, np.float32)) for a in x]
    target, part = Corrector(gathered(nothing, 2).finish("x"), 0.1, None).target(W)
    assert part == 0
    torch.testing.assert_close(target, W.float())


def test_experts_are_compared_on_tokens_that_both_paths_send_them() -> None:
    x, other = torch.randn(3, 4), torch.randn(2, 4)
    read = Reading(x, torch.tensor([1, 5, 7]), Reading(other, torch.tensor([5, 8])))
    expected = torch.zeros(3, 4)
    expected[1] = other[0] - x[1]
    torch.testing.assert_close(difference_of(read), expected)
    assert not difference_of(read._replace(beside=Reading(other[:0], torch.tensor([], dtype=torch.int64)))).any()


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_stopped_or_short_of_memory_it_writes_the_same_bytes(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    model = make_model(family, num_hidden_layers=3)
    quantkit.gptq(model, tmp_path / "whole", **CORRECTED)
    stacks = {"llama": 4, "mixtral": 10}[family]
    with monkeypatch.context() as patch:
        patch.setattr(gptq, "solve", failing_at(gptq.solve, 1 + 2 * stacks))
        with pytest.raises(UsageError, match="2 of 3 blocks are kept"):
            quantkit.gptq(model, tmp_path / "out", checkpoint_every="1", **CORRECTED)
    quantkit.gptq(model, tmp_path / "out", resume=True, checkpoint_every="1", **CORRECTED)
    with replaying(monkeypatch):
        quantkit.gptq(model, tmp_path / "replayed", **CORRECTED)
    whole, stopped, replayed = (contents(tmp_path / name) for name in ("whole", "out", "replayed"))
    assert whole == stopped == replayed
    with (tmp_path / "whole" / "quant_log.csv").open() as file:
        parts = [float(row["corrected"]) for row in csv.DictReader(file)]
    assert all(0 <= part <= 1 for part in parts)
    assert any(parts)
    assert not any(parts[:3])  # the first stage reads what the unquantized one reads


def test_where_blocks_hand_on_more_it_says_so(make_model: MakeModel, tmp_path: Path, recorder: Recorder) -> None:
    model = make_model("gemma3n_text", **DISCOVERED["gemma3n_text"])
    quantkit.gptq(model, tmp_path / "out", progress=recorder, **CORRECTED)
    assert any(text.startswith("no target is corrected") for text in recorder.notes)


@pytest.mark.parametrize("value", ["1.5", "-0.1", "nan", "some"])
def test_other_parts_are_refused(make_model: MakeModel, value: str) -> None:
    with pytest.raises(UsageError, match="give a number from 0 to 1, or auto"):
        quantkit.gptq(make_model(), correct=value, **OPTIONS)
