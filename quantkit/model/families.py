"""What differs between model families, as a table: where the decoder blocks are, and their Linears by stage.

A stage is a set of Linears that read the same input; stages are listed in the order in which the block's forward
reaches them. Everything else is left to the model's own forward.
"""

from __future__ import annotations

from dataclasses import dataclass

from quantkit.errors import SourceError


@dataclass(frozen=True)
class Family:
    """`blocks` is the module list's name in the model; `stages` are Linear names within a block."""

    blocks: str
    stages: tuple[tuple[str, ...], ...]

    def linears(self) -> tuple[str, ...]:
        """All Linear names within a block, in stage order."""
        return tuple(name for stage in self.stages for name in stage)


_GATED = Family(
    blocks="model.layers",
    stages=(
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.o_proj",),
        ("mlp.gate_proj", "mlp.up_proj"),
        ("mlp.down_proj",),
    ),
)

FAMILIES: dict[str, Family] = {
    "llama": _GATED,
    "mistral": _GATED,
    "qwen2": _GATED,
    "qwen3": _GATED,
}


def family_of(model_type: str) -> Family:
    """The table's row. Raises SourceError for an architecture it does not have."""
    if model_type not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise SourceError(f"architecture {model_type!r} is not supported; supported: {known}")
    return FAMILIES[model_type]
