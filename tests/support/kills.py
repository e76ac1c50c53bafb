"""SIGKILLs of every verb that writes, at any moment: what stands, and what the next run leaves.

Each verb runs in a process that is forked after the imports. Kills fall anywhere in its time, half of them when its
output takes its place. What was there, or what comes, stands whole at every moment; after the next run nothing else is
left. Three ways each: where nothing is, over an output with `--force`, and that without renameat2(2) (`plain`), where
the next command alone puts back what a kill between two renames took.

    python tests/support/kills.py FOLDER --kills 30             # docs/outputs.md has the counts
    python tests/support/kills.py FOLDER --kills 3 --only convert --only release
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parents[1])]

from conftest import random_model, train_tokenizer  # noqa: E402

from support.recipes import SMALL, write_recipe  # noqa: E402
from support.wizard import wizard  # noqa: E402

DATA = "--calibration data.jsonl --samples 4 --seq-len 32"
ASKED = "--prompts prompts.jsonl --max-new-tokens 12 --batch-size 1"
WAYS = ("new", "force", "plain")


@dataclass(frozen=True)
class Verb:
    """A command line, what makes its result another one, and whether it goes on with what a kill left."""

    line: str
    one: str
    other: str
    out: str = "out"
    resumes: bool = False


VERBS = {
    "convert": Verb("convert llama", "--dtype float16", "--dtype float32"),
    "merge": Verb("merge wizard-base wizard-delta --vocab mean", "--dtype float16", "--dtype float32"),
    "ggml": Verb("ggml llama --pre gpt-2", "--type q8_0", "--type q4_0"),
    "ggml-parts": Verb("ggml llama --pre gpt-2 --split-max-size 60KB", "--type f16", "--type bf16", "out.gguf"),
    "imatrix": Verb(f"imatrix llama {DATA}", "--seed 0", "--seed 1"),
    "gptq": Verb(f"gptq llama {DATA} --no-eval --group-size 32", "--bits 4", "--bits 8", resumes=True),
    "compare": Verb("compare llama other --text text.txt --no-plots", "--seq-len 32", "--seq-len 64"),
    "generate": Verb(f"generate llama {ASKED}", "--seed 0", "--seed 1", resumes=True),
    "release": Verb("release", "recipe.yaml", "other.yaml", resumes=True),
}


def make_inputs(folder: Path) -> None:
    """Models, texts, prompts and recipes."""
    folder.mkdir(parents=True, exist_ok=True)
    import torch

    for seed, name in enumerate(("llama", "other")):
        random_model("llama", tied=False, dtype=torch.float16, seed=seed).save_pretrained(folder / name)
        train_tokenizer().save_pretrained(folder / name)
    (folder / "pair").mkdir()
    base, _, delta = wizard(folder / "pair")
    base.rename(folder / "wizard-base")
    delta.rename(folder / "wizard-delta")
    line = "the quick brown fox jumps over the lazy dog while the user asks the assistant a question about the sea\n"
    records = [{"id": f"r{i}", "instruction": line[i:], "output": line * 2} for i in range(40)]
    (folder / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "prompts.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records[:4]))
    recipe = SMALL.replace("model: model", "model: llama")
    (folder / "other.yaml").write_text(recipe.replace("group_size: 32", "group_size: 32, damp: 0.2"))
    write_recipe(folder, recipe)


def start(line: str, plain: bool) -> int:
    """The command in a process of its own, whose number this is."""
    child = os.fork()
    if child:
        return child
    with open("said", "w") as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
    if plain:
        from quantkit.runs import renames

        renames._renameat2 = lambda *_: False
    from quantkit.cli import app

    code = 0
    try:
        app.main(line.split())
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        Path("imported").write_text("\n".join(sys.modules))
        os._exit(code)


def run(line: str, plain: bool = False, good: Sequence[int] = (0,)) -> int:
    """The exit code of a command, which is one of those."""
    code = os.waitstatus_to_exitcode(os.waitpid(start(line, plain), 0)[1])
    assert code in good, f"{line}: {code}: {Path('said').read_text()}"
    return code


def warm(line: str) -> None:
    """A command, whose process tells what it has imported: this one has it then, and those to come need not."""
    run(line)
    for name in Path("imported").read_text().split():
        with contextlib.suppress(Exception):
            importlib.import_module(name)


def moment(child: int, staging: Path, seconds: float, chance: random.Random) -> None:
    """Wait until a random moment of a run, or until its output takes its place and a little longer."""
    if chance.random() < 0.5:
        time.sleep(chance.uniform(0, seconds))
        return
    while os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        with contextlib.suppress(OSError):
            if b'"placing"' in (staging / "journal").read_bytes():
                break
    time.sleep(chance.uniform(0, 0.004))


def standing(out: str) -> dict[str, bytes]:
    """All that begins with an output's name, but for the notes of a release."""
    stem = out.removesuffix(".gguf")
    found = (path for top in Path().glob(f"{stem}*") for path in (top, *top.rglob("*")))
    return {
        str(path): path.read_bytes()
        for path in found
        if path.is_file() and not {".release", "said"} & set(path.parts) and ".unfinished" not in str(path)
    }


