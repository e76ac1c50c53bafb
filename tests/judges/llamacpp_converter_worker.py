"""llama.cpp's own converter as a judge. Runs on the tests' torch and transformers, with llama.cpp's gguf-py."""

from serve import replaced, serve  # isort: skip

import sys
from typing import Any

sys.path[:0] = [f"{sys.argv[1]}/gguf-py", sys.argv[1]]

import convert_hf_to_gguf  # noqa: E402
from conversion.base import ModelBase, TextModel  # noqa: E402


def convert(folder: str, out: str, config: dict[str, Any], options: list[str]) -> dict:
    """Write `folder` as a float32 GGUF file; `config`: fields beside those that transformers reads from its config;
    `options`: of the converter's command line.

    The tests' vocabulary is a byte-level one for every model. That is not left to the converter, which looks for the
    vocabulary that a family is published with, and refuses one it does not know.
    """
    find, load = convert_hf_to_gguf.get_model_class, ModelBase.load_hparams

    def found(*arguments: Any, **options: Any) -> Any:
        model = find(*arguments, **options)
        model.set_vocab = lambda self: self._set_vocab_gpt2()
        return model

    arguments = ["convert_hf_to_gguf.py", folder, "--outfile", out, "--outtype", "f32", *options]
    with (
        replaced(sys, argv=arguments),
        replaced(convert_hf_to_gguf, get_model_class=found),
        replaced(ModelBase, load_hparams=staticmethod(lambda *given, **named: {**load(*given, **named), **config})),
        replaced(TextModel, get_vocab_base_pre=lambda *_: "gpt-2"),
    ):
        convert_hf_to_gguf.main()
    return {}


if __name__ == "__main__":
    serve({"convert": convert})
