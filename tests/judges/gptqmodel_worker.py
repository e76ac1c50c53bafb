"""GPTQModel as a judge: reads and writes GPTQ folders. Runs in its own environment, not in quantkit's."""

from serve import cached, logits_of, serve  # isort: skip

import json
import os
from pathlib import Path

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # its own choice on two cores is one worker, with which it raises

import torch
import transformers
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from gptqmodel.nn_modules.qlinear import BaseQuantLinear
from transformers import GPTQConfig


def load(folder: str, loader: str, backend: str) -> torch.nn.Module:
    if loader == "gptqmodel":  # takes half precision only
        return GPTQModel.load(folder, device="cpu", backend=BACKEND(backend), dtype=torch.float16).model
    kwargs = {}
    if backend != "auto":  # of this configuration only the backend is taken, the rest is the folder's own
        bits = json.loads(Path(folder, "config.json").read_text())["quantization_config"]["bits"]
        kwargs["quantization_config"] = GPTQConfig(bits=bits, backend=backend)
    (name,) = json.loads(Path(folder, "config.json").read_text())["architectures"]
    return getattr(transformers, name).from_pretrained(folder, device_map="cpu", dtype=torch.float32, **kwargs)


def logits(
    folder: str,
    ids: list[list[int]],
    out: str,
    generate: int = 0,
    loader: str = "transformers",
    backend: str = "gptq_torch",
    exact: bool = True,
    beside: str | None = None,
) -> dict:
    """`exact`: scale * (code - zero) in float32; GPTQModel itself rounds the product to the scales' float16."""
    if loader == "gptqmodel" and not exact:
        raise ValueError("loader gptqmodel loads in half precision, where a CPU's logits say little: ask for exact")
    model = load(folder, loader, backend).eval()
    if exact:
        torch.nn.Module.float(model)  # the scales too; transformers' own float() refuses quantized models
    for module in model.modules():  # in float32 it would dequantize again at every forward
        if isinstance(module, BaseQuantLinear) and hasattr(module, "dequantize_weight"):
            cached(module, "dequantize_weight")
    return logits_of(model, BaseQuantLinear, ids, out, generate, beside)


def quantize(model: str, out: str, samples: list[list[int]], **options: object) -> dict:
    """Quantize a folder on token ids and write the result."""
    quantizer = GPTQModel.load(
        model, QuantizeConfig(offload_to_disk=False, **options), device="cpu", dtype=torch.float32
    )
    examples = [{"input_ids": [ids], "attention_mask": [[1] * len(ids)]} for ids in samples]
    quantizer.quantize(examples, batch_size=1, backend=BACKEND("gptq_torch"))
    quantizer.save(out)
    return {}


if __name__ == "__main__":
    serve({"logits": logits, "quantize": quantize})
