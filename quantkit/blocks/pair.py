"""Two models as one source: a base and a delta, added as they are read; or a base and a tuned model, subtracted.

Tensors are paired by the parameter that each is, so older names, a missing prefix or a tied embedding that is stored
twice make no difference. All arithmetic is in float32, whatever the two are stored in.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from quantkit.blocks.families import ExpertNames
from quantkit.blocks.weights import bind, build_on_meta, left_out
from quantkit.containers.hf.read import OF_TOKENIZERS, copy_companions, has_tokenizer
from quantkit.containers.hf.shards import dtype_as_read
from quantkit.containers.source import Source, TensorInfo, Weights
from quantkit.errors import SourceError
from quantkit.late import dtype_of, torch
from quantkit.options import Vocabulary
from quantkit.runs.atomic import REPORT_NAME
from quantkit.runs.record import delta_record

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

_FLOATS = ("F64", "F32", "F16", "BF16")
# Old checkpoints store these; every reader computes them from the config, and in 16 bits they would be wrong.
ROTARY = "rotary_emb.inv_freq"
_SLICE = 1 << 20


def label_of(parts: Sequence[Source]) -> str:
    """What a model is called that is read from one source, or is the sum of a base and a delta."""
    return parts[0].label if len(parts) == 1 else re.sub(r"[-_](w?diff|delta)(?=[-_@]|$)", "", parts[1].label)


class PairSource(Source):
    """A base and another model of the same tensors, read as one.

    Config, tokenizer and all other files are the other's. Where it has more rows of vocabulary than the base, `vocab`
    says what those rows of the base are taken for: "mean" the mean of the base's rows, "delta" zeros.

    Attributes:
        base, other: the two sources.
        vocab: what was chosen; None where the vocabularies are equally large.
        remarks: what a user should know of choices that were made.
        doubt: why the two may not belong together; None where nothing says so.

    Raises:
        SourceError: names, shapes, types or architectures of the two do not fit; nothing but headers was read, and
            the embeddings where the vocabularies differ.
    """

    kind: str
    roles: ClassVar[tuple[str, str]]
    sign: ClassVar[int]

    def __init__(self, base: Source, other: Source, vocab: Vocabulary = "auto") -> None:
        self.base, self.other = base, other
        self.path, self.model_type = other.path, other.model_type
        self.trusts_code = other.trusts_code
        self.label = label_of((base, other))
        self.doubt: str | None = None
        self.remarks: list[str] = []
        self._means: dict[str, torch.Tensor] = {}
        self._check_kinds()
        self._base, self._other = _bound(base), _bound(other)
        self._partner = self._pair()
        self._grown = self._check_shapes()
        kept = (n for n, known in self._partner.items() if self._other.in_float32(n) or self._base.in_float32(known))
        self.float32 = frozenset(kept)
        for role, weights in zip(self.roles, (self._base, self._other), strict=True):
            lost = left_out(weights, f" of {role}")
            self.remarks += [] if lost is None else [lost]
        self.vocab: Vocabulary | None = None
        if self._grown:
            self.vocab, reason = self._choose(self._grown[0]) if vocab == "auto" else (vocab, "as asked")
            self.remarks.append(self._explain(self.vocab, reason))
        self.choices = {"vocab": self.vocab}
        self._speaks = other
        if other.path.is_dir() and not has_tokenizer(other.path):
            if has_tokenizer(base.path) and not self._grown:
                self._speaks = base
                self.remarks.append(f"{other.label} has no tokenizer: {base.label}'s is taken")
            else:
                self.remarks.append(
                    f"{other.label} has no tokenizer, and {base.label} none for as many tokens: what is made has none"
                )

    @cached_property
    def config(self) -> PretrainedConfig:
        return self.other.config

    @cached_property
    def dtype(self) -> torch.dtype:
        return self.other.dtype

    @cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        found = {}
        for name in self._partner:
            info = self._other.tensors[name]
            floats = info.stored_as in _FLOATS
            found[name] = TensorInfo(info.shape, "F32", 4 * math.prod(info.shape)) if floats else info
        return found

    @property
    def parts(self) -> Mapping[str, Source]:
        """Base and other, by their roles in small letters."""
        return {role.lower(): part for role, part in zip(self.roles, (self.base, self.other), strict=True)}

    def read(self, name: str) -> torch.Tensor:
        """The sum or difference, in float32; integers as one of the two has them.

        Raises:
            SourceError: a file ends early or cannot be read.
        """
        if self._other.tensors[name].stored_as not in _FLOATS:
            return self._integers(name)
        base = self._base.read(self._partner[name])
        return combined(base, self._other.read(name), self.sign, self.vocab == "mean")

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        if self._other.tensors[name].stored_as not in _FLOATS:
            return self._integers(name)[start:stop]
        known, other = self._partner[name], self._other.read_rows(name, start, stop)
        rows = self._base.tensors[known].shape[0]
        base = self._base.read_rows(known, min(start, rows), min(stop, rows))
        mean = stop > rows and self.vocab == "mean"
        if mean and known not in self._means:
            self._means[known] = row_mean(self._base.read(known))
        return combined(base, other, self.sign, mean, self._means[known] if mean else None)

    def stored(self, name: str) -> torch.Tensor:
        """The other's own tensor."""
        return self._other.read(name)

    def rotary(self) -> Iterator[torch.Tensor]:
        """Rotary frequencies that both store; they are no tensors of the result."""
        for name in self.other.tensors:
            if name.endswith(ROTARY) and name in self.base.tensors:
                yield combined(self.base.read(name), self.other.read(name), self.sign, False)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self._speaks.tokenizer()

    def weight_files(self) -> Sequence[Path]:
        return self.other.weight_files()

    def config_dict(self) -> dict[str, Any]:
        return self.other.config_dict()

    def copy_companions(self, folder: Path) -> None:
        self.other.copy_companions(folder)
        if self._speaks is self.base:
            copy_companions(self.base.path, folder, OF_TOKENIZERS)

    # -- checks before anything is read ------------------------------------------------------------------------------

    def _check_kinds(self) -> None:
        base, other = self.roles
        kinds = self.base.config.model_type, self.other.config.model_type
        if kinds[0] != kinds[1]:
            raise SourceError(f"{base} {self.base.label} is a {kinds[0]} model, {other} {self.other.label} {kinds[1]}")
        if delta_record(self.base):
            swapped = f"; are {base} and {other} swapped?" if self.sign > 0 else ""
            raise SourceError(f"{base} {self.base.path} is itself a delta, by its {REPORT_NAME}{swapped}")
        for role, source in zip(self.roles, (self.base, self.other), strict=True):
            if source.codes is not None:
                raise SourceError(f"{role} {source.label} is quantized; give the full-precision model")

    def _pair(self) -> dict[str, str]:
        """The other's tensor -> the base's. Raises SourceError where one has what the other lacks."""
        parameters: dict[str, str] = {}
        for parameter, published in self._other.names.items():  # of a tied pair the embedding, which comes first
            parameters.setdefault(published, parameter)
        partner, alone = {}, []
        for name in self._other.tensors:
            known = self._base.names.get(parameters.get(name, ""), name)
            if known in self._base.tensors:
                partner[name] = known
            elif not name.endswith(ROTARY):
                alone.append(name)
        left = [n for n in self._base.tensors if n not in partner.values() and not n.endswith(ROTARY)]
        for names, has, lacks in ((left, *self.roles), (alone, *reversed(self.roles))):
            if names:
                more = f" and {len(names) - 1} more tensors" if len(names) > 1 else ""
                raise SourceError(f"{has} has {names[0]}{more}, which {lacks} lacks: they are not of one model")
        return {name: known for name, known in partner.items() if not name.endswith(ROTARY)}

    def _check_shapes(self) -> list[str]:
        """Tensors that have a row for each token and more of them in the other. Raises SourceError."""
        grown = []
        ends = self._vocabulary_names()
        for name in sorted(self._partner, key=lambda name: name not in ends[:1]):  # whose message says most
            known = self._partner[name]
            ours, theirs = self._base.tensors[known], self._other.tensors[name]
            self._check_types(name, ours, theirs)
            if ours.shape == theirs.shape:
                continue
            if name not in ends or ours.shape[1:] != theirs.shape[1:]:
                raise SourceError(
                    f"{name} is {list(ours.shape)} in {self.roles[0]}, {list(theirs.shape)} in {self.roles[1]}"
                )
            if ours.shape[0] > theirs.shape[0]:
                raise SourceError(
                    f"{self.roles[0]} has {ours.shape[0]} rows of {name}, {self.roles[1]} only {theirs.shape[0]}: "
                    "another base is needed, or the two are swapped"
                )
            grown.append(name)
        return grown

    def _check_types(self, name: str, ours: TensorInfo, theirs: TensorInfo) -> None:
        for role, info in zip(self.roles, (ours, theirs), strict=True):
            held = dtype_as_read(info.stored_as)
            integers = held is not None and not held.is_floating_point and ours.stored_as == theirs.stored_as
            if info.stored_as not in _FLOATS and not integers:
                raise SourceError(
                    f"{name} is stored as {info.stored_as} in {role}; sums and differences are of full-precision models"
                )

    def _vocabulary_names(self) -> list[str]:
        """Published names of what has a row for each token: embedding, output matrix and its bias."""
        model = build_on_meta(self.other)
        names = {module: name for name, module in model.named_modules()}
        ends = [names.get(module) for module in (model.get_input_embeddings(), model.get_output_embeddings())]
        parameters = [f"{end}.{kind}" for end in ends for kind in ("weight", "bias")]
        return [self._other.names[name] for name in parameters if name in self._other.names]

    # -- rows of vocabulary that the base lacks ----------------------------------------------------------------------

    def _choose(self, name: str) -> tuple[Vocabulary, str]:
        """The convention, and why."""
        raise NotImplementedError

    def _explain(self, vocab: str, reason: str) -> str:
        name = self._grown[0]
        rows = self._base.tensors[self._partner[name]].shape[0], self._other.tensors[name].shape[0]
        meaning = {
            "mean": "the rows that the base lacks begin as the mean of its rows",
            "delta": "the rows that the base lacks are the delta's as they are",
        }
        return f"{rows[1]} rows of vocabulary on a base of {rows[0]}: --vocab {vocab} ({meaning[vocab]}), {reason}"

    def _integers(self, name: str) -> torch.Tensor:
        raise NotImplementedError


