"""The table of containers: that its rows are true, and that a row, a reader and a writer are all that one takes.

The container made here is written by a run's target, opened, inspected, verified, described by a card and taken into
a GGUF file, by nothing but its row and the code in this file.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from conftest import MakeModel
from support.streamed import open_stream
from transformers import LlamaConfig

import quantkit
from quantkit.codes import Codes, Plan, QuantizedLinear, contiguous_groups
from quantkit.codes.packing import PACKABLE_BITS
from quantkit.containers import CONTAINERS, Container, Holds, Loads, Shown, files, folders, load, misfit, of_format
from quantkit.containers.ggjt.read import MAGICS
from quantkit.containers.ggjt.write import FILE_TYPES
from quantkit.containers.gguf.file import MAGIC
from quantkit.containers.hf.coded import kept_tensor
from quantkit.containers.hf.read import FolderSource, stored_dtype
from quantkit.containers.hf.write import ShardedWriter
from quantkit.containers.source import HoldsCodes, Source, TensorInfo, Weights
from quantkit.errors import SourceError, UsageError
from quantkit.options import CheckpointFormat, GgmlType, QuantSpec, make
from quantkit.options import Container as FileName
from quantkit.options.verbs import Gptq
from quantkit.quantize.targets import CheckpointTarget, on_grid_of
from quantkit.runs.atomic import write_json
from quantkit.runs.tensorfile import TensorPlan
from quantkit.sources import open_source
from quantkit.verbs.publish import branch_of
from quantkit.verbs.recipe import CheckpointKind, GgjtVariant, GgufVariant
from quantkit.verbs.verify import verify
from quantkit.verbs.verify.programs import PROGRAMS, Facts, programs

# -- the rows --------------------------------------------------------------------------------------------------------


def test_the_table_is_read_without_what_it_names() -> None:
    heavy = ("torch", "transformers", "numpy", "gguf", "safetensors")
    code = f"import sys, quantkit.containers; print([name for name in {heavy} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"


@pytest.mark.parametrize("row", CONTAINERS.values(), ids=CONTAINERS)
def test_every_text_of_a_row_names_something(row: Container) -> None:
    for text in (
        row.opens,
        row.writes,
        row.admits,
        row.metadata,
        row.checks,
        *(one.unless for one in row.loads.values()),
    ):
        assert not text or load(text)
    # What is full precision to all but `verify` says so.
    assert load(row.opens).kind == ("hf" if row.name == "fp8" else row.name)


def test_options_and_recipes_have_the_table_s_names() -> None:
    assert [name for row in CONTAINERS.values() for name in row.formats] == list(get_args(CheckpointFormat))
    assert [row.name for row in files()] == list(get_args(FileName))
    assert [row.name for row in CONTAINERS.values() if row.recipe == "checkpoint"] == list(get_args(CheckpointKind))
    ours = [
        kind for variant in (GgufVariant, GgjtVariant) for kind in get_args(variant.model_fields["kind"].annotation)
    ]
    assert [row.name for row in CONTAINERS.values() if row.recipe == "file"] == ours


@pytest.mark.parametrize("row", CONTAINERS.values(), ids=CONTAINERS)
def test_cards_and_verify_know_every_row(row: Container) -> None:
    assert row.shown.form
    assert set(row.loads) | set(row.refused) <= {"", *PROGRAMS}
    answers = programs(Facts(row.name, LlamaConfig(), {}, {}, vocabulary="llama", architecture="llama"))
    assert [answer.program for answer in answers] == list(PROGRAMS)
    assert all(answer.ok or answer.why for answer in answers)
    assert {answer.program for answer in answers if answer.ok} <= set(row.loads)


def test_folders_and_files_are_told_apart() -> None:
    assert all(row.magics and row.suffix for row in files())
    assert all(not row.magics for row in folders())
    methods = [row.method for row in folders()]
    assert len(set(methods)) == len(methods)
    assert (CONTAINERS["gguf"].magics, CONTAINERS["ggjt"].magics) == ((MAGIC,), MAGICS)


def test_what_the_rows_say_they_hold_is_what_is_written() -> None:
    held = {row.name: row.holds for row in CONTAINERS.values() if row.holds}
    assert held["gptq"].bits == PACKABLE_BITS
    assert held["ggjt"].types == tuple(kind.name for kind in FILE_TYPES)
    for name, types in (("gguf", get_args(GgmlType)), ("ggjt", set(held["ggjt"].types) - {"F16", "F32"})):
        grids = [on_grid_of(kind) for kind in types]
        assert {grid["bits"] for grid in grids} == set(held[name].bits)
        assert {grid["group_size"] for grid in grids} == set(held[name].group_sizes)
        assert {grid["sym"] for grid in grids} == set(held[name].sym)


@pytest.mark.parametrize(
    ("kind", "spec", "line"),
    [
        ("gptq", {}, None),
        (
            "gptq",
            {"bits": 6},
            "--bits 6: a GPTQ checkpoint holds 2, 3, 4 or 8 bits; 6-bit codes fit into a compressed-tensors folder or "
            "an MLX folder or GGUF as Q6_K",
        ),
        (
            "gptq",
            {"group_size": 48},
            "--group-size 48: GPTQ readers load groups of 16, 32, 64, 128, 256, 512, 1024, or -1 for whole rows",
        ),
        (
            "ggjt",
            {"bits": 3},
            "--bits 3: a ggjt file holds 4, 5 or 8 bits; 3-bit codes fit into a GPTQ checkpoint or a "
            "compressed-tensors folder or an MLX folder",
        ),
        (
            "gguf",
            {"group_size": 128},
            "--group-size 128: GGUF readers load groups of 16, 32, 64; a GPTQ checkpoint or a compressed-tensors "
            "folder or an AWQ folder or an MLX folder holds them",
        ),
        (
            "gguf",
            {"group_size": 32, "act_order": "dynamic"},
            "--act-order dynamic: a GGUF file cannot hold it; use static or off; a GPTQ checkpoint holds it",
        ),
        ("hf", {}, "a full-precision folder holds no codes"),
    ],
)
def test_a_spec_that_does_not_fit_is_told_in_one_line(kind: str, spec: dict[str, Any], line: str | None) -> None:
    assert misfit(CONTAINERS[kind], [QuantSpec(**spec)]) == line


def test_a_format_of_no_container_is_refused() -> None:
    assert of_format("gptq_v2") is CONTAINERS["gptq"]
    with pytest.raises(UsageError, match="--format toy: choose gptq, gptq_v2"):
        of_format("toy")


# -- a container of its own ------------------------------------------------------------------------------------------

PARTS = ("codes", "scales", "zeros")


class ToySource(FolderSource):
    """4-bit codes, a byte each, with float16 scales and whole zeros for groups of 32 columns."""

    kind = "toy"

    def __init__(self, folder: Path, label: str | None = None, trust_remote_code: bool = False) -> None:
        super().__init__(folder, label, trust_remote_code)
        self.dtype = stored_dtype({n: i for n, i in self.stored.tensors.items() if not n.endswith(".scales")})

    @property
    def codes(self) -> HoldsCodes:
        return self

    @property
    def scheme(self) -> str:
        return "toy 4-bit"

    @property
    def settings(self) -> Mapping[str, Any]:
        return {"bits": 4, "group_size": 32, "sym": True}

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        stored = self.stored.tensors
        plain = {name: info for name, info in stored.items() if name.rpartition(".")[2] not in PARTS}
        for module in self.quantized_names():
            size = sum(stored[f"{module}.{part}"].bytes for part in PARTS)
            plain[f"{module}.weight"] = TensorInfo(stored[f"{module}.codes"].shape, "TOY4", size, 4)
        return plain

    def read(self, name: str) -> torch.Tensor:
        module = name.removesuffix(".weight")
        return self.stored.read(name) if name in self.stored.tensors else self.read_codes(module).dequantize()

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self.read(name)[start:stop]

    def quantized_names(self) -> Iterable[str]:
        return [name.removesuffix(".codes") for name in self.stored.tensors if name.endswith(".codes")]

    def bits(self, module: str) -> int:
        return 4

    def read_codes(self, module: str) -> QuantizedLinear:
        codes, scales, zeros = (self.stored.read(f"{module}.{part}") for part in PARTS)
        return QuantizedLinear(codes, scales, zeros, self.read_groups(module), 4)

    def read_words(self, module: str) -> None:
        return None

    def read_scales(self, module: str) -> torch.Tensor:
        return self.stored.read(f"{module}.scales").T.contiguous()

    def read_zeros(self, module: str) -> torch.Tensor:
        return self.stored.read(f"{module}.zeros")

    def read_groups(self, module: str) -> torch.Tensor:
        return contiguous_groups(self.stored.tensors[f"{module}.codes"].shape[1], 32)


def check(linears: Plan) -> None:
    refusal = misfit(CONTAINERS["toy"], {linear.spec for linear in linears.values()})
    if refusal is not None:
        raise UsageError(refusal)


def quantization_config(
    spec: QuantSpec, checkpoint_format: str, modules: Sequence[Sequence[str]], kept: Sequence[str] = ()
) -> dict[str, Any]:
    return {"quant_method": checkpoint_format, "bits": spec.bits, "group_size": spec.group_size}


def plan(source: Source, weights: Weights, linears: Plan) -> list[TensorPlan]:
    planned = []
    for name, info in weights.tensors.items():
        module = name.removesuffix(".weight")
        if module not in linears:
            planned.append(TensorPlan(name, source.dtype, info.shape))
            continue
        rows, groups = info.shape[0], linears[module].groups
        kinds = torch.uint8, torch.float16, torch.uint8
        shapes = info.shape, (rows, groups), (rows, groups)
        planned += [TensorPlan(f"{module}.{p}", k, s) for p, k, s in zip(PARTS, kinds, shapes, strict=True)]
    return planned


class writer:
    def __init__(
        self, folder: Path, source: Source, weights: Weights, linears: Plan, quantization: dict[str, Any], limit: int
    ) -> None:
        self._folder, self._source, self._weights = folder, source, weights
        self._linears, self._quantization = linears, quantization
        self._tensors = ShardedWriter(folder, plan(source, weights, linears), limit)

    def __enter__(self) -> writer:
        return self

    def __exit__(self, *_: object) -> None:
        self._tensors.close()

    def add_linear(self, module: str, linear: Codes) -> None:
        for part in PARTS:
            self._tensors.write(f"{module}.{part}", getattr(linear, part))

    def add_others(self) -> None:
        for name in self._weights.tensors:
            if name.removesuffix(".weight") not in self._linears:
                self.add_other(name, kept_tensor(self._weights, name))

    def add_other(self, name: str, tensor: torch.Tensor) -> None:
        self._tensors.write(name, tensor)

    def finish(self) -> None:
        self._tensors.finish()
        config = {**self._source.config_dict(), "quantization_config": self._quantization}
        write_json(self._folder / "config.json", config)
        self._source.copy_companions(self._folder)


TOY = Container(
    "toy",
    word="toy",
    one="a toy folder",
    opens=f"{__name__}:ToySource",
    method="toy",
    holds=Holds(bits=(4,), group_sizes=(32,), sym=(True,), act_order=("static", "off"), mixed=False),
    formats=("toy",),
    writes=__name__,
    recipe="checkpoint",
    shown=Shown("TOY", "Toys", "toys, to play with", ("TOY",)),
    loads={"transformers": Loads("with toys")},
    refused={"": "it reads no toys"},
)


@pytest.fixture
def row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CONTAINERS, "toy", TOY)


def rounded(weight: torch.Tensor) -> QuantizedLinear:
    """Symmetric codes of a matrix [out, in]."""
    parts = weight.float().unflatten(1, (-1, 32))
    scales = (parts.abs().amax(2) / 7).half()
    codes = (parts / scales[..., None].float() + 8).round().clamp(0, 15).to(torch.uint8).flatten(1)
    zeros = torch.full(scales.shape, 8, dtype=torch.uint8)
    return QuantizedLinear(codes, scales, zeros, contiguous_groups(weight.shape[1], 32), 4)


@pytest.fixture
def toy(row: None, make_model: MakeModel, tmp_path: Path) -> tuple[Path, dict[str, QuantizedLinear]]:
    """A model as a run's target writes it, and its codes."""
    stream = open_stream(make_model("llama", num_key_value_heads=4))
    target = CheckpointTarget(stream, QuantSpec(group_size=32), "toy", 10**9)  # type: ignore[arg-type]
    folder = target.model_in(tmp_path / "toy")
    folder.mkdir()
    codes = {module: rounded(stream.weights.read(f"{module}.weight")) for module in target.plan}
    with target.writer(folder) as out:
        for module, linear in codes.items():
            out.add_linear(module, linear)
        out.add_others()
        out.finish()
    stored = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert target.quantized_bytes < target.bytes <= stored
    return folder, codes


