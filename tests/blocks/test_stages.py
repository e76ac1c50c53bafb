"""The block stream and the stages within a block, against transformers' own model and against plain loops."""

from __future__ import annotations

import ctypes
from collections import Counter, OrderedDict
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import EXPERTS, FAMILIES, MakeModel, Recorder, random_model
from support.problems import quantize
from support.streamed import open_stream, streamed_logits
from support.tolerance import forward
from torch import nn
from transformers import AutoModelForCausalLM

from quantkit.blocks import budget, stages
from quantkit.blocks.budget import Budget
from quantkit.blocks.families import FAMILIES as FAMILIES_TABLE
from quantkit.blocks.stages import Reading, paused_bytes, run_paused, run_replayed
from quantkit.blocks.stream import ModelStream
from quantkit.codes import QuantizedLinear
from quantkit.errors import NumericError, SourceError
from quantkit.options import QuantSpec
from quantkit.quantize.blockwise import quantize_blocks
from quantkit.quantize.hessian import HessianAccumulator
from quantkit.quantize.layers import LayerStatistics
from quantkit.quantize.targets import plan_linears
from quantkit.sources import open_source
from quantkit.tokens import TokenMatrix

Run = Callable[..., None]
CPU = torch.device("cpu")
SPEC = QuantSpec(bits=4, group_size=32)
STAGES = FAMILIES_TABLE["llama"].stages or ()


# -- the stream ------------------------------------------------------------------------------------------------------


@pytest.mark.numerics
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_streamed_logits_are_the_full_models(
    family: str, tied: bool, make_model: MakeModel, tiny_tokens: TokenMatrix
) -> None:
    folder = make_model(family, tied=tied, dtype="float32")
    stream = open_stream(folder)
    head = stream.weights.names["lm_head.weight"]  # GPT-NeoX's checkpoints call it embed_out
    assert list(stream.weights.names.values()).count(head) == (2 if tied else 1)
    full = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    # The last batch is shorter, and a third has another length.
    batches = [tiny_tokens.tokens[:4], tiny_tokens.tokens[4:6], tiny_tokens.tokens[6:9, :20]]
    for ids, logits in zip(batches, streamed_logits(stream, batches), strict=True):
        with torch.inference_mode():
            expected = full(input_ids=ids).logits
        assert logits.shape == (*ids.shape, 320)
        assert float(expected.std()) > 0.5
        torch.testing.assert_close(logits, expected, **forward(expected))


@pytest.mark.numerics
@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("mistral", {"sliding_window": 8}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}}),
        (
            "llama",
            {
                "rope_parameters": {
                    "rope_type": "llama3",
                    "rope_theta": 500.0,
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 32,
                }
            },
        ),
        ("llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4}),
    ],
)
def test_what_a_config_changes_reaches_the_blocks(
    family: str, config: dict[str, Any], make_model: MakeModel, tiny_tokens: TokenMatrix
) -> None:
    folder = make_model(family, dtype="float32", **config)
    full = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = tiny_tokens.tokens[:2]
    with torch.inference_mode():
        expected = full(input_ids=ids).logits
    torch.testing.assert_close(streamed_logits(open_stream(folder), [ids])[0], expected, **forward(expected))


@pytest.mark.numerics
def test_stream_of_a_gguf_file_is_its_dequantized_model(tiny_gguf: Path, tiny_tokens: TokenMatrix) -> None:
    source = open_source(tiny_gguf)
    full = random_model("llama", tied=False, dtype=torch.float32, seed=1)
    full.load_state_dict({name: source.read(name) for name in source.tensors})
    ids = tiny_tokens.tokens[:2]
    with torch.inference_mode():
        expected = full(input_ids=ids).logits
    logits = streamed_logits(ModelStream(source, CPU, torch.float32), [ids])[0]
    torch.testing.assert_close(logits, expected, **forward(expected))


