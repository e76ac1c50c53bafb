"""Asks GPTQModel, in the environment that `make judges` builds, for the logits of a folder we wrote."""

from __future__ import annotations

import json
import os
import re
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file

_REPOSITORY = Path(__file__).resolve().parent.parent
_SCRIPT = _REPOSITORY / "tests" / "judges" / "gptqmodel_logits.py"
_PINS = _REPOSITORY / ".ci" / "judges-gptqmodel.txt"


def _gptqmodel_home() -> Path:
    """Where `.ci/judges.sh` puts the environment: the same rule as there."""
    root = os.environ.get("QUANTKIT_JUDGES")
    if not root:
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        root = str(Path(cache, "quantkit", "judges"))
    pin = re.search(r"^gptqmodel==(\S+)$", _PINS.read_text(encoding="utf-8"), re.MULTILINE)
    assert pin, f"{_PINS} does not pin gptqmodel"
    return Path(root).absolute() / f"gptqmodel-{pin[1]}"


def gptqmodel_python() -> Path:
    """The judges' interpreter. Skips the test when it is not there; fails when QUANTKIT_REQUIRE_JUDGES is set."""
    home = _gptqmodel_home()
    python = home / "venv" / "bin" / "python"
    if not ((home / "stamp").is_file() and python.exists()):
        reason = "GPTQModel's environment is missing: run `make judges`"
        if os.environ.get("QUANTKIT_REQUIRE_JUDGES"):
            pytest.fail(reason)
        pytest.skip(reason)
    return python


def gptqmodel_env(scratch: Path) -> dict[str, str]:
    """The variables to run GPTQModel with: kernels kept beside it, its temporary folders in `scratch`, no Hub."""
    return {
        **{name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")},
        "CUDA_VISIBLE_DEVICES": "",
        "GPTQMODEL_CPU_WORKERS": "2",
        "GPTQMODEL_TORCH_EXTENSIONS_DIR": str(_gptqmodel_home() / "kernels"),
        "HF_HUB_OFFLINE": "1",
        "TMPDIR": str(scratch),
    }


def run_gptqmodel(
    folder: Path | str,
    ids: Sequence[Sequence[int]] | torch.Tensor,
    generate: int = 0,
    loader: Literal["transformers", "gptqmodel"] = "transformers",
    *,
    backend: str = "gptq_torch",
    exact: bool = True,
    timeout: float = 500,
) -> tuple[torch.Tensor, list[int], dict[str, Any]]:
    """Logits float32 [prompts, tokens, vocab], greedy tokens after the first prompt, and the script's RESULT.

    Of the backends, `gptq_torch` reads every bit width on every CPU and compiles nothing; `auto` takes what a user
    gets, which depends on the CPU. With `exact` the weights are scale * (code - zero) in float32; without it GPTQModel
    rounds them to float16, as it does for a user.
    """
    python = gptqmodel_python()
    rows = ids.tolist() if isinstance(ids, torch.Tensor) else [list(row) for row in ids]
    with tempfile.TemporaryDirectory(prefix="quantkit-judge-") as name:
        scratch = Path(name)
        prompts, out = scratch / "ids.json", scratch / "out.safetensors"
        prompts.write_text(json.dumps(rows), encoding="utf-8")
        command = [str(python), str(_SCRIPT), str(folder), "--prompt-ids", str(prompts), "--out", str(out)]
        command += ["--generate", str(generate), "--loader", loader, "--backend", backend]
        if exact:
            command.append("--exact")
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            env=gptqmodel_env(scratch),
            stdin=subprocess.DEVNULL,
            timeout=timeout,
            check=False,
        )
        answer = re.search(r"^RESULT (\{.*\})$", done.stdout, re.MULTILINE)
        if done.returncode or not answer:
            tail = "\n".join((done.stdout + done.stderr).splitlines()[-25:])
            raise AssertionError(f"GPTQModel did not read {folder} (exit {done.returncode}):\n{tail}")
        tensors = load_file(out)
    return tensors["logits"], tensors["generated"].tolist(), json.loads(answer[1])
