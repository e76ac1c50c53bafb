"""Every verb once, on what those before it made of one tiny model: does it work at all, and do they fit together."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeModel, token_matrix
from support.hub_server import HubServer
from support.tasks import TASK
from support.wizard import changed, stored, tune

import quantkit
from quantkit.containers.imatrix import read_imatrix
from quantkit.sources import open_source
from quantkit.verbs.compare import CompareReport
from quantkit.verbs.gptq import GptqReport
from quantkit.verbs.imatrix import ImatrixReport
from quantkit.verbs.perplexity import PerplexityReport

pytestmark = pytest.mark.fast

LINE = "the quick brown fox jumps over the lazy dog while the user asks the assistant a question about the sea\n"
DOWN = "model.layers.1.mlp.down_proj"
RECIPE = """
name: Tiny
source: {model: tuned}
calibration: {samples: 4, seq_len: 32, data: data.jsonl}
evaluation: {texts: [text.txt], seq_len: 32}
variants: [{kind: gptq, bits: 4, group_size: 32}]
"""


class Family:
    """A tuned model, and what verbs make of it when a test first asks."""

    def __init__(self, base: Path, folder: Path) -> None:
        self.base, self.folder = base, folder
        self.tuned = changed(base, folder / "tuned", tune)
        self.text = folder / "text.txt"
        self.text.write_text(" ".join(reversed(LINE.split())) * 40)
        self.data = lines(folder / "data.jsonl", [{"instruction": LINE[i:], "output": LINE} for i in range(12)])

    @cached_property
    def delta(self) -> Path:
        quantkit.diff(self.base, self.tuned, self.folder / "delta")
        return self.folder / "delta"

    @cached_property
    def quantized(self) -> GptqReport:
        out = self.folder / "tiny-GPTQ"
        return quantkit.gptq(
            self.tuned, out, group_size=32, calibration=token_matrix(8, 32), text=str(self.text), device="cpu"
        )

    @cached_property
    def gguf(self) -> Path:
        return quantkit.ggml(self.quantized.out, self.folder / "tiny.gguf", pre="smollm").out

    @cached_property
    def importance(self) -> ImatrixReport:
        out = self.folder / "imatrix.gguf"
        return quantkit.imatrix(self.tuned, out, calibration=token_matrix(8, 32), device="cpu")

    @cached_property
    def report(self) -> CompareReport:
        return quantkit.compare(
            self.tuned,
            [self.quantized.out, self.gguf],
            out=self.folder / "report",
            texts=[str(self.text)],
            seq_len=32,
            plots=False,
            device="cpu",
        )


def lines(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def family(make_model: MakeModel, tmp_path_factory: pytest.TempPathFactory) -> Family:
    return Family(make_model("llama"), tmp_path_factory.mktemp("verbs"))


def test_diff_and_merge_give_the_tuned_model_back(family: Family, tmp_path: Path) -> None:
    quantkit.merge(family.base, family.delta, tmp_path / "merged")
    merged, tuned = stored(tmp_path / "merged"), stored(family.tuned)
    assert merged.keys() == tuned.keys()
    assert all(torch.equal(merged[name], tuned[name]) for name in tuned)


def test_samples_draws_what_it_was_asked_for(family: Family) -> None:
    drawn = quantkit.samples(family.tuned, calibration=str(family.data), samples=4, seq_len=32, evaluate=False)
    assert drawn.matrix.tokens.shape == (4, 32)
    assert all("fox" in window or "sea" in window for window in drawn.windows)


def test_gptq_rounds_better_than_the_nearest(family: Family) -> None:
    layers = family.quantized.layers
    assert len(layers) == 14
    assert all(layer.loss < layer.rtn_loss and not layer.fallback for layer in layers)


def test_ggml_keeps_the_codes(family: Family) -> None:
    name = f"{DOWN}.weight"
    assert torch.equal(open_source(family.gguf).read(name), open_source(family.quantized.out).read(name))


def test_repack_keeps_the_codes(family: Family, tmp_path: Path) -> None:
    quantkit.repack(family.quantized.out, to="compressed-tensors", out=tmp_path / "packed")
    name = f"{DOWN}.weight"
    assert torch.equal(open_source(tmp_path / "packed").read(name), open_source(family.quantized.out).read(name))


def test_convert_keeps_the_values(family: Family, tmp_path: Path) -> None:
    quantkit.convert(family.quantized.out, tmp_path / "plain", dtype="float32")
    values = open_source(family.quantized.out).read(f"{DOWN}.weight")
    assert torch.equal(stored(tmp_path / "plain")[f"{DOWN}.weight"], values.float())


def test_imatrix_has_sums_for_every_linear(family: Family) -> None:
    assert (family.importance.entries, family.importance.chunks) == (14, 8)
    assert read_imatrix(family.importance.out)


def test_perplexity_is_what_gptq_found(family: Family) -> None:
    found = quantkit.perplexity([family.quantized.out], against=family.tuned, text=str(family.text), device="cpu")
    assert isinstance(found, PerplexityReport)
    assert family.quantized.evaluation is not None
    assert found.results[1].perplexity == pytest.approx(family.quantized.evaluation.results[1].perplexity, rel=1e-6)


def test_compare_measures_every_variant(family: Family) -> None:
    _, folder, file = family.report.models
    result = folder.texts["text.txt"]
    assert result.kl_divergence is not None
    assert 0 < result.kl_divergence.mean < 1
    assert file.texts["text.txt"].perplexity == pytest.approx(result.perplexity, rel=1e-3)


def test_eval_answers_a_task(family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval", reason="pip install 'quantkit[eval]'")
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    questions = [{"question": LINE[i:], "choices": ["fox", "dog"], "label": i % 2} for i in range(6)]
    lines(tmp_path / "questions.jsonl", questions)
    (tmp_path / "tiny.yaml").write_text(TASK)
    report = quantkit.eval(
        family.quantized.out, out=tmp_path / "r.json", task=["tiny"], tasks_dir=tmp_path, device="cpu"
    )
    assert [(task.task, task.metric, task.questions) for task in report.tasks] == [("tiny", "acc", 6)]


def test_generate_answers_every_prompt(family: Family, tmp_path: Path) -> None:
    prompts = lines(tmp_path / "prompts.jsonl", [{"id": f"p{i}", "instruction": LINE[i:]} for i in range(3)])
    quantkit.generate(family.tuned, prompts=prompts, out=tmp_path / "a.jsonl", max_new_tokens=6, device="cpu")
    answers = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [answer["id"] for answer in answers] == ["p0", "p1", "p2"]
    assert all(0 < answer["output_tokens"] <= 6 for answer in answers)


class Visitor:
    """Somebody who asks one thing."""

    def __init__(self) -> None:
        self._left = ["what is the answer?"]

    def hear(self) -> str | None:
        return self._left.pop() if self._left else None

    def say(self, piece: str) -> None: ...

    def end(self, finish: str) -> None: ...

    def note(self, text: str) -> None: ...


def test_chat_answers(family: Family) -> None:
    said = quantkit.chat(family.tuned, Visitor(), greedy=True, max_new_tokens=6, device="cpu")
    assert [turn.role for turn in said.turns] == ["user", "assistant"]


def test_inspect_tells_how_weights_are_stored(family: Family) -> None:
    assert quantkit.inspect(family.quantized.out).scheme.startswith("GPTQ 4-bit symmetric, group 32")
    assert quantkit.inspect(family.gguf).types["Q4_0"] == 14


@pytest.mark.parametrize("generate", [False, True])
def test_verify_finds_nothing_wrong(family: Family, generate: bool) -> None:
    report = quantkit.verify(family.quantized.out, generate=generate, device="cpu")
    assert report.problems == []
    assert (report.models[0].sentence is not None) is generate


def test_card_and_publish(
    family: Family, hub_client: None, server: HubServer, recwarn: pytest.WarningsRecorder
) -> None:
    out = family.quantized.out
    report = quantkit.card(out, reports=[family.report.out / "report.json"], licence="mit", repo="someone/tiny")
    assert report.evaluated == [out.name]
    planned = quantkit.publish(out, "someone/tiny", dry_run=True)
    assert {change.state for change in planned.changes} == {"new"}
    assert server.repository("model", "someone/tiny") is None
    sent = quantkit.publish(out, "someone/tiny", verify=False)
    repository = server.repository("model", "someone/tiny")
    assert repository is not None
    assert repository.commits[sent.commit or ""]["README.md"] == (out / "README.md").read_bytes()


def test_release_makes_a_family(family: Family) -> None:
    (family.folder / "recipe.yaml").write_text(RECIPE)
    report = quantkit.release(family.folder / "recipe.yaml", family.folder / "release", publishing=False)
    assert {outcome.status for outcome in report.outcomes} == {"done"}, report.outcomes
    assert (family.folder / "release" / "Tiny-GPTQ-4bit-32g" / "README.md").is_file()


def test_every_verb_is_here() -> None:
    """A verb that is new is asked for above too."""
    verbs = {name for name in quantkit.__all__ if name[0].islower()} - {"tune"}
    assert {verb for verb in verbs if f"quantkit.{verb}(" in Path(__file__).read_text(encoding="utf-8")} == verbs
