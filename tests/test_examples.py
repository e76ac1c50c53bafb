"""The programs in examples/ run as they stand."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import MakeModel

from quantkit.verbs.recipe import load_recipe

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def test_python_example(make_model: MakeModel, tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(EXAMPLES / "quantize_and_evaluate.py"),
        str(make_model("llama")),
        str(tmp_path / "out"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("out: 5.")
    assert lines[1].startswith("14 of 14 layers")
    assert "KL divergence" in lines[3]


def test_shell_example(make_model: MakeModel, tmp_path: Path) -> None:
    programs = Path(sys.executable).parent
    assert (programs / "quantkit").exists(), "install quantkit first: pip install -e ."
    environment = {**os.environ, "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"}
    command = ["bash", str(EXAMPLES / "quantize_and_evaluate.sh"), str(make_model("qwen2")), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert [row["kl_divergence"] is None for row in report["results"]] == [True, False]
    assert "GPTQ 4-bit symmetric, group 32" in done.stdout


def test_recipes_are_recipes(tmp_path: Path) -> None:
    (tmp_path / "llama-13b").mkdir()  # the publisher's to obtain
    recipes = {path.stem: load_recipe(shutil.copy(path, tmp_path)) for path in EXAMPLES.glob("*.yaml")}
    assert recipes.keys() == {"smollm2", "wizardlm-13b", "qwen3-8b"}
    wizard = recipes["wizardlm-13b"]
    assert (wizard.source.delta, wizard.source.vocab) == ("WizardLM/WizardLM-13B-V1.0", "mean")
    assert [variant.title for variant in wizard.variants if variant.kind == "ggjt"] == [
        *("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
    ]


@pytest.mark.e2e
def test_smollm2_recipe_can_be_made_but_for_its_ggjt_file(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "quantkit", "release", str(EXAMPLES / "smollm2.yaml"), "--dry-run", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    parts = {part["name"]: part for part in json.loads(done.stdout)["forecasts"]}
    refused = {name: part["refused"] for name, part in parts.items() if part["refused"]}
    assert refused.keys() == {"ggjt Q4_0"}
    assert "9 heads share 3 keys and values" in refused["ggjt Q4_0"]
    # The bytes of the blocks' Linears, and of the embedding in the source's float16.
    assert parts["gptq 4bit-64g"]["bytes"] < parts["gptq 8bit-64g"]["bytes"] < parts["reference"]["bytes"]
    assert not list(tmp_path.iterdir())
