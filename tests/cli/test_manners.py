"""What a person meets who types: help that is whole, names that are nearly right, errors in plain words."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import Recorder

from quantkit.blocks.open import check_windows
from quantkit.cli import app as cli
from quantkit.cli.command import spec_of
from quantkit.errors import UsageError
from quantkit.options import make
from quantkit.verbs.compare import _warn_of_order
from quantkit.verbs.recipe import CardRecipe, load_recipe

pytestmark = pytest.mark.fast


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    capsys.readouterr()
    code = cli._run(list(arguments))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize("verb", ["", *cli.COMMANDS])
def test_help_is_whole_at_80_columns(
    verb: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("typer.rich_utils.MAX_WIDTH", 80)
    code, out, _ = run(capsys, *([verb] if verb else []), "--help")
    assert code == 0
    assert "…" not in out
    assert max(map(len, out.splitlines())) <= 80
    if verb:
        spec, words = spec_of(verb), set(out.split())
        for field in spec.in_order():
            assert [word for word in spec.help_of(field).split() if word not in words] == []
            if field not in spec.arguments:
                assert [spelled for spelled in spec.spelling(field).split("/") if spelled not in out] == []


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("gptqq", "gptqq: no such command; did you mean gptq?"),
        ("gptq --bitz 4", "--bitz: no such option; did you mean --bits?"),
        ("gptq --xyzzy 4", "--xyzzy: no such option"),
        ("gptq --bits", "--bits: give a value"),
        ("gptq --sym=3", "--sym: takes no value"),
        ("gptq x y z", "y z: more than the command takes; see `quantkit gptq --help`"),
        ("compare", "REF is missing; see `quantkit compare --help`"),
        ("eval o/m", "--out is missing; see `quantkit eval --help`"),
        ("gptq --override x=bit:8", "--override x=bit:8: bit: no such key; did you mean bits? (got '8')"),
        ("inspect mymodel", "mymodel: no such file or folder, and not a Hub id (owner/name)"),
        ("inspect models/x", "models/x: no such file or folder, and not a Hub id (owner/name)"),
        ("inspect runs/x", "runs/x: no such file or folder, and not a Hub id (owner/name); did you mean X2?"),
        (
            "inspect modle.gguf",
            "modle.gguf: no such file or folder, and not a Hub id (owner/name); did you mean model.gguf?",
        ),
    ],
)
def test_what_is_wrong_is_said_in_plain_words(
    typed: str, said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs" / "X2").mkdir(parents=True)
    (tmp_path / "model.gguf").touch()
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, *typed.split())
    assert (code, out) == (2, "")
    assert err == f"error: {said}\n"
    code, out, err = run(capsys, *typed.split()[:1], "--json", *typed.split()[1:])
    if typed != "gptqq":
        assert json.loads(out) == {"error": said, "kind": "UsageError", "exit_code": 2}
        assert err == f"error: {said}\n"


def test_an_error_of_any_kind_is_an_object_too(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    code, out, err = run(capsys, "inspect", str(tmp_path / "empty"), "--json")
    found = json.loads(out)
    assert (code, found["kind"], found["exit_code"]) == (1, "SourceError", 1)
    assert err == f"error: {found['error']}\n"

    def broken(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("a \x1b[31m fault")

    monkeypatch.setattr("quantkit.verbs.inspect.inspect", broken)
    code, out, _ = run(capsys, "inspect", str(tmp_path), "--json")
    assert code == 1
    assert json.loads(out)["kind"] == "ZeroDivisionError"
    assert "\x1b" not in out


WRONG = [[], {}, -1, 1.5, "x\n", {"a": object()}, [None], b"\xff", True]


@pytest.mark.parametrize("verb", cli.COMMANDS)
def test_no_wrong_value_is_told_in_another_library_s_words(verb: str) -> None:
    spec = spec_of(verb)
    for field in spec.model_fields:
        for value in WRONG:
            said = ""
            try:
                make(spec, **{field: value})
            except UsageError as error:
                said = str(error)
            assert not any(word in said for word in ("nput should", "valid", "[path")), (field, value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("variants: [{kind: gptq, bitts: 4}]", "variants: 0: gptq: bitts: no such key; did you mean bits? (got 4)"),
        ("variants: [{kind: gguf, typ: q8_0}]", "did you mean type?"),
        ("variant: [{kind: gptq}]", "variant: no such key; did you mean variants?"),
        ("variants: [{kind: gptq}]\nsource: {modle: x}", "source: modle: no such key; did you mean model?"),
        ("variants: [{kind: gptq}]\ncard: {licens: mit}", "card: licens: no such key; did you mean licence?"),
    ],
)
def test_near_misses_in_a_recipe(text: str, said: str, tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"name: a\n{text}\n")
    with pytest.raises(UsageError, match="no such key") as error:
        load_recipe(recipe)
    assert said in str(error.value)


def test_license_is_a_licence(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert make(CardRecipe, license="mit").licence == make(CardRecipe, licence="mit").licence == "mit"
    assert (
        run(capsys, "card", str(tmp_path / "no"), "--license", "mit")[2]
        == f"error: {tmp_path / 'no'}: no such folder\n"
    )


def test_a_shell_completes_commands_options_and_words() -> None:
    def offered(words: str, at: int) -> list[str]:
        asked = {"_QUANTKIT_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(at)}
        command = [sys.executable, "-m", "quantkit"]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, **asked})
        return done.stdout.split()

    assert offered("quantkit gp", 1) == ["gptq"]
    assert offered("quantkit gptq --act", 2) == ["--act-order"]
    assert offered("quantkit gptq --act-order ", 3) == ["static", "dynamic", "off"]
    assert offered("quantkit ggml --container gg", 3) == ["gguf", "ggjt"]
    assert offered("quantkit ggml --type q8", 3) == ["q8_0"]
    assert offered("quantkit gptq --ggml q5_k_", 3) == ["q5_k_s", "q5_k_m"]


# -- requests that can be carried out, and may not be meant --------------------------------------------------------


def test_a_quantized_reference_beside_a_whole_variant_is_told(
    make_model: Callable[..., Path], tiny_gguf: Path, recorder: Recorder
) -> None:
    from quantkit.sources import open_source

    whole, quantized = open_source(make_model()), open_source(tiny_gguf)
    _warn_of_order([whole, quantized], recorder)
    assert recorder.warnings == []
    _warn_of_order([quantized, whole], recorder)
    assert recorder.warnings == [
        "the reference, tiny-llama-Q4_0, is quantized (9.81 bits per weight) and tiny-llama is not: the reference "
        "comes first, then its variants"
    ]


def test_windows_longer_than_a_model_is_made_for_are_told(recorder: Recorder) -> None:
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(max_position_embeddings=2048))
    stream: Any = SimpleNamespace(check_length=lambda tokens: None, source=SimpleNamespace(label="tiny", config=config))
    check_windows(stream, 2048, recorder)
    assert recorder.warnings == []
    check_windows(stream, 4096, recorder)
    assert recorder.warnings == [
        "windows of 4096 tokens: tiny is made for 2048 at most, and loses its way beyond; --seq-len 2048 keeps within"
    ]
