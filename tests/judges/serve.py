"""What the workers share: jobs as lines of JSON on standard input, one line of JSON back for each.

A judge is slow to import, so one process answers all jobs of a test session. Import this first: it keeps standard
output for the answers and sends whatever else a judge prints to standard error.
"""

import contextlib
import functools
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

_answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
os.dup2(2, 1)
sys.stdout.reconfigure(line_buffering=True)  # a judge that dies has said its last words

# Set before the imports that read them.
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # without compiling dequantization for each shape: same bits


def serve(handlers: dict[str, Callable[..., dict[str, Any]]]) -> None:
    """Answer jobs ``{"do": handler, ...arguments}`` with ``{"result": ...}`` or ``{"error": traceback}``."""
    for line in sys.stdin:
        job = json.loads(line)
        try:
            arguments = {name: value for name, value in job.items() if name != "do"}
            answer = {"result": handlers[job["do"]](**arguments)}
        except Exception:
            answer = {"error": traceback.format_exc()}
        print(json.dumps(answer), file=_answers, flush=True)
    sys.stderr.flush()
    os._exit(0)  # the judges' worker threads outlive main


def logits_of(
    model: Any,
    quantized: type | tuple[type, ...],
    ids: list[list[int]],
    out: str,
    generate: int,
    beside: str | None = None,
) -> dict:
    """Write `logits` float32 [prompts, tokens, vocab] and `generated` int64 [new tokens] (greedy, after the first
    prompt) to `out`. Returns which Linears are quantized, by which class, and which are plain. `beside`: a file of
    tensors that the logits' forward takes too, as those of a picture.
    """
    import torch
    from safetensors.torch import load_file, save_file

    tokens = torch.tensor(ids, dtype=torch.int64)
    start = time.perf_counter()
    generated = torch.empty(0, dtype=torch.int64)
    with torch.inference_mode():
        logits = model(input_ids=tokens, **(load_file(beside) if beside else {})).logits.float()
        if generate:
            first = tokens[:1]
            new = model.generate(
                input_ids=first, attention_mask=torch.ones_like(first), max_new_tokens=generate, do_sample=False
            )
            generated = new[0, first.shape[1] :]
    save_file({"logits": logits.contiguous(), "generated": generated.contiguous()}, out)
    held = {name: type(module) for name, module in model.named_modules() if isinstance(module, quantized)}
    return {
        "kernel": ",".join(sorted({kind.__name__ for kind in held.values()})),
        "quantized_linears": len(held),
        "plain_linears": [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n not in held],
        "seconds": time.perf_counter() - start,
    }


def cached(module: Any, method: str) -> None:
    """Keep what a module's method returns the first time: weights do not change while we ask."""
    setattr(module, method, functools.cache(getattr(module, method)))


@contextlib.contextmanager
def replaced(target: Any, **attributes: Any) -> Any:
    """Attributes of a module or class, replaced for a while."""
    before = {name: getattr(target, name) for name in attributes}
    for name, value in attributes.items():
        setattr(target, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(target, name, value)
