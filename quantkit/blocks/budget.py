"""How much memory a run may take: what is free where nobody says."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

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
    gpu = int(_SHARE * torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else None
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
