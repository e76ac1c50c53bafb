"""Frozen specifications of what a run does. Unknown keys are refused; fields are checked when a spec is made."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from quantkit.errors import UsageError

ActOrder = Literal["static", "dynamic", "off"]
MethodName = Literal["gptq", "round"]
TemplateName = Literal["auto", "chat", "vicuna", "wizardlm-7b", "alpaca", "none"]
CheckpointFormat = Literal["gptq", "gptq_v2"]
GgmlType = Literal["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]
"""Types on whose grids GPTQ runs."""
ComputeDtype = Literal["auto", "float32", "bfloat16", "float16"]
Vocabulary = Literal["auto", "mean", "delta"]
"""What a base's missing rows of vocabulary count as, beside a delta: the mean of its rows, or nothing."""

S = TypeVar("S", bound="Spec")


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

HELDOUT = "evol-instruct-sample:heldout"
"""The text that variants are compared on unless another is named."""


class Spec(BaseModel):
    """Base of all specs: immutable, closed, written to and read from JSON."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Override(Spec):
    """What some Linears have otherwise than the rest; None leaves it as it is. `ggml` is for runs that write GGUF."""

    bits: int | None = Field(None, ge=2, le=8)
    group_size: int | None = None
    sym: bool | None = None
    ggml: GgmlType | None = None

    @field_validator("ggml", mode="before")
    @classmethod
    def _in_capitals(cls, value: object) -> object:
        return value.upper() if isinstance(value, str) else value

    @model_validator(mode="after")
    def _check_not_empty(self) -> Self:
        if not self.changes():
            raise ValueError("an override needs bits, group_size, sym or ggml")
        return self

    def changes(self) -> dict[str, Any]:
        """The fields that are given."""
        return self.model_dump(exclude_none=True)


class QuantSpec(Spec):
    """How weights become codes.

    `method` chooses the codes: a key of `METHODS`.
    `damp` is the fraction of the mean Hessian diagonal that is added to the diagonal (GPTQ, section 3.3).
    `ggml`: codes lie on the grid of this type, whose bits, groups and symmetry the other fields then repeat; None: on
    that of GPTQ checkpoints, a float16 scale and a whole zero per group.
    `include`, `exclude` and the first part of each override are patterns of whole module names, in which ``*`` stands
    for any characters and ``?`` for one. A Linear is quantized if it matches an `include` pattern (or there is none)
    and no `exclude` pattern; the first override that matches applies.
    """

    method: MethodName = "gptq"
    bits: int = Field(4, ge=2, le=8)
    group_size: int = 128
    sym: bool = True
    act_order: ActOrder = "static"
    damp: float = Field(0.1, gt=0, lt=1)
    ggml: GgmlType | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    overrides: tuple[tuple[str, Override], ...] = ()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.method == "round" and self.act_order == "dynamic":
            raise ValueError("act_order dynamic lets groups follow GPTQ's order, and method round has none")
        if self.group_size != -1 and (self.group_size <= 0 or self.group_size % 8):
            raise ValueError(
                f"group_size must be -1 (one group a row) or a positive multiple of 8, not {self.group_size}"
            )
        return self

    def of(self, module: str) -> QuantSpec | None:
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
    return re.fullmatch(pattern_regex(pattern), module) is not None


def parse_override(text: str) -> tuple[str, Override]:
    """``PATTERN=bits:8,group_size:32,sym:false`` as (pattern, override). Raises UsageError."""
    pattern, given, fields = text.rpartition("=")
    pairs = [field.partition(":") for field in fields.split(",")]
    if not (given and pattern and all(key and colon and value for key, colon, value in pairs)):
        raise UsageError(f"--override {text}: write PATTERN=bits:8,group_size:32")
    return pattern, make(Override, **{key.strip(): value.strip() for key, _, value in pairs})


class CalibrationSpec(Spec):
    """Which text the Hessians are taken over: `samples` windows of `seq_len` tokens.

    `data` is a data set, or several by weight; `calibration.parse_mixture` has the grammar.
    """

    data: str = "evol-instruct-sample"
    samples: int = Field(128, ge=1)
    seq_len: int = Field(512, ge=8)
    template: TemplateName = "auto"
    seed: int = Field(0, ge=0)


class EvaluationSpec(Spec):
    """Which text perplexity is taken over. `stride` None: windows do not overlap."""

    text: str = HELDOUT
    seq_len: int = Field(512, ge=8)
    stride: int | None = Field(None, ge=1)
    template: TemplateName = "auto"

    @model_validator(mode="after")
    def _check_stride(self) -> Self:
        if self.stride is not None and self.stride >= self.seq_len:
            raise ValueError(f"stride must be smaller than seq_len ({self.seq_len}), not {self.stride}")
        return self


def make(spec: type[S], **fields: Any) -> S:
    """Make a spec; raise `UsageError` with one line for the first field that does not fit."""
    try:
        return spec(**fields)
    except ValidationError as error:
        first = error.errors()[0]
        field = "".join(f"{part}: " for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        got = f" (got {first['input']!r})" if first["loc"] else ""
        raise UsageError(f"{field}{message}{got}") from None


def parse_size(size: str | int, option: str = "max-shard-size") -> int:
    """Bytes of "500MB", "5GB" (powers of ten, as the Hub counts) or a number. Raises UsageError."""
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
    text = str(size).strip().upper()
    number, factor = (text[:-2], units[text[-2:]]) if text[-2:] in units else (text, 1)
    try:
        value = int(float(number) * factor)
    except (ValueError, OverflowError):
        value = 0
    if value <= 0:
        raise UsageError(f"--{option} {size}: give a size such as 5GB or 500MB")
    return value
