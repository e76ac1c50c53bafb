"""Records into the token matrix that calibration and evaluation run over."""

from __future__ import annotations

import hashlib
import math
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Literal

import numpy as np

from quantkit.errors import CalibrationError, UsageError
from quantkit.late import torch
from quantkit.options import Drawing, Spec, TemplateName
from quantkit.progress import SILENT, Progress, counted
from quantkit.runs.panics import panics_as
from quantkit.tokens.overlap import TextIndex
from quantkit.tokens.readers import Dataset, Mixture
from quantkit.tokens.records import Record, render, resolve

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_BATCH = 64

BosUse = Literal["none", "window", "start"]


class Part(Spec):
    """One data set of a mixture: its `weight`, its share of the windows, and the rest as in `Provenance`."""

    dataset: str
    dataset_sha256: str
    license: str | None
    weight: float
    samples: int
    records: tuple[str, ...]
    first_records: int | None
    dropped: int


class Provenance(Spec):
    """What a token matrix was made of: enough to make it again.

    `records` are the ids of the records whose tokens are in it, in order (none for text tokenized as one string).
    `bos`: a BOS opens every window, or only the whole text, or none was added. `seed` None: file order.
    `first_records`: no more than so many records of the data set were read. `dropped`: so many records came up in the
    drawing and were left out, because they also occur in the evaluation text.

    Of a mixture `parts` says what each data set gave, in place of `records`. `dataset_sha256` is then over the parts'
    hashes, and `license` names all of theirs, or is None where one states none.
    """

    dataset: str
    dataset_sha256: str
    license: str | None
    records: tuple[str, ...]
    template: TemplateName
    bos: BosUse
    seed: int | None
    seq_len: int
    samples_asked: int | None
    samples: int
    tokens_sha256: str
    first_records: int | None = None
    dropped: int = 0
    parts: tuple[Part, ...] = ()


@dataclass(frozen=True, eq=False)
class TokenMatrix:
    """Windows of token ids, int64 [samples, seq_len], on the CPU, and where they come from."""

    tokens: torch.Tensor
    provenance: Provenance

    @classmethod
    def of(cls, tokens: torch.Tensor, name: str) -> TokenMatrix:
        """Windows made elsewhere: int64 [samples, seq_len]. `name` says what they are; the token hash vouches for it.

        Raises:
            CalibrationError: not a matrix of token ids.
        """
        if tokens.dim() != 2 or tokens.dtype != torch.int64 or 0 in tokens.shape:
            raise CalibrationError(
                f"{name}: token windows are int64 [samples, seq_len], not {tokens.dtype} {tokens.shape}"
            )
        provenance = Provenance(
            dataset=name,
            dataset_sha256="",
            license=None,
            records=(),
            template="none",
            bos="none",
            seed=None,
            seq_len=tokens.shape[1],
            samples_asked=None,
            samples=tokens.shape[0],
            tokens_sha256=token_hash(tokens),
        )
        return cls(tokens.cpu(), provenance)


@dataclass(frozen=True)
class Windows:
    """Windows of a text and the positions in them that are scored.

    Attributes:
        tokens: int64 [windows, seq_len].
        first_scored: int64 [windows]; position t >= first_scored is scored, as the prediction of token t from those
            before it. Position 0 never is.
    """

    tokens: torch.Tensor
    first_scored: torch.Tensor


def token_hash(tokens: torch.Tensor) -> str:
    """SHA-256 over the shape and then the token ids, each as little-endian int32."""
    digest = hashlib.sha256(np.asarray(tokens.shape, dtype="<i4").tobytes())
    digest.update(tokens.cpu().numpy().astype("<i4").tobytes())
    return digest.hexdigest()


def draw(
    dataset: Dataset | Mixture,
    spec: Drawing,
    tokenizer: PreTrainedTokenizerBase,
    progress: Progress = SILENT,
    exclude: TextIndex | None = None,
) -> TokenMatrix:
    """Draw `spec.samples` windows of `spec.seq_len` tokens from records in an order that `spec.seed` decides.

    Records are rendered, tokenized and packed into one stream, which is cut between token ids: a record may go on in
    the next window. With a tokenizer that adds a BOS by itself every window opens with one and no record has its own.
    Records that also occur in `exclude` are passed over and counted. Where the data is too short there are fewer
    windows, and a warning.

    Of a mixture each data set gives its share of the windows, the same that it would give alone; the windows of all are
    interleaved.

    Raises:
        CalibrationError: not even one window is there, or a record cannot be rendered.
        UsageError: the template does not fit the tokenizer, or a part of a mixture has too little weight for a window.
    """
    if isinstance(dataset, Mixture):
        return _draw_mixture(dataset, spec, tokenizer, progress, exclude)
    template = resolve(spec.template, tokenizer)
    order = np.random.Generator(np.random.PCG64(spec.seed)).permutation(len(dataset.records))
    stream = _Stream(spec.seq_len, _own_bos(tokenizer))
    needed = spec.samples * stream.payload
    with progress.phase("calibration text", needed) as advance:
        refused: list[CalibrationError] = []
        records = [dataset.records[index] for index in order]
        for record, ids in _tokenized(records, template, tokenizer, refused, exclude):
            if ids is None:
                stream.dropped += 1
                continue
            before = len(stream.ids)
            stream.add(record.id, ids)
            advance(min(len(stream.ids), needed) - before)
            if len(stream.ids) >= needed:
                break
    _say_refused(refused, stream, dataset, progress)
    if exclude and stream.dropped:
        found = counted(stream.dropped, "record that also occurs", "records that also occur")
        progress.note(f"{dataset.name}: left out {found} in {exclude.name}")
    matrix = stream.matrix(dataset, template=template, seed=spec.seed, asked=spec.samples)
    if matrix.provenance.samples < spec.samples:
        progress.warn(
            f"{dataset.name} gives {counted(matrix.provenance.samples, 'window')} of {spec.seq_len} tokens, not the "
            f"{spec.samples} asked for: going on with those; give more data, or ask for fewer or shorter windows"
        )
    return matrix


