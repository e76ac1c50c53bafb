"""How byte-level tokenizers cut text into words, by the name that a GGUF file has for it (`tokenizer.ggml.pre`).

Names and patterns are facts of llama.cpp (``llm_tokenizer_bpe``, b11434); where it notes the pattern that the model was
published with, which its own comes near to, that one is taken.
"""

from __future__ import annotations

from dataclasses import dataclass

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DIGIT = r"\p{N}"


@dataclass(frozen=True)
class Cut:
    """How text is cut into words before the merges.

    Attributes:
        patterns: each cuts what it matches out of the pieces that those before it left.
        nfc: text is composed first.
        whole_words: a word that the vocabulary has is one token, whatever the merges would make of it.
        bos: BOS comes first where the file does not say.
    """

    patterns: tuple[str, ...]
    nfc: bool = False
    whole_words: bool = False
    bos: bool = False


_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_LETTERS = rf"{_SHORT}|{_WORD}"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_MARKS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_REST = rf"{_MARKS}|{_SPACES}"
_REST_SLASH = rf" ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
_THREE = r"\p{N}{1,3}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*")
_CASED_SHORT = rf"{_CASED[0]}{_SHORT}?|{_CASED[1]}{_SHORT}?"
_CHINESE = r"[\x{4e00}-\x{9fa5}\x{0800}-\x{4e00}\x{ac00}-\x{d7ff}]+"
_CHINESE_KANA = r"[\x{4e00}-\x{9fa5}\x{3040}-\x{309f}\x{30a0}-\x{30ff}]+"
_PUNCTUATED = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
_DEEPSEEK_WORDS = rf"{_PUNCTUATED}| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}"
_WITHOUT_STOPS = r" ?[^(\s|.,!?\x{2026}\x{3002}\x{ff0c}\x{3001}\x{0964}\x{06d4}\x{060c})]+"

# Letters of cased scripts, as DeepSeek's first tokenizers list them.
_CASED_RANGES = (
    "41-5a 61-7a b5 c0-d6 d8-f6 f8-1ba 1bc-1bf 1c4-293 295-2af 370-373 376 377 37b-37d 37f 386 388-38a 38c 38e-3a1 "
    "3a3-3f5 3f7-481 48a-52f 531-556 10a0-10c5 13a0-13f5 13f8-13fd 1c90-1cba 1cbd-1cbf 1d00-1d2b 1d6b-1d77 "
    "1d79-1d9a 1e00-1f15 1f18-1f1d 1f20-1f45 1f48-1f4d 1f50-1f57 1f59 1f5b 1f5d 1f5f-1f7d 1f80-1fb4 1fb6-1fbc 1fbe "
    "1fc2-1fc4 1fc6-1fcc 1fd0-1fd3 1fd6-1fdb 1fe0-1fec 1ff2-1ff4 1ff6-1ffc 2102 2107 210a-2113 2115 2119-211d 2124 "
    "2126 2128 212a-212d 212f-2134 2139 213c-213f 2145-2149 214e 2183 2184 2c00-2c7b 2c7e-2ce4 2ceb-2cee 2cf2 2cf3 "
    "a640-a66d a680-a69b a722-a76f a771-a787 a78b-a78e ab70-abbf fb00-fb06 fb13-fb17 ff21-ff3a ff41-ff5a "
    "10400-1044f 104b0-104d3 104d8-104fb 10c80-10cb2 10cc0-10cf2 118a0-118df 1e900-1e943"
)
_CASED_SCRIPTS = "".join(
    rf"\x{{{part}}}" if "-" not in part else r"\x{{{}}}-\x{{{}}}".format(*part.split("-"))
    for part in _CASED_RANGES.split()
)
_ASIAN = (
    r"[\x{4e00}-\x{9fff}\x{3400}-\x{4dbf}\x{8c48}-\x{faff}\x{3040}-\x{309f}\x{30a0}-\x{30ff}\x{ff65}-\x{ff9f}"
    r"\x{2f00}-\x{2fdf}\x{e40}-\x{e7f}\x{e80}-\x{eff}\x{1780}-\x{17ff}\x{1000}-\x{109f}\x{aa60}-\x{aa7f}"
    r"\x{a9e0}-\x{a9ff}\x{ac00}-\x{d7af}\x{1100}-\x{11ff}]+"
)
_YOUTU_SCRIPTS = (
    r"[\x{ac00}-\x{d7a3}\x{3131}-\x{318e}]+|[\x{ff01}\x{2026}\x{201c}\x{201d}\x{2018}\x{2019}\x{2014}\x{ff1a}\x{ff1b}"
    rf"\x{{ff0c}}\x{{3001}}-\x{{303f}}\x{{fe30}}-\x{{fe4f}}]+|[\x{{3105}}-\x{{312f}}]+|{_CHINESE_KANA}"
)
_JAIS_SPACES = "|".join(rf"\s{{{count}}}(?!\S)" for count in ("512", "256", "128", "64", "32", "16", "8", "4", "1,2"))
_NO_HAN = r"&&[^\p{Han}]]"
_KIMI_CASED = _CASED_SHORT.replace(_UPPER, _UPPER[:-1] + _NO_HAN).replace(_LOWER, _LOWER[:-1] + _NO_HAN)

_LLAMA3 = Cut((rf"{_LETTERS}|{_THREE}|{_REST}",), whole_words=True, bos=True)
_QWEN2 = Cut((rf"{_LETTERS}|{DIGIT}|{_REST}",), nfc=True)
_O200K = Cut((rf"{_CASED_SHORT}|{_THREE}|{_REST_SLASH}",))
_DEEPSEEK3 = Cut((_THREE, _CHINESE_KANA, _DEEPSEEK_WORDS))
_BAILING = Cut((rf"'(?i:[sdmt]|ll|ve|re)|{_WORD}|{DIGIT}|{_MARKS}|\s*[\r\n]|\s+(?!\S)|\s+",))

