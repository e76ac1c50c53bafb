"""lm-evaluation-harness with quantkit's models in it: ``python -m quantkit.harness``, `register` for programs."""

from quantkit.verbs.eval.register import NAME, register, run_harness

__all__ = ["NAME", "register"]

if __name__ == "__main__":
    run_harness()