def _draw_mixture(
    mixture: Mixture,
    spec: Drawing,
    tokenizer: PreTrainedTokenizerBase,
    progress: Progress,
    exclude: TextIndex | None,
) -> TokenMatrix:
    weights = [weight for _, weight in mixture.parts]
    drawn = []
    for (dataset, weight), samples in zip(mixture.parts, shares(weights, spec.samples), strict=True):
        if samples == 0:
            raise UsageError(
                f"calibration: by its weight {weight:g}, {dataset.name} has none of {spec.samples} windows; "
                "ask for more samples, or give it more weight"
            )
        drawn.append(draw(dataset, spec.model_copy(update={"samples": samples}), tokenizer, progress, exclude))
    order = interleaved([matrix.provenance.samples for matrix in drawn])
    tokens = torch.stack([drawn[part].tokens[number] for part, number in order])
    facts, shared = [matrix.provenance for matrix in drawn], Part.model_fields.keys() - {"weight"}
    parts = [Part(weight=weight, **one.model_dump(include=shared)) for one, weight in zip(facts, weights, strict=True)]
    licenses = dict.fromkeys(part.license for part in parts)
    provenance = Provenance(
        dataset=",".join(f"{part.dataset}:{part.weight:g}" for part in parts),
        dataset_sha256=hashlib.sha256("".join(part.dataset_sha256 for part in parts).encode()).hexdigest(),
        license=None if None in licenses else ", ".join(filter(None, licenses)),
        records=(),
        template=facts[0].template,
        bos=facts[0].bos,
        seed=spec.seed,
        seq_len=spec.seq_len,
        samples_asked=spec.samples,
        samples=len(tokens),
        tokens_sha256=token_hash(tokens),
        dropped=sum(part.dropped for part in parts),
        parts=tuple(parts),
    )
    return TokenMatrix(tokens, provenance)


def shares(weights: Sequence[float], samples: int) -> list[int]:
    """Split `samples` by weight, to the last one: rounded down, then one more where most was cut off."""
    total = sum(map(Fraction, weights))
    exact = [samples * Fraction(weight) / total for weight in weights]
    counts = [math.floor(share) for share in exact]
    largest_first = sorted(range(len(exact)), key=lambda part: (counts[part] - exact[part], part))
    for part in largest_first[: samples - sum(counts)]:
        counts[part] += 1
    return counts


def interleaved(counts: Sequence[int]) -> list[tuple[int, int]]:
    """(part, number within the part) of every window, such that each part is spread evenly over the whole."""
    places = [
        (Fraction(2 * number + 1, count), part, number) for part, count in enumerate(counts) for number in range(count)
    ]
    return [(part, number) for _, part, number in sorted(places)]


def windows_in_order(
    dataset: Dataset,
    *,
    seq_len: int,
    template: TemplateName,
    tokenizer: PreTrainedTokenizerBase,
    progress: Progress = SILENT,
    at_most: int | None = None,
) -> TokenMatrix:
    """Records in file order, packed and cut as `draw` does, to so many windows; a last, short one is left out."""
    template = resolve(template, tokenizer)
    stream = _Stream(seq_len, _own_bos(tokenizer))
    with progress.phase("evaluation text", len(dataset.records)) as advance:
        refused: list[CalibrationError] = []
        for record, ids in _tokenized(dataset.records, template, tokenizer, refused):
            stream.add(record.id, ids or [])
            advance(1)
            if at_most is not None and len(stream.ids) >= at_most * stream.payload:
                break
    _say_refused(refused, stream, dataset, progress)
    return stream.matrix(dataset, template=template, seed=None, asked=at_most)


