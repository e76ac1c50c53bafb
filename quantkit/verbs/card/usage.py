"""How a model is used: how it is loaded in the programs that people use, and the form in which it wants to be asked."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from quantkit.errors import UsageError, visible
from quantkit.runs.limits import check_rendered, template_limit
from quantkit.sources import open_source
from quantkit.tokens.records import STYLES
from quantkit.verbs.card.facts import ModelFacts

_ASKED = "{prompt}"
_QUESTION, _BEGUN = "Why is the sea salty?", "The sea is"
_BY_TEMPLATE = """inputs = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
).to(model.device)"""


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


_TRANSFORMERS = """from transformers import {auto}, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{repo}"{revision}{gguf})
model = {auto}.from_pretrained("{repo}"{revision}{gguf}, device_map="auto")
{asked}
answer = model.generate(**inputs, max_new_tokens=200)[0, inputs["input_ids"].shape[1] :]
print(tokenizer.decode(answer, skip_special_tokens=True))"""
_GPTQMODEL = """from gptqmodel import GPTQModel

model = GPTQModel.load("{repo}"{revision})
tokenizer = model.tokenizer
{asked}
answer = model.generate(**inputs, max_new_tokens=200)[0, inputs["input_ids"].shape[1] :]
print(tokenizer.decode(answer, skip_special_tokens=True))"""
_AUTOGPTQ = """from auto_gptq import AutoGPTQForCausalLM
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{repo}"{revision})
model = AutoGPTQForCausalLM.from_quantized("{repo}"{revision}, use_safetensors=True, device="cuda:0")
{asked}
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=200)[0]))"""
_CTRANSFORMERS = """from ctransformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{repo}", model_file="{file}", model_type="llama")
print(model({text}, max_new_tokens=200))"""
_LLAMA_CPP_PYTHON = """from llama_cpp import Llama

model = Llama.from_pretrained("{repo}", filename="{file}")
{answer}"""
_MLX = """from mlx_lm import generate, load

