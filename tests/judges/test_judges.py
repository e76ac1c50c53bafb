"""GPTQModel and AutoGPTQ read what we write, and we read what they write (`make judges`)."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import FAMILIES, MakeModel, token_matrix
from safetensors.torch import load_file, save_file
from support.judge_cases import BITS, OURS, READERS, THEIRS, Container, Reason, Theirs, why_not_ours, why_not_theirs
from support.judge_env import PROGRAMS, Judge, JudgeError, judge_python
from support.judge_matrix import Cell, Key, Matrix
from support.smollm2 import smollm2_checkpoint, smollm2_gguf
from support.streamed import greedy, open_stream, open_writer, streamed_logits

import quantkit
from quantkit.codes import QuantizedLinear, contiguous_groups
from quantkit.codes.packing import packing_multiple
from quantkit.containers.gptq.read import GptqSource
from quantkit.errors import QuantkitError
from quantkit.options import QuantSpec
from quantkit.sources import open_source
from quantkit.tokens import TokenMatrix

pytestmark = [pytest.mark.judges, pytest.mark.timeout(1200)]

IDS = token_matrix(2, 24, seed=5).tokens
# Largest difference of logits that counts as the same, in standard deviations of the logits: float32 and no more.
TOLERANCE = 1e-4

AskJudge = Callable[[str], Judge]


@pytest.fixture(scope="session")
def judge() -> Iterator[AskJudge]:
    """judge(reader): one process each, for the whole session. Skips the test where its environment is missing.

    transformers has a process of its own: GPTQModel's loader replaces classes of transformers for good.
    """
    running: dict[str, Judge] = {}

    def get(reader: str) -> Judge:
        program = PROGRAMS[READERS[reader][0]]
        judge_python(program)
        if reader not in running:
            running[reader] = Judge(program)
        return running[reader]

    yield get
    for one in running.values():
        one.close()


@pytest.fixture(scope="session")
def matrix() -> Iterator[Matrix]:
    """Collects the cells of docs/judges.md; writes it at the end when QUANTKIT_WRITE_MATRIX is set."""
    cells = Matrix()
    yield cells
    if os.environ.get("QUANTKIT_WRITE_MATRIX"):
        cells.write()


@pytest.fixture(scope="session")
def quantized(
    make_model: MakeModel, tiny_tokens: TokenMatrix, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, Container], Path]:
    """quantized(family, container): the folder that quantkit makes of a family's tiny model, made once."""
    made: dict[tuple[str, Container], Path] = {}

    def make(family: str, container: Container) -> Path:
        if (family, container) not in made:
            out = tmp_path_factory.mktemp("quantized") / f"{family}-gptq"
            quantkit.gptq(make_model(family), out, calibration=tiny_tokens, evaluate=False, **container.options())
            made[family, container] = out
        return made[family, container]

    return make


def _difference(judge: AskJudge, reader: str, folder: Path) -> Cell:
    """Our reader's logits of a folder against another's, which must find as many quantized Linears there."""
    theirs, _, info = judge(reader).logits(folder, IDS, **READERS[reader][1])
    stored, made = len(list(GptqSource(folder).quantized_names())), info["quantized_linears"]
    if made != stored:
        raise JudgeError(f"{reader} made {made} of {stored} Linears quantized")
    ours = streamed_logits(open_stream(folder), [IDS])[0]
    return Cell(float((ours - theirs).abs().max()), float(ours.std()))


def _same(cell: Cell) -> bool:
    assert cell.difference is not None
    assert cell.spread is not None
    return cell.difference < TOLERANCE * cell.spread


def _hold(cell: Cell) -> None:
    assert _same(cell), f"logits differ by {cell.difference:.2g}; their deviation is {cell.spread:.2g}"


