"""What each verb takes: a spec of groups. The command's help is its docstring."""

# Annotations stay what they are: read as text, pydantic would evaluate each one once a class that inherits it.

from typing import Annotated, ClassVar, Self

from pydantic import Field, model_validator

from quantkit.options import (
    Arithmetic,
    Batches,
    Calibration,
    CardFacts,
    Checkpoint,
    Compute,
    ComputeDtype,
    Container,
    Cutting,
    Decoding,
    Device,
    DryRun,
    Ends,
    Evaluation,
    Folders,
    Force,
    Grid,
    Merging,
    Model,
    Name,
    OrSmolLM2,
    Output,
    Overrides,
    Pair,
    Place,
    Public,
    Revision,
    Run,
    Shards,
    Size,
    Spec,
    Split,
    System,
    Tasks,
    Text,
    Texts,
    Trust,
    Typed,
)

# As the table of containers has it, which a test compares.
_ELSEWHERE = {
    5: "GGUF or ggjt as Q5_0 (symmetric) or Q5_1",
    6: "GGUF as Q6_K",
    7: "GGUF as Q8_0, whose 8 bits hold them",
}


class Gptq(OrSmolLM2, Pair, Trust, Grid, Overrides, Ends, Calibration, Evaluation, Compute, Run, Checkpoint, Output):
    """Quantize a model with GPTQ into a folder that transformers, vLLM and others load, or into a GGUF file."""

    ggml: str | None = None
    """Write a GGUF file instead, with GPTQ on the grids of this type: q4_0, q5_0, q8_0, q4_k_m, ..."""
    requantize: bool = False
    """Allow codes of a GPTQ checkpoint to be rounded again."""

    @model_validator(mode="after")
    def _check_bits(self) -> Self:
        if self.ggml is None and self.bits not in (None, 2, 3, 4, 8):
            elsewhere = f"{self.bits}-bit codes fit into {_ELSEWHERE[self.bits]}"
            raise ValueError(f"--bits {self.bits}: a GPTQ checkpoint holds 2, 3, 4 or 8 bits; {elsewhere}")
        return self


class Ggml(Pair, Trust, Ends, Split, Output):
    """Write a model as a GGUF file for llama.cpp; codes of a GPTQ checkpoint go into it as they are."""

    type: str = "auto"
    """llama.cpp's mixture of this name: q4_0, q4_k_m, iq4_xs, f16, ... (docs/ggml.md lists all); auto: the smallest
    that holds GPTQ's codes exactly, and what a GGUF or ggjt file has."""
    container: Container = "gguf"
    """ggjt: what was called GGML in 2023, for Llamas with a SentencePiece vocabulary."""
    requantize: bool = False
    """Allow a type that rounds what has been rounded before."""
    pure: bool = False
    """One type for all matrices."""
    imatrix: Place | None = None
    """Importance matrix, of `quantkit imatrix` or llama.cpp's tools."""


class Convert(Model, Trust, Shards, Output):
    """Write a model as a Hugging Face folder of safetensors; a quantized one is dequantized."""

    model: Name
    dtype: ComputeDtype = "auto"
    """Of the weights; auto: bfloat16 stays, everything else becomes float16."""


class Sum(Merging, Trust, Shards, DryRun, Force):
    """Two models that make a third."""

    base: Name
    """The base: folder, GGUF file or Hub id, in full precision."""
    out: Place
    """Folder to write."""
    dry_run: bool = False
    """Check the two; say what would be written."""


class Merge(Sum):
    """Add a delta to the base it was made from, tensor by tensor, into a Hugging Face folder of the tuned model."""

    arguments: ClassVar[tuple[str, ...]] = ("base", "delta")
    delta: Name
    """The delta: folder, GGUF file or Hub id."""
    dtype: ComputeDtype = "auto"
    """Of the weights; auto: the tuned model's, or else DELTA's."""


class Diff(Sum):
    """Write what a tuned model changed of its base: a delta, which merge adds to the base again."""

    arguments: ClassVar[tuple[str, ...]] = ("base", "tuned")
    tuned: Name
    """The model made from it: folder, GGUF file or Hub id."""
    dtype: ComputeDtype = "auto"
    """Of the differences; auto: float32."""


class Imatrix(Pair, Trust, Calibration, Compute, Output):
    """Write an importance matrix for llama.cpp: how much each input column matters on calibration text."""


class Samples(OrSmolLM2, Trust, Calibration, Evaluation):
    """Draw and show the text that a gptq run with the same options would calibrate on."""

    show: Annotated[int, Typed(display=True)] = 1
    """Windows to print."""


class Perplexity(Text, Cutting, Compute, Revision, Trust):
    """Measure perplexity with its standard error, and divergence from a reference."""

    arguments: ClassVar[tuple[str, ...]] = ("models",)
    models: Annotated[tuple[Name, ...], Typed(metavar="MODEL...")]
    """Folders, GGUF files or Hub ids."""
    against: Name | None = None
    """Reference model to compare with."""


