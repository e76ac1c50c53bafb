"""`quantkit imatrix` and the reader of both forms, against sums over transformers' own model."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from conftest import MakeModel, Recorder, token_matrix
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support.imatrix_files import CASES, tiny
from support.streamed import open_stream
from support.tolerance import longest_path, summed
from transformers import AutoModelForCausalLM

import quantkit
from quantkit.blocks.stages import run_watched
from quantkit.containers.gguf.file import GgufFile
from quantkit.containers.imatrix import Entry, Imatrix, read_imatrix, write_imatrix
from quantkit.errors import (
    NumericError,
    OutputError,
    SourceError,
    UsageError,
)
from quantkit.progress import SILENT
from quantkit.quantize.token_weights import weigh_tokens
from quantkit.runs.outputs import staged_files
from quantkit.tokens import TokenMatrix

# Parts of a GGUF file's names -> parts of transformers' names.
PARTS = {
    **{"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj"},
    **{"attn_qkv": "self_attn.qkv_proj", "attn_output": "self_attn.o_proj"},
    **{"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"},
}


def made(make_model: MakeModel, tokens: TokenMatrix, out: Path, case: str = "llama", **options: Any) -> Path:
    quantkit.imatrix(tiny(make_model, case), out, calibration=tokens, device="cpu", **options)
    return out


@torch.inference_mode()
def reference(folder: Path, tokens: torch.Tensor) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Sums [experts or 1, columns] and counts [experts or 1, 1] in float64, of transformers' own model in float64."""
    # The fused kernels of experts know no float64.
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, experts_implementation="eager")
    found: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def dense(name: str) -> Callable[..., None]:
        return lambda module, x: found.__setitem__(name, squares([x[0].flatten(0, -2)]))

    def experts(block: int) -> Callable[..., None]:
        def hook(module: Any, x: tuple[torch.Tensor, ...]) -> None:
            hidden, chosen = x[0], x[1]
            routed = [hidden[(chosen == expert).any(-1)] for expert in range(len(module.down_proj))]
            inner = []
            for h, gate_up in zip(routed, module.gate_up_proj, strict=True):
                gate, up = (h @ gate_up.T).chunk(2, -1)
                inner.append(torch.nn.functional.silu(gate) * up)
            for part, inputs in {"gate": routed, "up": routed, "down": inner}.items():
                found[f"blk.{block}.ffn_{part}_exps.weight"] = squares(inputs)

        return hook

    for block, layer in enumerate(model.model.layers):
        for ours, theirs in PARTS.items():
            theirs = "mlp.gate_up_proj" if ours == "ffn_up" and model.config.model_type == "phi3" else theirs
            with suppress(AttributeError):
                layer.get_submodule(theirs).register_forward_pre_hook(dense(f"blk.{block}.{ours}.weight"))
        if hasattr(layer.mlp, "experts"):
            layer.mlp.experts.register_forward_pre_hook(experts(block))
    model(input_ids=tokens)
    return found


def squares(inputs: list[torch.Tensor]) -> tuple[np.ndarray, np.ndarray]:
    return (
        torch.stack([x.square().sum(0) for x in inputs]).numpy(),
        np.array([[len(x)] for x in inputs], dtype=np.float64),
    )


def of_squares(tokens: TokenMatrix, sums: np.ndarray) -> dict[str, float]:
    """Tolerances of sums over all tokens beside float64's: that only one side is rounded makes up for the squares."""
    windows, length = tokens.tokens.shape
    return summed(windows * length + longest_path(length), scale=float(sums.mean()))


