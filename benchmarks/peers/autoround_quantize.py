"""Quantize a Hugging Face folder with auto-round into a GPTQ folder, on given calibration tokens. Runs in auto-round's
environment (environments.sh)."""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from auto_round import AutoRound
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="Hugging Face folder")
    parser.add_argument("tokens", help=".npy file, int64 [samples, seq_len]")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--options", type=json.loads, default={}, help="of AutoRound, as JSON")
    args = parser.parse_args()
    tokens = torch.from_numpy(np.load(args.tokens))
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    rounding = AutoRound(
        model,
        AutoTokenizer.from_pretrained(args.model),
        dataset=[row[None] for row in tokens],
        nsamples=tokens.shape[0],
        seqlen=tokens.shape[1],
        amp=False,  # bfloat16 crawls on a CPU without arithmetic for it
        enable_torch_compile=False,
        device_map="cpu",
        **args.options,
    )
    written = args.out.with_name(f"{args.out.name}.parent")  # it makes a folder in this one
    rounding.quantize_and_save(str(written), format="auto_gptq")
    [folder] = written.iterdir()
    folder.rename(args.out)
    written.rmdir()


if __name__ == "__main__":
    main()
