"""Perplexity and divergence, against transformers' own models and direct arithmetic on whole logits."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MakeModel, Recorder, random_model
from tokenizers import processors
from transformers import AutoModelForCausalLM, AutoTokenizer

import quantkit
from quantkit.errors import CalibrationError, NumericError, UsageError
from quantkit.evaluate import scores as scoring
from quantkit.evaluate.scores import TokenScores
from quantkit.evaluate.statistics import summarize
from quantkit.options import EvaluationSpec, default_seq_len
from quantkit.progress import Advance, Silent
from quantkit.sources import open_source
from quantkit.tokens import TokenMatrix
from quantkit.tokens.text import evaluation_text
from quantkit.verbs.perplexity import PerplexityReport

SENTENCES = (
    "the quick brown fox jumps over the lazy dog",
    "what is the answer to the question, and where does it begin?",
    "tides follow the moon; the sea follows the tides.",
    "= A heading with numbers 1, 2, 3 and 4,567 =",
)
LINES = [f"{SENTENCES[i % 4]} {i * 37 % 101}" for i in range(40)]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "passage.txt"
    path.write_text("\n\n".join(LINES), encoding="utf-8")
    return path


def attentive_model() -> Any:
    """A tiny Llama whose attention decides much, so that a token scored with too little context shows."""
    model = random_model("llama", tied=False, dtype=torch.float32, seed=0)
    with torch.no_grad():
        for layer in model.model.layers:
            for projection in layer.self_attn.children():
                projection.weight.mul_(4.0)
    return model


@pytest.fixture(scope="module")
def base(make_model: MakeModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "tiny-llama"
    shutil.copytree(make_model("llama"), folder)
    attentive_model().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def perturbed(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base with noise on every weight."""
    folder = tmp_path_factory.mktemp("perturbed") / "perturbed"
    shutil.copytree(base, folder)
    model = attentive_model()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.03 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def with_bos(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base with a tokenizer that puts a BOS before every text, as Llama's do."""
    folder = tmp_path_factory.mktemp("bos") / "with-bos"
    shutil.copytree(base, folder)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", tokenizer.bos_token_id)]
    )
    tokenizer.save_pretrained(folder)
    return folder


