"""What a gptq run writes its codes into: a checkpoint, in the layout that its container's row names, or what else has
the methods of a `Target`, such as a GGUF file (`gguf_target`).

Making a target decides which Linears are quantized, and to what, and refuses what its container cannot hold, from
headers alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from quantkit.blocks.stream import ModelStream
from quantkit.codes import Codes, LinearPlan, Plan
from quantkit.codes.block_types import BLOCK_TYPES
from quantkit.containers import Container, load, misfit_end, of_format
from quantkit.containers.hf.coded import as_kept, kept_tensor
from quantkit.containers.source import Source, Weights, by_prefix
from quantkit.errors import UsageError
from quantkit.late import torch
from quantkit.options import CheckpointFormat, End, EndBits, QuantSpec, matches
from quantkit.runs.tensorfile import TensorPlan, header


def plan_linears(stream: ModelStream, spec: QuantSpec) -> Plan:
    """Apply the patterns of `spec` to the Linears of a model's blocks.

    Raises:
        UsageError: a pattern that no Linear matches, or nothing left to quantize.
    """
    shapes = dict(stream.linears())
    overridden = tuple(pattern for pattern, _ in spec.overrides)
    for option, patterns in (("include", spec.include), ("exclude", spec.exclude), ("override", overridden)):
        for pattern in patterns:
            if not any(matches(pattern, name) for name in (*shapes, *stream.uncalled)):
                stored = (n.removesuffix(".weight") for n in stream.weights.tensors if n.endswith(".weight"))
                if beside := next((name for name in stored if matches(pattern, name)), None):
                    why = f"{beside} is no Linear of a decoder block, and stays as it is"
                    raise UsageError(f"--{option} {pattern}: {why}")
                raise UsageError(f"--{option} {pattern}: no Linear has such a name; one is {next(iter(shapes))}")
    plan = {name: LinearPlan(shape, own) for name, shape in shapes.items() if (own := spec.of(name)) is not None}
    if not plan:
        raise UsageError("--include and --exclude leave no Linear to quantize")
    return plan


def ends_of(stream: ModelStream) -> dict[str, End]:
    """Head and embedding by their modules' names; where they are tied, the one that is both."""
    embedding, head = (name.removesuffix(".weight") for name in stream.ends)
    return {head: "both"} if embedding == head else {head: "head", embedding: "embeddings"}


def plan_ends(
    stream: ModelStream,
    spec: QuantSpec,
    bits: EndBits,
    row: Container,
    group_of: Callable[[int], int] | None = None,
) -> Plan:
    """What head and embedding are quantized to in a container, where they are: as `spec` says, but for the bits, and
    embeddings are rounded. A tied matrix is quantized as the head that it is.

    Args:
        group_of: their group by their width; None: that of `spec`.

    Raises:
        UsageError: two numbers of bits for one matrix, or one that would have to be two there.
    """
    wanted: dict[End, int | None] = {"head": bits.head, "embeddings": bits.embeddings}
    if not bits.given:
        return {}
    ends = ends_of(stream)
    if "both" in ends.values():
        if len({*bits.given.values()}) > 1:
            raise UsageError(
                f"--head {bits.head}, --embeddings {bits.embeddings}: they are one matrix here (tied): give one number "
                "of bits, or --untie"
            )
        wanted = {"both": bits.head or bits.embeddings}
        if row.holds is not None and "head" in row.holds.ends and "both" not in row.holds.ends:
            refusal = misfit_end(row, "both", spec.model_copy(update={"bits": wanted["both"]}))
            raise UsageError(f"{refusal}, or --untie makes a head of its own")
    plan = {}
    for name, end in ends.items():
        if (own := wanted[end]) is not None:
            rows, columns = stream.weights.tensors[f"{name}.weight"].shape
            changes: dict[str, Any] = {"bits": own, "include": (), "exclude": (), "overrides": ()}
            changes |= {"method": "round"} if end == "embeddings" else {}
            changes |= {} if group_of is None else {"group_size": group_of(columns)}
            plan[name] = LinearPlan((rows, columns), spec.model_copy(update=changes), end)
    return plan


def on_grid_of(ggml: str) -> dict[str, Any]:
    """The fields of a `QuantSpec` whose codes lie on a GGML type's grid."""
    kind = BLOCK_TYPES[ggml]
    return {"bits": kind.bits, "group_size": kind.group, "sym": not kind.has_minimum, "ggml": ggml}


