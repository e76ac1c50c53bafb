"""The recipe of a release: a YAML file that says what is made of which model, how it is judged and where it goes."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import yaml
from pydantic import Field, field_validator, model_validator

from quantkit.containers import CONTAINERS
from quantkit.errors import SourceError, UsageError, shortened, yaml_fault
from quantkit.options import (
    METHODS,
    Amount,
    Asking,
    Budget,
    CalibrationSpec,
    CardFacts,
    Checkpoint,
    CheckpointFormat,
    Choosing,
    ComputeDtype,
    Effort,
    EffortGrid,
    EndBits,
    Ends,
    Merging,
    Overrides,
    Pair,
    Public,
    Shards,
    Spec,
    Spending,
    Split,
    Tasks,
    Texts,
    WindowLength,
    make,
)
from quantkit.options.values import FileType, allowances, check_data, check_dataset, check_model, gptq_type
from quantkit.runs.atomic import check_readable

if TYPE_CHECKING:
    CheckpointKind = str
else:
    CheckpointKind = Literal[tuple(row.name for row in CONTAINERS.values() if row.recipe == "checkpoint")]

_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"
# As the Hub has them: no two dots or dashes in a row, none at an end.
_REPOSITORY = r"^[A-Za-z0-9_](?:[A-Za-z0-9_]|[.-](?![.-]))*(?<![.-])$"


class SourceRecipe(Merging, Pair, Shards):
    """The model that all is made of: one name, or a base and a delta; nothing of both is SmolLM2 of its package.

    Paths are looked for beside the recipe first.
    """

    dtype: ComputeDtype = "auto"
    """Of the full-precision folder, which everything else is made from and compared with."""
    repo: str | None = None
    publish: bool = True

    @model_validator(mode="after")
    def _check_pair(self) -> Self:
        if (self.base is None) != (self.delta is None):
            raise ValueError("base and delta belong together: a model is their sum")
        if self.base is not None and self.model is not None:
            raise ValueError("give model, or base and delta")
        return self


class VariantRecipe(Spec):
    """What all kinds of variants have. `optional`: one that cannot be made is told, and counts as no failure."""

    repo: str | None = None
    optional: bool = False


class GptqVariant(VariantRecipe, EffortGrid, Overrides, EndBits, Budget, Spending, Checkpoint):
    """A checkpoint. `branch` of its repository; None: main for the first one there, a telling name for others.

    Variants that differ by their containers alone are made by one run.
    """

    kind: CheckpointKind
    format: CheckpointFormat = "gptq"
    branch: str | None = None

    @model_validator(mode="after")
    def _check_budget(self) -> Self:
        if self.budget is not None:
            _check_alone(self.budget)
            if given := sorted({"bits", "group_size", "override"} & self.model_fields_set):
                raise ValueError(f"budget chooses bits and groups: leave {', '.join(given)} out")
        return self

    @property
    def title(self) -> str:
        """What tells it from others of the release, as a part of names."""
        group = "rows" if self.group_size == -1 else f"{self.group_size}g"
        order = "-actorder" if self.act_order == "dynamic" else ""
        if self.budget is not None:
            return f"{self.budget}{order}"
        return f"{self.bits}bit-{group}{order}{METHODS[self.method].suffix}"


class FileVariant(VariantRecipe, Effort):
    """A file for llama.cpp. `method`: GPTQ on the type's grid where it has one ("auto"), or plain rounding by ggml."""

    type: FileType
    method: Literal["auto", "gptq", "round"] = "auto"

    @field_validator("type")
    @classmethod
    def _in_small_letters(cls, value: str) -> str:
        return value.lower()

    @property
    def title(self) -> str:
        """What tells it from others of its kind, as a part of names."""
        return self.type.upper()


