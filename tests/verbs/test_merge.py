"""The verbs `merge` and `diff`, and a base with a delta as a source."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import subprocess
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeModel, Recorder, token_matrix
from hypothesis import given, settings
from hypothesis import strategies as st
from support.ggjt_models import LLAMA
from support.tolerance import summed
from support.wizard import EMBEDDING, HEAD, Tensors, changed, stored, tune, tune_with_pad, wizard
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoTokenizer

import quantkit
from quantkit.blocks import pair as module
from quantkit.blocks.pair import (
    DeltaSource,
    DiffSource,
    combined,
    row_mean,
)
from quantkit.cli import app as cli
from quantkit.containers.hf.shards import SafetensorsFiles
from quantkit.containers.hf.write import ShardedWriter
from quantkit.errors import (
    NumericError,
    OutputError,
    SourceError,
    UsageError,
)
from quantkit.sources import open_source

NORM = "model.norm.weight"
UP = "model.layers.1.mlp.up_proj.weight"
ROWS = 320
TOKENS = token_matrix(2, 12).tokens.long()


@pytest.fixture
def base(make_model: MakeModel) -> Path:
    return make_model("llama", dtype="float16")


@pytest.fixture
def tuned(base: Path, tmp_path: Path) -> Path:
    return changed(base, tmp_path / "tuned", tune)


@pytest.fixture
def padded(base: Path, tmp_path: Path) -> Path:
    """A tuned model with one more row of vocabulary."""
    return changed(base, tmp_path / "padded", tune_with_pad, vocab_size=ROWS + 1)


def same(one: Path, other: Path) -> None:
    ours, theirs = stored(one), stored(other)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name].dtype == theirs[name].dtype
        assert torch.equal(ours[name], theirs[name]), name


# -- there and back --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_a_delta_in_float32_gives_the_tuned_model_back_bit_for_bit(
    dtype: str, make_model: MakeModel, tmp_path: Path
) -> None:
    base = make_model("llama", dtype=dtype)
    tuned = changed(base, tmp_path / "tuned", tune)
    made = quantkit.diff(base, tuned, tmp_path / "delta")
    assert (made.dtype, made.values) == ("float32", sum(tensor.numel() for tensor in stored(tuned).values()))
    report = quantkit.merge(base, tmp_path / "delta", tmp_path / "out")
    assert report.dtype == dtype
    assert (
        report.sum == made.sum == pytest.approx(sum(float(t.double().sum()) for t in stored(tuned).values()), abs=1e-2)
    )
    if dtype == "float32":  # a change of another exponent than the value is rounded once
        assert made.largest_error == pytest.approx(0, abs=1e-6)
        assert made.differing is not None
        assert made.differing < made.values / 2
    else:
        same(tmp_path / "out", tuned)
        assert (made.differing, made.largest_error) == (0, 0.0)
    record = json.loads((tmp_path / "delta" / "quantkit.json").read_text())
    assert record["delta"]["tuned_dtype"] == dtype


@pytest.mark.parametrize("family", ["gpt2", "qwen3", "mixtral", "phi3", "gemma2"])
def test_other_families(family: str, make_model: MakeModel, tmp_path: Path) -> None:
    base = make_model(family, dtype="bfloat16")
    tuned = changed(base, tmp_path / "tuned", tune)
    quantkit.diff(base, tuned, tmp_path / "delta")
    quantkit.merge(base, tmp_path / "delta", tmp_path / "out")
    same(tmp_path / "out", tuned)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_how_far_a_delta_in_16_bits_is_off_is_measured_and_said(
    dtype: Any, base: Path, tuned: Path, tmp_path: Path, recorder: Recorder
) -> None:
    made = quantkit.diff(base, tuned, tmp_path / "delta", dtype=dtype, progress=recorder)
    quantkit.merge(base, tmp_path / "delta", tmp_path / "out", dtype="float32")
    quantkit.merge(base, tmp_path / "delta", tmp_path / "half")
    got, wanted = stored(tmp_path / "out"), stored(tuned)
    assert made.largest_error == max(float((got[n] - wanted[n].float()).abs().max()) for n in wanted) > 0
    assert made.differing == sum(int((t != wanted[n]).sum()) for n, t in stored(tmp_path / "half").items())
    assert (f"{made.differing} of {made.values} values come back otherwise" in "".join(recorder.notes)) == bool(
        made.differing
    )


_UNITS = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}


@given(
    st.sampled_from(list(_UNITS)),
    st.sampled_from(list(_UNITS)),
    st.lists(st.tuples(st.floats(-4, 4, width=16), st.floats(-4, 4, width=16)), min_size=1, max_size=64),
)
@settings(max_examples=300, deadline=None)
def test_the_sum_is_off_by_the_rounding_of_the_difference_alone(
    held: torch.dtype, kept: torch.dtype, pairs: list[tuple[float, float]]
) -> None:
    base, tuned = (torch.tensor(values).to(held) for values in zip(*pairs, strict=True))
    exact = tuned.double() - base.double()
    again = combined(base, combined(base, tuned, -1, False).to(kept), 1, False)
    # Half a unit of the change in the delta's type and in float32's difference, and of the sum; 2^-25 below float16's.
    bound = (
        exact.abs() * (_UNITS[kept] + 2.0**-24) + tuned.double().abs() * 2.0**-24 + 2.0**-25 * (kept == torch.float16)
    )
    assert bool(((again.double() - tuned.double()).abs() <= bound).all())
    if kept == torch.float32 and held == torch.float16 and max(map(abs, sum(pairs, ()))) <= 0.5:
        assert torch.equal(again.half(), tuned)
    if kept == torch.float32:  # to the last bit, unless the value is thousands of times smaller than it was
        near = (tuned.double().abs() * 2**12 >= base.double().abs()) & (tuned != 0)
        assert held == torch.float32 or torch.equal(again.to(held)[near], tuned[near])


@pytest.mark.numerics
@given(st.integers(1, 5), st.integers(0, 3), st.integers(1, 4), st.booleans(), st.sampled_from([1, -1]))
@settings(max_examples=60, deadline=None)
def test_slices_do_not_show(rows: int, more: int, columns: int, mean: bool, sign: int) -> None:
    base, other = torch.randn(rows, columns), torch.randn(rows + more, columns)
    fill = base.double().mean(0).float() if mean else torch.zeros(columns)
    wanted = other + sign * torch.cat([base, fill.expand(more, columns)])
    whole = combined(base, other, sign, mean)
    before, module._SLICE = module._SLICE, 3
    try:
        assert torch.equal(combined(base, other, sign, mean), whole)
        torch.testing.assert_close(row_mean(base), base.mean(0), **summed(rows, scale=float(base.abs().max())))
    finally:
        module._SLICE = before
    largest = float(base.abs().max() + other.abs().max())
    torch.testing.assert_close(whole, wanted, **summed(2, scale=largest))


# -- vocabularies ----------------------------------------------------------------------------------------------------


def test_a_row_more_under_either_convention(base: Path, padded: Path, tmp_path: Path, recorder: Recorder) -> None:
    for vocab in ("mean", "delta"):
        made = quantkit.diff(base, padded, tmp_path / vocab, vocab=vocab)  # type: ignore[arg-type]
        assert made.vocab == vocab
        report = quantkit.merge(base, tmp_path / vocab, tmp_path / f"{vocab}-out", progress=recorder)
        assert report.vocab == vocab  # as the record says
        same(tmp_path / f"{vocab}-out", padded)
    ours, wanted = stored(base), stored(padded)
    for name in (EMBEDDING, HEAD):
        assert torch.equal(stored(tmp_path / "delta")[name][-1], wanted[name][-1].float())
        mean = ours[name].double().mean(0).float()
        assert torch.equal(stored(tmp_path / "mean")[name][-1], wanted[name][-1].float() - mean)
    assert recorder.notes[0].startswith("321 rows of vocabulary on a base of 320: vocab=mean (the rows that the base")
    assert recorder.notes[0].endswith("as the delta's quantkit.json says")
    config = json.loads((tmp_path / "mean-out" / "config.json").read_text())
    assert config["vocab_size"] == ROWS + 1


@pytest.mark.parametrize("vocab", ["mean", "delta"])
def test_auto_finds_the_convention_of_another_programs_delta(
    vocab: Any, base: Path, padded: Path, tmp_path: Path, recorder: Recorder
) -> None:
    quantkit.diff(base, padded, tmp_path / "delta", vocab=vocab)
    (tmp_path / "delta" / "quantkit.json").unlink()
    report = quantkit.merge(base, tmp_path / "delta", tmp_path / "out", dtype="float16", progress=recorder)
    assert report.vocab == vocab
    assert f"vocab={vocab} (" in recorder.notes[0]
    other = "delta" if vocab == "mean" else "mean"
    assert f"times as long as that mean; the other convention is vocab={other}" in recorder.notes[0]
    same(tmp_path / "out", padded)
    quantkit.merge(base, tmp_path / "delta", tmp_path / "other", vocab=other, dtype="float16")  # type: ignore[arg-type]
    assert not torch.equal(stored(tmp_path / "other")[EMBEDDING][-1], stored(padded)[EMBEDDING][-1])


@pytest.mark.numerics
def test_alpacas_script_by_hand(base: Path, padded: Path, tmp_path: Path) -> None:
    """The published recipe, written down once more with transformers: resize, mean of the rows, add everything."""
    delta = changed(padded, tmp_path / "delta", lambda tensors: tune(tensors, 2))
    raw = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    raw.resize_token_embeddings(ROWS + 1, mean_resizing=False)
    for matrix in (raw.get_input_embeddings().weight.data, raw.get_output_embeddings().weight.data):
        matrix[-1:] = matrix[:-1].mean(0, keepdim=True)
    diff = stored(delta)
    wanted = {name: tensor + diff[name].float() for name, tensor in raw.state_dict().items()}
    report = quantkit.merge(base, delta, tmp_path / "out", vocab="mean", dtype="float32")
    found = stored(tmp_path / "out")
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():  # the mean is of all rows, in float32 there
        torch.testing.assert_close(found[name], tensor, **summed(ROWS, scale=float(tensor.abs().max())))
    assert report.sum == pytest.approx(float(sum(tensor.sum() for tensor in wanted.values())), abs=1e-2)


# -- what old and odd folders hold -----------------------------------------------------------------------------------


def test_rotary_frequencies_of_old_checkpoints_count_in_the_sum_but_are_not_written(
    base: Path, tuned: Path, tmp_path: Path
) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    quantkit.diff(base, tuned, tmp_path / "delta")
    plain = quantkit.merge(base, tmp_path / "delta", tmp_path / "plain")
    old = changed(base, tmp_path / "old", lambda tensors: tensors.update({name: torch.ones(8)}))
    one_sided = quantkit.merge(old, tmp_path / "delta", tmp_path / "one")
    delta = changed(tmp_path / "delta", tmp_path / "old-delta", lambda t: t.update({name: torch.zeros(8)}))
    both = quantkit.merge(old, delta, tmp_path / "both")
    assert plain.sum is not None
    assert (one_sided.sum, both.sum) == (plain.sum, pytest.approx(plain.sum + 8, abs=1e-3))
    for out in ("one", "both"):
        same(tmp_path / out, tmp_path / "plain")


def test_a_base_without_the_heads_prefix_and_in_bin_files(base: Path, tuned: Path, tmp_path: Path) -> None:
    quantkit.diff(base, tuned, tmp_path / "delta")
    (tmp_path / "old").mkdir()
    for path in base.glob("*.json"):
        shutil.copy(path, tmp_path / "old")
    tensors = {name.removeprefix("model."): tensor for name, tensor in stored(base).items()}
    torch.save(tensors, tmp_path / "old" / "pytorch_model.bin")
    quantkit.merge(tmp_path / "old", tmp_path / "delta", tmp_path / "out")
    same(tmp_path / "out", tuned)


def test_tied_embeddings(make_model: MakeModel, tmp_path: Path) -> None:
    base = make_model("llama", tied=True, dtype="bfloat16")
    tuned = changed(base, tmp_path / "tuned", tune)
    quantkit.diff(base, tuned, tmp_path / "delta")
    quantkit.merge(base, tmp_path / "delta", tmp_path / "out")
    assert HEAD not in stored(tmp_path / "out")
    same(tmp_path / "out", tuned)

    def untie(tensors: Tensors) -> None:
        tensors[HEAD] = tensors[EMBEDDING].clone()
        tune(tensors)

    untied = changed(base, tmp_path / "untied", untie, tie_word_embeddings=False)
    quantkit.diff(base, untied, tmp_path / "head")  # of a head that the base has as its embedding
    quantkit.merge(base, tmp_path / "head", tmp_path / "out2")
    same(tmp_path / "out2", untied)
    with pytest.raises(SourceError, match=rf"BASE has {HEAD}, which TUNED lacks: they are not of one model"):
        quantkit.diff(untied, tuned, tmp_path / "no")


def test_a_gguf_file_as_a_base(base: Path, tuned: Path, tmp_path: Path, tiny_gguf: Path) -> None:
    quantkit.ggml(base, tmp_path / "base.gguf", type="f16", pre="smollm")
    quantkit.diff(base, tuned, tmp_path / "delta")
    quantkit.merge(tmp_path / "base.gguf", tmp_path / "delta", tmp_path / "out")
    same(tmp_path / "out", tuned)
    with pytest.raises(SourceError, match=r"is stored as Q\w+ in BASE; sums and differences are of full-precision"):
        quantkit.merge(tiny_gguf, tmp_path / "delta", tmp_path / "no")


# -- what can go wrong -----------------------------------------------------------------------------------------------


def drop(tensors: Tensors) -> None:
    del tensors[UP]


def add(tensors: Tensors) -> None:
    tensors["model.layers.1.mlp.up_proj.bias"] = torch.zeros(96)


def narrow(tensors: Tensors) -> None:
    tensors[UP] = tensors[UP][:, :-1]


def count(tensors: Tensors) -> None:
    tensors[UP] = tensors[UP].to(torch.int32)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (drop, rf"BASE has {UP}, which DELTA lacks: they are not of one model"),
        (add, r"DELTA has model.layers.1.mlp.up_proj.bias, which BASE lacks"),
        (narrow, rf"{UP} is \[96, 64\] in BASE, \[96, 63\] in DELTA"),
        (count, rf"delta: holds quantized weights \({UP}\), but nothing says how they are to be read"),
    ],
)
def test_what_differs_is_named_before_anything_is_written(
    change: Callable[[Tensors], None], said: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    delta = changed(base, tmp_path / "delta", change)
    monkeypatch.setattr(ShardedWriter, "__init__", lambda *arguments: pytest.fail("a file was begun"))
    with pytest.raises(SourceError, match=said):
        quantkit.merge(base, delta, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["delta"]


def test_another_architecture_and_quantized_models(
    base: Path, make_model: MakeModel, tmp_path: Path, tiny_tokens: Any
) -> None:
    with pytest.raises(SourceError, match="BASE tiny-llama is a llama model, DELTA tiny-qwen2 qwen2"):
        quantkit.merge(base, make_model("qwen2"), tmp_path / "out")
    quantkit.gptq(base, tmp_path / "gptq", calibration=tiny_tokens, device="cpu", evaluate=False, group_size=32)
    with pytest.raises(SourceError, match="BASE gptq is quantized; give the full-precision model"):
        quantkit.merge(tmp_path / "gptq", base, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_base_and_delta_swapped(base: Path, tuned: Path, padded: Path, tmp_path: Path, recorder: Recorder) -> None:
    quantkit.diff(base, tuned, tmp_path / "delta")
    with pytest.raises(SourceError, match=r"is itself a delta, by its quantkit.json; are BASE and DELTA swapped\?"):
        quantkit.merge(tmp_path / "delta", base, tmp_path / "out")
    (tmp_path / "delta" / "quantkit.json").unlink()
    quantkit.merge(base, tmp_path / "delta", tmp_path / "fine", progress=recorder)
    assert recorder.warnings == []
    for number, pair in enumerate([(tmp_path / "delta", base), (base, tuned)]):  # and a model that is no delta
        quantkit.merge(*pair, tmp_path / f"out{number}", progress=recorder, dry_run=True)
        assert "it may be a whole model, or the two are swapped" in recorder.warnings.pop()
    with pytest.raises(SourceError, match=rf"BASE has 321 rows of {EMBEDDING}, TUNED only 320"):
        quantkit.diff(padded, base, tmp_path / "out")


def test_a_sum_beyond_float16_is_named(base: Path, tmp_path: Path) -> None:
    def zero(tensors: Tensors) -> None:
        for tensor in tensors.values():
            tensor.zero_()

    def large(tensors: Tensors) -> None:
        zero(tensors)
        tensors[UP][3, 5] = 65504.0

    big = changed(base, tmp_path / "big", large)
    with pytest.raises(NumericError, match=rf"{UP}: a value is beyond float16; use dtype=bfloat16 or float32"):
        quantkit.merge(big, big, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    quantkit.merge(big, big, tmp_path / "out", dtype="float32")
    assert stored(tmp_path / "out")[UP][3, 5] == 2 * 65504.0


def test_another_sum_than_expected_leaves_nothing(
    base: Path, tuned: Path, make_model: MakeModel, tmp_path: Path, recorder: Recorder
) -> None:
    made = quantkit.diff(base, tuned, tmp_path / "delta")
    assert made.sum is not None
    names = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(NumericError, match=rf"add up to {made.sum:.4f}, not to {made.sum + 0.1:.4f}: another base or"):
        quantkit.merge(base, tmp_path / "delta", tmp_path / "out", expect_sum=made.sum + 0.1)
    with pytest.raises(NumericError, match="another base or delta"):
        quantkit.diff(base, tuned, tmp_path / "out", expect_sum=-made.sum - 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    quantkit.merge(base, tmp_path / "delta", tmp_path / "out", expect_sum=made.sum + 0.005, progress=recorder)
    assert recorder.warnings == []
    quantkit.merge(make_model("llama", seed=5), tmp_path / "delta", tmp_path / "wrong", progress=recorder)
    assert recorder.warnings[-1].endswith(f"the delta's quantkit.json says {made.sum:.4f}: is BASE another one?")


def test_options_and_outputs_that_cannot_be(base: Path, tuned: Path, tmp_path: Path) -> None:
    quantkit.diff(base, tuned, tmp_path / "delta")
    copy = shutil.copytree(base, tmp_path / "copy")
    for out, options, said in (
        (copy / "out", {}, "lies inside the source"),
        (tmp_path / "delta" / "out", {}, "lies inside the source"),
        (tmp_path, {"force": True}, "contains the source"),
        (copy, {"force": True}, "is the source itself"),
        (tmp_path / "out", {"vocab": "zeros"}, "vocab=zeros: choose auto, mean, delta"),
        (tmp_path / "out", {"dtype": "int8"}, "dtype=int8: choose auto, float16"),
        (tmp_path / "out", {"expect_sum": float("nan")}, "expect_sum=nan: give a number"),
        (tmp_path / "out", {"max_shard_size": "none"}, "max_shard_size=none"),
        (tmp_path / "out", {"base_revision": "main"}, "base_revision is for Hub ids"),
        (tmp_path / "out", {"revision": "main"}, "revision is for Hub ids"),
    ):
        with pytest.raises(UsageError, match=said):
            quantkit.merge(copy, tmp_path / "delta", out, **options)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_a_full_disk_leaves_nothing(base: Path, tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: ShardedWriter, name: str, tensor: torch.Tensor) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(ShardedWriter, "write", full)
    for verb in (quantkit.merge, quantkit.diff):
        with pytest.raises(OutputError, match="No space left on device; nothing was left there"):
            verb(base, tuned, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["tuned"]


def test_a_record_of_something_else_is_passed_over(base: Path, padded: Path, tmp_path: Path) -> None:
    quantkit.diff(base, padded, tmp_path / "delta")
    (tmp_path / "delta" / "quantkit.json").write_text("{}")
    assert quantkit.merge(base, tmp_path / "delta", tmp_path / "out").dtype == "float32"


@pytest.mark.parametrize(
    ("record", "why"),
    [
        ("[]", "holds no JSON object"),
        ('{"delta": 3}', "delta is 3, not an object; the record is damaged"),
        ('{"delta": {"vocab": "mean", "tuned_dtype": []}}', r"delta\.tuned_dtype is \[\], which is of another type"),
    ],
)
def test_a_damaged_record_is_told(record: str, why: str, base: Path, padded: Path, tmp_path: Path) -> None:
    quantkit.diff(base, padded, tmp_path / "delta")
    (tmp_path / "delta" / "quantkit.json").write_text(record)
    with pytest.raises(SourceError, match=rf"quantkit\.json: {why}"):
        quantkit.merge(base, tmp_path / "delta", tmp_path / "no")


# -- memory ----------------------------------------------------------------------------------------------------------


class Meter(TorchDispatchMode):
    """The most bytes that tensors held at once, of all tensors that an operation took or gave."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, tuple[int, Any]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in [*args, *(kwargs or {}).values(), result]:
            if isinstance(tensor, torch.Tensor) and not tensor.is_meta:
                self.alive[id(tensor)] = (tensor.untyped_storage().nbytes(), weakref.ref(tensor))
        self.alive = {key: entry for key, entry in self.alive.items() if entry[1]() is not None}
        storages = {entry[1]().untyped_storage().data_ptr(): entry[0] for entry in self.alive.values()}
        self.peak = max(self.peak, sum(storages.values()))
        return result


