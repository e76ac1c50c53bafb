"""A model's logits as quantkit itself computes them, block by block from disk."""

from __future__ import annotations

from pathlib import Path

import torch

from quantkit.blocks.stream import ModelStream
from quantkit.codes import Plan
from quantkit.containers.gptq.write import GptqWriter, quantization_config
from quantkit.options import CheckpointFormat, QuantSpec
from quantkit.quantize.targets import modules_in_block, plan_linears
from quantkit.sources import open_source


def open_stream(folder: Path) -> ModelStream:
    return ModelStream(open_source(folder), torch.device("cpu"), torch.float32)


def open_writer(
    out: Path, model: Path, spec: QuantSpec, checkpoint_format: CheckpointFormat = "gptq"
) -> tuple[GptqWriter, Plan]:
    """A writer into the folder `out` for all Linears of a model, and what it expects."""
    stream = open_stream(model)
    plan = plan_linears(stream, spec)
    quantization = quantization_config(spec, checkpoint_format, modules_in_block(stream, plan))
    return GptqWriter(out, stream.source, stream.weights, plan, quantization, 10**9), plan


def streamed_logits(stream: ModelStream, batches: list[torch.Tensor]) -> list[torch.Tensor]:
    """Logits float32 [batch, seq, vocab] per batch of token ids."""
    with torch.inference_mode():
        hidden = stream.embed(batches)
        for index in range(len(stream.blocks)):
            with stream.block(index) as block:
                hidden = [stream.call(index, block, i, state) for i, state in enumerate(hidden)]
        with stream.head() as head:
            return [head(state) for state in hidden]


def greedy(folder: Path, ids: list[int], count: int) -> list[int]:
    """`count` greedy tokens after `ids`; the whole text is run again for each."""
    stream = open_stream(folder)
    generated: list[int] = []
    for _ in range(count):
        logits = streamed_logits(stream, [torch.tensor([ids + generated])])[0]
        generated.append(int(logits[0, -1].argmax()))
    return generated
