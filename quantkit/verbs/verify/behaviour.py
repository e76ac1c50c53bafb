"""What the model says: perplexity of held-out text against what was measured before, and a sentence to look at."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import ExitStack, nullcontext
from typing import Any

from quantkit.blocks.open import memory_budget, resolve_device
from quantkit.blocks.stream import ModelStream
from quantkit.containers.source import Source
from quantkit.evaluate.scores import score
from quantkit.late import torch
from quantkit.options import HELDOUT, EvaluationSpec, make
from quantkit.progress import Progress
from quantkit.tokens.text import check_tokens, evaluation_text
from quantkit.tokens.windows import Windows
from quantkit.verbs.verify.findings import Findings

PROMPT = "The capital of France is"
_TOKENS = 24
_FEW_TOKENS = 6  # where every token reads the whole model from disk
_SCORED_TOKENS = 4096
# Log perplexity over that of a guess among all tokens: trained models lie below 0.5, with zeros misread above 0.8.
_SPEECHLESS = 0.7
# Of log perplexity. The whole text again: rounding of the arithmetic. Its beginning: passages of one text differ by
# about 0.3, and the measured spread of tokens is added.
_SAME_TEXT, _PASSAGES, _SIGMAS = 0.02, 0.3, 4.0
# Weights below which a model is a test's, and nobody expects it to know a language.
_TOO_SMALL = 1_000_000
_STUCK = 12  # times the same token in a row


def check_behaviour(
    source: Source, record: Mapping[str, Any], device: str, found: Findings, progress: Progress
) -> str | None:
    """Score held-out text and continue a sentence; returns the sentence, None where it was not got as far."""
    place = resolve_device(device)
    stream = ModelStream(source, place, torch.float32 if place.type == "cpu" else source.dtype)
    fluent = _check_perplexity(stream, _recorded(record), found, progress)
    ids = continuation(stream, progress)
    tokenizer = source.tokenizer()
    text = str(tokenizer.decode(ids, skip_special_tokens=True))
    odd = sum(not (letter.isprintable() or letter.isspace()) or letter == "\ufffd" for letter in text)
    if fluent and odd * 4 > len(text) > 0:
        found.problem(f"it writes {text[:60]!r}, which is no text; quantize or download it again")
    if fluent and any(len(set(ids[at : at + _STUCK])) == 1 for at in range(len(ids) - _STUCK + 1)):
        found.problem(f"it writes {text[:60]!r}, one token again and again; quantize or download it again")
    return str(tokenizer.decode([*tokenizer(PROMPT)["input_ids"], *ids], skip_special_tokens=True))


def continuation(stream: ModelStream, progress: Progress) -> list[int]:
    """Token ids that greedy decoding puts after `PROMPT`. Blocks stay loaded where memory allows; no cache is kept."""
    ids = list(stream.source.tokenizer()(PROMPT)["input_ids"])
    start, depth = len(ids), len(stream.blocks)
    keep = _weights(stream) * stream.dtype.itemsize <= memory_budget(stream.device).here
    count = _TOKENS if keep else _FEW_TOKENS
    with ExitStack() as stack, progress.phase("generating", count) as advance, torch.inference_mode():
        kept = [stack.enter_context(stream.block(index)) for index in range(depth)] if keep else []
        for _ in range(count):
            states = stream.embed([torch.tensor([ids])])[0]
            for index in range(depth):
                with nullcontext(kept[index]) if keep else stream.block(index) as block:
                    states = stream.call(index, block, 0, states)
            with stream.head() as logits:
                ids.append(int(logits(states[..., -1:, :]).reshape(-1).argmax()))
            advance(1)
    return ids[start:]


def _weights(stream: ModelStream) -> int:
    return sum(math.prod(info.shape) for info in stream.weights.tensors.values())


def _recorded(record: Mapping[str, Any]) -> dict[str, Any] | None:
    """The evaluation that was recorded when the model was written, where its text is at hand."""
    evaluation = record.get("evaluation")
    if not isinstance(evaluation, dict) or evaluation.get("text") != HELDOUT or evaluation.get("stride") is not None:
        return None
    results = evaluation.get("results")
    if not results or not all(type(evaluation.get(key)) is int for key in ("seq_len", "tokens")):
        return None
    return {"seq_len": evaluation["seq_len"], "tokens": evaluation["tokens"], **results[-1]}  # the source's is first


def _check_perplexity(
    stream: ModelStream, expected: Mapping[str, Any] | None, found: Findings, progress: Progress
) -> bool:
    """Whether it is low enough for sentences to be expected; a wrong one is a problem."""
    config = stream.source.config.get_text_config()
    longest = getattr(config, "max_position_embeddings", None) or 512
    seq_len = expected["seq_len"] if expected is not None else max(8, min(512, int(longest)))
    text = evaluation_text(make(EvaluationSpec, text=HELDOUT, seq_len=seq_len), stream.source.tokenizer())
    check_tokens(text.windows.tokens, stream.source)
    seq_len = text.windows.tokens.shape[1]
    count = max(1, _SCORED_TOKENS // seq_len)
    windows = Windows(text.windows.tokens[:count], text.windows.first_scored[:count])
    nll = score([stream], windows, False, progress)[0].nll
    value, tokens = float(nll.mean()), nll.numel()
    limit = _SPEECHLESS * math.log(int(config.vocab_size))
    if expected is not None:
        wanted = math.log(expected["perplexity"])
        spread = expected["stderr"] / expected["perplexity"] * math.sqrt(expected["tokens"])
        sampling = _PASSAGES + _SIGMAS * spread / math.sqrt(tokens)
        tolerance = _SAME_TEXT if tokens == expected["tokens"] else sampling
        if abs(value - wanted) > tolerance:
            found.problem(
                f"perplexity of {text.name} is {_shown(value)}, quantkit.json says {_shown(wanted)} (for {tokens} "
                f"tokens within a factor of {math.exp(tolerance):.2f}): other weights than were evaluated; download or "
                "quantize it again"
            )
    elif value > limit and _weights(stream) >= _TOO_SMALL:
        found.problem(
            f"perplexity of {text.name} is {_shown(value)}, hardly better than guessing: the weights are not the ones "
            "that were trained, or are read wrongly (zeros, scales, tensors in another's place)"
        )
    found.note(f"perplexity {_shown(value)} on the first {tokens} tokens of {text.name}")
    return value <= limit


def _shown(log_perplexity: float) -> str:
    return f"{math.exp(min(log_perplexity, 700)):.4g}"
