"""A GPTQ checkpoint as a source: codes for whoever wants them, dequantized weights for everybody else."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantkit.codes import contiguous_groups
from quantkit.codes.packing import PACKABLE_BITS, unpack
from quantkit.containers.hf.coded import CodedFolder
from quantkit.errors import SourceError
from quantkit.late import torch

_GROUP_SIZES = (16, 32, 64, 128, 256, 512, 1024)


def is_by_gptqmodel(label: Mapping[str, Any]) -> bool:
    """Whether a label says that GPTQModel wrote the codes."""
    meta = label.get("meta")
    writers = meta.get("quantizer") if isinstance(meta, dict) else None
    return any(str(name).startswith("gptqmodel") for name in (writers if isinstance(writers, list) else [writers]))


class GptqSource(CodedFolder):
    """A folder in the GPTQ layout, v1 or v2, at 2, 3, 4 or 8 bits. `read` gives them dequantized."""

    kind = "gptq"
    from_gptq = True
    of_linear = ("qweight", "qzeros", "scales", "g_idx")
    stored_as = "GPTQ"

    def __init__(self, folder: Path, label: str | None = None, trust_remote_code: bool = False) -> None:
        super().__init__(folder, label, trust_remote_code)
        self.checkpoint_format = self.quantization.get("checkpoint_format", "gptq")
        told = {"bits": self.quantization.get("bits"), "checkpoint_format": self.checkpoint_format}
        for key, known in (("bits", PACKABLE_BITS), ("checkpoint_format", ("gptq", "gptq_v2"))):
            if told[key] not in known:
                choices = ", ".join(map(str, known))
                raise SourceError(f"{self.path / 'config.json'}: {key} {told[key]!r} is not one of {choices}")
        self._by_gptqmodel = is_by_gptqmodel(self.quantization)
        for module in self._modules:
            self._check_shapes(module)

    @property
    def scheme(self) -> str:
        label = self.quantization
        symmetry = "symmetric" if label.get("sym") else "asymmetric"
        order = "act-order" if label.get("desc_act") else "groups in order"
        codes = f"GPTQ {label.get('bits')}-bit {symmetry}, group {label.get('group_size')}"
        return f"{codes}, {order}, format {label.get('checkpoint_format', 'gptq')}"

    @property
    def settings(self) -> Mapping[str, Any]:
        said = {key: self.quantization.get(key) for key in ("bits", "group_size", "sym", "desc_act")}
        return {**said, "damp": self.quantization.get("damp_percent")}

    def read_words(self, module: str) -> torch.Tensor:
        return self.stored.read(f"{module}.qweight")

    def oriented_scales(self, module: str) -> torch.Tensor:
        return super().oriented_scales(module).T

    def read_unpacked(self, module: str) -> torch.Tensor:
        """Codes of one Linear, uint8 [out, in]."""
        return unpack(self.read_words(module), self.bits(module)).T.contiguous()

    def read_zeros(self, module: str) -> torch.Tensor:
        """As of every source of codes; where v1 stores a zero of 0, its writer's own reading counts."""
        bits, words = self.bits(module), self.stored.read(f"{module}.qzeros")
        v1 = self.checkpoint_format != "gptq_v2"
        whole_words = v1 and self._by_gptqmodel and bits != 3  # it subtracts and adds these: fields borrow and carry
        zeros = unpack(words + sum(1 << at for at in range(0, 32, bits)) if whole_words else words, bits, axis=1)
        if v1 and not whole_words:
            zeros = zeros + 1
            if bits != 3 or self._by_gptqmodel:  # as AutoGPTQ's qlinear_cuda_old.py, which masks all but 3 bits
                zeros = zeros & (2**bits - 1)
        return zeros.T.contiguous()

    def read_groups(self, module: str) -> torch.Tensor:
        if f"{module}.g_idx" in self.stored.tensors:
            named = self.stored.read(f"{module}.g_idx").int()
            count = self.stored.tensors[f"{module}.scales"].shape[0]
            if named.numel() and not 0 <= int(named.min()) <= int(named.max()) < count:
                raise SourceError(f"{self.path}: {module}.g_idx names groups beyond its {count}; it is damaged")
            return named
        # In the order of the columns, for a checkpoint that leaves g_idx out.
        columns, groups = self._columns(module), self.stored.tensors[f"{module}.scales"].shape[0]
        if groups == 1:
            return contiguous_groups(columns, -1)
        sizes = [self.quantization.get("group_size"), *_GROUP_SIZES]  # the first may be overridden for this module
        size = next((s for s in sizes if isinstance(s, int) and s > 0 and -(-columns // s) == groups), None)
        if size is None or self.quantization.get("desc_act"):
            raise SourceError(f"{self.path}: {module} has no g_idx, so which group a column is in cannot be told")
        return contiguous_groups(columns, size)

    def shape(self, module: str) -> tuple[int, int]:
        return self.stored.tensors[f"{module}.qweight"].shape[1], self._columns(module)

    def bits(self, module: str) -> int:
        stored = self.stored.tensors  # their shapes tell it: per-module overrides need not be understood
        return stored[f"{module}.qzeros"].shape[1] * 32 // stored[f"{module}.qweight"].shape[1]

    def _columns(self, module: str) -> int:
        return self.stored.tensors[f"{module}.qweight"].shape[0] * 32 // self.bits(module)

    def _check_shapes(self, module: str) -> None:
        shapes = {}
        for part in self.of_linear:
            info = self.stored.tensors.get(f"{module}.{part}")
            if info is not None:
                shapes[part] = info.shape
            elif part != "g_idx":
                raise SourceError(f"{self.path}: {module} has qweight but no {part}")
        if any(len(shapes[part]) != 2 or 0 in shapes[part] for part in self.of_linear[:3]):
            raise SourceError(f"{self.path}: {module}: its parts are of shapes {shapes}: not a GPTQ layout")
        groups, rows = shapes["scales"][0], shapes["qweight"][1]
        bits = self.bits(module)
        if bits not in PACKABLE_BITS:
            raise SourceError(f"{self.path}: {module}.qzeros is {shapes['qzeros']} for {rows} rows: not a GPTQ layout")
        wanted = {"qzeros": (groups, rows * bits // 32), "scales": (groups, rows), "g_idx": (self._columns(module),)}
        for part, shape in wanted.items():
            if part in shapes and shapes[part] != shape:
                raise SourceError(f"{self.path}: {module}.{part} is {shapes[part]}, but qweight asks for {shape}")
