"""Recipes: what a YAML file may say, and the line that says what is wrong with one."""

from __future__ import annotations

from pathlib import Path

import pytest

from quantkit.errors import UsageError
from quantkit.verbs.recipe import GgufVariant, GptqVariant, load_recipe

pytestmark = pytest.mark.fast

GPTQ = "variants: [{kind: gptq}]"


def recipe(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_what_a_short_recipe_means(tmp_path: Path) -> None:
    made = load_recipe(recipe(tmp_path, "name: Tiny\nvariants: [{kind: gptq}, {kind: gguf, type: Q4_0}]"))
    checkpoint, file = made.variants
    assert isinstance(checkpoint, GptqVariant)
    assert isinstance(file, GgufVariant)
    assert (checkpoint.bits, checkpoint.group_size, checkpoint.title) == (4, 128, "4bit-128g")
    assert (file.type, file.title, file.method) == ("q4_0", "Q4_0", "auto")
    assert [made.reference_repo, *map(made.repo_of, made.variants)] == ["Tiny-HF", "Tiny-GPTQ", "Tiny-GGUF"]
    assert made.calibration.data == "evol-instruct-sample"
    assert made.publish is None
    assert not made.evaluation.runs_tasks


def test_paths_beside_the_recipe_are_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "recipes"
    (place / "base").mkdir(parents=True)
    (place / "text.txt").write_text("a text")
    text = f"""
name: Tiny
source: {{base: base, delta: owner/delta}}
evaluation: {{texts: [text.txt, wikitext2]}}
calibration: {{data: text.txt}}
{GPTQ}
"""
    path = recipe(place, text)
    monkeypatch.chdir(tmp_path)
    made = load_recipe(path.relative_to(tmp_path))
    assert (made.source.base, made.source.delta) == (str(place / "base"), "owner/delta")
    assert made.evaluation.texts == (str(place / "text.txt"), "wikitext2")
    assert made.calibration.data == str(place / "text.txt")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("- a", "a recipe is a mapping with name, source and variants"),
        ("1: 2", "keys are names"),
        ("name: [x\n", "recipe.yaml: no YAML: line 2, column 1: expected ',' or ']', but got '<stream end>'"),
        ("name: a\nname: b", "name is given twice"),
        ("name: ../a\n" + GPTQ, "name: use letters, digits and . _ - (got '../a')"),
        ("name: a\nvariants: []", "variants: name at least one"),
        (
            "name: a\nvariants: [{kind: gptq, bitts: 4}]",
            "variants: 0: gptq: bitts: no such key; did you mean bits? (got 4)",
        ),
        ("name: a\nvariants: [{kind: exl3}]", "variants: 0: choose gptq, compressed-tensors, awq, mlx, gguf, ggjt"),
        ("name: a\nvariants: [{kind: gguf}]", "variants: 0: gguf: type: is missing"),
        ("name: a\nvariants: [{kind: gptq}, {kind: gptq}]", "2 of them are gptq 4bit-128g in a-GPTQ"),
        ("name: a\nvariants: [{kind: gptq}, {kind: gguf, type: q4_0, repo: a-GPTQ}]", "repo a-GPTQ is for one kind"),
        ("name: a\nsource: {base: b}\n" + GPTQ, "base and delta belong together"),
        ("name: a\nsource: {base: b, delta: c, model: d}\n" + GPTQ, "give model, or base and delta"),
        ("name: a\nevaluation: {texts: []}\n" + GPTQ, "texts: name at least one text"),
        ("name: a\npublish: {owner: a--b}\n" + GPTQ, "'a--b' is no name that the Hub takes"),
        ("name: a\npublish: {}\n" + GPTQ, "publish: owner: is missing"),
        ("name: a\nvariants: [{kind: gptq, override: {x: {bits: 9}}}]", "x: bits: give 2, 3, 4 or 8 (got 9)"),
    ],
)
def test_what_does_not_fit_is_named_in_one_line(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        load_recipe(recipe(tmp_path, text))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "recipe.yaml" in str(caught.value)


def test_a_recipe_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"none\.yaml: cannot be read: No such file"):
        load_recipe(tmp_path / "none.yaml")


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="no YAML"):
        load_recipe(tmp_path / "recipe.yaml")