class DeltaSource(PairSource):
    """base + delta: the tuned model. `record` is what `quantkit diff` noted of the delta, where that made it."""

    kind = "delta"
    roles = ("BASE", "DELTA")
    sign = 1

    def __init__(self, base: Source, delta: Source, vocab: Vocabulary = "auto") -> None:
        self.record = delta_record(delta)
        super().__init__(base, delta, vocab)
        self.doubt = None if self.record else self._doubt()

    @cached_property
    def dtype(self) -> torch.dtype:
        noted = self.record.get("tuned_dtype")
        return dtype_of(noted) if noted in ("float16", "bfloat16") else self.other.dtype

    def _choose(self, name: str) -> tuple[Vocabulary, str]:
        if self.record.get("vocab") in ("mean", "delta"):
            return self.record["vocab"], f"as the delta's {REPORT_NAME} says"
        base = self._base.read(self._partner[name])
        mean = row_mean(base)
        extra = self._other.read(name)[base.shape[0] :].float()
        # A row that began as the mean changed little; one that is stored whole is about as long as the mean, or longer.
        share = float(extra.norm(dim=-1).mean() / mean.norm().clamp_min(1e-30))
        chosen: Vocabulary = "mean" if share < 0.5 else "delta"
        lengths = f"since the delta's rows of {name} beyond the base's are {share:.2g} times as long as that mean"
        return chosen, f"{lengths}; the other convention is --vocab {'delta' if chosen == 'mean' else 'mean'}"

    def _integers(self, name: str) -> torch.Tensor:
        return self._base.read(self._partner[name])

    def _doubt(self) -> str | None:
        """A norm's weights hardly change in tuning: a delta whose are as large as the base's is none."""
        vectors = (n for n, info in self.tensors.items() if len(info.shape) == 1 and n.endswith("norm.weight"))
        name = next(vectors, None)
        if name is None:
            return None
        base, delta = self._base.read(self._partner[name]).float(), self._other.read(name).float()
        if float(delta.abs().mean()) <= 0.5 * float(base.abs().mean()):
            return None
        return (
            f"{name} of DELTA {self.other.label} is as large as that of BASE {self.base.label}: it may be a whole "
            "model, or the two are swapped"
        )