def stored_rows(path: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    """A file's sums and counts as `reference` has them; llama.cpp stores a single row as a vector."""
    stored = GgufFile(path)
    sums, counts = stored.values(f"{name}.in_sum2"), stored.values(f"{name}.counts")
    assert sums.ndim == counts.ndim == (2 if "_exps" in name else 1), name
    return np.atleast_2d(sums), counts.reshape(-1, 1)


def dat(entries: dict[str, tuple[int, list[float]]], tail: bytes = b"") -> bytes:
    """A file of the older form: per name the calls, and the values."""
    data = struct.pack("<i", len(entries))
    for name, (calls, values) in entries.items():
        label = name.encode()
        data += struct.pack("<i", len(label)) + label + struct.pack(f"<2i{len(values)}f", calls, len(values), *values)
    return data + tail


DAT = dat(
    {"blk.0.attn_q.weight": (4, [2.0, 0.0, 6.0]), "blk.0.ffn_down.weight": (0, [1.0, 0.5])},
    struct.pack("<2i", 7, 8) + b"wiki.raw",
)


# -- what is collected -----------------------------------------------------------------------------------------------


@pytest.mark.numerics
@pytest.mark.parametrize("case", CASES)
def test_sums_and_counts_are_those_of_transformers_own_model(case: str, make_model: MakeModel, tmp_path: Path) -> None:
    tokens = token_matrix(12, 32)
    out = made(make_model, tokens, tmp_path / "out.gguf", case)
    expected = reference(tiny(make_model, case), tokens.tokens)
    assert set(GgufFile(out).tensors) == {name + suffix for name in expected for suffix in (".in_sum2", ".counts")}
    for name, (sums, counts) in expected.items():
        found = stored_rows(out, name)
        np.testing.assert_array_equal(found[1], counts, err_msg=name)
        np.testing.assert_allclose(found[0], sums, **of_squares(tokens, sums), err_msg=name)


@pytest.mark.numerics
def test_windows_in_several_batches_have_the_sums_of_one(make_model: MakeModel, tmp_path: Path) -> None:
    tokens = token_matrix(40, 128)  # more than one batch holds
    out = made(make_model, tokens, tmp_path / "out.gguf")
    for name, (sums, counts) in reference(tiny(make_model, "llama"), tokens.tokens).items():
        assert counts == 40 * 128
        found = stored_rows(out, name)
        np.testing.assert_array_equal(found[1], counts, err_msg=name)
        np.testing.assert_allclose(found[0], sums, **of_squares(tokens, sums), err_msg=name)


def test_an_expert_without_a_token_is_counted_and_said(
    make_model: MakeModel, tmp_path: Path, recorder: Recorder
) -> None:
    one = TokenMatrix.of(torch.full((1, 8), 5), "one token, which goes to two experts of four")
    report = quantkit.imatrix(
        tiny(make_model, "qwen3moe"), tmp_path / "out.gguf", calibration=one, device="cpu", progress=recorder
    )
    stacks = {f"blk.{block}.ffn_{part}_exps.weight" for block in (0, 1) for part in ("gate", "up", "down")}
    assert report.unseen.keys() == stacks
    assert report.unseen["blk.0.ffn_up_exps.weight"] == 2
    assert [text for text in recorder.warnings if "experts that saw no calibration token" in text]
    found = read_imatrix(report.out).importance("blk.0.ffn_up_exps.weight")
    assert found is not None
    assert (found == 1).all(axis=1).sum() == 2


def test_a_forward_that_leaves_a_linear_out_is_named() -> None:
    class Partial(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.first(x)

    block = Partial()
    with pytest.raises(SourceError, match="did not reach second"):
        run_watched(block, (("first",), ("second",)), lambda i: block(torch.ones(1, 2)), 1, print, print)


def test_an_activation_that_is_not_finite_names_its_reader(make_model: MakeModel, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny(make_model, "llama"), tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"].fill_(torch.inf)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NumericError, match=r"model\.layers\.0\.mlp\.down_proj: an input activation is not finite"):
        quantkit.imatrix(folder, tmp_path / "out.gguf", calibration=token_matrix(2, 16), device="cpu")
    assert not list(tmp_path.glob("*out*"))


# -- the file --------------------------------------------------------------------------------------------------------


def test_the_files_keys_are_llama_cpps_and_name_no_path(make_model: MakeModel, tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("the quick brown fox asks the assistant a question about the sea and its tides. " * 60)
    out = tmp_path / "out.gguf"
    mixture = f"{text}:0.5,evol-instruct-sample:0.5"
    report = quantkit.imatrix(tiny(make_model, "llama"), out, calibration=mixture, samples=6, seq_len=32, device="cpu")
    assert (report.chunks, report.chunk_size, report.entries, report.unseen) == (6, 32, 14, {})
    keys = GgufFile(out).keys
    drawn = quantkit.samples(tiny(make_model, "llama"), calibration=mixture, samples=6, seq_len=32)
    assert keys == {
        "general.type": "imatrix",
        "imatrix.datasets": ["notes.txt", "evol-instruct-sample"],
        "imatrix.chunk_count": 6,
        "imatrix.chunk_size": 32,
        "quantkit.version": quantkit.__version__,
        "quantkit.tokens_sha256": drawn.matrix.provenance.tokens_sha256,
    }
    assert str(tmp_path).encode() not in out.read_bytes()
    entries = [name for name in GgufFile(out).tensors if name.endswith(".in_sum2")]
    assert entries == sorted(entries)
    kinds = {field.name: field.types for field in gguf.GGUFReader(out).fields.values()}
    assert kinds["imatrix.chunk_count"] == kinds["imatrix.chunk_size"] == [gguf.GGUFValueType.UINT32]
    assert kinds["imatrix.datasets"] == [gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.STRING]


@pytest.mark.numerics
def test_the_reader_gives_the_means_that_were_written(make_model: MakeModel, tmp_path: Path) -> None:
    tokens = token_matrix(12, 32)
    read = read_imatrix(made(make_model, tokens, tmp_path / "out.gguf", "qwen3moe"))
    expected = reference(tiny(make_model, "qwen3moe"), tokens.tokens)
    assert (read.datasets, read.chunks, set(read.names)) == (("random",), 12, set(expected))
    for name, (sums, counts) in expected.items():
        mean = read.importance(name, (len(sums), 7, sums.shape[1]) if len(sums) > 1 else (7, sums.shape[1]))
        np.testing.assert_allclose(mean, sums / counts, **of_squares(tokens, sums / counts), err_msg=name)
        assert mean.dtype == np.float32


def test_the_same_run_gives_the_same_bytes(make_model: MakeModel, tiny_tokens: TokenMatrix, tmp_path: Path) -> None:
    first, again = (made(make_model, tiny_tokens, tmp_path / name, "qwen3moe") for name in ("a.gguf", "b.gguf"))
    assert first.read_bytes() == again.read_bytes()


def test_a_gguf_file_gives_the_matrix_of_its_model(tiny_gguf: Path, tiny_tokens: TokenMatrix, tmp_path: Path) -> None:
    quantkit.convert(tiny_gguf, tmp_path / "folder", dtype="float32")
    for model, out in {tiny_gguf: "file.gguf", tmp_path / "folder": "folder.gguf"}.items():
        quantkit.imatrix(model, tmp_path / out, calibration=tiny_tokens, device="cpu")
    assert (tmp_path / "file.gguf").read_bytes() == (tmp_path / "folder.gguf").read_bytes()


def test_a_dry_run_knows_the_size_and_writes_nothing(
    make_model: MakeModel, tiny_tokens: TokenMatrix, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    would = quantkit.imatrix(tiny(make_model, "qwen3moe"), calibration=tiny_tokens, dry_run=True)
    assert not list(tmp_path.iterdir())
    did = quantkit.imatrix(tiny(make_model, "qwen3moe"), calibration=tiny_tokens, device="cpu")
    assert did.out == tmp_path / "tiny-qwen3_moe.imatrix.gguf" == would.out
    assert (did.bytes, did.entries, did.chunks) == (would.bytes, would.entries, would.chunks)
    assert did.bytes == sum(tensor.bytes for tensor in GgufFile(did.out).tensors.values())
    assert (would.dry_run, did.dry_run) == (True, False)
    json.dumps(did.as_dict(), allow_nan=False)


def test_an_output_in_the_way(make_model: MakeModel, tiny_tokens: TokenMatrix, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    out.write_bytes(b"before")
    with pytest.raises(UsageError, match=r"out\.gguf already exists; use force=True"):
        made(make_model, tiny_tokens, out)
    assert out.read_bytes() == b"before"
    made(make_model, tiny_tokens, out, force=True)
    assert read_imatrix(out).names


def test_a_model_that_gguf_cannot_hold_is_refused(make_model: MakeModel, tiny_tokens: TokenMatrix) -> None:
    with pytest.raises(SourceError, match=r"opt cannot be written as GGUF; what can: .*llama"):
        quantkit.imatrix(make_model("opt"), calibration=tiny_tokens, dry_run=True)


def test_other_data_read_back_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GgufFile, "values", lambda self, name: np.zeros(3, dtype=np.float32))
    entry = Entry(np.ones((1, 3), dtype=np.float32), np.ones((1, 1), dtype=np.float32))
    with (
        pytest.raises(OutputError, match=r"x\.in_sum2: other data was read back"),
        staged_files(tmp_path / "out.gguf") as folder,
    ):
        write_imatrix(folder / "out.gguf", {"x": entry}, ["text"], 1, 8, {})
    assert not list(tmp_path.iterdir())


# -- the reader ------------------------------------------------------------------------------------------------------


def test_the_older_form_is_divided_by_its_calls(tmp_path: Path) -> None:
    path = tmp_path / "old.dat"
    path.write_bytes(DAT)
    read = read_imatrix(path)
    assert (read.datasets, read.chunks, read.names) == (
        ("wiki.raw",),
        7,
        ("blk.0.attn_q.weight", "blk.0.ffn_down.weight"),
    )
    np.testing.assert_array_equal(read.importance("blk.0.attn_q.weight"), [[0.5, 0.0, 1.5]])
    np.testing.assert_array_equal(read.importance("blk.0.ffn_down.weight"), [[1.0, 0.5]])  # no calls: as they are
    assert read.importance("output.weight") is None


@pytest.mark.parametrize(("tail", "chunks"), [(b"", 0), (struct.pack("<i", 3), 3)], ids=["neither", "chunks"])
def test_the_oldest_files_end_before_chunks_or_data_set(tail: bytes, chunks: int, tmp_path: Path) -> None:
    path = tmp_path / "old.dat"
    path.write_bytes(dat({"a": (1, [1.0])}, tail))
    assert (read_imatrix(path).chunks, read_imatrix(path).datasets) == (chunks, ())


def test_experts_of_the_older_form_are_taken_apart_by_the_tensors_shape(tmp_path: Path) -> None:
    path = tmp_path / "old.dat"
    path.write_bytes(dat({"exps": (2, [2.0, 4.0, 6.0, 8.0, 10.0, 12.0])}))
    read = read_imatrix(path)
    np.testing.assert_array_equal(read.importance("exps", (3, 5, 2)), [[1, 2], [3, 4], [5, 6]])
    np.testing.assert_array_equal(read.importance("exps", (5, 6)), [[1, 2, 3, 4, 5, 6]])
    with pytest.raises(SourceError, match=r"6 values for exps, whose shape \[5, 4\] needs 4; .* another model"):
        read.importance("exps", (5, 4))


def matrix_file(path: Path, tensors: dict[str, np.ndarray], kind: str = "imatrix") -> Path:
    writer = gguf.GGUFWriter(path, "")
    writer.add_type(kind)
    writer.add_array("imatrix.datasets", ["text"])
    writer.add_uint32("imatrix.chunk_count", 1)
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


ONES = np.ones((2, 3), dtype=np.float32)
COUNTS = np.array([[4], [0]], dtype=np.float32)


def test_an_expert_without_a_count_has_ones(tmp_path: Path) -> None:
    path = matrix_file(tmp_path / "m.gguf", {"a.in_sum2": 6 * ONES, "a.counts": COUNTS, "a.in_sum": -ONES})
    np.testing.assert_array_equal(read_imatrix(path).importance("a"), [[1.5] * 3, [1.0] * 3])


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({}, "without entries"),
        ({"a.in_sum2": ONES}, r"a\.counts is missing, empty or not float32"),
        ({"a.counts": COUNTS}, r"a\.in_sum2 is missing, empty or not float32"),
        ({"a.in_sum2": ONES.astype(np.float16), "a.counts": COUNTS}, r"a\.in_sum2 is missing, empty or not float32"),
        ({"a.in_sum2": np.ones(5, dtype=np.float32), "a.counts": COUNTS}, "a has 5 sums for 2 counts"),
        ({"a.in_sum2": -ONES, "a.counts": COUNTS}, "entry a has a value that is negative or not finite"),
        ({"a.in_sum2": np.inf * ONES, "a.counts": COUNTS}, "entry a has a value that is negative or not finite"),
        ({"a.in_sum2": ONES, "a.counts": np.nan * COUNTS}, "entry a has a value that is negative or not finite"),
    ],
)
def test_a_gguf_matrix_that_makes_no_sense_is_one_clear_error(
    tensors: dict[str, np.ndarray], said: str, tmp_path: Path
) -> None:
    with pytest.raises(SourceError, match=rf"m\.gguf: .*{said}|m\.gguf: .*entry {said}"):
        read_imatrix(matrix_file(tmp_path / "m.gguf", tensors))


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "no importance matrix"),
        (b"\x01\x00", "no importance matrix"),
        (b"just a text, and a longer one at that", "no importance matrix"),
        (struct.pack("<i", -3), "no importance matrix"),
        (struct.pack("<2i", 1, 2**31 - 1) + b"blk", "no importance matrix"),
        (struct.pack("<2i", 1, 2) + b"\xff\xfe", "no importance matrix"),
        (dat({"a": (1, [1.0]), "b": (1, [])}), "0 values of b"),
        (dat({"a": (1, [1.0])}) + b"\x00", "it ends 3 bytes early"),
        (dat({"a": (1, [1.0])}, struct.pack("<2i", 1, 9) + b"short"), "it ends 4 bytes early"),
        (DAT + b"more", "4 bytes follow its end"),
        (dat({"a": (1, [float("nan")])}), "entry a has a value that is negative or not finite"),
        (dat({"a": (1, [-1.0])}), "entry a has a value that is negative or not finite"),
        (struct.pack("<i", 2) + 2 * dat({"a": (1, [1.0])})[4:], "it holds a twice"),
        (struct.pack("<2i", 2**31 - 1, 1) + b"a" + struct.pack("<2i", 1, 2**31 - 1), "bytes early"),
    ],
)
def test_a_file_that_is_no_matrix_of_the_older_form_is_one_clear_error(data: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "some.dat"
    path.write_bytes(data)
    with pytest.raises(SourceError, match=rf"^[^\n]*some\.dat: [^\n]*{said}[^\n]*$"):
        read_imatrix(path)


def test_another_gguf_file_and_no_file_are_told_apart(tiny_gguf: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="a GGUF file, but not an importance matrix"):
        read_imatrix(tiny_gguf)
    with pytest.raises(UsageError, match="no such file"):
        read_imatrix(tmp_path / "missing.gguf")
    with pytest.raises(UsageError, match="no such file"):
        read_imatrix(tmp_path)


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A small matrix in each form."""
    path = tmp_path_factory.mktemp("forms") / "m.gguf"
    return {"gguf": matrix_file(path, {"a.in_sum2": ONES, "a.counts": COUNTS}).read_bytes(), "dat": DAT}


def read_bytes(data: bytes, folder: Path) -> Imatrix:
    path = folder / "changed"
    path.write_bytes(data)
    return read_imatrix(path)


@pytest.mark.parametrize("form", ["gguf", "dat"])
def test_a_matrix_cut_anywhere_is_an_error(form: str, forms: dict[str, bytes], tmp_path: Path) -> None:
    whole = forms[form]
    # A file of the older form may end before its chunks, and before its data set; GGUF pads the last tensor.
    last = len(whole) - (32 - COUNTS.nbytes if form == "gguf" else 0)
    allowed = set() if form == "gguf" else {len(whole) - 16, len(whole) - 12}
    for size in set(range(last)) - allowed:
        with pytest.raises(SourceError):
            read_bytes(whole[:size], tmp_path)


@pytest.mark.parametrize("form", ["gguf", "dat"])
@settings(max_examples=150, deadline=5000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    changes=st.lists(
        st.tuples(st.integers(0, 10**4), st.binary(min_size=1, max_size=8) | st.just(b"\xff" * 4)), max_size=4
    ),
    cut=st.integers(0, 10**4),
)
def test_a_changed_file_is_read_or_refused(
    form: str, changes: list[tuple[int, bytes]], cut: int, forms: dict[str, bytes], tmp_path: Path
) -> None:
    data = bytearray(forms[form])
    for at, new in changes:
        at %= len(data)
        data[at : at + len(new)] = new
    with suppress(SourceError):
        read = read_bytes(bytes(data[: len(data) - cut % 8]), tmp_path)
        assert all(np.isfinite(mean).all() and (mean >= 0).all() for mean in read.entries.values())


# -- the command -----------------------------------------------------------------------------------------------------


def test_the_command_says_what_it_wrote(
    make_model: MakeModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from quantkit.cli.app import main

    out = tmp_path / "out.gguf"
    arguments = ["imatrix", str(tiny(make_model, "llama")), "--out", str(out), "--samples", "3", "--seq-len", "16"]
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--device", "cpu", "--dry-run"])
    assert ended.value.code == 0
    assert "14 tensors over 3 windows of 16 tokens" in capsys.readouterr().out
    assert not out.exists()
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--device", "cpu", "--json", "--quiet"])
    assert ended.value.code == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["out"], printed["entries"], printed["chunks"]) == (str(out), 14, 3)
    assert read_imatrix(out).chunks == 3


def test_loss_aware_sums_count_each_token_by_its_weight(make_model: MakeModel, tmp_path: Path) -> None:
    tokens = token_matrix(3, 64)
    plain = read_imatrix(made(make_model, tokens, tmp_path / "plain.gguf"))
    found = read_imatrix(made(make_model, tokens, tmp_path / "aware.gguf", loss_aware=True))
    stream = open_stream(tiny(make_model, "llama"))
    weights: dict[int, Any] = {}
    weigh_tokens(stream, tokens.tokens, 0, stream.budget, weights.__setitem__, SILENT)
    model = AutoModelForCausalLM.from_pretrained(tiny(make_model, "llama"), dtype=torch.float64)
    read: dict[str, torch.Tensor] = {}
    for index, layer in enumerate(model.model.layers):
        for name, stage in (("attn_q", layer.self_attn.q_proj), ("ffn_down", layer.mlp.down_proj)):
            stage.register_forward_pre_hook(
                lambda _, x, at=f"blk.{index}.{name}.weight": read.__setitem__(at, x[0].flatten(0, 1))
            )
    with torch.no_grad():
        model(tokens.tokens)
    for name, x in read.items():
        index, stage = int(name.split(".")[1]), 0 if "attn_q" in name else 3
        w = weights[index][f"{stage}.weights"].double()
        expected = (w[:, None] * x.square()).mean(dim=0).numpy()
        np.testing.assert_allclose(found.entries[name][0], expected, rtol=1e-3)
        assert not np.allclose(plain.entries[name][0], expected, rtol=0.01)
