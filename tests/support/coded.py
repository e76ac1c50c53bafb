"""Folders of codes that no run made: random ones, in any container, written as a run's target writes them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from quantkit.codes import LinearPlan, QuantizedLinear, contiguous_groups
from quantkit.options import QuantSpec
from quantkit.quantize.targets import CheckpointTarget
from support.streamed import open_stream


def random_linear(linear: LinearPlan, seed: int) -> QuantizedLinear:
    """Codes of all values, scales of both signs, and zeros as quantkit makes them: of symmetric codes the middle."""
    (rows, columns), spec = linear.shape, linear.spec
    dice = torch.Generator().manual_seed(seed)
    grid = rows, linear.groups
    scales = (torch.rand(grid, generator=dice) * 0.02 + 1e-3).half()
    signs = torch.randint(0, 2, grid, generator=dice) * 2 - 1
    zeros = torch.full(grid, 2 ** (spec.bits - 1), dtype=torch.uint8)
    if not spec.sym:
        zeros = torch.randint(1, 2**spec.bits, grid, generator=dice, dtype=torch.uint8)
    codes = torch.randint(0, 2**spec.bits, (rows, columns), generator=dice, dtype=torch.uint8)
    group = contiguous_groups(columns, spec.group_size)
    if spec.act_order == "dynamic":
        group = group[torch.randperm(columns, generator=dice)]
    return QuantizedLinear(codes, scales * signs if spec.sym else scales, zeros, group, spec.bits)


def write_codes(
    folder: Path,
    model: Path,
    spec: QuantSpec | Mapping[str, Any],
    format: str,
    seed: int = 0,
    shard: int = 10**9,
    make: Callable[[LinearPlan, int], QuantizedLinear] = random_linear,
) -> dict[str, QuantizedLinear]:
    """Random codes for every Linear of a model, written into a new folder; returns them."""
    made = spec if isinstance(spec, QuantSpec) else QuantSpec(**spec)
    target = CheckpointTarget(open_stream(model), made, format, shard)  # type: ignore[arg-type]
    codes = {name: make(linear, seed + n) for n, (name, linear) in enumerate(target.plan.items())}
    folder.mkdir(parents=True)
    with target.writer(folder) as out:
        for name, linear in codes.items():
            out.add_linear(name, linear)
        out.add_others()
        out.finish()
    return codes


def same(one: QuantizedLinear, other: QuantizedLinear) -> bool:
    parts = ((one.codes, other.codes), (one.scales, other.scales), (one.zeros, other.zeros), (one.group, other.group))
    return one.bits == other.bits and all(torch.equal(a, b) for a, b in parts)


# -- a folder made wrong ---------------------------------------------------------------------------------------------

Tensors = dict[str, torch.Tensor]
Change = Callable[[Tensors, Any], None]


def label_of(folder: Path) -> Any:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def changed(folder: Path, out: Path, change: Change) -> Path:
    """A copy of a folder with other tensors, or another label."""
    shutil.copytree(folder, out)
    tensors, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    change(tensors, config["quantization_config"])
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, out / "model.safetensors")
    (out / "config.json").write_text(json.dumps(config))
    return out


def drop(name: str) -> Change:
    return lambda tensors, _: tensors.__delitem__(name)


def put(name: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    return lambda tensors, _: tensors.update({name: make(tensors[name])})


def say(**fields: Any) -> Change:
    return lambda _, label: label.update(fields)
