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
from support.folders import contents
from support.ggjt_models import Parts

import quantkit
from quantkit.options.values import has_driver

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
    for name in ("compressed-tensors", "awq", "mlx"):
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

FORMS = ("plain", "codes", "compressed-tensors", "awq", "mlx", "tiny.gguf", "tiny.ggjt.bin")


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


# -- mistakes ----------------------------------------------------------------------------------------------------------

IN_THE_WAY = {  # of a verb that writes a folder, and of one that writes a file
    True: {"full": "already exists; use --force", "file": "is a file; name a folder"},
    False: {"file": "already exists; use --", "full": "is a folder; name a file"},
}
NEVER = {
    "file/x": "file is no folder; name another",
    "/proc": "is a mount point",
    "lost": "lost is a link",
}
WRITES = {
    "gptq plain --group-size 32": True,
    "gptq --base plain --delta other --group-size 32": True,
    "convert plain": True,
    "merge plain other": True,
    "diff plain other": True,
    "compare plain codes": True,
    "ggml plain --type q8_0": False,
    "imatrix plain": False,
    "eval plain": False,
    "generate plain --prompts prompts.jsonl": False,
}
OPENS = (
    *("inspect {}", "gptq {}", "ggml {}", "convert {}", "imatrix {}", "samples {}", "perplexity {}", "chat {}"),
    *("merge {} plain --out x", "merge plain {} --out x", "diff plain {} --out x", "compare plain {} --out x"),
    *("perplexity plain --against {}", "eval {} --out x", "generate {} --prompts prompts.jsonl --out x"),
    "gptq --base plain --delta {}",
)
NO_MODELS = {
    "nowhere/at/all": (2, "nowhere/at/all: no such file or folder, and not a Hub id"),
    "full": (1, "full: no model here (it has no config.json)"),
    "file": (1, "file: neither a GGUF file nor a folder nor a ggjt file"),
    "other-codes": (1, "other-codes: quantized with 'aqlm'"),
    "cut.gguf": (1, "cut.gguf: broken or cut short GGUF file"),
}
OTHERS = {
    "gptq plain --bits 5": "--bits 5: a GPTQ checkpoint holds 2, 3, 4 or 8 bits",
    "gptq plain --group-size 100": "--group-size 100: give -1 (one group a row) or a positive multiple of 8",
    "gptq plain --group-size 24": "--group-size 24: GPTQ readers load groups of 16, 32, 64",
    "gptq plain --ggml q4_0 --bits 8": "--bits 8: Q4_0 has bits 4 of its own",
    "gptq plain --resume --force": "--resume goes on with an unfinished run and --force starts anew",
    "gptq plain --revision v1": "--revision is for Hub ids; plain is a local path",
    "gptq plain --calibration nosuch": "no such data: 'nosuch' is neither a file nor a known name",
    "gptq plain --calibration alpaca:1,c4": "calibration: 'c4' has no weight",
    "gptq plain --calibration full": "full is a folder: give one file",
    "gptq plain --calibration alpaca:nowhere.json": "alpaca:nowhere.json: there is no file nowhere.json",
    "perplexity plain --text nosuch": "no such data: 'nosuch' is neither a file nor a known name",
    "compare plain codes --out x --text wikitext2:nowhere": "wikitext2:nowhere: there is no file nowhere",
    "convert plain --out plain/x": "--out PLACE/plain/x lies inside the source plain",
    "compare plain plain --out x": "plain is named twice; compare each model once",
    "ggml plain --type q9_k": "--type q9_k: choose auto, f32",
    "ggml plain --type q4_0 --imatrix nowhere": "nowhere: no such file; give an importance matrix",
    "gptq plain --ggml q4_0 --out model.gguf": "--out model.gguf is a file's name, and a folder is written",
    "eval plain --out x --task hellaswagg": "--task hellaswagg: no such task; near it are hellaswag,",
    "generate plain --prompts full --out x": "--prompts full: no file of prompts",
    "card codes --report nowhere": "nowhere: no such file; give a report.json of `quantkit compare`",
    "card codes --eval nowhere": "nowhere: no such file; give results of `quantkit eval`",
    "card codes --template nowhere": "--template nowhere: choose default, thebloke-2023, or name a file",
    "card codes --prompt-template nowhere": "--prompt-template nowhere: choose auto, chat",
    "card codes --original nowhere": "--original PLACE/nowhere: no card there",
    "card codes --with-branch a=nowhere": "--with-branch a=nowhere: no such folder",
    "card full": "full: no model here, so there is nothing to write a card of",
    "publish codes me/x --only *.nothing": "--only *.nothing: no file of PLACE/codes matches",
    "publish codes me/x --branch a..b": "--branch a..b: not a name for a branch",
    "publish plain me/x --branch auto": "--branch auto names branches after bits and groups",
    "release model.yaml": "model.yaml: ./nowhere: no such file or folder",
    "release data.yaml": "data.yaml: no such data: 'nosuch'",
    "release text.yaml": "text.yaml: no such data: 'nosuch'",
    "release kind.yaml": "kind.yaml: variants: 0: choose gptq, ",
    "release type.yaml": "type.yaml: variants: 0: ggjt: type: choose auto, f32",
    "release keys.yaml": "keys.yaml: variants: 0: gptq: bitts: no such key; did you mean bits?",
}
RECIPES = {
    "model": "source: {model: ./nowhere}\nvariants: [{kind: gptq}]",
    "data": "calibration: {data: nosuch}\nvariants: [{kind: gptq}]",
    "text": "evaluation: {texts: [nosuch]}\nvariants: [{kind: gptq}]",
    "kind": "variants: [{kind: exl3}]",
    "type": "variants: [{kind: ggjt, type: q4_9}]",
    "keys": "variants: [{kind: gptq, bitts: 4}]",
}


