"""compare --prompts: answers side by side, where they part, and what a killed comparison goes on with."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeModel, Recorder, random_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import quantkit
from quantkit.blocks.budget import Budget
from quantkit.blocks.stream import ModelStream
from quantkit.blocks.whole import check_room
from quantkit.cli.app import main
from quantkit.errors import CalibrationError, QuantkitError, UsageError
from quantkit.sources import open_source
from quantkit.tokens.datasets import HELD_OUT, read_bundled
from quantkit.verbs.compare import CompareReport
from quantkit.verbs.compare.answers import Agreement, Said, _place
from quantkit.verbs.generate.speaker import Speaker

WORDS = "the quick brown fox jumps over the lazy dog while the tides follow the moon and the sea follows the tides"
PROMPTS = [
    {"id": "a", "skill": "sea", "instruction": "what is the answer?"},
    {"id": "b", "skill": "sea", "instruction": "explain <b>the</b> tides"},
    {"id": "c", "skill": "dogs", "instruction": "the lazy dog"},
    {"id": "d", "instruction": "the fox"},
    {"id": "e", "instruction": "the moon"},
    *({"id": number, "instruction": f"the sea {number}"} for number in range(5)),
]


@pytest.fixture(scope="module")
def family(make_model: MakeModel, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A reference, an equal copy in a GGUF file, and a noisy copy."""
    folder = tmp_path_factory.mktemp("family")
    shutil.copytree(make_model("llama", dtype="float32"), folder / "tiny")
    quantkit.ggml(folder / "tiny", folder / "tiny-F32.gguf", type="f32", pre="smollm")
    shutil.copytree(folder / "tiny", folder / "tiny-noisy")
    model = random_model("llama", tied=False, dtype=torch.float32, seed=0)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder / "tiny-noisy")
    return [folder / name for name in ("tiny", "tiny-F32.gguf", "tiny-noisy")]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "asked.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in PROMPTS), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "text.txt"
    path.write_text(" ".join([WORDS] * 8), encoding="utf-8")
    return path


def run(family: Sequence[Path], out: Path, text: Path, **options: Any) -> CompareReport:
    options = {"plots": False, "seq_len": 32, "device": "cpu", "max_new_tokens": 12, **options}
    return quantkit.compare(family[0], family[1:], out=out, texts=[str(text)], **options)


@pytest.fixture(scope="module")
def report(family: list[Path], prompts: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> CompareReport:
    return run(family, tmp_path_factory.mktemp("out") / "report", text, prompts=prompts)


def by_transformers(folder: Path, prompt: str, tokenizer_of: Path) -> list[int]:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_of)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=False
    )
    with torch.inference_mode():
        made = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)
    return [int(token) for token in made[0, ids.shape[1] :]]


# -- what is said ----------------------------------------------------------------------------------------------------


def test_answers_are_transformers_greedy_ones_and_part_where_those_do(
    family: list[Path], report: CompareReport
) -> None:
    found = report.answers
    assert found is not None
    assert [prompt.id for prompt in found.prompts] == [record["id"] for record in PROMPTS]
    tokenizer = AutoTokenizer.from_pretrained(family[0])
    parted = 0
    for prompt in found.prompts:
        ids, others = (by_transformers(folder, prompt.prompt, family[0]) for folder in (family[0], family[2]))
        reference, equal, noisy = prompt.answers.values()
        assert reference.output == tokenizer.decode(ids[: reference.output_tokens])
        assert equal == reference
        at = next((at for at, (a, b) in enumerate(zip(ids, others, strict=False)) if a != b), None)
        assert noisy.parts_after == at
        assert noisy.output == tokenizer.decode(others[: noisy.output_tokens])
        if at is not None:
            parted += 1
            assert noisy.mark is not None
            start, end = noisy.mark
            assert noisy.output[:start] == tokenizer.decode(others[:at])
            assert noisy.output[:end] == tokenizer.decode(others[: at + 1])
    assert 0 < parted < len(PROMPTS)


def test_shares_and_medians_by_skill(report: CompareReport) -> None:
    found = report.answers
    assert found is not None
    noisy = [prompt.answers["tiny-noisy"] for prompt in found.prompts]
    assert found.agreement == {"tiny-F32": Agreement(10, 1.0, None), "tiny-noisy": Agreement.of(noisy)}
    assert {skill: of["tiny-noisy"] for skill, of in found.skills.items()} == {
        "sea": Agreement.of(noisy[:2]),
        "dogs": Agreement.of(noisy[2:3]),
    }
    three = [Said("x", "eos", 1), Said("y", "eos", 9, 3, (0, 1)), Said("z", "eos", 9, 6, (0, 1))]
    assert Agreement.of(three) == Agreement(3, pytest.approx(1 / 3), 4.5)  # type: ignore[arg-type]


