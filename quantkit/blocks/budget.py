"""How much memory a run may take, and how this process's allocator is set for tensors that come and go.

The allocator's settings are glibc's; elsewhere (macOS, musl) they do nothing. `tune` is for programs too: nothing here
imports torch before a GPU is asked.
"""

from __future__ import annotations

import ctypes
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

# The share of free memory that a run takes unasked: other programs need some too, and estimates can be wrong.
_SHARE = 0.75


@dataclass(frozen=True)
class Budget:
    """Bytes that a run may take beyond what importing torch takes.

    Attributes:
        host: of the machine's memory.
        device: of a GPU's; None on a CPU.
        named: whether somebody said so, with `--memory`.
    """

    host: int
    device: int | None = None
    named: bool = False

    @property
    def here(self) -> int:
        """Of the memory that blocks compute in."""
        return self.host if self.device is None else self.device

    def __floordiv__(self, processes: int) -> Budget:
        """The part of one of several processes on a machine, each of which has a GPU of its own if it has one."""
        return Budget(self.host // processes, self.device, self.named)


def free_budget(device: torch.device) -> Budget:
    """Three quarters of what is free: of a GPU's memory, and of the machine's or what this process may have of it."""
    gpu = None
    if device.type == "cuda":
        import torch

        gpu = int(_SHARE * torch.cuda.mem_get_info(device)[0])
    return Budget(int(_SHARE * free_host_bytes()), gpu)


def free_host_bytes() -> int:
    """Bytes that this process can still take: of the machine, its control group, and its own limits (ulimit)."""
    status, memory = _fields(Path("/proc/self/status")), _fields(Path("/proc/meminfo"))
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    found = [memory.get("MemAvailable", physical), *_control_groups(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))]
    for limit, taken in ((resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData")):
        most = resource.getrlimit(limit)[0]
        if most != resource.RLIM_INFINITY:
            found.append(most - status.get(taken, 0))
    return max(0, min(found))


def _fields(path: Path) -> dict[str, int]:
    """Bytes by name, of a file of /proc with a line each."""
    found = {}
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    for line in lines:
        name, _, value = line.partition(":")
        if value.endswith("kB"):
            found[name] = 1024 * int(value.split()[0])
    return found


def _control_groups(own: Path, root: Path) -> Iterator[int]:
    """What is left in each control group around this process that has a limit; file caches count as free."""
    lines = own.read_text(encoding="utf-8").splitlines() if own.is_file() else []
    names = {line.split(":", 2)[1]: line.split(":", 2)[2] for line in lines if line.count(":") >= 2}
    for controller, folder, limit, usage in (
        ("", root, "memory.max", "memory.current"),
        ("memory", root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        if controller not in names:
            continue
        inside = Path(names[controller].lstrip("/"))
        for group in (folder / inside, *(folder / above for above in inside.parents)):
            try:
                most, taken = int((group / limit).read_text()), int((group / usage).read_text())
                stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            except (OSError, ValueError):  # "max", or no such file at the root
                continue
            yield most - taken + int(stat.get("inactive_file", 0))


# -- glibc's allocator ---------------------------------------------------------------------------------------------

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8  # malloc.h: M_TRIM_THRESHOLD and so on
_LARGEST_IN_HEAP = 32 * 2**20  # the largest threshold that glibc takes
_LARGEST_WHILE_PAUSED = 4 * 2**20
_SMALL = 128 * 2**10  # what comes from the heap still where address space is limited
_KEPT = 512 * 2**20

_tuned = False
_threshold: int | None = None  # from how many bytes on tensors come straight from the system, as `tune` set it


def tune() -> None:
    """Set this process's allocator for work with large tensors, as the command line does for its own; once is enough.

    A library does not do so unasked: the settings hold for the whole process and cannot be read, so not be put back.
    Nothing that is computed depends on them.

    glibc then reuses what freed tensors held instead of handing it back to the kernel, which clears each page anew: a
    block's forward on 4096 tokens took 100,000 page faults and an eighth of its processor time for them (SmolLM2,
    2 cores). Where address space is limited (``ulimit -v``) the holes that this leaves would count, so there all but
    small tensors come straight from the kernel and return there: glibc asks for 96 bytes more to align a tensor than
    the hole of its like has, so that of tensors of one size (activations) its heap grows with every block.
    """
    global _tuned, _threshold
    libc = _glibc()
    if libc is None or _tuned:
        return
    _tuned = True
    libc.mallopt(_ARENA_MAX, 1)  # what one thread frees another can use
    limited = resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY
    _threshold = _SMALL if limited else _LARGEST_IN_HEAP
    libc.mallopt(_MMAP_THRESHOLD, _threshold)
    if not limited:
        libc.mallopt(_TRIM_THRESHOLD, _KEPT)


@contextmanager
def large_apart() -> Iterator[None]:
    """While inside, tensors of 4 MB and more come straight from the system and return there; in `tune`d processes only.

    Where some of a forward's tensors are kept and others of the same size let go, the heap gets holes that the next
    ones miss by the 96 bytes of their alignment: a seventh of the peak of SmolLM2's run. Small ones, which are many,
    stay in the heap.
    """
    libc = _glibc() if _tuned and _threshold == _LARGEST_IN_HEAP else None
    if libc is None:
        yield
        return
    libc.mallopt(_MMAP_THRESHOLD, _LARGEST_WHILE_PAUSED)
    try:
        yield
    finally:
        libc.mallopt(_MMAP_THRESHOLD, _LARGEST_IN_HEAP)


def let_go() -> None:
    """Give the system back what was freed: blocks come and go, and what lies between them would only grow."""
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


@cache
def _glibc() -> Any:
    """glibc; None where there is another library, or none."""
    try:
        found = ctypes.CDLL(None)
        found.malloc_trim, found.mallopt  # noqa: B018
    except (OSError, AttributeError, TypeError):
        return None
    return found
