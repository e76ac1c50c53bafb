"""mlx-lm as a judge: reads MLX and AWQ folders on a CPU, and makes MLX folders. Runs in its own environment."""

from serve import serve  # isort: skip

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
from mlx.utils import tree_map
from mlx_lm.utils import load_model
from safetensors.numpy import save_file

mx.set_default_device(mx.cpu)


def load(folder: str) -> nn.Module:
    """All floats in float32, in which MLX then computes: scale * code + bias."""
    model, _ = load_model(Path(folder))
    wide = tree_map(
        lambda one: one.astype(mx.float32) if mx.issubdtype(one.dtype, mx.floating) else one, model.parameters()
    )
    model.update(wide)
    return model


def logits(folder: str, ids: list[list[int]], out: str) -> dict:
    model = load(folder)
    found = np.array(model(mx.array(ids)).astype(mx.float32))
    save_file({"logits": found, "generated": np.empty(0, dtype=np.int64)}, out)
    held = [name for name, module in model.named_modules() if hasattr(module, "bits")]
    return {"quantized": len(held)}


def weights(folder: str, out: str) -> dict:
    """Dequantized, by the names of its modules."""
    found = {}
    for name, module in load(folder).named_modules():
        if hasattr(module, "bits"):
            parts = module.weight, module.scales, module.biases
            found[name] = np.array(mx.dequantize(*parts, group_size=module.group_size, bits=module.bits))
    save_file(found, out)
    return {}


def quantize(model: str, out: str, samples: list[list[int]], **options: object) -> dict:
    """Round a folder as `mlx_lm.convert` does; no samples are needed."""
    mlx_lm.convert(model, out, quantize=True, **options)
    return {}


if __name__ == "__main__":
    serve({"logits": logits, "weights": weights, "quantize": quantize})
