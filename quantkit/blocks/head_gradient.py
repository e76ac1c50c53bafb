"""The gradient at the states that leave the last block, as `probes` draws it, over slices of the vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from quantkit.blocks.backward import head_pieces, head_slices
from quantkit.blocks.probes import Probe, slice_sums
from quantkit.blocks.states import HiddenStates
from quantkit.blocks.stream import ModelStream
from quantkit.late import torch
from quantkit.progress import Progress

Slices = list[tuple[int, int]]
Head = Callable[["torch.Tensor"], "torch.Tensor"]


def head_gradients(
    stream: ModelStream, hidden: HiddenStates, seeds: Sequence[torch.Tensor], held: bool, progress: Progress
) -> list[torch.Tensor]:
    """What `probes` gives at the states that leave the last block, per batch [windows, seq, hidden].

    Each slice of the vocabulary is measured before any one's part can be made. Where the whole head is `held` the
    logits of a few positions wait for that, else they are made twice.
    """
    slices = head_slices(stream)
    if held:
        with progress.phase("weighing the head", len(hidden)) as advance, stream.head_rows(*slices) as heads:
            found = []
            for state, own in zip(hidden, seeds, strict=True):
                found.append(batch_gradient(heads, slices, state, own))
                advance(1)
            return found
    pieces = head_pieces((len(own), own.shape[1]) for own in seeds)
    sums: dict[int, list[torch.Tensor]] = {piece: [] for piece in range(len(pieces))}
    with progress.phase("weighing the head", 2 * len(slices)) as advance:
        for at_rows in slices:
            with torch.no_grad(), stream.head_rows(at_rows) as [head]:
                for number, (i, row, at) in enumerate(pieces):
                    logits = head(hidden[i][..., row : row + 1, at, :])[0]
                    sums[number].append(slice_sums(logits, at_rows[0], seeds[i][row, at].to(stream.device)))
            advance(1)
        probes = [
            Probe(sums[number], seeds[i][row, at].to(stream.device)) for number, (i, row, at) in enumerate(pieces)
        ]
        gradients = [torch.zeros_like(state) for state in hidden]
        for at_rows in slices:
            with stream.head_rows(at_rows) as [head]:
                for probe, (i, row, at) in zip(probes, pieces, strict=True):
                    state = hidden[i][..., row : row + 1, at, :].detach().requires_grad_()
                    with torch.enable_grad():
                        logits = head(state)
                    gradients[i][..., row : row + 1, at, :] += probe.state_gradient(logits, at_rows[0], state)
            advance(1)
    return gradients


def batch_gradient(heads: list[Head], slices: Slices, state: torch.Tensor, seeds: torch.Tensor) -> torch.Tensor:
    """The same of one batch, with a head for each slice of the vocabulary that `backward.head_slices` gives."""
    gradient, starts = torch.zeros_like(state), [start for start, _ in slices]
    for _, row, at in head_pieces([(len(seeds), seeds.shape[1])]):
        part, own = state[..., row : row + 1, at, :].detach().requires_grad_(), seeds[row, at].to(state.device)
        with torch.enable_grad():
            logits = [head(part) for head in heads]
        sums = [slice_sums(found.detach()[0], start, own) for found, start in zip(logits, starts, strict=True)]
        probe = Probe(sums, own)
        for found, start in zip(logits, starts, strict=True):
            gradient[..., row : row + 1, at, :] += probe.state_gradient(found, start, part)
    return gradient