def _expect(matrix: Matrix, key: Key, reason: Reason | None, ask: Callable[[], Cell]) -> None:
    """Record what `ask` measures, or that it fails for the reason that is known; anything else fails the test."""
    try:
        cell = ask()
    except (JudgeError, QuantkitError) as error:
        if reason is None or reason.says is None or not re.search(reason.says, str(error)):
            raise
        cell = Cell(reason=reason.why)
    else:
        if reason is None:
            _hold(cell)
        else:
            assert reason.says is None, f"this works now; the reason can go: {reason.why}"
            assert not _same(cell), f"this works now; the reason can go: {reason.why}"
            cell = Cell(spread=cell.spread, reason=reason.why)
    matrix.record(key, cell)
    assert not matrix.regressed(key), "docs/judges.md has a number here"


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(("family", "container"), OURS, ids=str)
def test_the_judge_gives_our_readers_logits(
    reader: str,
    family: str,
    container: Container,
    judge: AskJudge,
    matrix: Matrix,
    quantized: Callable[[str, Container], Path],
) -> None:
    judge(reader)
    folder = quantized(family, container)
    reason = why_not_ours(reader, family, container)
    _expect(matrix, (family, str(container), reader), reason, lambda: _difference(judge, reader, folder))


@pytest.mark.parametrize(("family", "written"), THEIRS, ids=str)
def test_our_reader_gives_the_logits_of_what_the_judge_wrote(
    family: str,
    written: Theirs,
    judge: AskJudge,
    matrix: Matrix,
    make_model: MakeModel,
    tiny_tokens: TokenMatrix,
    tmp_path: Path,
) -> None:
    one = judge(written.writer)
    model = make_model(family)

    def ask() -> Cell:
        one.quantize(model, tmp_path / "out", tiny_tokens.tokens, **written.options())
        return _difference(judge, written.read_by(family), tmp_path / "out")

    _expect(matrix, (family, f"{written} *", written.writer), why_not_theirs(family, written), ask)


