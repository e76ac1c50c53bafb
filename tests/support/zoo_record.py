"""What becomes of each family of transformers: measured, kept in families.json, shown in docs/models.md."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

import quantkit
from quantkit.containers.gguf import WRITABLE
from quantkit.errors import QuantkitError, first_line
from quantkit.tokens import TokenMatrix
from support.streamed import open_stream, streamed_logits
from support.zoo import KINDS, WHOLES, tiny

RECORD = Path(__file__).with_name("families.json")
GGUF_RECORD = Path(__file__).with_name("gguf.json")
"""By model type, how far llama.cpp's log-probabilities of a tiny float32 file are from transformers' at most."""
DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "models.md"
LARGEST = 1e-3  # difference of logits, of their standard deviation
STEPS = ("made", "blocks", "gptq", "loaded")
# By use: what the table must have numbers for in every cell.
_BY_USE = """
llama llama4 llama4_text gemma gemma2 gemma3 gemma3_text gemma3n_text gemma4 gemma4_text gpt_oss glm glm4 glm4_moe
glm4_moe_lite glm_moe_dsa deepseek_v2 deepseek_v3 deepseek_v32 qwen2 qwen2_moe qwen3 qwen3_moe qwen3_5 qwen3_5_text
qwen3_5_moe qwen3_next phi phi3 phimoe mistral mixtral ministral ministral3 granite granitemoe granitemoehybrid cohere
cohere2 olmo olmo2 olmo3 olmoe exaone4 falcon falcon_h1 jamba mamba2 nemotron nemotron_h hunyuan_v1_dense
hunyuan_v1_moe ernie4_5 ernie4_5_moe lfm2 smollm3 starcoder2 gpt2 gptj gpt_neo gpt_neox codegen bloom mpt stablelm
"""
MOST_USED = tuple(_BY_USE.split())
Cells = dict[str, Any]


def measure(kind: str, folder: Path, tokenizer: Any, tokens: TokenMatrix) -> Cells:
    """A number for each step that works; a line for the first one that does not, and nothing after it.

    `made`: parameters of the tiny model. `blocks`: its logits block by block against transformers' own forward. `gptq`:
    quantized Linears. `loaded`: logits of the codes, block by block, against those of the same weights written
    as floats and loaded by transformers.

    Args:
        kind: transformers' model type.
        folder: an empty one, for the model and what is made of it.
        tokenizer: of the model.
        tokens: calibration windows; logits of the first are compared.
    """
    cells: Cells = {}
    ids = tokens.tokens[:1]
    expected: list[torch.Tensor] = []

    def make() -> int:
        model = tiny(kind)
        expected.append(_logits(model, ids))
        model.save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
        return sum(own.numel() for own in model.parameters())

    def stream() -> float:
        return _difference(streamed_logits(open_stream(folder / "model"), [ids])[0], expected[0])

    def quantize() -> int:
        report = quantkit.gptq(
            folder / "model", folder / "gptq", calibration=tokens, device="cpu", evaluate=False, group_size=32
        )
        return len(report.layers)

    def load() -> float:
        ours = streamed_logits(open_stream(folder / "gptq"), [ids])[0]
        quantkit.convert(folder / "gptq", folder / "whole", dtype="float32")
        try:
            return _difference(ours, _logits(loaded(folder / "whole"), ids))
        except ValueError:
            again = _logits(loaded(folder / "model"), ids)
            if not torch.allclose(again, expected[0], rtol=0, atol=LARGEST * float(expected[0].std())):
                raise ValueError("transformers itself loads another model than it has saved") from None
            raise

    steps: tuple[Callable[[], float], ...] = (make, stream, quantize, load)
    for name, work in zip(STEPS, steps, strict=True):
        try:
            cells[name] = work()
        except QuantkitError as error:
            cells[name] = first_line(error).replace(f"{folder}/", "")
        except Exception as error:  # whatever a model class raises: its kind shows that the line is not ours
            cells[name] = (
                first_line(error) if type(error) is ValueError else f"{type(error).__name__}: {first_line(error)}"
            )
        if isinstance(cells[name], str):
            break
    return cells


def loaded(folder: Path, dtype: torch.dtype | None = None) -> Any:
    """The model of a folder, by the class that its config names. Raises ValueError where transformers has no such, or
    finds tensors missing or of another shape."""
    (name,) = json.loads((folder / "config.json").read_text(encoding="utf-8"))["architectures"]
    model, told = getattr(transformers, name).from_pretrained(folder, dtype=dtype or "auto", output_loading_info=True)
    if missing := [*told["missing_keys"], *told["mismatched_keys"]]:
        raise ValueError(f"transformers misses {sorted(missing)[0]}")
    return model


def _logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Logits float32 [windows, tokens, vocabulary] of a model of transformers."""
    with torch.inference_mode():
        logits: torch.Tensor = model.eval()(ids).logits.float()
    return logits