def litter(out: str) -> list[str]:
    """What is hidden beside an output or in it, and is no note of a release."""
    beside = [path for path in Path().glob(".*") if out.removesuffix(".gguf") in path.name]
    inside = [path for path in Path(out).rglob(".*") if path.name != ".release"]
    return [str(path) for path in (*beside, *inside)]


def whole(now: dict[str, bytes], *whole_ones: dict[str, bytes]) -> bool:
    """Whether what stands is one of those."""
    return any(now == one for one in whole_ones)


def kill_one(name: str, way: str, kills: int, chance: random.Random) -> Iterator[str]:
    """So many kills of a verb in one way; yields what was found after each, "before" or "after" it took its place."""
    verb = VERBS[name]
    of_release, plain = name == "release", way == "plain"
    first, second = (f"{verb.line} {how} --out {verb.out} --device cpu -q" for how in (verb.one, verb.other))
    if name in ("convert", "merge", "ggml", "ggml-parts", "release"):
        first, second = (line.replace(" --device cpu", "") for line in (first, second))
    remove(verb.out)
    warm(first)
    one = standing(verb.out)
    began = time.monotonic()
    run(second if of_release else f"{second} --force")
    other, seconds = standing(verb.out), time.monotonic() - began
    assert one != other
    assert one
    while kills:
        remove(verb.out)
        wanted, goal = (first, one) if way == "new" else (second, other)
        if way != "new":
            run(first)
        force = "" if way == "new" or of_release else " --force"
        again = verb.resumes and not of_release
        while kills:  # a run that goes on is killed more than once
            child = start(wanted + force, plain)
            moment(child, Path(f".{verb.out}.unfinished"), seconds, chance)
            os.kill(child, signal.SIGKILL)
            if os.waitpid(child, 0)[1] != signal.SIGKILL:
                break  # it was done before
            kills -= 1
            now = standing(verb.out)
            yield "after" if now == goal else "before"
            if of_release:
                check_variants(Path(verb.out))
            elif name == "ggml-parts":  # several files take their places one after another
                assert all(content in (one.get(path), other.get(path)) for path, content in now.items()), way
            else:
                assert whole(now, *([goal, {}] if way == "new" else [one, other])) or (plain and not now), (name, way)
            if way != "new" and not of_release:
                run(wanted, plain, (2,))  # which puts back what a kill between two renames took
                now = standing(verb.out)
                assert whole(now, one, other), (name, way, "then", Path("said").read_text())
            if of_release:
                continue
            if again and way == "new" and chance.random() < 0.5:
                force = " --resume"
                continue
            break
        if way == "new" and standing(verb.out) == goal and not of_release:
            run(wanted, plain, (2,))  # it is there already; what the kill left is swept all the same
        else:
            run(wanted + (" --resume" if again and way == "new" else force), plain)
        assert standing(verb.out) == goal, (name, way)
        assert litter(verb.out) == [], (name, way, litter(verb.out))


def check_variants(out: Path) -> None:
    """Every folder of a release that has a record holds what that says."""
    from quantkit.runs.atomic import file_sha256

    for record in out.glob("*/quantkit.json"):
        for file, digest in json.loads(record.read_text()).get("files", {}).items():
            assert file_sha256(record.parent / file) == digest, record.parent / file


def remove(out: str) -> None:
    stem = out.removesuffix(".gguf")
    for path in (*Path().glob(f"{stem}*"), *Path().glob(f".{stem}*")):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=3, help="of each verb in each way")
    parser.add_argument("--only", action="append", choices=VERBS)
    parser.add_argument("--way", action="append", choices=WAYS)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    os.environ["TQDM_DISABLE"] = "1"
    if not (args.folder / "recipe.yaml").exists():
        make_inputs(args.folder)
    os.chdir(args.folder)
    import quantkit.verbs.release  # noqa: F401  # all verbs, before the forks

    for name in args.only or VERBS:
        for way in args.way or (WAYS if name != "release" else WAYS[:2]):
            began, chance = time.monotonic(), random.Random(f"{name} {way} {args.seed}")
            found = list(kill_one(name, way, args.kills, chance))
            took = f"{time.monotonic() - began:.0f} s"
            print(f"{name} {way}: {len(found)} kills, {found.count('after')} when it had its place, {took}", flush=True)


if __name__ == "__main__":
    main()
