"""What each verb takes: a spec of groups, of the verb's name. What it does, the list of commands says (`cli.app`)."""

# Annotations stay what they are: read as text, pydantic would evaluate each one once a class that inherits it.

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self, get_args

from pydantic import Field, ValidationInfo, field_validator, model_validator

from quantkit.errors import UsageError
from quantkit.options import (
    Amount,
    Arithmetic,
    Asking,
    Base,
    Batches,
    Budget,
    Calibration,
    CardFacts,
    Checkpoint,
    Choosing,
    Compute,
    Container,
    Cutting,
    Debug,
    Decoding,
    Delta,
    Device,
    DryRun,
    Dtype,
    EndBits,
    Ends,
    Evaluation,
    Force,
    Grid,
    Groups,
    IntoFolder,
    Json,
    Merging,
    MlxBiases,
    Model,
    Opened,
    OrSmolLM2,
    Out,
    Output,
    Overrides,
    Pair,
    Prompts,
    Public,
    Repository,
    Resume,
    Revision,
    Run,
    Shards,
    Spec,
    Spending,
    Split,
    System,
    Target,
    Tasks,
    Text,
    Texts,
    Trust,
    Twice,
    Typed,
)
from quantkit.options.values import FileType, Folders, GridType, Name, Place, check_folder_name

# As the table of containers has it, which a test compares.
_ELSEWHERE = {
    5: "a compressed-tensors folder or an MLX folder or GGUF or ggjt as Q5_0 (symmetric) or Q5_1",
    6: "a compressed-tensors folder or an MLX folder or GGUF as Q6_K",
    7: "a compressed-tensors folder or GGUF as Q8_0, whose 8 bits hold them",
}


class Gptq(
    OrSmolLM2,
    Pair,
    Opened,
    Trust,
    Grid,
    Overrides,
    EndBits,
    Budget,
    Spending,
    Ends,
    Calibration,
    Evaluation,
    Amount,
    Compute,
    Run,
    Twice,
    Checkpoint,
    IntoFolder,
    Output,
):
    defaults: ClassVar[Mapping[str, Any]] = {"eval_tokens": 8192}
    helps: ClassVar[Mapping[str, str]] = {
        "dtype": "Of the calibration forwards; auto: on a CPU float32, or bfloat16 where that is faster, on a GPU the "
        "model's own. On a CPU the evaluation is in float32."
    }
    ggml: GridType | None = None
    """Write a GGUF file instead, with GPTQ on the grids of this type: q4_0, q5_0, q8_0, q4_k_m, ..."""

    @model_validator(mode="after")
    def _check_bits(self) -> Self:
        of_gptq = self.ggml is None and not {"gptq", "gptq_v2"}.isdisjoint(self.formats)
        if of_gptq and self.bits not in (None, 2, 3, 4, 8):
            elsewhere = f"{self.bits}-bit codes fit into {_ELSEWHERE[self.bits]}"
            raise ValueError(f"--bits {self.bits}: a GPTQ checkpoint holds 2, 3, 4 or 8 bits; {elsewhere}")
        return self


class Ggml(Pair, Opened, Trust, Ends, Twice, Split, Output):
    type: FileType = "auto"
    """llama.cpp's mixture of this name: q4_0, q4_k_m, iq4_xs, f16, ... (docs/ggml.md lists all); auto: the smallest
    that holds GPTQ's codes exactly, and what a GGUF or ggjt file has."""
    container: Container = "gguf"
    """ggjt: what was called GGML in 2023, for Llamas with a SentencePiece vocabulary."""
    pure: bool = False
    """One type for all matrices."""
    imatrix: Place | None = None
    """Importance matrix, of `quantkit imatrix` or llama.cpp's tools."""


class Repack(Model, Opened, Trust, Groups, Ends, MlxBiases, Shards, Output):
    defaults: ClassVar[Mapping[str, Any]] = {"group_size": None}
    helps: ClassVar[Mapping[str, str]] = {
        "model": "Folder of codes (GPTQ, compressed-tensors, AWQ, MLX), or Hub id of one.",
        "group_size": "Groups of so many columns, parts of the present ones, whose scales they repeat.",
    }
    to: Target
    """What to write the codes into."""

    @model_validator(mode="after")
    def _check_out(self) -> Self:
        if self.to not in get_args(Container):
            check_folder_name(self.out)
        return self