@pytest.fixture(scope="module")
def desk(places: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of models, and of what is none."""
    folder = tmp_path_factory.mktemp("desk")
    for name in ("plain", "codes"):
        (folder / name).symlink_to(places / name)
    shutil.copytree(places / "plain", folder / "other")
    shutil.copytree(places / "plain", folder / "other-codes")
    config = json.loads((places / "plain" / "config.json").read_text())
    (folder / "other-codes" / "config.json").write_text(
        json.dumps({**config, "quantization_config": {"quant_method": "aqlm"}})
    )
    (folder / "cut.gguf").write_bytes((places / "tiny.gguf").read_bytes()[:-100])
    (folder / "full").mkdir()
    (folder / "full" / "x").write_text("x")
    (folder / "file").write_text("no model")
    (folder / "lost").symlink_to("nowhere")
    (folder / "prompts.jsonl").write_text('{"prompt": "why?"}\n')
    for name, text in RECIPES.items():
        (folder / f"{name}.yaml").write_text(f"name: tiny\n{text}\n")
    return folder


def refused(commands: dict[str, tuple[int, str]], folder: Path) -> None:
    """Each command must end with its code and one line that has its words, without torch, and leave no file."""
    before = contents(folder)
    found = answers([command.split() for command in commands], folder, HF_HUB_OFFLINE="1")
    for (command, (wanted, said)), (code, out, err, imported) in zip(commands.items(), found, strict=True):
        assert (code, out, err.count("\n"), imported) == (wanted, "", 1, []), (command, err)
        assert said.replace("PLACE", str(folder)) in err, (command, err)
    assert contents(folder) == before


def test_an_output_in_the_way(desk: Path) -> None:
    commands = {
        f"{command} --out {out}": (2, said)
        for command, folder in WRITES.items()
        for out, said in {**IN_THE_WAY[folder], **NEVER}.items()
    }
    refused(commands, desk)


def test_what_is_no_model(desk: Path) -> None:
    refused({command.format(name): told for command in OPENS for name, told in NO_MODELS.items()}, desk)


def test_other_mistakes(desk: Path) -> None:
    refused({command: (2, said) for command, said in OTHERS.items()}, desk)


@pytest.mark.skipif(has_driver(), reason="there may be a GPU here")
def test_a_gpu_that_is_not_there(desk: Path) -> None:
    said = "this machine's torch sees no CUDA GPU; use --device cpu"
    refused({f"{command} --device cuda": (2, said) for command in ("gptq plain", "verify plain")}, desk)
