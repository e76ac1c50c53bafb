"""The work of `gptq`: from calibration windows to a folder in its place."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from quantkit.blocks.states import HiddenStates
from quantkit.blocks.stream import ModelStream
from quantkit.codes import Codes, put_together
from quantkit.codes.carried import Carried
from quantkit.codes.kinds import Kind
from quantkit.containers import own_options
from quantkit.options import EndBits, Ends, QuantSpec, parse_size
from quantkit.options.grid import REFINE_STEPS
from quantkit.options.values import Every, parse_every
from quantkit.options.verbs import Gptq
from quantkit.progress import SILENT, Progress
from quantkit.quantize.allocate import Allocator
from quantkit.quantize.blockwise import OnLinear, corrects, quantize_blocks
from quantkit.quantize.coded_ends import embedding_of, head_of, quantize_head, read_rounded_codes, round_embedding
from quantkit.quantize.layers import EndStatistics, LayerStatistics, recorded_layers, write_layer_table
from quantkit.quantize.sharing import Sharing
from quantkit.quantize.targets import CodesWriter, Folders, Target
from quantkit.quantize.token_weights import Gradients, TokenWeights, token_weights
from quantkit.quantize.trials import Choice, chosen_for, losses_of_ends
from quantkit.quantize.tuning import Refined, refine_run
from quantkit.runs.atomic import REPORT_NAME, fingerprint, write_json
from quantkit.runs.journal import Journal
from quantkit.runs.landing import NOTHING, Landed, LandedLinear, Lander, find_landed, landed_blocks
from quantkit.runs.ranks import ALONE, Ranks
from quantkit.runs.record import check_unchanged, checksums, companions, origin
from quantkit.runs.shared_weights import is_sharing
from quantkit.runs.unfinished import Run, drop_unfinished, finished, working
from quantkit.tokens import TokenMatrix
from quantkit.verbs.gptq.checks import check_finite, warn_starved_experts
from quantkit.verbs.gptq.drawing import draw_budget
from quantkit.verbs.gptq.plan import is_weighted


def made(
    place: Path,
    stream: ModelStream,
    matrix: TokenMatrix,
    target: Target,
    allocator: Allocator | None,
    spec: QuantSpec,
    options: Gptq,
    ranks: Ranks,
    sha256: Callable[[Path], str],
    progress: Progress,
) -> tuple[dict[str, Any], list[LayerStatistics]]:
    """The quantkit.json of the output, which is made unless it is there, and what happened to each Linear. `sha256`
    gives that of the source's files, on the first rank."""
    sharing, every = Sharing(ranks, options.deterministic), parse_every(options.checkpoint_every)
    weighted = is_weighted(spec)
    unsaid = {"ggml"} | ({"method"} if spec.method == "gptq" else set()) | (set() if weighted else {"token_weights"})
    unsaid |= (set() if corrects(spec) else {"correct"}) | (
        set() if weighted and spec.row_feedback else {"row_feedback"}
    )
    unsaid |= {0: {"refine", "refine_steps"}, REFINE_STEPS: {"refine_steps"}}.get(spec.refining, set())
    unsaid |= set() if spec.experts == "all" and spec.method == "gptq" else {"experts"}
    of_file = {"ggml": options.ggml, **options.part(Ends).model_dump()}
    of_folder = {"format": options.format} | options.model_dump(include=own_options(), exclude_defaults=True)
    of_folder |= options.part(EndBits).given | ({"untie": True} if options.head is not None and options.untie else {})
    of_folder |= {"mtp": options.mtp} if options.mtp != "keep" else {}
    recipe = spec.model_dump(exclude=unsaid) | (of_folder if options.ggml is None else of_file)
    # Runs that share weights may make a GGUF file, which has its embedding and output matrix rounded.
    ends = options.ggml is not None or bool(options.part(EndBits).given) or is_sharing()
    gradients = Gradients(options.seed, spec.row_feedback, ends) if weighted else None
    recipe |= {"seed": options.seed} if weighted else {}
    if allocator is not None:
        chosen_for = {"budget": str(options.budget), "budget_for": options.budget_for}
        recipe |= {"bits": None, "group_size": None, **chosen_for}
    sharing.check_alike(stream, recipe)

    def decides() -> dict[str, Any]:
        """What of quantkit.json is known before the work: everything that decides the result."""
        with progress.phase("hashing the source", 1) as advance:
            known = {"recipe": recipe, **origin(stream.source, sha256), "compute": sharing.compute(stream)}
            advance(1)
        return known | {"calibration": matrix.provenance.model_dump(mode="json")}

    if not options.resume:  # while the source is hashed; what is gone on with may have been checked
        check_finite(stream, target, progress, ranks)
    decided = ranks.from_first(decides)
    record = ranks.from_first(lambda: finished(place, decided) if options.resume else None)
    if record is not None:
        progress.note(f"{place} is complete already")
        if ranks.first:
            drop_unfinished(place)
        return record, recorded_layers(place)
    if ranks.first:
        shard_bytes = parse_size(options.max_shard_size)
        more = {"companions": companions(stream.source), "max_shard_size": shard_bytes, "untie": options.untie}
        steps = len(stream.blocks) + (head_of(target.plan) is not None)  # the head lands as a block does
        with working(place, decided | more, steps, options.resume, options.force) as run:
            if options.resume and not run.resumed:
                progress.note("nothing to go on with: starting")
            made = _quantize(
                *(run, stream, matrix, target, allocator, every, decided, gradients, spec.refining, options.resume),
                *(sharing, progress),
            )
    else:
        _help_quantize(stream, matrix, target, allocator, every, gradients, spec.refining, options.resume, sharing)
    return ranks.from_first(lambda: made)


