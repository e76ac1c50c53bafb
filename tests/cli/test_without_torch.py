"""What looks at options, paths and headers alone answers without torch and transformers, which take seconds to import.

Whether they were imported is asked, not the time: that depends on the machine (`benchmarks/answers.py` measures it).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeModel, token_matrix
from safetensors.torch import load_file, save_file
from support.ggjt_models import Parts

import quantkit

HEAVY = {"torch", "transformers"}
# Runs commands one after another; says of each its exit code, what it said, and what is imported by then.
PROGRAM = f"""
import contextlib, io, json, sys
from quantkit.cli import main
for arguments in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(arguments)
        except SystemExit as done:
            code = done.code
    print(json.dumps([code, out.getvalue(), err.getvalue(), sorted({HEAVY} & sys.modules.keys())]))
"""


def answers(commands: list[list[str]], folder: Path, **environment: str) -> list[tuple[int, str, str, list[str]]]:
    """What commands give in a process of their own, in `folder`: code, stdout, stderr, and what is imported by then."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(commands)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory, make_model: MakeModel, tiny_gguf: Path) -> Path:
    """A folder with a model in every form."""
    folder = tmp_path_factory.mktemp("places")
    shutil.copytree(make_model("llama"), folder / "plain")
    shutil.copy(tiny_gguf, folder / "tiny.gguf")
    options: dict[str, Any] = {"calibration": token_matrix(4, 32), "group_size": 32, "evaluate": False}
    quantkit.gptq(folder / "plain", folder / "codes", **options)
    for name in ("compressed-tensors", "awq"):
        quantkit.repack(folder / "codes", folder / name, to=name)
    (folder / "tiny.ggjt.bin").write_bytes(Parts().bytes())
    return folder


def in_hub_cache(model: Path, home: Path, name: str) -> None:
    """Lay a model into a cache of the Hub's client, as one that was downloaded."""
    place = home / "hub" / f"models--{name.replace('/', '--')}"
    shutil.copytree(model, place / "snapshots" / ("0" * 40))
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("0" * 40)


# -- inspect -----------------------------------------------------------------------------------------------------------

FORMS = ("plain", "codes", "compressed-tensors", "awq", "tiny.gguf", "tiny.ggjt.bin")


def test_inspect_reads_headers_of_every_form(places: Path, tmp_path: Path) -> None:
    in_hub_cache(places / "plain", tmp_path, "someone/tiny")
    names = [*FORMS, "someone/tiny"]
    commands = [[*command, name] for name in names for command in (["inspect", "--json"], ["inspect", "--tensors"])]
    found = answers(commands, places, HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1")
    assert [(code, err, imported) for code, _, err, imported in found] == [(0, "", [])] * len(commands)
    for name, (_, out, _, _) in zip(FORMS, found[::2], strict=False):
        assert json.loads(out) == quantkit.inspect(places / name).as_dict()
    assert json.loads(found[-2][1]) == {**json.loads(found[0][1]), "model": "someone/tiny"}


def test_inspect_says_of_headers_what_is_wrong_with_them(places: Path, tmp_path: Path) -> None:
    plain = shutil.copytree(places / "plain", tmp_path / "plain")
    os.truncate(plain / "model.safetensors", 5000)
    config = json.loads((plain / "config.json").read_text())
    for name, changes in (("typeless", {"model_type": None}), ("absurd", {"num_hidden_layers": 10**9})):
        shutil.copytree(places / "plain", tmp_path / name)
        (tmp_path / name / "config.json").write_text(json.dumps({**config, **changes}))
    (tmp_path / "half.gguf").write_bytes((places / "tiny.gguf").read_bytes()[:3000])
    (tmp_path / "half.bin").write_bytes((places / "tiny.ggjt.bin").read_bytes()[:3000])
    (tmp_path / "other.gguf").write_bytes(b"something else")
    (tmp_path / "empty").mkdir()
    wrong = {
        "plain": "model.safetensors: broken or cut short",
        "typeless": "has no model_type",
        "absurd": "num_hidden_layers is 1000000000",
        "half.gguf": "broken or cut short GGUF file",
        "half.bin": "broken or cut short ggjt file",
        "other.gguf": "neither a GGUF file nor a folder nor a ggjt file",
        "empty": "no model here (it has no config.json)",
    }
    found = answers([["inspect", name] for name in wrong], tmp_path)
    assert [(code, out, err.count("\n"), imported) for code, out, err, imported in found] == [(1, "", 1, [])] * len(
        wrong
    )
    for said, (_, _, err, _) in zip(wrong.values(), found, strict=True):
        assert said in err


def test_a_pickle_is_opened_by_torch(places: Path, tmp_path: Path) -> None:
    """Whose rules say what may be in it."""
    folder = shutil.copytree(places / "plain", tmp_path / "pickled")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    ((code, out, _, imported),) = answers([["inspect", "pickled", "--json"]], tmp_path)
    assert (code, imported) == (0, ["torch"])
    assert json.loads(out)["types"] == quantkit.inspect(places / "plain").types


# -- publish -----------------------------------------------------------------------------------------------------------


def test_a_dry_run_of_publish_verifies_what_headers_and_names_tell(places: Path, tmp_path: Path) -> None:
    for name in ("cut", "mute", "changed", "uneven"):
        shutil.copytree(places / "codes", tmp_path / name)
    (tmp_path / "file").mkdir()
    (tmp_path / "file" / "tiny.gguf").write_bytes((places / "tiny.gguf").read_bytes()[:-100])
    for name in ("cut", "mute", "uneven"):
        (tmp_path / name / "quantkit.json").unlink()  # with its checksums
    os.truncate(tmp_path / "cut" / "model.safetensors", 50_000)
    (tmp_path / "mute" / "tokenizer.json").unlink()
    with (tmp_path / "changed" / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x77")
    tensors = load_file(tmp_path / "uneven" / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.scales"] = torch.ones(1, 96, dtype=torch.float16)
    save_file(tensors, tmp_path / "uneven" / "model.safetensors", metadata={"format": "pt"})
    wrong = {
        "cut": "model.safetensors: it has 50000 bytes",
        "mute": "has no tokenizer",
        "changed": "model.safetensors is not the file that was written",
        "uneven": "model.layers.0.mlp.up_proj.qzeros is (2, 12), but qweight asks for (1, 12)",
        "file": "ends before the end of",
    }
    sound = [str(places / name) for name in ("plain", "codes")]
    commands = [["publish", name, "me/tiny", "--dry-run", "--quiet"] for name in (*wrong, *sound)]
    found = answers(commands, tmp_path, HF_HUB_OFFLINE="1")
    for said, (code, out, err, imported) in zip(wrong.values(), found, strict=False):
        assert (code, out, imported) == (1, "", []), err
        assert "not published, `quantkit verify` finds: " in err
        assert said in err
    for code, out, err, imported in found[len(wrong) :]:
        assert (code, imported) == (0, []), err
        assert "model.safetensors" in out