def test_a_container_takes_a_row_a_reader_and_a_writer(toy: tuple[Path, dict[str, QuantizedLinear]]) -> None:
    folder, codes = toy
    source = open_source(folder)
    assert isinstance(source, ToySource)
    module, linear = next(iter(codes.items()))
    assert torch.equal(source.read(f"{module}.weight"), linear.dequantize())
    found = quantkit.inspect(folder)
    assert (found.kind, found.scheme, found.types["TOY4"]) == ("toy", "toy 4-bit", len(codes))
    report = verify(folder, device="cpu")
    assert report.problems == []
    (model,) = report.models
    assert (model.kind, model.sentence is not None) == ("toy", True)
    said = {load.program: (load.ok, load.why) for load in model.loads}
    assert (said["transformers"], said["vLLM"]) == ((True, "with toys"), (False, "it reads no toys"))
    assert branch_of(folder) == "toy-4bit-32g-actorder_False"


def test_its_card_says_what_it_is(toy: tuple[Path, Any]) -> None:
    folder, _ = toy
    quantkit.card(folder, siblings=["someone/tiny-TOY"], base_model=["someone/tiny"])
    text = (folder / "README.md").read_text()
    assert "Toys made from [someone/tiny]" in text
    assert "| `main` | 4-bit symmetric |" in text
    assert "[someone/tiny-TOY](https://huggingface.co/someone/tiny-TOY): toys, to play with" in text
    assert "**transformers** (with toys)" in text
    assert all(f"- {tag}\n" in text for tag in ("quantized", "toy", "4-bit"))


