"""auto-round as a writer of GPTQ and AWQ folders. Runs in its own environment."""

from serve import serve  # isort: skip

from pathlib import Path

import torch
from auto_round import AutoRound
from transformers import AutoModelForCausalLM, AutoTokenizer


def quantize(model: str, out: str, samples: list[list[int]], format: str, **options: object) -> dict:
    """Two steps of tuning, which is enough for scales that are not plain rounding's."""
    rounding = AutoRound(
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        AutoTokenizer.from_pretrained(model),
        dataset=[torch.tensor([row]) for row in samples],
        nsamples=len(samples),
        seqlen=len(samples[0]),
        iters=2,
        amp=False,
        enable_torch_compile=False,
        device_map="cpu",
        **options,
    )
    rounding.quantize_and_save(f"{out}.parent", format=format)  # it makes a folder in this one
    (folder,) = Path(f"{out}.parent").iterdir()
    folder.rename(out)
    return {}


if __name__ == "__main__":
    serve({"quantize": quantize})
