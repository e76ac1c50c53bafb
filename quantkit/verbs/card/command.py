"""The commands that make a model again, from what its record says."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from quantkit.options import Options
from quantkit.options.grid import EFFORTS, METHODS, EffortName
from quantkit.options.verbs import Convert, Ggml, Gptq, Imatrix, Merge, Repack
from quantkit.sources import variant_name
from quantkit.tokens.datasets import KNOWN_HUB

_CODES = "CODES"  # begins the name of the folder of a run whose codes another command takes


def commands_of(record: Mapping[str, Any], imatrix: str | None = None) -> list[str]:
    """Command lines without local paths, as far as a record tells: more than one where each takes what the one before
    it made.

    Args:
        record: of a model.
        imatrix: name of the importance matrix that it was rounded by.
    """
    try:
        return _commands(record, imatrix)
    except (AttributeError, TypeError, ValueError):  # options that quantkit does not write
        return []


def _commands(record: Mapping[str, Any], imatrix: str | None) -> list[str]:
    source, recipe = record.get("source") or {}, record.get("recipe") or {}
    pair = [source[role] for role in ("base", "delta") if isinstance(source.get(role), dict)]
    names = [str(part["model"]) for part in pair or [source] if isinstance(part.get("model"), str)]
    if not names or not isinstance(recipe, dict):
        return []
    drawn = record.get("calibration")
    calibrated = _drawn(drawn) if isinstance(drawn, dict) else {}
    if "bits" in recipe:
        options = {**recipe, **_effort(recipe), **calibrated, "override": recipe.get("overrides")}
        written, ggml = record.get("written"), recipe.get("ggml")
        if not isinstance(written, dict) or not isinstance(ggml, str):
            return [_command(Gptq, names, options)]
        folder = f"{_CODES}-{ggml.upper()}"  # a card has those of several files one below the other
        types = recipe.get("budget") or ggml.upper()
        codes = f"{folder}/{variant_name(str(source['model']))}-{METHODS['gptq'].label}-{types}.gguf"
        return [_command(Gptq, names, {**options, "out": folder}), _command(Ggml, [codes], written)]
    if "repack" in recipe:
        return [_command(Repack, names, {**recipe, "to": recipe["repack"]})]
    if "type" in recipe:
        weighed = [_command(Imatrix, names, {**calibrated, "out": imatrix})] if imatrix and calibrated else []
        return [*weighed, _command(Ggml, names, {**recipe, "imatrix": imatrix})]
    if len(pair) == 2 and "delta" not in record:
        return [_command(Merge, names, {**recipe, "vocab": source.get("vocab")})]
    return [_command(Convert, names, recipe)] if "dtype" in recipe else []


def _effort(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """What of accuracy was paid for: the effort that has it, or one with what it has not."""
    if recipe.get("method", "gptq") != "gptq":
        return {}
    done = {name: recipe.get(name) or off for name, off in EFFORTS["fast"]._asdict().items()}
    nearest: EffortName = "standard" if done["token_weights"] else "fast"
    effort = next((name for name, row in EFFORTS.items() if row._asdict() == done), nearest)
    had = EFFORTS[effort]._asdict()
    return {"effort": effort, **{name: None if value == had[name] else value for name, value in done.items()}}


def _drawn(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """The options that a calibration's provenance stands for."""
    known = {file.repository: name for name, file in KNOWN_HUB.items()}
    name = provenance.get("dataset")
    asked = provenance.get("samples_asked") or provenance.get("samples")
    rest = {key: provenance.get(key) for key in ("seq_len", "seed", "template")}
    return {"calibration": known.get(str(name), name), "samples": asked, **rest}


def _command(verb: type[Options], names: list[str], given: Mapping[str, Any]) -> str:
    models = [part for name in names for part in _model(name)]
    if len(names) == 2 and verb is not Merge:
        models = ["--base", names[0], "--delta", names[1]]
    return shlex.join(["quantkit", verb.__name__.lower(), *models, *_options(verb, given)])


def _model(name: str) -> list[str]:
    """A model as it is named: of a Hub id its revision apart."""
    model, at, revision = name.partition("@")
    return [model, "--revision", revision] if at else [name]


def _options(verb: type[Options], given: Mapping[str, Any]) -> Iterator[str]:
    """What differs from the defaults, as it is typed."""
    for name in verb.in_order():
        value, field = given.get(name), verb.model_fields[name]
        if value in (None, (), [], {}) or value == field.get_default(call_default_factory=True):
            continue
        on, _, off = verb.spelling(name).partition("/")
        if isinstance(value, bool):
            yield on if value else off
        elif name == "override":
            for pattern, changes in value:
                told = ",".join(f"{key}:{one}" for key, one in changes.items() if one is not None)
                yield from (on, f"{pattern}={told}")
        else:
            for one in value if isinstance(value, list | tuple) else [value]:
                yield from (on, str(one))
