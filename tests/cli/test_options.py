"""Options, each declared once: what the command line, the library and its stub make of a spec."""

from __future__ import annotations

import inspect
import pydoc
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any, get_args

import pytest

import quantkit
from quantkit.cli import app as cli
from quantkit.cli.command import spec_of
from quantkit.cli.stubs import stubs
from quantkit.containers.gguf.recipes import RECIPES, base_kind
from quantkit.errors import UsageError
from quantkit.options import Ends, GgmlType, Grid, Options, QuantSpec, SuiteName, Terminal, make, values, verbs
from quantkit.tokens import KNOWN_NAMES
from quantkit.verbs import _in_arguments
from quantkit.verbs.eval.tasks import SUITES
from quantkit.verbs.recipe import Recipe

SPECS = {name: spec_of(name) for name in cli.COMMANDS}
BESIDES = {"progress", "ranks", "person"}
EVERY = "give minutes such as 10m, a number of blocks such as 4, or off"
NO_DATA = "is neither a file nor a known name ("


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as exit:
        cli.main(list(arguments))
    captured = capsys.readouterr()
    return int(exit.value.code or 0), captured.out, captured.err


def alone(program: str) -> str:
    """What a process of its own says."""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


@pytest.mark.parametrize("verb", SPECS)
def test_commands_and_functions_take_the_fields_of_their_spec(verb: str) -> None:
    spec = SPECS[verb]
    fields = set(spec.model_fields)
    command = {parameter.name for parameter in cli.full_command(verb).params} - {"help"}
    assert command == fields | set(Terminal.model_fields)
    function = getattr(quantkit, verb)
    shown = {name for name in fields if spec.typed(name).display}
    assert set(inspect.signature(function).parameters) - BESIDES == fields - shown
    for name in fields - shown:
        said = _in_arguments(spec, {}, " ".join(spec.help_of(name).split()))
        assert said in " ".join(function.__doc__.split())