def test_its_codes_go_into_a_gguf_file_as_they_are(
    toy: tuple[Path, dict[str, QuantizedLinear]], tmp_path: Path
) -> None:
    folder, codes = toy
    report = quantkit.ggml(folder, tmp_path / "toy.gguf", pre="gpt-2")
    assert report.fidelity["exact"] == len(codes)
    written = open_source(tmp_path / "toy.gguf")
    for module, linear in codes.items():
        assert torch.equal(written.read(f"{module}.weight"), linear.dequantize()), module


@pytest.mark.usefixtures("row")
def test_what_it_does_not_hold_is_refused(make_model: MakeModel) -> None:
    stream = open_stream(make_model("llama", num_key_value_heads=4))
    for spec, line in (
        ({"bits": 8}, "--bits 8: a toy folder holds 4 bits; 8-bit codes fit into a GPTQ checkpoint"),
        ({"sym": False}, "--asym: a toy folder holds none of these codes"),
    ):
        with pytest.raises(UsageError, match=line):
            CheckpointTarget(stream, QuantSpec(**{"group_size": 32, **spec}), "toy", 10**9)  # type: ignore[arg-type]


def test_without_its_row_it_is_not_known(toy: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(CONTAINERS, "toy")
    with pytest.raises(SourceError, match=r"quantized with 'toy'; full-precision, .* and fp8 folders can be read"):
        open_source(toy[0])


@pytest.mark.parametrize("bits", [5, 6, 7])
def test_the_options_name_the_same_containers_for_other_bits(bits: int) -> None:
    """The options are checked before the table is asked."""
    with pytest.raises(UsageError) as caught:
        make(Gptq, bits=bits)
    assert str(caught.value) == misfit(CONTAINERS["gptq"], [QuantSpec(bits=bits)])
