"""Quantize a Hugging Face folder with GPTQModel, on given calibration tokens. Runs in the judges' environment.

Prints one JSON object: seconds of quantizing and of saving (loading the model is not counted), peak memory in bytes.
"""

import argparse
import json
import os
import resource
import sys
import time

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", str(os.cpu_count()))

import numpy as np
import torch
from gptqmodel import GPTQModel, QuantizeConfig
from gptqmodel.utils.backend import BACKEND


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="Hugging Face folder")
    parser.add_argument("tokens", help=".npy file, int64 [samples, seq_len]")
    parser.add_argument("out", help="folder to write")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument(
        "--dtype", default="float32", help="arithmetic; GPTQModel's own choice, bfloat16, crawls on a CPU without AMX"
    )
    parser.add_argument("--options", type=json.loads, default={}, help="more of QuantizeConfig, as JSON")
    args = parser.parse_args()

    tokens = np.load(args.tokens)
    samples = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in tokens]
    config = QuantizeConfig(bits=args.bits, group_size=args.group_size, **args.options)
    model = GPTQModel.load(args.model, config, device="cpu", backend=BACKEND.AUTO, dtype=getattr(torch, args.dtype))
    start = time.perf_counter()
    model.quantize(samples, batch_size=args.batch_size)
    quantized = time.perf_counter()
    model.save(args.out)
    saved = time.perf_counter()
    result = {
        "quantize_seconds": quantized - start,
        "save_seconds": saved - quantized,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    print("RESULT " + json.dumps(result), file=sys.stdout, flush=True)
    os._exit(0)  # GPTQModel's worker threads outlive main


if __name__ == "__main__":
    main()