class Convert(Dtype, Model, Opened, Trust, Shards, IntoFolder, Output):
    pass


class Sum(Dtype, Base, Opened, Merging, Trust, Shards, IntoFolder, Out, DryRun, Force):
    """What merge and diff have in common: two models that make a third."""

    helps: ClassVar[Mapping[str, str]] = {"dry_run": "Check the two; say what would be written."}


class Merge(Sum, Delta):
    arguments: ClassVar[tuple[str, ...]] = ("base", "delta")
    helps: ClassVar[Mapping[str, str]] = {
        "dtype": "Of the weights; auto: the tuned model's, or else DELTA's.",
        "revision": "Branch, tag or commit of DELTA, a Hub id.",
    }


class Diff(Sum):
    arguments: ClassVar[tuple[str, ...]] = ("base", "tuned")
    helps: ClassVar[Mapping[str, str]] = {
        "dtype": "Of the differences; auto: float32.",
        "revision": "Branch, tag or commit of TUNED, a Hub id.",
    }
    tuned: Name
    """The model made from it: folder, GGUF file or Hub id."""


class Imatrix(Pair, Opened, Trust, Calibration, Compute, Output):
    loss_aware: bool = False
    """Let each token count by what the model's output feels of an error there, as `gptq --token-weights`."""


class Samples(OrSmolLM2, Opened, Trust, Calibration, Evaluation):
    show: Annotated[int, Typed(display=True)] = 1
    """Windows to print."""


class Perplexity(Text, Cutting, Compute, Opened, Revision, Trust):
    arguments: ClassVar[tuple[str, ...]] = ("models",)
    models: Annotated[tuple[Name, ...], Typed(metavar="MODEL...")]
    """Folders, GGUF files or Hub ids."""
    against: Name | None = None
    """Reference model to compare with."""


class Compare(Choosing, Texts, Cutting, Asking, Compute, Opened, Revision, Trust, IntoFolder, Out, Resume, Force):
    arguments: ClassVar[tuple[str, ...]] = ("reference", "variants")
    helps: ClassVar[Mapping[str, str]] = {
        "out": "Folder to write the report and its plots to.",
        "resume": "Go on with the answers to --prompts of a comparison that was stopped.",
    }
    reference: Annotated[Name, Typed(metavar="REF")]
    """What the variants are compared with: folder, file or Hub id."""
    variants: Annotated[tuple[Name, ...], Typed(metavar="VARIANT...")]
    """Folders (full precision or GPTQ), GGUF or ggjt files, Hub ids."""
    plots: bool = True
    """Draw plots (extra: plots)."""


class Eval(Pair, Opened, Trust, Tasks, Arithmetic, Batches, Out, Force):
    helps: ClassVar[Mapping[str, str]] = {"out": "File of results to write, JSON."}
    task: tuple[str, ...] = ()
    """Task, group or tag of lm-evaluation-harness; may be repeated."""
    fewshot: int | None = Field(None, ge=0)
    """Examples before each question of --task; default: as each says."""


class Generate(Prompts, Pair, Opened, Trust, System, Decoding, Arithmetic, Batches, Out, Resume, DryRun, Force):
    helps: ClassVar[Mapping[str, str]] = {
        "out": "File of answers to write, JSON lines.",
        "resume": "Go on with --out; answers in it stay.",
        "dry_run": "Read and check the prompts; write nothing.",
    }


class Chat(Pair, Opened, Trust, System, Decoding, Arithmetic, Json):
    helps: ClassVar[Mapping[str, str]] = {"as_json": "Print the conversation at its end, as JSON."}
    num_beams: ClassVar[int] = 1  # type: ignore[misc]  # a search would have no next word to say


class Inspect(Model, Opened, Trust):
    tensors: Annotated[bool, Typed(display=True)] = False
    """List every tensor."""


