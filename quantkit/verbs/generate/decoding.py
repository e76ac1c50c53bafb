"""Token ids into answers, in batches, with randomness that belongs to a prompt and not to its batch."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from quantkit.late import inference, torch, transformers
from quantkit.options import Decoding

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Request:
    """What is to be answered: token ids, the most new ones there is room for, and what names its randomness."""

    ids: Sequence[int]
    room: int
    key: str


@dataclass(frozen=True)
class Answer:
    """New token ids without the one that ended them; `finish` is "eos" or, out of room, "length"."""

    ids: list[int]
    finish: str


def own_seed(seed: int, key: str) -> int:
    """The seed of one prompt's randomness, from the run's and what names the prompt."""
    digest = hashlib.sha256(f"{seed}\n{key}".encode()).digest()
    return int.from_bytes(digest[:8]) >> 1


@inference
def decode(
    model: PreTrainedModel,
    requests: Sequence[Request],
    spec: Decoding,
    stops: Sequence[int],
    each: Callable[[list[int]], None] | None = None,
) -> list[Answer]:
    """Answer requests in one batch, padded at the left and masked there; several beams take one request at a time.

    A request's answer depends on the batch it is in only through the rounding of float arithmetic, which differs with
    a batch's shape: where two tokens are all but equally likely, the other one may be taken.

    Args:
        model: whole, on one device.
        requests: no more than memory holds at a time.
        spec: how to draw.
        stops: ids that end an answer.
        each: is called with the new ids of every step, of a single request without beams. May raise to stop.

    Raises:
        NumericError: the model's logits are not finite.
    """
    if spec.num_beams > 1:
        answers: list[Answer] = []
        for request in requests:
            # transformers' own beam search draws from the global generator: it is lent a seed, and put back.
            with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
                torch.manual_seed(own_seed(spec.seed, request.key))
                answers += _batch(model, [request], spec, stops, None)
        return answers
    # Those with less room go apart: a row that has ended is computed until all have, and must not leave its context.
    apart: dict[int, list[int]] = {}
    for place, request in enumerate(requests):
        apart.setdefault(request.room, []).append(place)
    found: dict[int, Answer] = {}
    for places in apart.values():
        found |= zip(places, _batch(model, [requests[place] for place in places], spec, stops, each), strict=True)
    return [found[place] for place in range(len(requests))]


def _batch(
    model: PreTrainedModel,
    requests: Sequence[Request],
    spec: Decoding,
    stops: Sequence[int],
    each: Callable[[list[int]], None] | None,
) -> list[Answer]:
    """Answers to requests that have the same room. What fills a row up is its own first token, which is masked."""
    longest = max(len(request.ids) for request in requests)
    rows = [[request.ids[0]] * (longest - len(request.ids)) + list(request.ids) for request in requests]
    masks = [[0] * (longest - len(request.ids)) + [1] * len(request.ids) for request in requests]
    from quantkit.verbs.generate import drawing

    generator: Any = model  # a PreTrainedModel is not typed as one that has transformers' loop
    own = model.generation_config
    # The model's own defaults out of the way: transformers takes from them whatever a config leaves open.
    model.generation_config = config = _config(spec, stops, requests[0].room)
    try:
        out = generator.generate(
            input_ids=torch.tensor(rows, device=model.device),
            attention_mask=torch.tensor(masks, device=model.device),
            generation_config=config,
            logits_processor=drawing.processors([own_seed(spec.seed, request.key) for request in requests], spec),
            streamer=None if each is None else drawing.Watch(each),
        )
    finally:
        model.generation_config = own
    found = []
    for row in out[:, longest:].tolist():
        end = next((place for place, token in enumerate(row) if token in stops), None)
        found.append(Answer(row, "length") if end is None else Answer(row[:end], "eos"))
    return found


def _config(spec: Decoding, stops: Sequence[int], room: int) -> transformers.GenerationConfig:
    """Every choice that is not ours to leave open; sampling without beams is done by `drawing.Draw`."""
    drawn = {} if spec.num_beams == 1 or spec.greedy else spec.model_dump(include={"temperature", "top_p", "top_k"})
    return transformers.GenerationConfig(
        max_new_tokens=room,
        num_beams=spec.num_beams,
        do_sample=bool(drawn),
        eos_token_id=list(stops) or None,
        pad_token_id=stops[0] if stops else 0,
        use_cache=True,
        **drawn,
    )
