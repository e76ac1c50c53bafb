"""release: the model case from a base and a delta to published repositories, and what happens when it is disturbed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf.quants as gguf_quants
import pytest
import torch
import yaml
from conftest import MakeModel, Recorder
from huggingface_hub import snapshot_download
from support.ggjt_models import Kind
from support.recipes import HEAD, SMALL, TEXT, write_recipe
from support.wizard import stored, wizard

import quantkit
from quantkit.cli import app as cli
from quantkit.errors import QuantkitError, UsageError
from quantkit.quantize import token_weights, trials
from quantkit.runs.ledger import locked
from quantkit.sources import open_source
from quantkit.verbs.generate.speaker import Speaker
from quantkit.verbs.release import ReleaseReport, drop_stale, family, forecast

WIZARD = f"""
name: Tiny-Wizard
source: {{base: llama, delta: wizard-delta, vocab: mean, dtype: float16}}
{HEAD}
variants:
  - {{kind: gptq, bits: 4, group_size: 32}}
  - {{kind: gptq, bits: 8, group_size: 32}}
  - {{kind: ggjt, type: q4_0}}
  - {{kind: ggjt, type: q5_0}}
  - {{kind: ggjt, type: q8_0}}
  - {{kind: gguf, type: q4_0}}
card: {{licence: other, prompt_template: vicuna}}
publish: {{owner: someone}}
"""


def statuses(report: ReleaseReport) -> dict[str, str]:
    return {outcome.step: outcome.status for outcome in report.outcomes}


def contents(out: Path) -> dict[str, bytes]:
    """Every file of a release but its own notes."""
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.name not in ("journal", "lock")
    }


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with base, delta, tuned model and recipe."""
    folder = tmp_path_factory.mktemp("wizard")
    wizard(folder)
    write_recipe(folder, WIZARD)
    return folder


