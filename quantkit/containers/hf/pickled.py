"""`pytorch_model.bin`: weights in a pickle, opened only as far as it holds nothing but tensors."""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantkit.containers.hf.shards import STORED_DTYPES, WeightFiles, tensor_info, widened
from quantkit.containers.source import TensorInfo
from quantkit.errors import SourceError, first_line
from quantkit.late import torch

_STORED_AS = {f"torch.{dtype}": name for name, dtype in STORED_DTYPES.items()}
_ZIP_MAGIC = b"PK\x03\x04"
# Where training programs put the weights in a checkpoint that holds more.
_WRAPPERS = ("state_dict", "model", "module")


class PickledFiles(WeightFiles):
    """`pytorch_model.bin` or its shards; AutoGPTQ's `gptq_model*.bin` too. Read by torch.load(weights_only=True).

    A file in torch's zip format is mapped, so its header costs no reading of weights. One in the format before
    torch 1.6 is read whole; the last of these that was asked for stays in memory.
    """

    index_name = "pytorch_model.bin.index.json"

    def __init__(self, folder: Path) -> None:
        self._held: tuple[Path, dict[str, torch.Tensor]] | None = None
        super().__init__(folder)

    @staticmethod
    def unindexed(folder: Path) -> list[str]:
        # Not *.bin: trainers leave training_args.bin and optimizer.bin beside the weights.
        single = "pytorch_model.bin"
        if (folder / single).is_file():
            return [single]
        return sorted(
            path.name for pattern in ("pytorch_model-*.bin", "gptq_model*.bin") for path in folder.glob(pattern)
        )

    def read(self, name: str) -> torch.Tensor:
        # A copy: the file may be mapped, and tied weights share one storage.
        return widened(self._opened(self.shard_of[name])[name].clone(memory_format=torch.contiguous_format))

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        rows = self._opened(self.shard_of[name])[name][start:stop]
        return widened(rows.clone(memory_format=torch.contiguous_format))

    def _header(self, shard: Path) -> Mapping[str, TensorInfo]:
        return {
            name: tensor_info(shard, name, tensor.shape, _STORED_AS.get(str(tensor.dtype), str(tensor.dtype)))
            for name, tensor in self._opened(shard).items()
        }

    def _opened(self, shard: Path) -> dict[str, torch.Tensor]:
        if self._held is None or self._held[0] != shard:
            self._held = None  # let the one before go first
            self._held = (shard, _tensors(shard, _load(shard)))
        return self._held[1]


def _load(shard: Path) -> Any:
    try:
        with warnings.catch_warnings():  # torch's remarks on old and odd pickles; what matters of them is an error
            warnings.simplefilter("ignore")
            return torch.load(shard, map_location="cpu", weights_only=True, mmap=_is_archive(shard))
    except SourceError:
        raise
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        what = f"more than tensors ({named[1]})" if named else "more than tensors, or is damaged"
        raise SourceError(
            f"{shard}: holds {what}; refused, because loading that can run code. Nothing was run. "
            "Use a safetensors copy of the model"
        ) from error
    except Exception as error:  # a damaged archive or pickle raises many kinds
        raise SourceError(f"{shard}: broken or cut short ({first_line(error)}); download it again") from error


def _is_archive(shard: Path) -> bool:
    """Whether the file is a zip archive, which can be mapped. Raises SourceError for one that is compressed.

    No torch writes such a one, and what a few bytes of it unpack to has no bound.
    """
    with shard.open("rb") as file:
        if file.read(len(_ZIP_MAGIC)) != _ZIP_MAGIC:
            return False
    with zipfile.ZipFile(shard) as archive:
        packed = [member.filename for member in archive.infolist() if member.compress_type != zipfile.ZIP_STORED]
    if packed:
        raise SourceError(f"{shard}: {packed[0]} in it is compressed, which torch never does; save the model again")
    return True


def _tensors(shard: Path, content: Any) -> dict[str, torch.Tensor]:
    """The tensors by name, out of the wrapper that a training program may have put around them."""
    for key in _WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    if not isinstance(content, dict):
        raise SourceError(f"{shard}: holds a {type(content).__name__}, not tensors by name")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise SourceError(
                f"{shard}: {name!r} is a {type(value).__name__}, not a tensor; these are no model weights"
            )
        if value.layout != torch.strided or value.is_quantized or value.is_meta:
            raise SourceError(f"{shard}: {name} is a sparse, quantized or empty tensor; only plain ones are read")
        if value.numel() * value.itemsize > value.untyped_storage().nbytes():
            raise SourceError(f"{shard}: {name} has shape {list(value.shape)}, of which the file holds a part")
    return {name: value.detach() for name, value in content.items()}