def modules_in_block(stream: ModelStream, plan: Plan) -> list[list[str]]:
    """Names within a block of the Linears that are quantized in any block, by stage where the stages are known."""
    seen: dict[str, list[str]] = {}
    for index, stages in enumerate(stream.known_stages()):
        for stage in stages:
            names = [stream.published(index, name) for name in stage]
            inside = [name.split(f".{index}.", 1)[1] for name in names if name in plan]
            group = next((seen[name] for name in inside if name in seen), [])
            group += [name for name in inside if name not in seen]
            seen.update(dict.fromkeys(inside, group))
    return list({id(group): group for group in seen.values()}.values())


def named_alike(stream: ModelStream, plan: Plan, modules: Sequence[Sequence[str]]) -> list[str]:
    """Regular expressions of what readers would look for as codes by its name, and is none of the blocks' Linears.

    So are the Linears of a vision tower, of layers beyond the last, and those that no forward calls.
    """
    ends = tuple(f".{name}" for stage in modules for name in stage)
    stored = (name.removesuffix(".weight") for name in stream.weights.tensors if name.endswith(".weight"))
    linears = {name for name, _ in stream.linears()}
    alike = [module for module in stored if module.endswith(ends) and module not in linears]
    found: dict[str, None] = {}
    for prefix, inside in by_prefix(alike, plan).items():
        exact = re.escape(prefix) + ("$" if inside == [prefix] else r"\.")
        of_all = re.sub(r"(?<=\.)\d+(?=\\\.|\$)", r"\\d+", exact)  # of every block, where that is no quantized one's
        found[exact if any(re.match(of_all, module) for module in plan) else of_all] = None
    return list(found)


class CodesWriter(Protocol):
    """Order of use: `add_linear` for every Linear of the plan, `add_others`, `finish`."""

    def add_linear(self, module: str, linear: Codes) -> None:
        """Write one Linear's codes."""

    def add_others(self) -> None:
        """Write everything that is not quantized."""

    def finish(self) -> None:
        """Write what remains and read the codes back. Raises OutputError."""


class FolderWriter(CodesWriter, Protocol):
    """That of a checkpoint. `add_other` for every tensor that is not quantized does what `add_others` does."""

    def add_other(self, name: str, tensor: torch.Tensor) -> None:
        """Write one tensor that is not quantized, as `as_kept` gives it."""


class Target(Protocol):
    """Where codes go.

    Attributes:
        plan: what every Linear is quantized to.
        bytes: of all tensors.
        quantized_bytes: of the quantized Linears, with scales and minima or zeros.
        head_bytes: of what the weight files have beside tensors.
        ends: GGML types of the embedding and the output matrix where they are rounded, by published name; of a tied one
            once.
        changed: tensors that are written instead of the source's, by published name; to be filled before `writer`.
    """

    plan: Plan
    bytes: int
    quantized_bytes: int
    ends: Mapping[str, str]
    changed: dict[str, torch.Tensor]

    def gain_dtype(self, name: str) -> torch.dtype:
        """What a norm's gains are written in, by their published name."""

    @property
    def head_bytes(self) -> int: ...

    def check_kept(self, name: str, values: torch.Tensor) -> None:
        """Refuse a tensor of these values that is not quantized and cannot be written. Raises NumericError."""

    def writer(self, folder: Path) -> AbstractContextManager[CodesWriter]:
        """Write into a folder that is not yet the finished output."""

    def model_in(self, folder: Path) -> Path:
        """What a reader opens of a finished output."""


class Layout(Protocol):
    """The module that writes a checkpoint's container, which its row names."""

    def check(self, linears: Plan) -> None:
        """Refuse what the container cannot hold, by its row and by shapes. Raises UsageError."""

    def quantization_config(
        self,
        spec: QuantSpec,
        checkpoint_format: CheckpointFormat,
        modules: Sequence[Sequence[str]],
        kept: Sequence[str] = (),
    ) -> dict[str, Any]:
        """The quantization that config.json says; `kept` are regular expressions of modules beside the Linears."""

    def plan(self, source: Source, weights: Weights, linears: Plan) -> list[TensorPlan]:
        """Every tensor that the checkpoint will hold, in the source's order."""

    def writer(
        self,
        folder: Path,
        source: Source,
        weights: Weights,
        linears: Plan,
        quantization: dict[str, Any],
        max_shard_bytes: int,
    ) -> AbstractContextManager[FolderWriter]:
        """Write into a folder that is not yet the finished output."""


