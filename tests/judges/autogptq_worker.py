"""AutoGPTQ as a judge: reads and writes GPTQ folders. Runs in its own environment, not in quantkit's."""

from serve import logits_of, replaced, serve  # isort: skip

import torch
from auto_gptq import AutoGPTQForCausalLM, BaseQuantizeConfig
from auto_gptq.modeling import _base
from auto_gptq.nn_modules.qlinear import qlinear_cuda, qlinear_cuda_old
from safetensors.torch import save_file

QUANTIZED = (qlinear_cuda.QuantLinear, qlinear_cuda_old.QuantLinear)


def load(folder: str) -> torch.nn.Module:
    """In float32, scales too: scale * (code - zero) is then exact to float32."""
    return AutoGPTQForCausalLM.from_quantized(
        folder, device="cpu", torch_dtype=torch.float32, disable_exllama=True, disable_exllamav2=True
    ).model


def logits(folder: str, ids: list[list[int]], out: str, generate: int = 0) -> dict:
    return logits_of(load(folder), QUANTIZED, ids, out, generate)


def weights(folder: str, out: str) -> dict:
    """The weights that the quantized Linears multiply by, float32 [out, in]: what each makes of the unit vectors."""
    tensors = {}
    for name, module in load(folder).named_modules():
        if isinstance(module, QUANTIZED):
            tensors[name] = (module(torch.eye(module.infeatures)) - module.bias).T.contiguous()
    save_file(tensors, out)
    return {}


def quantize(model: str, out: str, samples: list[list[int]], **options: object) -> dict:
    """Quantize a folder on token ids and write the result.

    AutoGPTQ asks for CUDA, of which its quantizer needs nothing: its first CUDA device becomes the CPU here.
    """
    tokens = [torch.tensor([ids]) for ids in samples]
    examples = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in tokens]
    nothing = {"is_available": lambda: True, "synchronize": lambda: None, "empty_cache": lambda: None}
    with replaced(torch.cuda, **nothing), replaced(_base, CUDA_0=_base.CPU):
        quantizer = AutoGPTQForCausalLM.from_pretrained(model, BaseQuantizeConfig(**options))
        quantizer.quantize(examples, cache_examples_on_gpu=False)
    quantizer.save_quantized(out)
    return {}


if __name__ == "__main__":
    serve({"logits": logits, "quantize": quantize, "weights": weights})
