"""Whether a reader of the file cuts text as the model's own tokenizer does: seen on a fixed text, before the work."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from quantkit.containers.gguf.keys import row_of
from quantkit.containers.gguf.pretokenizers import PROBE
from quantkit.containers.gguf.tokenizer import make_tokenizer
from quantkit.containers.source import Source
from quantkit.errors import SourceError, first_line

_TEXTS = (
    "The QUICK brown Fox, said Anna; isn't it (2 x 12 = 24, 1234567 or 3.14)?",
    "the \ufb01ne \uff11\uff12 caf\u00e9 cafe\u0301 \u00c5ngstr\u00f6m \u00bd \u2026 \u4f60\u597d\uff0c\u4e16\u754c",
    "one space,  two spaces,   three,\tone tab\n\n  and lines\n",
    "ends with one ",
    " begins with one",
    "  or with two",
    "no\u00a0break, wide\u3000space, zero\u200bwidth, soft\u00adhyphen, \ufeffmark, \x00 and \x07",
    "\u201cIt\u2019s\u201d \u2018so\u2019 \u2013 and\u2014so\u2026 ``x''",
    "line\r\nline\n\n\n\nline\n",
    "camelCase snake_case HTTPServer0 9876543210 http://x.org/a?b=c&d=[1]{2} a+b-c*d/e=f<g>h",
    *PROBE.split("\n \n"),
)


def cut_otherwise(source: Source, keys: Mapping[str, Any]) -> list[str]:
    """What the keys' tokenizer makes other ids of than the source's: a line for plain text, one for added tokens.

    Words without a normal form of their own, capitals, digits, runs of spaces, spaces and marks that are not seen, and
    punctuation are asked for, and every added token, with words and spaces on both sides. A GGUF source's own keys go
    into the file as they are.
    """
    if source.metadata:
        return []
    theirs: Any = source.tokenizer()
    try:
        ours: Any = make_tokenizer(keys.get, row_of(source), source.config.get_text_config().vocab_size)
    except SourceError:
        return []  # a pre-tokenizer that is llama.cpp's alone
    except Exception as error:  # tokenizers raises plain Exceptions for a vocabulary it cannot use
        raise SourceError(f"{source.path}: nothing could read its vocabulary: {first_line(error)}") from error
    known = theirs.added_tokens_decoder.items()
    added = [token.content for number, token in known if number < source.config.get_text_config().vocab_size]
    around = [text for token in added for text in (f"word{token}word", f"word {token} word")]
    found = []
    for texts, what in ((_TEXTS, "text"), (around, "text around added tokens")):
        if wrong := cut_differently(ours, theirs, texts):
            first, others = wrong[0], f" and {len(wrong) - 1} more of {len(texts)}" if len(wrong) > 1 else ""
            found.append(
                f"a reader of this GGUF file cuts {what} otherwise than the model's tokenizer: {first[:60]!r}{others}"
            )
    return found


def cut_differently(one: Any, other: Any, texts: Iterable[str]) -> list[str]:
    """The texts of which two tokenizers make different ids, special tokens that they add themselves left out."""

    def ids(tokenizer: Any, text: str) -> Any:
        return tokenizer(text, add_special_tokens=False).input_ids

    return [text for text in texts if ids(one, text) != ids(other, text)]
