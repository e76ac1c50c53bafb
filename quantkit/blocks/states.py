"""What a model's own forward calls its blocks with: hidden states, and the arguments beside them.

Between blocks hidden states wait on the device, in host memory, or in a file, as the memory plan says.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO, Literal

from quantkit.errors import OutputError
from quantkit.late import torch

HiddenPlace = Literal["device", "host", "disk"]
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class _Spilled:
    """Where in the file a tensor is."""

    offset: int
    bytes: int
    shape: torch.Size
    dtype: torch.dtype


class HiddenStates:
    """The hidden states of all batches, by number: a list whose items may lie elsewhere than where they compute.

    `states[i]` is a tensor on the device, whatever the place; what is stored comes back bit for bit. On disk it is a
    file without a name in the folder for temporary files (TMPDIR), which a killed process leaves nothing of; it is
    written and read, not mapped, since a mapping counts where address space is limited, and is no faster.

    Args:
        device: where blocks compute.
        place: where states wait. "host" and "device" are the same on a CPU.
        states: the first ones.
    """

    def __init__(
        self, device: torch.device, place: HiddenPlace = "device", states: Iterable[torch.Tensor] = ()
    ) -> None:
        self._device, self._place = device, place
        self._items: list[torch.Tensor | _Spilled | None] = []
        self._file: BinaryIO | None = None
        self._end = 0
        for state in states:
            self.append(state)

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[torch.Tensor]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, i: int) -> torch.Tensor:
        item = self._items[i]
        assert item is not None, f"batch {i} was taken and not put back"
        return self._read(item).to(self._device) if isinstance(item, _Spilled) else item.to(self._device)

    def __setitem__(self, i: int, state: torch.Tensor) -> None:
        old = self._items[i]
        if self._place == "disk":
            self._items[i] = self._write(state, old)
        else:
            self._items[i] = state.to("cpu") if self._place == "host" else state

    def append(self, state: torch.Tensor) -> None:
        """Add the next batch's."""
        self._items.append(None)
        self[len(self) - 1] = state

    def take(self, i: int) -> torch.Tensor:
        """Batch i's, let go here if it is in memory: the caller holds it until a new one is put in."""
        state = self[i]
        if self._place != "disk":
            self._items[i] = None
        return state

    def close(self) -> None:
        """Let everything go."""
        self._items.clear()
        if self._file is not None:
            self._file.close()

    def _write(self, state: torch.Tensor, old: torch.Tensor | _Spilled | None) -> _Spilled:
        state = state.detach().to("cpu").contiguous()
        size = state.numel() * state.itemsize
        fits = isinstance(old, _Spilled) and old.bytes >= size
        at = old.offset if fits and isinstance(old, _Spilled) else self._end
        self._end = max(self._end, at + size)
        rest = _bytes_of(state)
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(prefix="quantkit-")  # noqa: SIM115
            position = at
            while rest:
                count = os.pwrite(self._file.fileno(), rest, position)
                rest, position = rest[count:], position + count
        except OSError as error:
            raise OutputError(
                f"cannot keep hidden states in {tempfile.gettempdir()}: {error.strerror}; TMPDIR names another folder"
            ) from error
        return _Spilled(at, size, state.shape, state.dtype)

    def _read(self, item: _Spilled) -> torch.Tensor:
        assert self._file is not None
        state = torch.empty(item.shape, dtype=item.dtype)
        rest = _bytes_of(state)
        at = item.offset
        while rest:
            count = os.preadv(self._file.fileno(), [rest], at)
            if not count:
                raise OutputError("the file with hidden states has become shorter")
            rest, at = rest[count:], at + count
        return state


def _bytes_of(state: torch.Tensor) -> memoryview:
    array: Any = state.reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)


def half(state: torch.Tensor) -> torch.Tensor:
    """A state in half precision: float16, which is the finer one, unless its range is too small."""
    if state.itemsize <= 2:
        return state
    fits = bool(state.abs().amax() < torch.finfo(torch.float16).max)
    return state.to(torch.float16 if fits else torch.bfloat16)


# -- what blocks get beside them ---------------------------------------------------------------------------------------


@dataclass
class Capture:
    """What one run of the model's own forward with stand-ins told: the first block's hidden states, and per block the
    arguments beside them."""

    hidden: torch.Tensor | None = None
    arguments: list[Arguments] = field(default_factory=list)


@dataclass(frozen=True)
class Handed:
    """Among a block's arguments: what the block before returned after its hidden states, counted from 0."""

    number: int


def handed(arguments: Arguments, beside: tuple[Any, ...]) -> Arguments:
    """The arguments with what `beside` has in the place of each `Handed`."""
    args, kwargs = arguments

    def of(value: Any) -> Any:
        return beside[value.number] if isinstance(value, Handed) else value

    return tuple(map(of, args)), {name: of(value) for name, value in kwargs.items()}


def hands_on(blocks: list[Arguments]) -> bool:
    """Whether a block may hand something on to a later one beside the hidden states, within one batch's arguments.

    What several blocks get must then be something that can be changed: anything but tensors and plain values, such as
    a table of shared keys and values. Or a block gets what the one before has returned.
    """
    if any(isinstance(value, Handed) for args, kwargs in blocks for value in (*args, *kwargs.values())):
        return True
    seen: set[int] = set()
    for args, kwargs in blocks:
        own = {id(value) for value in _changeable((*args, *kwargs.values()))}
        if own & seen:
            return True
        seen |= own
    return False


def _changeable(value: Any) -> Iterator[Any]:
    if type(value) is tuple:
        for part in value:
            yield from _changeable(part)
    elif value is not None and not isinstance(value, torch.Tensor | torch.dtype | torch.device | str | int | float):
        yield value


def share_equal(blocks: list[Arguments], first: list[Arguments]) -> list[Arguments]:
    """The arguments of one batch, with each tensor that the first batch has equally taken from there.

    Position embeddings and masks are the same for all batches of a shape and are then held once. What depends on the
    tokens stays each batch's own, and so does any object that blocks may change, such as a table of shared keys and
    values: within a batch all blocks keep getting the same one.
    """
    seen: dict[int, Any] = {}
    pairs = zip(blocks, first, strict=True)
    return [(_share(mine[0], theirs[0], seen), _share(mine[1], theirs[1], seen)) for mine, theirs in pairs]


def _share(mine: Any, theirs: Any, seen: dict[int, Any]) -> Any:
    if type(mine) is not type(theirs):
        return mine
    if isinstance(mine, torch.Tensor):
        if id(mine) not in seen:
            alike = mine.dtype == theirs.dtype and mine.shape == theirs.shape and torch.equal(mine, theirs)
            seen[id(mine)] = theirs if alike else mine
        return seen[id(mine)]
    if type(mine) is tuple and len(mine) == len(theirs):
        return tuple(_share(a, b, seen) for a, b in zip(mine, theirs, strict=True))
    if type(mine) is dict and mine.keys() == theirs.keys():
        if id(mine) not in seen:  # one that several blocks get stays one
            seen[id(mine)] = {key: _share(value, theirs[key], seen) for key, value in mine.items()}
        return seen[id(mine)]
    return mine
