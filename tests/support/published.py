"""Published models by their configs alone: folders whose weight files have headers and no data.

`published.json` has of each its parameters in thousand millions, as its card or paper counts them, transformers' type
of the model, and what its `config.json` says that the class does not say by itself
(https://huggingface.co/NAME/blob/main/config.json). Kimi K2's own class is DeepSeek V3's.
"""

from __future__ import annotations

import json
import math
import os
import struct
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

MODELS: dict[str, tuple[float, str, dict[str, Any]]] = {
    name: tuple(row) for name, row in json.loads(Path(__file__).with_suffix(".json").read_text()).items()
}


def hollow_folder(name: str, folder: Path) -> int:
    """A folder as a model's published one, of bfloat16 tensors that no disk holds; returns their number of values."""
    _, kind, said = MODELS[name]
    config = CONFIG_MAPPING[kind](**said, dtype="bfloat16")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    config.architectures = [type(model).__name__]
    folder.mkdir()
    config.save_pretrained(folder)
    shapes = {id(own): (name, list(own.shape)) for name, own in model.named_parameters()}
    shapes |= {id(own): (name, list(own.shape)) for name, own in model.named_buffers() if _is_stored(model, name)}
    header, at = {}, 0
    for tensor, shape in shapes.values():
        size = 2 * math.prod(shape)
        header[tensor] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    content = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(content)) + content)
        os.truncate(file.fileno(), 8 + len(content) + at)
    return at // 2


def _is_stored(model: Any, name: str) -> bool:
    module, _, own = name.rpartition(".")
    return own not in model.get_submodule(module)._non_persistent_buffers_set