def test_gguf_weights_are_the_models_within_their_quantization(tiny_gguf: Path, make_model: MakeModel) -> None:
    """Fails where Q or K rows are not put back in order: wrong rows differ by the weights' own size."""
    source, original = open_source(tiny_gguf), open_source(make_model("llama", dtype="float32"))
    assert set(source.tensors) == set(original.tensors)
    kinds = Counter(info.stored_as for info in source.tensors.values())
    assert set(kinds) == {"F32", "F16", "Q8_0", "Q4_0"}
    allowed = {"F32": 0.0, "F16": 1e-3, "Q8_0": 0.01, "Q4_0": 0.12}
    for name, info in source.tensors.items():
        expected = original.read(name)
        assert info.shape == tuple(expected.shape)
        error = float((source.read(name).float() - expected).norm() / expected.norm())
        assert error <= allowed[info.stored_as], name


def test_a_blocks_weights_are_let_go(make_model: MakeModel, tiny_tokens: TokenMatrix) -> None:
    stream = open_stream(make_model("llama"))
    model = stream._model
    assert {p.device.type for p in model.parameters()} == {"meta"}
    with torch.inference_mode():
        hidden = stream.embed([tiny_tokens.tokens[:2]])
        assert {p.device.type for p in model.parameters()} == {"meta"}
        for index in range(2):
            with stream.block(index) as block:
                assert {p.device.type for p in block.parameters()} == {"cpu"}
                others = {p.device.type for n, p in model.named_parameters() if not n.startswith(stream.blocks[index])}
                assert others == {"meta"}
                stream.call(index, block, 0, hidden[0])
            assert {p.device.type for p in model.parameters()} == {"meta"}
        with stream.head() as head:
            head(hidden[0])
        assert {p.device.type for p in model.parameters()} == {"meta"}


def test_an_exception_lets_a_block_go_too(make_model: MakeModel) -> None:
    stream = open_stream(make_model("llama"))
    with pytest.raises(KeyError), stream.block(0):
        raise KeyError
    assert {p.device.type for p in stream._model.parameters()} == {"meta"}


# -- stages ----------------------------------------------------------------------------------------------------------


def sequential(
    stream: ModelStream, batches: list[torch.Tensor]
) -> tuple[dict[str, QuantizedLinear], list[torch.Tensor]]:
    """True-sequential GPTQ as a plain loop: for every stage the block runs from its beginning on every batch."""
    codes = {}
    hidden = stream.embed(batches)
    for index, name in enumerate(stream.blocks):
        with stream.block(index) as block:
            for stage in STAGES:
                linears = [block.get_submodule(linear) for linear in stage]
                seen: list[torch.Tensor] = []
                hook = linears[0].register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0]))
                for i, state in enumerate(hidden):
                    stream.call(index, block, i, state)
                hook.remove()
                hessian = HessianAccumulator(seen[0].shape[-1], CPU)
                for x in seen:
                    hessian.add(x)
                stacked = torch.cat([linear.weight for linear in linears])
                result = quantize(stacked, hessian.finish(stage[0]), SPEC).linear
                parts = result.split([linear.weight.shape[0] for linear in linears])
                for linear, path, part in zip(linears, stage, parts, strict=True):
                    linear.weight.copy_(part.dequantize())
                    codes[f"{name}.{path}"] = part
            hidden = [stream.call(index, block, i, state) for i, state in enumerate(hidden)]
    return codes, hidden


