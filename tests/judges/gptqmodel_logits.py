"""Load a GPTQ folder with GPTQModel and write its logits. Runs in the judges' environment, not in quantkit's.

Writes `logits` float32 [prompts, tokens, vocab] and `generated` int64 [new tokens] (greedy, after the first prompt) to
a safetensors file, and prints one line `RESULT {...}`: which kernel class holds the quantized Linears, how many there
are, which Linears are left plain, and the seconds of loading, of the logits and of generating.
"""

import argparse
import functools
import json
import os
import sys
import time
from pathlib import Path

# Set before the imports that read them.
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # its own choice on two cores is one worker, with which it raises
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # without compiling dequantization for each shape: same bits

import torch
from gptqmodel import BACKEND, GPTQModel
from gptqmodel.nn_modules.qlinear import BaseQuantLinear
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, GPTQConfig


def load(folder: str, loader: str, backend: str) -> torch.nn.Module:
    if loader == "gptqmodel":  # takes half precision only
        return GPTQModel.load(folder, device="cpu", backend=BACKEND(backend), dtype=torch.float16).model
    kwargs = {}
    if backend != "auto":  # of this configuration only the backend is taken, the rest is the folder's own
        bits = json.loads(Path(folder, "config.json").read_text())["quantization_config"]["bits"]
        kwargs["quantization_config"] = GPTQConfig(bits=bits, backend=backend)
    return AutoModelForCausalLM.from_pretrained(folder, device_map="cpu", dtype=torch.float32, **kwargs)


def dequantize_once(model: torch.nn.Module) -> None:
    """Keep each weight that GPTQModel dequantizes; in float32 it would do it again at every forward."""
    for module in model.modules():
        if isinstance(module, BaseQuantLinear) and hasattr(module, "dequantize_weight"):
            module.dequantize_weight = functools.cache(module.dequantize_weight)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--prompt-ids", type=Path, required=True, help="JSON: lists of token ids, all of one length")
    parser.add_argument("--out", type=Path, required=True, help="safetensors file to write")
    parser.add_argument("--generate", type=int, default=0, metavar="N", help="greedy tokens after the first prompt")
    parser.add_argument("--loader", choices=["transformers", "gptqmodel"], default="transformers")
    parser.add_argument("--backend", default="auto", help="GPTQModel's kernel: auto, gptq_torch, gptq_torch_aten, ...")
    parser.add_argument(
        "--exact",
        action="store_true",
        help="scale * (code - zero) in float32; GPTQModel itself rounds the product to the scales' float16",
    )
    args = parser.parse_args()
    if args.loader == "gptqmodel" and not args.exact:
        parser.error("--loader gptqmodel loads in half precision, where a CPU's logits say little: add --exact")

    ids = torch.tensor(json.loads(args.prompt_ids.read_text()), dtype=torch.int64)
    start = time.perf_counter()
    model = load(args.folder, args.loader, args.backend).eval()
    if args.exact:
        torch.nn.Module.float(model)  # the scales too; transformers' own float() refuses quantized models
    dequantize_once(model)
    loaded = time.perf_counter()
    with torch.inference_mode():
        logits = model(ids).logits.float()
        ran = time.perf_counter()
        generated = torch.empty(0, dtype=torch.int64)
        if args.generate:
            first = ids[:1]
            new = model.generate(
                first, attention_mask=torch.ones_like(first), max_new_tokens=args.generate, do_sample=False
            )
            generated = new[0, first.shape[1] :]
    done = time.perf_counter()

    save_file({"logits": logits.contiguous(), "generated": generated.contiguous()}, args.out)
    quantized = [type(module).__name__ for module in model.modules() if isinstance(module, BaseQuantLinear)]
    result = {
        "kernel": ",".join(sorted(set(quantized))),
        "quantized_linears": len(quantized),
        "plain_linears": [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)],
        "load_seconds": loaded - start,
        "logits_seconds": ran - loaded,
        "generate_seconds": done - ran,
    }
    print("RESULT " + json.dumps(result), flush=True)
    sys.stderr.flush()
    os._exit(0)  # GPTQModel's worker threads outlive main


if __name__ == "__main__":
    main()