def _quantize(
    run: Run,
    stream: ModelStream,
    matrix: TokenMatrix,
    target: Target,
    allocator: Allocator | None,
    every: Every,
    decided: dict[str, Any],
    gradients: Gradients | None,
    refining: int,
    resume: bool,
    sharing: Sharing,
    progress: Progress,
) -> tuple[dict[str, Any], list[LayerStatistics]]:
    """Fill the folder that will be the output; returns its quantkit.json, which holds nothing that differs between
    equal runs, and what happened to each Linear. `gradients`: those of tokens' weights; None: all count the same."""
    landed = sharing.ranks.from_first(lambda: find_landed(run, progress))
    if run.resumed:
        progress.note(f"going on after block {landed.blocks} of {run.total}")
    if resume and not landed.blocks:
        check_finite(stream, target, progress, sharing.ranks)
    deciding = fingerprint(
        {name: part for name, part in decided.items() if name != "recipe"} | {"gradients": gradients}
    )
    weights = _weights(gradients, stream, matrix, run.folder, run.journal, every, sharing, progress, deciding)
    choice = None
    if allocator is not None:
        place = run.folder, run.journal
        choice = chosen_for(allocator, stream, matrix.tokens, weights, *place, sharing, progress, deciding)
        target = choice.target
    ends = _ends(stream, matrix, target, choice, weights, sharing)
    layers = [LayerStatistics(**linear.statistics) for i in range(landed.blocks) for linear in landed.linears(i)]
    refined: Refined | None = None
    with ExitStack() as stack:
        writer = None if refining else stack.enter_context(target.writer(run.staged))
        add = _nothing if writer is None else writer.add_linear
        if writer is not None:
            _write_landed(landed, writer)
        since = landed.blocks - landed.start
        with Lander(run.folder, tuple(target.plan), every, sharing.ranks, since, run.journal) as lander:
            _quantize_all(stream, matrix, target, lander, add, landed, weights, sharing, progress)
        layers += [LayerStatistics(**told) for told in lander.statistics]
        if writer is None:
            landed = sharing.ranks.from_first(lambda: landed_blocks(run))
            refined = refine_run(landed, run.journal, stream, matrix.tokens, target, refining, progress, sharing.ranks)
            writer = stack.enter_context(target.writer(run.staged))
            _write_landed(landed, writer, refined)
        with progress.phase("writing", 1) as advance:
            if (embedding := embedding_of(target.plan)) is not None:
                codes, statistics = round_embedding(stream, matrix.tokens, *embedding)
                layers.append(_predicted(statistics, stream, matrix, codes, weights, ALONE))
                writer.add_linear(embedding[0], codes)
            writer.add_others()
            writer.finish()
            advance(1)
    warn_starved_experts(layers, target.plan, matrix.tokens, progress)
    if choice is not None:
        draw_budget(choice, run.staged, progress)
    check_unchanged(stream.source)
    told = [{k: v for k, v in vars(layer).items() if k != "seconds" and v is not None} for layer in layers]
    spent = {} if choice is None else {"spent": choice.spent.as_dict()}
    of_ends = {"ends": [asdict(end) for end in ends]} if ends else {}
    record = {**decided, **spent, **of_ends, "layers": told, "evaluation": None, "files": {}}
    record |= {} if refined is None else {"refined": asdict(refined.report)}

    formats = target.folders if isinstance(target, Folders) else ()
    sums: dict[str, str] = {}
    for folder in (*(run.staged / format for format in formats), run.staged):
        write_layer_table(folder / "quant_log.csv", layers, target.plan, None if choice is None else choice.planned)
        if folder != run.staged:
            own = {**record, "recipe": _recipe_in(record["recipe"], folder.name), "files": checksums(folder)}
            write_json(folder / REPORT_NAME, own)
            sums |= {f"{folder.name}/{name}": found for name, found in own["files"].items()}
    record["files"] = checksums(run.staged) if not formats else {**sums, **checksums(run.staged, deep=False)}
    write_json(run.staged / REPORT_NAME, record)
    return record, layers


def _recipe_in(recipe: dict[str, Any], format: str) -> dict[str, Any]:
    """The recipe of one of several folders: that of a run which writes it alone."""
    others = own_options() - own_options(format)
    return {key: value for key, value in recipe.items() if key not in others} | {"format": format}


def _nothing(name: str, linear: Codes) -> None:
    """Of a Linear that is written when its scales are tuned."""