def _difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference of logits, as a part of their standard deviation, to one digit. Raises ValueError where it
    is too large."""
    worst = float((found - expected).abs().max() / expected.std())
    if not worst < LARGEST:
        raise ValueError(f"logits differ by {worst:.0e} of their standard deviation")
    return float(f"{worst:.0e}")


# -- the record, and its table -----------------------------------------------------------------------------------------


def works(cells: Cells) -> bool:
    """Whether all steps gave numbers."""
    return all(isinstance(cells.get(step), int | float) for step in STEPS)


def read() -> dict[str, Cells]:
    """The record: of each family its cells."""
    found: dict[str, Cells] = json.loads(RECORD.read_text(encoding="utf-8"))
    return found


def write(record: Mapping[str, Cells]) -> None:
    """Replace the record, and the table in the documentation."""
    ordered = {kind: record[kind] for kind in sorted(record)}
    RECORD.write_text(json.dumps(ordered, indent=1) + "\n", encoding="utf-8")
    DOCUMENT.write_text(with_table(DOCUMENT.read_text(encoding="utf-8"), ordered), encoding="utf-8")


def write_gguf(found: Mapping[str, float]) -> None:
    """Replace what llama.cpp's judge measured, and the table in the documentation."""
    GGUF_RECORD.write_text(json.dumps(dict(sorted(found.items())), indent=1) + "\n", encoding="utf-8")
    write(read())


def _gguf_cells(kind: str) -> list[str]:
    """The architecture that a GGUF file of the type, or of its text model, has, and what llama.cpp's judge found."""
    found: dict[str, float] = json.loads(GGUF_RECORD.read_text(encoding="utf-8"))
    own = next((one for one in (kind, f"{kind}_text") if one in WRITABLE), None)
    return ["", ""] if own is None else [WRITABLE[own].name, f"{found[own]:g}" if own in found else ""]


_BEGIN, _END = "<!-- families: written by `make families` -->\n", "<!-- families end -->\n"


def with_table(text: str, record: Mapping[str, Cells]) -> str:
    """The document with the record's table between its marks."""
    return re.sub(f"{_BEGIN}.*{_END}", lambda _: _BEGIN + _table(record) + _END, text, flags=re.DOTALL)


def _table(record: Mapping[str, Cells]) -> str:
    causal = _table_of(KINDS, "causal model types", record)
    return causal + _table_of(WHOLES, "model types of text with pictures or sounds that have no causal class", record)


def _table_of(kinds: Sequence[str], of: str, record: Mapping[str, Cells]) -> str:
    own = {kind: record[kind] for kind in kinds if kind in record}
    run = [kind for kind, cells in own.items() if isinstance(cells.get("blocks"), int | float)]
    whole = [kind for kind, cells in own.items() if works(cells)]
    made = [kind for kind, cells in own.items() if isinstance(cells["made"], int)]
    lines = [
        f"\nOf {len(kinds)} {of}, {len(made)} are made tiny, {len(run)} run block by block, and of "
        f"{len(whole)} a\nquantized folder gives the same logits in quantkit and, written as floats, in "
        "transformers.\n",
        "\n| model type | blocks | GPTQ | loaded | GGUF | llama.cpp |\n|---|---|---|---|---|---|\n",
    ]
    for kind, cells in own.items():
        shown = [_shown(cells[step]) if step in cells else "" for step in STEPS[1:]]
        if isinstance(cells["made"], str):
            shown[0] = _shown(cells["made"])
        lines.append(f"| {kind} | {' | '.join([*shown, *_gguf_cells(kind)])} |\n")
    return "".join([*lines, "\n"])


def _shown(cell: float | str) -> str:
    return cell.replace("|", "\\|") if isinstance(cell, str) else f"{cell:g}"
