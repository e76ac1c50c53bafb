"""What folders of codes have in common, whatever their layout: Linears read as codes or as weights, and written."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self

from quantkit.codes import Codes, Plan, QuantizedLinear, StoredCodes
from quantkit.containers import CONTAINERS, misfit, misfit_end
from quantkit.containers.hf.read import FolderSource, quantization_of, stored_dtype, untied, without_next_layers
from quantkit.containers.hf.write import ShardedWriter
from quantkit.containers.source import HoldsCodes, Source, TensorInfo, Weights
from quantkit.containers.values import all_finite
from quantkit.errors import NumericError, SourceError, UsageError
from quantkit.late import torch
from quantkit.options import QuantSpec
from quantkit.runs.atomic import write_json
from quantkit.runs.tensorfile import TensorPlan


class CodedFolder(FolderSource):
    """A folder whose Linears are codes with a scale and a zero for each group. `read` gives them dequantized.

    Attributes:
        of_linear: last parts of the names of a Linear's tensors; the first is what every one has and nothing else.
        scales: of them the one that holds scales.
        stored_as: what its weights are called beside their bits: "GPTQ4".
    """

    of_linear: ClassVar[tuple[str, ...]]
    scales: ClassVar[str] = "scales"
    stored_as: ClassVar[str]
    quantization: dict[str, Any]

    def __init__(self, folder: Path, label: str | None = None, trust_remote_code: bool = False) -> None:
        super().__init__(folder, label, trust_remote_code)
        self.quantization = quantization_of(folder)
        ending = f".{self.of_linear[0]}"
        self._modules = [n.removesuffix(ending) for n in self.stored.tensors if n.endswith(ending)]

    @cached_property
    def dtype(self) -> torch.dtype:
        return stored_dtype(
            {n: i for n, i in self.stored.tensors.items() if n.rpartition(".")[2] not in self.of_linear}
        )

    @abstractmethod
    def bits(self, module: str) -> int:
        """Bits of a module's codes."""

    @abstractmethod
    def shape(self, module: str) -> tuple[int, int]:
        """(out, in) of a module."""

    @abstractmethod
    def read_unpacked(self, module: str) -> torch.Tensor:
        """Codes of one Linear, uint8 [out, in]."""

    @abstractmethod
    def read_zeros(self, module: str) -> torch.Tensor:
        """Zeros of one Linear, uint8 [out, groups]."""

    @abstractmethod
    def read_groups(self, module: str) -> torch.Tensor:
        """Group of each column of one Linear, int32 [in]."""

    def group_size(self, module: str) -> int:
        """Columns that share a scale, -1 for whole rows; 0: as the label says."""
        return 0

    @property
    def codes(self) -> HoldsCodes | None:
        return self

    @cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """The dequantized names: a Linear's parts appear as one weight."""
        stored = self.stored.tensors
        shown = {n: i for n, i in stored.items() if n.rpartition(".")[2] not in self.of_linear}
        for module in self._modules:
            size = sum(stored[f"{module}.{part}"].bytes for part in self.of_linear if f"{module}.{part}" in stored)
            bits = self.bits(module)
            name = f"{self.stored_as}{bits}"
            shown[f"{module}.weight"] = TensorInfo(self.shape(module), name, size, bits, self.group_size(module))
        return shown

    def quantized_names(self) -> Iterable[str]:
        return self._modules

    def is_coded(self, name: str) -> bool:
        """Whether a tensor that is shown is a Linear's codes."""
        module = name.removesuffix(".weight")
        return name.endswith(".weight") and f"{module}.{self.of_linear[0]}" in self.stored.tensors

    def read(self, name: str) -> torch.Tensor:
        if not self.is_coded(name):
            return self.stored.read(name)
        return self.read_rows(name, 0, self.shape(name.removesuffix(".weight"))[0])

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        if not self.is_coded(name):
            return self.stored.read_rows(name, start, stop)
        return self._stored(name.removesuffix(".weight")).placed(lambda part: part[start:stop]).floats()

    def read_stored(self, name: str) -> StoredCodes | None:
        return self._stored(name.removesuffix(".weight")) if self.is_coded(name) else None

    def _stored(self, module: str) -> StoredCodes:
        parts = self.read_unpacked(module), self.stored_scales(module), self.read_zeros(module)
        return StoredCodes(*parts, self.read_groups(module))

    def read_codes(self, module: str) -> QuantizedLinear:
        codes, scales, zeros = self.read_unpacked(module), self.read_scales(module), self.read_zeros(module)
        return QuantizedLinear(codes, scales.T.contiguous(), zeros, self.read_groups(module), self.bits(module))

    def read_words(self, module: str) -> torch.Tensor | None:
        return None

    def read_scales(self, module: str) -> torch.Tensor:
        stored = self.stored_scales(module)
        scales = stored.half()
        if not torch.equal(scales.float(), stored):
            raise SourceError(
                f"{self.path}: {module}.{self.scales} hold more than float16; its codes cannot be taken as they are"
            )
        return scales.T.contiguous()

    def stored_scales(self, module: str) -> torch.Tensor:
        """Scales of one Linear, float32 [out, groups]. Raises SourceError where they are no numbers."""
        scales = self.oriented_scales(module)
        if not all_finite(scales):
            raise SourceError(
                f"{self.path}: {module}.{self.scales} hold NaN or infinity; the model's files are damaged"
            )
        return scales

    def oriented_scales(self, module: str) -> torch.Tensor:
        """The same, whatever they are."""
        return self.stored.read(f"{module}.{self.scales}").float()


