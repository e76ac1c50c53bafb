"""Tiny whole checkpoints of text and a vision tower, with the files that such folders have, and a picture for each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from support import zoo

# Ids of the vocabulary that stand for what is no text: before, in place of, and after a picture, and of a film.
_BEFORE, _PICTURE, _AFTER, _FILM = 5, 4, 6, 7
_TEXT = tuple(range(20, 32))
_IDS = {"vision_start_token_id": _BEFORE, "image_token_id": _PICTURE, "vision_end_token_id": _AFTER}
# What a family's config needs so that a picture of 28 x 28 (Gemma) or 56 x 56 (Qwen) is four tokens.
_MORE: dict[str, dict[str, Any]] = {
    "gemma3": {
        **{"boi_token_index": _BEFORE, "image_token_index": _PICTURE, "eoi_token_index": _AFTER},
        "mm_tokens_per_image": 4,
    },
    "qwen3_vl": _IDS | {"video_token_id": _FILM, "vision_config": {"deepstack_visual_indexes": [0, 1]}},
    "qwen2_5_vl": _IDS | {"video_token_id": _FILM, "vision_config": {"window_size": 56, "fullatt_block_indexes": [1]}},
}
KINDS = tuple(_MORE)
# Beside weights, config and tokenizer; what is in them is not looked at here.
FILES: dict[str, dict[str, Any]] = {
    "preprocessor_config.json": {
        "image_processor_type": "Gemma3ImageProcessor",
        "do_resize": True,
        "size": {"height": 28, "width": 28},
    },
    "processor_config.json": {"processor_class": "Gemma3Processor", "image_seq_length": 4},
    "video_preprocessor_config.json": {"video_processor_type": "Qwen3VLVideoProcessor", "fps": 2},
    "chat_template.json": {"chat_template": "{% for m in messages %}{{ m['content'] }}{% endfor %}"},
}


def write(
    folder: Path, kind: str, tokenizer: PreTrainedTokenizerFast, dtype: torch.dtype = torch.float16, tied: bool = False
) -> Path:
    """A checkpoint of this model type, as transformers writes it, with `FILES` beside it."""
    ties = {"tie_word_embeddings": tied, "text_config": {"tie_word_embeddings": tied}}
    model = zoo.tiny(kind, more=zoo.merged(_MORE[kind], ties))
    model.to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for name, content in FILES.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return folder


def picture(kind: str, seed: int = 0) -> dict[str, torch.Tensor]:
    """What a model of this type is called with for a text around a random picture."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.tensor([[*_TEXT[:6], _BEFORE, *4 * [_PICTURE], _AFTER, *_TEXT[6:]]])
    kinds = (ids == _PICTURE).long()
    if kind == "gemma3":
        return {
            "input_ids": ids,
            "pixel_values": torch.randn(1, 3, 28, 28, generator=generator),
            "token_type_ids": kinds,
        }
    patches = torch.randn(16, 3 * 2 * 14 * 14, generator=generator)
    grid = torch.tensor([[1, 4, 4]])
    return {"input_ids": ids, "pixel_values": patches, "image_grid_thw": grid, "mm_token_type_ids": kinds}
