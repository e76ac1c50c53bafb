"""One gptq run in 1, 2 and 4 processes, on one machine and on two "hosts": the time of each, and whose codes differ.

The job: SmolLM2-135M, 32 windows of 512 tokens, 4-bit, group 64, from the model on disk to the checkpoint on disk,
started by torchrun. The processes share the machine's cores, so that more of them are not to be expected to be
faster here: what is measured is what sharing the work costs. The hosts are two network namespaces that see each other
through a pair of virtual links (Linux, as root; left out elsewhere).

    python benchmarks/ranks.py --rounds 3
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import common
import torch
from safetensors.torch import load_file

HOSTS = ("quantkit-host-0", "quantkit-host-1")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run")
CASES: tuple[tuple[str, int, bool], ...] = (
    ("1 process", 1, False),
    ("2 processes", 2, False),
    ("4 processes", 4, False),
    ("1 process, deterministic", 1, True),
    ("2 processes, deterministic", 2, True),
    ("4 processes, deterministic", 4, True),
    ("2 hosts of 2 processes, deterministic", 4, True),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/benchmarks"), help="folder for models and checkpoints")
    parser.add_argument("--model", type=Path, help="another model; default: SmolLM2")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--out", type=Path, help="also write the result here, as JSON")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    model = (args.model or common.smollm2_folder(args.work)).resolve()
    rows: dict[str, list[float]] = {}
    with two_hosts() as linked:
        for _ in range(args.rounds):
            for name, processes, deterministic in CASES:
                if linked or "hosts" not in name:
                    seconds = once(args, model, name, processes, deterministic)
                    rows.setdefault(name, []).append(seconds)
                    print(f"{name}: {seconds:.1f} s", flush=True)
    config = json.loads((model / "config.json").read_text())
    result = {
        "benchmark": "ranks",
        **common.machine(),
        "model": {key: config[key] for key in ("model_type", "hidden_size", "num_hidden_layers")},
        "threads": "cores / processes",
        "samples": args.samples,
        "seq_len": args.seq_len,
        "rounds": args.rounds,
        "seconds": {name: statistics.median(times) for name, times in rows.items()},
        "codes": {name: compared(args.work, name) for name in rows},
    }
    print(json.dumps(result, indent=2))
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")


def once(args: argparse.Namespace, model: Path, name: str, processes: int, deterministic: bool) -> float:
    """Seconds of the work, without importing libraries."""
    out = folder_of(args.work, name)
    shutil.rmtree(out.parent, ignore_errors=True)
    job = ["-m", "quantkit", "gptq", str(model), "--out", str(out), "--group-size", "64", "--device", "cpu"]
    job += ["--samples", str(args.samples), "--seq-len", str(args.seq_len), "--no-eval", "--quiet", "--json"]
    job += ["--deterministic"] if deterministic else []
    # Sums over rows of a product are only to be compared between equal numbers of threads.
    threads = 1 if deterministic else max(1, (os.cpu_count() or 1) // processes)
    env = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    if "hosts" not in name:
        commands = [[*TORCHRUN, "--nproc-per-node", str(processes), *job]]
    else:
        env["GLOO_SOCKET_IFNAME"] = "link0"
        meet = ["--nnodes", "2", "--nproc-per-node", str(processes // 2)]
        meet += ["--master-addr", "10.77.0.1", "--master-port", "29511"]
        commands = [
            ["ip", "netns", "exec", host, *TORCHRUN, *meet, "--node-rank", str(number), *job]
            for number, host in enumerate(HOSTS)
        ]
    started = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) for command in commands]
    texts = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        raise SystemExit(f"{name} failed")
    seconds: float = json.loads(texts[0])["seconds"]
    return seconds


def compared(work: Path, name: str) -> dict[str, Any]:
    """With the codes of one process: those that differ, and whether all files are equal."""
    alone = folder_of(work, "1 process, deterministic" if "deterministic" in name else "1 process")
    ours, theirs = folder_of(work, name), alone
    a, b = load_file(ours / "model.safetensors"), load_file(theirs / "model.safetensors")
    codes = [tensor for tensor in b if tensor.endswith("qweight")]
    shifts = torch.arange(0, 32, 4)
    differ = sum(
        int(((a[n][row, :, None] >> shifts ^ b[n][row, :, None] >> shifts) & 15).count_nonzero())
        for n in codes
        for row in range(len(b[n]))
    )
    files = {path.name for path in theirs.iterdir()} | {path.name for path in ours.iterdir()}
    return {
        "differ": differ,
        "of": 8 * sum(b[n].numel() for n in codes),
        "equal_files": all((ours / f).read_bytes() == (theirs / f).read_bytes() for f in files),
    }


def folder_of(work: Path, name: str) -> Path:
    """Folders of one name, since a name is in no file."""
    return (work / "ranks" / name.replace(", ", "-").replace(" ", "-") / "out").resolve()


@contextmanager
def two_hosts() -> Iterator[bool]:
    """Make the namespaces and remove them again; false where that is not allowed."""
    first, second = HOSTS
    try:
        if shutil.which("ip") is None or any(_ip("netns", "add", host) for host in HOSTS):
            yield False
            return
        _ip("-n", first, "link", "add", "link0", "type", "veth", "peer", "name", "link0", "netns", second)
        for number, host in enumerate(HOSTS, start=1):
            _ip("-n", host, "addr", "add", f"10.77.0.{number}/24", "dev", "link0")
            for link in ("lo", "link0"):
                _ip("-n", host, "link", "set", link, "up")
        yield True
    finally:
        for host in HOSTS:
            if shutil.which("ip"):
                _ip("netns", "del", host)


def _ip(*arguments: str) -> int:
    return subprocess.run(["ip", *arguments], capture_output=True, check=False).returncode


if __name__ == "__main__":
    main()