def _write_landed(landed: Landed, writer: CodesWriter, refined: Refined | None = None) -> None:
    """Write the Linears of blocks that landed, refined where they are."""
    for index in range(landed.blocks):
        for linear in landed.linears(index):
            codes = put_together(linear.tensors, linear.fields)
            writer.add_linear(linear.name, codes if refined is None else refined.linear(linear.name, codes))


def _help_quantize(
    stream: ModelStream,
    matrix: TokenMatrix,
    target: Target,
    allocator: Allocator | None,
    every: Every,
    gradients: Gradients | None,
    refining: int,
    resume: bool,
    sharing: Sharing,
) -> None:
    """What all ranks but the first do of `_quantize`."""
    ranks = sharing.ranks
    landed = ranks.from_first(lambda: NOTHING)
    if resume and not landed.blocks:
        check_finite(stream, target, SILENT, ranks)
    weights = _weights(gradients, stream, matrix, landed.folder, None, every, sharing, SILENT)
    choice = None
    if allocator is not None:
        choice = chosen_for(allocator, stream, matrix.tokens, weights, landed.folder, None, sharing, SILENT)
        target = choice.target
    _ends(stream, matrix, target, choice, weights, sharing)
    with Lander(landed.folder, (), every, ranks) as lander:
        _quantize_all(stream, matrix, target, lander, _nothing, landed, weights, sharing, SILENT)
    if refining:
        refine_run(ranks.from_first(lambda: NOTHING), None, stream, matrix.tokens, target, refining, SILENT, ranks)


def _quantize_all(
    stream: ModelStream,
    matrix: TokenMatrix,
    target: Target,
    lander: Lander,
    add: Callable[[str, Codes], None],
    landed: Landed,
    weights: TokenWeights | None,
    sharing: Sharing,
    progress: Progress,
) -> None:
    """Quantize all that needs calibration, and let it land: the blocks, on rows of the embedding as they are written,
    and the head on what leaves them. All ranks call it alike."""
    take, head, embedding = _landing(lander, add), head_of(target.plan), embedding_of(target.plan)

    def quantize(hidden: HiddenStates, batches: int) -> None:
        assert head is not None
        with progress.phase("quantizing the head", 1) as advance:
            codes, statistics = quantize_head(stream, hidden, batches, *head, sharing)
            take(head[0], codes, _predicted(statistics, stream, matrix, codes, weights, sharing.ranks))
            lander.land(len(stream.blocks), None)
            advance(1)

    on_end = None if head is None or landed.blocks > len(stream.blocks) else quantize
    rounded = nullcontext() if embedding is None else read_rounded_codes(stream, *embedding)
    budget = stream.budget // sharing.ranks.here
    with rounded:
        arguments = stream, matrix.tokens, target.plan, take, budget, progress
        quantize_blocks(*arguments, landed, lander.land, sharing, weights, on_end=on_end)


def _weights(
    gradients: Gradients | None,
    stream: ModelStream,
    matrix: TokenMatrix,
    folder: Path,
    journal: Journal | None,
    every: Every,
    sharing: Sharing,
    progress: Progress,
    deciding: str = "",
) -> TokenWeights | None:
    """What each token counts; None: all the same. `deciding`: fingerprint of what decides that, on the first rank."""
    if gradients is None:
        return None
    return token_weights(stream, matrix.tokens, gradients, folder, journal, progress, sharing.ranks, deciding, every)


def _ends(
    stream: ModelStream,
    matrix: TokenMatrix,
    target: Target,
    choice: Choice | None,
    weights: TokenWeights | None,
    sharing: Sharing,
) -> list[EndStatistics]:
    """What is told of embedding and output matrix; nothing where all tokens count the same. All ranks call it alike."""
    if weights is None:
        return []
    known = {} if choice is None else choice.planned
    others = {name: [Kind.__members__[kind]] for name, kind in target.ends.items() if name not in known}
    found = losses_of_ends(stream, matrix.tokens, others, weights, sharing.ranks)
    lost = {**known, **{name: loss for name, (loss,) in found.items()}}
    return [EndStatistics(name, kind, lost[name]) for name, kind in target.ends.items() if name in lost]


def _predicted(
    statistics: LayerStatistics,
    stream: ModelStream,
    matrix: TokenMatrix,
    codes: Codes,
    weights: TokenWeights | None,
    ranks: Ranks,
) -> LayerStatistics:
    """The same of a head or an embedding with what its codes are predicted to cost, where token weights tell. All of
    `ranks` call it alike."""
    name = f"{statistics.name}.weight"
    found = {} if weights is None else losses_of_ends(stream, matrix.tokens, {name: [codes]}, weights, ranks)
    return replace(statistics, predicted=found[name][0]) if found else statistics


def _landing(lander: Lander, add: Callable[[str, Codes], None]) -> OnLinear:
    """What is to be done with a Linear as soon as it has codes: it lands with its block, and then `add` gets it."""

    def take(name: str, linear: Codes, statistics: LayerStatistics) -> None:
        carried = Carried(linear)
        landed = LandedLinear(name, carried.tensors, carried.fields, asdict(statistics), carried.wait)
        lander.take(landed, lambda: add(name, carried.linear()))

    return take
