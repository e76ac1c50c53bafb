"""How weights become codes: what is quantized, by which method, to what."""

# Annotations stay what they are: read as text, pydantic would evaluate each one once a class that inherits it.

import re
from collections.abc import Mapping
from fnmatch import translate
from functools import lru_cache
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self

from pydantic import BeforeValidator, Field, model_validator

from quantkit.errors import UsageError
from quantkit.options.spec import Options, Spec, Typed, make
from quantkit.options.values import AllowanceText, Bits, GgmlType, GroupSize, Natural, Part

REFINE_STEPS = 32

ActOrder = Literal["static", "dynamic", "off"]
MethodName = Literal["gptq", "round"]
ExpertTokens = Literal["routed", "all"]


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


EffortName = Literal["fast", "standard", "best"]


class EffortRow(NamedTuple):
    """What is done for accuracy."""

    token_weights: bool
    row_feedback: bool
    correct: float | Literal["auto"]


EFFORTS: Mapping[EffortName, EffortRow] = {
    "fast": EffortRow(token_weights=False, row_feedback=False, correct=0.0),
    "standard": EffortRow(token_weights=True, row_feedback=False, correct=0.0),
    "best": EffortRow(token_weights=True, row_feedback=True, correct="auto"),
}


class Effort(Options):
    """What accuracy may cost."""

    panel: ClassVar[str] = "Grid"
    effort: EffortName = "standard"
    """What accuracy may take: fast: GPTQ alone; standard: with --token-weights, some 3 times as long; best: with
    --correct auto too, some 4 times."""


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
    row_feedback: bool = False
    """Let rows make up for what the errors of rows before them do to the model's output, with --token-weights."""
    experts: ExpertTokens = "routed"
    """Which calibration tokens of a block the Hessian of an expert is of: those that are routed to it, or all; what the
    block hands on stays that of its routing."""
    correct: Annotated[Part, Typed(metavar="auto|0..1")] = 0.0
    """Quantize weights that make up for what the quantized blocks before have changed: so much of the whole step; auto:
    what two halves of the tokens tell of each other. Runs the unquantized model beside."""
    refine: bool = False
    """After the codes, tune scales and gains of norms on the divergence of the model's output; codes stay. Stopped on
    calibration windows that it holds out; takes --refine-steps through the model and back."""
    refine_steps: Natural = REFINE_STEPS
    """Of --refine, 1,024 tokens each; 2 bits gain by more of them."""
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
        if self.row_feedback and self.token_weights is False and self.method == "gptq":
            raise ValueError("row_feedback goes by the gradients that token_weights takes: turn both on")
        if self.refine_steps != REFINE_STEPS and not self.refine:
            raise ValueError(f"refine_steps {self.refine_steps} are of refine: turn it on")
        return self

    @property
    def refining(self) -> int:
        """Steps of refining; 0: none."""
        return self.refine_steps if self.refine else 0


class EffortGrid(Effort, FilledGrid):
    """The same where --effort decides on what is not said otherwise."""

    defaults: ClassVar[Mapping[str, Any]] = {"token_weights": None, "row_feedback": None, "correct": None}

    def chosen(self) -> dict[str, Any]:
        """The fields of a `FilledGrid` that are known, and by `effort` what accuracy costs."""
        given = self.model_dump(include=set(FilledGrid.model_fields), exclude_none=True)
        return EFFORTS[self.effort]._asdict() | given if self.method == "gptq" else given


class Grid(EffortGrid):
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


End = Literal["head", "embeddings", "both"]
"""A matrix outside the blocks: the output head, the embedding, or the one that is both where they are tied."""


class EndBits(Options):
    """What is quantized outside the blocks, of folders of codes."""

    panel: ClassVar[str] = "Grid"
    head: Bits | None = None
    """Quantize the output head too, to so many bits, on what the quantized blocks hand to it; else it stays as it is.
    Tied to the embedding, it is one matrix with it."""
    embeddings: Bits | None = None
    """Round the embedding too, to so many bits; of formats mlx holds it."""

    @property
    def given(self) -> dict[str, int]:
        """Those that are, by name."""
        return self.model_dump(exclude_none=True)


class Budget(Options):
    """What bits may take."""

    panel: ClassVar[str] = "Grid"
    budget: AllowanceText | None = None
    """Instead of --bits and --group-size: what is to be spent, such as 4.5bpw or 3GB, where token weights predict that
    it is worth most (extra: budget). Several by commas make an output each, of one pass."""


class Spending(Options):
    """For whom a budget is spent."""

    panel: ClassVar[str] = "Grid"
    budget_for: Literal["any", "vllm"] = "any"
    """Who is to load what --budget makes; vllm: 4 and 8 bits, and one precision for q, k and v, and for gate and up,
    which it fuses."""


class QuantSpec(FilledGrid):
    """How weights become codes.

    `damp` is the fraction of the mean Hessian diagonal that is added to the diagonal (GPTQ, section 3.3).
    `ggml`: codes lie on the grid of this type, whose bits, groups and symmetry the other fields then repeat; None: on
    that of GPTQ checkpoints, a float16 scale and a whole zero per group.
    `include`, `exclude` and the first part of each override are patterns of whole module names, in which ``*`` stands
    for any characters, ``?`` for one, and ``{a,b}`` for either text. A Linear is quantized if it matches an `include`
    pattern (or there is none) and no `exclude` pattern; the first override that matches applies.
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
    return _with_choices(re.escape(pattern).replace(r"\*", ".*").replace(r"\?", "."))


def matches(pattern: str, module: str) -> bool:
    """Whether a module pattern fits the whole of a module's name."""
    return _compiled(pattern).match(module) is not None


@lru_cache(4096)
def _compiled(pattern: str) -> re.Pattern[str]:
    """In fnmatch's form, whose time does not explode with many stars."""
    return re.compile(_with_choices(translate(pattern.replace("[", "[[]"))))


def _with_choices(escaped: str) -> str:
    """``{a,b}`` of a pattern that is a regular expression in all else."""
    return re.sub(r"\\\{([^{}\\]*(?:\\[^{}][^{}\\]*)*)\\\}", lambda found: f"(?:{found[1].replace(',', '|')})", escaped)


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
