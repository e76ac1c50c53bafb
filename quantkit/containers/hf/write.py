"""A sharded safetensors file set, written tensor by tensor.

The library's own ``save_file`` wants all tensors of a file at once; here the whole layout is planned from shapes, so
that a model's worth of tensors never has to be in memory, sizes are known before the work, and tensors may come in
any order. Format: https://github.com/huggingface/safetensors, section "Format".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from quantkit.containers.readback import ByTurns, ReadBack
from quantkit.errors import OutputError
from quantkit.late import torch
from quantkit.runs.atomic import write_json
from quantkit.runs.tensorfile import TensorPlan, header, tensor_bytes

T = TypeVar("T")


class ShardedWriter:
    """Writes the planned tensors, each exactly once, into one or many shards of at most `max_shard_bytes`.

    Use: `write` every tensor, then `finish`, then `read_back`. Files have their final names from the start, so the
    folder must be one that nobody takes for finished (`quantkit.runs.outputs.staged_folder`).
    """

    def __init__(self, folder: Path, plan: Sequence[TensorPlan], max_shard_bytes: int) -> None:
        self.folder = folder
        shards = parts_of(plan, lambda tensor: tensor.bytes, max_shard_bytes)
        if len(shards) == 1:
            self.names = ["model.safetensors"]
        else:
            self.names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
        self._pending = {tensor.name: tensor for tensor in plan}
        self._place: dict[str, tuple[int, int]] = {}
        self._files = ByTurns()
        for number, shard in enumerate(shards):
            head, offsets = header(shard)
            (folder / self.names[number]).write_bytes(head)
            self._place.update({name: (number, len(head) + start) for name, start in offsets.items()})
        self._read_back = ReadBack()
        self._total = sum(tensor.bytes for tensor in plan)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write a tensor of the name, dtype and shape that the plan has."""
        planned = self._pending.pop(name)
        assert (tensor.dtype, tuple(tensor.shape)) == (planned.dtype, planned.shape), name
        number, offset = self._place[name]
        content, path = tensor_bytes(tensor), self.folder / self.names[number]
        self._files.write(path, offset, [content])
        self._read_back.wrote(path, name, content)

    def finish(self) -> None:
        """Close the shards and write the index where there are several.

        Raises:
            OutputError: a planned tensor was never written.
        """
        if self._pending:
            missing = next(iter(self._pending))
            raise OutputError(f"{len(self._pending)} planned tensors were not written, such as {missing}")
        self.close()
        if len(self.names) > 1:
            weight_map = {name: self.names[number] for name, (number, _) in self._place.items()}
            index = {"metadata": {"total_size": self._total}, "weight_map": dict(sorted(weight_map.items()))}
            write_json(self.folder / "model.safetensors.index.json", index)

    def read_back(
        self, read: Callable[[str], torch.Tensor], advance: Callable[[int], None] = lambda done: None
    ) -> None:
        """Compare every tensor with what a reader of the finished files gives.

        Args:
            read: a tensor by its name.
            advance: is told of each tensor.

        Raises:
            OutputError: names the file and the tensor that were read back otherwise.
        """
        self._read_back.compare(lambda _, name: [tensor_bytes(read(name))], advance)

    def close(self) -> None:
        """Close the files without checking anything."""
        self._files.close()


def parts_of(items: Sequence[T], size: Callable[[T], int], most: int) -> list[list[T]]:
    """Runs of items of at most so many bytes where they are more than one; all in one where `most` is 0."""
    parts: list[list[T]] = [[]]
    held = 0
    for item in items:
        if most and parts[-1] and held + size(item) > most:
            parts.append([])
            held = 0
        parts[-1].append(item)
        held += size(item)
    return parts
