"""Suites of tasks whose numbers people compare: a table."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Measure:
    """One number of a suite.

    Attributes:
        task: the harness's name for it.
        folder: where below the harness's tasks it is described.
        title: what the leaderboard calls it.
        fewshot: examples before each question.
        metric: what the leaderboard calls the number.
        key: what the harness does, metric and filter.
    """

    task: str
    folder: str
    title: str
    fewshot: int
    metric: str
    key: str


# The Open LLM Leaderboard of 2023 (its first version). Its GSM8k looked for the number after "####": the strict filter.
SUITES: dict[str, tuple[Measure, ...]] = {
    "open-llm-leaderboard": (
        Measure("arc_challenge", "arc", "AI2 Reasoning Challenge (25-Shot)", 25, "acc_norm", "acc_norm,none"),
        Measure("hellaswag", "hellaswag", "HellaSwag (10-Shot)", 10, "acc_norm", "acc_norm,none"),
        Measure("mmlu", "mmlu/default", "MMLU (5-Shot)", 5, "acc", "acc,none"),
        Measure("truthfulqa_mc2", "truthfulqa", "TruthfulQA (0-shot)", 0, "mc2", "acc,none"),
        Measure("winogrande", "winogrande", "Winogrande (5-shot)", 5, "acc", "acc,none"),
        Measure("gsm8k", "gsm8k", "GSM8k (5-shot)", 5, "acc", "exact_match,strict-match"),
    )
}
