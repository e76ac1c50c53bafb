"""What a GPU does otherwise than a CPU: the column loop as one Triton program for each tile of rows (`columns`), the
search for grids as one for each group and tile of rows (`grids`), the factorization beside other work. Half-precision
products for Hessians are in `hessian`.

Triton is imported, and both are tried on a small block, when the first kernel is asked for: that it is installed does
not say that there is a compiler, Python's headers and a folder for what it compiles. Where it does not work, or Numba
is missing on a CPU, torch does the work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from importlib.util import find_spec
from subprocess import CalledProcessError

from quantkit.errors import first_line
from quantkit.late import torch
from quantkit.quantize import loops
from quantkit.quantize.levels import nearest_codes
from quantkit.quantize.search import REFITS, fractions_of, search_grids

ColumnLoop = Callable[
    [
        "torch.Tensor",
        "torch.Tensor",
        "torch.Tensor",
        "torch.Tensor",
        int,
        "torch.Tensor",
        "torch.Tensor | None",
    ],
    "torch.Tensor",
]
"""`loops.quantize_columns`, which says what it takes and gives."""
GridSearch = Callable[
    ["torch.Tensor", "torch.Tensor", int, "torch.Tensor", int, bool, int], "tuple[torch.Tensor, torch.Tensor]"
]
"""`grids.search_grids`, which says what it takes and gives."""
LARGEST_GROUP = 1024  # columns whose grids a kernel searches


def column_loop(device: torch.device) -> ColumnLoop:
    """The loop over a block's columns for weights on `device`: Triton's, Numba's, or torch's own."""
    if device.type == "cuda" and _has_triton() and not triton_trouble(device):
        return _tritons()
    return loops.quantize_columns if device.type == "cpu" and loops.has_numba() else plain_columns


def grid_search(device: torch.device, size: int) -> GridSearch | None:
    """The search for grids of groups of so many columns as one kernel; None where there is none, and torch's or Numba's
    loops do it."""
    if device.type != "cuda" or size > LARGEST_GROUP or not _has_triton() or triton_trouble(device):
        return None
    return _triton_grids()


def plain_columns(
    W: torch.Tensor,
    U: torch.Tensor,
    scale: torch.Tensor,
    minimum: torch.Tensor,
    top: int,
    codes: torch.Tensor,
    levels: torch.Tensor | None = None,
) -> torch.Tensor:
    """`loops.quantize_columns` in torch's own operations, on any device.

    A column gathers the errors of the block's earlier columns when it is reached (one matrix-vector product) rather
    than every column being updated after each one.
    """
    Ut, diagonal = U.T.contiguous(), U.diagonal().tolist()
    scale = scale.contiguous()
    inverse = torch.where(scale == 0, 0.0, scale.reciprocal())
    shifted = W + minimum
    errors, found = torch.empty_like(scale), torch.empty_like(scale)
    for j in range(W.shape[0]):
        w = shifted[j]
        if j:
            w = torch.addmv(w, errors[:j].T, Ut[j, :j], alpha=-1)
        found[j], steps = nearest_codes(torch.mul(w, inverse[j], out=found[j]), top, levels)
        torch.addcmul(w, steps, scale[j], value=-1, out=errors[j]).div_(diagonal[j])
    codes.copy_(found)
    return errors


def shortfall(device: torch.device) -> str | None:
    """What a run on `device` does without, and what to do about it, in one line; None where nothing is missing."""
    if device.type == "cuda" and not _has_triton():
        return "Triton is missing, so torch quantizes the columns: slower; pip install 'quantkit[gpu]'"
    if device.type == "cuda" and (trouble := triton_trouble(device)):
        return f"Triton does not work here, so torch quantizes the columns: slower; {trouble}"
    if device.type == "cpu" and not loops.has_numba():
        return "Numba is missing, so torch quantizes the columns: slower; pip install 'quantkit[cpu]'"
    return None


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


@cache
def triton_trouble(device: torch.device) -> str:
    """Why Triton's kernels are not to be used on `device`, where it is installed, in a few words; "" if they work."""
    return trouble_of(_tritons, device, _triton_grids)


