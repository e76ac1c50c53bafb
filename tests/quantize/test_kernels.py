"""What runs on a GPU, as far as a CPU can show it: the column kernel under Triton's interpreter and its compiled code,
half-precision products, the order of streams. The tests marked `gpu` are the rest, for a machine that has one."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import MakeModel, Recorder
from support.problems import problem, quantize
from support.streamed import open_stream
from support.tolerance import assert_mean_product

import quantkit
from quantkit.blocks import workers
from quantkit.blocks.open import computed_in
from quantkit.blocks.workers import uploaded
from quantkit.codes import carried
from quantkit.codes.block_types import BLOCK_TYPES
from quantkit.errors import NumericError
from quantkit.options import QuantSpec
from quantkit.quantize import hessian as hessians
from quantkit.quantize import kernels, loops
from quantkit.quantize.gptq_grid import fit_grid, minmax_grid
from quantkit.quantize.hessian import HessianAccumulator, adds_up_in_float32, column_order, factorize
from quantkit.quantize.search import search_grids
from quantkit.quantize.targets import plan_linears
from quantkit.tokens import TokenMatrix
from quantkit.verbs.gptq import checks
from quantkit.verbs.gptq.checks import note_plan

needs_triton = pytest.mark.skipif(not kernels._has_triton(), reason="Triton is not installed: pip install triton")

Block = tuple[Any, ...]
"""W, U, scale, minimum, top, and the levels of a table where codes are of one."""


def reference(
    W: torch.Tensor,
    U: torch.Tensor,
    scale: torch.Tensor,
    minimum: torch.Tensor,
    top: int,
    levels: torch.Tensor | None = None,
) -> Any:
    """Codes uint8 and errors float32 [columns, out]: GPTQ, algorithm 1, one column after the other, in plain torch."""
    W = W + minimum
    codes, Err = torch.empty(W.shape, dtype=torch.uint8), torch.empty_like(W)
    for j in range(W.shape[0]):
        s = scale[j]
        inverse = torch.where(s == 0, 0.0, 1.0 / s)
        q = torch.round(W[j] * inverse).clamp(0, top)
        if levels is not None:
            codes[j] = (W[j, :, None] * inverse[:, None]).gt((levels[1:] + levels[:-1]) / 2).sum(dim=1)
            q = levels[codes[j].long()]
        else:
            codes[j] = q.to(torch.uint8)
        Err[j] = (W[j] - q * s) / U[j, j]
        W[j + 1 :] -= U[j, j + 1 :, None] * Err[j]
    return codes, Err


def block(rows: int, columns: int, bits: int, minimum: str, dead: tuple[int, ...] = ()) -> Block:
    """A block with the factor of a Hessian of correlated inputs. `minimum`: of "sym", "asym" or "ggml" grids."""
    W, H = problem(rows, columns, seed=1000 * bits + rows + columns, dead=dead)
    factor = factorize(H, column_order(H, False), 0.01)
    assert factor is not None
    generator = torch.Generator().manual_seed(bits)
    top = 2**bits - 1
    scale = (0.3 / top) * (0.5 + torch.rand(columns, rows, generator=generator))
    if minimum == "sym":  # scales of both signs, as the search finds them
        scale = torch.where(torch.rand(scale.shape, generator=generator) < 0.3, -scale, scale)
        return W.T.contiguous(), factor.U, scale, scale * 2 ** (bits - 1), top
    if minimum == "asym":
        return (
            W.T.contiguous(),
            factor.U,
            scale,
            scale * torch.randint(1, top + 1, scale.shape, generator=generator),
            top,
        )
    return W.T.contiguous(), factor.U, scale, 0.15 * torch.randn(scale.shape, generator=generator), top


IQ4 = torch.tensor(BLOCK_TYPES["IQ4_NL"].levels, dtype=torch.float32)


def blocks() -> dict[str, Block]:
    """Problems by name: every width and kind of grid, ragged shapes, and what may be odd about a column."""
    found, generator = {}, torch.Generator().manual_seed(0)
    shapes = [(29, 128), (33, 20), (31, 17), (64, 1), (1, 9), (32, 33), (5, 16)]
    for bits in range(2, 9):
        for number, kind in enumerate(("sym", "asym", "ggml")):
            rows, columns = shapes[(3 * bits + number) % len(shapes)]
            found[f"{bits} bits, {kind}, {rows} x {columns}"] = block(rows, columns, bits, kind)
    found["dead columns"] = block(20, 48, 4, "sym", dead=(0, 7, 47))
    W, U, scale, minimum, top = block(20, 48, 4, "asym")
    found["scales of zero"] = (
        W,
        U,
        torch.where(torch.rand(scale.shape, generator=generator) < 0.2, 0.0, scale),
        minimum,
        top,
    )
    W, U, scale, minimum, top = block(20, 70, 4, "sym")
    found["a block of a larger factor"] = W[20:60], U[20:60, 20:60], scale[20:60], minimum[20:60], top
    found["one scale for all columns"] = W, U, scale[:1].expand(70, -1), minimum[:1].expand(70, -1), top
    for name, (rows, columns) in {"table": (33, 100), "table, ragged": (5, 9)}.items():
        W, U, scale, minimum, top = block(rows, columns, 4, "sym")
        scale = torch.where(torch.rand(scale.shape, generator=generator) < 0.05, 0.0, scale / 16)
        found[name] = W, U, scale, torch.zeros_like(scale), top, IQ4
    # Every weight lies halfway between two codes, and no error reaches the next column.
    halves = torch.arange(-6, 40).repeat(20, 1) / 2
    found["ties"] = halves, torch.eye(20), torch.ones(20, 46), torch.zeros(20, 46), 15
    found["far outside"] = (
        1e30 * torch.randn(20, 46, generator=generator),
        torch.eye(20),
        torch.full((20, 46), 2.0**-24),
        torch.zeros(20, 46),
        15,
    )
    return found


BLOCKS = blocks()
Grid = tuple[torch.Tensor, torch.Tensor, int, int, bool]
"""W, importance, group size, bits, symmetry."""


def grids() -> dict[str, Grid]:
    """Searches by name: every width, both symmetries, ragged shapes, weights as columns and as rows, odd groups."""
    found, generator = dict[str, Grid](), torch.Generator().manual_seed(0)
    shapes = [(5, 40, 16), (33, 20, -1), (9, 150, 64), (1, 17, 32), (3, 136, 136)]
    for bits in range(2, 9):
        for number, sym in enumerate((True, False)):
            rows, columns, size = shapes[(2 * bits + number) % len(shapes)]
            W = torch.randn(rows, columns, generator=generator) * torch.rand(rows, 1, generator=generator)
            W = W if bits % 2 else W.T.contiguous().T  # of any strides
            name = f"{bits} bits, {'sym' if sym else 'asym'}, {rows} x {columns} by {size}"
            found[name] = W, 0.01 + torch.rand(columns, generator=generator), size, bits, sym
    W, h, *_ = found["5 bits, sym, 5 x 40 by 16"]
    for sym in (True, False):
        odd = W.clone()
        odd[:, :16], odd[1, 16:32], odd[2] = 0, odd[1, 16:32].abs(), 1e-9 * odd[2]
        found[f"zeros, one sign, tiny, {sym}"] = odd, h, 16, 4, sym
        found[f"beyond float16, {sym}"] = torch.full((2, 16), 3e6), h[:16], 16, 4, sym
    return found


GRIDS = grids()
LAYERS: dict[str, tuple[tuple[int, int], tuple[int, ...], dict[str, Any]]] = {
    "4 bits": ((40, 150), (), {"bits": 4, "group_size": 64}),
    "3 bits, asymmetric": ((24, 40), (), {"bits": 3, "group_size": 32, "sym": False}),
    "8 bits, dynamic order": ((16, 144), (), {"bits": 8, "group_size": 136, "act_order": "dynamic"}),
    "2 bits, natural order": ((20, 64), (), {"bits": 2, "group_size": -1, "act_order": "off"}),
    "dead columns": ((16, 70), (0, 5, 69), {"bits": 4, "group_size": 32}),
    "Q4_1": ((16, 64), (), {"bits": 4, "group_size": 32, "sym": False, "ggml": "Q4_1"}),
    "Q4_K": ((16, 256), (), {"bits": 4, "group_size": 32, "sym": False, "ggml": "Q4_K"}),
    "IQ4_XS": ((16, 256), (), {"bits": 4, "group_size": 32, "sym": True, "ggml": "IQ4_XS"}),
}


def layer(name: str) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    (rows, columns), dead, spec = LAYERS[name]
    return *problem(rows, columns, seed=3, dead=dead), spec


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What the kernel makes of every problem under Triton's interpreter."""
    folder = tmp_path_factory.mktemp("interpreted")
    problems = {"block": BLOCKS, "grid": GRIDS, "layer": {name: layer(name) for name in LAYERS}}
    torch.save(problems, folder / "problems.pt")
    script = Path(__file__).parents[1] / "support" / "interpret_kernels.py"
    done = subprocess.run(
        [sys.executable, str(script), str(folder / "problems.pt"), str(folder / "answers.pt")],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    answers: dict[str, dict[str, Any]] = torch.load(folder / "answers.pt")
    return answers


# -- the column kernel -----------------------------------------------------------------------------------------------


@needs_triton
@pytest.mark.parametrize("name", BLOCKS)
def test_the_kernel_is_the_column_by_column_loop_bit_for_bit(interpreted: dict[str, dict[str, Any]], name: str) -> None:
    codes, Err = interpreted["block"][name]
    expected_codes, expected_err = reference(*BLOCKS[name])

    assert torch.equal(codes, expected_codes)
    assert torch.equal(Err, expected_err)


def test_the_problems_are_not_trivial() -> None:
    """Codes of all kinds occur, and errors that are fed on change them."""
    for name, (W, U, *grid) in BLOCKS.items():
        codes, _ = reference(W, U, *grid)
        alone, _ = reference(W, U.diagonal().diag(), *grid)
        top = grid[2]
        if W.numel() > 80 and name not in ("ties", "far outside"):
            assert len(codes.unique()) >= min(top, 8), name
            assert not torch.equal(codes, alone), name


@needs_triton
def test_halves_are_rounded_to_even(interpreted: dict[str, dict[str, Any]]) -> None:
    codes, Err = interpreted["block"]["ties"]

    assert codes[3, :20].tolist() == [0, 0, 0, 0, 0, 0, 0, 0, 1, 2, 2, 2, 3, 4, 4, 4, 5, 6, 6, 6]
    assert Err[3, 6:20].tolist() == [0, 0.5, 0, -0.5, 0, 0.5, 0, -0.5, 0, 0.5, 0, -0.5, 0, 0.5]


@needs_triton
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_through_the_kernel_is_the_cpus(interpreted: dict[str, dict[str, Any]], name: str) -> None:
    """The CPU gathers a column's errors as one product, so sums differ in their last bits and codes near a tie may."""
    codes, loss = interpreted["layer"][name]
    W, H, spec = layer(name)
    expected = quantize(W, H, QuantSpec(**spec))

    assert float((codes == expected.linear.codes).float().mean()) > 0.999
    assert float(loss.sum()) == pytest.approx(float(expected.loss.sum()), rel=1e-3)


# -- the grid kernel -------------------------------------------------------------------------------------------------


@needs_triton
@pytest.mark.parametrize("name", GRIDS)
def test_the_grid_kernel_finds_what_the_cpu_s_search_finds(interpreted: dict[str, dict[str, Any]], name: str) -> None:
    found = interpreted["grid"][name]
    if name.startswith("beyond float16"):
        with pytest.raises(NumericError) as caught:
            fit_grid(*GRIDS[name])
        assert found == str(caught.value)
        return
    expected = fit_grid(*GRIDS[name])
    assert torch.equal(found[1], expected.zeros)
    assert torch.equal(found[0], expected.scales)


def test_the_grids_are_not_trivial() -> None:
    """Scales are of both signs, zeros differ, and groups are clipped."""
    for name, (W, h, size, bits, sym) in GRIDS.items():
        if W.numel() < 150 or "bits" not in name:
            continue
        grid = fit_grid(W, h, size, bits, sym)
        plain = minmax_grid(W, size, bits, sym)
        assert not torch.equal(grid.scales, plain.scales), name
        if sym:
            assert {-1.0, 1.0} == set(grid.scales.sign().unique().tolist()), name
        elif bits > 2:
            assert len(grid.zeros.unique()) > 1, name


@pytest.mark.parametrize(("size", "is_used"), [(128, True), (1024, True), (2048, False)])
def test_groups_that_fit_into_registers_are_searched_by_it(
    size: int, is_used: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "_has_triton", lambda: True)
    monkeypatch.setattr(kernels, "triton_trouble", lambda device: "")
    monkeypatch.setattr(kernels, "_triton_grids", lambda: "the kernel")
    assert kernels.grid_search(torch.device("cuda"), size) == ("the kernel" if is_used else None)
    assert kernels.grid_search(torch.device("cpu"), size) is None
    monkeypatch.setattr(kernels, "triton_trouble", lambda device: "no compiler")
    assert kernels.grid_search(torch.device("cuda"), size) is None


def test_a_search_that_finds_other_grids_is_not_used() -> None:
    def as_plain(W: Any, h: Any, size: int, fractions: Any, bits: int, sym: bool, refits: int) -> Any:
        return search_grids(W, h, size, bits, sym)

    def wrong(*given: Any) -> Any:
        scales, zeros = as_plain(*given)
        return scales * 1.01, zeros

    cpu = torch.device("cpu")
    assert kernels.trouble_of(lambda: kernels.plain_columns, cpu, lambda: as_plain) == ""
    assert kernels.trouble_of(lambda: kernels.plain_columns, cpu, lambda: wrong) == "its codes are not those of torch"


# -- what the compiler makes of them ---------------------------------------------------------------------------------


@needs_triton
@pytest.mark.parametrize(
    ("capability", "columns", "levels"), [(80, 128, 0), (90, 128, 0), (90, 16, 0), (100, 128, 0), (90, 128, 16)]
)
def test_the_kernel_compiles_for_gpus_without_spills_or_fused_products(
    capability: int, columns: int, levels: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton has its own assembler: no GPU is needed to see the code and its registers."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    pytest.importorskip("triton.compiler")
    from quantkit.quantize.kernels import columns as module

    types = dict.fromkeys(("W", "U", "S", "M", "Err", "Levels"), "*fp32") | {"Codes": "*u8", "top": "fp32"}
    constants = {"LEVELS": levels, "ROWS": module._ROWS, "COLUMNS": columns}
    registers = compiled(module._quantize_tile, types, constants, module._OPTIONS, capability, tmp_path)
    assert registers <= 128  # at least four programs on a multiprocessor


@needs_triton
@pytest.mark.parametrize(
    ("capability", "size", "sym"),
    [(80, 128, True), (90, 128, True), (90, 128, False), (90, 32, True), (90, 1024, False), (100, 128, False)],
)
def test_the_grid_kernel_compiles_without_spills(
    capability: int, size: int, sym: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    pytest.importorskip("triton.compiler")
    from quantkit.quantize.kernels import grids as module

    types = dict.fromkeys(("W", "H", "Fractions", "Scales", "Zeros"), "*fp32") | {"top": "fp32", "half": "fp32"}
    constants = {"CANDIDATES": 26 if sym else 12, "REFITS": 2, "SYM": sym, "SIZE": size, "ROWS": 4096 // size}
    registers = compiled(module._search_tile, types, constants, module._OPTIONS, capability, tmp_path)
    assert registers <= 168  # at least three


def compiled(
    kernel: Any,
    types: dict[str, str],
    constants: dict[str, Any],
    options: dict[str, Any],
    capability: int,
    folder: Path,
) -> int:
    """Registers a thread of a kernel for a GPU of a capability. It must not spill, nor fuse or approximate."""
    compiler, backends = pytest.importorskip("triton.compiler"), pytest.importorskip("triton.backends.compiler")
    known = types | dict.fromkeys(constants, "constexpr")
    signature = {name: known.get(name, "i32") for name in kernel.arg_names}
    source = compiler.ASTSource(kernel, signature, constexprs=constants)
    built = compiler.compile(source, target=backends.GPUTarget("cuda", capability, 32), options=options)

    ptx = built.asm["ptx"]
    assert set(re.findall(r"div\.\w+", ptx)) == {"div.rn"}
    assert not re.search(r"\bfma\.", ptx)
    (folder / "kernel.cubin").write_bytes(built.asm["cubin"])
    tool = Path(sys.modules["triton"].__file__ or "").parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.exists():
        pytest.skip("this Triton has no cuobjdump to ask for registers")
    usage = subprocess.run([tool, "-res-usage", folder / "kernel.cubin"], capture_output=True, text=True, check=True)
    registers, stack, local = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", usage.stdout).groups()  # type: ignore[union-attr]
    assert (int(stack), int(local)) == (0, 0)
    return int(registers)


# -- half-precision products -----------------------------------------------------------------------------------------


@pytest.fixture
def mixed_addmm() -> Iterator[list[torch.dtype]]:
    """Gives the CPU the product that CUDA has, half precision added up in float32; yields the operands' dtypes."""
    seen: list[torch.dtype] = []

    def addmm(
        total: torch.Tensor, x: torch.Tensor, y: torch.Tensor, out_dtype: torch.dtype, *, out: torch.Tensor, **_: Any
    ) -> torch.Tensor:
        assert out_dtype == total.dtype == torch.float32
        assert out.data_ptr() == total.data_ptr()
        seen.append(x.dtype)
        return out.copy_(total + x.float() @ y.float())

    library = torch.library.Library("aten", "IMPL")
    library.impl("addmm.dtype_out", addmm, "CPU")
    adds_up_in_float32.cache_clear()
    yield seen
    library._destroy()
    adds_up_in_float32.cache_clear()


@pytest.mark.numerics
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_products_add_up_in_float32(mixed_addmm: list[torch.dtype], dtype: torch.dtype) -> None:
    """Columns enough for several products, which no tile divides; numbers whose squares float16 could not hold."""
    generator = torch.Generator().manual_seed(0)
    batches = [(400.0 * torch.randn(2, 9, 411, generator=generator)).to(dtype) for _ in range(3)]
    hessian = HessianAccumulator(411, torch.device("cpu"))
    for x in batches:
        hessian.add(x)

    assert_mean_product(hessian.finish("layer"), torch.cat([x.reshape(-1, 411) for x in batches]))
    assert len(mixed_addmm) > 1 + 3
    assert set(mixed_addmm) == {dtype}


@pytest.mark.numerics
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weighted_half_precision_activations_are_added_up_as_halves(
    mixed_addmm: list[torch.dtype], dtype: torch.dtype
) -> None:
    """As exact as float32's sums; rounding the weighted activations once would not be."""
    generator = torch.Generator().manual_seed(0)
    x = (100.0 * torch.randn(300, 41, generator=generator)).to(dtype)
    weight = torch.rand(300, generator=generator) ** 4
    hessian = HessianAccumulator(41, torch.device("cpu"))
    hessian.add(x[:100], weight[:100])
    hessian.add(x[100:], weight[100:])
    found, roots = hessian.finish("layer").double(), weight.double().sqrt()[:, None]

    def mean(scaled: torch.Tensor) -> torch.Tensor:
        return scaled.T @ scaled / weight.double().sum()

    exact = mean(x.double() * roots)
    rounded = mean((x.float() * roots.float()).bfloat16().double())
    size = exact.diagonal().sqrt()
    error = ((found - exact).abs() / torch.outer(size, size)).max()
    assert float(error) < 1e-5
    assert float(((rounded - exact).abs() / torch.outer(size, size)).max()) > 5 * float(error)
    assert set(mixed_addmm[1:]) == {torch.bfloat16}  # the first was a trial


def test_a_product_that_rounds_its_sum_to_a_half_is_not_taken(
    mixed_addmm: list[torch.dtype], monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu = torch.device("cpu")
    assert adds_up_in_float32(torch.bfloat16, cpu)
    adds_up_in_float32.cache_clear()

    def rounding(total: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> None:
        total.copy_((total + x.float().T @ y.float()).to(x.dtype))

    monkeypatch.setattr(hessians, "add_product", rounding)
    assert not adds_up_in_float32(torch.bfloat16, cpu)
    assert not adds_up_in_float32(torch.float16, cpu)


@pytest.mark.numerics
def test_where_torch_has_no_such_product_it_is_one_of_float32() -> None:
    x = torch.randn(12, 40, generator=torch.Generator().manual_seed(0)).bfloat16()

    assert not adds_up_in_float32(x.dtype, x.device)
    assert not adds_up_in_float32(torch.float64, x.device)
    whole, half = HessianAccumulator(40, x.device), HessianAccumulator(40, x.device)
    whole.add(x.float())
    half.add(x)
    assert torch.equal(whole.finish("layer"), half.finish("layer"))


# -- streams, and what is said ---------------------------------------------------------------------------------------


class FakeStream:
    """Notes what would be queued."""

    def __init__(self, name: str, log: list[str]) -> None:
        self._name, self._log = name, log

    def record_event(self) -> str:
        self._log.append(f"{self._name} records")
        return f"event of {self._name}"

    def wait_event(self, event: str) -> None:
        self._log.append(f"{self._name} waits for {event}")

    def wait_stream(self, other: FakeStream) -> None:
        self._log.append(f"{self._name} waits for {other._name}")

    def __enter__(self) -> None:
        self._log.append(f"on {self._name}")

    def __exit__(self, *_: object) -> None:
        self._log.append(f"off {self._name}")


def beside_main(
    monkeypatch: pytest.MonkeyPatch, module: ModuleType, getter: str, name: str
) -> tuple[list[str], FakeStream]:
    """Put a stream of this name in place of what a function of the module gives, beside one called main, which is the
    current one. Returns the log of both, and that stream."""
    log: list[str] = []
    main, other = FakeStream("main", log), FakeStream(name, log)
    monkeypatch.setattr(module, getter, lambda device: other)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    return log, other


def test_work_beside_waits_for_its_inputs_and_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    log, _ = beside_main(monkeypatch, kernels, "_side_stream", "side")

    beside = kernels.beside(torch.device("cuda"))
    log.append("main's work")
    with pytest.raises(ValueError, match="damaged"), beside:
        raise ValueError("damaged")  # left in order all the same

    work = ["main records", "main's work", "side waits for event of main", "on side", "off side", "main waits for side"]
    assert log == work


def test_on_a_cpu_work_beside_is_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_stream", None)
    with kernels.beside(torch.device("cpu")):
        pass


def test_a_gpu_without_triton_is_said_in_one_line(
    make_model: MakeModel, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = open_stream(make_model())
    plan = plan_linears(stream, QuantSpec(group_size=32))
    monkeypatch.setattr(kernels, "_has_triton", lambda: False)
    note_plan(stream, plan, recorder)
    assert recorder.notes == []  # a CPU never asks for it

    stream.device = torch.device("cuda")
    note_plan(stream, plan, recorder)
    assert recorder.notes == ["Triton is missing, so torch quantizes the columns: slower; pip install 'quantkit[gpu]'"]
    assert kernels.column_loop(stream.device) is kernels.plain_columns

    monkeypatch.setattr(kernels, "_has_triton", lambda: True)
    monkeypatch.setattr(kernels, "triton_trouble", lambda device: "")
    assert kernels.shortfall(stream.device) is None
    assert kernels.column_loop(torch.device("cpu")) in (loops.quantize_columns, kernels.plain_columns)


# What Triton does before its first launch: it compiles a C file against Python's headers, and keeps what comes of it.
COMPILING = """
import sys, torch
from triton.runtime.build import compile_module_from_src
from quantkit.quantize.kernels import plain_columns, trouble_of

def loop(*given):
    compile_module_from_src(src=sys.argv[1], name="tried")
    return plain_columns(*given)

print("TROUBLE", trouble_of(lambda: loop, torch.device("cpu")))
"""
MODULE = """
#include <Python.h>
static struct PyModuleDef tried = {PyModuleDef_HEAD_INIT, "tried", NULL, -1, NULL};
PyMODINIT_FUNC PyInit_tried(void) { return PyModule_Create(&tried); }
"""


@needs_triton
@pytest.mark.parametrize(
    ("environment", "source", "said"),
    [
        ({"PATH": "/nowhere"}, MODULE, "Failed to find C compiler"),
        ({"TRITON_CACHE_DIR": "{file}/cache", "CC": ""}, MODULE, "TRITON_CACHE_DIR name a folder that can be written"),
        ({}, "#include <no_such_header.h>", "install Python's headers"),
    ],
    ids=["no compiler", "no folder", "no headers"],
)
def test_triton_that_cannot_compile_is_told_in_a_few_words(
    environment: dict[str, str], source: str, said: str, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    known = {name: value for name, value in os.environ.items() if name != "CC"}
    known |= {"TRITON_CACHE_DIR": str(tmp_path / "cache")}
    known |= {name: value.format(file=tmp_path / "file") for name, value in environment.items() if value}
    done = subprocess.run(
        [sys.executable, "-c", COMPILING, source], env=known, capture_output=True, text=True, check=True
    )
    [trouble] = [line.removeprefix("TROUBLE ") for line in done.stdout.splitlines() if line.startswith("TROUBLE")]
    assert said in trouble
    assert "Traceback" not in done.stderr


def test_a_kernel_that_fails_or_gives_other_codes_is_not_used(
    make_model: MakeModel, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*given: Any) -> Any:
        raise RuntimeError("no driver\nand much more")

    def wrong(*given: Any) -> Any:
        errors = kernels.plain_columns(*given)
        given[5][3, 4] ^= 1
        return errors

    cpu, gpu = torch.device("cpu"), torch.device("cuda", 7)
    trials = {failing: "no driver", wrong: "its codes are not those of torch", kernels.plain_columns: ""}
    for loop, said in trials.items():
        assert kernels.trouble_of(lambda loop=loop: loop, cpu) == said
    monkeypatch.setattr(kernels, "_has_triton", lambda: True)
    monkeypatch.setattr(kernels, "triton_trouble", lambda device: kernels.trouble_of(lambda: failing, cpu))
    stream = open_stream(make_model())
    plan = plan_linears(stream, QuantSpec(group_size=32))
    stream.device = gpu
    note_plan(stream, plan, recorder)
    told = "Triton does not work here, so torch quantizes the columns: slower; no driver"
    assert recorder.notes == [told]
    assert kernels.column_loop(gpu) is kernels.plain_columns


@needs_triton
def test_the_kernel_passes_its_trial(interpreted: dict[str, dict[str, Any]]) -> None:
    assert interpreted["trouble"] == ""


def test_uploads_wait_for_the_stream_that_they_are_used_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever the caller's is: what an earlier block had may still be read there."""
    log: list[str] = []
    copying, user = FakeStream("copying", log), FakeStream("user", log)
    monkeypatch.setattr(copying, "synchronize", lambda: log.append("copied"), raising=False)
    monkeypatch.setattr(workers, "_copying", lambda device: copying)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    empty_like = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda tensor, device: empty_like(tensor))

    uploaded({"weight": torch.ones(3)}, torch.device("cuda"), user)  # type: ignore[arg-type]
    assert log == ["on copying", "copying waits for user", "off copying", "copied"]


@pytest.mark.parametrize(
    ("device", "capability", "stored", "computed"),
    [
        ("cpu", (0, 0), torch.bfloat16, torch.float32),
        ("cuda", (9, 0), torch.bfloat16, torch.bfloat16),
        ("cuda", (8, 0), torch.bfloat16, torch.bfloat16),
        ("cuda", (7, 5), torch.bfloat16, torch.float32),  # a T4
        ("cuda", (7, 5), torch.float16, torch.float16),
    ],
)
def test_bfloat16_is_not_chosen_where_it_is_emulated(
    device: str,
    capability: tuple[int, int],
    stored: torch.dtype,
    computed: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert computed_in(torch.device(device), stored) == computed


def test_codes_are_copied_beside_the_work_and_waited_for_by_who_writes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    log, landing = beside_main(monkeypatch, carried, "_landing", "landing")
    monkeypatch.setattr(torch, "empty", lambda shape, dtype, pin_memory: Pinned(log))
    event = type("Event", (), {"synchronize": lambda self: log.append("waited")})()
    monkeypatch.setattr(landing, "record_event", lambda: log.append("landing records") or event, raising=False)
    found, wait = carried._to_host({"words": OnGpu(log), "group": torch.arange(3)})  # type: ignore[dict-item]
    work = ["landing waits for main", "on landing", "copied without a wait", "kept for landing", "off landing"]
    assert log == [*work, "landing records"]
    assert torch.equal(found["group"], torch.arange(3))
    wait()
    assert log[-1] == "waited"


class OnGpu:
    """Says that it is a tensor of one, and notes what stream it is kept for."""

    device, shape, dtype = torch.device("cuda"), (4, 2), torch.int32

    def __init__(self, log: list[str]) -> None:
        self._log = log

    def contiguous(self) -> OnGpu:
        return self

    def record_stream(self, stream: FakeStream) -> None:
        self._log.append(f"kept for {stream._name}")


class Pinned:
    def __init__(self, log: list[str]) -> None:
        self._log = log

    def copy_(self, source: OnGpu, non_blocking: bool) -> Pinned:
        self._log.append("copied without a wait" if non_blocking else "copied")
        return self


def test_a_torch_that_sums_halves_otherwise_is_told(
    make_model: MakeModel, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = open_stream(make_model())
    plan = plan_linears(stream, QuantSpec(group_size=32))
    monkeypatch.setattr(checks, "shortfall", lambda device: None)
    monkeypatch.setattr(checks, "adds_up_in_float32", lambda dtype, device: dtype == torch.float32)
    stream.device, stream.dtype = torch.device("cuda"), torch.bfloat16
    note_plan(stream, plan, recorder)
    assert recorder.notes == [
        "this torch does not add up products of bfloat16 in float32 here, so activations are cast for Hessians: "
        "slower; torch 2.9 does"
    ]
    stream.dtype = torch.float32
    note_plan(stream, plan, recorder)
    assert len(recorder.notes) == 1


def test_what_a_cpu_computes_with_is_not_uploaded() -> None:
    stored = {"weight": torch.ones(3)}
    assert uploaded(stored, torch.device("cpu")) is stored


# -- the benchmark ---------------------------------------------------------------------------------------------------


def test_the_benchmark_runs_without_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(__file__).parents[2] / "benchmarks"
    monkeypatch.syspath_prepend(str(folder))
    benchmark = runpy.run_path(str(folder / "gpu.py"))
    options = "--shape llama-3-8b --device cpu --layers 2 --samples 2 --seq-len 32 --width 128 --group-size 32 --phases"
    monkeypatch.setattr(sys, "argv", ["gpu.py", *options.split(), "--out", str(tmp_path / "result.json")])
    benchmark["main"]()

    found = json.loads((tmp_path / "result.json").read_text())
    assert (found["layers"], found["tokens"], found["kernel"]) == (2, 64, False)
    # q and o are 128 x 128, k and v 64 x 128 (two heads share one), gate and up 448 x 128, down 128 x 448.
    linears = 2 * (2 * 128 * 128 + 2 * 64 * 128 + 3 * 448 * 128)
    assert found["operations"]["forwards"] == 2 * 64 * linears + 2 * 4 * 64 * 16 * 128
    assert found["operations"]["hessians"] == 2 * 64 * (3 * 128**2 + 448**2)
    assert found["operations"]["columns"] == 2 * ((2 * 128 + 2 * 64 + 2 * 448) * 128**2 + 128 * 448**2)
    assert found["over_floor"] == pytest.approx(found["seconds"] / sum(found["floor"].values()))
    timed = found["phases"]
    assert {"hessians", "factors", "grids", "columns", "forwards and the rest"} < timed.keys()
    assert all(seconds > 0 for seconds in timed.values())
    assert timed.pop("all") == pytest.approx(sum(timed.values()))


@pytest.mark.parametrize("step", ["facts", "families", "micro", "fast", "experts"])
@pytest.mark.filterwarnings("ignore:.*experts saw fewer calibration tokens")
def test_the_first_run_on_a_gpu_runs_without_one(step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(__file__).parents[2] / "benchmarks"
    monkeypatch.syspath_prepend(str(folder))
    first_run, told = runpy.run_path(str(folder / "gpu_first_run.py")), list[dict[str, Any]]()

    def tell(**facts: Any) -> None:
        told.append(facts)

    first_run["run_step"](step, first_run["Run"](torch.device("cpu"), True, tmp_path, tell))
    facts = {key: value for line in told for key, value in line.items()}
    expected: dict[str, Any] = {
        "facts": facts.get("GB_a_second", {}).get("packed to 4 bits"),
        "families": facts.get("within"),
        "micro": facts.get("milliseconds", {}).get("grid and columns"),
        "fast": facts.get("phases", {}).get("quantizing blocks"),
        "experts": facts.get("tokens_a_batch") == 16384,
    }
    assert expected[step], told
    assert list(tmp_path.glob("*/")) == []  # models go


# -- on a GPU --------------------------------------------------------------------------------------------------------

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here")


@pytest.mark.gpu
@on_gpu
@needs_triton
def test_gpu_kernel_is_the_column_by_column_loop_bit_for_bit() -> None:
    for name, (W, U, scale, minimum, top) in BLOCKS.items():
        codes = torch.full(W.shape, 99, dtype=torch.uint8, device="cuda")
        kernel = kernels.column_loop(codes.device)
        assert kernel is not kernels.plain_columns
        Err = kernel(W.cuda(), U.cuda().contiguous(), scale.cuda(), minimum.cuda(), top, codes)

        expected_codes, expected_err = reference(W, U, scale, minimum, top)
        assert torch.equal(codes.cpu(), expected_codes), name
        assert torch.equal(Err.cpu(), expected_err), name


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("with_triton", [True, False], ids=["triton", "torch"])
def test_gpu_layer_is_the_cpus(with_triton: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not with_triton:
        monkeypatch.setattr(kernels, "_has_triton", lambda: False)
    for name in LAYERS:
        W, H, spec = layer(name)
        found, expected = quantize(W.cuda(), H.cuda(), QuantSpec(**spec)), quantize(W, H, QuantSpec(**spec))

        assert float((found.linear.codes.cpu() == expected.linear.codes).float().mean()) > 0.999, name
        assert float(found.loss.sum()) == pytest.approx(float(expected.loss.sum()), rel=1e-3), name


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_gpu_hessian_of_half_precision_activations(dtype: torch.dtype) -> None:
    x = torch.randn(3, 700, 264, generator=torch.Generator().manual_seed(0)).to(dtype)
    hessian = HessianAccumulator(264, torch.device("cuda"))
    for batch in x:
        hessian.add(batch.cuda())

    assert_mean_product(hessian.finish("layer").cpu(), x.reshape(-1, 264))
    assert adds_up_in_float32(dtype, x[0].cuda().device)  # the pinned torch has the product


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gpu_run_is_about_the_cpus(make_model: MakeModel, tiny_tokens: TokenMatrix, tmp_path: Path, dtype: Any) -> None:
    """Prefetched blocks, paused forwards, kernel, container and evaluation, all on the GPU."""
    perplexity = {}
    for device in ("cpu", "cuda"):
        report = quantkit.gptq(
            make_model(),
            tmp_path / device,
            group_size=32,
            calibration=tiny_tokens,
            device=device,
            dtype="float32" if device == "cpu" else dtype,
        )
        assert report.evaluation is not None
        perplexity[device] = report.evaluation.results[-1].perplexity
    assert perplexity["cuda"] == pytest.approx(perplexity["cpu"], rel=0.01)
