"""Train a small Llama of width 512 on a CPU, for judging block types whose blocks are 256 wide.

SmolLM2's width of 576 is no multiple of 256, so most of its tensors have no K-quant at all. This model's have: hidden
width 512, 1024 inside the MLP, 4 blocks, 8 heads over 4 of keys and values, a tied embedding of 4096 pieces of a
SentencePiece-like vocabulary; 12 million weights.

The text is the King James Version in Debian's bible-kjv-text 4.38 (the text itself: in the public domain outside the
United Kingdom; the program that prints it: free use with its notice, changes under GPL 2 or later):

    apt-get install bible-kjv bible-kjv-text
    bible -f ge1:1-re22:21 > kjv.txt
    python benchmarks/train_llama.py kjv.txt --out build/benchmarks/llama512

The last twentieth of the text is never trained on; the folder holds it as heldout.txt beside the rest, train.txt. Equal
seeds and threads give equal weights. Some 12 minutes on two quiet cores.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 4096
WINDOW = 512
_SPECIAL = ("<unk>", "<s>", "</s>")
_VERSE = re.compile(r"(\d?[A-Za-z]+\d+):\d+ (.*)")

_README = """# A Llama of width 512, to measure with

Made by quantkit's `benchmarks/train_llama.py` with seed {seed}: {steps} steps of {batch} windows of {window} tokens.
Perplexity on `heldout.txt`: {perplexity:.1f} (a vocabulary of {vocabulary}). It is good for nothing but measuring.

Text: the King James Version, from Debian's package bible-kjv-text 4.38 (in the public domain outside the United
Kingdom); `train.txt` is what the model was trained on, `heldout.txt` what it never saw.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, help="the output of the command above")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=2, help="windows a step")
    parser.add_argument("--rate", type=float, default=1.5e-3, help="largest learning rate")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    train, heldout = split(args.text.read_text(encoding="utf-8"))
    tokenizer = train_tokenizer(train)
    model = LlamaForCausalLM(config())
    started = time.perf_counter()
    fit(model, windows(tokenizer, train), args)
    perplexity = judge(model, windows(tokenizer, heldout))
    print(f"held-out perplexity {perplexity:.2f} after {time.perf_counter() - started:.0f} s", flush=True)

    shutil.rmtree(args.out, ignore_errors=True)
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    (args.out / "train.txt").write_text(train, encoding="utf-8")
    (args.out / "heldout.txt").write_text(heldout, encoding="utf-8")
    facts = {"seed": args.seed, "steps": args.steps, "batch": args.batch, "window": WINDOW, "vocabulary": VOCABULARY}
    (args.out / "README.md").write_text(_README.format(**facts, perplexity=perplexity), encoding="utf-8")


def split(printed: str) -> tuple[str, str]:
    """The verses without their numbers, a line a chapter; the last twentieth of the lines apart."""
    chapters: dict[str, list[str]] = {}
    for line in printed.splitlines():
        verse = _VERSE.fullmatch(line)
        if verse is None:
            raise SystemExit(f"not a verse: {line!r}; give the output of: bible -f ge1:1-re22:21")
        chapters.setdefault(verse[1], []).append(verse[2])
    lines = [" ".join(verses) for verses in chapters.values()]
    first = len(lines) - len(lines) // 20
    return "\n".join(lines[:first]) + "\n", "\n".join(lines[first:]) + "\n"


def train_tokenizer(text: str) -> PreTrainedTokenizerFast:
    """A BPE over words with their space in front that falls back on bytes, as Llama 2's; adds no BOS."""
    learner = Tokenizer(models.BPE())
    # No piece crosses a word or a punctuation mark, so that the pieces need no rules for cutting later.
    learner.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation()])
    count = VOCABULARY - len(_SPECIAL) - 256
    learner.train_from_iterator(text.splitlines(), trainers.BpeTrainer(vocab_size=count, show_progress=False))
    learned = json.loads(learner.to_str())["model"]
    pieces = sorted(learned["vocab"], key=learned["vocab"].__getitem__)
    names = [*_SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    vocabulary = {name: id_ for id_, name in enumerate(names)}
    merges = [(left, right) for left, right in learned["merges"]]
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", model_max_length=WINDOW
    )


def config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=WINDOW,
        tie_word_embeddings=True,
        bos_token_id=_SPECIAL.index("<s>"),
        eos_token_id=_SPECIAL.index("</s>"),
    )


def windows(tokenizer: Any, text: str) -> torch.Tensor:
    """int64 [count, WINDOW]; a last, short window is left out."""
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    return ids[: len(ids) // WINDOW * WINDOW].reshape(-1, WINDOW)


def fit(model: Any, tokens: torch.Tensor, args: argparse.Namespace) -> None:
    """Warm up for a fifteenth of the steps, then a half cosine down to a twentieth of the rate."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.rate, betas=(0.9, 0.95), fused=True)
    warm = max(1, args.steps // 15)

    def rate(step: int) -> float:
        turn = min(1.0, max(0, step - warm) / max(1, args.steps - warm))
        return min(1.0, (step + 1) / warm) * (0.05 + 0.475 * (1 + math.cos(math.pi * turn)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    passes = math.ceil(args.steps * args.batch / len(tokens))
    order = torch.cat([torch.randperm(len(tokens)) for _ in range(passes)])
    print(f"{len(tokens)} windows, {sum(p.numel() for p in model.parameters()):,} weights", flush=True)
    started = time.perf_counter()
    for step in range(args.steps):
        batch = tokens[order[step * args.batch : (step + 1) * args.batch]]
        loss = model(batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 49:
            print(f"step {step + 1}: loss {loss.item():.3f}, {time.perf_counter() - started:.0f} s", flush=True)


@torch.no_grad()
def judge(model: Any, tokens: torch.Tensor) -> float:
    """Perplexity."""
    model.eval()
    losses = [model(window[None], labels=window[None]).loss.item() for window in tokens]
    return math.exp(sum(losses) / len(losses))


if __name__ == "__main__":
    main()
