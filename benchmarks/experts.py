"""What all tokens for every expert are worth: a Mixtral of width 128 is trained on a text, quantized with few windows
of it by both settings of --experts, and judged on the last twentieth of the text. Some minutes on a core.

    python benchmarks/experts.py TEXT --work build/benchmarks/experts --out RESULT.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import common
import torch
import train_llama
from transformers import MixtralConfig, MixtralForCausalLM

import quantkit
from quantkit.tokens import TokenMatrix

_HELD_OUT = 20  # a twentieth


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=1, help="windows of 512 tokens a step")
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--balance", type=float, default=0.0, help="weight of the router's loss that spreads tokens")
    parser.add_argument("--windows", type=int, nargs="+", default=[1, 4, 16], help="of calibration")
    parser.add_argument("--bits", type=int, nargs="+", default=[3, 4])
    parser.add_argument("--efforts", nargs="+", default=["fast", "standard"])
    parser.add_argument("--eval-tokens", type=int, default=6144)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    quantkit.tune()
    if not (args.work / "model").exists():
        _train(args)
    tokens = torch.load(args.work / "train.pt")
    measured = []
    for windows in args.windows:
        for bits in args.bits:
            for effort in args.efforts:
                for experts in ("routed", "all"):
                    found = _judged(args, tokens[:windows], bits, effort, experts)
                    measured.append({"windows": windows, "bits": bits, "effort": effort, "experts": experts, **found})
                    print(measured[-1], flush=True)
    facts = {name: getattr(args, name) for name in ("steps", "batch", "rate", "balance", "eval_tokens")}
    result = {"benchmark": "experts", **common.machine(), "text": args.text.name, **facts, "measured": measured}
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")


def _train(args: argparse.Namespace) -> None:
    """The model, the tokens that it was trained on and the text that it was not, in `args.work`."""
    torch.manual_seed(0)
    lines = args.text.read_text(encoding="utf-8").splitlines(keepends=True)
    first = len(lines) - len(lines) // _HELD_OUT
    tokenizer = train_llama.train_tokenizer("".join(lines[:first]))
    tokens = train_llama.windows(tokenizer, "".join(lines[:first]))
    model = MixtralForCausalLM(_config(args.balance))
    train_llama.fit(model, tokens, args)
    model.config.output_router_logits = False
    args.work.mkdir(parents=True, exist_ok=True)
    torch.save(tokens, args.work / "train.pt")
    (args.work / "held-out.txt").write_text("".join(lines[first:]), encoding="utf-8")
    tokenizer.save_pretrained(args.work / "model")
    model.save_pretrained(args.work / "model")


def _config(balance: float) -> MixtralConfig:
    return MixtralConfig(
        vocab_size=train_llama.VOCABULARY,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_local_experts=8,
        num_experts_per_tok=2,
        output_router_logits=balance > 0,
        router_aux_loss_coef=balance,
        max_position_embeddings=train_llama.WINDOW,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )


def _judged(args: argparse.Namespace, tokens: torch.Tensor, bits: int, effort: str, experts: str) -> dict[str, Any]:
    """Divergence on the held-out text, its standard error, and how few tokens an expert saw."""
    report = quantkit.gptq(
        args.work / "model",
        args.work / "out",
        calibration=TokenMatrix.of(tokens, args.text.name),
        bits=bits,
        group_size=32,
        effort=effort,
        experts=experts,
        text=str(args.work / "held-out.txt"),
        eval_tokens=args.eval_tokens,
        seq_len=train_llama.WINDOW,
        device="cpu",
        dtype="float32",
        force=True,
    )
    record = json.loads((args.work / "out" / "quantkit.json").read_text())
    divergence = record["evaluation"]["results"][1]["kl_divergence"]
    return {"kl_divergence": divergence, "least_tokens": min(layer.tokens for layer in report.layers)}


if __name__ == "__main__":
    main()
