"""Quantize a Hugging Face folder with llm-compressor's GPTQ into a compressed-tensors folder, on given calibration
tokens. Runs in llm-compressor's environment (environments.sh)."""

import argparse
import json

import numpy as np
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="Hugging Face folder")
    parser.add_argument("tokens", help=".npy file, int64 [samples, seq_len]")
    parser.add_argument("out", help="folder to write")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--options", type=json.loads, default={}, help="of GPTQModifier, as JSON")
    args = parser.parse_args()
    tokens = np.load(args.tokens)
    weights = QuantizationArgs(num_bits=args.bits, group_size=args.group_size, strategy="group", symmetric=True)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    oneshot(
        model=model,
        dataset=Dataset.from_dict({"input_ids": tokens.tolist(), "attention_mask": np.ones_like(tokens).tolist()}),
        recipe=GPTQModifier(config_groups={"group_0": scheme}, ignore=["lm_head"], **args.options),
        max_seq_length=tokens.shape[1],
        num_calibration_samples=tokens.shape[0],
        shuffle_calibration_samples=False,
    )
    model.save_pretrained(args.out, save_compressed=True)
    AutoTokenizer.from_pretrained(args.model).save_pretrained(args.out)


if __name__ == "__main__":
    main()