Part = tuple[str, "torch.dtype", tuple[int, ...]]
"""Of a Linear's tensor: the last part of its name, its type and its shape."""


def plan_folder(
    weights: Weights, linears: Plan, parts: Callable[[tuple[int, int], QuantSpec, int], Iterable[Part]]
) -> list[TensorPlan]:
    """Every tensor that a folder of codes will hold, in the source's order.

    Args:
        weights, linears: of the model, and what of it is codes.
        parts: of a Linear's shape, spec and number of groups.
    """
    tensors = []
    for name, info in weights.tensors.items():
        linear = linears.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        if linear is None:
            tensors.append(TensorPlan(name, weights.dtype(name), info.shape))
            continue
        module = name.removesuffix(".weight")
        found = parts(linear.shape, linear.spec, linear.groups)
        tensors += [TensorPlan(f"{module}.{part}", dtype, shape) for part, dtype, shape in found]
    return tensors


def kept_matrices(weights: Weights, linears: Plan) -> list[str]:
    """Modules that stay as they are although readers may take them for Linears; not embeddings. By their published
    names, and by those of transformers' class where they are others."""
    matrices = [(n.removesuffix(".weight"), i) for n, i in weights.tensors.items() if n.endswith(".weight")]
    kept = [m for m, info in matrices if m not in linears and len(info.shape) > 1 and "embed" not in m]
    return also_called(weights, kept)


def also_called(weights: Weights, modules: Sequence[str]) -> list[str]:
    """Published names of modules, and after them what transformers' class calls those that it calls otherwise."""
    called = {published: name for name, published in weights.names.items()}
    names = (called.get(f"{module}.weight", "").removesuffix(".weight") for module in modules)
    return list(dict.fromkeys([*modules, *(name for name in names if name)]))


def check_holds(container: str, linears: Plan) -> None:
    """Refuse what a container cannot hold, by its row. Raises UsageError."""
    row = CONTAINERS[container]
    refusals = [misfit_end(row, linear.end, linear.spec) for linear in linears.values() if linear.end is not None]
    for refusal in (*refusals, misfit(row, {linear.spec for linear in linears.values()})):
        if refusal is not None:
            raise UsageError(refusal)


def check_whole_groups(container: str, linears: Plan) -> None:
    """Refuse a last group that is short, where a container has no place for one. Raises UsageError."""
    row = CONTAINERS[container]
    widths = {linear.shape[1] for linear in linears.values()}
    for name, linear in linears.items():
        size, columns = linear.spec.group_size, linear.shape[1]
        if size == -1 or columns % size == 0:
            continue
        known = row.holds.group_sizes if row.holds else ()
        fitting = [one for one in known if 0 < one <= size and all(width % one == 0 for width in widths)]
        advice = f"--group-size {max(fitting)} divides every width" if fitting else "use --group-size -1"
        raise UsageError(f"{name} is {columns} wide, no multiple of {size}: {row.one} has no short groups; {advice}")


