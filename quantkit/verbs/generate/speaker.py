"""A loaded model with all that turns a conversation into an answer's text."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from quantkit.blocks.whole import generation_config
from quantkit.containers.source import Source
from quantkit.errors import CalibrationError
from quantkit.late import torch
from quantkit.options import Decoding, TemplateName
from quantkit.tokens.records import Record, resolve
from quantkit.tokens.text import check_tokens
from quantkit.verbs.generate.decoding import Answer, Request, decode
from quantkit.verbs.generate.prompts import PromptLine, prompt_ids, prompt_text, stop_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Speaker:
    """What a source's tokenizer, template and limits make of prompts; the model itself comes later.

    Attributes:
        template: what "auto" turned out to be.
        stops: ids that end an answer.
        context: the most tokens, prompt and answer together; None where the model names no limit.
    """

    source: Source
    tokenizer: PreTrainedTokenizerBase
    template: TemplateName
    stops: list[int]
    context: int | None
    spec: Decoding

    @classmethod
    def of(cls, source: Source, template: TemplateName, spec: Decoding) -> Speaker:
        """Raises `UsageError` where the template is `chat` and the tokenizer has none, `SourceError` without one."""
        tokenizer = source.tokenizer()
        chosen = resolve(template, tokenizer)
        configs = generation_config(source), source.config.get_text_config()
        declared = [getattr(config, "eos_token_id", None) for config in configs]
        stops = sorted({stop for ids in declared for stop in stop_ids(ids, chosen, tokenizer)})
        context = getattr(source.config.get_text_config(), "max_position_embeddings", None)
        return cls(source, tokenizer, chosen, stops, context, spec)

    def request(self, record: Record, key: str, where: str) -> Request:
        """The record's token ids and the room for an answer.

        Raises:
            CalibrationError: names a prompt that fills the model's context by itself, or that the template refuses.
            SourceError: the tokenizer gives ids that the model does not embed.
        """
        template = self._template(record)
        ids = prompt_ids(prompt_text(record, template, self.tokenizer), template, self.tokenizer)
        if not ids:
            raise CalibrationError(f"{where}: no token in its prompt")
        check_tokens(torch.tensor(ids), self.source)
        room = self.spec.max_new_tokens
        if self.context is not None:
            if len(ids) >= self.context:
                raise CalibrationError(
                    f"{where}: its prompt has {len(ids)} tokens, which leaves no room for an answer: "
                    f"{self.source.label} reads {self.context} in all; shorten it or leave it out"
                )
            room = min(room, self.context - len(ids))
        return Request(ids, room, key)

    def requests(self, prompts: Sequence[PromptLine]) -> list[Request]:
        """Those of all prompts; raises as `request` does."""
        return [self.request(prompt.record, prompt.key, prompt.where) for prompt in prompts]

    def answer(
        self, model: PreTrainedModel, requests: Sequence[Request], each: Callable[[list[int]], None] | None = None
    ) -> list[Answer]:
        """Answers of one batch; see `decode`."""
        return decode(model, requests, self.spec, self.stops, each)

    def batches(
        self, model: PreTrainedModel, requests: Sequence[Request], done: int, batch_size: int
    ) -> Iterator[list[Answer]]:
        """Answers to all but the first `done` requests, a batch at a time.

        The batches are those of an undisturbed run, whatever of one is there: a batch's shape decides on rounding.
        """
        for start in range(done - done % batch_size, len(requests), batch_size):
            yield self.answer(model, requests[start : start + batch_size])[max(done - start, 0) :]

    def whole_text(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens written out and white space as it is."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def text(self, ids: Sequence[int], record: Record) -> str:
        """The text of an answer to the record, from its own ids alone: nothing is looked for in it, nothing cut out.

        White space at its ends belongs to the templates, but where none was used.
        """
        text = self.whole_text(ids)
        return text if self._template(record) == "none" else re.sub(r"\A\s+|\s+\Z", "", text)

    def _template(self, record: Record) -> TemplateName:
        """Plain text is gone on with as it is."""
        return "none" if record.turns is None else self.template
