"""Quantize a model with quantkit, on given calibration tokens, in a process of its own like the peers'."""

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
import torch

import quantkit
from quantkit.tokens import TokenMatrix


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="Hugging Face folder")
    parser.add_argument("tokens", help=".npy file, int64 [samples, seq_len]")
    parser.add_argument("out", type=Path, help="folder to write, or a file where --ggml is among the options")
    parser.add_argument("--options", type=json.loads, default={}, help="of quantkit.gptq, as JSON")
    args = parser.parse_args()
    quantkit.tune()
    tokens = TokenMatrix.of(torch.from_numpy(np.load(args.tokens)), Path(args.tokens).name)
    folder = args.out.with_name(f"{args.out.name}.folder") if "ggml" in args.options else args.out
    options = {"dtype": "float32", "device": "cpu", "evaluate": False, "force": True, **args.options}
    quantkit.gptq(args.model, folder, calibration=tokens, **options)
    if "ggml" in args.options:
        [file] = folder.glob("*.gguf")
        file.rename(args.out)
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