_GPT2_NAMES = (
    *("gpt-2", "a.x-4.0", "exaone4", "gigachat", "granite-docling", "jais", "jina-de", "jina-es", "jina-v1-en"),
    *("jina-v2-code", "jina-v2-de", "jina-v2-es", "mellum", "modern-bert", "phi-2", "roberta-bpe", "trillion"),
)
_GPT2_DIGITS_NAMES = ("smollm", "starcoder", "refact", "codeshell", "command-r", "exaone", "mellum2", "minerva-7b")
_LLAMA3_NAMES = (
    *("llama-bpe", "llama3", "llama-v3", "falcon-h1", "falcon3", "jina-v5-nano", "lfm2", "midm-2.0", "pixtral"),
)
_QWEN2_AS_IS_NAMES = ("f2llmv2", "grok-2", "hunyuan", "kormo", "megrez", "solar-open", "stablelm2")
_O200K_NAMES = ("gpt-4o", "kanana2", "llama4", "minimax-m2", "talkie")

CUTS: dict[str, Cut] = {
    **dict.fromkeys(_GPT2_NAMES, Cut((GPT2,))),
    **dict.fromkeys(("mpt", "olmo"), Cut((GPT2,), nfc=True)),
    **dict.fromkeys(_GPT2_DIGITS_NAMES, Cut((DIGIT, GPT2))),
    **dict.fromkeys(_LLAMA3_NAMES, _LLAMA3),
    **dict.fromkeys(("dbrx", "smaug-bpe", "chatglm-bpe"), Cut(_LLAMA3.patterns)),
    **dict.fromkeys(("glm4", "glm5"), Cut(_LLAMA3.patterns, whole_words=True)),
    "jais-2": Cut((rf"{_LETTERS}|{_THREE}|{_MARKS}|\s*[\r\n]+|{_JAIS_SPACES}|\s",)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), _QWEN2),
    **dict.fromkeys(_QWEN2_AS_IS_NAMES, Cut(_QWEN2.patterns)),
    "qwen35": Cut(
        (rf"{_SHORT}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}",)
    ),
    "ufakzeka": Cut((rf"{_WORD}|{DIGIT}|{_REST}",)),
    "seed-coder": Cut((rf"{_LETTERS}|{DIGIT}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_SPACES}",)),
    "laguna": Cut((r"[^\n]+|[\n]+", *_QWEN2.patterns)),
    "minicpm5": Cut((_THREE, rf"{_LETTERS}|\p{{N}}+|{_REST}"), whole_words=True),
    **dict.fromkeys(("bailingmoe", "bailingmoe2", "llada-moe"), _BAILING),
    "exaone-moe": Cut(
        (
            rf"{_SHORT}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}"
            r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+",
        )
    ),
    "tekken": Cut((rf"{_CASED[0]}|{_CASED[1]}|{DIGIT}|{_REST_SLASH}",), whole_words=True, bos=True),
    **dict.fromkeys(_O200K_NAMES, _O200K),
    "granite-embed-multi-97m": Cut(_O200K.patterns, whole_words=True),
    **dict.fromkeys(("tiny_aya", "cohere2moe"), Cut((r"\d{1,3}(?=(?:\d{3})*\b)", *_O200K.patterns))),
    "youtu": Cut((_YOUTU_SCRIPTS, rf"{_CASED_SHORT}|{DIGIT}|{_REST_SLASH}"), whole_words=True),
    "kimi-k2": Cut((rf"[\p{{Han}}]+|{_KIMI_CASED}|{_THREE}|{_REST}",)),
    "superbpe": Cut((r"\p{N}+", r"(?=(\d{3})+(?!\d))")),
    "falcon": Cut((r"[\p{P}$+<=>^~|`]+", GPT2, r"[0-9][0-9][0-9]")),
    **dict.fromkeys(("bloom", "gpt3-finnish", "poro-chat"), Cut((_WITHOUT_STOPS,))),
    "viking": Cut((_WITHOUT_STOPS, DIGIT)),
    "chameleon": Cut(
        (
            *(r"<sentinel:[0-9]+>", r"(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z", r"([\t\n]|    |  )", DIGIT),
            *(r"[\p{P}!-/:-@\[-`{-~]", GPT2),
        ),
        bos=True,
    ),
    "deepseek-llm": Cut(
        (
            *(r"[\r\n]", rf"\s?[{_CASED_SCRIPTS}]+"),
            r"\s?[!-/:-~\x{ff01}-\x{ff0f}\x{ff1a}-\x{ff5e}\x{2018}-\x{201f}\x{3000}-\x{3002}]+",
            *(r"\s+$", _CHINESE, r"\p{N}+"),
        )
    ),
    "deepseek-coder": Cut((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CHINESE, DIGIT)),
    **dict.fromkeys(("deepseek-v3", "hunyuan-dense", "hy_v4", "joyai-llm"), _DEEPSEEK3),
    "spark2_5": Cut((*(_THREE, _CHINESE_KANA), rf"{_PUNCTUATED}| ?[\p{{P}}\p{{S}}]+|[\r\n]|\s+(?!\S)|\s+", DIGIT)),
    # Groups of three digits are counted from the right.
    "afmoe": Cut((r"\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))", _ASIAN, _DEEPSEEK_WORDS)),
}
# Names of vocabularies that llama.cpp keeps with the byte-level ones and whose tokens are plain text.
NOT_BYTES = frozenset({"gemma4", "granite-embed-multi-311m", "mmbert", "sarvam-moe", "whitespace"})
