"""The GPTQ container: Hugging Face folder with qweight, qzeros, scales and g_idx per Linear.

Layout: AutoGPTQ 0.7.1 (v1) and GPTQModel (v2); `quantkit.containers.gptq.read.GptqSource` is the reader.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from quantkit.codes import Codes, Plan, QuantizedLinear
from quantkit.codes.packing import pack, packing_multiple
from quantkit.containers import CONTAINERS, misfit
from quantkit.containers.gptq.read import GptqSource
from quantkit.containers.hf.read import untied
from quantkit.containers.hf.write import ShardedWriter
from quantkit.containers.source import Source, Weights
from quantkit.errors import NumericError, UsageError
from quantkit.late import torch
from quantkit.options import CheckpointFormat, QuantSpec
from quantkit.options.grid import pattern_regex
from quantkit.runs.atomic import write_json
from quantkit.runs.tensorfile import TensorPlan
from quantkit.version import __version__


def check(linears: Plan) -> None:
    """Refuse what this container cannot hold, before any work.

    Raises:
        UsageError: bits, group size or a Linear's shape has no place in the layout.
    """
    refusal = misfit(CONTAINERS["gptq"], {linear.spec for linear in linears.values()})
    if refusal is not None:
        raise UsageError(refusal)
    for name, linear in linears.items():
        multiple = packing_multiple(linear.spec.bits)
        rows, columns = linear.shape
        if rows % multiple or columns % multiple:
            raise UsageError(
                f"{name} is {rows} x {columns}: {linear.spec.bits}-bit packing needs multiples of {multiple}; "
                "choose other --bits, or leave it out with --exclude"
            )


def plan(source: Source, weights: Weights, linears: Plan) -> list[TensorPlan]:
    """Every tensor that the checkpoint will hold, in the source's order."""
    tensors = []
    for name, info in weights.tensors.items():
        module = name.removesuffix(".weight")
        if name.endswith(".weight") and module in linears:
            (rows, columns), bits, groups = linears[module].shape, linears[module].spec.bits, linears[module].groups
            tensors += [
                TensorPlan(f"{module}.qweight", torch.int32, (columns * bits // 32, rows)),
                TensorPlan(f"{module}.qzeros", torch.int32, (groups, rows * bits // 32)),
                TensorPlan(f"{module}.scales", torch.float16, (groups, rows)),
                TensorPlan(f"{module}.g_idx", torch.int32, (columns,)),
            ]
        else:
            tensors.append(TensorPlan(name, weights.dtype(name), info.shape))
    return tensors


def quantization_config(
    spec: QuantSpec, checkpoint_format: CheckpointFormat, modules: Sequence[Sequence[str]], kept: Sequence[str] = ()
) -> dict[str, Any]:
    """``quantization_config`` of config.json; quantize_config.json holds the same.

    Args:
        spec: what most Linears are quantized to, and the patterns of those that are not.
        checkpoint_format: v1 or v2.
        modules: names within a block of the quantized Linears, by stage.
        kept: patterns, after Python's `re`, of modules that have such names and stay as they are, which no pattern of
            `spec` says.
    """
    content: dict[str, Any] = {
        "quant_method": "gptq",
        "bits": spec.bits,
        "group_size": spec.group_size,
        "sym": spec.sym,
        "desc_act": spec.act_order == "dynamic",
        "static_groups": spec.act_order == "static",
        "true_sequential": True,
        "damp_percent": spec.damp,
        "lm_head": False,
        "checkpoint_format": checkpoint_format,
        "modules_in_block_to_quantize": [list(stage) for stage in modules],
        "meta": {"quantizer": [f"quantkit:{__version__}"]},
    }
    # GPTQModel's rules for modules, of which the first that matches a name counts: ``-:`` leaves it as it is.
    dynamic: dict[str, Any] = {f"-:^{pattern_regex(pattern)}$": {} for pattern in spec.exclude}
    dynamic |= {f"-:^{pattern}": {} for pattern in kept}
    if spec.include:
        dynamic[f"-:^(?!(?:{'|'.join(map(pattern_regex, spec.include))})$)"] = {}
    dynamic |= {f"+:^{pattern_regex(pattern)}$": override.changes() for pattern, override in spec.overrides}
    return {**content, "dynamic": dynamic} if dynamic else content


class GptqWriter:
    """Writes one checkpoint into a folder that is not yet the finished output.

    Order of use: `add_linear` for every Linear, `add_others`, `finish`.
    """

    def __init__(
        self,
        folder: Path,
        source: Source,
        weights: Weights,
        linears: Plan,
        quantization: dict[str, Any],
        max_shard_bytes: int,
    ) -> None:
        self.folder, self.source = folder, source
        self._weights, self._linears, self._quantization = weights, linears, quantization
        self._tensors = ShardedWriter(folder, plan(source, weights, linears), max_shard_bytes)

    def __enter__(self) -> GptqWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._tensors.close()

    def add_linear(self, module: str, linear: Codes) -> None:
        """Pack and write one Linear's codes; a bias goes with the other tensors."""
        assert isinstance(linear, QuantizedLinear)
        assert linear.shape == self._linears[module].shape
        assert linear.bits == self._linears[module].spec.bits
        zeros = linear.zeros.cpu().T
        if self._quantization["checkpoint_format"] == "gptq":
            zeros = zeros - 1  # v1 stores zero - 1; zeros are at least 1, so no field borrows from its neighbour
        self._tensors.write(f"{module}.qweight", pack(linear.codes.cpu().T.contiguous(), linear.bits), linear.codes)
        self._tensors.write(f"{module}.qzeros", pack(zeros, linear.bits, axis=1), linear.zeros)
        self._tensors.write(f"{module}.scales", linear.scales.cpu().T.contiguous())
        self._tensors.write(f"{module}.g_idx", linear.group.cpu())

    def add_others(self) -> None:
        """Copy every tensor that is not quantized, each in the dtype that the source keeps it in."""
        for name in self._weights.tensors:
            if not (name.endswith(".weight") and name.removesuffix(".weight") in self._linears):
                self._tensors.write(name, kept_tensor(self.source, self._weights, name))

    def finish(self) -> None:
        """Write configs and tokenizer, then read every tensor back and compare it: of Linears their codes and zeros.

        Raises:
            OutputError: what was read back is not what was written.
        """
        self._tensors.finish()
        dtype = str(self.source.dtype).removeprefix("torch.")
        config = {k: v for k, v in self.source.config_dict().items() if k not in ("dtype", "torch_dtype")}
        # transformers 5 reads dtype, transformers 4 torch_dtype.
        if self._weights.untied:
            config = untied(config)
        config |= {"dtype": dtype, "torch_dtype": dtype, "quantization_config": self._quantization}
        write_json(self.folder / "config.json", config)
        write_json(self.folder / "quantize_config.json", self._quantization)
        self.source.copy_companions(self.folder)
        reader = GptqSource(self.folder, trust_remote_code=self.source.trusts_code)
        unpacked = {f"{module}.qweight": partial(reader.read_unpacked, module) for module in self._linears}
        unpacked |= {f"{module}.qzeros": partial(reader.read_zeros, module) for module in self._linears}
        self._tensors.read_back(lambda name: unpacked[name]() if name in unpacked else reader.stored.read(name))


# By the name that `quantkit.quantize.targets.Layout` has for every container's.
writer = GptqWriter


def kept_tensor(source: Source, weights: Weights, name: str) -> torch.Tensor:
    """A tensor that stays as it is, in the dtype it is published in.

    Raises:
        NumericError: a value that is not finite there.
    """
    tensor = weights.read(name)
    dtype = weights.dtype(name)
    if tensor.dtype == dtype:
        return tensor
    cast = tensor.to(dtype)
    if cast.is_floating_point() and not bool(torch.isfinite(cast).all()):
        held = str(dtype).removeprefix("torch.")
        raise NumericError(f"{name}: a value is beyond {held}; convert the model to bfloat16")
    return cast
