"""What is known of the models in a folder: from their headers, and from what quantkit noted beside them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantkit.containers import CONTAINERS, is_imatrix, of_file
from quantkit.containers.describe import describe
from quantkit.containers.gguf.read import model_stem
from quantkit.containers.source import Source
from quantkit.errors import SourceError, UsageError
from quantkit.options import EndBits
from quantkit.runs.atomic import REPORT_NAME, file_sha256
from quantkit.runs.keeping import is_kept
from quantkit.runs.records import read_record
from quantkit.sources import open_source
from quantkit.verbs.verify.programs import Facts, Load, programs

_SHORT = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}
_KEYS = ("general.", "quantkit.", "quantize.imatrix.")
KV_TOKENS = 2048
"""Tokens whose keys and values are counted into the memory needed."""


@dataclass(frozen=True)
class ModelFacts:
    """A folder's model or one of its files, as a card's templates see it.

    Attributes:
        name: of the file, its first part or the folder.
        branch: where it lies in the repository.
        kind: name of its container.
        form, short: what the container is called, in the plural and in a list of formats.
        is_file: whether it is one; else it is the folder.
        precision: what it is read as, and what its weights were rounded to before: "float16 from Q4_1".
        types: how many matrices it holds of each type.
        files: SHA-256 by name of all files that hold its weights.
        bytes: of these files.
        memory_bytes: of its tensors, and of keys and values of `kv_tokens` tokens in float16; None where the config
            does not say how large these are.
        bits, group_size, sym, desc_act: of a GPTQ checkpoint.
        outside: bits of head and embeddings, where the run that quantized it made codes of them.
        act_order, damp: of the run that quantized it; None where nothing says so.
        calibration: provenance of that run's text.
        loads: every program's answer to whether it loads this.
        record: quantkit.json, where it is of these files; else {}.
        sees: whether the model takes images beside text.
    """

    name: str
    branch: str
    kind: str
    form: str
    short: str
    is_file: bool
    architecture: str
    scheme: str
    precision: str
    types: Mapping[str, int]
    files: Mapping[str, str]
    bytes: int
    bits_per_weight: float
    memory_bytes: int | None
    kv_tokens: int
    bits: int | None = None
    group_size: int | None = None
    sym: bool | None = None
    desc_act: bool | None = None
    outside: Mapping[str, int] = field(default_factory=dict)
    act_order: str | None = None
    damp: float | None = None
    calibration: Mapping[str, Any] | None = None
    loads: tuple[Load, ...] = ()
    record: Mapping[str, Any] = field(default_factory=dict)
    keys: Mapping[str, Any] = field(default_factory=dict)
    sees: bool = False


def models_in(folder: Path, branch: str, trust: bool = False) -> list[ModelFacts]:
    """The models of a folder: that of its config.json, and every GGUF and ggjt file, of split ones the first part.

    Raises:
        UsageError: no model there.
        SourceError: one that cannot be read, or another one than quantkit.json says.
    """
    found = [open_source(folder, trust_remote_code=trust)] if (folder / "config.json").is_file() else []
    files: dict[str, Path] = {}
    for path in sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")):
        if not is_kept(path.name) and of_file(path) and not is_imatrix(path):
            files.setdefault(model_stem(path), path)
    found += [open_source(path) for path in files.values()]
    if not found:
        raise UsageError(f"{folder}: no model here, so there is nothing to write a card of")
    record = read_record(folder)
    return [_model(source, branch, record, alone=len(found) == 1) for source in found]


def _model(source: Source, branch: str, record: Mapping[str, Any], alone: bool) -> ModelFacts:
    paths = [Path(path) for path in source.weight_files()]
    files = {path.name: file_sha256(path) for path in paths}
    own = record if _is_of(record, files, source, alone) else {}
    if "variants" in own:  # a release's folder: a record for each file
        own = (own["variants"] or {}).get(paths[0].name) or {}
    keys, shown = source.metadata, CONTAINERS[source.kind].shown
    seen = describe(source)
    types = Counter(tensor["type"] for tensor in seen.tensors if len(tensor["shape"]) > 1)
    form, short, scheme = shown.form, shown.short, _scheme(source, keys, seen.scheme)
    if not CONTAINERS[source.kind].quantized and not any(kind.startswith("F8") for kind in types):
        form, scheme = f"Weights in {source.precision}", source.precision
        short = _SHORT.get(scheme, scheme)
    memory, tokens = _memory(source, seen.bytes)
    recipe, calibration = own.get("recipe") or {}, own.get("calibration")
    settings = dict(source.settings)
    if "act_order" in recipe:
        settings |= {"act_order": recipe["act_order"], "damp": recipe.get("damp", settings.get("damp"))}
    return ModelFacts(
        name=paths[0].name if source.path.is_file() else source.label,
        branch=branch,
        kind=source.kind,
        form=form,
        short=short,
        is_file=source.path.is_file(),
        architecture=seen.architecture,
        scheme=scheme,
        precision=source.precision,
        types=dict(types.most_common()),
        files=files,
        bytes=sum(path.stat().st_size for path in paths),
        bits_per_weight=seen.bits_per_weight,
        memory_bytes=memory,
        kv_tokens=tokens,
        outside={name: bits for name in EndBits.model_fields if isinstance(bits := recipe.get(name), int)},
        calibration=calibration if isinstance(calibration, dict) else None,
        loads=tuple(programs(Facts.of(source))),
        record=own,
        keys={key: value for key, value in keys.items() if key.startswith(_KEYS)},
        sees=_sees(source),
        **settings,
    )


def _is_of(record: Mapping[str, Any], files: Mapping[str, str], source: Source, alone: bool) -> bool:
    """Whether a folder's record is about these files. Raises SourceError where it is of others of the same names."""
    noted = record.get("files")
    if not isinstance(noted, dict):  # quantkit before it noted them: of the only model there
        return bool(record) and alone
    wrong = next((name for name, sha256 in files.items() if noted.get(name, sha256) != sha256), None)
    if wrong:
        raise SourceError(
            f"{wrong} is another file than {REPORT_NAME} says, which was written with it; `quantkit verify` says more"
        )
    return all(name in noted for name in files)


def _sees(source: Source) -> bool:
    """Whether the class that the config names is one of images and text."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as KNOWN

    return KNOWN.get(source.config.model_type) in (source.config.architectures or ())


def _scheme(source: Source, keys: Mapping[str, Any], described: str) -> str:
    """A short name of how the weights are stored."""
    from quantkit.codes.kinds import FileType

    known = {int(kind): kind.name for kind in FileType if kind != FileType.GUESSED}
    if name := known.get(keys.get("general.file_type", -1)):
        return name.removeprefix("MOSTLY_").removeprefix("ALL_")
    return described.removeprefix(f"{source.kind}: mostly ")


def _memory(source: Source, weights: int) -> tuple[int | None, int]:
    """Bytes of weights with keys and values, and of how many tokens; 2 bytes each, key and value per layer and head."""
    config = source.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or getattr(config, "num_attention_heads", None)
    layers, hidden = getattr(config, "num_hidden_layers", None), getattr(config, "hidden_size", None)
    longest = getattr(config, "max_position_embeddings", None) or KV_TOKENS
    tokens = min(KV_TOKENS, longest)
    if not (heads and layers and hidden and getattr(config, "num_attention_heads", None)):
        return None, tokens
    width = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    return weights + 2 * 2 * layers * heads * width * tokens, tokens
