"""Quantize a model and compare it with its source, through the library.

    python examples/quantize_and_evaluate.py MODEL OUT

MODEL is a Hugging Face folder, a GGUF file or a Hub id. A few short calibration windows keep the example quick; leave
`samples` and `seq_len` at their defaults for a checkpoint to publish.
"""

from __future__ import annotations

import sys

import quantkit


def main(model: str, out: str) -> None:
    report = quantkit.gptq(model, out, bits=4, group_size=32, samples=8, seq_len=128, evaluate=False)
    better = sum(layer.loss < layer.rtn_loss for layer in report.layers)
    print(f"{report.out.name}: {report.bits_per_weight:.2f} bits per weight")
    print(f"{better} of {len(report.layers)} layers have a smaller error than plain rounding leaves")

    comparison = quantkit.perplexity([report.out], against=model, seq_len=128)
    for row in comparison.results:
        divergence = "" if row.kl_divergence is None else f", KL divergence {row.kl_divergence.mean:.4f}"
        print(f"{row.model}: perplexity {row.perplexity:.3f} +- {row.stderr:.3f}{divergence}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    main(*sys.argv[1:])
