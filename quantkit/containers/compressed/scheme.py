"""What config.json of a compressed-tensors folder says: which modules are codes, of how many bits and which groups.

The library's own classes are `QuantizationConfig` and `QuantizationArgs` of compressed-tensors 0.20.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quantkit.containers.patterns import fits
from quantkit.errors import SourceError, shortened

REGEX = "re:"  # before a target that is a pattern of modules' names
CLASS = "Linear"  # the target that stands for all others
FORMATS = ("pack-quantized", "int-quantized", "naive-quantized", "float-quantized", "mixed-precision")
_SPARSE = ("sparse-bitmask", "sparse-24-bitmask", "marlin-24")
_STRATEGIES = ("tensor", "channel", "group", "block")


@dataclass(frozen=True)
class Scheme:
    """A config group.

    Attributes:
        targets: names of modules, patterns after ``re:``, or a class.
        bits, symmetric: of its codes.
        group_size: columns that share a scale; -1 where rows or the whole matrix do.
        block: rows and columns that share one; None but of blocks.
        floats: whether its weights are 8-bit floats.
    """

    targets: tuple[str, ...]
    bits: int
    symmetric: bool
    group_size: int
    block: tuple[int, int] | None = None
    floats: bool = False

    def __str__(self) -> str:
        if self.floats:
            return "fp8"
        group = "whole rows" if self.group_size == -1 else f"group {self.group_size}"
        return f"{self.bits}-bit {'symmetric' if self.symmetric else 'asymmetric'}, {group}"


def schemes_of(label: Mapping[str, Any], place: str) -> list[Scheme]:
    """The config groups of a folder's label, in order.

    Raises:
        SourceError: names what is not read: a format, a sparse or rotated model, activations in 8 bits or less.
    """
    _check_format(label.get("format"), place)
    sparsity = label.get("sparsity_config") or {}
    if isinstance(sparsity, Mapping) and sparsity.get("format", "dense") != "dense":
        raise SourceError(f"{place}: its weights are sparse ({sparsity['format']!r}), which is not read")
    if label.get("transform_config"):
        raise SourceError(f"{place}: its transform_config rotates weights, which is not read")
    groups = label.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise SourceError(f"{place}: its quantization_config has no config_groups")
    return [_scheme(str(name), group, place) for name, group in groups.items()]


def _check_format(name: Any, place: str) -> None:
    if name in _SPARSE:
        raise SourceError(f"{place}: its weights are sparse ({name!r}), which is not read")
    if name not in FORMATS:
        raise SourceError(f"{place}: format {name!r} is not one of {', '.join(FORMATS)}")


def _scheme(name: str, group: Any, place: str) -> Scheme:
    place = f"{place}: {shortened(name, 80)}"
    if not isinstance(group, Mapping) or not isinstance(group.get("weights"), Mapping):
        raise SourceError(f"{place} of config_groups says nothing of weights")
    if group.get("format") is not None:
        _check_format(group["format"], place)
    targets, weights = group.get("targets"), group["weights"]
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise SourceError(f"{place}: targets are not a list of names")
    bits, kind, strategy = weights.get("num_bits"), weights.get("type", "int"), _strategy(weights)
    floats = kind == "float" and bits == 8
    if not floats and (kind != "int" or type(bits) is not int or not 2 <= bits <= 8):
        raise SourceError(f"{place}: weights of {bits!r} bits, {kind!r}; integers of 2 to 8 are read, and 8-bit floats")
    for key in ("input_activations", "output_activations"):
        if group.get(key) and not floats:  # floats lose no range by it: only the arithmetic is another
            raise SourceError(f"{place}: quantizes activations too ({key}), which is not read")
    if strategy not in _STRATEGIES or (strategy == "block" and not floats):
        raise SourceError(f"{place}: strategy {strategy!r} is not one of {', '.join(_STRATEGIES[:3])}")
    size, block = weights.get("group_size"), weights.get("block_structure")
    if strategy == "group" and (type(size) is not int or size <= 0):
        raise SourceError(f"{place}: group_size {size!r} is no number of columns")
    if strategy == "block" and not (isinstance(block, list) and len(block) == 2 and all(map(_is_count, block))):
        raise SourceError(f"{place}: block_structure {block!r} is not two positive numbers")
    symmetric = weights.get("symmetric", True)
    if not isinstance(symmetric, bool):
        raise SourceError(f"{place}: symmetric {symmetric!r} is neither true nor false")
    columns = size if strategy == "group" else -1
    return Scheme(
        tuple(targets), bits, symmetric, columns, (block[0], block[1]) if strategy == "block" else None, floats
    )


def _is_count(number: Any) -> bool:
    return type(number) is int and number > 0


def _strategy(weights: Mapping[str, Any]) -> Any:
    """As the library infers it where nothing says so."""
    given, size = weights.get("strategy"), weights.get("group_size")
    if given is not None:
        return given
    return "tensor" if size is None else "channel" if size == -1 else "group"


def scheme_of(module: str, schemes: Sequence[Scheme], place: str) -> Scheme:
    """The config group that a module which is stored as codes belongs to.

    Raises:
        SourceError: none.
    """
    if len(schemes) == 1:
        return schemes[0]
    found = next(_matching(module, schemes, place), None)
    if found is None:
        raise SourceError(f"{place}: {module} is stored as codes, and no config group is for it")
    return found


def _matching(module: str, schemes: Sequence[Scheme], place: str) -> Iterator[Scheme]:
    """Names before classes, as the library's `match_targets`."""
    for scheme in schemes:
        for target in scheme.targets:
            pattern = target.removeprefix(REGEX)
            if target == module or (pattern != target and fits(pattern, module, f"{place}: the target")):
                yield scheme
    yield from (scheme for scheme in schemes if CLASS in scheme.targets)