class GgufVariant(FileVariant, Budget, Ends, Split):
    """A GGUF file. `imatrix`: where it is rounded, weigh columns by an importance matrix of the calibration tokens.

    With a `budget`, `type` says what stays beside the matrices that types are chosen for.
    """

    kind: Literal["gguf"]
    imatrix: bool = False

    @model_validator(mode="after")
    def _check_budget(self) -> Self:
        if self.budget is not None:
            _check_alone(self.budget)
            if not runs_gptq(self):
                raise ValueError("budget weighs GPTQ's errors: give a type that it runs on, and leave method out")
        return self

    @property
    def title(self) -> str:
        return super().title if self.budget is None else str(self.budget)


class GgjtVariant(FileVariant):
    """A file of the "GGML" of 2023."""

    kind: Literal["ggjt"]


AnyVariant = GptqVariant | GgufVariant | GgjtVariant


class JudgingRecipe(Texts, Amount, WindowLength, Choosing, Asking, Tasks):
    """What variants are compared on, which one is the one to take, and which tasks of lm-evaluation-harness they do.

    `seq_len` None: 2048 for wikitext2, else 512. `tasks` go beside those of `suite`; `limit` is for trials.
    """

    tasks: tuple[str, ...] = ()
    tasks_dir: str | None = None

    @property
    def runs_tasks(self) -> bool:
        return self.suite is not None or bool(self.tasks)


class CardRecipe(CardFacts):
    """What model cards say that no file tells. `original` None: the source's, if it is a folder with one."""

    original: str | None = None


class PublishingRecipe(Public):
    """Where the family goes: repositories of `owner`, private unless `public`."""

    owner: str

    @field_validator("owner")
    @classmethod
    def _check_owner(cls, value: str) -> str:
        return _repository(value)


class Recipe(Spec):
    """A release: a name, a source and variants; the rest has defaults.

    Raises (through `load_recipe`):
        UsageError: names the key that does not fit.
    """

    name: str
    source: SourceRecipe = Field(default_factory=lambda: make(SourceRecipe))
    calibration: CalibrationSpec = Field(default_factory=lambda: make(CalibrationSpec))
    variants: tuple[Annotated[AnyVariant, Field(discriminator="kind")], ...]
    evaluation: JudgingRecipe = Field(default_factory=lambda: make(JudgingRecipe))
    card: CardRecipe = Field(default_factory=lambda: make(CardRecipe))
    publish: PublishingRecipe | None = None

    @field_validator("variants", mode="before")
    @classmethod
    def _kinds_in_small_letters(cls, value: Any) -> Any:
        """`kind` tells which spec reads a variant, so that no spec has spelled it yet."""
        if not isinstance(value, list | tuple):
            return value
        told = [(one, one.get("kind") if isinstance(one, dict) else None) for one in value]
        return [{**one, "kind": kind.lower()} if isinstance(kind, str) else one for one, kind in told]

    @field_validator("name")
    @classmethod
    def _check_name(cls, value: str) -> str:
        if re.fullmatch(_NAME, value) is None:
            raise ValueError("use letters, digits and . _ -")
        return value

    @model_validator(mode="after")
    def _check_variants(self) -> Self:
        if not self.variants:
            raise ValueError("variants: name at least one")
        for what in (self.source, *self.variants):
            if what.repo is not None:
                _repository(what.repo)
        counts = Counter((self.repo_of(variant), variant.kind, variant.title) for variant in self.variants)
        (repo, kind, title), times = counts.most_common(1)[0]
        if times > 1:
            raise ValueError(f"variants: {times} of them are {kind} {title} in {repo}; give one another repo")
        kinds: dict[str, str] = {self.reference_repo: "hf"}
        for variant in self.variants:
            if kinds.setdefault(self.repo_of(variant), variant.kind) != variant.kind:
                raise ValueError(f"repo {self.repo_of(variant)} is for one kind of files, not for two")
        return self

    @property
    def reference_repo(self) -> str:
        """Name of the full-precision repository."""
        return self.source.repo or f"{self.name}-{CONTAINERS['hf'].shown.endings[0]}"

    def repo_of(self, variant: AnyVariant) -> str:
        """Name of a variant's repository, without its owner."""
        return variant.repo or f"{self.name}-{CONTAINERS[variant.kind].shown.endings[0]}"

    def shares(self, variant: FileVariant) -> bool:
        """Whether a ggjt file takes the codes of a variant's GPTQ run, be it this one or another of its type."""
        takers = (one for one in self.variants if isinstance(one, GgjtVariant) and one.type == variant.type)
        if isinstance(variant, GgufVariant) and variant.budget is not None:
            return False
        return runs_gptq(variant) and any(runs_gptq(one) for one in takers)