def _every_zero(rows: int, columns: int, bits: int, start: int) -> QuantizedLinear:
    """Codes whose zeros run through 1 .. 2**bits - 1, by another way at each position of a packed word."""
    top, per_word, groups = 2**bits - 1, packing_multiple(bits), columns // 32
    row, group = torch.arange(rows)[:, None], torch.arange(groups)[None]
    zeros = 1 + (start + row // per_word * groups + group + 5 * (row % per_word)) % top
    codes = torch.arange(rows * columns).reshape(rows, columns) % (top + 1)
    scales = torch.full((rows, groups), 0.5, dtype=torch.float16)
    return QuantizedLinear(codes.to(torch.uint8), scales, zeros.to(torch.uint8), contiguous_groups(columns, 32), bits)


@pytest.mark.parametrize("act_order", ["static", "dynamic"])
@pytest.mark.parametrize("bits", BITS)
def test_autogptq_unpacks_v1_zeros_of_every_value_at_every_position(
    bits: int, act_order: str, judge: AskJudge, make_model: MakeModel, tmp_path: Path
) -> None:
    """AutoGPTQ's own arithmetic on the words we write; it has one for files with desc_act and one for those without."""
    one = judge("AutoGPTQ")
    spec = QuantSpec(bits=bits, group_size=32, sym=False, act_order=act_order)
    # Wide enough for 255 zeros at each of the four positions of an 8-bit word.
    model = make_model("llama", num_hidden_layers=1, intermediate_size=1056)
    writer, plan = open_writer(tmp_path, model, spec)
    top, per_word = 2**bits - 1, packing_multiple(bits)
    given, seen = {}, set()
    with writer:
        for start, (module, linear) in enumerate(plan.items()):
            given[module] = _every_zero(*linear.shape, bits, start)
            seen |= {(row % per_word, int(z)) for row, line in enumerate(given[module].zeros) for z in line}
            writer.add_linear(module, given[module])
        writer.add_others()
        writer.finish()
    assert seen == {(position, value) for position in range(per_word) for value in range(1, top + 1)}
    theirs = one.weights(tmp_path)
    reader = GptqSource(tmp_path)
    for module, linear in given.items():
        assert torch.equal(reader.read_codes(module).zeros, linear.zeros)
        assert torch.equal(theirs[module], linear.dequantize())


@pytest.fixture(scope="session")
def lopsided(make_model: MakeModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with rows of positive weights only, which an asymmetric grid with its end at 0 gives a zero of 0."""
    folder = tmp_path_factory.mktemp("lopsided") / "tiny-llama"
    shutil.copytree(make_model("llama"), folder)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if "v_proj" in name or "k_proj" in name:
            tensor[::3] = tensor[::3].abs()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("writer", "format"),
    [
        ("GPTQModel", "gptq"),  # which subtracts 1 from whole words: a zero of 0 borrows from its neighbour
        ("GPTQModel", "gptq_v2"),
        ("AutoGPTQ", None),
    ],
)
@pytest.mark.parametrize("bits", BITS)
def test_zeros_of_zero_are_read_as_their_writer_reads_them(
    bits: int,
    writer: str,
    format: str | None,
    judge: AskJudge,
    lopsided: Path,
    tiny_tokens: TokenMatrix,
    tmp_path: Path,
) -> None:
    """v1 has no place for them, but GPTQModel and AutoGPTQ write them there."""
    options = Theirs(writer, bits, sym=False).options() | ({"format": format} if format else {})
    judge(writer).quantize(lopsided, tmp_path / "out", tiny_tokens.tokens, **options)
    _hold(_difference(judge, writer, tmp_path / "out"))


@pytest.mark.parametrize("untie", [True, False])
def test_autogptq_reads_a_tied_model_only_untied(
    untie: bool, judge: AskJudge, make_model: MakeModel, tiny_tokens: TokenMatrix, tmp_path: Path
) -> None:
    judge("AutoGPTQ")
    model = make_model("llama", tied=True)
    quantkit.gptq(model, tmp_path / "out", calibration=tiny_tokens, evaluate=False, untie=untie, group_size=32)
    _hold(_difference(judge, "transformers", tmp_path / "out"))
    if untie:
        _hold(_difference(judge, "AutoGPTQ", tmp_path / "out"))
    else:  # it finds no head in the file and takes what lies in memory
        assert not _same(_difference(judge, "AutoGPTQ", tmp_path / "out"))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_reader_writes_the_tokens_that_ours_does(
    family: str, judge: AskJudge, quantized: Callable[[str, Container], Path]
) -> None:
    """Eight greedy tokens, by transformers where it loads the family, else by GPTQModel or AutoGPTQ."""
    reader = next((reader for reader in READERS if why_not_ours(reader, family, Container()) is None), None)
    assert reader is not None, "no judge reads this family"
    folder = quantized(family, Container())
    _, generated, _ = judge(reader).logits(folder, IDS[:1], generate=8, **READERS[reader][1])
    assert len(generated) > 0
    assert generated == greedy(folder, IDS[0].tolist(), 8)[: len(generated)]


@pytest.mark.e2e
def test_smollm2_loads_in_transformers_and_writes_as_our_reader_does(judge: AskJudge, tmp_path: Path) -> None:
    one = judge("transformers")
    checkpoint = smollm2_checkpoint(tmp_path)
    tokenizer = open_source(checkpoint).tokenizer()
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]

    # The backend that a user gets, rounding as it does for a user.
    try:
        theirs, generated, info = one.logits(checkpoint, [ids], 500, generate=12, backend="auto", exact=False)
    except JudgeError as refused:  # what it takes where the processor has AVX-512's bfloat16; docs/verify.md tells
        if not re.search(r"TorchCpuAvx512Linear.*576 must be divisible by `group_size: 128`", str(refused)):
            raise
        theirs, generated, info = one.logits(checkpoint, [ids], 500, generate=12, exact=False)
    ours = streamed_logits(open_stream(checkpoint), [torch.tensor([ids])])[0]
    assert info["quantized_linears"] == 30 * 7
    # GPTQModel rounds the weights, or with some kernels the activations too, to half precision.
    ours, theirs = torch.log_softmax(ours, -1), torch.log_softmax(theirs, -1)
    assert float((ours.exp() * (ours - theirs)).sum(-1).mean()) < 2e-3

    # What it says are our reader's first choices, or as good but for that rounding; the source says Paris, four bits
    # by few tokens need not.
    logits = streamed_logits(open_stream(checkpoint), [torch.tensor([[*ids, *generated]])])[0]
    choices = logits.reshape(-1, logits.shape[-1])[len(ids) - 1 : -1]
    chosen = choices.gather(1, torch.tensor(generated)[:, None])[:, 0]
    assert float((choices.amax(dim=1) - chosen).max()) < 0.25
    assert "Paris" in tokenizer.decode(greedy(smollm2_gguf(), ids, 12), skip_special_tokens=True)