class Verify(Trust, Device):
    arguments: ClassVar[tuple[str, ...]] = ("path",)
    path: Place
    """Folder, GGUF or ggjt file, or a folder of such files."""

    @field_validator("path")
    @classmethod
    def _check_path(cls, path: Place) -> Place:
        if not Path(path).expanduser().exists():
            raise UsageError(f"{path}: no such file or folder; verify takes what lies on this disk")
        return path

    generate: bool = True
    """Run the model: perplexity of held-out text, and a sentence."""


class Held(Repository):
    """A folder that is there."""

    @field_validator("folder")
    @classmethod
    def _check_folder(cls, folder: Place) -> Place:
        if not Path(folder).expanduser().is_dir():
            raise UsageError(f"{folder}: no such folder")
        return folder


class Card(Held, CardFacts, Trust, Force):
    arguments: ClassVar[tuple[str, ...]] = ("folder",)
    defaults: ClassVar[Mapping[str, Any]] = {"repo": None}
    helps: ClassVar[Mapping[str, str]] = {
        "folder": "GPTQ or full-precision folder, or one of GGUF files.",
        "repo": "OWNER/NAME that DIR will be published as.",
        "branch": "Branch that DIR goes to.",
        "force": "Replace a README.md and plots.",
    }
    reports: Annotated[tuple[Place, ...], Typed("--report")] = ()
    """report.json of `quantkit compare`, whose plots are copied; may be repeated."""
    evals: Annotated[tuple[Place, ...], Typed("--eval")] = ()
    """Results of `quantkit eval`, as a baseline of the source too; may be repeated."""
    siblings: Annotated[tuple[str, ...], Typed("--sibling")] = ()
    """Another repository of the family, OWNER/NAME[=what it is]; may be repeated."""
    branches: Annotated[Folders, Typed("--with-branch")] = Field(default_factory=dict)
    """Describe another branch too: NAME=DIR; may be repeated."""
    quantized_by: str | None = None
    """Who; left out unless given."""

    @field_validator("reports", "evals")
    @classmethod
    def _check_files(cls, given: tuple[Place, ...], info: ValidationInfo) -> tuple[Place, ...]:
        what = "a report.json of `quantkit compare`" if info.field_name == "reports" else "results of `quantkit eval`"
        for path in given:
            if not Path(path).is_file():
                raise UsageError(f"{path}: no such file; give {what}")
        return given

    @field_validator("branches")
    @classmethod
    def _check_branches(cls, given: Mapping[str, Place]) -> Mapping[str, Place]:
        for name, folder in given.items():
            if not Path(folder).expanduser().is_dir():
                raise UsageError(f"--with-branch {name}={folder}: no such folder")
        return given


class Publish(Held, Trust, Public, DryRun):
    arguments: ClassVar[tuple[str, ...]] = ("folder", "repo")
    helps: ClassVar[Mapping[str, str]] = {"dry_run": "Show what would change; change nothing."}
    only: tuple[str, ...] = ()
    """Publish only files that match, such as '*.gguf'; may be repeated."""
    delete: bool = False
    """Remove from the branch what DIR lacks."""
    message: str | None = None
    """Of the commit."""
    verify: bool = True
    """Refuse a folder in which `quantkit verify` finds problems."""


class Release(Trust, DryRun, Debug, IntoFolder, Out):
    arguments: ClassVar[tuple[str, ...]] = ("recipe",)
    defaults: ClassVar[Mapping[str, Any]] = {"out": None}
    helps: ClassVar[Mapping[str, str]] = {"out": "Folder of the release; default: the recipe's name with -release."}
    recipe: Place | Spec
    """YAML file; docs/release.md says what it holds."""
    publishing: Annotated[bool, Typed("--publish/--no-publish")] = True
    """Upload to where the recipe says, if it says so."""

    @field_validator("recipe")
    @classmethod
    def _check_recipe(cls, recipe: Place | Spec) -> Place | Spec:
        if not isinstance(recipe, Spec) and not Path(recipe).expanduser().exists():
            raise UsageError(f"{recipe}: cannot be read: No such file or directory")
        return recipe
