"""CUDA GPUs that are pretended on the CPU, to see what the code for a GPU does with devices, streams and the host.

A tensor of one is a CPU tensor in a wrapper that says ``cuda:N``. Numbers are the CPU's, and what only CUDA's kernels
refuse is not seen. What is seen:

- an operation where devices meet, which raises as CUDA would (0-dim CPU tensors may take part in pointwise operations,
  CPU indices may index, copies may cross);
- every wait of the host, with the line that waits;
- a race: what a stream reads or writes while another that it has not waited for writes or reads it (vector clocks);
- memory that is let go while another stream than its own may use it, and could be handed out again;
- launches, the bytes that they read and write, and bytes between the host and the GPU.

With `shapes_only` tensors have no numbers, so that runs of any size can be counted: what the host asks for is answered
with what lets it go on (true, 0 failures, 1.0), and what lies on the host is made of nothing.

    with PretendedGpus() as gpus:
        quantkit.gptq(model, out, device="cuda:1", ...)
    assert not gpus.races

Threads that begin inside take part. To torch's C++ a tensor is the CPU's, so that its autograd does not look for a GPU.
"""

from __future__ import annotations

import itertools
import sys
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import quantkit
from quantkit.blocks import workers
from quantkit.codes import carried
from quantkit.options import values
from quantkit.quantize import hessian, kernels, search

Clock = dict[int, int]
"""How much of each stream's work is known to be done, by the stream's number."""

# What the host waits for: the result's shape or value is known on the GPU only.
_WAITED_FOR = {
    "aten::_local_scalar_dense": "item",
    "aten::equal": "equal",
    "aten::nonzero": "nonzero",
    "aten::masked_select": "masked_select",
    "aten::_unique2": "unique",
    "aten::bincount": "bincount",
    "aten::linalg_eigh": "eigh",
    "aten::_linalg_eigh": "eigh",
    "aten::repeat_interleave": "repeat_interleave",
}
_INDEXING = ("aten::index", "aten::index_put_", "aten::_index_put_impl_")
_NO_LAUNCH = ("aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::_unsafe_view")
_SCALARS_TAKEN = (
    "aten::index_put_",
    "aten::_index_put_impl_",
    "aten::masked_fill",
    "aten::masked_fill_",
    "aten::fill_",
)
# What quantkit knows of a device once it has asked.
_REMEMBERED = (
    workers._copying,
    carried._landing,
    kernels._side_stream,
    hessian.adds_up_in_float32,
    search.fractions_of,
)
_PACKAGE = str(Path(quantkit.__file__).parent)


class DevicesMeet(RuntimeError):
    """What CUDA would refuse."""


@dataclass(frozen=True)
class Found:
    """A wait, a race, or memory let go too early: what it is, and the program's line."""

    what: str
    where: str
    nbytes: int = 0


class Event(dict[int, int]):
    """Stands for torch.cuda.Event: a stream's clock at that time."""

    def __init__(self, stream: Stream) -> None:
        super().__init__(stream.clock)
        self._gpus = stream._gpus

    def synchronize(self) -> None:
        self._gpus.host_waits("synchronize", self)


class Stream:
    """Stands for torch.cuda.Stream."""

    _numbers = itertools.count()

    def __init__(self, gpus: PretendedGpus, device: torch.device) -> None:
        self._gpus, self.device, self.number = gpus, device, next(self._numbers)
        self.clock: Clock = {self.number: 0}
        self.line = ""  # of the last launch

    def record_event(self) -> Event:
        return Event(self)

    def wait_event(self, event: Event) -> None:
        _join(self.clock, event)

    def wait_stream(self, stream: Stream) -> None:
        _join(self.clock, stream.clock)

    def synchronize(self) -> None:
        self._gpus.host_waits("synchronize", self.clock)

    def launch(self, host: Clock) -> None:
        """One operation more, queued when the host knew as much as `host`."""
        _join(self.clock, host)
        self.clock[self.number] += 1
        self.line = _line()


