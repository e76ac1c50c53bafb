"""The verb `verify`: a folder or file as a downloader would meet it. Nothing is taken on trust, nothing stops it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

from quantkit.blocks.open import resolve_device
from quantkit.containers import CONTAINERS, Container, files, is_imatrix, load, of_file, of_folder
from quantkit.containers.gguf.read import model_stem
from quantkit.containers.hf.pickled import PickledFiles
from quantkit.containers.hf.read import (
    check_config,
    check_plain,
    check_vocabulary,
    load_config,
    load_tokenizer,
    quantization_of,
)
from quantkit.containers.hf.shards import SafetensorsFiles
from quantkit.containers.source import Source, TensorInfo
from quantkit.errors import UsageError
from quantkit.options.verbs import Verify
from quantkit.progress import SILENT, Progress, counted
from quantkit.report import LEFT_OUT, Column, Report, Shown, Table
from quantkit.runs.atomic import REPORT_NAME, absolute, read_json
from quantkit.runs.keeping import is_kept
from quantkit.runs.records import read_record
from quantkit.sources import check_adapter, open_source
from quantkit.verbs import verb
from quantkit.verbs.verify.behaviour import check_behaviour
from quantkit.verbs.verify.companions import (
    check_folder_paths,
    check_ids,
    check_links,
    check_metadata_paths,
    check_tokenizer,
)
from quantkit.verbs.verify.findings import Findings
from quantkit.verbs.verify.programs import Facts, Load, programs
from quantkit.verbs.verify.stored import StoredTensors, check_checksums, check_model, check_values, check_weights

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class Verified(Report):
    """One model: a folder, a file, or a file with its parts.

    Attributes:
        name: of the folder or file.
        kind: name of its container.
        problems: what is wrong, a line each, with what to do.
        notes: what is worth knowing and not wrong.
        loads: each program's answer; empty where the config or tensors cannot be read.
        sentence: what greedy decoding wrote; None where it was not asked for, or could not.
    """

    name: str
    kind: str
    problems: tuple[str, ...]
    notes: tuple[str, ...] = ()
    loads: tuple[Load, ...] = ()
    sentence: str | None = None

    def lines(self) -> Iterator[Shown]:
        yield f"{self.name} ({self.kind})"
        for text in self.problems:
            yield f"  problem: {text}"
        for text in self.notes:
            yield f"  note: {text}"
        columns = (Column("program", "left"), Column("loads", "left"), Column("why", "left", wraps=True))
        rows = [[row.program, "yes" if row.ok else "no", _why(row)] for row in self.loads]
        if rows:
            yield Table(columns, rows, heads=False, indent=2)
        if self.sentence is not None:
            yield f"  it writes: {' '.join(self.sentence.split())}"


def _why(row: Load) -> str:
    """What else is said of a program: why it does not load it, or over how many devices it does."""
    if not row.tensor_parallel:
        return row.why
    limit = next((f" (not {size}: {why})" for size, why in row.limits.items()), "")
    shared = f"tensor parallel {', '.join(map(str, row.tensor_parallel))}{limit}"
    return f"{row.why}; {shared}" if row.why else shared


@dataclass(frozen=True)
class VerifyReport(Report):
    """What `verify` found.

    Attributes:
        path: name of the folder or file.
        ok: whether there are no problems.
        problems: all of them; with several models each begins with its name.
        models: one, or each file of a folder of GGUF or ggjt files.
        folder_problems: of such a folder as a whole.
    """

    path: str
    ok: bool = field(init=False)
    problems: list[str] = field(init=False)
    models: tuple[Verified, ...]
    folder_problems: tuple[str, ...] = field(default=(), metadata=LEFT_OUT)

    def __post_init__(self) -> None:
        several = len(self.models) > 1
        own = [f"{model.name}: {text}" if several else text for model in self.models for text in model.problems]
        object.__setattr__(self, "problems", [*self.folder_problems, *own])
        object.__setattr__(self, "ok", not self.problems)

    def lines(self) -> Iterator[Shown]:
        for text in self.folder_problems:
            yield f"problem: {text}"
        for model in self.models:
            yield from model.lines()
        count = len(self.problems)
        yield "no problems" if not count else counted(count, "problem")


@verb(Verify)
def verify(options: Verify, *, progress: Progress = SILENT) -> VerifyReport:
    """Look at a model as somebody would who just downloaded it, and say everything that is wrong.

    Raises:
        UsageError: nothing is there, or no such device. What is wrong with a model is in the report.
    """
    if options.device not in ("auto", "cpu"):  # which every machine has
        resolve_device(options.device)
    run = _Run(options.generate, options.device, options.trust_remote_code, progress)
    place = absolute(options.path)
    if not place.is_file() and not place.is_dir():
        raise UsageError(f"{options.path}: is neither file nor folder, so it is not opened")
    return run.report(place)


def glance(place: Path, trust_remote_code: bool, progress: Progress) -> VerifyReport:
    """As much of it as takes no torch: checksums, headers, names, JSON files, local paths. No weight is looked at."""
    return _Run(False, "cpu", trust_remote_code, progress, headers=True).report(place)


@dataclass(frozen=True)
class _Run:
    generate: bool
    device: str
    trust: bool
    progress: Progress
    headers: bool = False

    def report(self, place: Path) -> VerifyReport:
        """What is found of a folder or file."""
        name = place.name
        if place.is_file():
            return VerifyReport(name, (self.file(place, place.parent),))
        inside = _model_files(place)
        models = [self.file(file, None) for file in inside]
        if (place / "config.json").is_file() or not inside:
            several = [] if (place / "config.json").is_file() else _model_folders(place)
            return VerifyReport(name, (*map(self.folder, several or [place]), *models))
        found = Findings(place)
        check_checksums(place, None, found, self.progress)
        check_links(place, found)
        check_folder_paths(place, found)
        return VerifyReport(name, tuple(models), tuple(found.problems))

    def folder(self, folder: Path) -> Verified:
        found = Findings(folder)
        with found.guard("checksums"):
            if not check_checksums(folder, None, found, self.progress):
                found.note("no checksums are recorded beside it, so changed weights show only in what the model says")
        with found.guard("adapter"):
            if doubt := check_adapter(folder):
                found.note(doubt)
        with found.guard("metadata"):
            check_links(folder, found)
            check_folder_paths(folder, found)
        if self.headers:
            return self._headers(folder, found)
        config: PretrainedConfig | None = None
        content: dict[str, Any] = {}
        with found.guard("config.json"):
            config = load_config(folder, self.trust)
            content = read_json(folder / "config.json")
        container, label, tensors, delta = self._tensors(folder, config, content, found)
        loads: list[Load] = []
        if config is not None:
            with found.guard("generation_config.json"):
                check_ids(folder, config, found)
            with found.guard("tokenizer"):
                tokenizer = load_tokenizer(folder, self.trust)
                check_tokenizer(tokenizer, int(config.get_text_config().vocab_size), found)
            with found.guard("programs"):
                copies = (folder / "quantize_config.json").is_file()
                facts = Facts(container.name, config, content, tensors, label, copies)
                loads = programs(facts) if tensors else []
        sentence = None if delta else self._behave(folder, found)
        return _verified(folder.name, container.name, found, loads, sentence)

    def _headers(self, folder: Path, found: Findings) -> Verified:
        """What headers and names tell of a folder's model; of a pickle, whose header is torch's, names alone."""
        label: dict[str, Any] = {}
        with found.guard("config.json"):
            check_config(folder)
            label = quantization_of(folder)
        _weights(folder, found)
        if not found.problems and SafetensorsFiles.present(folder):
            with found.guard("weights"):
                open_source(folder, trust_remote_code=self.trust)
        with found.guard("tokenizer"):
            if not self.trust:
                check_vocabulary(folder)
        container = of_folder(label) or CONTAINERS["hf"]
        return _verified(folder.name, container.name, found)

    def _tensors(
        self, folder: Path, config: PretrainedConfig | None, content: Mapping[str, Any], found: Findings
    ) -> tuple[Container, Mapping[str, Any], Mapping[str, TensorInfo], bool]:
        """Container, label, the tensors as the model sees them, all checked; and whether they are a delta's."""
        table = _weights(folder, found)
        label: dict[str, Any] = {}
        with found.guard("config.json"):
            label = quantization_of(folder) if content else {}
        container = of_folder(label) or CONTAINERS["hf"]
        plain: Collection[str] = table.entries
        tensors: Mapping[str, TensorInfo] = table.tensors
        read, delta = table.read, False
        if config is not None and not label:
            with found.guard("weights"):
                check_plain(folder, tensors)
        if container.checks:
            tensors, plain = load(container.checks)(folder, table, label, found, self.progress)
        elif container.method or (config is not None and not table.entries and PickledFiles.present(folder)):
            with found.guard("weights"):
                source = open_source(folder, trust_remote_code=self.trust)
                tensors, plain, read = source.tensors, source.tensors, source.read
        if config is not None and tensors:
            with found.guard("config.json"):  # of files that `open_source` may refuse
                about = {"path": folder, "label": folder.name, "kind": container.name, "config": config}
                held = SimpleNamespace(**about, tensors=tensors, read=read, trusts_code=self.trust)
                check_model(cast(Source, held), found)
        with found.guard(REPORT_NAME):
            delta = isinstance(read_record(folder).get("delta"), dict)
            if delta:
                found.note("a delta, no model of its own: it is not run, and zeros in it are what did not change")
        check_values(plain, read, delta, found, self.progress)
        return container, label, tensors, delta

    def file(self, path: Path, beside: Path | None) -> Verified:
        """A file of any container; checksums recorded in the folder `beside` are compared."""
        found = Findings(path.parent)
        held = of_file(path)
        # What neither name nor content tells is taken for the oldest kind, whose files had any name.
        container = _named_like(path) or held or CONTAINERS["ggjt"]
        if held is None:
            with path.open("rb") as opened:
                magic = opened.read(4)
            known = " or ".join(row.word for row in files())
            found.problem(f"{path.name}: begins with {magic!r}: no {known} file, or a damaged one; download it again")
            return _verified(path.name, container.name, found)
        source: Source | None = None
        with found.guard(path.name):
            source = load(container.opens)(path)
        if source is None:
            stem, there = model_stem(path), sorted(path.parent.glob(f"*{path.suffix}"))
            parts = [other for other in there if model_stem(other) == stem]
        else:
            parts = [Path(part) for part in source.weight_files()]
        if beside is not None:
            with found.guard("checksums"):
                check_checksums(beside, {part.name for part in parts}, found, self.progress)
        for part in parts if container.metadata else []:
            with found.guard(part.name):
                check_metadata_paths(part.name, load(container.metadata)(part), found)
        if source is None or self.headers:
            return _verified(path.name, container.name, found)
        return self._opened(path.name, container.name, source, found)

    def _opened(self, name: str, kind: str, source: Source, found: Findings) -> Verified:
        with found.guard("metadata"):
            check_model(source, found)
        check_values(source.tensors, source.read, False, found, self.progress)
        with found.guard("tokenizer"):
            check_tokenizer(source.tokenizer(), source.config.vocab_size, found)
        for text in source.remarks:
            found.note(text)
        loads: list[Load] = []
        with found.guard("programs"):
            loads = programs(Facts.of(source))
        return _verified(name, kind, found, loads, self._behave(source, found))

    def _behave(self, model: Path | Source, found: Findings) -> str | None:
        """Run the model, as far as what is wrong with its files allows."""
        if not self.generate:
            return None
        sentence: str | None = None
        run = Findings(found.root)
        with run.guard("running it"):
            source = open_source(model, trust_remote_code=self.trust) if isinstance(model, Path) else model
            whole = source.path.is_dir()
            record = read_record(source.path if whole else source.path.parent)
            results = [{}] if whole else (record.get("evaluation") or {}).get("results") or [{}]
            own = whole or results[-1].get("model") == source.label  # what lies beside a file may be of another
            sentence = check_behaviour(source, record if own else {}, self.device, run, self.progress)
        damaged = sentence is None and bool(found.problems)
        for text in run.notes:
            found.note(text)
        for text in run.problems:
            # What keeps damaged files from running was said in detail already.
            found.note(f"it cannot be run: {text}") if damaged else found.problem(text)
        return sentence


