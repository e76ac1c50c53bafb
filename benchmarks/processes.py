"""What a program costs, measured from outside: wall and processor seconds, and peak memory."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

EVERY = 0.1  # seconds between two looks at the memory


class ProgramError(Exception):
    """A program ended with an error; the message is the end of what it said."""


def measured(command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None) -> dict[str, float]:
    """Run a program to its end: `seconds` and `processor_seconds` from its start, imports too, and `peak_bytes`.

    It runs in the folder of `log`, since some leave files of their own; what it says goes into `log`. Memory is its own
    resident set at its largest (VmHWM of Linux), looked at ten times a second. Processor seconds are those of its
    children too, which it waited for.

    Raises:
        ProgramError: it ended with an error.
    """
    started, peak = time.perf_counter(), 0
    with log.open("wb") as said:
        program = subprocess.Popen(
            command, stdout=said, stderr=subprocess.STDOUT, cwd=log.parent, env={**os.environ, **(environment or {})}
        )
        while True:
            peak = max(peak, _peak(program.pid))
            ended, status, used = os.wait4(program.pid, os.WNOHANG)
            if ended:
                break
            time.sleep(EVERY)
    program.returncode = os.waitstatus_to_exitcode(status)
    if program.returncode:
        raise ProgramError(f"exit status {program.returncode}: {log.read_text(errors='replace')[-2000:]}")
    spent = used.ru_utime + used.ru_stime
    return {"seconds": time.perf_counter() - started, "processor_seconds": spent, "peak_bytes": peak}


def _peak(pid: int) -> int:
    """Of a process in bytes; 0 of one that has ended."""
    try:
        found = re.search(r"^VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(found[1]) * 1024 if found else 0