def _check_alone(budget: str | int) -> None:
    if len(allowances(budget)) > 1:
        raise ValueError(f"budget {budget}: a variant has one; give each a variant of its own")


def runs_gptq(variant: FileVariant) -> bool:
    """Whether a file's codes come of a GPTQ run. Raises UsageError where they are to, and the type has no grid."""
    if variant.method == "round":
        return False
    try:
        gptq_type(variant.type)
    except UsageError:
        if variant.method == "gptq":
            raise
        return False
    return True


def load_recipe(path: str | Path) -> Recipe:
    """Read a recipe; local paths in it become absolute where they are found beside it.

    Raises:
        UsageError: no such file, no YAML, or a key that does not fit.
    """
    place = Path(path).expanduser()
    try:
        check_readable(place)
        content = yaml.load(place.read_text(encoding="utf-8"), Loader=_Loader)
    except SourceError as error:
        raise UsageError(str(error)) from None
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from None
    except Exception as error:  # YAML's own, and what its makers of values raise on others than they expect
        raise UsageError(f"{path}: no YAML: {yaml_fault(error)}") from None
    if not isinstance(content, dict):
        raise UsageError(f"{path}: a recipe is a mapping with name, source and variants")
    try:
        recipe = make(Recipe, **_located(content, place.resolve().parent))
        _check_names(recipe)
        return recipe
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None
    except TypeError:  # keys that are no strings
        raise UsageError(f"{path}: keys are names, such as source and variants") from None


class _Loader(yaml.SafeLoader):
    """Refuses a key that is given twice, of which YAML's own loader keeps the last without a word, and aliases.

    A few lines of aliases stand for more values than there is memory for; no recipe needs one.
    """

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()  # type: ignore[no-untyped-call]
            raise yaml.composer.ComposerError(None, None, "an alias: write the value out", event.start_mark)
        node: yaml.Node | None = super().compose_node(parent, index)
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = [key for key, times in Counter(map(str, keys)).items() if times > 1]
        if twice:
            raise yaml.constructor.ConstructorError(None, None, f"{twice[0]} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


# Where a recipe names files: keys by section.
_PATHS = {
    "source": ("model", "base", "delta"),
    "calibration": ("data",),
    "evaluation": ("texts", "prompts", "tasks_dir"),
    "card": ("template", "original"),
}


def _located(content: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The recipe with the paths that exist beside it made absolute."""

    def found(value: Any) -> Any:
        if isinstance(value, list):
            return [found(one) for one in value]
        if not isinstance(value, str):
            return value
        try:
            path = folder / Path(value).expanduser()
            return str(path) if path.exists() else value
        except (OSError, RuntimeError, ValueError) as error:  # too long, or nobody's home
            raise UsageError(f"{shortened(value)}: no file can have this name: {shortened(str(error))}") from None

    located = dict(content)
    for section, keys in _PATHS.items():
        part = located.get(section)
        if isinstance(part, dict):
            located[section] = {**part, **{key: found(part[key]) for key in keys if part.get(key)}}
    return located


def _check_names(recipe: Recipe) -> None:
    """Refuse names of models and texts that can be of nothing. Raises UsageError."""
    for model in (recipe.source.model, recipe.source.base, recipe.source.delta):
        if model is not None:
            check_model(model)
    check_data(recipe.calibration.data)
    for text in recipe.evaluation.texts:
        check_dataset(text)


def _repository(name: str) -> str:
    if re.fullmatch(_REPOSITORY, name) is None or len(name) > 96:
        raise ValueError(f"{name!r} is no name that the Hub takes (letters, digits, and single . _ - between them)")
    return name