def staged(
    stream: ModelStream, batches: list[torch.Tensor], run: Run
) -> tuple[dict[str, QuantizedLinear], list[torch.Tensor], Counter[str], list[tuple[int, int]]]:
    """The same through `run`: codes, hidden states, forwards of each Linear, and (stage, batch shape) as observed."""
    codes: dict[str, QuantizedLinear] = {}
    calls: Counter[str] = Counter()
    inputs: list[tuple[int, int]] = []
    hidden = stream.embed(batches)
    for index, name in enumerate(stream.blocks):
        with stream.block(index) as block:
            hooks = []
            for path in stream.family.linears(block):
                count = lambda module, args, output, key=f"{name}.{path}": calls.update([key])  # noqa: E731
                hooks.append(block.get_submodule(path).register_forward_hook(count))
            hessians: dict[int, HessianAccumulator] = {}

            def observe(stage: int, batch: int, read: Reading, hessians: Any = hessians) -> None:
                x = read.x
                hessians.setdefault(stage, HessianAccumulator(x.shape[-1], CPU)).add(x)
                inputs.append((stage, x.shape[0]))

            def finish(stage: int, block: nn.Module = block, name: str = name, hessians: Any = hessians) -> None:
                linears = [block.get_submodule(path) for path in STAGES[stage]]
                H = hessians[stage].finish("stage")
                result = quantize(torch.cat([linear.weight for linear in linears]), H, SPEC).linear
                parts = result.split([linear.weight.shape[0] for linear in linears])
                for linear, path, part in zip(linears, STAGES[stage], parts, strict=True):
                    linear.weight.copy_(part.dequantize())
                    codes[f"{name}.{path}"] = part

            forward = lambda i, block=block, index=index: stream.call(index, block, i, hidden[i])  # noqa: E731
            run(block, STAGES, forward, len(hidden), observe, finish, hidden.__setitem__)
            for hook in hooks:
                hook.remove()
    return codes, hidden, calls, inputs


@pytest.mark.numerics
@torch.inference_mode()
@pytest.mark.parametrize("run", [run_paused, run_replayed])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_stages_give_what_a_plain_sequential_loop_gives(
    run: Run, family: str, make_model: MakeModel, tiny_tokens: TokenMatrix
) -> None:
    stream = open_stream(make_model(family))
    batches = list(tiny_tokens.tokens.split(5))  # 5, 5 and 2 windows
    expected_codes, expected_hidden = sequential(stream, batches)
    codes, hidden, calls, inputs = staged(stream, batches, run)
    assert list(codes) == list(expected_codes)
    assert len(codes) == 14
    for name, linear in codes.items():
        assert torch.equal(linear.codes, expected_codes[name].codes)
        assert torch.equal(linear.scales, expected_codes[name].scales)
    for state, expected in zip(hidden, expected_hidden, strict=True):
        assert torch.equal(state, expected)
    # One Hessian for the Linears of a stage: its input is seen once per batch, batches in order.
    assert inputs == [(stage, size) for stage in range(4) for size in (5, 5, 2)] * 2
    if run is run_paused:
        assert set(calls.values()) == {len(batches)}
        assert len(calls) == 14
    else:
        assert calls["model.layers.0.self_attn.q_proj"] > len(batches)


class Odd(nn.Module):
    """A block that skips, swaps or repeats its Linears."""

    def __init__(self, order: str) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.order = order

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for name in self.order:
            x = self.get_submodule(name)(x)
        return x


@pytest.mark.parametrize("run", [run_paused, run_replayed])
@pytest.mark.parametrize(("order", "missed"), [("a", "b"), ("b", "a"), ("", "a")])
def test_a_stage_that_is_never_reached_is_an_error(run: Run, order: str, missed: str) -> None:
    block = Odd(order)
    hidden = [torch.ones(1, 3, 8)] * 2
    with pytest.raises(SourceError, match=rf"did not reach {missed} in the order"):
        run(block, [["a"], ["b"]], lambda i: block(hidden[i]), 2, lambda *_: None, lambda _: None, lambda *_: None)
    assert not block.a._forward_pre_hooks
    assert not block.b._forward_pre_hooks


def test_stages_in_another_order_are_an_error() -> None:
    block = Odd("ba")
    with pytest.raises(SourceError, match="in the order of the family's table"):
        run_paused(
            block,
            [["a"], ["b"]],
            lambda i: block(torch.ones(1, 3, 8)),
            2,
            lambda *_: None,
            lambda _: None,
            lambda *_: None,
        )


