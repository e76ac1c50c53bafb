"""Which Linears of a model are quantized, and to what."""

from __future__ import annotations

from typing import Any

from quantkit.blocks.stream import ModelStream
from quantkit.codes import LinearPlan, Plan
from quantkit.codes.ggml import type_of
from quantkit.errors import UsageError
from quantkit.options import QuantSpec, matches


def plan_linears(stream: ModelStream, spec: QuantSpec) -> Plan:
    """Apply the patterns of `spec` to the Linears of a model's blocks.

    Raises:
        UsageError: a pattern that no Linear matches, or nothing left to quantize.
    """
    shapes = dict(stream.linears())
    overridden = tuple(pattern for pattern, _ in spec.overrides)
    for option, patterns in (("include", spec.include), ("exclude", spec.exclude), ("override", overridden)):
        for pattern in patterns:
            if not any(matches(pattern, name) for name in shapes):
                raise UsageError(f"--{option} {pattern}: no Linear has such a name; one is {next(iter(shapes))}")
    plan = {name: LinearPlan(shape, own) for name, shape in shapes.items() if (own := spec.of(name)) is not None}
    if not plan:
        raise UsageError("--include and --exclude leave no Linear to quantize")
    return plan


def on_grid_of(ggml: str) -> dict[str, Any]:
    """The fields of a `QuantSpec` whose codes lie on a GGML type's grid."""
    kind = type_of(ggml)
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