class CheckpointTarget:
    """A folder of packed Linears, in the layout of the container that has the format."""

    def __init__(
        self,
        stream: ModelStream,
        spec: QuantSpec,
        format: CheckpointFormat,
        max_shard_bytes: int,
        plan: Plan | None = None,
        ends: Plan | None = None,
    ) -> None:
        """
        Args:
            stream, spec: the model, and what its Linears are quantized to.
            format: of the folder.
            max_shard_bytes: of a weight file.
            plan: of codes that are there already; `spec` describes it. None: as the patterns of `spec` say, and `ends`.
            ends: what is quantized outside the blocks, as `plan_ends` has it.

        Raises:
            UsageError: a pattern that no Linear matches, or what the layout has no place for.
        """
        self.changed: dict[str, torch.Tensor] = {}
        self.ends: Mapping[str, str] = {}
        self._source, self._max_shard_bytes = stream.source, max_shard_bytes
        self._weights = replace(stream.weights, changed=self.changed)
        self.plan = {**plan_linears(stream, spec), **(ends or {})} if plan is None else plan
        self._layout: Layout = load(of_format(format).writes)
        self._layout.check(self.plan)
        modules = modules_in_block(stream, self.plan)
        kept = named_alike(stream, self.plan, modules)
        self._quantization = self._layout.quantization_config(spec, format, modules, kept)
        tensors = self._layout.plan(self._source, self._weights, self.plan)
        parts = [(tensor.bytes, *tensor.name.rpartition(".")) for tensor in tensors]
        self.bytes = sum(tensor.bytes for tensor in tensors)
        self.head_bytes = len(header(tensors)[0])
        self.quantized_bytes = sum(size for size, module, _, part in parts if module in self.plan and part != "bias")

    def share(self, changed: dict[str, torch.Tensor]) -> None:
        """Have the changed tensors of another target, whatever they will be."""
        self.changed, self._weights = changed, replace(self._weights, changed=changed)

    def check_kept(self, name: str, values: torch.Tensor) -> None:
        as_kept(name, values, self._weights.dtype(name))

    def kept(self) -> Iterator[tuple[str, torch.Tensor]]:
        """What is not quantized, each in the dtype it is published in, one at a time."""
        for name in self._weights.tensors:
            if not (name.endswith(".weight") and name.removesuffix(".weight") in self.plan):
                yield name, kept_tensor(self._weights, name)

    def gain_dtype(self, name: str) -> torch.dtype:
        return self._weights.dtype(name)

    def writer(self, folder: Path) -> AbstractContextManager[FolderWriter]:
        return self._layout.writer(
            folder, self._source, self._weights, self.plan, self._quantization, self._max_shard_bytes
        )

    def model_in(self, folder: Path) -> Path:
        return folder


class Folders:
    """Several folders of the same codes, each in a container of its own: FOLDER/FORMAT.

    What stays as it is, is the same in all; `quantized_bytes` is that of the folder that takes most.
    """

    def __init__(self, folders: Mapping[CheckpointFormat, CheckpointTarget]) -> None:
        self.folders = folders
        first, *others = folders.values()
        self.plan, self.ends, self.changed, self._first = first.plan, first.ends, first.changed, first
        for other in others:
            other.share(self.changed)
        self.bytes = sum(folder.bytes for folder in folders.values())
        self.head_bytes = sum(folder.head_bytes for folder in folders.values())
        self.quantized_bytes = max(folder.quantized_bytes for folder in folders.values())

    def check_kept(self, name: str, values: torch.Tensor) -> None:
        self._first.check_kept(name, values)

    def gain_dtype(self, name: str) -> torch.dtype:
        return self._first.gain_dtype(name)

    @contextmanager
    def writer(self, folder: Path) -> Iterator[CodesWriter]:
        with ExitStack() as stack:
            writers = []
            for format, target in self.folders.items():
                (folder / format).mkdir()
                writers.append(stack.enter_context(target.writer(folder / format)))
            yield _Together(writers, self._first)

    def model_in(self, folder: Path) -> Path:
        return folder / next(iter(self.folders))


class _Together:
    """Writers of several folders, each of which gets every tensor as soon as it is there."""

    def __init__(self, writers: Sequence[FolderWriter], first: CheckpointTarget) -> None:
        self._writers, self._first = writers, first

    def add_linear(self, module: str, linear: Codes) -> None:
        for writer in self._writers:
            writer.add_linear(module, linear)

    def add_others(self) -> None:
        for name, tensor in self._first.kept():
            for writer in self._writers:
                writer.add_other(name, tensor)

    def finish(self) -> None:
        for writer in self._writers:
            writer.finish()