def _weights(folder: Path, found: Findings) -> StoredTensors:
    table = StoredTensors({}, frozenset(), {})
    if SafetensorsFiles.present(folder):
        with found.guard("weights"):
            table = check_weights(folder, found)
            for file, metadata in table.metadata.items():
                check_metadata_paths(file, metadata, found)
    elif PickledFiles.present(folder):
        found.note("weights are pickled (pytorch_model.bin): vLLM and llama.cpp's converter like safetensors better")
    else:
        found.problem("no weights here: no safetensors file, no pytorch_model.bin; download them")
    return table


def _model_folders(folder: Path) -> list[Path]:
    """Folders in one that a run of several formats wrote."""
    formats = (read_record(folder).get("recipe") or {}).get("format")
    if not isinstance(formats, list):
        return []
    known = {format for row in CONTAINERS.values() for format in row.formats}  # whatever else a record names
    return [folder / format for format in dict.fromkeys(map(str, formats)) if format in known]


def _model_files(folder: Path) -> list[Path]:
    """Files of a folder that hold a model, of split ones the first part that is there."""
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.suffix != ".safetensors" and (of_file(path) or _named_like(path)):
            if is_imatrix(path) or is_kept(path.name):
                continue
            found.setdefault(model_stem(path) + path.suffix, path)
    return list(found.values())


def _named_like(path: Path) -> Container | None:
    """The container that a file's suffix is of; it may be damaged."""
    return next((row for row in files() if path.suffix and row.suffix == path.suffix), None)


def _verified(
    name: str, kind: str, found: Findings, loads: Sequence[Load] = (), sentence: str | None = None
) -> Verified:
    return Verified(name, kind, tuple(found.problems), tuple(found.notes), tuple(loads), sentence)
