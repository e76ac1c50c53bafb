"""Every family of transformers that writes text, made tiny: block by block, quantized, read back. A sample is always
run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import token_matrix
from support import zoo_record
from support.zoo import KINDS, WHOLES
from support.zoo_record import Cells, measure, with_table, works
from transformers import PreTrainedTokenizerFast

ALL, WRITE = "QUANTKIT_ALL_FAMILIES", "QUANTKIT_WRITE_FAMILIES"
SAMPLE = (
    "aria_text",  # experts fused under names of their own
    "bert",  # a bias that is tied
    "dbrx",  # rows of all experts in one matrix, the last one turned
    "gemma4",  # a row of the embedding is looked at for what is no text
    "git",  # a tower inside the text model, with blocks and positions of its own
    "granitemoe",  # experts fused in the checkpoint, which are put together again
    "hrm_text",  # a reason: blocks that are run more than once
    "hy_v4",  # several streams of hidden states
    "jetmoe",  # experts of attention too, which get their tokens grouped
    "llama4",  # the text part of a whole, its experts fused
    "olmo_hybrid",  # three convolutions that are one
    "xlm",  # a reason: blocks that are spread over lists
    "xlnet",  # a reason: hidden states whose first dimension is the tokens'
    "zamba",  # blocks that share Linears
    "aria",  # pictures and text, the text's experts fused
    "llava",  # of no causal class
    "qwen2_5_vl",  # positions of three kinds
    "zaya",  # a block gets what the one before returns beside its states
)


@pytest.fixture(scope="module")
def measured() -> Iterator[dict[str, Cells]]:
    """What the tests measured; becomes the record where that is asked for."""
    found: dict[str, Cells] = {}
    yield found
    if os.environ.get(WRITE):
        zoo_record.write({**(zoo_record.read() if zoo_record.RECORD.exists() else {}), **found})


@pytest.mark.parametrize("kind", (*KINDS, *WHOLES) if os.environ.get(ALL) else SAMPLE)
def test_a_family_is_as_the_record_says(
    kind: str, measured: dict[str, Cells], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """A number where the record has one; a reason where it has that."""
    found = measured[kind] = measure(kind, tmp_path, tokenizer, token_matrix(3, 20))
    if not os.environ.get(WRITE):
        exact = {"made", "gptq"}
        known = zoo_record.read()[kind]
        assert {step: cell if step in exact else type(cell) for step, cell in found.items()} == {
            step: cell if step in exact else type(cell) for step, cell in known.items()
        }, found


def test_every_family_is_in_the_record_and_the_most_used_work() -> None:
    record = zoo_record.read()
    assert set(record) == {*KINDS, *WHOLES}
    assert [kind for kind in zoo_record.MOST_USED if not works(record[kind])] == []
    assert sum(works(cells) for cells in record.values()) >= 150


def test_the_documentation_has_the_records_table() -> None:
    text = zoo_record.DOCUMENT.read_text(encoding="utf-8")
    assert with_table(text, zoo_record.read()) == text, "run `make families`"
    assert f"| {KINDS[0]} |" in text