def logprobs(folder: Path, windows: torch.Tensor) -> np.ndarray:
    """Log-probabilities [windows, seq_len - 1, vocab] of every next token, float64, by transformers alone."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        logits = model(input_ids=windows).logits.double()
    return torch.log_softmax(logits, dim=-1)[:, :-1].numpy()


def nlls(folder: Path, windows: torch.Tensor) -> np.ndarray:
    """Negative log-likelihood [windows, seq_len - 1] of every token but the first."""
    return -np.take_along_axis(logprobs(folder, windows), windows[:, 1:, None].numpy(), axis=2)[..., 0]


def cut(ids: list[int], seq_len: int) -> torch.Tensor:
    count = len(ids) // seq_len
    return torch.tensor(ids[: count * seq_len]).reshape(count, seq_len)


def run(models: list[Path], text: Path | str, **options: Any) -> PerplexityReport:
    return quantkit.perplexity(list(models), text=str(text), device="cpu", **options)


def ids_of(folder: Path, text: str) -> list[int]:
    ids: list[int] = AutoTokenizer.from_pretrained(folder)(text).input_ids
    return ids


# -- perplexity ------------------------------------------------------------------------------------------------------


@pytest.mark.numerics
@pytest.mark.parametrize("seq_len", [16, 33, 300])  # 300: more positions than are scored at a time
def test_perplexity_is_transformers(seq_len: int, base: Path, text: Path) -> None:
    windows = cut(ids_of(base, text.read_text()), seq_len)
    expected = nlls(base, windows)
    report = run([base], text, seq_len=seq_len)
    [row] = report.results
    assert len(windows) >= 2
    assert report.tokens == expected.size == len(windows) * (seq_len - 1)
    assert row.perplexity == pytest.approx(math.exp(expected.mean()), rel=1e-4)
    assert row.stderr == pytest.approx(
        math.exp(expected.mean()) * expected.std(ddof=1) / math.sqrt(expected.size), rel=1e-3
    )
    assert (row.kl_divergence, row.top1_agreement, row.delta_ln_ppl) == (None, None, None)
    # The loss that transformers itself computes, window by window.
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    with torch.inference_mode():
        losses = [float(model(input_ids=w[None], labels=w[None]).loss) for w in windows]
    assert row.perplexity == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-4)


@pytest.mark.parametrize(("seq_len", "stride"), [(32, 16), (32, 8), (32, 31), (24, 10)])
def test_stride_is_the_sliding_window_of_transformers_documentation(
    seq_len: int, stride: int, base: Path, text: Path
) -> None:
    """https://huggingface.co/docs/transformers/perplexity, on the tokens that whole steps cover."""
    ids = ids_of(base, text.read_text())
    length = seq_len + (len(ids) // stride * stride - seq_len) // stride * stride
    tokens = torch.tensor([ids[:length]])
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    total, count, previous_end = 0.0, 0, 0
    for begin in range(0, length, stride):
        end = min(begin + seq_len, length)
        window = tokens[:, begin:end]
        labels = window.clone()
        labels[:, : -(end - previous_end)] = -100
        with torch.inference_mode():
            loss = float(model(input_ids=window, labels=labels).loss)
        scored = int((labels[:, 1:] != -100).sum())
        total, count, previous_end = total + loss * scored, count + scored, end
        if end == length:
            break
    report = run([base], text, seq_len=seq_len, stride=stride)
    assert report.tokens == count == length - 1  # every token but the first, once
    assert report.results[0].perplexity == pytest.approx(math.exp(total / count), rel=1e-4)


def test_overlap_gives_more_context_hence_another_number(base: Path, text: Path) -> None:
    """Else the test above could not tell a right stride from a wrong one."""
    overlapping, cut_off = run([base], text, seq_len=32, stride=4), run([base], text, seq_len=32)
    assert overlapping.results[0].perplexity != pytest.approx(cut_off.results[0].perplexity, rel=5e-3)


@pytest.mark.parametrize("stride", [1, 8])
def test_stride_with_a_tokenizer_that_adds_a_bos(stride: int, with_bos: Path, text: Path) -> None:
    """Every window opens with the BOS; behind it lie consecutive tokens, each scored once."""
    tokenizer = AutoTokenizer.from_pretrained(with_bos)
    ids = ids_of(with_bos, text.read_text())[1:]
    evaluation = evaluation_text(EvaluationSpec(text=str(text), seq_len=24, stride=stride), tokenizer)
    scored = []
    for number, (window, first) in enumerate(
        zip(evaluation.windows.tokens.tolist(), evaluation.windows.first_scored.tolist(), strict=True)
    ):
        assert window[0] == tokenizer.bos_token_id
        assert window[1:] == ids[number * stride : number * stride + 23]
        scored += window[first:]
    assert scored == ids[: len(scored)]
    assert len(ids) - len(scored) < 24 + stride


def test_plain_text_windows_open_with_a_bos_where_the_tokenizer_adds_one(with_bos: Path, text: Path) -> None:
    ids = ids_of(with_bos, text.read_text())
    windows = cut(ids[1:], 31)
    windows = torch.cat([torch.full((len(windows), 1), ids[0]), windows], dim=1)
    report = run([with_bos], text, seq_len=32)
    assert report.results[0].perplexity == pytest.approx(math.exp(nlls(with_bos, windows).mean()), rel=1e-4)


@pytest.mark.parametrize("model", ["base", "with_bos"])
@pytest.mark.parametrize("suffix", [".raw", ".parquet"])
def test_wikitext2_is_the_protocol_of_the_papers(
    model: str, suffix: str, text: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Joined with blank lines, tokenized as one string (a BOS once, if any), cut, no overlap; GPTQ's own script."""
    folder: Path = request.getfixturevalue(model)
    file = tmp_path / f"test{suffix}"
    if suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.table({"text": LINES}), file)
    else:
        shutil.copyfile(text, file)
    ids = ids_of(folder, "\n\n".join(LINES))
    windows = cut(ids, 64)
    assert (ids[0] == 1) is (model == "with_bos")
    assert 1 not in ids[1:]
    expected = nlls(folder, windows)
    report = run([folder], f"wikitext2:{file}", seq_len=64)
    assert report.tokens == expected.size
    # The papers weigh every window alike; with windows of one length that is the mean over tokens.
    assert report.results[0].perplexity == pytest.approx(math.exp(expected.mean(axis=1).mean()), rel=1e-4)


def test_wikitext2_windows_are_2048_tokens_unless_said() -> None:
    assert default_seq_len("wikitext2") == default_seq_len("wikitext2:some/file.raw") == 2048
    assert default_seq_len("wikitext2.txt") == default_seq_len("evol-instruct-sample:heldout") == 512


@pytest.mark.parametrize("content", [b"\xff\xfe not text", None])
def test_wikitext2_that_cannot_be_read_names_the_file(content: bytes | None, base: Path, tmp_path: Path) -> None:
    file = tmp_path / "wiki.raw"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UsageError if content is None else CalibrationError, match=r"wiki\.raw"):
        run([base], f"wikitext2:{file}", seq_len=32)


