"""How a model is used: how it is loaded in the programs that people use, and the form in which it wants to be asked."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from quantkit.errors import UsageError, visible
from quantkit.runs.limits import template_limit
from quantkit.sources import open_source
from quantkit.tokens.records import STYLES
from quantkit.verbs.card.facts import ModelFacts

_ASKED = "{prompt}"


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
class PromptForm:
    """A prompt with ``{prompt}`` where the question stands.

    Attributes:
        name: of the template.
        origin: how it is known.
    """

    name: str
    text: str
    origin: str


_TRANSFORMERS = """from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{repo}"{revision}{gguf})
model = AutoModelForCausalLM.from_pretrained("{repo}"{revision}{gguf}, device_map="auto")
inputs = tokenizer("The sea is", return_tensors="pt").to(model.device)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))"""
_GPTQMODEL = """from gptqmodel import GPTQModel

model = GPTQModel.load("{repo}"{revision})
print(model.tokenizer.decode(model.generate("The sea is")[0]))"""
_AUTOGPTQ = """from auto_gptq import AutoGPTQForCausalLM
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{repo}"{revision})
model = AutoGPTQForCausalLM.from_quantized("{repo}"{revision}, use_safetensors=True, device="cuda:0")
inputs = tokenizer("The sea is", return_tensors="pt").to("cuda:0")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))"""
_CTRANSFORMERS = """from ctransformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{repo}", model_file="{file}", model_type="llama")
print(model("The sea is", max_new_tokens=50))"""
_LLAMA_CPP_PYTHON = """from llama_cpp import Llama

model = Llama.from_pretrained("{repo}", filename="{file}")
print(model("The sea is", max_tokens=50)["choices"][0]["text"])"""
_FOLDER = "hf download {repo}{branch} --local-dir {name}\n"

# Program, the programs of `quantkit.verbs.verify.programs` that it is or has in it, language, code.
_CODE: tuple[tuple[str, tuple[str, ...], str, str], ...] = (
    ("transformers", ("transformers",), "python", _TRANSFORMERS),
    ("GPTQModel", ("GPTQModel",), "python", _GPTQMODEL),
    ("vLLM", ("vLLM",), "bash", "{vllm}"),
    ("AutoGPTQ", ("AutoGPTQ",), "python", _AUTOGPTQ),
    ("ExLlama", ("ExLlama",), "bash", _FOLDER + "python test_benchmark_inference.py -d {name} -p"),
    ("ExLlamaV2", ("ExLlamaV2",), "bash", _FOLDER + 'python test_inference.py -m {name} -p "The sea is"'),
    ("llama.cpp", ("llama.cpp",), "bash", '{downloads}\nllama-cli -m {file} -p "The sea is" -n 50'),
    ("ctransformers", ("ctransformers",), "python", _CTRANSFORMERS),
    ("llama-cpp-python", ("llama.cpp",), "python", _LLAMA_CPP_PYTHON),
    ("text-generation-webui", ("ExLlamaV2", "llama.cpp"), "bash", "python download-model.py {repo}{webui}"),
)


def hints(models: Sequence[ModelFacts], repo: str, source: str) -> list[Hint]:
    """Every program that loads at least one of the models, with code for the first one; others are not named.

    Args:
        models: of one repository.
        repo: its name.
        source: of the model that they were made from.
    """
    found = []
    for program, inner, language, code in _CODE:
        rows = [(model, load) for model in models for load in model.loads if load.ok and load.program in inner]
        loaded = {model.name: (model, load) for model, load in rows}
        if loaded:
            model, load = next(iter(loaded.values()))
            needs = load.why if program in inner else f"with {load.program} in it"
            found.append(
                Hint(program, needs, tuple(loaded), language, code.format(**_words(model, repo, source, language)))
            )
    return found


def _words(model: ModelFacts, repo: str, source: str, language: str) -> dict[str, str]:
    """What stands in the code for the model, quoted for its language; of Python, for within quotation marks."""
    quoted = _in_python if language == "python" else _in_shell
    downloads = [f"hf download {quoted(repo)} {quoted(name)} --local-dir ." for name in model.files]
    folder, file = quoted(repo.rpartition("/")[2]), quoted(next(iter(model.files)))
    other, repo, source = "" if model.branch == "main" else quoted(model.branch), quoted(repo), quoted(source)
    branch = other and f" --revision {other}"
    served = f"{downloads[0]}\nvllm serve ./{file} --tokenizer {source}"
    return {
        "repo": repo,
        "name": folder,
        "file": file,
        "downloads": "\n".join(downloads),
        "revision": other and f', revision="{other}"',
        "branch": branch,
        "gguf": f', gguf_file="{file}"' if model.is_file else "",
        "vllm": served if model.is_file else f"vllm serve {repo}{branch}",
        "webui": (other and f" --branch {other}") + (f" --specific-file {file}" if model.is_file else ""),
    }


def _in_python(text: str) -> str:
    return visible(text.replace("\\", "\\\\").replace('"', '\\"'))


def _in_shell(text: str) -> str:
    return shlex.quote(visible(text))


def prompt_of(folder: Path, models: Sequence[ModelFacts], given: str | None, trust: bool = False) -> PromptForm | None:
    """The template that is given by name, the chat template that comes with the model, or that of the calibration text.

    Raises:
        UsageError: no template of this name, or none with the model where "chat" is asked for.
    """
    if given not in (None, "auto", "none", "chat", *STYLES):
        raise UsageError(
            f"--prompt-template {given}: choose auto, none, chat, {', '.join(sorted(set(STYLES) - {'none'}))}"
        )
    name, origin = given, "given"
    if given in (None, "auto", "chat"):
        if chat := _chat(folder, models[0], trust):
            return chat
        if given == "chat":
            raise UsageError("--prompt-template chat: the tokenizer has no chat template; name another one")
        name = next((model.calibration.get("template") for model in models if model.calibration), None)
        origin = "calibration"
    style = next((style for key, style in STYLES.items() if key == name != "none"), None)
    if style is None:
        return None
    begin = style.system + style.after_system if style.system else ""
    return PromptForm(str(name), begin + style.user.format(text=_ASKED, input="", eos=""), origin)


def _chat(folder: Path, first: ModelFacts, trust: bool) -> PromptForm | None:
    """The tokenizer's own template, where it has one that a single question can be put into."""
    try:
        place = folder / first.name if first.is_file else folder
        tokenizer = open_source(place, trust_remote_code=trust).tokenizer()
        if not tokenizer.chat_template:
            return None
        asked = [{"role": "user", "content": _ASKED}]
        with template_limit():
            text = str(tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True))
    except Exception:  # no tokenizer: `verify` says so; a template is the model's own program and may raise anything
        return None
    return PromptForm("chat", text, "chat template") if _ASKED in text else None