def test_a_mark_takes_whole_letters() -> None:
    letters = {1: b"a", 2: "é".encode()[:1], 3: "é".encode()[1:], 4: b"b"}

    def decode(ids: Sequence[int]) -> str:
        return b"".join(letters[number] for number in ids).decode(errors="replace")

    assert _place([1, 2, 3, 4], 1, "aéb", decode) == (1, 2)
    assert _place([1, 2, 3, 4], 2, "aéb", decode) == (1, 2)
    assert _place([1, 4], 2, "ab", decode) == (2, 2)


def test_the_report_is_read_back_and_recorded(report: CompareReport, prompts: Path) -> None:
    written = json.loads((report.out / "report.json").read_text(encoding="utf-8"))
    assert CompareReport.of(written, out=report.out) == report
    recipe = json.loads((report.out / "quantkit.json").read_text(encoding="utf-8"))["recipe"]
    assert recipe["prompts"]["name"] == prompts.name
    assert recipe["prompts"]["max_new_tokens"] == 12
    assert [path.name for path in report.out.parent.iterdir()] == ["report"]


def test_pages_show_all_answers_and_escape_them(report: CompareReport) -> None:
    page = (report.out / "report.html").read_text(encoding="utf-8")
    markdown = (report.out / "report.md").read_text(encoding="utf-8")
    assert report.answers is not None
    assert "explain &lt;b&gt;the&lt;/b&gt; tides" in page
    assert "<b>the" not in page
    parted = [one for one in report.answers.prompts if one.answers["tiny-noisy"].mark is not None]
    assert page.count("<mark>") == markdown.count("⟦") - 1 == len(parted)
    assert "equal answers" in page
    assert "| sea | 2 |" in markdown


def test_without_prompts_nothing_is_asked(family: list[Path], text: Path, tmp_path: Path) -> None:
    found = run(family, tmp_path / "report", text)
    assert found.answers is None
    assert "side by side" not in (tmp_path / "report" / "report.html").read_text(encoding="utf-8")


# -- which prompts ---------------------------------------------------------------------------------------------------


def test_a_count_is_taken_from_the_whole_file(family: list[Path], prompts: Path, text: Path, tmp_path: Path) -> None:
    found = run(family[:2], tmp_path / "report", text, prompts=prompts, prompt_count=3, max_new_tokens=1).answers
    assert found is not None
    assert [prompt.id for prompt in found.prompts] == ["a", "d", 1]


@pytest.mark.parametrize("behind", [["--max-new-tokens", "1"], []])
def test_bare_on_the_command_line_it_is_one_bundled_record_of_each_skill(
    behind: list[str], family: list[Path], text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, models = tmp_path / "report", [tmp_path / "one", tmp_path / "two"]
    for model in models:  # with room for the longest record
        shutil.copytree(family[0], model)
        config = json.loads((model / "config.json").read_text(encoding="utf-8"))
        (model / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 4096}), encoding="utf-8")
    command = ["compare", *map(str, models), "--out", str(out), "--text", str(text), "--seq-len", "32"]
    command += ["--no-plots", "--device", "cpu", "--json"]
    if not behind:
        command += ["--max-new-tokens", "1"]
    with pytest.raises(SystemExit) as stop:
        main([*command, "--prompts", *behind])
    shown = json.loads(capsys.readouterr().out)
    assert stop.value.code == 0
    assert shown["answers"]["name"] == HELD_OUT
    ids = [prompt["id"] for prompt in shown["answers"]["prompts"]]
    assert len(ids) == len(shown["answers"]["skills"]) == 24
    assert set(ids) < read_bundled().held_out