@pytest.mark.parametrize("stride", [None, 8])
def test_text_that_is_too_short_is_refused(stride: int | None, base: Path, tmp_path: Path) -> None:
    file = tmp_path / "short.txt"
    file.write_text("the quick brown fox", encoding="utf-8")
    with pytest.raises(CalibrationError, match=r"short\.txt is too short"):
        run([base], file, seq_len=64, stride=stride)


# -- against a reference ---------------------------------------------------------------------------------------------


def test_layers_are_compared_by_compare_alone(base: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "_relative_errors", None)
    quantkit.perplexity(base, against=base, text=str(text), seq_len=8, eval_tokens=8, device="cpu")


def test_a_model_against_itself(base: Path, text: Path) -> None:
    first, second = run([base], text, against=base, seq_len=32).results
    assert first.kl_divergence is None
    assert second.kl_divergence is not None
    assert set(vars(second.kl_divergence)) == {"mean", "median", "p90", "p99", "p999", "max"}
    assert set(vars(second.kl_divergence).values()) == {0.0}
    assert (second.top1_agreement, second.delta_ln_ppl, second.delta_ln_ppl_stderr) == (1.0, 0.0, 0.0)
    assert (second.perplexity, second.stderr) == (first.perplexity, first.stderr)


@pytest.mark.numerics
@pytest.mark.parametrize("seq_len", [32, 300])
def test_divergence_is_that_of_whole_logits(seq_len: int, base: Path, perturbed: Path, text: Path) -> None:
    windows = cut(ids_of(base, text.read_text()), seq_len)
    p, q = logprobs(base, windows), logprobs(perturbed, windows)
    kl = (np.exp(p) * (p - q)).sum(axis=-1).ravel()
    reference, row = run([perturbed], text, against=base, seq_len=seq_len).results
    assert (reference.model, row.model) == ("tiny-llama", "perturbed")
    assert row.kl_divergence is not None
    assert kl.mean() > 0.01
    assert row.kl_divergence.mean == pytest.approx(kl.mean(), rel=1e-3)
    assert row.kl_divergence.median == pytest.approx(np.median(kl), rel=1e-3)
    assert row.kl_divergence.p90 == pytest.approx(np.quantile(kl, 0.9), rel=1e-3)
    assert row.kl_divergence.p99 == pytest.approx(np.quantile(kl, 0.99), rel=1e-3)
    assert row.kl_divergence.p999 == pytest.approx(np.quantile(kl, 0.999), rel=1e-3)
    assert row.kl_divergence.max == pytest.approx(kl.max(), rel=1e-3)
    agreement = np.mean(p.argmax(axis=-1) == q.argmax(axis=-1))
    assert 0.1 < agreement < 0.999
    assert row.top1_agreement == pytest.approx(agreement, abs=1.5 / kl.size)  # a tie may fall to either side
    difference = (nlls(perturbed, windows) - nlls(base, windows)).ravel()
    assert row.delta_ln_ppl == pytest.approx(difference.mean(), rel=1e-3, abs=1e-5)
    assert row.delta_ln_ppl_stderr == pytest.approx(difference.std(ddof=1) / math.sqrt(difference.size), rel=1e-3)
    assert math.log(row.perplexity / reference.perplexity) == pytest.approx(row.delta_ln_ppl, abs=1e-5)
    assert row.delta_ln_ppl_stderr < row.stderr / row.perplexity


