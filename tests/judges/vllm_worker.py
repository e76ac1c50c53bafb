"""vLLM as a judge: reads folders on a CPU, in float16, which its kernels of codes take. Runs in its own environment."""

import os

# Set before the imports that read them.
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault(
    "VLLM_ENABLE_V1_MULTIPROCESSING", "0"
)  # the model stays in this process, where it can be looked at
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

from serve import serve  # isort: skip

import torch
from safetensors.torch import save_file
from vllm import LLM, SamplingParams
from vllm.logprobs import FlatLogprobs
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod

_running: dict[str, LLM] = {}


def engine_of(folder: str) -> LLM:
    """Kept until another folder is asked for."""
    if folder not in _running:
        while _running:
            _running.popitem()[1].llm_engine.engine_core.shutdown()
        limits = {"max_model_len": 128, "max_num_seqs": 4, "max_logprobs": -1}
        _running[folder] = LLM(folder, dtype="float16", enforce_eager=True, **limits)
    return _running[folder]


def linears_of(model: torch.nn.Module) -> dict[str, LinearBase]:
    """Those that hold codes, by their names in vLLM, which fuses q, k and v, and gate and up."""
    found = {name: one for name, one in model.named_modules() if isinstance(one, LinearBase)}
    return {name: one for name, one in found.items() if not isinstance(one.quant_method, UnquantizedLinearMethod)}


def logits(folder: str, ids: list[list[int]], out: str) -> dict:
    """Log-probabilities float32 [prompts, tokens - 1, vocab] of each prompt's tokens but its first."""
    asked = SamplingParams(prompt_logprobs=-1, flat_logprobs=True, detokenize=False, max_tokens=1, temperature=0)
    engine = engine_of(folder)
    answers = engine.generate([{"prompt_token_ids": prompt} for prompt in ids], asked, use_tqdm=False)
    held = engine.apply_model(lambda model: len(linears_of(model)))[0]
    found = torch.stack([_by_token(answer.prompt_logprobs) for answer in answers])
    save_file({"logits": found, "generated": torch.empty(0, dtype=torch.int64)}, out)
    return {"quantized": held}


def _by_token(told: FlatLogprobs) -> torch.Tensor:
    """Float32 [places - 1, vocab] of a prompt, whose first token has none; by rank, the prompt's own twice."""
    rows = []
    for start, end in list(zip(told.start_indices, told.end_indices, strict=True))[1:]:
        tokens = torch.tensor(told.token_ids[start:end])
        rows.append(torch.full([int(tokens.max()) + 1], float("nan")))
        rows[-1][tokens] = torch.tensor(told.logprobs[start:end])
    return torch.stack(rows)


def weights(folder: str, out: str) -> dict:
    """Float16 [out, in] by name in vLLM: what each Linear of codes makes of the unit vectors."""
    save_file(engine_of(folder).apply_model(_dequantized)[0], out)
    return {}


def _dequantized(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    found = {}
    for name, one in linears_of(model).items():
        units = torch.eye(one.input_size, dtype=torch.float16)
        found[name] = one.quant_method.apply(one, units, None).T.contiguous()
    return found


if __name__ == "__main__":
    serve({"logits": logits, "weights": weights})