def trouble_of(
    loop: Callable[[], ColumnLoop], device: torch.device, search: Callable[[], GridSearch] | None = None
) -> str:
    """What keeps the loop that `loop` imports, and the search that `search` does, from doing on `device` what the plain
    ones do, tried on a small block; "" where nothing does."""
    try:
        same = _as_plain(loop(), device) and (search is None or _finds_grids(search(), device))
    except CalledProcessError:
        return "a C compiler failed for it; install Python's headers (python3-dev)"
    except OSError as error:
        where = f" {error.filename}" if error.filename else ""
        return f"{error.strerror or error}{where}; have TRITON_CACHE_DIR name a folder that can be written"
    except Exception as error:  # whatever a compiler, a driver or another Triton says
        return first_line(error)
    return "" if same else "its codes are not those of torch"


def _tritons() -> ColumnLoop:
    from quantkit.quantize.kernels.columns import quantize_columns

    return quantize_columns


def _triton_grids() -> GridSearch:
    from quantkit.quantize.kernels import grids

    return grids.search_grids


def _finds_grids(search: GridSearch, device: torch.device) -> bool:
    """Whether a search finds on a small block what the plain one does, up to candidates whose errors are as good as
    equal."""
    generator = torch.Generator().manual_seed(0)
    W, h = torch.randn(37, 64, generator=generator).to(device), torch.rand(64, generator=generator).to(device)
    same = []
    for bits, sym in ((4, True), (3, False)):
        given = fractions_of(bits, sym, device), bits, sym, REFITS
        pairs = zip(search(W, h, 32, *given), search_grids(W, h, 32, bits, sym), strict=True)
        same += [found == plain for found, plain in pairs]
    return float(torch.cat(same).float().mean()) > 0.95


def _as_plain(loop: ColumnLoop, device: torch.device) -> bool:
    """Whether a loop gives on a small block what the plain one does, up to the order of sums."""
    generator = torch.Generator().manual_seed(0)
    columns, rows, top = 13, 37, 15
    W, U = torch.randn(columns, rows, generator=generator), torch.randn(columns, columns, generator=generator)
    U = (torch.triu(U, diagonal=1) * 0.1 + torch.eye(columns)).to(device)
    scale = (0.2 + 0.2 * torch.rand(columns, rows, generator=generator)).to(device)
    W, minimum, found = W.to(device), scale * (top // 2), []
    for run in (loop, plain_columns):
        codes = torch.empty(columns, rows, dtype=torch.uint8, device=device)
        found.append((run(W, U, scale, minimum, top, codes, None), codes))
    (errors, codes), (plain_errors, plain_codes) = found
    return torch.equal(codes, plain_codes) and torch.allclose(errors, plain_errors, rtol=1e-4, atol=1e-5)


def placed(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the host on `device`, without a wait for its copy."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def beside(device: torch.device) -> AbstractContextManager[None]:
    """A ``with`` block whose work runs beside what the current stream still has to do; on a CPU, in turn.

    Make it where the block's inputs are ready, queue what is to run beside it, then enter it. The block waits for what
    was queued before it was made, and whatever is queued after the block waits for the block. A host that waits for a
    result inside the block does not wait for the work beside it.
    """
    if device.type != "cuda":
        return nullcontext()
    return _on_side_stream(device, torch.cuda.current_stream(device).record_event())


@contextmanager
def _on_side_stream(device: torch.device, ready: torch.cuda.Event) -> Iterator[None]:
    # Memory of earlier blocks comes back to this stream only after its last use: what used it was queued on the other
    # stream before `ready`.
    side = _side_stream(device)
    side.wait_event(ready)
    try:
        with torch.cuda.stream(side):
            yield
    finally:
        torch.cuda.current_stream(device).wait_stream(side)


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """Always the same one: memory belongs to the stream that it was taken on."""
    return torch.cuda.Stream(device)
