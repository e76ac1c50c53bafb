"""How weights become codes: what is quantized, by which method, to what."""

# Annotations stay what they are: read as text, pydantic would evaluate each one once a class that inherits it.

import re
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self

from pydantic import BeforeValidator, Field, model_validator

from quantkit.errors import UsageError
from quantkit.options.spec import Options, Spec, Typed, make
from quantkit.options.values import Bits, GgmlType, GroupSize, Part

ActOrder = Literal["static", "dynamic", "off"]
MethodName = Literal["gptq", "round"]


class MethodRow(NamedTuple):
    """`module` is a `quantize.methods.Method`, named as text. GGUF files are called after `label`; a checkpoint is of
    GPTQ's format by any method, and its name ends in `suffix`."""

    module: str
    label: str
    suffix: str


METHODS: Mapping[MethodName, MethodRow] = {
    "gptq": MethodRow("quantkit.quantize.gptq", "GPTQ", ""),
    "round": MethodRow("quantkit.quantize.rounding", "RTN", "-rtn"),
}


class Coding(Options):
    """What chooses codes, and of how many bits."""

    panel: ClassVar[str] = "Grid"
    method: MethodName = "gptq"
    """What chooses the codes; round: each weight to the nearest one, what GPTQ is measured against."""
    bits: Bits = 4
    """2 to 8, of GPTQ checkpoints 2, 3, 4 or 8; default 4, or what --ggml has."""


class Groups(Options):
    """What shares a scale."""

    panel: ClassVar[str] = "Grid"
    group_size: GroupSize = 128
    """Columns that share a scale, -1: whole rows; default 128, or what --ggml has."""


class Solving(Options):
    """How codes are found, and of what."""

    panel: ClassVar[str] = "Grid"
    sym: Annotated[bool, Typed("--sym/--asym")] = True
    """Symmetric codes, which every fast kernel reads; the default, but what --ggml has."""
    act_order: ActOrder = "static"
    """dynamic is written with g_idx and desc_act."""
    damp: float = Field(0.1, gt=0, lt=1, allow_inf_nan=False)
    """Fraction of the mean Hessian diagonal added to it (GPTQ, section 3.3)."""
    token_weights: bool = False
    """Let each calibration token count in a Hessian by what the model's output feels of an error there; takes a
    backward pass, block by block."""
    correct: Annotated[Part, Typed(metavar="auto|0..1")] = 0.0
    """Quantize weights that make up for what the quantized blocks before have changed: so much of the whole step; auto:
    what two halves of the tokens tell of each other. Runs the unquantized model beside."""
    refine: bool = False
    """After the codes, tune scales and gains of norms on the divergence of the model's output; codes stay. Stopped on
    calibration windows that it holds out; takes some dozens of steps through the model and back."""
    include: tuple[str, ...] = ()
    """Quantize only modules that match, such as '*.mlp.*'; may be repeated."""
    exclude: tuple[str, ...] = ()
    """Leave modules that match as they are; may be repeated."""


class FilledGrid(Coding, Groups, Solving):
    """How weights become codes."""

    panel: ClassVar[str] = "Grid"

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        if self.method == "round" and self.act_order == "dynamic":
            raise ValueError("act_order dynamic lets groups follow GPTQ's order, and method round has none")
        return self


class Grid(FilledGrid):
    """The same where --ggml may decide: None is what it has, or else the default of GPTQ checkpoints."""

    defaults: ClassVar[Mapping[str, Any]] = {"bits": None, "group_size": None, "sym": None}


class Override(Spec):
    """What some Linears have otherwise than the rest; None leaves it as it is. `ggml` is for runs that write GGUF."""

    bits: Bits | None = None
    group_size: GroupSize | None = None
    sym: bool | None = None
    ggml: GgmlType | None = None

    @model_validator(mode="after")
    def _check_not_empty(self) -> Self:
        if not self.changes():
            raise ValueError("an override needs bits, group_size, sym or ggml")
        return self

    def changes(self) -> dict[str, Any]:
        """The fields that are given."""
        return self.model_dump(exclude_none=True)


def _overrides(given: Any) -> Any:
    texts = isinstance(given, tuple | list) and all(isinstance(one, str) for one in given)
    return dict(map(parse_override, given)) if texts else given


class Overrides(Options):
    """What is quantized otherwise."""

    panel: ClassVar[str] = "Grid"
    override: Annotated[Mapping[str, Override], BeforeValidator(_overrides)] = Field(default_factory=dict)
    """Other bits, group_size or sym for modules that match: '*.down_proj=bits:8' (several by commas; with --ggml:
    '*.down_proj=ggml:q6_k'); may be repeated, the first that matches counts."""


class QuantSpec(FilledGrid):
    """How weights become codes.

    `damp` is the fraction of the mean Hessian diagonal that is added to the diagonal (GPTQ, section 3.3).
    `ggml`: codes lie on the grid of this type, whose bits, groups and symmetry the other fields then repeat; None: on
    that of GPTQ checkpoints, a float16 scale and a whole zero per group.
    `include`, `exclude` and the first part of each override are patterns of whole module names, in which ``*`` stands
    for any characters and ``?`` for one. A Linear is quantized if it matches an `include` pattern (or there is none)
    and no `exclude` pattern; the first override that matches applies.
    """

    ggml: GgmlType | None = None
    overrides: tuple[tuple[str, Override], ...] = ()

    def of(self, module: str) -> "QuantSpec | None":
        """What the Linear `module` is quantized to; None: it stays as it is."""
        if self.include and not any(matches(pattern, module) for pattern in self.include):
            return None
        if any(matches(pattern, module) for pattern in self.exclude):
            return None
        changes = next((o.changes() for pattern, o in self.overrides if matches(pattern, module)), {})
        plain = self.model_dump(exclude={"include", "exclude", "overrides"})
        return make(QuantSpec, **{**plain, **changes})


def pattern_regex(pattern: str) -> str:
    """The regular expression that a module pattern stands for, without anchors."""
    return re.escape(pattern).replace(r"\*", ".*").replace(r"\?", ".")


def matches(pattern: str, module: str) -> bool:
    """Whether a module pattern fits the whole of a module's name."""
    return fnmatchcase(module, pattern.replace("[", "[[]"))  # in time that does not explode with many stars


def parse_override(text: str) -> tuple[str, Override]:
    """``PATTERN=bits:8,group_size:32,sym:false`` as (pattern, override). Raises UsageError."""
    pattern, given, fields = text.rpartition("=")
    pairs = [field.partition(":") for field in fields.split(",")]
    if not (given and pattern and all(key and colon and value for key, colon, value in pairs)):
        raise UsageError(f"--override {text}: write PATTERN=bits:8,group_size:32")
    try:
        return pattern, make(Override, **{key.strip(): value.strip() for key, _, value in pairs})
    except UsageError as error:
        raise UsageError(f"--override {text}: {error}") from None
