"""A small report of every verb, and what is said of it: reports.json holds its JSON and its lines."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from quantkit.containers.describe import Inspection
from quantkit.evaluate.statistics import KlDivergence, ModelResult, Numbers
from quantkit.quantize.allocate import Share, Spent
from quantkit.quantize.layers import LayerStatistics
from quantkit.quantize.tuning import RefiningReport
from quantkit.report import Report
from quantkit.runs.steps import Outcome
from quantkit.tokens import Part, Provenance, TokenMatrix, Turn
from quantkit.verbs.card import CardReport
from quantkit.verbs.chat import ChatReport
from quantkit.verbs.compare import CompareReport
from quantkit.verbs.compare.answers import Agreement, Answers, AskedPrompt, Said
from quantkit.verbs.compare.chooser import Recommendation
from quantkit.verbs.compare.rows import ComparedModel, TextFacts, TextResult
from quantkit.verbs.convert import ConvertReport
from quantkit.verbs.diff import DiffReport
from quantkit.verbs.eval import EvalReport, EvalResults, Harness
from quantkit.verbs.eval.tasks import TaskResult
from quantkit.verbs.generate import GenerateReport
from quantkit.verbs.ggml import GgmlReport, GgmlTensor
from quantkit.verbs.gptq import GptqReport
from quantkit.verbs.imatrix import ImatrixReport
from quantkit.verbs.merge import MergeReport
from quantkit.verbs.perplexity import PerplexityReport
from quantkit.verbs.publish import PublishReport
from quantkit.verbs.publish.files import Change
from quantkit.verbs.release import ReleaseReport
from quantkit.verbs.release.forecast import Forecast
from quantkit.verbs.repack import RepackReport
from quantkit.verbs.samples import SamplesReport
from quantkit.verbs.verify import Verified, VerifyReport
from quantkit.verbs.verify.programs import Load

SAID: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
"""By the case: "json", where it is the first of its kind, and "text", where it has any."""

OUT = Path("/models/out:x:")
KL = KlDivergence(0.0123, 0.004, 0.03, 0.2, 0.5, 1.25)
SOURCE = Numbers(12.345678, 0.25, None, None, None, None)
OWN = Numbers(13.0, 0.26, KL, 0.9375, 0.0517, 0.0021, kl_divergence_stderr=0.00075, top1_agreement_stderr=0.0044)
ROWS = [ModelResult(model="tiny-fp16", **vars(SOURCE)), ModelResult(model="tiny-GPTQ-4bit-128g", **vars(OWN))]
ALONE = PerplexityReport("wikitext2", 2048, None, 4096, ROWS[:1])
COMPARED = PerplexityReport("heldout.jsonl", 512, 256, 3000, ROWS, "float16 from Q4_1")
GPTQ = GptqReport(
    out=OUT,
    model=OUT,
    ggml=None,
    bits=4,
    group_size=128,
    sym=True,
    act_order="static",
    bits_per_weight=4.156,
    bytes=123456789,
    memory_bytes=2345678901,
    multiplications=4_000_000_000_000,
    shared_multiplications=3_000_000_000_000,
    memory_remark="hidden states go to the disk",
    dry_run=True,
)
LAYERS = [LayerStatistics("model.layers.0.q_proj", 0.5, 1.25, 0.1, "", 2048, 0.75)]
REFINED = RefiningReport(0.15, 0.125, step=24, steps=32, windows=16)
SHARES = [Share(3, 64, 0.25), Share(4, 64, 0.7375), Share(8, 128, 0.0125), Share(8, -1, 0.0)]
SPENT = Spent("4.5bpw", 87_000_000, 173_000_000, SHARES, 4, 64, 4.499, 116_000_000, 0.0987654, 0.00001)
UNSPENT = replace(SPENT, shares=[replace(share, weights=None) for share in SHARES], bits=3, predicted=None, gap=None)
PART = Part(
    dataset="fox.jsonl",
    dataset_sha256="ab" * 32,
    license=None,
    weight=0.5,
    samples=2,
    records=("3", "1"),
    first_records=None,
    dropped=0,
)
FACTS = Provenance(
    dataset="alpaca",
    dataset_sha256="cd" * 32,
    license="cc-by-nc-4.0",
    records=("7", "4", "2"),
    template="alpaca",
    bos="window",
    seed=0,
    seq_len=32,
    samples_asked=2,
    samples=2,
    tokens_sha256="ef" * 32,
    dropped=3,
)
MIXED = FACTS.model_copy(
    update={
        "records": (),
        "parts": (PART, PART.model_copy(update={"dataset": "dog.jsonl", "license": "mit", "dropped": 2})),
    }
)
WINDOWS = ["Once [bold]upon a time\nthere was :smile: a fox", "second window"]


def samples(facts: Provenance) -> SamplesReport:
    return SamplesReport(TokenMatrix(torch.zeros(2, 32, dtype=torch.int64), facts), WINDOWS)


TOP = [{"token": " the", "probability": 0.5}]
WORST = ({"window": 0, "position": 5, "kl": 1.25, "context": "a b", "target": " c", "reference_top": TOP, "top": TOP},)


def compared(name: str, bytes: int, result: Numbers, layers: list[float] | None) -> ComparedModel:
    reference = layers is None
    return ComparedModel(
        model=name,
        kind="hf" if reference else "gptq",
        scheme="GPTQ 4-bit",
        reference=reference,
        bytes=bytes,
        bits_per_weight=4.156,
        files={"model.safetensors": "ab" * 32},
        pareto=reference,
        texts={"wikitext2": TextResult(**vars(result), worst=() if reference else WORST)},
        layers=layers,
        precision="float16 from Q4_1" if reference else "GPTQ 4-bit",
    )


AGREES = {"tiny-GPTQ-4bit-128g": Agreement(1, 0.0, 3)}
ANSWERED = {"tiny-fp16": Said("a sea", "eos", 5), "tiny-GPTQ-4bit-128g": Said("a sun", "length", 8, 3, (2, 5))}
ASKED = [AskedPrompt("e0", "tides", "what?", 9, ANSWERED)]
COMPARE = CompareReport(
    OUT,
    "tiny-fp16",
    [TextFacts("wikitext2", 4096, 2048, None, "ef" * 32)],
    [
        compared("tiny-fp16", 269_000_000, SOURCE, None),
        compared("tiny-GPTQ-4bit-128g", 99_000_000, OWN, [0.001, 0.0025]),
    ],
    Recommendation("tiny-GPTQ-4bit-128g", "of the 1 of 1 variants within 100,000,000 bytes it diverges least"),
    None,
    Answers("asked.jsonl", "chat", 128, "cd" * 32, AGREES, {"tides": AGREES}, ASKED),
    quantkit="0.1.0",
)
TASKS = (
    TaskResult(
        "arc_challenge",
        "ARC (25-Shot)",
        "allenai/ai2_arc",
        "test",
        25,
        "acc_norm",
        0.5725,
        0.0144,
        1172,
        "ARC-Challenge",
    ),
    TaskResult("own", "own", None, None, None, "perplexity", 12.5, None, 10),
)
RESULTS = EvalResults(
    quantkit="0.1.0",
    model="tiny",
    files={"model.safetensors": "ab" * 32},
    harness=Harness("lm-evaluation-harness", "0.4.9"),
    kernels=None,
    suite="open-llm-leaderboard",
    limit=10,
    partial=True,
    tasks=TASKS,
    average=0.5725,
)
EVAL = EvalReport(**vars(RESULTS), out=OUT, seconds=12.5)
LOADS = (
    Load("transformers", True, "", (1, 2), {4: "3 key-value heads"}),
    Load("vLLM", False, "needs a group of 128"),
    Load("SGLang", True, "", (1,)),
)
VERIFIED = Verified(
    "tiny-GPTQ",
    "gptq",
    ("model.safetensors: damaged; download it again",),
    ("no checksums",),
    LOADS,
    "Once  upon\na time",
)
MERGE = MergeReport(OUT, "float16", "mean", 291, 13_000_000_000, 50637.1875, 61.25, memory_bytes=1_570_000_000)
DIFF = DiffReport(
    *(OUT, "float16", None, 291, 13_000_000_000, 50637.1875, 61.25, False, 1000, 3, 0.000123),
    memory_bytes=1_570_000_000,
)
REPACK = RepackReport(OUT, "compressed-tensors", 210, 141_000_000, 3.75, memory_bytes=226_000_000)
CONVERT = ConvertReport(OUT, "bfloat16", 272, 269_000_000, 3.75, memory_bytes=226_000_000)
IMATRIX = ImatrixReport(
    *(OUT, 210, 128, 512, 900_000, 1_500_000_000, {"blk.0.ffn_up_exps.weight": 3}, 12.25),
    multiplications=7_000_000_000_000,
)
GENERATE = GenerateReport(OUT, "chat", "numba", 12, 2, {"eos": 9, "length": 1}, 340, 1000, 61, 33.25)
GGML = GgmlReport(
    OUT,
    91_000_000,
    [GgmlTensor("blk.0.attn_q.weight", "Q4_0", "exact"), GgmlTensor("output_norm.weight", "F32", None)],
    {"blk.0.attn_q.weight": "Q8_0"},
    4.25,
    memory_bytes=339_000_000,
)
PUBLISH = PublishReport(
    "me/tiny",
    "main",
    True,
    True,
    [
        Change("README.md", "new", 1234),
        Change("config.json", "same", 99),
        Change("old.bin", "deleted", 5_000_000),
        Change(".gitattributes", "deleted", 12),
    ],
    1234,
    None,
    True,
)
OUTCOMES = [
    Outcome("convert", "unchanged"),
    Outcome("gptq 4bit", "done"),
    Outcome("ggml q5", "failed", "no [room]"),
    Outcome("card", "skipped", "ggml q5 is missing"),
    Outcome("ggml q2", "refused", "too small"),
]
FORECASTS = [
    Forecast("convert", 269_000_000, 1_000_000_000, 12.0),
    Forecast("gptq 3bit", refused="no such group"),
    Forecast("compare", 0, 2_000_000_000, 5500.0),
]
CARD = CardReport(
    OUT,
    "default",
    ["tiny.Q4_0.gguf", "tiny.F16.gguf"],
    "mit",
    ["me/base"],
    ["tiny.Q4_0.gguf"],
    ["kl.png"],
    ["its licence"],
)
CHAT = ChatReport("tiny", "chat", None, (Turn("user", "hello"), Turn("assistant", "hi")))
INSPECTION = Inspection(
    "tiny",
    "gptq",
    "llama",
    "GPTQ 4-bit symmetric",
    135_000_000,
    4.5,
    99_000_000,
    {"I32": 2, "F16": 1},
    {"bits": 4},
    [
        {"name": "model.embed.weight", "shape": [49152, 576], "type": "F16", "bytes": 56623104},
        {"name": "n", "shape": [], "type": "I32", "bytes": 4},
    ],
)

CASES: dict[str, Report] = {
    "card": CARD,
    "card of one": replace(CARD, models=["tiny"], plots=[]),
    "chat": CHAT,
    "compare": COMPARE,
    "compare without a choice": replace(COMPARE, choice=None, unmet="no variant is within 5 bytes"),
    "convert": CONVERT,
    "convert, dry run": replace(CONVERT, dry_run=True),
    "diff": DIFF,
    "diff without loss": replace(DIFF, differing=0),
    "eval": EVAL,
    "eval's file": RESULTS,
    "eval of tasks": replace(EVAL, limit=None, partial=False, suite=None, average=None, kernels="numba"),
    "generate": GENERATE,
    "generate, dry run": replace(GENERATE, dry_run=True),
    "generate anew": replace(GENERATE, resumed=0, finished={"eos": 12}),
    "ggml": GGML,
    "ggml, dry run": replace(GGML, dry_run=True),
    "gptq": replace(GPTQ, dry_run=False, layers=LAYERS, evaluation=COMPARED, refined=REFINED, seconds=99.5),
    "gptq, dry run": GPTQ,
    "gptq to a budget": replace(
        GPTQ, dry_run=False, layers=LAYERS, budget=SPENT, predicted=0.1, evaluation=COMPARED, seconds=99.5
    ),
    "gptq to a budget, dry run": replace(GPTQ, budget=UNSPENT),
    "gptq into folders": replace(GPTQ, folders={"gptq": 63_456_789, "mlx": 60_000_000}, memory_remark=None),
    "gptq of all": replace(GPTQ, end_bits={"head": 8, "embeddings": 6}, memory_remark=None),
    "gptq to a file": replace(GPTQ, ggml="q4_k_m", memory_remark=None),
    "imatrix": IMATRIX,
    "imatrix, dry run": replace(IMATRIX, dry_run=True, unseen={}),
    "inspect": INSPECTION,
    "inspect --tensors": INSPECTION,
    "merge": MERGE,
    "merge, dry run": replace(MERGE, sum=None, dry_run=True),
    "perplexity": ALONE,
    "perplexity against another": COMPARED,
    "publish": replace(PUBLISH, dry_run=False, commit="abc123"),
    "publish, dry run": PUBLISH,
    "publish nothing": replace(PUBLISH, changes=PUBLISH.changes[1:2], created=False),
    "repack": REPACK,
    "repack, dry run": replace(REPACK, dry_run=True),
    "release": ReleaseReport(OUT, [], OUTCOMES),
    "release, complete": ReleaseReport(OUT, [], OUTCOMES[:2]),
    "release, dry run": ReleaseReport(OUT, FORECASTS, dry_run=True),
    "samples": samples(FACTS),
    "samples of a mixture": samples(MIXED),
    "verify": VerifyReport("tiny", (VERIFIED, Verified("b", "gguf", ())), ("two models",)),
    "verify without problems": VerifyReport("tiny", (Verified("b", "gguf", ()),)),
}
DISPLAY = {"inspect --tensors": {"tensors": True}, "samples of a mixture": {"show": 2}}