class CodedWriter:
    """Writes a folder of codes, which is not yet the finished output. What a layout has of its own is its subclass's.

    Order of use: `add_linear` for every Linear, `add_others`, `finish`.

    Attributes:
        opens: its reader.
    """

    opens: ClassVar[type[CodedFolder]]

    def __init__(
        self,
        folder: Path,
        source: Source,
        weights: Weights,
        linears: Plan,
        quantization: dict[str, Any],
        max_shard_bytes: int,
    ) -> None:
        self.folder, self.source = folder, source
        self._weights, self._linears, self._quantization = weights, linears, quantization
        self._tensors = ShardedWriter(folder, plan_folder(weights, linears, self.parts_of), max_shard_bytes)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._tensors.close()

    @staticmethod
    def parts_of(shape: tuple[int, int], spec: QuantSpec, groups: int) -> list[Part]:
        """The tensors of a Linear of this shape, spec and number of groups a row."""
        raise NotImplementedError

    def pack(self, linear: QuantizedLinear, spec: QuantSpec) -> Iterator[tuple[str, torch.Tensor]]:
        """Of each tensor of a Linear the last part of its name, and what is written."""
        raise NotImplementedError

    def config(self) -> dict[str, Any]:
        """What config.json says of its codes, by key."""
        return {"quantization_config": self._quantization}

    def add_linear(self, module: str, linear: Codes) -> None:
        """Pack and write one Linear's codes; a bias goes with the other tensors."""
        assert isinstance(linear, QuantizedLinear)
        assert linear.shape == self._linears[module].shape
        assert linear.bits == self._linears[module].spec.bits
        for part, tensor in self.pack(linear, self._linears[module].spec):
            self._tensors.write(f"{module}.{part}", tensor)

    def add_others(self) -> None:
        """Copy every tensor that is not quantized, each in the dtype that the source keeps it in."""
        for name in self._weights.tensors:
            if not (name.endswith(".weight") and name.removesuffix(".weight") in self._linears):
                self.add_other(name, kept_tensor(self._weights, name))

    def add_other(self, name: str, tensor: torch.Tensor) -> None:
        """Write one of them."""
        self._tensors.write(name, tensor)

    def finish(self) -> None:
        """Write configs and tokenizer, then open the folder, read every tensor back and compare it.

        Raises:
            OutputError: what was read back is not what was written.
        """
        self._tensors.finish()
        dtype = str(self.source.dtype).removeprefix("torch.")
        config = {k: v for k, v in self.source.config_dict().items() if k not in ("dtype", "torch_dtype")}
        # transformers 5 reads dtype, transformers 4 torch_dtype.
        if self._weights.untied:
            config = untied(config)
        if self._weights.left_out:
            config = without_next_layers(config)
        write_json(self.folder / "config.json", config | {"dtype": dtype, "torch_dtype": dtype} | self.config())
        self.source.copy_companions(self.folder)
        reader = self.opens(self.folder, trust_remote_code=self.source.trusts_code)
        self._tensors.read_back(reader.stored.read)


def kept_tensor(weights: Weights, name: str) -> torch.Tensor:
    """A tensor that stays as it is, in the dtype it is published in. Raises NumericError as `as_kept` does."""
    return as_kept(name, weights.read(name), weights.dtype(name))


def as_kept(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A tensor that stays as it is, in the dtype it is published in.

    Raises:
        NumericError: a value that is not finite there.
    """
    if tensor.dtype == dtype:
        return tensor
    cast = tensor.to(dtype)
    if cast.is_floating_point() and not all_finite(cast):
        held = str(dtype).removeprefix("torch.")
        raise NumericError(f"{name}: a value is beyond {held}; convert the model to bfloat16")
    return cast