@pytest.mark.parametrize("run", [run_paused, run_replayed])
def test_what_a_forward_raises_comes_through(run: Run) -> None:
    block = Odd("ab")

    def forward(i: int) -> torch.Tensor:
        if i == 1:
            raise MemoryError("no room")
        return block(torch.ones(1, 3, 8))

    with pytest.raises(MemoryError, match="no room"):
        run(block, [["a"], ["b"]], forward, 2, lambda *_: None, lambda _: None, lambda *_: None)
    assert not block.a._forward_pre_hooks


def test_paused_bytes_counts_the_widest_stage(make_model: MakeModel) -> None:
    stream = open_stream(make_model("llama"))
    with stream.block(0) as block:
        # gate and up: 64 in, 2 x 96 out; two residuals of 64.
        assert paused_bytes(block, STAGES, tokens=10, itemsize=4) == 10 * 4 * (64 + 192 + 128)


class Heap(ctypes.Structure):
    """What glibc's mallinfo2 tells; number 3 counts the pieces that came straight from the system."""

    _fields_ = [("numbers", ctypes.c_size_t * 10)]


def mapped() -> int:
    """How many pieces of memory came straight from the system and did not go back yet."""
    libc = ctypes.CDLL(None)
    libc.mallinfo2.restype = Heap
    return int(libc.mallinfo2().numbers[3])


def pieces_while_paused() -> list[int]:
    """Pieces from the system before three forwards that keep 24 MB and 3 MB each, in each, after them, and once more
    with 24 MB."""
    budget.tune()
    budget.let_go()
    block = nn.Sequential(OrderedDict(a=nn.Linear(8, 8), b=nn.Linear(8, 8)))
    seen = [mapped()]

    def forward(i: int) -> torch.Tensor:
        large, small = torch.zeros(24 << 20, dtype=torch.uint8), torch.zeros(3 << 20, dtype=torch.uint8)
        seen.append(mapped())
        output: torch.Tensor = block(torch.ones(1, 3, 8)) + large[0] + small[0]
        return output

    run_paused(block, [["a"], ["b"]], forward, 3, lambda *_: None, lambda _: None, lambda *_: None)
    seen.append(mapped())
    again = torch.zeros(24 << 20, dtype=torch.uint8)
    seen.append(mapped())
    del again
    return seen


def test_large_tensors_lie_apart_while_forwards_are_paused() -> None:
    if not hasattr(ctypes.CDLL(None), "mallinfo2"):
        pytest.skip("no glibc of 2.33 or later: the allocator cannot be asked")
    # In a process of its own: what other tests freed would serve large tensors too, from the heap.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
        before, *during, after, again = fresh.submit(pieces_while_paused).result()
    assert during == [before + 1, before + 2, before + 3]
    assert after == before
    assert again == before  # in the heap, where what evaluation frees is used again


def test_the_heap_is_handed_back_once_before_the_widest_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    block = nn.Sequential(OrderedDict(a=nn.Linear(8, 8), b=nn.Linear(8, 24), c=nn.Linear(24, 8)))
    seen: list[Any] = []
    monkeypatch.setattr(stages, "let_go", lambda: seen.append("let go"))
    run_paused(
        block,
        [["a"], ["b"], ["c"]],
        lambda _: block(torch.ones(1, 3, 8)),
        2,
        lambda *_: None,
        seen.append,
        lambda *_: None,
    )
    assert seen == [0, "let go", 1, 2]


# -- the whole pass --------------------------------------------------------------------------------------------------


def quantized(
    stream: ModelStream, tokens: torch.Tensor, budget: int, progress: Recorder
) -> tuple[dict[str, QuantizedLinear], list[LayerStatistics]]:
    codes: dict[str, QuantizedLinear] = {}
    layers: list[LayerStatistics] = []

    def keep(name: str, linear: QuantizedLinear, statistics: LayerStatistics) -> None:
        codes[name] = linear
        layers.append(statistics)

    quantize_blocks(stream, tokens, plan_linears(stream, SPEC), keep, Budget(budget), progress)
    return codes, layers


