"""Recipes of small releases."""

from __future__ import annotations

from pathlib import Path

ANIMALS = ["fox", "dog"] * 40
TEXT = " ".join(f"The {animal} looks at the river and counts {n} stones." for n, animal in enumerate(ANIMALS))


HEAD = """
calibration: {samples: 4, seq_len: 64, template: vicuna}
evaluation: {texts: [text.txt], seq_len: 64}
"""


def write_recipe(folder: Path, text: str) -> Path:
    (folder / "text.txt").write_text(TEXT)
    (folder / "recipe.yaml").write_text(text)
    return folder / "recipe.yaml"


SMALL = f"""
name: Tiny
source: {{model: model}}
{HEAD}
variants:
  - {{kind: gptq, bits: 4, group_size: 32}}
  - {{kind: gguf, type: q8_0, pre: gpt-2}}
  - {{kind: ggjt, type: q4_0, optional: true}}
"""
