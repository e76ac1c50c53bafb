"""A family compared in one pass: against transformers and arithmetic on whole logits; the report; the chooser."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MakeModel, Recorder, random_model, token_matrix
from support.gguf_models import sentencepiece, write_model
from support.tolerance import longest_path, rounding
from transformers import AutoModelForCausalLM, AutoTokenizer

import quantkit
from quantkit.cli.app import main
from quantkit.errors import CalibrationError, UsageError
from quantkit.evaluate.statistics import Numbers
from quantkit.evaluate.worst import KEPT, Worst
from quantkit.verbs.compare import CompareReport
from quantkit.verbs.compare.chooser import Limits, choose, pareto
from quantkit.verbs.compare.rows import ComparedModel

WORDS = "the quick brown fox jumps over the lazy dog while the tides follow the moon and the sea follows the tides"
SEQ_LEN = 32
FILES = {"report.json", "report.md", "report.html", "quantkit.json"}
PLOTS = {f"{name}.{suffix}" for name in ("accuracy-size", "layers", "kl") for suffix in ("png", "svg")}


def passage(path: Path, seed: int, words: int = 400) -> Path:
    generator = np.random.default_rng(seed)
    path.write_text(" ".join(generator.choice(WORDS.split(), words)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("texts")
    return [passage(folder / "first.txt", 1), passage(folder / "second.txt", 2, 2000)]


@pytest.fixture(scope="module")
def family(make_model: MakeModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A float32 reference, its GPTQ checkpoint, a GGUF file and a noisy copy."""
    folder = tmp_path_factory.mktemp("family")
    shutil.copytree(make_model("llama", dtype="float32"), folder / "tiny")
    found = {"reference": folder / "tiny", "gptq": folder / "tiny-GPTQ", "gguf": folder / "tiny-Q8_0.gguf"}
    quantkit.gptq(found["reference"], found["gptq"], group_size=32, calibration=token_matrix(8, 32), evaluate=False)
    quantkit.ggml(found["reference"], found["gguf"], type="q8_0", pre="smollm")
    found["noisy"] = folder / "tiny-noisy"
    shutil.copytree(found["reference"], found["noisy"])
    model = random_model("llama", tied=False, dtype=torch.float32, seed=0)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.03 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(found["noisy"])
    return found


def run(family: dict[str, Path], names: list[str], out: Path, texts: list[Path], **options: Any) -> CompareReport:
    options = {"plots": False, "seq_len": SEQ_LEN, "device": "cpu", **options}
    variants = [family[name] for name in names]
    return quantkit.compare(family["reference"], variants, out=out, texts=[str(text) for text in texts], **options)


@pytest.fixture(scope="module")
def report(family: dict[str, Path], texts: list[Path], tmp_path_factory: pytest.TempPathFactory) -> CompareReport:
    out = tmp_path_factory.mktemp("out") / "report"
    return run(family, ["gptq", "gguf", "noisy"], out, texts)


