"""Written by `python -m quantkit.cli.stubs` from quantkit/options/verbs.py."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from quantkit.containers.describe import Inspection
from quantkit.errors import QuantkitError as QuantkitError
from quantkit.errors import UsageError as UsageError
from quantkit.options import DrawnWindows
from quantkit.options.spec import Spec
from quantkit.progress import Progress
from quantkit.runs.ranks import Ranks
from quantkit.verbs.card import CardReport
from quantkit.verbs.chat import ChatReport, Person
from quantkit.verbs.compare import CompareReport
from quantkit.verbs.convert import ConvertReport
from quantkit.verbs.diff import DiffReport
from quantkit.verbs.eval import EvalReport
from quantkit.verbs.generate import GenerateReport
from quantkit.verbs.ggml import GgmlReport
from quantkit.verbs.gptq import GptqReport
from quantkit.verbs.imatrix import ImatrixReport
from quantkit.verbs.merge import MergeReport
from quantkit.verbs.perplexity import PerplexityReport
from quantkit.verbs.publish import PublishReport
from quantkit.verbs.release import ReleaseReport
from quantkit.verbs.samples import SamplesReport
from quantkit.verbs.verify import VerifyReport

__all__ = [
    "QuantkitError",
    "UsageError",
    "__version__",
    "card",
    "chat",
    "compare",
    "convert",
    "diff",
    "eval",
    "generate",
    "ggml",
    "gptq",
    "imatrix",
    "inspect",
    "merge",
    "perplexity",
    "publish",
    "release",
    "samples",
    "tune",
    "verify",
]

__version__: str

def card(
    folder: Path | str,
    *,
    reports: Sequence[Path | str] = ...,
    evals: Sequence[Path | str] = ...,
    siblings: Sequence[str] = ...,
    repo: str | None = ...,
    branch: str = ...,
    branches: Mapping[str, Path | str] = ...,
    quantized_by: str | None = ...,
    force: bool = ...,
    template: str = ...,
    licence: str | None = ...,
    prompt_template: str | None = ...,
    base_model: Sequence[str] = ...,
    original: Path | str | None = ...,
    progress: Progress = ...,
) -> CardReport: ...
def chat(
    model: str | Path | None = ...,
    person: Person | None = ...,
    *,
    base: str | Path | None = ...,
    delta: str | Path | None = ...,
    revision: str | None = ...,
    trust_remote_code: bool = ...,
    system: str | None = ...,
    template: Literal["auto", "chat", "vicuna", "wizardlm-7b", "alpaca", "none"] = ...,
    greedy: bool = ...,
    temperature: float = ...,
    top_p: float = ...,
    top_k: int = ...,
    max_new_tokens: int = ...,
    repetition_penalty: float = ...,
    seed: int = ...,
    dtype: Literal["auto", "float16", "bfloat16", "float32"] = ...,
    device: str = ...,
    progress: Progress = ...,
) -> ChatReport: ...
def compare(
    reference: str | Path,
    variants: Sequence[str | Path],
    out: Path | str,
    *,
    budget: str | int | None = ...,
    max_kl: float | None = ...,
    plots: bool = ...,
    texts: Sequence[str] = ...,
    stride: int | None = ...,
    seq_len: int | None = ...,
    template: Literal["auto", "chat", "vicuna", "wizardlm-7b", "alpaca", "none"] = ...,
    memory: str | int | None = ...,
    dtype: Literal["auto", "float16", "bfloat16", "float32"] = ...,
    device: str = ...,
    revision: str | None = ...,
    trust_remote_code: bool = ...,
    force: bool = ...,
    progress: Progress = ...,
    ranks: Ranks = ...,
) -> CompareReport: ...
def convert(
    model: str | Path,
    out: Path | str | None = ...,
    *,
    dtype: Literal["auto", "float16", "bfloat16", "float32"] = ...,
    revision: str | None = ...,
    trust_remote_code: bool = ...,
    max_shard_size: str | int = ...,
    dry_run: bool = ...,
    force: bool = ...,
    progress: Progress = ...,
) -> ConvertReport: ...
def diff(
    base: str | Path,
    tuned: str | Path,
    out: Path | str,
    *,
    dtype: Literal["auto", "float16", "bfloat16", "float32"] = ...,
    dry_run: bool = ...,
    base_revision: str | None = ...,
    vocab: Literal["auto", "mean", "delta"] = ...,
    expect_sum: float | None = ...,
    revision: str | None = ...,
    trust_remote_code: bool = ...,
    max_shard_size: str | int = ...,
    force: bool = ...,
    progress: Progress = ...,
) -> DiffReport: ...
def eval(
    model: str | Path | None = ...,
    *,
    out: Path | str,
    task: Sequence[str] = ...,
    fewshot: int | None = ...,
    base: str | Path | None = ...,
    delta: str | Path | None = ...,
    revision: str | None = ...,
    trust_remote_code: bool = ...,
    suite: str | None = ...,
    tasks_dir: Path | str | None = ...,
    limit: int | None = ...,
    dtype: Literal["auto", "float16", "bfloat16", "float32"] = ...,
    device: str = ...,
    batch_size: int = ...,
    force: bool = ...,
    progress: Progress = ...,
) -> EvalReport: ...
def generate(
    model: str | Path | None = ...,
    *,
    prompts: Path | str,
    out: Path | str,
    resume: bool = ...,
    dry_run: bool = ...,
    base: str | Path | None = ...,
    delta: str | Path | None = ...,
    revision: str | None = ...,
    trust_remote_code: bool = ...,
    system: str | None = ...,
    template: Literal["auto", "chat", "vicuna", "wizardlm-7b", "alpaca", "none"] = ...,
    greedy: bool = ...,
    temperature: float = ...,
    top_p: float = ...,
    top_k: int = ...,
    num_beams: int = ...,
    max_new_tokens: int = ...,
    repetition_penalty: float = ...,
    seed: int = ...,
    dtype: Literal["auto", "float16", "bfloat16", "float32"] = ...,
    device: str = ...,
    batch_size: int = ...,
    force: bool = ...,
    progress: Progress = ...,
) -> GenerateReport: ...
def ggml(
    model: str | Path | None = ...,
    out: Path | str | None = ...,
    *,
    type: str = ...,
    container: Literal["gguf", "ggjt"] = ...,
    requantize: bool = ...,
    pure: bool = ...,
    imatrix: Path | str | None = ...,
    base: str | Path | None = ...,
    delta: str | Path | None = ...,
    revision: str | None = ...,
    trust_remote_code: bool = ...,
    embedding_type: str = ...,
    output_type: str = ...,
    pre: str | None = ...,
    split_max_size: str | int | None = ...,
    dry_run: bool = ...,
    force: bool = ...,
    progress: Progress = ...,
) -> GgmlReport: ...
def gptq(
    model: str | Path | None = ...,
    out: Path | str | None = ...,
    *,
    ggml: str | None = ...,
    base: str | Path | None = ...,
    delta: str | Path | None = ...,
    revision: str | None = ...,
    trust_remote_code: bool = ...,
    method: Literal["gptq", "round"] = ...,
    bits: int | None = ...,
    group_size: int | None = ...,
    sym: bool | None = ...,
    act_order: Literal["static", "dynamic", "off"] = ...,
    damp: float = ...,
    include: Sequence[str] = ...,
    exclude: Sequence[str] = ...,
    override: Mapping[str, Mapping[str, Any]] = ...,
    embedding_type: str = ...,
    output_type: str = ...,
    pre: str | None = ...,
    calibration: str | DrawnWindows = ...,
    samples: int = ...,
    seq_len: int = ...,
    seed: int = ...,
    template: Literal["auto", "chat", "vicuna", "wizardlm-7b", "alpaca", "none"] = ...,
    evaluate: bool = ...,
    text: str = ...,
    memory: str | int | None = ...,
    dtype: Literal["auto", "float16", "bfloat16", "float32"] = ...,
    device: str = ...,
    checkpoint_every: str = ...,
    resume: bool = ...,
    deterministic: bool = ...,
    format: Literal["gptq", "gptq_v2"] = ...,
    untie: bool = ...,
    max_shard_size: str | int = ...,
    dry_run: bool = ...,
    force: bool = ...,
    progress: Progress = ...,
    ranks: Ranks = ...,
) -> GptqReport: ...
def imatrix(
    model: str | Path | None = ...,
    out: Path | str | None = ...,
    *,
    base: str | Path | None = ...,
    delta: str | Path | None = ...,
    revision: str | None = ...,
    trust_remote_code: bool = ...,
    calibration: str | DrawnWindows = ...,
    samples: int = ...,
    seq_len: int = ...,
    seed: int = ...,
    template: Literal["auto", "chat", "vicuna", "wizardlm-7b", "alpaca", "none"] = ...,
    memory: str | int | None = ...,
    dtype: Literal["auto", "float16", "bfloat16", "float32"] = ...,
    device: str = ...,
    dry_run: bool = ...,
    force: bool = ...,
    progress: Progress = ...,
) -> ImatrixReport: ...
def inspect(
    model: str | Path,
    *,
    revision: str | None = ...,
    trust_remote_code: bool = ...,
) -> Inspection: ...
def merge(
    base: str | Path,
    delta: str | Path,
    out: Path | str,
    *,
    dtype: Literal["auto", "float16", "bfloat16", "float32"] = ...,
    dry_run: bool = ...,
    base_revision: str | None = ...,
    vocab: Literal["auto", "mean", "delta"] = ...,
    expect_sum: float | None = ...,
    revision: str | None = ...,
    trust_remote_code: bool = ...,
    max_shard_size: str | int = ...,
    force: bool = ...,
    progress: Progress = ...,
) -> MergeReport: ...
def perplexity(
    models: Sequence[str | Path],
    *,
    against: str | Path | None = ...,
    text: str = ...,
    stride: int | None = ...,
    seq_len: int | None = ...,
    template: Literal["auto", "chat", "vicuna", "wizardlm-7b", "alpaca", "none"] = ...,
    memory: str | int | None = ...,
    dtype: Literal["auto", "float16", "bfloat16", "float32"] = ...,
    device: str = ...,
    revision: str | None = ...,
    trust_remote_code: bool = ...,
    progress: Progress = ...,
    ranks: Ranks = ...,
) -> PerplexityReport: ...
def publish(
    folder: Path | str,
    repo: str,
    *,
    branch: str = ...,
    only: Sequence[str] = ...,
    delete: bool = ...,
    message: str | None = ...,
    verify: bool = ...,
    dry_run: bool = ...,
    public: bool = ...,
    progress: Progress = ...,
) -> PublishReport: ...
def release(
    recipe: Path | str | Spec,
    out: Path | str | None = ...,
    *,
    publishing: bool = ...,
    debug: bool = ...,
    trust_remote_code: bool = ...,
    dry_run: bool = ...,
    progress: Progress = ...,
) -> ReleaseReport: ...
def samples(
    model: str | Path | None = ...,
    *,
    revision: str | None = ...,
    trust_remote_code: bool = ...,
    calibration: str | DrawnWindows = ...,
    samples: int = ...,
    seq_len: int = ...,
    seed: int = ...,
    template: Literal["auto", "chat", "vicuna", "wizardlm-7b", "alpaca", "none"] = ...,
    evaluate: bool = ...,
    text: str = ...,
    progress: Progress = ...,
) -> SamplesReport: ...
def tune(
) -> None: ...
def verify(
    path: Path | str,
    *,
    generate: bool = ...,
    device: str = ...,
    progress: Progress = ...,
) -> VerifyReport: ...
