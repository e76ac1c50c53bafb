"""llm-compressor as a writer of compressed-tensors folders, and their reader. Runs in its own environment."""

from serve import logits_of, serve  # isort: skip

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


def logits(folder: str, ids: list[list[int]], out: str, generate: int = 0) -> dict:
    """Through transformers, whose reader of such folders is compressed-tensors itself, in float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map="cpu")
    return logits_of(model.eval(), (), ids, out, generate)


if __name__ == "__main__":
    serve({"logits": logits, "quantize": quantize})