def test_every_verb_is_in_the_table() -> None:
    assert {name for name in quantkit.__all__ if callable(getattr(quantkit, name))} - SPECS.keys() == {
        "QuantkitError",
        "QuantkitWarning",
        "UsageError",
        "tune",
    }
    assert sorted(SPECS) == sorted(
        one.__name__.lower()
        for one in vars(verbs).values()
        if inspect.isclass(one) and one.__module__ == verbs.__name__
        if one not in (verbs.Sum, verbs.Held)
    )


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_the_help_has_a_panel_for_each_group(
    flag: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    code, out, err = run(capsys, "gptq", flag)
    assert (code, err) == (0, "")
    spec = SPECS["gptq"]
    for panel in {spec.panel_of(name) for name in spec.model_fields} | {"Terminal"}:
        assert f"─ {panel} ─" in out
    assert "<static|dynamic|off>" in out
    assert "[@revision]" in run(capsys, "imatrix", flag)[1]


def test_words_are_read_blind_to_case() -> None:
    spec = make(verbs.Gptq, model="o/m", act_order="STATIC", dtype="BFloat16", override={"*": {"ggml": "q4_0"}})
    assert (spec.act_order, spec.dtype, spec.override["*"].ggml) == ("static", "bfloat16", "Q4_0")
    spec = make(verbs.Gptq, model="o/m", ggml="Q4_K_M", output_type="Q6_K", text="WikiText2", calibration="Alpaca")
    assert (spec.ggml, spec.output_type, spec.text, spec.calibration) == ("q4_k_m", "q6_k", "wikitext2", "alpaca")
    assert (
        make(verbs.Gptq, model="o/m", calibration="C4:.5, Evol-Instruct-V2:1").calibration
        == "c4:.5, evol-instruct-v2:1"
    )
    file = make(verbs.Ggml, model="o/m", type="IQ4_XS", container="GGUF", embedding_type="F16")
    assert (file.type, file.container, file.embedding_type) == ("iq4_xs", "gguf", "f16")
    variants = [{"kind": "GGUF", "type": "Q4_K_M", "output_type": "Q6_K"}, {"kind": "Gptq", "bits": 4}]
    told = Recipe.model_validate({"name": "x", "source": {"model": "o/m"}, "variants": variants})
    assert [(one.kind, one.title) for one in told.variants] == [("gguf", "Q4_K_M"), ("gptq", "4bit-128g")]


def test_words_are_read_blind_to_case_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "gptq", "--act-order", "Off", "no/such/model")
    assert (code, "no/such/model" in err) == (2, True)
    code, _, err = run(capsys, "ggml", "--type", "Q4_K_M", "no/such/model")
    assert (code, "no/such/model" in err) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("gptq --bits 9", "--bits 9: give 2, 3, 4 or 8"),
        ("gptq --bits x", "--bits x: give a whole number"),
        ("gptq --group-size 12", "--group-size 12: give -1 (one group a row) or a positive multiple of 8"),
        ("gptq --damp 0", "--damp 0: give more than 0"),
        ("gptq --damp 1", "--damp 1: give less than 1"),
        ("gptq --damp nan", "--damp nan: give a number"),
        ("gptq --samples 0", "--samples 0: give at least 1"),
        ("gptq --act-order yes", "--act-order yes: choose static, dynamic, off"),
        ("gptq --dtype int8", "--dtype int8: choose auto, float16, bfloat16, float32"),
        ("gptq --memory much", "--memory much: give a size such as 5GB or 500MB"),
        ("gptq --override x=bits:9", "--override x=bits:9: bits: give 2, 3, 4 or 8 (got '9')"),
        ("gptq --override x", "--override x: write PATTERN=bits:8,group_size:32"),
        ("card . --with-branch x", "--with-branch x: write NAME=DIR"),
        ("compare o/a o/b --out c --max-kl x", "--max-kl x: give a number"),
        ("generate o/m --prompts --out o --top-p 2", "--top-p 2: give at most 1"),
        ("generate o/m --prompts p --out o", "--prompts p: no file of prompts; give JSON lines, or --prompts alone, "),
        ("eval o/m --out o --limit 0", "--limit 0: give at least 1"),
        ("merge o/a o/b --out c --vocab zeros", "--vocab zeros: choose auto, mean, delta"),
        ("samples --show x", "--show x: give a whole number"),
        ("gptq --checkpoint-every 0", f"--checkpoint-every 0: {EVERY}"),
        ("gptq --device tpu", "--device tpu: not a device to run on; use auto, cpu, cuda or cuda:N"),
        ("gptq --ggml q4_9", "--ggml q4_9: GPTQ goes to "),
        ("ggml o/m --type Q4_KM", "--type Q4_KM: choose auto, f32, f16, bf16, q4_0, "),
        ("gptq --ggml iq2_s", "--ggml iq2_s: GPTQ goes to "),
        ("ggml o/m --type q4_9", "--type q4_9: choose auto, f32, f16, bf16, q4_0, "),
        ("ggml o/m --output-type q4_k_m", "--output-type q4_k_m: choose auto, f32, f16, bf16, q4_0, "),
        ("eval o/m --out o --suite x", "--suite x: choose open-llm-leaderboard"),
        ("compare o/a o/b --out c --max-kl -1", "--max-kl -1: give a divergence in nats, such as 0.05"),
        ("perplexity o/m --stride 512", "--stride 512: less than --seq-len (512)"),
        ("compare o/a o/b --out c --text wikitext2 --stride 2048", "--stride 2048: less than --seq-len (2048)"),
        ("gptq /no/model", "/no/model: no such file or folder, and not a Hub id (owner/name)"),
        ("inspect ./model", "./model: no such file or folder, and not a Hub id (owner/name)"),
        ("inspect some/model.gguf", "some/model.gguf: no such file or folder, and not a Hub id (owner/name)"),
        ("compare o/a b/c/d --out o", "b/c/d: no such file or folder, and not a Hub id (owner/name)"),
        ("merge o/a ~/no/model --out o", "~/no/model: no such file or folder, and not a Hub id (owner/name)"),
        ("gptq --calibration alpaca:1,none.json:2", f"no such data: 'none.json' {NO_DATA}"),
        ("release none.yaml", "none.yaml: cannot be read: No such file or directory"),
    ],
)
def test_a_wrong_value_is_one_line_in_our_words(
    arguments: str, said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for verb in SPECS:  # none is imported
        monkeypatch.setitem(sys.modules, f"quantkit.verbs.{verb}", None)
    code, out, err = run(capsys, *arguments.split())
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err == f"error: {said}\n" if said[-1] not in " (" else err.startswith(f"error: {said}")


def test_options_may_be_repeated_and_paired(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    taken: list[Any] = []

    def gptq(options: Any) -> None:
        taken.append(options)
        raise UsageError("enough")

    monkeypatch.setattr("quantkit.verbs.gptq.gptq", gptq)
    typed = (
        "o/m --asym --include a --include b --override x=bits:8 --override y=sym:false --no-eval -q --max-shard-size 9"
    )
    assert run(capsys, "gptq", *typed.split())[::2] == (2, "error: enough\n")
    (spec,) = taken
    assert (spec.sym, spec.include, spec.evaluate, spec.max_shard_size) == (False, ("a", "b"), False, "9")
    assert {pattern: change.changes() for pattern, change in spec.override.items()} == {
        "x": {"bits": 8},
        "y": {"sym": False},
    }


HEAVY = {"torch", "transformers", "numpy", "safetensors", "huggingface_hub", "yaml", "gguf"}
SPECS_OF_VERBS = {"pydantic", "quantkit.options", "quantkit.report"}
DRAWN = {"rich.console", "rich.markup"}


@pytest.mark.parametrize(
    ("arguments", "needless"),
    [
        (["--help"], HEAVY | SPECS_OF_VERBS),
        (["gptq", "--help"], HEAVY),
        (["gptq", "--bits", "5"], HEAVY | DRAWN),
        (["gptq", "./nowhere"], HEAVY | DRAWN),
        (["merge", "a"], HEAVY | DRAWN),
        (["verify", "nowhere"], HEAVY | DRAWN),
        (["card", "nowhere"], HEAVY | DRAWN),
        (["publish", "nowhere", "me/x"], HEAVY | DRAWN),
        (["perplexity", "o/m", "--text", "nowhere.txt"], HEAVY | DRAWN),
        (["generate", "o/m", "--prompts", "nowhere.jsonl", "--out", "x"], HEAVY | DRAWN),
        (["eval", "o/m", "--tasks-dir", "nowhere", "--out", "x"], HEAVY | DRAWN),
        (["release", "WRONG"], (HEAVY | DRAWN) - {"yaml"}),
    ],
)
def test_nothing_heavy_is_imported_for_help_or_a_wrong_value(
    arguments: list[str], needless: set[str], tmp_path: Path
) -> None:
    """So the answer takes a fraction of a second of processor time."""
    (tmp_path / "wrong.yaml").write_text("name: x\nvariants: [{kind: gptq, bitts: 4}]\n")
    arguments = [argument.replace("WRONG", str(tmp_path / "wrong.yaml")) for argument in arguments]
    program = f"""
import sys
from quantkit.cli import main
try:
    main({arguments})
except SystemExit:
    print("heavy:", sorted({needless} & sys.modules.keys()))
"""
    assert "heavy: []" in alone(program)


def test_the_stub_is_what_the_specs_make_of_it() -> None:
    assert Path(quantkit.__file__).with_suffix(".pyi").read_text(encoding="utf-8") == stubs(), (
        "write it again: python -m quantkit.cli.stubs"
    )


def test_functions_are_called_as_python_has_it() -> None:
    with pytest.raises(TypeError, match=r"^gptq\(\) got an unexpected keyword argument 'bitz'; did you mean bits\?$"):
        quantkit.gptq("o/m", bitz=4)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"^merge\(\) missing a required argument: 'out'$"):
        quantkit.merge("o/a", "o/b")  # type: ignore[call-arg]
    with pytest.raises(UsageError, match=r"^bits=5: a GPTQ checkpoint holds 2, 3, 4 or 8 bits; "):
        quantkit.gptq("o/m", bits=5)
    shown = pydoc.render_doc(quantkit.gptq)
    assert "bits: int | None = None" in shown
    assert "2, 3, 4 or 8; default 4, or what ggml has." in shown


def test_none_stands_for_a_default() -> None:
    with pytest.raises(UsageError, match="no such folder"):
        quantkit.card("nowhere/at/all", reports=None, branches=None)  # type: ignore[arg-type]


def test_a_group_redeclared_keeps_its_help_and_its_place() -> None:
    assert QuantSpec.help_of("bits") == Grid.help_of("bits")
    assert QuantSpec.model_fields.keys() - Grid.model_fields.keys() == {"ggml", "overrides"}
    assert Grid.model_fields.keys() - QuantSpec.model_fields.keys() == {"effort"}  # which decides on others
    assert issubclass(verbs.Gptq, Options)
    assert verbs.Gptq.in_order()[0] == "model"


def test_every_option_is_declared_once() -> None:
    """But for --template, which of a card is another one than of a prompt, and --budget, which is met or spent."""
    declared = Counter(
        name
        for group in {one for spec in (*SPECS.values(), Terminal) for one in spec.__mro__ if issubclass(one, Options)}
        for name in inspect.get_annotations(group)
        if name in group.model_fields
    )
    assert {name for name, times in declared.items() if times > 1} == {"budget", "template"}


@pytest.mark.parametrize("verb", SPECS)
def test_a_group_is_told_otherwise_only_of_what_it_has(verb: str) -> None:
    for group in SPECS[verb].__mro__:
        if issubclass(group, Options):
            assert group.defaults.keys() | group.helps.keys() <= group.model_fields.keys()


def test_a_default_of_none_is_checked_as_the_others_are() -> None:
    assert make(verbs.Gptq).bits is None
    assert make(verbs.Gptq, bits=None, seq_len=8).bits is None
    with pytest.raises(UsageError, match="--seq-len 7: give at least 8"):
        make(verbs.Perplexity, models=["o/m"], seq_len=7)
    with pytest.raises(UsageError, match="out"):
        make(verbs.Merge, base="o/a", delta="o/b")


def test_words_that_need_no_torch_are_those_of_the_tables() -> None:
    assert sorted(values.FILE_TYPES) == sorted(RECIPES)
    assert values.DATA_NAMES == KNOWN_NAMES
    assert get_args(SuiteName) == tuple(SUITES)
    bases = {base_kind(name).name.lower() for name in RECIPES}
    for name in {*RECIPES, *bases}:
        if name in bases:
            assert make(Ends, output_type=name).output_type == name
        else:
            with pytest.raises(UsageError, match=f"--output-type {name}: choose auto, f32"):
                make(Ends, output_type=name)
    on_grids = {name: base_kind(name).name for name in RECIPES if base_kind(name).name in get_args(GgmlType)}
    assert {name: values.gptq_type(name) for name in on_grids} == on_grids
