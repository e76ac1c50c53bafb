"""Which records also occur in the text that a model is evaluated on."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable

from quantkit.tokens.readers import Dataset
from quantkit.tokens.records import Record

# Runs of 13 words, as in the contamination check of the GPT-3 paper (arXiv 2005.14165, appendix C).
_RUN = 13
# So many runs are in a stretch of 50 words.
_ENOUGH = 50 - _RUN + 1

# Chinese, Japanese and Korean put no space between words: there each character is one.
_UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")


class TextIndex:
    """An evaluation text, ready to be asked whether a record occurs in it.

    Texts are compared as words without case and punctuation, by their distinct runs of 13 words. A record occurs in
    the text where the text holds half of the runs of one of its turns, of all its turns together or of its plain text;
    or 38 of these runs, which is a stretch of 50 words. A record of fewer than 13 words must equal a whole one.
    Building takes time and memory linear in the text, asking takes time linear in the record.
    """

    def __init__(self, name: str, texts: Iterable[str]) -> None:
        self.name = name
        self._runs: set[int] = set()
        self._short: set[tuple[str, ...]] = set()
        for text in texts:
            words = _words(text)
            self._runs |= _runs(words)
            if 0 < len(words) < _RUN:
                self._short.add(tuple(words))

    @classmethod
    def of(cls, dataset: Dataset) -> TextIndex:
        """The index over a data set's records, or its text where it is one text."""
        texts = map(_whole, dataset.records) if dataset.text is None else [dataset.text]
        return cls(dataset.name, texts)

    @classmethod
    def union(cls, indices: Iterable[TextIndex]) -> TextIndex:
        """One index over several texts."""
        whole, names = cls("", ()), []
        for index in indices:
            names.append(index.name)
            whole._runs |= index._runs
            whole._short |= index._short
        whole.name = ", ".join(names)
        return whole

    def holds(self, record: Record) -> bool:
        """Whether the record occurs in the text."""
        whole = _words(_whole(record))
        if len(whole) < _RUN:
            return tuple(whole) in self._short
        turns = (_words(turn.text) for turn in record.turns or ())
        asked = filter(None, (_runs(words) for words in (whole, *turns)))
        return any(len(runs & self._runs) >= min((len(runs) + 1) // 2, _ENOUGH) for runs in asked)


def _whole(record: Record) -> str:
    return record.text or "" if record.turns is None else "\n".join(turn.text for turn in record.turns)


def _words(text: str) -> list[str]:
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def _runs(words: list[str]) -> set[int]:
    # Not hash(): it differs from one process to the next, and so would a collision.
    runs = (" ".join(words[start : start + _RUN]) for start in range(len(words) - _RUN + 1))
    digests = (hashlib.blake2b(run.encode("utf-8", "surrogatepass"), digest_size=8) for run in runs)
    return {int.from_bytes(digest.digest(), "little") for digest in digests}
