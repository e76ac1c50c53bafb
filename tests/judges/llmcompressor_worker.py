"""llm-compressor as a writer of compressed-tensors folders. Runs in its own environment."""

from serve import serve  # isort: skip

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from transformers import AutoModelForCausalLM, AutoTokenizer


def quantize(model: str, out: str, samples: list[list[int]], dtype: str, **weights: object) -> dict:
    """GPTQ of all Linears but the head; `weights` are of QuantizationArgs."""
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(strategy="group", **weights))
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))
    oneshot(
        model=loaded,
        dataset=Dataset.from_dict({"input_ids": samples, "attention_mask": [[1] * len(row) for row in samples]}),
        recipe=GPTQModifier(config_groups={"group_0": scheme}, ignore=["lm_head"]),
        max_seq_length=len(samples[0]),
        num_calibration_samples=len(samples),
        shuffle_calibration_samples=False,
    )
    loaded.save_pretrained(out, save_compressed=True)
    AutoTokenizer.from_pretrained(model).save_pretrained(out)
    return {}


if __name__ == "__main__":
    serve({"quantize": quantize})