@pytest.mark.numerics
@pytest.mark.parametrize("family", ["llama", "gemma3_text", *EXPERTS])
def test_without_memory_stages_are_replayed_with_the_same_result(
    family: str, make_model: MakeModel, tiny_tokens: TokenMatrix
) -> None:
    folder = make_model(family)
    roomy, tight = Recorder(), Recorder()
    codes, layers = quantized(open_stream(folder), tiny_tokens.tokens, 10**12, roomy)
    again, replayed = quantized(open_stream(folder), tiny_tokens.tokens, 0, tight)
    assert not [note for note in roomy.notes if "replayed" in note]
    assert len([note for note in tight.notes if "replayed" in note]) == 1
    assert sorted(codes) == sorted(again)  # replayed, all experts' first stage comes before their second
    replayed.sort(key=lambda layer: list(codes).index(layer.name))
    for name, linear in codes.items():
        assert torch.equal(linear.codes, again[name].codes)
        assert torch.equal(linear.scales, again[name].scales)
        assert torch.equal(linear.zeros, again[name].zeros)
    for one, other in zip(layers, replayed, strict=True):
        assert (one.name, one.loss, one.rtn_loss, one.damp) == (other.name, other.loss, other.rtn_loss, other.damp)


@pytest.mark.numerics
def test_codes_of_a_whole_pass_are_the_sequential_loops(make_model: MakeModel, tiny_tokens: TokenMatrix) -> None:
    folder = make_model("llama")
    codes, layers = quantized(open_stream(folder), tiny_tokens.tokens, 10**12, Recorder())
    with torch.inference_mode():
        expected, _ = sequential(open_stream(folder), [tiny_tokens.tokens])
    assert [layer.name for layer in layers] == list(expected)
    for name, linear in codes.items():
        assert torch.equal(linear.codes, expected[name].codes)
    for layer in layers:
        assert 0 < layer.loss < layer.rtn_loss
        assert (layer.damp, layer.fallback) == (SPEC.damp, "")
        assert layer.seconds > 0


def test_a_layer_that_sees_nothing_is_rounded_and_named(tmp_path: Path, tiny_tokens: TokenMatrix) -> None:
    model = random_model("llama", tied=False, dtype=torch.float32, seed=0)
    with torch.no_grad():
        model.model.layers[1].post_attention_layernorm.weight.zero_()  # gate, up and down of block 1 read zeros
    model.save_pretrained(tmp_path)
    progress = Recorder()
    _, layers = quantized(open_stream(tmp_path), tiny_tokens.tokens, 10**12, progress)
    rounded = [layer.name for layer in layers if layer.fallback]
    assert rounded == [f"model.layers.1.mlp.{name}_proj" for name in ("gate", "up", "down")]
    assert {layer.fallback for layer in layers} == {"", "rounding"}
    assert [warning.split(":")[0] for warning in progress.warnings] == rounded


def test_an_activation_that_overflows_names_the_layer(tmp_path: Path, tiny_tokens: TokenMatrix) -> None:
    model = random_model("llama", tied=False, dtype=torch.float32, seed=0)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(3e4)
        model.model.layers[1].post_attention_layernorm.weight.mul_(1e37)
    model.save_pretrained(tmp_path)
    with pytest.raises(NumericError, match=r"model\.layers\.1\.mlp\.gate_proj.*not finite"):
        quantized(open_stream(tmp_path), tiny_tokens.tokens, 10**12, Recorder())


def test_a_weight_beyond_float16_scales_names_its_layers(tmp_path: Path, tiny_tokens: TokenMatrix) -> None:
    model = random_model("llama", tied=False, dtype=torch.float32, seed=0)
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight[3, 4] = 1e7
    model.save_pretrained(tmp_path)
    with pytest.raises(NumericError, match=r"model\.layers\.1\.self_attn\.o_proj: .*beyond float16"):
        quantized(open_stream(tmp_path), tiny_tokens.tokens, 10**12, Recorder())