@dataclass
class _Memory:
    """What is known of a storage: last written by (stream, operation), last used by each stream."""

    stream: Stream
    nbytes: int
    tensors: int = 0
    written: tuple[int, int] = (-1, 0)
    uses: Clock = field(default_factory=dict)
    lines: dict[int, str] = field(default_factory=dict)
    haunted_by: list[_Memory] = field(default_factory=list)


class _GpuTensor(torch.Tensor):
    """`inner`, a CPU tensor, as one of the GPU `index`."""

    inner: torch.Tensor
    gpus: PretendedGpus
    index: int
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: torch.Tensor, gpus: PretendedGpus, index: int) -> _GpuTensor:
        layout = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        made: _GpuTensor = torch.Tensor._make_wrapper_subclass(cls, inner.size(), device="cpu", **layout)
        made.inner, made.gpus, made.index = inner, gpus, index
        return made

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cuda", self.index)

    def to(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
        if device is None or device == self.device:
            return self if dtype in (None, self.dtype) else super().to(dtype)
        return self.gpus.moved(self, device, dtype or self.dtype, non_blocking)

    def cpu(self) -> torch.Tensor:  # type: ignore[override]
        return self.to("cpu")

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        [gpus, *_] = (a.gpus for a in tree_leaves((args, kwargs)) if isinstance(a, _GpuTensor))
        return gpus.run(func, args, kwargs or {})

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def untyped_storage(self) -> Any:
        return self.inner.untyped_storage()

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def record_stream(self, stream: Any) -> None:
        self.gpus.memory(self).uses.pop(stream.number, None)  # the allocator itself waits for it then

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"{tuple(self.shape)} {self.dtype} on {self.device}"


class _Mode(TorchDispatchMode):
    """Sees tensors that are made on a GPU or go there, in which no `_GpuTensor` takes part."""

    def __init__(self, gpus: PretendedGpus) -> None:
        super().__init__()
        self._gpus = gpus

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        leaves = tree_leaves((args, kwargs))
        if any(isinstance(a, _GpuTensor) or (isinstance(a, torch.device) and a.type == "cuda") for a in leaves):
            return self._gpus.run(func, args, kwargs or {})
        if (kwargs or {}).get("pin_memory"):
            return self._gpus.pinned(func(*args, **{**kwargs, "pin_memory": False}))
        return func(*args, **kwargs or {})


class PretendedGpus:
    """A context manager: while inside, torch sees `count` GPUs.

    Attributes:
        waits, races, early: what was found; each race and each memory let go too early once a line.
        launches: operations, and by the program's line `launched`.
        traffic: bytes that operations read and wrote, by the program's line; views are what they show.
        devices: how many tensors were made on each.
        uploaded, downloaded: bytes from the host, and to it.
    """

    def __init__(self, count: int = 2, shapes_only: bool = False) -> None:
        self.count, self._shapes_only = count, shapes_only
        self._inside = torch.device("meta" if shapes_only else "cpu")
        self.waits: list[Found] = []
        self.races: list[Found] = []
        self.early: list[Found] = []
        self.launches, self.uploaded, self.downloaded = 0, 0, 0
        self.traffic: Counter[str] = Counter()
        self.launched: Counter[str] = Counter()
        self.devices: Counter[str] = Counter()
        self._default = [Stream(self, torch.device("cuda", index)) for index in range(count)]
        self._host: Clock = {}
        self._memory: dict[int, _Memory] = {}
        self._ghosts: list[_Memory] = []
        self._anys: set[int] = set()
        self._pinned: set[int] = set()
        self._local, self._lock = threading.local(), threading.RLock()

    def __enter__(self) -> PretendedGpus:
        self._patches = ExitStack()
        for remembered in _REMEMBERED:
            remembered.cache_clear()
            self._patches.callback(remembered.cache_clear)
        for patch in self._replaced():
            self._patches.enter_context(patch)
        self._patches.enter_context(_Mode(self))
        return self

    def __exit__(self, *_: object) -> None:
        self._patches.close()

    def memory(self, tensor: _GpuTensor) -> _Memory:
        return self._memory[tensor.inner.untyped_storage()._cdata]

    def _replaced(self) -> Iterator[AbstractContextManager[Any]]:
        cuda: dict[str, Callable[..., Any]] = {
            "_lazy_init": lambda: None,
            "is_available": lambda: True,
            "device_count": lambda: self.count,
            "get_device_capability": lambda device=None: (9, 0),
            "mem_get_info": lambda device=None: (75 * 10**9, 80 * 10**9),
            "memory_reserved": lambda device=None: 0,
            "memory_allocated": lambda device=None: 0,
            "current_stream": self._current,
            "default_stream": lambda device: self._default[device.index],
            "stream": self._on,
            "Stream": lambda device: Stream(self, device),
            "synchronize": lambda device: self.host_waits("synchronize", self._current(device).clock),
        }
        for name, value in cuda.items():
            yield mock.patch.object(torch.cuda, name, value)
        yield mock.patch.object(values, "has_driver", return_value=True)
        yield mock.patch.object(kernels, "_has_triton", return_value=True)
        yield mock.patch.object(kernels, "triton_trouble", return_value="")
        yield mock.patch.object(kernels, "_tritons", return_value=self.column_kernel)
        yield mock.patch.object(kernels, "_triton_grids", return_value=self.grid_kernel)

        tensor, run = torch.tensor, threading.Thread.run

        def made(data: Any, *args: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
            found = tensor(data, *args, **kwargs)
            return found if device is None else found.to(device)

        def pin_memory(tensor: torch.Tensor) -> torch.Tensor:
            return self.pinned(tensor if self._shapes_only else tensor.clone())

        def run_inside(thread: threading.Thread) -> None:
            with _Mode(self):
                run(thread)

        yield mock.patch.object(torch, "tensor", made)
        yield mock.patch.object(torch.Tensor, "pin_memory", pin_memory)
        yield mock.patch.object(threading.Thread, "run", run_inside)

    def pinned(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of the host, in memory that a GPU copies from and to by itself."""
        self._pinned.add(tensor.untyped_storage()._cdata)
        return tensor

    # -- streams -----------------------------------------------------------------------------------------------------

    def _current(self, device: torch.device) -> Stream:
        """The thread's own."""
        return getattr(self._local, "streams", {}).get(device.index, self._default[device.index])

    @contextmanager
    def _on(self, stream: Stream) -> Iterator[None]:
        before = getattr(self._local, "streams", {})
        self._local.streams = {**before, stream.device.index: stream}
        try:
            yield
        finally:
            self._local.streams = before

    def host_waits(self, what: str, clock: Clock, nbytes: int = 0) -> None:
        with self._lock:
            _join(self._host, clock)
            self.waits.append(Found(what, _line(), nbytes))

    def _read(self, memory: _Memory, stream: Stream) -> None:
        writer, when = memory.written
        if stream.clock.get(writer, 0) < when:
            self._note(self.races, f"read while {memory.lines[writer]} may write it", stream)
        self._use(memory, stream)

    def _write(self, memory: _Memory, stream: Stream) -> None:
        for other, when in memory.uses.items():
            if stream.clock.get(other, 0) < when:
                self._note(self.races, f"written while {memory.lines[other]} may use it", stream)
        memory.written = stream.number, self._use(memory, stream)

    def _use(self, memory: _Memory, stream: Stream) -> int:
        for ghost in memory.haunted_by:
            if not self._done(ghost):
                self._note(
                    self.early, f"what {', '.join(ghost.lines.values())} may still use is handed out again", stream
                )
        memory.haunted_by = []
        memory.uses[stream.number], memory.lines[stream.number] = stream.clock[stream.number], stream.line
        return memory.uses[stream.number]

    def _note(self, place: list[Found], what: str, stream: Stream) -> None:
        found = Found(what, stream.line)
        if found not in place:
            place.append(found)

    def _done(self, ghost: _Memory) -> bool:
        """Whether all streams are done with it, as far as its own stream or the host knows."""
        clock = {**ghost.stream.clock}
        _join(clock, self._host)
        return all(clock.get(other, 0) >= when for other, when in ghost.uses.items())

    # -- operations --------------------------------------------------------------------------------------------------

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an operation of torch's for which a GPU's tensor, or the GPU, was given."""
        name = func._schema.name
        if func.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd):
            with _Mode(self):
                return func.decompose(*args, **kwargs)
        if name == "aten::new_zeros" and torch._C._current_graph_task_id() != -1:
            kwargs = {**kwargs, "device": args[0].device}  # what C++ adds a gradient up in, which it takes for a CPU's
        wanted = kwargs.get("device")
        if wanted is not None and wanted.type == "meta":
            return func(*tree_map(_bare, args), **kwargs)
        if name == "aten::copy_":
            return self._copy(*args, **kwargs)
        if name == "aten::_to_copy":  # `to` of a GPU's tensor comes here within the GPU alone
            place = args[0].device if isinstance(args[0], _GpuTensor) else wanted
            return self.moved(args[0], place, kwargs.get("dtype") or args[0].dtype, kwargs.get("non_blocking", False))
        ours = [a for a in tree_leaves((args, kwargs)) if isinstance(a, _GpuTensor)]
        device = ours[0].device if ours else wanted
        if "_like" not in name and "::new_" not in name:  # those take a shape, from anywhere
            _check(func, args, kwargs, device)
        bare, options = tree_map(_bare, (args, kwargs))
        options |= {} if wanted is None else {"device": self._inside}
        bare, options = tree_map(self._without_numbers, (bare, options))
        stream = self._current(device)
        if not func.is_view and name not in _NO_LAUNCH:
            self._launch(*_read_and_written(func, args, kwargs), stream)
        if waited := _WAITED_FOR.get(name, "") or _index_waits(name, args):
            self.host_waits(waited, stream.clock)
            if self._shapes_only and waited in ("item", "equal"):
                return _let_go_on(waited, bare[0].dtype, bare[0].untyped_storage()._cdata in self._anys)
        found = _mixed(name, *bare, **options) if "out_dtype" in _names(func) else func(*bare, **options)
        if self._shapes_only and name == "aten::any":
            self._anys.add(found.untyped_storage()._cdata)
        return (
            found if wanted is not None and wanted.type == "cpu" else self._wrapped(func, args, kwargs, found, stream)
        )

    def column_kernel(
        self, W: Any, U: Any, scale: Any, minimum: Any, top: int, codes: Any, levels: Any = None
    ) -> torch.Tensor:
        """Stands for `kernels.columns.quantize_columns`, one launch; what it asks of its arguments is asked here."""
        columns, rows = W.shape
        assert columns <= 128
        assert scale.shape == minimum.shape == W.shape
        assert rows == 1 or W.stride(1) == codes.stride(1) == 1
        read = [W, U, scale, minimum] if levels is None else [W, U, scale, minimum, levels]
        assert {tensor.device for tensor in [*read, codes]} == {W.device}
        stream = self._current(W.device)
        self._launch(read, [codes], stream)
        loop = kernels.column_loop(torch.device("cpu"))
        if self._shapes_only:
            return self._made(torch.empty_like(W.inner, dtype=torch.float32), stream)
        return self._made(loop(*map(_bare, (W, U, scale, minimum, top, codes, levels))), stream)

    def grid_kernel(
        self, W: Any, importance: Any, size: int, fractions: Any, bits: int, sym: bool, refits: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Stands for `kernels.grids.search_grids`, one launch."""
        rows, columns = W.shape
        assert columns % size == 0
        assert size <= kernels.LARGEST_GROUP
        assert {W.device} == {importance.device, fractions.device}
        stream = self._current(W.device)
        self._launch([W, importance, fractions], [], stream)
        shape = rows, columns // size
        found = tuple(torch.empty(shape, device="meta") for _ in range(2))
        if not self._shapes_only:
            found = search.search_grids(W.inner, importance.inner, size, bits, sym)
        scales, zeros = (self._made(part, stream) for part in found)
        return scales, zeros

    def _without_numbers(self, value: Any) -> Any:
        """A tensor of the host as an operation of shapes takes it."""
        if self._shapes_only and isinstance(value, torch.Tensor) and value.device.type == "cpu":
            return value.to("meta")
        return value

    def _launch(self, read: list[_GpuTensor], written: list[_GpuTensor], stream: Stream) -> None:
        with self._lock:
            self.launches += 1
            stream.launch(self._host)
            self.launched[stream.line] += 1
            self.traffic[stream.line] += sum(tensor.numel() * tensor.itemsize for tensor in [*read, *written])
            for tensor in read:
                self._read(self.memory(tensor), stream)
            for tensor in written:
                self._write(self.memory(tensor), stream)

    def moved(self, source: torch.Tensor, device: torch.device, dtype: torch.dtype, non_blocking: bool) -> torch.Tensor:
        """A copy elsewhere, or of another dtype."""
        if device.type == "meta":
            return torch.empty_like(source, dtype=dtype, device=device)
        if self._shapes_only:
            place = self._inside if device.type == "cuda" else device
            made = torch.empty_like(_bare(source), dtype=dtype, device=place)
        else:
            made = _bare(source).to(dtype, copy=True)
        stream = self._current(device if device.type == "cuda" else source.device)
        self._launch([source] if isinstance(source, _GpuTensor) else [], [], stream)
        if device.type == "cuda":
            made = self._made(made, stream)
        self._crossed(source, device, non_blocking, stream)
        return made

    def _copy(self, target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        if not self._shapes_only:
            _bare(target).copy_(_bare(source))
        stream = self._current(target.device if isinstance(target, _GpuTensor) else source.device)
        self._launch(*([tensor] if isinstance(tensor, _GpuTensor) else [] for tensor in (source, target)), stream)
        if source.dim() or source.device.type != "cpu":
            to_pinned = target.device.type == "cpu" and target.untyped_storage()._cdata in self._pinned
            self._crossed(source, target.device, non_blocking, stream, to_pinned)
        return target

    def _crossed(
        self,
        source: torch.Tensor,
        device: torch.device,
        non_blocking: bool,
        stream: Stream,
        to_pinned: bool = False,
    ) -> None:
        """Note a copy of `source` to `device`, where it is one between the host and a GPU."""
        nbytes = source.numel() * source.itemsize
        if device.type == "cpu":
            self.downloaded += nbytes
            if not (non_blocking and to_pinned):
                self.host_waits("copied to the host", stream.clock, nbytes)
        elif source.device.type == "cpu":
            self.uploaded += nbytes
            if not non_blocking or source.untyped_storage()._cdata not in self._pinned:
                self.host_waits("copied to the GPU", stream.clock, nbytes)

    def _wrapped(self, func: Any, args: Any, kwargs: Any, found: Any, stream: Stream) -> Any:
        """Results as a GPU's; what an operation writes into is given back as it came."""
        own = {id(a.inner): a for a in tree_leaves((args, kwargs)) if isinstance(a, _GpuTensor)}

        def wrap(value: Any) -> Any:
            if not isinstance(value, torch.Tensor) or isinstance(value, _GpuTensor):
                return value
            if id(value) in own:
                return own[id(value)]
            if func.is_view or func._schema.name in _NO_LAUNCH:
                return self._adopted(value, stream)
            return self._made(value, stream)

        return tree_map(wrap, found)

    def _made(self, inner: torch.Tensor, stream: Stream) -> _GpuTensor:
        """What the operation that was launched last has written."""
        made = self._adopted(inner, stream)
        with self._lock:
            self._write(self.memory(made), stream)
            self.traffic[stream.line] += made.numel() * made.itemsize
        return made

    def _adopted(self, inner: torch.Tensor, stream: Stream) -> _GpuTensor:
        """A tensor of `stream`'s GPU."""
        with torch.inference_mode(inner.is_inference()):  # a view of an ordinary tensor is one there too
            made = _GpuTensor(inner, self, stream.device.index)
        storage = inner.untyped_storage()
        with self._lock:
            self.devices[str(made.device)] += 1
            memory = self._memory.get(storage._cdata)
            if memory is None:  # what was let go on this stream could be given out for it
                self._ghosts = [ghost for ghost in self._ghosts if not self._done(ghost)]
                near = [g for g in self._ghosts if g.stream is stream and storage.nbytes() <= max(g.nbytes, 512)]
                memory = self._memory[storage._cdata] = _Memory(stream, storage.nbytes(), haunted_by=near)
            memory.tensors += 1
        weakref.finalize(made, self._let_go, storage._cdata).atexit = False
        return made

    def _let_go(self, key: int) -> None:
        with self._lock:
            memory = self._memory[key]
            memory.tensors -= 1
            if not memory.tensors:
                del self._memory[key]
                self._anys.discard(key)
                memory.uses.pop(memory.stream.number, None)
                if not self._done(memory):
                    self._ghosts.append(memory)


def _join(clock: Clock, other: Clock) -> None:
    for stream, when in other.items():
        clock[stream] = max(clock.get(stream, 0), when)


def _bare(value: Any) -> Any:
    return value.inner if isinstance(value, _GpuTensor) else value


@cache
def _names(func: Any) -> tuple[str, ...]:
    return tuple(argument.name for argument in func._schema.arguments)


@cache
def _written_names(func: Any) -> frozenset[str]:
    written = (a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write)
    return frozenset(written)


def _named(func: Any, args: Any, kwargs: Any) -> Iterator[tuple[str, Any]]:
    """(the argument's name, a tensor of it) for all tensors given."""
    for name, value in [*zip(_names(func), args, strict=False), *kwargs.items()]:
        yield from ((name, leaf) for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor))


def _read_and_written(func: Any, args: Any, kwargs: Any) -> tuple[list[_GpuTensor], list[_GpuTensor]]:
    parts: tuple[list[_GpuTensor], list[_GpuTensor]] = [], []
    for name, tensor in _named(func, args, kwargs):
        if isinstance(tensor, _GpuTensor):
            parts[name in _written_names(func)].append(tensor)
    return parts


def _check(func: Any, args: Any, kwargs: Any, device: torch.device) -> None:
    """Raises DevicesMeet for what is neither on `device` nor a CPU tensor that may stand beside."""
    name = func._schema.name
    takes_scalars = torch.Tag.pointwise in func.tags or name in _SCALARS_TAKEN
    for label, tensor in _named(func, args, kwargs):
        beside = tensor.device.type == "cpu" and (
            (tensor.dim() == 0 and takes_scalars and label not in _written_names(func))
            or (name in _INDEXING and label == "indices")
        )
        if tensor.device != device and not beside:
            raise DevicesMeet(f"{name} on {device} is given {label} on {tensor.device}; {_line()}")


def _let_go_on(asked: str, dtype: torch.dtype, is_any: bool) -> Any:
    """An answer to the host about numbers that there are none of: all are right, none is wrong, a mean is 1."""
    if asked == "equal" or dtype == torch.bool:
        return not is_any
    return 1.0 if dtype.is_floating_point else 0


def _index_waits(name: str, args: Any) -> str:
    """What the host waits for where an index is a mask or lies on the host; "" for nothing."""
    if name not in _INDEXING:
        return ""
    indices = [index for index in args[1] if index is not None]
    if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
        return "index by a mask"
    return "" if all(isinstance(index, _GpuTensor) for index in indices) else "index of the host"


def _mixed(name: str, total: Any, x: Any, y: Any, out_dtype: Any, out: Any) -> Any:
    """CUDA's sum of a float32 matrix and a product of halves, which no CPU has."""
    assert name == "aten::addmm"
    assert x.dtype == y.dtype != total.dtype == out_dtype == torch.float32
    return out.copy_(torch.addmm(total, x.float(), y.float()))


def _line() -> str:
    """The innermost line of quantkit, or the test's: "folder/file.py:number function"."""
    frame: Any = sys._getframe(1)
    while frame.f_back is not None:
        path = frame.f_code.co_filename
        if path.startswith(_PACKAGE) or "/test_" in path:
            return f"{'/'.join(path.split('/')[-2:])}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return "a thread of its own"