@pytest.mark.parametrize("order", [(1, 2), (2, 1)])
def test_a_variant_behind_prompts_is_no_file_of_prompts(
    order: tuple[int, int], family: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    swallowed = [family[number] for number in order]
    with pytest.raises(SystemExit) as stop:
        main(["compare", str(family[0]), "--prompts", *map(str, swallowed), "--out", str(tmp_path / "report")])
    assert stop.value.code == 2
    assert "no file of prompts; give JSON lines, or --prompts alone" in capsys.readouterr().err


def test_prompts_that_cannot_be_read(family: list[Path], text: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"id": 1}\n', encoding="utf-8")
    with pytest.raises(CalibrationError, match=r"bad\.jsonl: line 1"):
        run(family, tmp_path / "report", text, prompts=tmp_path / "bad.jsonl")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.jsonl"]


def test_the_table_at_80_columns(report: CompareReport) -> None:
    from quantkit.cli.tables import lines_of
    from quantkit.report import Table

    table = [line for line in report.lines() if isinstance(line, Table)][-1]
    lines = list(lines_of(table, 80))
    assert max(map(len, lines)) <= 80
    assert any("tiny-F32" in line and "100.0 %" in line for line in lines)


# -- stopped, and gone on with ---------------------------------------------------------------------------------------


def test_a_stopped_comparison_goes_on_to_the_same_bytes(
    family: list[Path],
    prompts: Path,
    text: Path,
    report: CompareReport,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Batches of 8: of 10 prompts each model answers two. The third model's second is stopped."""
    out, batches, whole = tmp_path / "report", [], Speaker.answer

    def stopping(self: Speaker, *given: Any) -> Any:
        batches.append(len(given[1]))
        if len(batches) == 6:
            raise QuantkitError("the disk is gone")
        return whole(self, *given)

    monkeypatch.setattr(Speaker, "answer", stopping)
    with pytest.raises(QuantkitError, match=r"the disk is gone\n28 answers are kept: resume=True goes on"):
        run(family, out, text, prompts=prompts)
    assert not out.exists()
    with pytest.raises(
        UsageError, match=r"a run of compare into it was not finished; resume=True goes on .*\(28 answers"
    ):
        run(family, out, text, prompts=prompts)
    with pytest.raises(UsageError, match="prompts max_new_tokens: 12 then, 9 now"):
        run(family, out, text, prompts=prompts, resume=True, max_new_tokens=9)
    run(family, out, text, prompts=prompts, resume=True)
    assert batches == [8, 2, 8, 2, 8, 2, 2]
    for name in ("report.json", "report.html", "report.md", "quantkit.json"):
        assert (out / name).read_bytes() == (report.out / name).read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["report"]


def test_a_model_that_does_not_fit_in_whole_is_told_before_the_work(
    family: list[Path], prompts: Path, text: Path, tmp_path: Path, recorder: Recorder
) -> None:
    said = "for answers to prompts each model is loaded whole, and tiny takes "
    with pytest.raises(UsageError, match=rf"^memory=100\.0 kB: {said}[\d.]+ kB in float32$"):
        run(family, tmp_path / "report", text, prompts=prompts, memory="100KB", progress=recorder)
    assert list(tmp_path.iterdir()) == recorder.phases == []
    stream = ModelStream(open_source(family[0]), torch.device("cpu"), torch.float32)
    check_room(stream, "why", recorder)
    assert recorder.warnings == []
    stream.memory = Budget(1000)
    check_room(stream, "why", recorder)
    assert len(recorder.warnings) == 1
    assert recorder.warnings[0].endswith(", where 1.0 kB can be counted on")


def test_force_starts_anew_and_nothing_answered_leaves_nothing(
    family: list[Path], prompts: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, batches = Speaker.answer, []

    def failing(self: Speaker, *given: Any) -> Any:
        batches.append(0)
        if len(batches) in (2, 5):
            raise QuantkitError("no word")
        return whole(self, *given)

    monkeypatch.setattr(Speaker, "answer", failing)
    with pytest.raises(QuantkitError, match="8 answers are kept"):
        run(family[:2], tmp_path / "report", text, prompts=prompts)
    with pytest.raises(UsageError, match=r"resume=True: .* use force=True to start anew"):
        run(family[:2], tmp_path / "report", text, resume=True, prompts=prompts, prompt_count=1)
    run(family[:2], tmp_path / "report", text, prompts=prompts, prompt_count=1, force=True, max_new_tokens=1)
    assert [path.name for path in tmp_path.iterdir()] == ["report"]
    batches[:] = [0] * 3
    with pytest.raises(QuantkitError, match=r"^no word\n1 answer is kept: resume=True goes on with it$"):
        run(family[:2], tmp_path / "one", text, prompts=prompts, prompt_count=1)
    shutil.rmtree(next(path for path in tmp_path.iterdir() if path.name != "report"))
    batches[:] = [0] * 4
    with pytest.raises(QuantkitError, match=r"^no word$"):
        run(family[:2], tmp_path / "other", text, prompts=prompts)
    assert [path.name for path in tmp_path.iterdir()] == ["report"]


def test_an_interrupt_says_how_to_go_on(
    family: list[Path],
    prompts: Path,
    text: Path,
    tmp_path: Path,
    recorder: Recorder,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole, calls = Speaker.answer, []

    def interrupted(self: Speaker, *given: Any) -> Any:
        calls.append(0)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return whole(self, *given)

    monkeypatch.setattr(Speaker, "answer", interrupted)
    command = ["compare", *map(str, family), "--out", str(tmp_path / "report"), "--text", str(text), "--seq-len", "32"]
    with pytest.raises(SystemExit) as stop:
        main([*command, "--no-plots", "--device", "cpu", "--max-new-tokens", "3", "--prompts", str(prompts)])
    assert stop.value.code == 1
    said = capsys.readouterr().err
    assert "interrupted after 8 answers; go on with: quantkit compare" in said
    assert said.rstrip().endswith("--resume")
