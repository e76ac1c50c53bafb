"""ctransformers as a judge: reads ggjt v3 files and GGUF files of Llamas. Runs in its own environment."""

from serve import serve  # isort: skip

import numpy as np
from ctransformers.llm import LLM, Config
from safetensors.numpy import save_file


def logits(path: str, ids: list[list[int]], out: str) -> dict:
    """Write `logits` float32 [prompts, tokens, vocab] to `out`.

    The library keeps the logits of the last token only, so tokens go in one by one.
    """
    longest = max(map(len, ids))
    model = LLM(path, "llama", config=Config(context_length=longest, threads=1, batch_size=1), lib="avx2")
    rows = []
    for row in ids:
        model.reset()
        for token in row:
            model.eval([token], batch_size=1, threads=1)
            rows.append(np.array(model.logits, dtype=np.float32))
        rows.extend([np.full_like(rows[-1], np.nan)] * (longest - len(row)))
    save_file({"logits": np.stack(rows).reshape(len(ids), longest, -1)}, out)
    return {}


def tokens(path: str, text: str) -> dict:
    """What the file's own vocabulary makes of a text, without a BOS."""
    return {"ids": list(LLM(path, "llama", lib="avx2").tokenize(text, add_bos_token=False))}


if __name__ == "__main__":
    serve({"logits": logits, "tokens": tokens})