def windows_of(folder: Path, text: Path) -> torch.Tensor:
    ids = AutoTokenizer.from_pretrained(folder)(text.read_text()).input_ids
    return torch.tensor(ids[: len(ids) // SEQ_LEN * SEQ_LEN]).reshape(-1, SEQ_LEN)


def by_transformers(folder: Path, windows: torch.Tensor) -> tuple[np.ndarray, list[torch.Tensor]]:
    """Log-probabilities [windows, seq_len - 1, vocab] of every next token, and what enters and leaves each block, by
    the whole model in float32; the last is taken before the final norm."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    states: list[torch.Tensor] = []
    for block in model.model.layers:
        block.register_forward_hook(lambda _, __, output: states.append(output))
    with torch.inference_mode():
        logits = model(input_ids=windows).logits.double()
    return torch.log_softmax(logits, dim=-1)[:, :-1].numpy(), [state.double() for state in states]


def model_of(report: CompareReport, label: str) -> ComparedModel:
    return next(model for model in report.models if model.model == label)


# -- numbers ---------------------------------------------------------------------------------------------------------


def same_numbers(one: Numbers, other: Numbers) -> bool:
    return all(getattr(one, field.name) == getattr(other, field.name) for field in fields(Numbers))


@pytest.mark.numerics
def test_numbers_are_those_of_whole_models(family: dict[str, Path], texts: list[Path], report: CompareReport) -> None:
    """The arithmetic is float32 on both sides, in another order: perplexities agree to its rounding, far within their
    standard error."""
    allowed = rounding(longest_path(SEQ_LEN))
    reference, noisy = model_of(report, "tiny"), model_of(report, "tiny-noisy")
    for text in texts:
        windows = windows_of(family["reference"], text)
        p, q = (by_transformers(family[name], windows)[0] for name in ("reference", "noisy"))
        nll = [-np.take_along_axis(v, windows[:, 1:, None].numpy(), axis=2).ravel() for v in (p, q)]
        kl = (np.exp(p) * (p - q)).sum(axis=-1).ravel()
        mine, other = reference.texts[text.name], noisy.texts[text.name]
        assert mine.perplexity == pytest.approx(math.exp(nll[0].mean()), rel=allowed)
        assert other.perplexity == pytest.approx(math.exp(nll[1].mean()), rel=allowed)
        assert abs(mine.perplexity - math.exp(nll[0].mean())) < mine.stderr / 1000
        found = other.kl_divergence
        assert found is not None
        expected = [kl.mean(), *np.quantile(kl, [0.5, 0.9, 0.99, 0.999]), kl.max()]
        assert list(vars(found).values()) == pytest.approx(expected, rel=1e-3)
        difference = nll[1] - nll[0]
        assert other.delta_ln_ppl == pytest.approx(difference.mean(), abs=allowed)
        assert other.delta_ln_ppl_stderr == pytest.approx(difference.std(ddof=1) / math.sqrt(kl.size), rel=1e-3)
        assert next(t for t in report.texts if t.name == text.name).tokens == kl.size


@pytest.mark.numerics
def test_layers_are_relative_errors_of_the_blocks_outputs(
    family: dict[str, Path], texts: list[Path], report: CompareReport
) -> None:
    """Over the scored positions of both texts together: all but each window's last."""
    ratios: list[list[np.ndarray]] = [[], []]
    for text in texts:
        windows = windows_of(family["reference"], text)
        ours, theirs = (by_transformers(family[name], windows)[1] for name in ("noisy", "reference"))
        for layer in range(2):
            v, r = ours[layer][:, :-1], theirs[layer][:, :-1]
            ratios[layer].append(((v - r).square().sum(-1) / r.square().sum(-1)).numpy().ravel())
    expected = [np.concatenate(ratio).mean() for ratio in ratios]
    assert model_of(report, "tiny-noisy").layers == pytest.approx(expected, rel=1e-3)
    assert model_of(report, "tiny").layers is None
    assert expected[0] != pytest.approx(expected[1], rel=0.05)


@pytest.mark.numerics
def test_worst_positions_are_those_of_whole_logits(
    family: dict[str, Path], texts: list[Path], report: CompareReport
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(family["reference"])
    windows = windows_of(family["reference"], texts[1])
    p, q = (by_transformers(family[name], windows)[0] for name in ("reference", "noisy"))
    kl = (np.exp(p) * (p - q)).sum(axis=-1)
    order = np.argsort(-kl, axis=None)[:KEPT]
    assert len(windows) > 64  # more than one batch
    assert max(order) // (SEQ_LEN - 1) >= 64  # and one of them in the second
    worst = model_of(report, "tiny-noisy").texts["second.txt"].worst
    assert len(worst) == KEPT
    for at, flat in zip(worst, order, strict=True):
        window, row = np.unravel_index(flat, kl.shape)
        position = row + 1  # of the token that is predicted
        assert (at["window"], at["position"]) == (window, position)
        assert at["kl"] == pytest.approx(kl[window, row], rel=1e-3)
        assert at["target"] == tokenizer.decode([int(windows[window, position])])
        assert at["context"] == tokenizer.decode(windows[window, max(0, position - 16) : position])
        for key, values in (("reference_top", p), ("top", q)):
            top = np.argsort(-values[window, row])[:3]
            assert [found["token"] for found in at[key]] == [tokenizer.decode([int(i)]) for i in top]
            assert [found["probability"] for found in at[key]] == pytest.approx(
                np.exp(values[window, row][top]), rel=1e-3
            )


def test_one_pass_gives_what_each_model_and_text_gives_alone(
    family: dict[str, Path], texts: list[Path], report: CompareReport
) -> None:
    for text in texts:
        for name in ("gptq", "gguf", "noisy"):
            alone = quantkit.perplexity(
                [family[name]], against=family["reference"], text=str(text), seq_len=SEQ_LEN, device="cpu"
            )
            label = alone.results[1].model
            assert same_numbers(model_of(report, label).texts[text.name], alone.results[1])


def test_a_model_of_another_depth_has_no_layers_but_a_divergence(
    family: dict[str, Path], make_model: MakeModel, texts: list[Path], tmp_path: Path
) -> None:
    deeper = make_model("llama", dtype="float32", num_hidden_layers=3)
    found = run({**family, "deeper": deeper}, ["deeper"], tmp_path / "out", texts[:1]).models[1]
    assert found.layers is None
    assert found.mean_kl > 0


def test_another_vocabulary_has_no_divergence(family: dict[str, Path], texts: list[Path], tmp_path: Path) -> None:
    """The same tokenizer, but more rows of output than it has tokens."""
    folder = tmp_path / "padded"
    shutil.copytree(family["reference"], folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.resize_token_embeddings(384)
    model.save_pretrained(folder)
    with pytest.raises(UsageError, match=r"padded predicts 384 tokens and tiny 320"):
        run({**family, "padded": folder}, ["padded"], tmp_path / "out", texts[:1])
    assert not (tmp_path / "out").exists()


def test_texts_keep_their_own_default_length(family: dict[str, Path], texts: list[Path], tmp_path: Path) -> None:
    wiki = passage(tmp_path / "wiki.raw", 5, 9000)
    long = passage(tmp_path / "long.txt", 6, 1500)
    models = [shutil.copytree(family[name], tmp_path / name) for name in ("reference", "noisy")]
    for model in models:
        config = json.loads((model / "config.json").read_text()) | {"max_position_embeddings": 4096}
        (model / "config.json").write_text(json.dumps(config))
    found = quantkit.compare(
        models[0], models[1], out=tmp_path / "out", texts=[f"wikitext2:{wiki}", str(long)], plots=False
    )
    assert [(text.name, text.seq_len) for text in found.texts] == [("wikitext2", 2048), ("long.txt", 512)]


def test_stride_scores_each_token_once(family: dict[str, Path], texts: list[Path], tmp_path: Path) -> None:
    found = run(family, ["noisy"], tmp_path / "out", texts[:1], stride=8)
    alone = quantkit.perplexity(
        [family["noisy"]], against=family["reference"], text=str(texts[0]), seq_len=SEQ_LEN, stride=8, device="cpu"
    )
    assert same_numbers(found.models[1].texts["first.txt"], alone.results[1])
    assert (found.texts[0].stride, found.texts[0].tokens) == (8, alone.tokens)


def test_ggjt_gguf_and_gptq_of_a_sentencepiece_llama(tmp_path: Path) -> None:
    """ggjt files have no chat template: the reference's makes the text of all."""
    ids = json.loads((Path(__file__).parents[1] / "support" / "sentencepiece_ids.json").read_text(encoding="utf-8"))[
        "llama"
    ]
    kept = {key: ids[key][: 320 - 46] + ids[key][-46:] for key in ("tokens", "scores", "types")}
    model = random_model("llama", tied=False, dtype=torch.float32, seed=5, num_key_value_heads=4, intermediate_size=256)
    write_model(tmp_path / "f32.gguf", model, sentencepiece({**ids, **kept}))
    reference = tmp_path / "tiny"
    quantkit.convert(tmp_path / "f32.gguf", reference, dtype="float32")
    settings = json.loads((reference / "tokenizer_config.json").read_text())
    settings["chat_template"] = "{% for m in messages %}### {{ m['content'] }}\n{% endfor %}"
    (reference / "tokenizer_config.json").write_text(json.dumps(settings))
    quantkit.gptq(reference, tmp_path / "gptq", group_size=32, calibration=token_matrix(4, 32), evaluate=False)
    quantkit.ggml(reference, tmp_path / "tiny.gguf", type="q5_0")
    quantkit.ggml(reference, tmp_path / "tiny.bin", type="q8_0", container="ggjt")
    records = [{"instruction": f"say {WORDS[i:]}", "output": WORDS[: 40 + i]} for i in range(20)]
    (tmp_path / "records.json").write_text(json.dumps(records))
    found = quantkit.compare(
        reference,
        [tmp_path / "gptq", tmp_path / "tiny.gguf", tmp_path / "tiny.bin"],
        out=tmp_path / "out",
        texts=[str(tmp_path / "records.json")],
        seq_len=SEQ_LEN,
        plots=False,
    )
    assert [model.kind for model in found.models] == ["hf", "gptq", "gguf", "ggjt"]
    assert [model.model for model in found.models] == ["tiny", "gptq", "tiny.gguf", "tiny.bin"]
    assert all(0 < model.mean_kl < 1 for model in found.models[1:])
    assert json.loads((tmp_path / "out" / "quantkit.json").read_text())["recipe"]["texts"][0]["template"] == "chat"


# -- the report ------------------------------------------------------------------------------------------------------


def test_report_json_has_the_keys_that_others_read(
    family: dict[str, Path], texts: list[Path], report: CompareReport
) -> None:
    content = json.loads((report.out / "report.json").read_text())
    assert content == report.as_dict()
    assert set(content) == {
        "quantkit",
        "reference",
        "texts",
        "models",
        "choice",
        "unmet",
        "answers",
        "budget",
        "max_kl",
    }
    assert content["quantkit"] == quantkit.__version__
    assert (content["reference"], content["choice"]) == ("tiny", None)
    for text in content["texts"]:
        assert set(text) == {"name", "tokens", "seq_len", "stride", "tokens_sha256"}
    for model in content["models"]:
        assert set(model) == {
            *("model", "kind", "scheme", "reference", "bytes", "bits_per_weight", "files", "pareto", "texts", "layers"),
            "precision",
        }
        for result in model["texts"].values():
            assert set(result) == {
                *("perplexity", "stderr", "delta_ln_ppl", "delta_ln_ppl_stderr", "kl_divergence", "top1_agreement"),
                *("kl_divergence_stderr", "top1_agreement_stderr"),
                "worst",
            }
    reference, gptq, gguf, _ = content["models"]
    assert [model["reference"] for model in content["models"]] == [True, False, False, False]
    assert reference["texts"]["first.txt"]["kl_divergence"] is None
    assert reference["texts"]["first.txt"]["worst"] == []
    assert set(gguf["texts"]["first.txt"]["kl_divergence"]) == {"mean", "median", "p90", "p99", "p999", "max"}
    assert len(gguf["layers"]) == 2
    assert (gptq["kind"], gguf["kind"]) == ("gptq", "gguf")
    assert gptq["scheme"].startswith("GPTQ 4-bit")
    assert gguf["bytes"] == family["gguf"].stat().st_size
    assert gguf["files"] == {family["gguf"].name: hashlib.sha256(family["gguf"].read_bytes()).hexdigest()}
    assert gguf["bits_per_weight"] == quantkit.inspect(family["gguf"]).bits_per_weight


def test_all_shards_count(make_model: MakeModel, family: dict[str, Path], texts: list[Path], tmp_path: Path) -> None:
    sharded = make_model("llama", dtype="float32", max_shard_size="100KB")
    shards = sorted(sharded.glob("*.safetensors"))
    assert len(shards) > 2
    found = run({**family, "sharded": sharded}, ["sharded"], tmp_path / "out", texts[:1]).models[1]
    assert found.bytes == sum(path.stat().st_size for path in shards)
    assert list(found.files) == [path.name for path in shards]
    assert found.mean_kl == 0


def test_equal_runs_give_equal_bytes_without_paths(family: dict[str, Path], texts: list[Path], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    folders = [tmp_path / "one", tmp_path / "elsewhere" / "two"]
    for folder in folders:
        run(family, ["gptq", "gguf"], folder, texts, plots=True)
    assert {path.name for path in folders[0].iterdir()} == FILES | PLOTS
    for path in folders[0].iterdir():
        content = path.read_bytes()
        assert content == (folders[1] / path.name).read_bytes(), path.name
        assert str(tmp_path.parent).encode() not in content
        assert str(family["reference"].parent).encode() not in content


def test_without_matplotlib_one_note_says_how_to_get_plots(
    family: dict[str, Path], texts: list[Path], tmp_path: Path, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quantkit.verbs.compare.find_spec", lambda name: None)
    run(family, ["gguf"], tmp_path / "asked", texts[:1], plots=True, progress=recorder)
    assert [note for note in recorder.notes if "quantkit[plots]" in note] == recorder.notes
    assert len(recorder.notes) == 1
    assert {path.name for path in (tmp_path / "asked").iterdir()} == FILES
    recorder.notes.clear()
    run(family, ["gguf"], tmp_path / "not", texts[:1], plots=False, progress=recorder)
    assert recorder.notes == []


def test_force_replaces_a_report_and_nothing_else(family: dict[str, Path], texts: list[Path], tmp_path: Path) -> None:
    run(family, ["gguf"], tmp_path / "out", texts[:1])
    with pytest.raises(UsageError, match="already exists; use force=True"):
        run(family, ["gguf"], tmp_path / "out", texts[:1])
    run(family, ["gptq"], tmp_path / "out", texts[:1], force=True)
    assert json.loads((tmp_path / "out" / "report.json").read_text())["models"][1]["kind"] == "gptq"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="not an output of quantkit"):
        run(family, ["gguf"], tmp_path / "mine", texts[:1], force=True)
    with pytest.raises(UsageError, match="inside the source"):
        run(family, ["gguf"], family["reference"] / "report", texts[:1])


# -- names -----------------------------------------------------------------------------------------------------------


def test_equal_names_are_told_apart(family: dict[str, Path], texts: list[Path], tmp_path: Path) -> None:
    for name in ("q8", "again"):
        (tmp_path / name).mkdir()
        shutil.copyfile(family["gguf"], tmp_path / name / "model.gguf")
    places = {**family, "one": tmp_path / "q8" / "model.gguf", "two": tmp_path / "again" / "model.gguf"}
    found = run(places, ["one", "two", "gptq"], tmp_path / "out", texts[:1])
    assert [model.model for model in found.models] == ["tiny", "q8/model", "again/model", "tiny-GPTQ"]


def test_names_that_stay_equal_are_refused(family: dict[str, Path], texts: list[Path], tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name / "q8").mkdir(parents=True)
        shutil.copyfile(family["gguf"], tmp_path / name / "q8" / "model.gguf")
    places = {**family, "one": tmp_path / "a" / "q8" / "model.gguf", "two": tmp_path / "b" / "q8" / "model.gguf"}
    with pytest.raises(UsageError, match=r"two models are called q8/model\.gguf; rename"):
        run(places, ["one", "two"], tmp_path / "out", texts[:1])


@pytest.mark.parametrize("names", [["gguf", "gguf"], ["reference"]])
def test_a_model_named_twice_is_refused(
    names: list[str], family: dict[str, Path], texts: list[Path], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="is named twice; compare each model once"):
        run(family, names, tmp_path / "out", texts[:1])


def test_texts_of_one_name_are_refused(family: dict[str, Path], texts: list[Path], tmp_path: Path) -> None:
    copy = tmp_path / "first.txt"
    shutil.copyfile(texts[0], copy)
    with pytest.raises(UsageError, match=r"two texts are called first\.txt"):
        run(family, ["gguf"], tmp_path / "out", [texts[0], copy])


def test_what_cannot_be_compared_leaves_nothing(family: dict[str, Path], texts: list[Path], tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("the fox")
    with pytest.raises(CalibrationError, match=r"short\.txt is too short"):
        run(family, ["gguf"], tmp_path / "out", [texts[0], short])
    with pytest.raises(UsageError, match="at least one variant"):
        run(family, [], tmp_path / "out", texts)
    with pytest.raises(UsageError, match="at least one text"):
        run(family, ["gguf"], tmp_path / "out", [])
    with pytest.raises(UsageError, match="budget=much: give a size such as 5GB"):
        run(family, ["gguf"], tmp_path / "out", texts, budget="much")
    with pytest.raises(UsageError, match="max_kl=-1"):
        run(family, ["gguf"], tmp_path / "out", texts, max_kl=-1)
    with pytest.raises(UsageError, match="max_kl=nan"):
        run(family, ["gguf"], tmp_path / "out", texts, max_kl=math.nan)
    assert not (tmp_path / "out").exists()


# -- the front and the chooser ---------------------------------------------------------------------------------------


class Point:
    def __init__(self, model: str, size: int, mean_kl: float) -> None:
        self.model, self.bytes, self.mean_kl = model, size, mean_kl


SMALL, MIDDLE, WASTEFUL, LARGE = Point("s", 40, 0.4), Point("m", 50, 0.1), Point("w", 60, 0.2), Point("l", 80, 0.01)
ALL = [WASTEFUL, LARGE, SMALL, MIDDLE]


def test_pareto_front() -> None:
    assert pareto(ALL) == [False, True, True, True]
    assert pareto([MIDDLE, Point("same", 50, 0.1)]) == [True, True]
    assert pareto([MIDDLE, Point("as small, worse", 50, 0.2), Point("as good, larger", 51, 0.1)]) == [
        True,
        False,
        False,
    ]


@pytest.mark.parametrize(
    ("limits", "chosen"),
    [
        (Limits(budget=100), "l"),
        (Limits(budget=80), "l"),
        (Limits(budget=79), "m"),
        (Limits(budget=49), "s"),
        (Limits(max_kl=0.2), "m"),
        (Limits(max_kl=0.1), "m"),
        (Limits(max_kl=0.0999), "l"),
        (Limits(max_kl=9.0), "s"),
        (Limits(budget=80, max_kl=0.2), "m"),  # the smallest that keeps to both, not the best that fits
        (Limits(budget=90, max_kl=0.05), "l"),
    ],
)
def test_chooser(limits: Limits, chosen: str) -> None:
    choice, unmet = choose(ALL, limits)
    assert unmet is None
    assert choice is not None
    assert choice.model == chosen


@pytest.mark.parametrize(
    ("limits", "nearest"),
    [
        (Limits(budget=39), "s"),
        (Limits(max_kl=0.001), "l"),
        (Limits(budget=79, max_kl=0.05), "m"),  # of those that fit, the one that diverges least
        (Limits(budget=10, max_kl=0.05), "s"),
    ],
)
def test_chooser_names_the_nearest_where_none_keeps_to_the_limits(limits: Limits, nearest: str) -> None:
    choice, unmet = choose(ALL, limits)
    assert choice is None
    assert unmet is not None
    assert f"the nearest is {nearest}: " in unmet


def test_chooser_breaks_ties_and_is_silent_unasked() -> None:
    assert choose(ALL, Limits()) == (None, None)
    twins = [Point("larger", 60, 0.1), Point("smaller", 50, 0.1)]
    choice, _ = choose(twins, Limits(budget=100))
    assert choice is not None
    assert choice.model == "smaller"


def test_worst_keeps_the_worst_of_all_chunks_and_of_equal_ones_the_earlier() -> None:
    worst = Worst()
    logprobs = torch.log_softmax(torch.arange(12.0).repeat(9, 1), -1)
    for window in range(3):
        kl = torch.tensor([0.0, 5.0, 1.0 + window, 0.5, 5.0, 0.25, 0.0, 2.0, 0.0])
        worst.offer(kl, (window, 1), torch.arange(9), logprobs, logprobs)
    found = [(at.kl, at.window, at.position) for at in worst.positions()]
    assert found[:6] == [(5.0, 0, 2), (5.0, 0, 5), (5.0, 1, 2), (5.0, 1, 5), (5.0, 2, 2), (5.0, 2, 5)]
    assert found[6:] == [(3.0, 2, 3), (2.0, 0, 8), (2.0, 1, 3), (2.0, 1, 8)]
    assert worst.positions()[0].target == 1
    assert [token for token, _ in worst.positions()[0].model] == [11, 10, 9]


# -- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def cli(family: dict[str, Path], texts: list[Path], tmp_path: Path) -> Callable[..., int]:
    """Run `quantkit compare` on the reference and a variant; returns the exit code."""

    def call(*options: str) -> int:
        models = [str(family[name]) for name in ("reference", "gguf", "gptq")]
        text = ["--text", str(texts[0]), "--text", str(texts[1]), "--seq-len", str(SEQ_LEN)]
        with pytest.raises(SystemExit) as done:
            main(["compare", *models, "--out", str(tmp_path / "out"), *text, "--no-plots", "--quiet", *options])
        return int(done.value.code or 0)

    return call


def test_command_prints_a_table_and_the_choice(
    cli: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli("--budget", "4GB") == 0
    said = capsys.readouterr().out
    assert "first.txt" in said
    assert "second.txt" in said
    assert "take tiny-Q8_0: of the 2 of 2 variants within 4,000,000,000 bytes it diverges least" in said
    assert "**Take tiny-Q8_0**" in (tmp_path / "out" / "report.md").read_text()


def test_command_prints_the_report_as_json(
    cli: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli("--json", "--max-kl", "5") == 0
    assert json.loads(capsys.readouterr().out) == json.loads((tmp_path / "out" / "report.json").read_text())


def test_command_ends_with_1_where_no_variant_keeps_to_the_limits(
    cli: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli("--max-kl", "1e-12") == 1
    assert (
        "no variant is with a mean KL divergence of 1e-12 or less; the nearest is tiny-Q8_0" in capsys.readouterr().err
    )
    assert json.loads((tmp_path / "out" / "report.json").read_text())["choice"] is None


def test_command_refuses_bad_input_in_a_line(cli: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli("--budget", "-3GB") == 2
    assert capsys.readouterr().err == "error: --budget -3GB: give a size such as 5GB or 500MB\n"
