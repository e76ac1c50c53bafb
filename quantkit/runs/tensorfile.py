"""One safetensors file of tensors, written without a copy of them all, and known by its checksum ever after.

Format: https://github.com/huggingface/safetensors, section "Format".
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit.late import torch

NAMES = {
    "torch.float32": "F32",
    "torch.float16": "F16",
    "torch.bfloat16": "BF16",
    "torch.int64": "I64",
    "torch.int32": "I32",
    "torch.uint32": "U32",
    "torch.int16": "I16",
    "torch.uint8": "U8",
}
"""What the format calls the types that are written."""


@dataclass(frozen=True)
class TensorPlan:
    """A tensor that will be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """A tensor's values as they lie in memory (little-endian machines: as safetensors stores them)."""
    array: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)


def header(tensors: Sequence[TensorPlan]) -> tuple[bytes, dict[str, int]]:
    """Header bytes, and each tensor's offset in the data. Wider items first, so that every tensor is aligned."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offsets = {}
    at = 0
    for tensor in sorted(tensors, key=lambda t: -t.dtype.itemsize):
        offsets[tensor.name] = at
        entries[tensor.name] = {
            "dtype": NAMES[str(tensor.dtype)],
            "shape": list(tensor.shape),
            "data_offsets": [at, at + tensor.bytes],
        }
        at += tensor.bytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, offsets


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> str:
    """Write tensors into one file, wait until it is on the disk, and return its SHA-256.

    The file has its name from the start: whoever reads it knows it to be whole by that checksum alone.
    """
    plans = [TensorPlan(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    head, offsets = header(plans)
    digest = hashlib.sha256(head)
    with path.open("wb") as file:
        file.write(head)
        for name in sorted(tensors, key=offsets.__getitem__):  # one after another, as their offsets say
            content = tensor_bytes(tensors[name])
            file.write(content)
            digest.update(content)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file that `write_tensors` wrote, on the CPU, in memory of their own."""
    from safetensors.torch import load_file  # which imports torch

    return {name: tensor.clone() for name, tensor in load_file(path).items()}
