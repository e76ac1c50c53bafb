"""What is drawn at the logits has the covariance of the softmax's Fisher information, whatever the slices."""

from __future__ import annotations

import pytest
import torch

from quantkit.blocks.probes import Probe, sign_seeds, signs, slice_sums

ROWS = 150


def drawn(logits: torch.Tensor, seeds: torch.Tensor, cuts: list[int]) -> torch.Tensor:
    parts = list(zip([0, *cuts], logits.tensor_split(cuts, dim=1), strict=True))
    probe = Probe([slice_sums(part, start, seeds) for start, part in parts], seeds)
    return torch.cat([probe.gradient(part, start) for start, part in parts], dim=1)


def test_signs_are_even_and_independent() -> None:
    found = signs(sign_seeds([4000], 0), 0, ROWS)
    assert found.dtype == torch.float32
    assert found.abs().eq(1).all()
    products = found.T @ found / len(found)
    assert float((products - torch.eye(ROWS)).abs().max()) < 6 / 4000**0.5
    assert float(found.mean(dim=0).abs().max()) < 6 / 4000**0.5


@pytest.mark.parametrize(("start", "count"), [(0, 1), (63, 2), (64, 64), (100, 50), (7, 143)])
def test_signs_of_a_slice_are_those_of_the_whole(start: int, count: int) -> None:
    seeds = sign_seeds([3, 5], 1)
    whole = signs(seeds.flatten(), 0, ROWS)
    assert torch.equal(signs(seeds.flatten(), start, count), whole[:, start : start + count])
    assert torch.equal(signs(seeds[1], start, count), whole[5:10, start : start + count])


def test_a_seed_decides_on_the_signs() -> None:
    one, same, other = (signs(sign_seeds([9], seed), 0, ROWS) for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert 0.4 < float((one == other).float().mean()) < 0.6


def test_what_is_drawn_has_the_covariance_of_the_fisher_information() -> None:
    count = 60_000
    logits = torch.tensor([4.0, 2.0, 1.0, 0.0, -1.0, -20.0, 0.5], dtype=torch.float64)
    g = drawn(logits.expand(count, 7), sign_seeds([count], 3), [3])
    p = logits.softmax(dim=0)
    expected = p.diag() - p[:, None] * p
    torch.testing.assert_close(g.sum(dim=1), torch.zeros(count, dtype=torch.float64), rtol=0, atol=1e-6)
    torch.testing.assert_close(g.T @ g / count, expected, rtol=0, atol=4 / count**0.5 * float(expected.max()))
    direction = torch.linspace(-1, 1, 7, dtype=torch.float64)
    labels = torch.multinomial(p, count, replacement=True, generator=torch.Generator().manual_seed(0))
    by_label = (direction @ p - direction[labels]).square()
    assert float((g @ direction).square().var()) < 0.5 * float(by_label.var())


def test_slices_give_what_the_whole_vocabulary_gives() -> None:
    logits = 3 * torch.randn(20, ROWS, generator=torch.Generator().manual_seed(0))
    seeds = sign_seeds([20], 4)
    whole = drawn(logits, seeds, [])
    assert whole.dtype == torch.float32
    for cuts in ([64], [1, 70, 149]):
        torch.testing.assert_close(drawn(logits, seeds, cuts), whole, rtol=1e-5, atol=1e-6)