def window_text(
    text: str,
    name: str,
    seq_len: int,
    tokenizer: PreTrainedTokenizerBase,
    *,
    leading_bos_once: bool,
    at_most: int | None = None,
) -> TokenMatrix:
    """Plain text tokenized as one string and cut into so many windows; a last, short one is left out. For perplexity.

    `leading_bos_once`: the tokenizer's special tokens stand once, around the whole text, as in the GPTQ paper's
    perplexities. Otherwise every window opens with a BOS where the tokenizer adds one. The provenance's
    `dataset_sha256` is over the text in UTF-8. Raises `CalibrationError` where the text is shorter than one window.
    """
    dataset = Dataset(name, hashlib.sha256(text.encode()).hexdigest(), ())
    bos = _own_bos(tokenizer)
    stream = _Stream(seq_len, None if leading_bos_once else bos)
    stream.add(None, _token_ids(tokenizer, [text], add_special_tokens=leading_bos_once)[0])
    bos_use: BosUse | None = "start" if leading_bos_once and bos is not None else None
    return stream.matrix(dataset, template="none", seed=None, asked=at_most, bos_use=bos_use)


class _Stream:
    """Token ids one after the other, and where in them each record begins."""

    def __init__(self, seq_len: int, window_bos: int | None) -> None:
        self.seq_len = seq_len
        self.window_bos = window_bos
        self.payload = seq_len - (window_bos is not None)
        self.ids = array("q")
        self.begins: list[tuple[int, str]] = []
        self.dropped = 0

    def add(self, record_id: str | None, ids: list[int]) -> None:
        if self.window_bos is not None and ids[:1] == [self.window_bos]:
            ids = ids[1:]
        if ids and record_id is not None:
            self.begins.append((len(self.ids), record_id))
        self.ids.extend(ids)

    def matrix(
        self,
        dataset: Dataset,
        *,
        template: TemplateName,
        seed: int | None,
        asked: int | None,
        bos_use: BosUse | None = None,
    ) -> TokenMatrix:
        """The stream cut into at most `asked` windows (None: all that are there)."""
        samples = len(self.ids) // self.payload
        if samples == 0:
            without = f" without {self.dropped} records that are also in the evaluation text" if self.dropped else ""
            raise CalibrationError(
                f"{dataset.name} is too short{without}: {len(self.ids)} tokens found, {self.payload} needed for one "
                f"window of {self.seq_len}; give more text or shorter windows"
            )
        samples = samples if asked is None else min(samples, asked)
        kept = samples * self.payload
        windows = np.array(self.ids[:kept], dtype=np.int64).reshape(samples, self.payload)
        if self.window_bos is not None:
            windows = np.pad(windows, ((0, 0), (1, 0)), constant_values=self.window_bos)
        tokens = torch.from_numpy(windows)
        provenance = Provenance(
            dataset=dataset.name,
            dataset_sha256=dataset.sha256,
            license=dataset.license,
            records=tuple(record_id for begin, record_id in self.begins if begin < kept),
            template=template,
            bos=bos_use or ("none" if self.window_bos is None else "window"),
            seed=seed,
            seq_len=self.seq_len,
            samples_asked=asked,
            samples=samples,
            tokens_sha256=token_hash(tokens),
            first_records=dataset.first,
            dropped=self.dropped,
        )
        return TokenMatrix(tokens, provenance)


def _own_bos(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The BOS that the tokenizer puts before every text by itself, or None.

    Having a bos_token is not enough: SmolLM2's is <|im_start|>, which its chat template writes at every turn.
    """
    ids = _token_ids(tokenizer, ["a"], add_special_tokens=True)[0]
    bos = tokenizer.bos_token_id
    return int(bos) if isinstance(bos, int) and ids[:1] == [bos] else None


def _say_refused(refused: list[CalibrationError], stream: _Stream, dataset: Dataset, progress: Progress) -> None:
    """Records that a chat template refuses are left out, with a warning. Raises CalibrationError where none is left."""
    if refused and not stream.ids:
        raise CalibrationError(f"{refused[0]}; --template vicuna, or another, renders records without it")
    if refused:
        progress.warn(
            f"{dataset.name}: left out {counted(len(refused), 'record')} that the chat template refuses: {refused[0]}"
        )


def _tokenized(
    records: Sequence[Record],
    template: TemplateName,
    tokenizer: PreTrainedTokenizerBase,
    refused: list[CalibrationError],
    exclude: TextIndex | None = None,
) -> Iterator[tuple[Record, list[int] | None]]:
    """Each record and its token ids, or None where `exclude` holds it; without those that go to `refused`."""
    for start in range(0, len(records), _BATCH):
        rendered: list[tuple[Record, str | None]] = []
        for record in records[start : start + _BATCH]:
            held = exclude is not None and exclude.holds(record)
            try:
                rendered.append((record, None if held else render(record, template, tokenizer)))
            except CalibrationError as error:
                refused.append(error)
        texts = [text for _, text in rendered if text is not None]
        ids = iter(_token_ids(tokenizer, texts, add_special_tokens=False) if texts else [])
        for record, text in rendered:
            yield record, None if text is None else next(ids)


def _token_ids(tokenizer: PreTrainedTokenizerBase, texts: list[str], *, add_special_tokens: bool) -> list[list[int]]:
    # Not verbose: a text longer than the model's context is cut into windows, so that warning would mislead.
    with panics_as(CalibrationError, "the text cannot be taken apart"):
        encoded = tokenizer(texts, add_special_tokens=add_special_tokens, return_attention_mask=False, verbose=False)
    ids: list[list[int]] = encoded["input_ids"]
    return ids