class DiffSource(PairSource):
    """tuned - base: the delta."""

    kind = "diff"
    roles = ("BASE", "TUNED")
    sign = -1

    def _choose(self, name: str) -> tuple[Vocabulary, str]:
        return "delta", "which gives them back exactly; scripts after Alpaca's need --vocab mean"

    def _integers(self, name: str) -> torch.Tensor:
        return self._other.read(name)


def combined(
    base: torch.Tensor, other: torch.Tensor, sign: int, mean: bool, row: torch.Tensor | None = None
) -> torch.Tensor:
    """``other + sign * base`` in float32, in the shape of `other`, slice by slice: no copy of either is widened.

    Args:
        base: [rows, ...]; of fewer rows than `other`, it is continued with its mean row or with zeros.
        other: [rows or more, ...].
        sign: 1 or -1.
        mean: continue with the mean row.
        row: the mean row, where `base` is not all that it is the mean of.
    """
    result = torch.empty(other.shape, dtype=torch.float32)
    sums, ours, theirs = result.view(-1), base.reshape(-1), other.reshape(-1)
    for start in range(0, len(ours), _SLICE):
        part = slice(start, min(start + _SLICE, len(ours)))
        torch.add(theirs[part].float(), ours[part].float(), alpha=sign, out=sums[part])
    if len(ours) < len(theirs):
        rows = other[base.shape[0] :].float()
        result[base.shape[0] :] = rows + sign * (row_mean(base) if row is None else row) if mean else rows
    return result


def row_mean(matrix: torch.Tensor) -> torch.Tensor:
    """float32 mean of a matrix's rows (a vector's: of its entries), summed in float64."""
    total = torch.zeros(matrix.shape[1:], dtype=torch.float64)
    rows = max(1, _SLICE // max(1, math.prod(matrix.shape[1:])))
    for start in range(0, matrix.shape[0], rows):
        total += matrix[start : start + rows].sum(0, dtype=torch.float64)
    return (total / matrix.shape[0]).float()


def _bound(source: Source) -> Weights:
    """The source's tensors under published names, as they are stored."""
    return bind(source, build_on_meta(source), None, ExpertNames(), untie=False)
