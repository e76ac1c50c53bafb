"""How a model is loaded in the programs that people use, as text for a card."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from quantkit.verbs.card.facts import Model


@dataclass(frozen=True)
class Hint:
    """A program that loads a model, what it needs, and how it is told to.

    Attributes:
        models: names of the models here that it loads.
        language: of `code`, for a Markdown fence.
    """

    program: str
    needs: str
    models: tuple[str, ...]
    language: str
    code: str


@dataclass(frozen=True)
class _Place:
    """The model that the code names: the first that the program loads."""

    repo: str
    model: Model
    source: str

    @property
    def revision(self) -> str:
        return "" if self.model.branch == "main" else f', revision="{self.model.branch}"'

    @property
    def file(self) -> str:
        return next(iter(self.model.files))


def _transformers(place: _Place) -> str:
    file = f', gguf_file="{place.file}"' if place.model.is_file else ""
    return f'''from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{place.repo}"{place.revision}{file})
model = AutoModelForCausalLM.from_pretrained("{place.repo}"{place.revision}{file}, device_map="auto")
inputs = tokenizer("The sea is", return_tensors="pt").to(model.device)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))'''


def _gptqmodel(place: _Place) -> str:
    return f'''from gptqmodel import GPTQModel

model = GPTQModel.load("{place.repo}"{place.revision})
print(model.tokenizer.decode(model.generate("The sea is")[0]))'''


def _vllm(place: _Place) -> str:
    if place.model.is_file:
        return (
            f"hf download {place.repo} {place.file} --local-dir .\nvllm serve ./{place.file} --tokenizer {place.source}"
        )
    branch = "" if place.model.branch == "main" else f" --revision {place.model.branch}"
    return f"vllm serve {place.repo}{branch}"


def _autogptq(place: _Place) -> str:
    return f'''from auto_gptq import AutoGPTQForCausalLM
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{place.repo}"{place.revision})
model = AutoGPTQForCausalLM.from_quantized("{place.repo}"{place.revision}, use_safetensors=True, device="cuda:0")
inputs = tokenizer("The sea is", return_tensors="pt").to("cuda:0")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))'''


def _download(place: _Place) -> str:
    branch = "" if place.model.branch == "main" else f" --revision {place.model.branch}"
    name = place.repo.rpartition("/")[2]
    return f"hf download {place.repo}{branch} --local-dir {name}"


def _exllama(place: _Place) -> str:
    return f"{_download(place)}\npython test_benchmark_inference.py -d {place.repo.rpartition('/')[2]} -p"


def _exllama2(place: _Place) -> str:
    return f'{_download(place)}\npython test_inference.py -m {place.repo.rpartition("/")[2]} -p "The sea is"'


def _llama_cpp(place: _Place) -> str:
    return f'{_one_file(place)}\nllama-cli -m {place.file} -p "The sea is" -n 50'


def _llama_cpp_python(place: _Place) -> str:
    return f'''from llama_cpp import Llama

model = Llama.from_pretrained("{place.repo}", filename="{place.file}")
print(model("The sea is", max_tokens=50)["choices"][0]["text"])'''


def _ctransformers(place: _Place) -> str:
    return f'''from ctransformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{place.repo}", model_file="{place.file}", model_type="llama")
print(model("The sea is", max_new_tokens=50))'''


def _webui(place: _Place) -> str:
    branch = "" if place.model.branch == "main" else f" --branch {place.model.branch}"
    file = f" --specific-file {place.file}" if place.model.is_file else ""
    return f"python download-model.py {place.repo}{branch}{file}"


def _one_file(place: _Place) -> str:
    return "\n".join(f"hf download {place.repo} {name} --local-dir ." for name in place.model.files)


# By the names of `quantkit.verbs.verify.programs`.
_CODE: dict[str, tuple[str, Callable[[_Place], str]]] = {
    "transformers": ("python", _transformers),
    "GPTQModel": ("python", _gptqmodel),
    "vLLM": ("bash", _vllm),
    "AutoGPTQ": ("python", _autogptq),
    "ExLlama": ("bash", _exllama),
    "ExLlamaV2": ("bash", _exllama2),
    "llama.cpp": ("bash", _llama_cpp),
    "ctransformers": ("python", _ctransformers),
}
# Programs that load what another one loads, which they hold.
_WITHIN: dict[str, tuple[tuple[str, ...], str, Callable[[_Place], str]]] = {
    "llama-cpp-python": (("llama.cpp",), "python", _llama_cpp_python),
    "text-generation-webui": (("ExLlamaV2", "llama.cpp"), "bash", _webui),
}


def hints(models: Sequence[Model], repo: str, source: str) -> list[Hint]:
    """Every program that loads at least one of the models, with code for the first one; others are not named.

    Args:
        models: of one repository.
        repo: its name.
        source: of the model that they were made from.
    """
    found = []
    for program, (language, code) in _CODE.items():
        found += _hint(program, (program,), models, (repo, source), language, code)
    for program, (inner, language, code) in _WITHIN.items():
        found += _hint(program, inner, models, (repo, source), language, code)
    return found


def _hint(
    program: str,
    inner: Sequence[str],
    models: Sequence[Model],
    names: tuple[str, str],
    language: str,
    code: Callable[[_Place], str],
) -> list[Hint]:
    loaded = {
        model.name: (model, load) for model in models for load in model.loads if load.ok and load.program in inner
    }
    if not loaded:
        return []
    model, load = next(iter(loaded.values()))
    needs = f"with {load.program} in it" if program not in inner else load.why
    return [Hint(program, needs, tuple(loaded), language, code(_Place(names[0], model, names[1])))]