class Compare(Texts, Cutting, Compute, Revision, Trust, Force):
    """Compare variants with the model they come from: size, accuracy, the worst tokens; as a report with plots."""

    arguments: ClassVar[tuple[str, ...]] = ("reference", "variants")
    reference: Annotated[Name, Typed(metavar="REF")]
    """What the variants are compared with: folder, file or Hub id."""
    variants: Annotated[tuple[Name, ...], Typed(metavar="VARIANT...")]
    """Folders (full precision or GPTQ), GGUF or ggjt files, Hub ids."""
    out: Place
    """Folder to write the report and its plots to."""
    budget: Size | None = None
    """Name the variant to take of at most this size, such as 4GB."""
    max_kl: float | None = None
    """Name the smallest variant of at most this mean KL divergence, such as 0.05."""
    plots: bool = True
    """Draw plots (extra: plots)."""


class Eval(Pair, Trust, Tasks, Arithmetic, Batches, Force):
    """Measure a model on tasks of lm-evaluation-harness, such as those of the Open LLM Leaderboard."""

    out: Place
    """File of results to write, JSON."""
    task: tuple[str, ...] = ()
    """Task, group or tag of lm-evaluation-harness; may be repeated."""
    fewshot: int | None = Field(None, ge=0)
    """Examples before each question of --task; default: as each says."""


class Generate(Pair, Trust, System, Decoding, Arithmetic, Batches, Force):
    """Answer the prompts of a file, in batches, into a file that a killed run goes on with."""

    prompts: Place
    """JSON lines with Instruction, instruction (and input), prompt, text, messages or conversations."""
    out: Place
    """File of answers to write, JSON lines."""
    resume: bool = False
    """Go on with --out; answers in it stay."""
    dry_run: bool = False
    """Read and check the prompts; write nothing."""


class Chat(Pair, Trust, System, Decoding, Arithmetic):
    """Talk with a model; a line of standard input is a message. Ctrl-C ends an answer, /quit the conversation."""

    num_beams: ClassVar[int] = 1  # type: ignore[misc]  # a search would have no next word to say
    as_json: Annotated[bool, Typed("--json", display=True)] = False
    """Print the conversation at its end, as JSON."""


class Inspect(Model, Trust):
    """Show what a model is made of: scheme, sizes, bits per weight, tensors. Reads headers only."""

    model: Name
    tensors: Annotated[bool, Typed(display=True)] = False
    """List every tensor."""


class Verify(Trust, Device):
    """Look at a folder or file as a downloader would: list what is wrong (exit code 1), and which programs load it."""

    arguments: ClassVar[tuple[str, ...]] = ("path",)
    path: Place
    """Folder, GGUF or ggjt file, or a folder of such files."""
    generate: bool = True
    """Run the model: perplexity of held-out text, and a sentence."""


class Card(CardFacts, Trust, Force):
    """Write a folder's model card, README.md, of measured facts only."""

    arguments: ClassVar[tuple[str, ...]] = ("folder",)
    folder: Annotated[Place, Typed(metavar="DIR")]
    """GPTQ or full-precision folder, or one of GGUF files."""
    reports: Annotated[tuple[Place, ...], Typed("--report")] = ()
    """report.json of `quantkit compare`, whose plots are copied; may be repeated."""
    evals: Annotated[tuple[Place, ...], Typed("--eval")] = ()
    """Results of `quantkit eval`; may be repeated."""
    siblings: Annotated[tuple[str, ...], Typed("--sibling")] = ()
    """Another repository of the family, OWNER/NAME[=what it is]; may be repeated."""
    repo: str | None = None
    """OWNER/NAME that DIR will be published as."""
    branch: str = "main"
    """Branch that DIR goes to."""
    branches: Annotated[Folders, Typed("--with-branch")] = Field(default_factory=dict)
    """Describe another branch too: NAME=DIR; may be repeated."""
    quantized_by: str | None = None
    """Who; left out unless given."""
    force: bool = False
    """Replace a README.md and plots."""


class Publish(Trust, Public):
    """Upload a folder to the Hugging Face Hub: only what differs, in one commit, by the Hub client's own token."""

    arguments: ClassVar[tuple[str, ...]] = ("folder", "repo")
    folder: Annotated[Place, Typed(metavar="DIR")]
    """What to publish."""
    repo: str
    """OWNER/NAME on the Hub; created where there is none."""
    branch: str = "main"
    """Branch, created where there is none; auto: named after GPTQ settings, such as gptq-4bit-32g-actorder_True."""
    only: tuple[str, ...] = ()
    """Publish only files that match, such as '*.gguf'; may be repeated."""
    delete: bool = False
    """Remove from the branch what DIR lacks."""
    message: str | None = None
    """Of the commit."""
    verify: bool = True
    """Refuse a folder in which `quantkit verify` finds problems."""
    dry_run: bool = False
    """Show what would change; change nothing."""


class Release(Trust, DryRun):
    """Make, compare, describe, verify and publish a family of variants; what is done already is not done again."""

    arguments: ClassVar[tuple[str, ...]] = ("recipe",)
    recipe: Place | Spec
    """YAML file; docs/release.md says what it holds."""
    out: Place | None = None
    """Folder of the release; default: the recipe's name with -release."""
    publishing: Annotated[bool, Typed("--publish/--no-publish")] = True
    """Upload to where the recipe says, if it says so."""
    debug: bool = False
    """Show the traceback of an error."""