def test_two_tensors_and_one_result_are_in_memory(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_model("llama", dtype="float32", num_hidden_layers=6)
    tuned = changed(base, tmp_path / "tuned", tune)
    monkeypatch.setattr(module, "_SLICE", 256)
    for verb_module in ("merge", "diff"):
        monkeypatch.setattr(f"quantkit.verbs.{verb_module}.SLICE", 256)
    largest = max(tensor.nbytes for tensor in stored(base).values())
    whole = sum(tensor.nbytes for tensor in stored(base).values())
    for verb, other, out in ((quantkit.diff, tuned, "delta"), (quantkit.merge, tmp_path / "delta", "out")):
        with Meter() as meter:
            verb(base, other, tmp_path / out)
        assert largest * 2 < meter.peak < largest * 3 + 20_000 < whole / 2


def test_files_are_read_one_tensor_at_a_time(
    base: Path, tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[Any] = []
    most = 0
    original = SafetensorsFiles.read

    def read(self: SafetensorsFiles, name: str) -> torch.Tensor:
        nonlocal most
        tensor = original(self, name)
        alive.append(weakref.ref(tensor))
        most = max(most, sum(reference() is not None for reference in alive))
        return tensor

    monkeypatch.setattr(SafetensorsFiles, "read", read)
    quantkit.diff(base, tuned, tmp_path / "delta")
    quantkit.merge(base, tmp_path / "delta", tmp_path / "out")
    assert most == 2


# -- what is beside the weights --------------------------------------------------------------------------------------


def test_everything_else_is_the_deltas(base: Path, tuned: Path, tmp_path: Path) -> None:
    (tuned / "generation_config.json").write_text('{"temperature": 0.7, "_name_or_path": "/home/me"}')
    quantkit.diff(base, tuned, tmp_path / "my-delta", max_shard_size="100KB")
    quantkit.merge(base, tmp_path / "my-delta", tmp_path / "out")
    for folder in (tmp_path / "my-delta", tmp_path / "out"):
        assert json.loads((folder / "generation_config.json").read_text()) == {"temperature": 0.7}
        assert (folder / "tokenizer.json").read_bytes() == (tuned / "tokenizer.json").read_bytes()
        record = json.loads((folder / "quantkit.json").read_text())
        files = {path.name for path in folder.iterdir()} - {"SHA256SUMS", "quantkit.json"}
        assert record["files"].keys() == files
        for name, checksum in record["files"].items():
            assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == checksum
        checked = subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=folder, capture_output=True)
        assert checked.returncode == 0, checked.stderr
        assert len(checked.stdout.splitlines()) == len(files) + 1
        assert str(tmp_path) not in json.dumps(record)
    assert len(list((tmp_path / "my-delta").glob("*.safetensors"))) > 2
    source = json.loads((tmp_path / "out" / "quantkit.json").read_text())["source"]
    assert (source["model"], source["kind"]) == ("my", "delta")
    assert (source["base"]["model"], source["delta"]["model"]) == ("tiny-llama", "my-delta")
    assert source["base"]["sha256"].keys() == {"model.safetensors"}


def test_the_same_run_gives_the_same_bytes(base: Path, tuned: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        quantkit.diff(base, tuned, tmp_path / name)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name


# -- as a source -----------------------------------------------------------------------------------------------------


def test_gptq_of_a_base_and_a_delta_is_gptq_of_the_merged_model(
    base: Path, padded: Path, tmp_path: Path, tiny_tokens: Any
) -> None:
    options: dict[str, Any] = {"calibration": tiny_tokens, "device": "cpu", "evaluate": False, "group_size": 32}
    quantkit.diff(base, padded, tmp_path / "delta")
    quantkit.merge(base, tmp_path / "delta", tmp_path / "merged")
    quantkit.gptq(out=tmp_path / "pair", base=base, delta=tmp_path / "delta", **options)
    quantkit.gptq(tmp_path / "merged", tmp_path / "one", **options)
    same(tmp_path / "pair", tmp_path / "one")
    record = json.loads((tmp_path / "pair" / "quantkit.json").read_text())["source"]
    assert record["base"]["sha256"].keys() == record["delta"]["sha256"].keys() == {"model.safetensors"}
    assert record["vocab"] == "delta"
    for given_, said in (
        ({"base": base}, "base and delta belong together"),
        ({"delta": base}, "base and delta belong together"),
        ({"model": base, "base": base, "delta": padded}, "is a model already"),
    ):
        with pytest.raises(UsageError, match=said):
            quantkit.gptq(out=tmp_path / "no", **given_, **options)
    with pytest.raises(UsageError, match="contains the source"):
        quantkit.gptq(out=base.parent, base=base, delta=tmp_path / "delta", force=True, **options)


def test_files_for_llama_cpp_of_a_base_and_a_delta(base: Path, tuned: Path, tmp_path: Path, tiny_tokens: Any) -> None:
    quantkit.diff(base, tuned, tmp_path / "my-delta")
    quantkit.merge(base, tmp_path / "my-delta", tmp_path / "my")
    pair: dict[str, Any] = {"base": base, "delta": tmp_path / "my-delta"}
    quantkit.ggml(out=tmp_path / "pair.gguf", type="q8_0", pre="smollm", **pair)
    quantkit.ggml(tmp_path / "my", tmp_path / "one.gguf", type="q8_0", pre="smollm")
    assert (tmp_path / "pair.gguf").read_bytes() == (tmp_path / "one.gguf").read_bytes()
    quantkit.imatrix(out=tmp_path / "pair.imatrix", calibration=tiny_tokens, device="cpu", **pair)
    quantkit.imatrix(tmp_path / "my", tmp_path / "one.imatrix", calibration=tiny_tokens, device="cpu")
    assert (tmp_path / "pair.imatrix").read_bytes() == (tmp_path / "one.imatrix").read_bytes()
    with pytest.raises(UsageError, match="no MODEL given: name one, or base and delta"):
        quantkit.ggml()
    quantkit.ggml(base, tmp_path / "base.gguf", type="f16", pre="smollm")
    with pytest.raises(UsageError, match=r"base\.gguf already exists; name another"):
        quantkit.ggml(out=tmp_path / "base.gguf", base=tmp_path / "base.gguf", delta=tmp_path / "my-delta", force=True)


def test_the_wizardlm_recipe_with_a_sentencepiece_vocabulary(tmp_path: Path) -> None:
    """Base and delta with the extra [PAD], as of Alpaca's script: merged, and to ggjt, with and without merging."""
    base, tuned, delta = wizard(tmp_path)
    rows = len(LLAMA["tokens"]) + 1
    report = quantkit.merge(base, delta, tmp_path / "merged", dtype="float16")
    assert report.vocab == "mean"
    same(tmp_path / "merged", tuned)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").convert_tokens_to_ids("[PAD]") == rows - 1
    for kind in ("q4_0", "q8_0"):
        options: dict[str, Any] = {"type": kind, "container": "ggjt"}
        quantkit.ggml(tmp_path / "merged", tmp_path / "merged.bin", force=True, **options)
        quantkit.ggml(out=tmp_path / "pair.bin", base=base, delta=delta, force=True, **options)
        assert (tmp_path / "pair.bin").read_bytes() == (tmp_path / "merged.bin").read_bytes()
        assert open_source(tmp_path / "pair.bin").tensors[EMBEDDING].shape[0] == rows


def test_a_delta_taken_for_a_model_is_said(base: Path, tuned: Path, tmp_path: Path, recorder: Recorder) -> None:
    quantkit.diff(base, tuned, tmp_path / "delta")
    quantkit.convert(tmp_path / "delta", tmp_path / "out", dry_run=True, progress=recorder)
    assert recorder.warnings == [
        "delta is a delta, no model of its own: give it as --delta, with its --base, or merge it"
    ]


def test_a_pair_holds_what_both_hold(base: Path, tuned: Path) -> None:
    pair = DeltaSource(open_source(base), open_source(tuned))
    plain = open_source(base)
    assert {name: info.shape for name, info in pair.tensors.items()} == {n: i.shape for n, i in plain.tensors.items()}
    assert {info.stored_as for info in pair.tensors.values()} == {"F32"}
    assert pair.vocab is None
    assert pair.dtype == torch.float16
    assert (
        DiffSource(open_source(base), open_source(tuned)).read(NORM)
        == stored(tuned)[NORM].float() - stored(base)[NORM].float()
    ).all()


# -- the command line ------------------------------------------------------------------------------------------------


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return int(exit.value.code or 0), captured.out, captured.err


def test_what_the_commands_say(base: Path, padded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    delta, out = tmp_path / "delta", tmp_path / "out"
    code, said, _ = run(capsys, "diff", base, padded, "--out", delta, "--dry-run", "--json", "--quiet")
    assert code == 0
    assert not delta.exists()
    assert json.loads(said)["differing"] is None
    code, said, err = run(capsys, "diff", base, padded, "--out", delta)
    assert code == 0
    assert said.startswith(f"wrote {delta}\n21 tensors in float32, ")
    assert "\nmerging gives all of " in said
    assert "subtracting: 21/21" in err
    assert "merging again: 21/21" in err
    expected = said.strip().rpartition(" ")[2]
    code, said, err = run(capsys, "merge", base, delta, "--out", out, "--expect-sum", expected)
    assert code == 0
    assert said.startswith(f"wrote {out}\n21 tensors in float16, ")
    assert f"\nall values add up to {expected}" in said
    assert err.startswith("321 rows of vocabulary on a base of 320: --vocab delta")
    code, said, err = run(capsys, "merge", base, delta, "--out", out, "--force", "--expect-sum", "1", "--quiet")
    assert (code, said, err.count("\n")) == (1, "", 1)
    same(out, padded)  # what was there before
    code, said, err = run(capsys, "merge", base, delta, "--quiet")
    assert code == 2
    assert "--out" in err
    code, said, err = run(capsys, "gptq", "--base", base, "--quiet")
    assert (code, err) == (2, "error: --base and --delta belong together: a model is their sum\n")


def test_a_delta_without_a_tokenizer_takes_the_bases(
    base: Path, tuned: Path, padded: Path, tmp_path: Path, recorder: Recorder
) -> None:
    for name, other in (("same", tuned), ("larger", padded)):
        quantkit.diff(base, other, tmp_path / f"{name}-delta")
        for path in (tmp_path / f"{name}-delta").iterdir():
            if "token" in path.name:
                path.unlink()
        quantkit.merge(base, tmp_path / f"{name}-delta", tmp_path / name, progress=recorder)
    assert f"same-delta has no tokenizer: {base.name}'s is taken" in recorder.notes
    assert f"larger-delta has no tokenizer, and {base.name} none for as many tokens: what is made has none" in (
        recorder.notes
    )
    assert (tmp_path / "same" / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    assert not list((tmp_path / "larger").glob("tokenizer*"))
