"""The weight files of a Hugging Face folder: which there are, what each holds, and one tensor at a time out of them."""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import ClassVar

from quantkit.containers.hf.header import BITS, Stored, read_header, read_into
from quantkit.containers.source import TensorInfo
from quantkit.errors import SourceError, shortened
from quantkit.late import dtype_of, torch
from quantkit.runs.atomic import read_json
from quantkit.runs.tensorfile import tensor_bytes

# torch's names by safetensors' names. What is not here (packed 4- and 6-bit floats, complex numbers) is refused.
STORED_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
_LONGEST_NAME = 255  # bytes
_LARGEST = 2**63 - 1  # for torch, of a side and of a stride; an empty tensor's may be larger in a file


class WeightFiles(ABC):
    """The tensors of one file or of an index's shards, known from the headers of all files.

    Headers are read at once: a broken file shows before any work.

    Raises:
        SourceError: no file, one that is missing or broken, one tensor in two files, or an index that names files
            outside the folder or tensors that its files do not hold.
    """

    index_name: ClassVar[str]

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shard_of: dict[str, Path] = {}
        self.tensors: dict[str, TensorInfo] = {}
        for shard in self.shards():
            for name, info in self._header(shard).items():
                if name in self.shard_of:
                    raise SourceError(f"{shard}: {name} is also in {self.shard_of[name].name}")
                self.shard_of[name] = shard
                self.tensors[name] = info
        if not self.tensors:
            raise SourceError(f"{folder}: its weight files hold no tensor")
        if (folder / self.index_name).is_file():
            for name, file in self._index().items():
                if name not in self.tensors:
                    raise SourceError(f"{folder / file}: the index says it holds {name}, but it does not")

    def shards(self) -> list[Path]:
        """The files in order. Raises SourceError where there are none or one is missing."""
        indexed = (self.folder / self.index_name).is_file()
        names = sorted(set(self._index().values())) if indexed else self.unindexed(self.folder)
        if not names:
            raise SourceError(f"{self.folder}: no weights here (no safetensors file, no pytorch_model.bin)")
        for name in names:
            if Path(name).name != name:
                raise SourceError(f"{self.folder / self.index_name}: names a shard outside the folder: {name}")
            if len(os.fsencode(name)) > _LONGEST_NAME:  # for which no system has a file
                raise SourceError(f"{self.folder / self.index_name}: no file has the name {shortened(name)}")
            if not (self.folder / name).is_file():
                raise SourceError(f"{self.folder}: shard {name} is missing; download the folder again")
        return [self.folder / name for name in names]

    @classmethod
    def present(cls, folder: Path) -> bool:
        """Whether the folder has weights of this kind."""
        return (folder / cls.index_name).is_file() or bool(cls.unindexed(folder))

    @staticmethod
    @abstractmethod
    def unindexed(folder: Path) -> list[str]:
        """Names of the files that count where there is no index."""

    @abstractmethod
    def read(self, name: str) -> torch.Tensor:
        """The stored tensor, on the CPU; one of 8-bit floats as float16, which holds each of them exactly.

        Raises:
            SourceError: it cannot be read.
        """

    def octets(self, name: str) -> bytes:
        """The stored tensor's bytes, little end first; of small ones. Raises as `read` does."""
        return bytes(tensor_bytes(self.read(name)))

    @abstractmethod
    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows `start` to `stop` of a stored tensor, as `read` gives them."""

    @abstractmethod
    def _header(self, shard: Path) -> Mapping[str, TensorInfo]:
        """What a file holds."""

    def _index(self) -> dict[str, str]:
        path = self.folder / self.index_name
        weight_map = read_json(path).get("weight_map")
        names = weight_map.values() if isinstance(weight_map, dict) else []
        if not names or not all(isinstance(shard, str) for shard in names):
            raise SourceError(f"{path}: has no weight_map from tensor names to file names")
        return dict(weight_map or {})


class SafetensorsFiles(WeightFiles):
    """`model.safetensors`, its shards, or whatever safetensors files there are."""

    index_name = "model.safetensors.index.json"

    def __init__(self, folder: Path) -> None:
        self._stored: dict[str, Stored] = {}
        super().__init__(folder)

    @staticmethod
    def unindexed(folder: Path) -> list[str]:
        single = "model.safetensors"
        found = [folder / single] if (folder / single).is_file() else sorted(folder.glob("*.safetensors"))
        return [path.name for path in found if not path.name.startswith("adapter_")]  # PEFT's, of no model

    def read(self, name: str) -> torch.Tensor:
        return read_stored(self.shard_of[name], name, self._stored[name])

    def octets(self, name: str) -> bytes:
        content, stored = bytearray(self._stored[name].bytes), self._stored[name]
        try:
            read_into(self.shard_of[name], stored.start, memoryview(content))
        except OSError as error:
            raise SourceError(f"{self.shard_of[name]}: cannot read {name}: {error}") from error
        return bytes(content)

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        whole = self._stored[name]
        row = whole.bytes // whole.shape[0]
        place = whole.start + start * row, whole.start + stop * row
        return read_stored(self.shard_of[name], name, Stored(whole.dtype, (stop - start, *whole.shape[1:]), *place))

    def _header(self, shard: Path) -> Mapping[str, TensorInfo]:
        try:
            header = read_header(shard)
        except (OSError, ValueError) as error:
            raise SourceError(f"{shard}: broken or cut short ({error}); download it again") from error
        self._stored.update(header)
        return {name: tensor_info(shard, name, stored.shape, stored.dtype) for name, stored in header.items()}


def read_stored(shard: Path, name: str, stored: Stored) -> torch.Tensor:
    """A tensor of a safetensors file, of one of `STORED_DTYPES`, as `WeightFiles.read` gives it. Raises SourceError."""
    if math.prod(side or 1 for side in stored.shape) > _LARGEST:
        raise SourceError(f"{shard}: {name} has shape {list(stored.shape)}, which no tensor can have")
    # Memory of its own: what a mapped file gives is read through page faults, and copied after all.
    tensor = torch.empty(stored.shape, dtype=dtype_as_read(stored.dtype))
    try:
        read_into(shard, stored.start, tensor.reshape(-1).view(torch.uint8).numpy().data)
    except OSError as error:
        raise SourceError(f"{shard}: cannot read {name}: {error}") from error
    return widened(tensor)


def dtype_as_read(stored_as: str) -> torch.dtype | None:
    """torch's dtype of a stored type; None of one that is not read."""
    return dtype_of(STORED_DTYPES[stored_as]) if stored_as in STORED_DTYPES else None


def tensor_info(shard: Path, name: str, shape: Iterable[int], stored_as: str) -> TensorInfo:
    """A header's entry. Raises SourceError for a type that is not read."""
    if stored_as not in STORED_DTYPES:
        raise SourceError(f"{shard}: {name} is stored as {stored_as}; read are {', '.join(STORED_DTYPES)}")
    sides = tuple(shape)
    return TensorInfo(sides, stored_as, BITS[stored_as] // 8 * math.prod(sides))


def widened(tensor: torch.Tensor) -> torch.Tensor:
    """8-bit floats as float16, since torch computes nothing with them; anything else as it is.

    float16 lacks the range of exponents (F8_E8M0), so those become float32.
    """
    if tensor.dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        return tensor.half()
    return tensor.float() if tensor.dtype == torch.float8_e8m0fnu else tensor
