"""The verb `generate`: whole models, prompts, decoding against transformers, files that a killed run goes on with."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import EXPERTS, SIZES, SPECIAL, MakeModel, Recorder, token_matrix
from support import towers
from support.ggjt_models import LLAMA, tiny, write
from support.gguf_models import sentencepiece, write_model
from support.judge_env import GPTQMODEL, judge_python
from support.streamed import open_stream, streamed_logits
from support.tolerance import forward
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import quantkit
from quantkit.blocks.budget import Budget
from quantkit.blocks.pair import DeltaSource
from quantkit.blocks.whole import load_model
from quantkit.cli import app as cli
from quantkit.containers.source import Source
from quantkit.errors import (
    CalibrationError,
    NumericError,
    UsageError,
)
from quantkit.options import Decoding, make
from quantkit.runs.journal import Journal
from quantkit.runs.outputs import staging_of
from quantkit.runs.places import folder_of
from quantkit.sources import open_source
from quantkit.tokens import TokenMatrix
from quantkit.verbs.generate import GenerateReport
from quantkit.verbs.generate.decoding import (
    Answer,
    Request,
    decode,
    own_seed,
)
from quantkit.verbs.generate.drawing import Draw
from quantkit.verbs.generate.prompts import (
    prompt_ids,
    prompt_text,
    read_prompts,
    stop_ids,
)
from quantkit.verbs.generate.speaker import Speaker

CPU = torch.device("cpu")
IDS = token_matrix(3, 12).tokens.long()
EOS = SPECIAL.index("<|im_end|>")
ANSWERED = {"output", "finish_reason", "prompt_tokens", "output_tokens"}
PROMPTS = [
    {"idx": 7, "Skill": "Math", "Instruction": "what is the answer?"},
    {"idx": 3, "Instruction": "write a short story about the sea, then explain how the tides follow the moon"},
    {"id": "c", "instruction": "explain", "input": "the quick brown fox", "output": "a reference"},
    {"id": "d", "prompt": "the"},
    {
        "id": "e",
        "messages": [
            {"role": "user", "content": "the sea?"},
            {"role": "assistant", "content": "the moon."},
            {"role": "user", "content": "and the dog?"},
        ],
    },
    {"id": "f", "conversations": [{"from": "human", "value": "a question"}, {"from": "gpt", "value": "no"}]},
    {"prompt": "jumps over the lazy dog while the user asks " * 3},
]


def logits_of(source: Source) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = load_model(source, CPU, torch.float32)(input_ids=IDS).logits
    return logits


def assert_same_as_stream(model: Path) -> None:
    expected = streamed_logits(open_stream(model), [IDS])[0]
    torch.testing.assert_close(logits_of(open_source(model)), expected, **forward(expected))


@pytest.fixture(scope="module")
def model(make_model: MakeModel) -> Path:
    return make_model("llama", dtype="float32")


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    return lines(tmp_path / "prompts.jsonl", PROMPTS)


def lines(path: Path, records: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def answers(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]


def run(model: Path, prompts: Path, out: Path, **options: Any) -> GenerateReport:
    return quantkit.generate(model, prompts=prompts, out=out, **{"max_new_tokens": 12, "device": "cpu", **options})


# -- a whole model ---------------------------------------------------------------------------------------------------


@pytest.mark.numerics
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2", "opt", "phi3", *EXPERTS])
def test_a_whole_model_has_the_streams_logits(family: str, make_model: MakeModel) -> None:
    assert_same_as_stream(make_model(family, dtype="float32"))


def test_a_gguf_file(tiny_gguf: Path) -> None:
    assert_same_as_stream(tiny_gguf)


def test_a_ggjt_file(tmp_path: Path) -> None:
    write_model(tmp_path / "tiny.gguf", tiny(), sentencepiece(LLAMA))
    assert_same_as_stream(write(tmp_path / "tiny.bin", open_source(tmp_path / "tiny.gguf")).path)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_a_gptq_folder_is_dequantized(
    family: str, make_model: MakeModel, tiny_tokens: TokenMatrix, tmp_path: Path
) -> None:
    quantkit.gptq(
        make_model(family, dtype="float32"), tmp_path / "q", calibration=tiny_tokens, group_size=32, evaluate=False
    )
    assert_same_as_stream(tmp_path / "q")


def test_a_base_and_its_delta(make_model: MakeModel, tmp_path: Path) -> None:
    base, tuned = make_model("llama", dtype="float32"), make_model("llama", dtype="float32", seed=1)
    quantkit.diff(base, tuned, tmp_path / "delta")
    pair = DeltaSource(open_source(base), open_source(tmp_path / "delta"))
    expected = logits_of(open_source(tuned))
    torch.testing.assert_close(logits_of(pair), expected, **forward(expected))


def test_tied_embeddings_are_in_memory_once(make_model: MakeModel) -> None:
    folder = make_model("llama", tied=True, dtype="float32")
    model: Any = load_model(open_source(folder), CPU, torch.float32)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert_same_as_stream(folder)


def test_a_dtype_is_that_of_weights_and_arithmetic(make_model: MakeModel) -> None:
    model = load_model(open_source(make_model("llama")), CPU, torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


# -- prompts ---------------------------------------------------------------------------------------------------------


def test_every_layout(prompts: Path) -> None:
    found = read_prompts(prompts)
    assert [prompt.id for prompt in found] == [7, 3, "c", "d", "e", "f", 6]
    last = [prompt.record.turns[-1].text for prompt in found if prompt.record.turns]
    assert last[2] == "explain\n\nthe quick brown fox"
    assert last[4:6] == ["and the dog?", "a question"]  # an answer at the end is asked for again
    assert [len(prompt.record.turns or ()) for prompt in found] == [1, 1, 1, 1, 3, 1, 1]


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("wizardlm-7b", "be brief\n\nexplain\n\nthe fox\n\n### Response:"),
        ("vicuna", "be brief USER: explain\n\nthe fox ASSISTANT:"),
        ("alpaca", "be brief\n\n### Instruction:\nexplain\n\n### Input:\nthe fox\n\n### Response:\n"),
        (
            "chat",
            "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nexplain\n\nthe fox<|im_end|>\n"
            "<|im_start|>assistant\n",
        ),
        ("none", "be brief\n\nexplain\n\nthe fox"),
    ],
)
def test_templates_and_the_system_message(
    template: Any, text: str, model: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: Any
) -> None:
    seen: list[str] = []
    monkeypatch.setattr(
        "quantkit.verbs.generate.speaker.prompt_text", lambda *given: seen.append(prompt_text(*given)) or seen[-1]
    )
    asked = lines(tmp_path / "p.jsonl", [{"instruction": "explain", "input": "the fox"}])
    run(model, asked, tmp_path / "out.jsonl", template=template, system="be brief")
    assert seen == [text]


def test_a_prompt_keeps_its_own_system_message(tmp_path: Path, model: Path, tokenizer: Any) -> None:
    own = [{"from": "system", "value": "mine"}, {"from": "human", "value": "the sea"}]
    asked = read_prompts(lines(tmp_path / "p.jsonl", [{"conversations": own}, {"prompt": "b"}]), "theirs")
    texts = [prompt_text(p.record, "vicuna", tokenizer) for p in asked]
    assert texts[0].startswith("mine USER: the sea")
    assert texts[1].startswith("theirs USER: b")


def test_a_bos_stands_once(tokenizer: PreTrainedTokenizerFast) -> None:
    from tokenizers import processors

    adds = PreTrainedTokenizerFast(
        tokenizer_object=type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str()),
        bos_token="<|endoftext|>",
        eos_token="<|im_end|>",
    )
    adds.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A <|im_end|>", special_tokens=[("<|endoftext|>", 0), ("<|im_end|>", EOS)]
    )
    ids = prompt_ids("the sea", "vicuna", adds)
    assert ids[0] == 0
    assert ids.count(0) == 1
    assert ids[-1] != EOS
    assert prompt_ids("<|endoftext|>the sea", "chat", adds) == ids


def test_the_token_that_ends_a_turn_ends_an_answer(tokenizer: PreTrainedTokenizerFast) -> None:
    assert stop_ids([1, 0], "vicuna", tokenizer) == [0, 1, EOS]
    other = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|endoftext|>")
    other.add_special_tokens({"additional_special_tokens": ["<|im_end|>", "<|im_start|>"]})
    other.chat_template = tokenizer.chat_template
    assert stop_ids(None, "chat", other) == [0, EOS]
    assert stop_ids(None, "alpaca", other) == [0]


def test_plain_text_is_gone_on_with_as_it_is(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = "\n  and then "
    ids = AutoTokenizer.from_pretrained(model)(told).input_ids
    seen: list[int] = []
    monkeypatch.setattr(
        "quantkit.verbs.generate.speaker.decode",
        lambda model, asked, *more: seen.extend(asked[0].ids) or [Answer(ids, "eos")],
    )
    run(model, lines(tmp_path / "p.jsonl", [{"text": "the sea "}]), tmp_path / "out", template="chat")
    assert AutoTokenizer.from_pretrained(model).decode(seen) == "the sea "
    assert answers(tmp_path / "out")[0]["output"] == told


@pytest.mark.parametrize(
    ("second", "said"),
    [
        ("{", r"p.jsonl: line 3 is not JSON: "),
        ('{"prompt": NaN}', r"p.jsonl: line 3 is not JSON: NaN is no number"),
        ("[1]", r"p.jsonl: line 3: not an object but list"),
        ('{"prompt": 5}', r"p.jsonl: line 3: record #1: 'prompt' must be text, not int"),
        ('{"question": "x"}', r"p.jsonl: line 3: record #1 has an unknown layout. Keys found: question"),
        ('{"prompt": "  "}', r"p.jsonl: line 3: nothing to answer"),
        ('{"messages": []}', r"p.jsonl: line 3: nothing to answer"),
        ('{"messages": [{"role": "assistant", "content": "hm"}]}', r"p.jsonl: line 3: nothing to answer"),
        ('{"messages": [{"role": "tool", "content": "hm"}]}', r"p.jsonl: line 3: record #1, .*unknown role 'tool'"),
        ('{"prompt": "\\ud800"}', r"p.jsonl: line 3 has half of a surrogate pair"),
        ('{"id": "a", "prompt": "x"}', r'p.jsonl: line 3: its id "a" is also that of line 1'),
    ],
)
def test_a_bad_line_is_named_before_anything_runs(second: str, said: str, model: Path, tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(f'{{"id": "a", "prompt": "the sea"}}\n\n{second}\n', encoding="utf-8")
    with pytest.raises(CalibrationError, match=said):
        run(model, path, tmp_path / "out.jsonl")
    assert list(tmp_path.iterdir()) == [path]


def test_not_utf8_and_nothing_at_all(model: Path, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_bytes(b'{"prompt": "a"}\n{"prompt": "\xff"}\n')
    with pytest.raises(CalibrationError, match=r"line 2 is not UTF-8"):
        run(model, tmp_path / "p.jsonl", tmp_path / "out")
    (tmp_path / "p.jsonl").write_text("\n")
    with pytest.raises(CalibrationError, match=r"p.jsonl: no prompt in it"):
        run(model, tmp_path / "p.jsonl", tmp_path / "out")
    with pytest.raises(UsageError, match=r"prompts=.*none.jsonl: no file of prompts; give JSON lines"):
        run(model, tmp_path / "none.jsonl", tmp_path / "out")


def test_a_prompt_that_fills_the_context_is_named(model: Path, tmp_path: Path, recorder: Recorder) -> None:
    context = SIZES["max_position_embeddings"]
    asked = lines(tmp_path / "p.jsonl", [{"prompt": "a"}, {"prompt": "a " * context}])
    with pytest.raises(CalibrationError, match=rf"p.jsonl: line 2: its prompt has \d+ tokens.*reads {context} in all"):
        run(model, asked, tmp_path / "out.jsonl", template="none")
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize("family", ["llama", "gpt2"])  # which has an embedding for each position, and no more
def test_a_prompt_that_leaves_little_room(
    family: str, make_model: MakeModel, tmp_path: Path, recorder: Recorder
) -> None:
    folder, context = make_model(family, dtype="float32"), SIZES["max_position_embeddings"]
    tokens = len(AutoTokenizer.from_pretrained(folder)("the " * 100).input_ids)
    asked = lines(tmp_path / "p.jsonl", [{"prompt": "a"}, {"prompt": "the " * 100}, {"prompt": "b"}])
    options: dict[str, Any] = {"template": "none", "max_new_tokens": 200, "temperature": 0.5, "progress": recorder}
    report = run(folder, asked, tmp_path / "out", **options)
    _, long, _ = answers(tmp_path / "out")
    assert long["prompt_tokens"] == tokens
    assert long["output_tokens"] == context - tokens or long["finish_reason"] == "eos"
    assert sum(report.finished.values()) == 3
    assert recorder.notes[-1].startswith("1 of 3 prompts leaves less room than 200 tokens")
    run(folder, asked, tmp_path / "alone", batch_size=1, **options)
    assert (tmp_path / "alone").read_bytes() == (tmp_path / "out").read_bytes()


# -- decoding --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma3_text", "falcon", "qwen3_moe"])
def test_greedy_is_transformers_one_at_a_time_whatever_the_batch(
    family: str, make_model: MakeModel, prompts: Path, tmp_path: Path
) -> None:
    folder = make_model(family, dtype="float32")
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    expected = []
    for prompt in read_prompts(prompts):
        ids = torch.tensor([prompt_ids(prompt_text(prompt.record, "chat", tokenizer), "chat", tokenizer)])
        new = theirs.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12)
        row = new[0, ids.shape[1] :].tolist()
        expected.append(tokenizer.decode(row[: row.index(EOS)] if EOS in row else row).strip())
    for size in (1, 3, 7):
        run(folder, prompts, tmp_path / f"{size}", greedy=True, batch_size=size)
        assert [answer["output"] for answer in answers(tmp_path / f"{size}")] == expected, size
    assert len(set(expected)) > 3  # not all the same, whatever the prompt


def by_id(out: Path) -> dict[str, Any]:
    return {json.dumps(answer["id"]): answer["output"] for answer in answers(out)}


def test_what_is_drawn_depends_on_seed_and_id_alone(model: Path, prompts: Path, tmp_path: Path) -> None:
    run(model, prompts, tmp_path / "one", batch_size=1)
    for size in (2, 7):
        run(model, prompts, tmp_path / f"{size}", batch_size=size)
        assert (tmp_path / f"{size}").read_bytes() == (tmp_path / "one").read_bytes()
    numbered = [{"id": 6, **record} if "id" not in record and "idx" not in record else record for record in PROMPTS]
    run(model, lines(tmp_path / "back.jsonl", numbered[::-1]), tmp_path / "back", batch_size=3)
    assert by_id(tmp_path / "back") == by_id(tmp_path / "one")
    run(model, prompts, tmp_path / "other", seed=1)
    others = by_id(tmp_path / "other")
    assert all(others[key] != text for key, text in by_id(tmp_path / "one").items())


def test_equal_prompts_with_other_ids_get_other_answers(model: Path, tmp_path: Path) -> None:
    asked = lines(tmp_path / "p.jsonl", [{"id": 1, "prompt": "the sea"}, {"id": "1", "prompt": "the sea"}])
    run(model, asked, tmp_path / "out")
    one, other = answers(tmp_path / "out")
    assert one["output"] != other["output"]


def test_the_global_generator_is_left_alone(model: Path, prompts: Path, tmp_path: Path) -> None:
    for number, options in enumerate(({}, {"num_beams": 2})):
        before = torch.random.get_rng_state()
        run(model, prompts, tmp_path / f"{number}", **options)
        assert torch.equal(torch.random.get_rng_state(), before)
        torch.rand(5)
        run(model, prompts, tmp_path / f"again{number}", **options)
        assert (tmp_path / f"again{number}").read_bytes() == (tmp_path / f"{number}").read_bytes()


def test_tokens_are_drawn_by_their_probability() -> None:
    probabilities = torch.tensor([0.5, 0.0, 0.3, 0.15, 0.05])
    draw = Draw([own_seed(0, f"{row}") for row in range(500)])
    counts = torch.zeros(5)
    for _ in range(40):
        scores = draw(torch.zeros(500, 1), probabilities.log().repeat(500, 1))
        assert torch.equal(torch.isfinite(scores).sum(dim=1), torch.ones(500))
        counts += torch.bincount(scores.argmax(dim=1), minlength=5)
    assert counts[1] == 0
    error = (probabilities * (1 - probabilities) / 20000).sqrt()
    assert bool(((counts / 20000 - probabilities).abs() <= 4 * error).all())


def test_sampling_that_leaves_one_token_is_greedy(model: Path, prompts: Path, tmp_path: Path) -> None:
    run(model, prompts, tmp_path / "greedy", greedy=True)
    for number, options in enumerate(({"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4})):
        run(model, prompts, tmp_path / f"{number}", **options)
        assert by_id(tmp_path / f"{number}") == by_id(tmp_path / "greedy"), options
    run(model, prompts, tmp_path / "free", top_k=0, top_p=1.0)
    assert by_id(tmp_path / "free") != by_id(tmp_path / "greedy")


def test_a_repetition_penalty_is_that_of_transformers_in_every_batch(
    model: Path, prompts: Path, tmp_path: Path
) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(model)
    text = prompt_text(read_prompts(prompts)[3].record, "chat", tokenizer)
    ids = torch.tensor([prompt_ids(text, "chat", tokenizer)])
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 12, "repetition_penalty": 1.7}
    new = theirs.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, ids.shape[1] :]
    for size in (1, 7):
        run(model, prompts, tmp_path / f"{size}", greedy=True, repetition_penalty=1.7, batch_size=size)
        assert by_id(tmp_path / f"{size}")['"d"'] == tokenizer.decode(new, skip_special_tokens=True).strip()
    assert (tmp_path / "1").read_bytes() == (tmp_path / "7").read_bytes()
    run(model, prompts, tmp_path / "without", greedy=True)
    assert by_id(tmp_path / "without") != by_id(tmp_path / "1")


def test_beams_are_transformers_beams(model: Path, prompts: Path, tmp_path: Path) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = torch.tensor([prompt_ids(prompt_text(read_prompts(prompts)[1].record, "chat", tokenizer), "chat", tokenizer)])
    new = theirs.generate(ids, attention_mask=torch.ones_like(ids), num_beams=3, do_sample=False, max_new_tokens=12)
    run(model, prompts, tmp_path / "3", greedy=True, num_beams=3)
    run(model, prompts, tmp_path / "1", greedy=True)
    beams = by_id(tmp_path / "3")
    assert beams["3"] == tokenizer.decode(new[0, ids.shape[1] :], skip_special_tokens=True).strip()
    assert beams != by_id(tmp_path / "1")


def test_generation_defaults_of_the_model_decide_nothing_but_where_it_stops(
    model: Path, prompts: Path, tmp_path: Path
) -> None:
    run(model, prompts, tmp_path / "plain", greedy=True)
    speaker = Speaker.of(open_source(model), "auto", Decoding(greedy=True, max_new_tokens=12))
    request = speaker.requests(read_prompts(prompts)[1:2])
    first = speaker.answer(load_model(open_source(model), CPU, torch.float32), request)[0].ids
    place = next(i for i in range(2, 12) if first[i] not in first[:i])
    stop = first[place]
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    config = {"eos_token_id": [EOS, stop], "do_sample": True, "temperature": 0.1, "suppress_tokens": first[:1]}
    (folder / "generation_config.json").write_text(json.dumps({**config, "max_new_tokens": 2}))
    report = run(folder, prompts, tmp_path / "stopped", greedy=True)
    found = answers(tmp_path / "stopped")[1]
    assert (found["finish_reason"], found["output_tokens"]) == ("eos", place)
    assert found["output"] == speaker.text(first[:place], read_prompts(prompts)[1].record)
    assert report.finished["eos"] >= 1
    assert report.output_tokens == sum(answer["output_tokens"] for answer in answers(tmp_path / "stopped"))


def test_a_text_config_may_name_no_end(tokenizer: PreTrainedTokenizerFast, prompts: Path, tmp_path: Path) -> None:
    """That of Qwen 3 VL has none; the tokenizer does."""
    model = towers.write(tmp_path / "model", "qwen3_vl", tokenizer)
    (model / "generation_config.json").unlink(missing_ok=True)
    assert not hasattr(open_source(model).config.get_text_config(), "eos_token_id")
    report = run(model, prompts, tmp_path / "out", greedy=True)
    assert sum(report.finished.values()) == len(answers(tmp_path / "out"))
    assert EOS in Speaker.of(open_source(model), "auto", Decoding()).stops


def test_logits_that_are_no_numbers(make_model: MakeModel, tmp_path: Path) -> None:
    model = load_model(open_source(make_model("llama")), CPU, torch.float32)
    with torch.no_grad():
        model.get_parameter("model.norm.weight").fill_(torch.nan)
    for spec in (Decoding(greedy=True, max_new_tokens=2), Decoding(num_beams=2, max_new_tokens=2)):
        with pytest.raises(NumericError, match=r"logits are not finite; try --dtype float32"):
            decode(model, [Request([5, 6], 2, "x")], spec, [EOS])


@pytest.mark.parametrize("template", ["vicuna", "wizardlm-7b", "alpaca", "chat", "none"])
def test_answers_with_the_templates_markers_are_kept_whole(
    template: Any, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = "one ### Response: two ASSISTANT: three USER:\n\n### Instruction:\nfour <|im_start|>user\nfive"
    ids = AutoTokenizer.from_pretrained(model)(told).input_ids
    assert SPECIAL.index("<|im_start|>") in ids
    monkeypatch.setattr("quantkit.verbs.generate.speaker.decode", lambda *given: [Answer(ids, "eos")])
    run(model, lines(tmp_path / "p.jsonl", [{"prompt": "go"}]), tmp_path / "out", template=template)
    assert answers(tmp_path / "out")[0]["output"] == told


# -- the file of answers ---------------------------------------------------------------------------------------------


def test_a_line_is_the_prompts_with_the_answer_added(model: Path, prompts: Path, tmp_path: Path) -> None:
    report = run(model, prompts, tmp_path / "out", batch_size=2)
    found = answers(tmp_path / "out")
    for given, answer in zip(PROMPTS, found, strict=True):
        kept = {"given_output" if key == "output" else key: value for key, value in given.items()}
        assert {key: answer[key] for key in kept} == kept
        assert set(answer) == {*kept, "id"} | ANSWERED
    assert [answer["id"] for answer in found] == [7, 3, "c", "d", "e", "f", 6]
    assert (report.prompts, report.resumed, report.kernels) == (7, 0, None)
    assert report.prompt_tokens == sum(answer["prompt_tokens"] for answer in found)
    assert report.longest_prompt == max(answer["prompt_tokens"] for answer in found)
    settings = (tmp_path / "out.quantkit.json").read_text()
    assert str(tmp_path) not in settings
    assert json.loads(settings)["recipe"]["top_p"] == 0.95
    assert json.loads(settings)["recipe"]["template"] == "chat"
    assert list(json.loads(settings)["source"]["sha256"]) == ["model.safetensors"]


def kept(out: Path) -> int:
    """Answers that a run at work or a killed one has kept."""
    return sum("answer" in record for record in Journal(folder_of(out) / "journal").records)


def test_each_batch_is_kept_before_the_next(
    model: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    synced: list[int] = []
    answer, sync = Speaker.answer, os.fsync
    monkeypatch.setattr(os, "fsync", lambda number: synced.append(number) or sync(number))

    def watched(self: Speaker, *given: Any) -> Any:
        seen.append(kept(tmp_path / "out"))
        return answer(self, *given)

    monkeypatch.setattr(Speaker, "answer", watched)
    run(model, prompts, tmp_path / "out", batch_size=3)
    assert seen == [0, 3, 6]
    assert len(synced) >= 3


def test_an_output_in_the_way(model: Path, prompts: Path, tmp_path: Path) -> None:
    run(model, prompts, tmp_path / "out")
    before = (tmp_path / "out").read_bytes()
    with pytest.raises(
        UsageError, match=r"already exists; use resume=True to go on with it, or force=True to replace it"
    ):
        run(model, prompts, tmp_path / "out", seed=1)
    with pytest.raises(UsageError, match=r"resume=True goes on with out and force=True starts it again: choose one"):
        run(model, prompts, tmp_path / "out", resume=True, force=True)
    with pytest.raises(UsageError, match=r"is the file of the prompts; name another"):
        run(model, prompts, prompts, force=True)
    with pytest.raises(UsageError, match=r"is a folder; name a file"):
        run(model, prompts, tmp_path, force=True)
    assert (tmp_path / "out").read_bytes() == before
    run(model, prompts, tmp_path / "out", seed=1, force=True)
    assert (tmp_path / "out").read_bytes() != before


def test_resuming_goes_on_to_the_same_bytes_from_every_place(
    model: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(model, prompts, tmp_path / "whole", batch_size=3)
    whole = (tmp_path / "whole").read_bytes()
    ends = [0, *(place + 1 for place, byte in enumerate(whole) if byte == 10)]
    answered: list[list[str]] = []
    answer = Speaker.answer

    def watched(self: Speaker, model: Any, requests: Sequence[Request], *more: Any) -> list[Answer]:
        answered.append([request.key for request in requests])
        return answer(self, model, requests, *more)

    monkeypatch.setattr(Speaker, "answer", watched)
    for cut in [*ends, ends[2] + 1, ends[5] - 1, len(whole) - 1]:
        (tmp_path / "out").write_bytes(whole[:cut])
        shutil.copy(tmp_path / "whole.quantkit.json", tmp_path / "out.quantkit.json")
        report = run(model, prompts, tmp_path / "out", batch_size=3, resume=True)
        assert (tmp_path / "out").read_bytes() == whole, cut
        assert report.resumed == whole[:cut].count(b"\n")
        assert sum(report.finished.values()) == 7 - report.resumed
    # In the batches of the undisturbed run, whose shapes decide on rounding.
    assert {len(batch) for batch in answered} == {1, 3}
    assert len({key: tuple(batch) for batch in answered for key in batch}) == 7
    assert len({tuple(batch) for batch in answered}) == 3


def test_resuming_keeps_what_is_there_and_answers_added_prompts(model: Path, prompts: Path, tmp_path: Path) -> None:
    lines(tmp_path / "few.jsonl", PROMPTS[:4])
    run(model, tmp_path / "few.jsonl", tmp_path / "out")
    mark = (tmp_path / "out").read_text().replace('"output": "', '"output": "kept ', 1)
    (tmp_path / "out").write_text(mark)
    report = run(model, prompts, tmp_path / "out", resume=True)
    assert (tmp_path / "out").read_text().startswith(mark)
    assert (report.resumed, len(answers(tmp_path / "out"))) == (4, 7)
    assert run(model, prompts, tmp_path / "out", resume=True).resumed == 7


def test_resuming_where_nothing_is_begins(model: Path, prompts: Path, tmp_path: Path) -> None:
    assert run(model, prompts, tmp_path / "new" / "out", resume=True).resumed == 0
    (tmp_path / "empty").touch()
    assert run(model, prompts, tmp_path / "empty", resume=True).resumed == 0
    assert (tmp_path / "empty").read_bytes() == (tmp_path / "new" / "out").read_bytes()


def test_resuming_with_anything_else_is_refused(
    model: Path, make_model: MakeModel, prompts: Path, tmp_path: Path
) -> None:
    run(model, prompts, tmp_path / "out")
    whole = (tmp_path / "out").read_bytes()

    def refused(said: str, *, of: Path = model, asked: Path = prompts, **options: Any) -> None:
        before = (tmp_path / "out").read_bytes()
        with pytest.raises(UsageError, match=said):
            run(of, asked, tmp_path / "out", resume=True, **options)
        assert (tmp_path / "out").read_bytes() == before

    refused(
        r"resume=True: .*out was made with recipe temperature 1.0, which is 0.5 now; give the same", temperature=0.5
    )
    refused(r"recipe template chat, which is vicuna now", template="vicuna")
    refused(r"recipe system None, which is x now", system="x")
    refused(r"source sha256 model.safetensors \w+, which is \w+ now", of=make_model("llama", dtype="float32", seed=1))
    others = lines(tmp_path / "others.jsonl", [*PROMPTS[:2], {"id": "c", "prompt": "changed"}, *PROMPTS[3:]])
    refused(r"resume=True: line 3 of .*out is no answer to others.jsonl: line 3", asked=others)
    refused(r"has 7 answers, more than there are prompts", asked=lines(tmp_path / "few.jsonl", PROMPTS[:3]))
    (tmp_path / "out").write_bytes(whole.replace(b"finish", b"finis", 1))
    refused(r"resume=True: line 1 of .*out is no answer")
    (tmp_path / "out.quantkit.json").unlink()
    refused(r"has no out.quantkit.json beside it; use force=True to start again")


def test_two_runs_do_not_write_one_file(model: Path, prompts: Path, tmp_path: Path) -> None:
    run(model, lines(tmp_path / "few.jsonl", PROMPTS[:2]), tmp_path / "out")
    with staging_of(tmp_path / "out"), pytest.raises(UsageError, match=r"another run is writing it"):
        run(model, prompts, tmp_path / "out", resume=True)


def test_a_killed_run_goes_on_to_the_same_bytes(model: Path, tmp_path: Path) -> None:
    asked = lines(tmp_path / "p.jsonl", [{"idx": number, "Instruction": f"the sea {number}"} for number in range(12)])
    out, options = tmp_path / "out", {"batch_size": 2, "max_new_tokens": 100, "top_k": 0, "top_p": 1.0}
    run(model, asked, tmp_path / "whole", **options)
    command = [sys.executable, "-m", "quantkit", "generate", str(model), "--prompts", str(asked), "--out", str(out)]
    command += [word for key, value in options.items() for word in (f"--{key.replace('_', '-')}", str(value))]
    for wanted in (1, 5):
        process = subprocess.Popen(
            [*command, "--device", "cpu", "--resume"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while process.poll() is None and kept(out) < wanted:
            time.sleep(0.002)
        process.kill()
        assert process.wait(60) == -signal.SIGKILL
    assert kept(out) < 12
    assert not out.exists()
    run(model, asked, out, resume=True, **options)
    assert out.read_bytes() == (tmp_path / "whole").read_bytes()
    assert Path(f"{out}.quantkit.json").read_bytes() == (tmp_path / "whole.quantkit.json").read_bytes()


# -- options and the command line ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"temperature": 0.0}, r"temperature=0\.0: give more than 0"),
        ({"temperature": float("inf")}, r"temperature=inf: give a number"),
        ({"top_p": 1.5}, r"top_p=1\.5: give at most 1"),
        ({"top_k": -1}, r"top_k=-1: give at least 0"),
        ({"num_beams": 0}, r"num_beams=0: give at least 1"),
        ({"max_new_tokens": 0}, r"max_new_tokens=0: give at least 1"),
        ({"repetition_penalty": 0.0}, r"repetition_penalty=0\.0: give more than 0"),
        ({"seed": -1}, r"seed=-1: give at least 0"),
        ({"batch_size": 0}, r"batch_size=0: give at least 1"),
        ({"dtype": "float16"}, r"dtype=float16 crawls on a CPU"),
        ({"base": "o/x"}, r"base and delta belong together"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], said: str, model: Path, prompts: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=said):
        run(model, prompts, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_chat_without_a_chat_template(make_model: MakeModel, prompts: Path, tmp_path: Path) -> None:
    folder = tmp_path / "plain"
    shutil.copytree(make_model("llama", dtype="float32"), folder)
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(UsageError, match=r"template chat: the tokenizer has no chat template"):
        run(folder, prompts, tmp_path / "out", template="chat")
    assert run(folder, prompts, tmp_path / "out").template == "vicuna"


def test_a_dry_run_reads_the_prompts_and_writes_nothing(model: Path, prompts: Path, tmp_path: Path) -> None:
    report = run(model, prompts, tmp_path / "out", dry_run=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["prompts.jsonl"]
    done = run(model, prompts, tmp_path / "out")
    assert (report.prompt_tokens, report.longest_prompt) == (done.prompt_tokens, done.longest_prompt)
    assert report.dry_run


@pytest.mark.parametrize("dry_run", [True, False])
def test_a_model_that_does_not_fit_in_is_told_before_it_is_loaded(
    dry_run: bool, model: Path, prompts: Path, tmp_path: Path, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quantkit.blocks.stream.free_budget", lambda device: Budget(1000))
    run(model, prompts, tmp_path / "out", dry_run=dry_run, progress=recorder)
    assert len(recorder.warnings) == 1
    said = r"the model is loaded whole, and tiny-llama takes [\d.]+ [kM]B in float32, where 1\.0 kB can be counted on"
    assert re.fullmatch(said, recorder.warnings[0])


def test_the_command(
    model: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def command(*options: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exit:
            cli.main(["generate", str(model), "--prompts", str(prompts), "--max-new-tokens", "12", *options])
        return int(exit.value.code or 0), *capsys.readouterr()

    code, out, err = command("--out", str(tmp_path / "one"), "--json")
    assert code == 0, err
    printed = json.loads(out)
    assert printed.keys() == run(model, prompts, tmp_path / "two").as_dict().keys()
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert "tiny-llama: prompts by template chat" in err
    code, out, _ = command("--out", str(tmp_path / "one"), "--force")
    assert (code, out.splitlines()[:2]) == (0, [f"wrote {tmp_path / 'one'}", "7 answers; 7 ended for want of room"])
    code, out, _ = command("--out", str(tmp_path / "three"), "--dry-run")
    assert (code, out[:22]) == (0, "would answer 7 prompts")

    answer, calls = Speaker.answer, []

    def interrupted(*given: Any) -> Any:
        calls.append(given)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return answer(*given)

    monkeypatch.setattr(Speaker, "answer", interrupted)
    code, out, err = command("--out", str(tmp_path / "four"), "--batch-size", "3")
    assert (code, out) == (1, "")
    assert "interrupted; --resume goes on with the answers that are in" in err
    assert kept(tmp_path / "four") == 3


def test_specs_say_which_field(make_model: MakeModel) -> None:
    with pytest.raises(UsageError, match=r"^--top-p 2: give at most 1$"):
        make(Decoding, top_p=2)
    defaults = Decoding()  # of WizardLM's script
    assert (defaults.temperature, defaults.top_p, defaults.top_k, defaults.num_beams) == (1.0, 0.95, 40, 1)
    assert (defaults.max_new_tokens, defaults.greedy) == (2048, False)


# -- GPTQModel's kernels ---------------------------------------------------------------------------------------------


def test_without_gptqmodel_a_folder_is_dequantized_and_that_is_said(
    model: Path, prompts: Path, tiny_tokens: TokenMatrix, tmp_path: Path, recorder: Recorder, monkeypatch: Any
) -> None:
    quantkit.gptq(model, tmp_path / "q", calibration=tiny_tokens, group_size=32, evaluate=False)
    monkeypatch.setattr("quantkit.blocks.whole.find_spec", lambda name: None)
    assert run(tmp_path / "q", prompts, tmp_path / "out", progress=recorder).kernels is None
    assert "q: dequantized; kernels need gptqmodel and optimum installed" in recorder.notes


def test_kernels_that_fail_are_done_without(
    model: Path, prompts: Path, tiny_tokens: TokenMatrix, tmp_path: Path, recorder: Recorder, monkeypatch: Any
) -> None:
    quantkit.gptq(model, tmp_path / "q", calibration=tiny_tokens, group_size=32, evaluate=False)
    run(tmp_path / "q", prompts, tmp_path / "without")
    monkeypatch.setattr("quantkit.blocks.whole.find_spec", lambda name: object())

    def failing(*given: Any, **options: Any) -> Any:
        raise RuntimeError("no kernel for this\nmore")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", failing)
    run(tmp_path / "q", prompts, tmp_path / "out", progress=recorder)
    assert recorder.warnings == ["q: dequantized, for GPTQModel does not run it: no kernel for this"]
    assert (tmp_path / "out").read_bytes() == (tmp_path / "without").read_bytes()


@pytest.mark.judges
@pytest.mark.timeout(900)
def test_gptqmodels_kernels_answer_as_dequantized_weights_do(
    make_model: MakeModel, tiny_tokens: TokenMatrix, tmp_path: Path
) -> None:
    python = judge_python(GPTQMODEL)
    model = make_model("llama", dtype="float32", intermediate_size=128)
    quantkit.gptq(model, tmp_path / "q", calibration=tiny_tokens, group_size=32, evaluate=False)
    asked = lines(tmp_path / "p.jsonl", PROMPTS)
    run(tmp_path / "q", asked, tmp_path / "ours", greedy=True)
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(quantkit.__file__).parents[1]),
        "GPTQMODEL_TORCH_EXTENSIONS_DIR": str(GPTQMODEL.home / "kernels"),
        "GPTQMODEL_CPU_WORKERS": "2",
        "TORCHDYNAMO_DISABLE": "1",
        "HF_HUB_OFFLINE": "1",
    }
    options = ["--prompts", str(asked), "--out", str(tmp_path / "theirs"), "--greedy", "--max-new-tokens", "12"]
    # What quantkit needs and the judge has not comes from here, after all that is the judge's own.
    ours = sysconfig.get_paths()["purelib"]
    code = f"import sys; sys.path.append({ours!r}); from quantkit.cli.app import main; main(sys.argv[1:])"
    done = subprocess.run(
        [str(python), "-c", code, "generate", str(tmp_path / "q"), *options, "--json", "--device", "cpu"],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=800,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout)
    assert re.search(r"Linear", report["kernels"]), done.stderr[-2000:]
    assert f"runs on GPTQModel's kernels ({report['kernels']})" in done.stderr
    assert by_id(tmp_path / "theirs") == by_id(tmp_path / "ours")