@pytest.mark.numerics
def test_each_models_row_is_what_it_is_alone(base: Path, perturbed: Path, make_model: MakeModel, text: Path) -> None:
    """Models of other depth and family beside it change nothing; only what is compared has a divergence."""
    other = make_model("qwen3", dtype="float32", num_hidden_layers=3)
    together = run([base, other, perturbed], text, seq_len=32)
    assert [row.model for row in together.results] == ["tiny-llama", "tiny-qwen3", "perturbed"]
    for folder, row in zip((base, other, perturbed), together.results, strict=True):
        assert row == run([folder], text, seq_len=32).results[0]
    _, *rows = run([other, perturbed], text, against=base, seq_len=32).results
    for row, alone in zip(rows, together.results[1:], strict=True):
        assert row.perplexity == alone.perplexity
        assert row.kl_divergence is not None
        assert row.kl_divergence.mean > 0


def test_what_is_evaluated_is_what_was_written(
    base: Path, tiny_tokens: TokenMatrix, text: Path, tmp_path: Path
) -> None:
    report = quantkit.gptq(
        base, tmp_path / "out", bits=3, group_size=32, calibration=tiny_tokens, text=str(text), device="cpu"
    )
    source = quantkit.perplexity([tmp_path / "out"], against=base, text=str(text), device="cpu")
    assert report.evaluation is not None
    assert report.evaluation.as_dict() == source.as_dict()
    # And transformers, given the dequantized weights, says the same.
    written = open_source(tmp_path / "out")
    model = random_model("llama", tied=False, dtype=torch.float32, seed=1)
    model.load_state_dict({name: written.read(name).float() for name in written.tensors})
    model.save_pretrained(tmp_path / "dequantized")
    windows = cut(ids_of(base, text.read_text()), 256)  # what its config has positions for
    expected = nlls(tmp_path / "dequantized", windows).mean()
    assert report.evaluation.results[1].perplexity == pytest.approx(math.exp(expected), rel=1e-4)


