"""The process that reads damaged samples: a child after the imports for each reader, with limits for every case.

    python process.py FOLDER '{"counts": {READER: [FIRST, COUNT], ...}, "seconds": 0}'

FOLDER has the samples in ``whole``. Of cases that ended otherwise than they may, the files stay in ``kept``.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import re
import resource
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from pathlib import Path
from random import Random
from typing import Any

from quantkit.bars import shown
from quantkit.errors import UNSEEN, QuantkitError, SourceError, describe, visible
from quantkit.runs import limits
from support.fuzzing.readers import READERS, Reader, prepare

MEMORY = 2**30
PATIENCE = 5.0
"""Seconds that one case may take."""
TEMPLATE_SECONDS = 1.0
"""Of these a chat template may take so much here, for which it has more outside."""
LONGEST = 3000
"""Characters of an error's line."""
MOST_FAULTS = 40


class TooSlow(BaseException):
    """A case took more than `PATIENCE`."""


def _alarm(*_: object) -> None:
    raise TooSlow


def fault_of(error: BaseException) -> str | None:
    """What is wrong with how a case ended; None where it is the project's own error, in one clean line."""
    if not isinstance(error, QuantkitError):
        frames = traceback.extract_tb(error.__traceback__)
        ours = [frame for frame in frames if f"{os.sep}quantkit{os.sep}" in frame.filename] or frames
        where = f"{Path(ours[-1].filename).name}:{ours[-1].lineno} {ours[-1].name}"
        return f"{type(error).__name__} in {where}: {visible(str(error))[:300]}"
    line = shown(describe(error))
    if any(ord(letter) in UNSEEN for letter in line) or re.search(r"Traceback|\x1b", line):
        return f"control characters or a traceback in {line!r}"
    try:
        line.encode()
    except UnicodeEncodeError:
        return f"half of a character in {line!r}"
    return f"a line of {len(line)} characters: {line[:200]}" if len(line) > LONGEST else None


def tried(reader: Reader, dice: Random, case: Path) -> BaseException | None:
    """Read a case within the limits; code that no signal reaches is ended with the process."""
    faulthandler.dump_traceback_later(4 * PATIENCE, exit=True)
    signal.setitimer(signal.ITIMER_REAL, PATIENCE)
    try:
        reader.read(case, dice)
    except BaseException as error:
        return error
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()
    return None


def _cases(root: Path, name: str, numbers: Iterator[int], write: int) -> None:
    """What the child does; each line that it writes is a number, and how that case ended."""
    reader, folder = READERS[name], root / "work"
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, hard))
    signal.signal(signal.SIGALRM, _alarm)
    with os.fdopen(write, "w", buffering=1) as pipe:
        for number in numbers:
            print(json.dumps([number, "begun", "", ""]), file=pipe)
            dice, file = prepare(reader, root / "whole", folder, number, name)
            error = tried(reader, dice, folder / "case")
            ended = "read" if error is None else "refused"
            fault = None if error is None else fault_of(error)
            if fault is not None:
                ended = "fault"
                trace = "".join(traceback.format_exception(error))
                (folder / "trace.txt").write_text(trace, errors="backslashreplace")
                _keep(root, name, number)
            print(json.dumps([number, ended, file, fault or (describe(error) if error else "")]), file=pipe)


def _keep(root: Path, name: str, number: int) -> None:
    target = root / "kept" / f"{name}-{number}"
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(root / "work", target)


def run(root: Path, name: str, first: int, count: int, until: float) -> dict[str, Any]:
    """So many cases of a reader, and how they ended: a child that dies is replaced, and its case is a fault."""
    ends: Counter[str] = Counter()
    faults: list[dict[str, Any]] = []
    refusals: Counter[str] = Counter()
    number, begun, seconds = first, None, time.monotonic()
    while number < first + count and time.monotonic() < until and len(faults) < MOST_FAULTS:
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(read)
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            code = 1
            try:
                _cases(root, name, (n for n in range(number, first + count) if time.monotonic() < until), write)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        os.close(write)
        with os.fdopen(read) as pipe:
            for line in pipe:
                number, ended, file, text = json.loads(line)
                begun = number if ended == "begun" else None
                if ended == "begun":
                    continue
                ends[ended] += 1
                if ended == "fault":
                    faults.append({"case": f"{name}:{number}", "file": file, "text": text})
                elif ended == "refused":
                    refusals[re.sub(r"[\d'\"].*", "", text.replace(str(root / "work"), ""))[:60]] += 1
        status = os.waitpid(child, 0)[1]
        number += 1
        if begun is not None:
            _keep(root, name, begun)
            how = f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else f"exit {os.WEXITSTATUS(status)}"
            faults.append({"case": f"{name}:{begun}", "file": "", "text": f"the process ended ({how})"})
            ends["fault"] += 1
            begun = None
        elif status and number <= first:
            raise SystemExit(f"{name}: the process could not begin")
    shutil.rmtree(root / "work", ignore_errors=True)
    return {
        **{key: ends[key] for key in ("read", "refused", "fault")},
        "seconds": round(time.monotonic() - seconds, 1),
        "kinds_of_refusals": len(refusals),
        "faults": faults,
    }


def _read_whole(root: Path, name: str) -> None:
    """Read the sample as it is, some times, since dice say how: whatever a reader imports late is there then."""
    reader = READERS[name]
    sample = root / "whole" / reader.sample
    single = sorted(path for path in sample.iterdir() if path.name != ".one") if (sample / ".one").exists() else []
    for number in range(4):
        shutil.rmtree(root / "work", ignore_errors=True)
        shutil.copytree(sample, root / "work" / "case", ignore=lambda _, names: names if single else ())
        if single:
            shutil.copy(single[number % len(single)], root / "work" / "case")
        with suppress(SourceError) if name == "adapter" else nullcontext():  # which no reader takes for a model
            reader.read(root / "work" / "case", Random(number))


def main() -> None:
    import torch

    root, asked = Path(sys.argv[1]), json.loads(sys.argv[2])
    torch.set_num_threads(1)
    limits.TEMPLATE_SECONDS = TEMPLATE_SECONDS
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    counts: dict[str, list[int]] = asked["counts"]
    for name in counts:
        _read_whole(root, name)
    until = time.monotonic() + asked["seconds"] if asked["seconds"] else float("inf")
    for name, (first, count) in counts.items():
        print(json.dumps({"reader": name, **run(root, name, first, count, until)}), flush=True)


if __name__ == "__main__":
    main()
