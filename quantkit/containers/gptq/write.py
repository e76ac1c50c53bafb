"""The GPTQ container: Hugging Face folder with qweight, qzeros, scales and g_idx per Linear.

Layout: AutoGPTQ 0.7.1 (v1) and GPTQModel (v2); `quantkit.containers.gptq.read.GptqSource` is the reader.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from quantkit.codes import Plan, QuantizedLinear
from quantkit.codes.packing import pack, packing_multiple
from quantkit.containers.gptq.read import GptqSource
from quantkit.containers.hf.coded import CodedWriter, Part, check_holds, plan_folder
from quantkit.containers.source import Source, Weights
from quantkit.errors import UsageError
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
    check_holds("gptq", linears)
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
    return plan_folder(weights, linears, GptqWriter.parts_of)


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


def with_head(quantization: dict[str, Any], linears: Plan) -> dict[str, Any]:
    """The same where the output head is among the Linears: its flag; its name among the modules, where vLLM looks for
    it; and a rule of its own, which counts before those of others, where it is not what most Linears are."""
    heads = {name: linear.spec for name, linear in linears.items() if linear.end == "head"}
    if not heads:
        return quantization
    rules = {
        f"+:^{pattern_regex(name)}$": {key: getattr(spec, key) for key in ("bits", "group_size", "sym")}
        for name, spec in heads.items()
    }
    most = {key: quantization[key] for key in ("bits", "group_size", "sym")}
    dynamic = quantization.get("dynamic", {})
    told = {"dynamic": rules | dynamic} if dynamic or list(rules.values()) != [most] else {}
    modules = [*quantization["modules_in_block_to_quantize"], *([name] for name in heads)]
    return quantization | {"lm_head": True, "modules_in_block_to_quantize": modules} | told


class GptqWriter(CodedWriter):
    """Writes one checkpoint."""

    opens = GptqSource

    @staticmethod
    def parts_of(shape: tuple[int, int], spec: QuantSpec, groups: int) -> list[Part]:
        (rows, columns), bits = shape, spec.bits
        return [
            ("qweight", torch.int32, (columns * bits // 32, rows)),
            ("qzeros", torch.int32, (groups, rows * bits // 32)),
            ("scales", torch.float16, (groups, rows)),
            ("g_idx", torch.int32, (columns,)),
        ]

    def pack(self, linear: QuantizedLinear, spec: QuantSpec) -> Iterator[tuple[str, torch.Tensor]]:
        zeros = linear.zeros.cpu().T
        if self._quantization["checkpoint_format"] == "gptq":
            zeros = zeros - 1  # v1 stores zero - 1; zeros are at least 1, so no field borrows from its neighbour
        scales, group = linear.scales.cpu().T.contiguous(), linear.group.cpu()
        yield "qweight", linear.words.cpu().T.contiguous()
        yield "qzeros", pack(zeros, linear.bits, axis=1)
        yield "scales", scales
        yield "g_idx", group

    def config(self) -> dict[str, Any]:
        return {"quantization_config": with_head(self._quantization, self._linears)}

    def finish(self) -> None:
        write_json(self.folder / "quantize_config.json", self.config()["quantization_config"])
        super().finish()


# By the name that `quantkit.quantize.targets.Layout` has for every container's.
writer = GptqWriter