def test_models_that_tokenize_differently_are_not_compared(base: Path, text: Path, tmp_path: Path) -> None:
    folder = tmp_path / "other"
    shutil.copytree(base, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.train_new_from_iterator(["zzzz qqqq xxxx wwww vvvv"], vocab_size=300).save_pretrained(folder)
    assert ids_of(folder, "the fox") != ids_of(base, "the fox")
    with pytest.raises(UsageError, match="other and tiny-llama tokenize the text differently"):
        run([base, folder], text, seq_len=32)


def test_logits_that_are_not_finite_name_the_model(base: Path, text: Path, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(base, folder)
    model = random_model("llama", tied=False, dtype=torch.float32, seed=0)
    with torch.no_grad():
        model.lm_head.weight.fill_(3e38)
    model.save_pretrained(folder)
    with pytest.raises(NumericError, match="broken: its logits are not finite"):
        run([folder], text, seq_len=32)


def test_a_loss_that_has_no_perplexity_names_the_model(base: Path, text: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(base, tmp_path / "wild")
    model = random_model("llama", tied=False, dtype=torch.float32, seed=0)
    with torch.no_grad():
        model.lm_head.weight.mul_(1e6)
    model.save_pretrained(folder)
    with pytest.raises(NumericError, match=r"wild: a mean loss of .* nats a token has no perplexity"):
        run([folder], text, seq_len=32)


# -- the statistics --------------------------------------------------------------------------------------------------


def scores(nll: list[float], kl: list[float] | None = None, agrees: list[float] | None = None) -> TokenScores:
    as_tensor: Callable[[list[float] | None], Any] = lambda v: None if v is None else torch.tensor(v)  # noqa: E731
    return TokenScores(torch.tensor(nll), as_tensor(kl), as_tensor(agrees))


@pytest.mark.numerics
def test_statistics_by_hand() -> None:
    reference = scores([1.0, 2.0, 3.0, 2.0])
    variant = scores([1.5, 2.0, 4.0, 2.5], [0.1, 0.0, 0.4, 0.2], [1.0, 1.0, 0.0, 1.0])
    first, second = summarize(["reference", "variant"], [reference, variant])
    assert first.perplexity == pytest.approx(math.exp(2.0))
    # Squared deviations 1, 0, 1, 0 over n - 1 = 3; four tokens.
    assert first.stderr == pytest.approx(math.exp(2.0) * math.sqrt(2 / 3 / 4))
    assert second.perplexity == pytest.approx(math.exp(2.5))
    assert second.delta_ln_ppl == pytest.approx(0.5)
    # Differences 0.5, 0, 1, 0.5: squared deviations 0, 0.25, 0.25, 0.
    assert second.delta_ln_ppl_stderr == pytest.approx(math.sqrt(0.5 / 3 / 4))
    assert second.top1_agreement == pytest.approx(0.75)
    assert second.kl_divergence is not None
    assert second.kl_divergence.mean == pytest.approx(0.175)
    assert second.kl_divergence.median == pytest.approx(0.15)  # between the two in the middle
    assert second.kl_divergence.max == pytest.approx(0.4)
    # Divergences 0.1, 0, 0.4, 0.2 about 0.175; agreements 1, 1, 0, 1 about 0.75.
    assert second.kl_divergence_stderr == pytest.approx(math.sqrt(0.0875 / 3 / 4))
    assert second.top1_agreement_stderr == pytest.approx(math.sqrt(0.75 / 3 / 4))


def test_a_single_token_has_no_spread() -> None:
    [row] = summarize(["one"], [scores([2.0])])
    assert (row.perplexity, row.stderr) == (pytest.approx(math.exp(2.0)), 0.0)


def test_evaluating_reports_its_phases(base: Path, text: Path, recorder: Recorder) -> None:
    run([base], text, seq_len=32, progress=recorder)
    assert "evaluating" in recorder.phases


@pytest.mark.parametrize("stride", [None, 16])
def test_the_first_tokens_of_a_text_are_judged_where_a_number_is_given(
    base: Path, text: Path, stride: int | None
) -> None:
    """In whole windows, of plain text and of records; what was read of it is what the provenance names."""
    tokenizer = open_source(base).tokenizer()
    for name in (str(text), "evol-instruct-sample:heldout"):
        asked = {"text": name, "seq_len": 64, "stride": stride}
        whole = evaluation_text(EvaluationSpec(**asked), tokenizer)
        part = evaluation_text(EvaluationSpec(**asked, eval_tokens=200), tokenizer)
        count = len(part.windows.tokens)
        assert torch.equal(part.windows.tokens, whole.windows.tokens[:count])
        scored = (part.windows.tokens.shape[1] - part.windows.first_scored).sum().item()
        assert 200 - 64 <= scored <= 200 + 64
        assert count < len(whole.windows.tokens)
        assert part.provenance.tokens_sha256 != whole.provenance.tokens_sha256
        assert set(part.provenance.records) <= set(whole.provenance.records)
    report = quantkit.perplexity([base], text=str(text), seq_len=64, stride=stride, eval_tokens="200")
    assert abs(report.tokens - 200) <= 64
    with pytest.raises(UsageError, match="eval_tokens=0: give a number of tokens such as 8192, or all"):
        quantkit.perplexity([base], text=str(text), eval_tokens=0)


def test_time_left_of_an_evaluation_counts_tokens_times_layers(base: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []

    class Counted(Silent):
        @contextmanager
        def phase(self, name: str, total: int) -> Iterator[Advance]:
            steps: list[int] = []
            yield steps.append
            seen.extend([(total, sum(steps))] if name == "evaluating" else [])

    long = tmp_path / "long.txt"
    long.write_text("the quick brown fox jumps over the lazy dog while the user asks\n\n" * 300)
    run([base], long, seq_len=256, progress=Counted())
    run([base], long, seq_len=256, against=base, progress=Counted())
    (alone, done), (both, both_done) = seen
    assert (alone, both) == (done, both_done)
    assert both == 2 * alone
    assert alone % 3 == 0  # two blocks and a head over as many batches
