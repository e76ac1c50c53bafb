"""A model of any source, as lm-evaluation-harness calls it. Imported by the harness, or where it is known to be."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from lm_eval.models.huggingface import HFLM

from quantkit.blocks.open import named, note_source, open_model, stream_of
from quantkit.blocks.whole import load_on_kernels
from quantkit.containers.source import Source
from quantkit.options import ComputeDtype
from quantkit.progress import SILENT, Progress


class QuantkitLM(HFLM):  # type: ignore[misc]  # lm_eval is not typed
    """The harness's own scoring and generating, on a model that quantkit has loaded.

    ``pretrained`` (or ``base`` and ``delta``), ``device``, ``dtype``, ``revision`` and ``trust_remote_code`` mean what
    they do on quantkit's command line; ``batch_size``, ``max_batch_size``, ``max_length`` and whatever else is given,
    what they do for the harness's class ``hf``. `source` is a model that is open already, in place of a name.
    """

    cache_hook: Any

    def __init__(
        self,
        pretrained: str | Path | None = None,
        *,
        base: str | Path | None = None,
        delta: str | Path | None = None,
        device: str | None = None,
        dtype: str | None = "auto",
        revision: str | None = None,
        trust_remote_code: bool | None = False,
        batch_size: int | str | None = 1,
        source: Source | None = None,
        progress: Progress = SILENT,
        **rest: Any,
    ) -> None:
        trusted = bool(trust_remote_code)
        self.source = source or open_model(named(pretrained, base, delta), revision, trusted)
        stream = stream_of(self.source, device or "auto", cast(ComputeDtype, dtype or "auto"))
        note_source(self.source, progress)
        loaded = load_on_kernels(stream, trusted, progress)
        self.kernels = loaded.kernels
        self._progress = progress
        super().__init__(pretrained=loaded.model, tokenizer=self.source.tokenizer(), batch_size=batch_size or 1, **rest)

    def get_model_info(self) -> dict[str, Any]:
        """For the harness's record. A local model is not looked for on the Hub."""
        return {
            "model_num_parameters": self.model.num_parameters(),
            "model_dtype": self.model.dtype,
            "model_revision": "",
            "model_sha": "",
        }

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
        return self._watched("scoring", super().loglikelihood, requests, disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
        return self._watched("scoring texts", super().loglikelihood_rolling, requests, disable_tqdm)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
        return self._watched("answering", super().generate_until, requests, disable_tqdm)

    def _watched(self, name: str, run: Any, requests: list[Any], disable_tqdm: bool) -> Any:
        """The harness tells a cache of every finished request: that moves our bar, in place of its own."""
        if self._progress is SILENT:
            return run(requests, disable_tqdm)
        before = self.cache_hook
        with self._progress.phase(name, len(requests)) as advance:
            self.cache_hook = SimpleNamespace(add_partial=lambda *finished: advance(1))
            try:
                return run(requests, disable_tqdm=True)
            finally:
                self.cache_hook = before