model, tokenizer = load("{repo}"{revision})
{prompted}
print(generate(model, tokenizer, prompt, max_tokens=200))"""
_FOLDER = "hf download {repo}{branch} --local-dir {name}\n"

# Program, the programs of `quantkit.verbs.verify.programs` that it is or has in it, language, code. Of a file first
# what most people run it with.
_CODE: tuple[tuple[str, tuple[str, ...], str, str], ...] = (
    ("llama.cpp", ("llama.cpp",), "bash", "llama-server -hf {tagged}{posted_8080}"),
    ("Ollama", ("llama.cpp",), "bash", "ollama run hf.co/{repo}:{tag}"),
    ("LM Studio", ("llama.cpp",), "bash", "lms get {repo}@{tag}"),
    ("vLLM", ("vLLM",), "bash", "{vllm}{posted_8000}"),
    ("transformers", ("transformers",), "python", _TRANSFORMERS),
    ("GPTQModel", ("GPTQModel",), "python", _GPTQMODEL),
    ("mlx-lm", ("mlx-lm",), "python", _MLX),
    ("AutoGPTQ", ("AutoGPTQ",), "python", _AUTOGPTQ),
    ("ExLlama", ("ExLlama",), "bash", _FOLDER + "python test_benchmark_inference.py -d {name} -p"),
    ("ExLlamaV2", ("ExLlamaV2",), "bash", _FOLDER + "python test_inference.py -m {name} -p {text}"),
    ("ctransformers", ("ctransformers",), "python", _CTRANSFORMERS),
    ("llama-cpp-python", ("llama.cpp",), "python", _LLAMA_CPP_PYTHON),
    ("text-generation-webui", ("ExLlamaV2", "llama.cpp"), "bash", "python download-model.py {repo}{webui}"),
)


def hints(
    models: Sequence[ModelFacts],
    repo: str,
    source: str,
    prompt: PromptForm | None = None,
    best: ModelFacts | None = None,
) -> list[Hint]:
    """Every program that loads at least one of the models, with code for one of them; others are not named.

    Args:
        models: of one repository.
        repo: its name.
        source: of the model that they were made from.
        prompt: how they want to be asked.
        best: the model that the code is for, where a program loads it; else it is for the first.
    """
    found = []
    for program, inner, language, code in _CODE:
        rows = [(model, load) for model in models for load in model.loads if load.ok and load.program in inner]
        loaded = {(model.branch, model.name): (model, load) for model, load in rows}
        if loaded:
            model, load = next((one for one in loaded.values() if one[0] is best), next(iter(loaded.values())))
            needs = load.why if program in inner else f"with {load.program} in it"
            words = _words(model, models, repo, source, language) | _asking(prompt, language)
            names = tuple(model.name for model, _ in loaded.values())
            found.append(Hint(program, needs, names, language, code.format(**words)))
    return found


def _words(model: ModelFacts, models: Sequence[ModelFacts], repo: str, source: str, language: str) -> dict[str, str]:
    """What stands in the code for the model, quoted for its language; of Python, for within quotation marks."""
    quoted = _in_python if language == "python" else _in_shell
    file, other = next(iter(model.files)), "" if model.branch == "main" else quoted(model.branch)
    tag = _tag(model, models)
    folder, repo, source = (
        quoted(repo.rpartition("/")[2]),
        quoted(repo if "/" in repo else f"OWNER/{repo}"),
        quoted(source),
    )
    branch = other and f" --revision {other}"
    by_plugin = f"pip install vllm-gguf-plugin\nvllm serve {repo}:{quoted(tag)} --tokenizer {source}"
    if model.is_file and tag == file:
        by_plugin = f"pip install vllm-gguf-plugin\nhf download {repo} {quoted(file)} --local-dir .\n"
        by_plugin += f"vllm serve ./{quoted(file)} --tokenizer {source}"
    return {
        "repo": repo,
        "name": folder,
        "file": quoted(file),
        "tag": quoted(tag),
        "tagged": f"{repo} --hf-file {quoted(file)}" if tag == file else f"{repo}:{quoted(tag)}",
        "auto": "AutoModelForImageTextToText" if model.sees else "AutoModelForCausalLM",
        "revision": other and f', revision="{other}"',
        "branch": branch,
        "gguf": f', gguf_file="{quoted(file)}"' if model.is_file else "",
        "vllm": by_plugin if model.is_file else f"vllm serve {repo}{branch}",
        "webui": (other and f" --branch {other}") + (f" --specific-file {quoted(file)}" if model.is_file else ""),
    }


def _tag(model: ModelFacts, models: Sequence[ModelFacts]) -> str:
    """What a program picks a file of a repository by: its type where only this file has it in its name, or its name."""
    file = next(iter(model.files))
    alike = [one for one in models if re.search(rf"[-.]{re.escape(model.scheme)}(?![\w])", one.name, re.IGNORECASE)]
    return model.scheme if alike == [model] else file


def _asking(prompt: PromptForm | None, language: str) -> dict[str, str]:
    """The question in the form that the model wants: by its own chat template, or as text."""
    chat = prompt is not None and prompt.origin == "chat template"
    text = prompt.text.replace(_ASKED, _QUESTION) if prompt else _BEGUN
    literal = _literal(text)
    asked = f'inputs = tokenizer({literal}, return_tensors="pt").to(model.device)'
    prompted = f"prompt = {literal}"
    answer = f'print(model({literal}, max_tokens=200)["choices"][0]["text"])'
    posts = [("8080", "completion", {"prompt": text, "n_predict": 200})]
    posts.append(("8000", "v1/completions", {"prompt": text, "max_tokens": 200}))
    if chat:
        messages = [{"role": "user", "content": _QUESTION}]
        asked = f"messages = {json.dumps(messages)}\n" + _BY_TEMPLATE
        prompted = f"messages = {json.dumps(messages)}\n"
        prompted += "prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)"
        answer = f"messages = {json.dumps(messages)}\n"
        answer += 'print(model.create_chat_completion(messages)["choices"][0]["message"]["content"])'
        posts = [(port, "v1/chat/completions", {"messages": messages}) for port in ("8080", "8000")]
    sent = {
        f"posted_{port}": f"\n\n# and once it runs:\ncurl http://localhost:{port}/{path} "
        f"-H 'Content-Type: application/json' -d {_in_shell(json.dumps(body, ensure_ascii=False))}"
        for port, path, body in posts
    }
    return {
        "asked": asked,
        "prompted": prompted,
        "answer": answer,
        "text": literal if language == "python" else _in_shell(text, lines=True),
        **sent,
    }


def _literal(text: str) -> str:
    """Text as a literal of Python."""
    return json.dumps(visible(text, lines=True), ensure_ascii=False)


def _in_python(text: str) -> str:
    return visible(text.replace("\\", "\\\\").replace('"', '\\"'))


def _in_shell(text: str, lines: bool = False) -> str:
    return shlex.quote(visible(text, lines))


def prompt_of(folder: Path, models: Sequence[ModelFacts], given: str | None, trust: bool = False) -> PromptForm | None:
    """The template that is given by name, the chat template that comes with the model, or that of the calibration text.

    Raises:
        UsageError: none with the model where "chat" is asked for.
    """
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
        check_rendered(text, len(_ASKED))
    except Exception:  # no tokenizer: `verify` says so; a template is the model's own program and may raise anything
        return None
    return PromptForm("chat", text, "chat template") if _ASKED in text else None