def test_the_wizardlm_recipe_from_base_and_delta_to_the_hub_and_back(
    case: Path,
    hub_client: None,
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    report = quantkit.release(case / "recipe.yaml", out)
    assert set(statuses(report).values()) == {"done"}, report.outcomes
    assert list(report.lines())[-1] == f"what each variant loses: {out / 'report' / 'report.html'}"
    assert (out / "report" / "report.html").is_file()
    merged = stored(out / "Tiny-Wizard")
    tuned = stored(case / "wizard")
    assert merged.keys() == tuned.keys()
    assert all(torch.equal(merged[name], tuned[name].half()) for name in tuned)
    # The files of one type hold the codes of one run.
    codes = open_source(out / "Tiny-Wizard-GGUF" / "Tiny-Wizard-Q4_0.gguf")
    ggjt = open_source(out / "Tiny-Wizard-GGML" / "Tiny-Wizard.ggmlv3.q4_0.bin")
    name = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(codes.read(name), ggjt.read(name))
    cards = {repo: (out / folder / "README.md").read_text() for repo, folder in REPOS.items()}
    for repo, card in cards.items():
        for other in REPOS.keys() - {repo}:
            assert f"someone/{other}" in card, (repo, other)
    for repo, folder in REPOS.items():
        back = Path(snapshot_download(f"someone/{repo}", token=True, local_dir=tmp_path / "back" / repo))
        for path in (out / folder).rglob("*"):
            assert (back / path.relative_to(out / folder)).read_bytes() == path.read_bytes(), path
        assert quantkit.verify(back, generate=False).problems == []
    second = snapshot_download(
        "someone/Tiny-Wizard-GPTQ", revision="gptq-8bit-32g-actorder_False", local_dir=tmp_path / "second"
    )
    assert open_source(second).kind == "gptq"
    models = [
        tmp_path / "back" / "Tiny-Wizard-GPTQ",
        tmp_path / "back" / "Tiny-Wizard-GGML" / "Tiny-Wizard.ggmlv3.q8_0.bin",
        tmp_path / "back" / "Tiny-Wizard-GGUF" / "Tiny-Wizard-Q4_0.gguf",
    ]
    compared = quantkit.compare(
        tmp_path / "back" / "Tiny-Wizard-HF",
        models,
        out=tmp_path / "report",
        texts=[str(case / "text.txt")],
        seq_len=64,
    )
    found = json.loads((out / "report" / "report.json").read_text())
    before = {model["bytes"]: model["texts"]["text.txt"]["perplexity"] for model in found["models"]}
    for model in compared.as_dict()["models"]:
        assert model["texts"]["text.txt"]["perplexity"] == pytest.approx(before[model["bytes"]], rel=1e-6)
    ggml = out / "Tiny-Wizard-GGML"
    quantkit.card(ggml, template="thebloke-2023", force=True)
    card = (ggml / "README.md").read_text()
    assert card.count("calibration tokens, SHA-256") == 1  # of all three files
    for file in ggml.glob("*.bin"):
        assert f"\n* `{file.name}`, SHA-256 `{hashlib.sha256(file.read_bytes()).hexdigest()}`\n" in card


WIDE = {"hidden_size": 256, "head_dim": 64, "intermediate_size": 768}
"""A real Llama's width is a multiple of 256, and so mixtures have super-blocks."""


def test_the_example_of_the_wizardlm_family_at_a_real_width(tmp_path: Path) -> None:
    """Every file that the dry run promises is there, of the size that it says; codes of a type are those of one run."""
    wizard(tmp_path, **WIDE)
    recipe = yaml.safe_load((Path(__file__).parents[2] / "examples" / "wizardlm-13b.yaml").read_text())
    recipe["source"] |= {"base": "llama", "delta": "wizard-delta"}
    recipe["calibration"] |= {"data": "evol-instruct-sample", "samples": 4, "seq_len": 64}
    recipe["evaluation"] = {"texts": ["text.txt"], "seq_len": 64}
    recipe["variants"] = [one for one in recipe["variants"] if one["kind"] == "ggjt"] + [
        {"kind": "gguf", "type": "q4_0"}
    ]
    del recipe["publish"]
    path = write_recipe(tmp_path, yaml.safe_dump(recipe))
    planned = quantkit.release(path, tmp_path / "out", dry_run=True)
    assert not [part.refused for part in planned.forecasts if part.refused]
    report = quantkit.release(path, tmp_path / "out")
    assert set(statuses(report).values()) == {"done"}, report.outcomes

    folder, name = tmp_path / "out", recipe["name"]
    gguf = open_source(folder / f"{name}-GGUF" / f"{name}-Q4_0.gguf")
    full = open_source(folder / name)
    head, inner = "lm_head.weight", "model.layers.1.mlp.down_proj.weight"
    assert gguf.tensors[head].stored_as == "Q6_K"
    for kind in ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0"):
        file = folder / f"{name}-GGML" / f"{name}.ggmlv3.{kind}.bin"
        ggjt = open_source(file)
        stored_as = (ggjt.tensors[key].stored_as for key in ("model.embed_tokens.weight", inner, head))
        assert tuple(stored_as) == (kind.upper(), kind.upper(), "Q8_0")
        rounded = gguf_quants.dequantize(gguf_quants.quantize(full.read(head).float().numpy(), Kind.Q8_0), Kind.Q8_0)
        assert torch.equal(ggjt.read(head).float(), torch.from_numpy(rounded))  # once, from full precision
        (forecast,) = (part for part in planned.forecasts if part.name == f"ggjt {kind.upper()}")
        assert forecast.bytes == sum(info.bytes for info in ggjt.tensors.values())
        if kind == "q4_0":
            assert torch.equal(ggjt.read(inner), gguf.read(inner))


REPOS = {
    "Tiny-Wizard-HF": "Tiny-Wizard",
    "Tiny-Wizard-GPTQ": "Tiny-Wizard-GPTQ-4bit-32g",
    "Tiny-Wizard-GGML": "Tiny-Wizard-GGML",
    "Tiny-Wizard-GGUF": "Tiny-Wizard-GGUF",
}


@pytest.fixture
def small(make_model: MakeModel, tmp_path: Path) -> Path:
    """A recipe of a model with grouped keys and a byte-level vocabulary, which ggjt has no place for."""
    shutil.copytree(make_model("llama"), tmp_path / "model")
    return write_recipe(tmp_path, SMALL)


def test_what_is_done_is_not_done_again(small: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = statuses(quantkit.release(small, out))
    assert first.pop("ggjt Q4_0") == "refused"
    assert set(first.values()) == {"done"}, first
    before, times = contents(out), {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    again = statuses(quantkit.release(small, out))
    assert again.pop("ggjt Q4_0") == "refused"
    assert set(again.values()) == {"unchanged"}
    assert contents(out) == before
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")} == times

    # Another variant's bits: that one, and what tells of it.
    small.write_text(SMALL.replace("bits: 4", "bits: 8"))
    changed = statuses(quantkit.release(small, out))
    assert (changed["reference"], changed["codes Q8_0 pre gpt-2"], changed["folder Tiny-GGUF"]) == ("unchanged",) * 3
    assert (changed["gptq 8bit-32g"], changed["compare"], changed["card Tiny-GGUF"]) == ("done",) * 3
    assert (out / "Tiny-GGUF" / "Tiny-Q8_0.gguf").read_bytes() == before["Tiny-GGUF/Tiny-Q8_0.gguf"]

    # A file that was spoilt is made again, and nothing else is.
    weights = out / "Tiny-GPTQ-8bit-32g" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    mended = statuses(quantkit.release(small, out))
    assert weights.read_bytes() == whole
    assert (mended["gptq 8bit-32g"], mended["reference"], mended["compare"]) == ("done", "unchanged", "unchanged")


def test_variants_share_the_weights_of_tokens(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are made once, and each variant is what it is alone."""
    variants = [f"  - {{kind: gptq, bits: {bits}, group_size: 32, token_weights: true}}\n" for bits in (4, 8)]
    recipe, made = SMALL[: SMALL.index("  - {kind")], []
    small.write_text(recipe + variants[1])
    quantkit.release(small, tmp_path / "alone")
    weigh = token_weights.weigh_tokens
    monkeypatch.setattr(token_weights, "weigh_tokens", lambda *given: made.append(given) or weigh(*given))
    small.write_text(recipe + "".join(variants))
    assert set(statuses(quantkit.release(small, tmp_path / "both")).values()) == {"done"}
    assert len(made) == 1
    alone, both = contents(tmp_path / "alone"), contents(tmp_path / "both")
    file = "Tiny-GPTQ-8bit-32g/model.safetensors"
    assert both[file] == alone[file]


def test_variants_of_other_containers_alone_are_of_one_run(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is what it is alone, to the byte."""
    from quantkit.verbs.release import variants as making

    kinds = ("gptq", "compressed-tensors", "mlx")
    rows = [f"  - {{kind: {kind}, bits: 4, group_size: 32, effort: fast}}\n" for kind in kinds]
    recipe, runs, quantize = SMALL[: SMALL.index("  - {kind")], [], making.gptq
    monkeypatch.setattr(making, "gptq", lambda *given, **told: runs.append(told["format"]) or quantize(*given, **told))
    small.write_text(recipe + rows[2])
    quantkit.release(small, tmp_path / "alone")
    small.write_text(recipe + "".join(rows) + rows[0].replace("bits: 4", "bits: 8"))
    made = statuses(quantkit.release(small, tmp_path / "all"))
    assert runs == ["mlx", kinds, "gptq"]
    assert (made["codes of gptq 4bit-32g"], made["mlx 4bit-32g"], made["gptq 8bit-32g"]) == ("done",) * 3
    alone, every = contents(tmp_path / "alone"), contents(tmp_path / "all")
    folder = "Tiny-MLX-4bit-32g/"
    of_variant = {name for name in alone if name.startswith(folder) and not name.endswith((".md", ".png"))}
    assert {name: every[name] for name in of_variant} == {name: alone[name] for name in of_variant}
    assert set(statuses(quantkit.release(small, tmp_path / "all")).values()) == {"unchanged"}
    (tmp_path / "all" / folder / "model.safetensors").unlink()
    mended = statuses(quantkit.release(small, tmp_path / "all"))
    assert (mended["mlx 4bit-32g"], mended["codes of gptq 4bit-32g"]) == ("done", "unchanged")


def test_a_dry_run_counts_a_shared_run_once(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first variant takes the run's time, the others what their writing takes; alone each has both."""
    monkeypatch.setattr("quantkit.verbs.release.forecast._multiplications_per_second", lambda _: 1e9)
    kinds = ("gptq", "compressed-tensors", "mlx")
    rows = [f"  - {{kind: {kind}, bits: 4, group_size: 32}}\n" for kind in kinds]
    recipe = SMALL[: SMALL.index("  - {kind")]

    def seconds(variants: list[str]) -> dict[str, tuple[float, int]]:
        small.write_text(recipe + "".join(variants))
        parts = quantkit.release(small, tmp_path / "out", dry_run=True).forecasts
        return {part.name: (part.seconds, part.bytes) for part in parts if "4bit-32g" in part.name}

    alone = [seconds([row]) for row in rows]
    every = seconds(rows)
    assert list(every) == [name for one in alone for name in one]
    assert every["gptq 4bit-32g"] == alone[0]["gptq 4bit-32g"]
    for kind, one in zip(kinds[1:], alone[1:], strict=True):
        name, (run, size) = f"{kind} 4bit-32g", one[f"{kind} 4bit-32g"]
        assert every[name] == (pytest.approx(forecast._WRITING * size / 1e9), size)
        assert run > 2 * every[name][0]


def test_variants_share_what_candidates_lose(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    variants = [
        "  - {kind: gptq, budget: 5bpw}\n",
        "  - {kind: gptq, budget: 6.5bpw}\n",
        "  - {kind: gguf, type: q4_0, budget: 100KB, pre: gpt-2}\n",
        "  - {kind: gguf, type: q4_0, budget: 6bpw, pre: gpt-2}\n",
    ]
    recipe, tried = SMALL[: SMALL.index("  - {kind")], []
    pass_over = trials.trial_losses
    monkeypatch.setattr(trials, "trial_losses", lambda *given: tried.append(given) or pass_over(*given))
    small.write_text(recipe + "".join(variants))
    planned = quantkit.release(small, tmp_path / "out", dry_run=True)
    assert not [part for part in planned.forecasts if part.refused]
    assert set(statuses(quantkit.release(small, tmp_path / "out")).values()) == {"done"}
    assert len(tried) == 2  # of the folders, and of the files
    made = {path.name for path in (tmp_path / "out").rglob("*") if not path.is_relative_to(tmp_path / "out/.release")}
    assert made >= {"Tiny-GPTQ-5bpw", "Tiny-GPTQ-6.5bpw", "Tiny-100KB.gguf", "Tiny-6bpw.gguf"}
    assert "--budget 6bpw" in (tmp_path / "out/Tiny-GGUF/README.md").read_text()
    sizes = [(tmp_path / f"out/Tiny-GPTQ-{one}/model.safetensors").stat().st_size for one in ("5bpw", "6.5bpw")]
    assert sizes[0] < sizes[1]


@pytest.mark.parametrize(
    ("variant", "message"),
    [
        ("{kind: gptq, budget: 5bpw, bits: 4}", "budget chooses bits and groups: leave bits out"),
        ("{kind: gptq, budget: '5bpw,6bpw'}", "a variant has one; give each a variant of its own"),
        ("{kind: gguf, type: q4_0, budget: 5bpw, method: round}", "budget weighs GPTQ's errors"),
        ("{kind: ggjt, type: q4_0, budget: 5bpw}", "budget"),
    ],
)
def test_budgets_that_no_variant_can_have(small: Path, tmp_path: Path, variant: str, message: str) -> None:
    small.write_text(SMALL[: SMALL.index("  - {kind")] + f"  - {variant}\n")
    with pytest.raises(UsageError, match=message):
        quantkit.release(small, tmp_path / "out")


def test_another_source_text_or_calibration_makes_all_anew(small: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    quantkit.release(small, out)
    small.write_text(SMALL.replace("samples: 4", "samples: 5"))
    calibrated = statuses(quantkit.release(small, out))
    assert calibrated["reference"] == "unchanged"
    assert (calibrated["gptq 4bit-32g"], calibrated["codes Q8_0 pre gpt-2"]) == ("done", "done")
    (tmp_path / "text.txt").write_text(TEXT.replace("river", "mountain"))
    judged = statuses(quantkit.release(small, out))
    assert (judged["reference"], judged["compare"]) == ("unchanged", "done")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "rope_theta": 20000.0}))
    assert statuses(quantkit.release(small, out))["reference"] == "done"


def test_a_variant_that_fails_does_not_take_the_others_along(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from quantkit.verbs.release import variants

    real: Callable[..., Any] = variants.gptq

    def broken(*arguments: Any, **options: Any) -> Any:
        if options.get("bits") == 4:
            raise ValueError("out of luck")
        return real(*arguments, **options)

    monkeypatch.setattr(variants, "gptq", broken)
    out = tmp_path / "out"
    report = quantkit.release(small, out)
    found = statuses(report)
    assert (found["gptq 4bit-32g"], found["card Tiny-GPTQ-4bit-32g"]) == ("failed", "skipped")
    assert (found["codes Q8_0 pre gpt-2"], found["compare"], found["verify Tiny-GGUF"]) == ("done",) * 3
    assert report.outcomes[-1].why != ""
    assert {outcome.step for outcome in report.failures} == {
        "gptq 4bit-32g",
        "card Tiny-GPTQ-4bit-32g",
        "verify Tiny-GPTQ-4bit-32g",
    }
    assert not (out / "Tiny-GPTQ-4bit-32g").exists()
    with pytest.raises(SystemExit) as ended:
        cli.main(["release", str(small), "--out", str(out), "-q"])
    assert ended.value.code == 1
    said = capsys.readouterr().out
    assert "ValueError: out of luck" in said
    assert "steps failed; the same command does what is missing" in said
    monkeypatch.setattr(variants, "gptq", real)
    mended = statuses(quantkit.release(small, out))
    assert (mended["gptq 4bit-32g"], mended["codes Q8_0 pre gpt-2"], mended["compare"]) == ("done", "unchanged", "done")


def test_what_cannot_be_made_is_said_before_the_work(small: Path, tmp_path: Path, recorder: Recorder) -> None:
    small.write_text(SMALL.replace("optional: true", "optional: false").replace("bits: 4", "bits: 5"))
    report = quantkit.release(small, tmp_path / "out", progress=recorder)
    found = {outcome.step: outcome for outcome in report.outcomes}
    assert (found["gptq 5bit-32g"].status, found["ggjt Q4_0"].status) == ("failed", "failed")
    assert "a GPTQ checkpoint holds 2, 3, 4 or 8 bits" in (found["gptq 5bit-32g"].why or "")
    assert "2 keys and values, which a ggjt file cannot say" in (found["ggjt Q4_0"].why or "")
    assert found["verify Tiny-GGUF"].status == "done"
    assert any("ggjt Q4_0 cannot be made" in text for text in recorder.warnings)
    assert len(report.failures) == 2


def test_a_dry_run_tells_what_will_be_and_writes_nothing(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(tmp_path)
    with pytest.raises(SystemExit) as ended:
        cli.main(["release", str(small), "--out", str(tmp_path / "out"), "--dry-run", "--json"])
    assert ended.value.code == 0
    plan = json.loads(capsys.readouterr().out)
    assert contents(tmp_path) == before
    parts = {part["name"]: part for part in plan["forecasts"]}
    assert list(parts) == ["reference", "gptq 4bit-32g", "gguf Q8_0", "ggjt Q4_0", "compare"]
    assert "cannot say" in parts["ggjt Q4_0"]["refused"]
    quantkit.release(small, tmp_path / "out")
    for part, folder in (("reference", "Tiny"), ("gptq 4bit-32g", "Tiny-GPTQ-4bit-32g")):
        assert parts[part]["bytes"] == sum(
            t.numel() * t.element_size() for t in stored(tmp_path / "out" / folder).values()
        )
        assert parts[part]["memory_bytes"] > 0
    assert all(part["seconds"] > 0 for part in parts.values() if part["refused"] is None)
    with pytest.raises(SystemExit):
        cli.main(["release", str(small), "--out", str(tmp_path / "out"), "--dry-run"])
    table = capsys.readouterr().out
    assert "ggjt Q4_0 cannot be made: " in table
    assert "in all " in table


def test_a_part_takes_what_its_verb_says(small: Path, tmp_path: Path) -> None:
    small.write_text(SMALL + "  - {kind: gguf, type: q4_0, method: round, pre: gpt-2, imatrix: true}\n")
    parts = {part.name: part for part in quantkit.release(small, tmp_path / "out", dry_run=True).forecasts}
    model, file = tmp_path / "model", tmp_path / "file"
    drawn: dict[str, Any] = {"samples": 4, "seq_len": 64, "dry_run": True}
    held = quantkit.convert(model, file, dry_run=True)
    codes = quantkit.gptq(model, file, ggml="q8_0", pre="gpt-2", **drawn)
    rounded = quantkit.ggml(model, type="q4_0", pre="gpt-2", out=file, dry_run=True)
    weighed = quantkit.imatrix(model, file, **drawn)
    assert held.memory_bytes > 0
    assert 0 < weighed.multiplications < codes.multiplications
    quick = quantkit.gptq(model, file, ggml="q8_0", pre="gpt-2", effort="fast", **drawn)
    assert codes.multiplications - codes.shared_multiplications == quick.multiplications
    assert (parts["reference"].bytes, parts["reference"].memory_bytes) == (held.bytes, held.memory_bytes)
    assert (parts["gguf Q8_0"].bytes, parts["gguf Q8_0"].memory_bytes) == (codes.bytes, codes.memory_bytes)
    most = max(rounded.memory_bytes, weighed.memory_bytes)
    assert (parts["gguf Q4_0"].bytes, parts["gguf Q4_0"].memory_bytes) == (rounded.bytes, most)


def test_answers_to_prompts_are_forecast_and_gone_on_with(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quantkit.verbs.release.forecast._multiplications_per_second", lambda _: 1e9)
    before = quantkit.release(small, tmp_path / "out", dry_run=True).forecasts[-1]
    (tmp_path / "asked.jsonl").write_text('{"prompt": "the fox"}\n{"prompt": "the dog"}\n')
    asking = "seq_len: 64, prompts: asked.jsonl, max_new_tokens: 4}\nvariants"
    small.write_text(SMALL.replace("seq_len: 64}\n\nvariants", asking))
    *_, compared, answered = quantkit.release(small, tmp_path / "out", dry_run=True).forecasts
    assert (compared.name, compared.seconds) == ("compare", before.seconds)
    assert answered.name == "answers to prompts"
    assert answered.seconds > 0
    whole, batches = Speaker.answer, []

    def stopping(self: Speaker, *given: Any) -> Any:
        batches.append(0)
        if len(batches) == 2:
            raise QuantkitError("the power is gone")
        return whole(self, *given)

    monkeypatch.setattr(Speaker, "answer", stopping)
    report = quantkit.release(small, tmp_path / "out")
    assert statuses(report)["compare"] == "failed"
    assert statuses(quantkit.release(small, tmp_path / "out"))["compare"] == "done"
    assert len(batches) == 4
    found = json.loads((tmp_path / "out" / "report" / "report.json").read_text())["answers"]
    assert [prompt["prompt"] for prompt in found["prompts"]] == ["the fox", "the dog"]
    assert len(found["agreement"]) == 2


def test_folders_that_are_not_a_releases(small: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("dear")
    with pytest.raises(UsageError, match="holds something that is no release"):
        quantkit.release(small, tmp_path / "other")
    with pytest.raises(UsageError, match="lie in each other"):
        quantkit.release(small, tmp_path / "model" / "out")
    with pytest.raises(UsageError, match="is a file"):
        quantkit.release(small, small)
    with locked(tmp_path / "out"), pytest.raises(UsageError, match="another release runs in"):
        quantkit.release(small, tmp_path / "out")


def test_what_a_killed_release_left_half_written_is_swept_away(tmp_path: Path) -> None:
    """A card replaces several files of a finished folder at once: its staging lies in that folder."""
    left = [tmp_path / "Tiny-GGUF" / ".README.md.unfinished" / "staged", tmp_path / ".other.ab12cd34.partial"]
    mine = [tmp_path / "Tiny-GGUF" / "notes.partial", tmp_path / ".notes.unfinished" / "mine.txt"]
    mine += [tmp_path / ".Tiny-GGUF.old", tmp_path / ".thesis.ab12cd34.partial" / "thesis.txt"]
    for folder in left:
        folder.mkdir(parents=True)
        (folder / "README.md").write_text("half")
    (left[0].parent / "lock").touch()
    for file in mine:
        file.parent.mkdir(exist_ok=True)
        file.write_text("mine")
    drop_stale(tmp_path, [])
    assert not any(path.exists() for path in (*left, left[0].parent))
    assert [file.read_text() for file in mine] == ["mine"] * 4


def test_what_somebody_put_where_a_variant_goes_is_kept(small: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / ".release").mkdir(parents=True)
    (out / "Tiny-GPTQ-4bit-32g").mkdir()
    (out / "Tiny-GPTQ-4bit-32g" / "notes.txt").write_text("mine")
    found = statuses(quantkit.release(small, out))
    assert (found["gptq 4bit-32g"], found["codes Q8_0 pre gpt-2"]) == ("failed", "done")
    assert (out / "Tiny-GPTQ-4bit-32g" / "notes.txt").read_text() == "mine"


KILLED = r"""
import os, random, signal, sys, time
from pathlib import Path

import quantkit
from quantkit.verbs.release import release

recipe, out, rounds, seed = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
chance = random.Random(seed)


def start(place):
    child = os.fork()
    if child == 0:
        os._exit(1 if release(recipe, place).failures else 0)
    return child


began = time.monotonic()
assert os.waitpid(start(out / "whole"), 0)[1] == 0
whole = time.monotonic() - began
kills = 0
while kills < rounds:
    place = out / f"killed-{kills}"
    while kills < rounds:
        child = start(place)
        time.sleep(chance.uniform(0, whole))
        if os.waitpid(child, os.WNOHANG)[0]:
            break
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        kills += 1
    else:
        assert os.waitpid(start(place), 0)[1] == 0
print(kills)
"""


OF_ONE_RUN = SMALL[: SMALL.index("  - {kind")] + "".join(
    f"  - {{kind: {kind}, bits: 4, group_size: 32, effort: fast}}\n" for kind in ("gptq", "compressed-tensors", "mlx")
)


@pytest.mark.parametrize(("recipe", "kills"), [(SMALL, 20), (OF_ONE_RUN, 6)], ids=["small", "of one run"])
def test_killed_at_any_moment_it_ends_with_the_same_bytes(recipe: str, kills: int, small: Path, tmp_path: Path) -> None:
    """So many kills: of each release as many as come before it is done; resumed in between and to the end."""
    small.write_text(recipe)
    (tmp_path / "runs").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(small), str(tmp_path / "runs"), str(kills), "7"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=540,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(kills)
    whole = contents(tmp_path / "runs" / "whole")
    assert "report/report.html" in whole
    released = [path for path in (tmp_path / "runs").iterdir() if path.name != "whole"]
    assert released
    for place in released:
        found = contents(place)
        assert found.keys() == whole.keys(), place
        assert [name for name in whole if found[name] != whole[name]] == [], place
    assert not list((tmp_path / "runs").rglob("*.partial"))


def test_a_source_that_stays_at_home_is_no_sibling(small: Path, tmp_path: Path) -> None:
    text = SMALL.replace("{model: model}", "{model: model, publish: false}") + "publish: {owner: someone}\n"
    small.write_text(text)
    found = statuses(quantkit.release(small, tmp_path / "out", publishing=False))
    assert not [step for step in found if step.startswith("publish")]
    card = (tmp_path / "out" / "Tiny-GGUF" / "README.md").read_text()
    assert "someone/Tiny-GPTQ" in card
    assert "Tiny-HF" not in card


def test_without_the_numbers_that_a_recipe_asks_for_nothing_is_published(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(family, "compare", broken)
    monkeypatch.setattr(family, "publish", lambda *_, **__: pytest.fail("published"))
    small.write_text(small.read_text() + "publish: {owner: someone}\n")
    found = statuses(quantkit.release(small, tmp_path / "out"))
    assert found["compare"] == "failed"
    published = {step: status for step, status in found.items() if step.startswith("publish")}
    assert published
    assert set(published.values()) == {"skipped"}
