"""A model that others wrote: transformers' Qwen3-MoE with its experts run by the layer, eager and
compiled in both modes that serve, captured; forward and generate; also with the sizes of
Qwen3-30B-A3B. `tests/unit/test_transformers.py` is what a CPU runs.
"""

from __future__ import annotations

import os

import pytest
import torch

from tests.gpu.configs import CONFIGS

transformers = pytest.importorskip("transformers", reason="needs transformers")

from megamoe.integrations import transformers as integration  # noqa: E402

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
BATCH, LENGTH, NEW_TOKENS = 4, 48, 12
#: Names under which transformers knows the layer, and the kernels that they launch.
KERNELS = {
    "megamoe": "qwen3_block",
    "megamoe_30b": "qwen3_30b",
    "megamoe_30b_mxfp4": "qwen3_30b_mxfp4",
}


@pytest.fixture(scope="module", autouse=True)
def configured():
    for name, kernel in KERNELS.items():
        fields = CONFIGS[kernel]
        integration.configure(
            name,
            precision=fields["precision"],
            max_tokens=fields["max_tokens_per_rank"],
            kernel_dir=os.environ.get("MEGAMOE_KERNEL_DIR"),
        )


def made(kernel: str, layers: int, drawn_on: str, **sizes):
    """A model with random weights whose experts have the sizes of this kernel."""
    fields = CONFIGS[kernel]
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        hidden_size=fields["hidden_size"],
        moe_intermediate_size=fields["intermediate_size"],
        num_experts=fields["num_experts"],
        num_experts_per_tok=fields["top_k"],
        num_hidden_layers=layers,
        vocab_size=512,
        norm_topk_prob=True,
        **sizes,
    )
    with torch.device(drawn_on):
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, experts_implementation="megamoe"
        )
    return model.to(torch.bfloat16).to(DEVICE).eval()


@pytest.fixture(scope="module")
def model():
    heads = dict(num_attention_heads=4, num_key_value_heads=2, head_dim=64)
    return made("qwen3_block", layers=3, drawn_on="cpu", initializer_range=0.2, **heads)


@pytest.fixture(scope="module")
def large():
    heads = dict(num_attention_heads=32, num_key_value_heads=4, head_dim=128)
    return made("qwen3_30b", layers=2, drawn_on=DEVICE, initializer_range=2048**-0.5, **heads)


def tokens(length: int = LENGTH) -> torch.Tensor:
    rng = torch.Generator().manual_seed(1)
    return torch.randint(0, 512, (BATCH, length), generator=rng).to(DEVICE)


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


@pytest.fixture(scope="module")
def eager(model) -> torch.Tensor:
    """Logits of transformers' own loop over experts."""
    model.set_experts_implementation("eager")
    with torch.no_grad():
        return model(tokens()).logits


def test_logits_are_those_of_its_own_experts(model, eager):
    model.set_experts_implementation("megamoe")
    with torch.no_grad():
        assert difference(model(tokens()).logits, eager) < 0.03


@pytest.mark.timeout(600)
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_compiled_model(model, eager, mode, monkeypatch):
    """Dynamo used to trace into the layer's streams and events, and end the process."""
    model.set_experts_implementation("megamoe")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch.no_grad():
        expected = model(tokens()).logits
        compiled = torch.compile(model.forward, mode=mode)
        for _ in range(3):  # the third is a replay
            # Inductor rounds elsewhere, which gives some tokens to another expert.
            assert usual_difference(compiled(tokens()).logits, expected) < 0.03
        breaks = sum(torch._dynamo.utils.counters["graph_break"].values())
        assert breaks == 0, dict(torch._dynamo.utils.counters["graph_break"])
        if mode == "default":  # a replay overwrites what a growing cache keeps of the one before
            plain = model.generate(tokens(8), max_new_tokens=NEW_TOKENS, do_sample=False)
            monkeypatch.setattr(model, "forward", compiled)  # as its documentation does
            made = model.generate(tokens(8), max_new_tokens=NEW_TOKENS, do_sample=False)
            assert made.shape == plain.shape
            # Rounding may decide a token, and then all after it: the first ones must agree.
            assert torch.equal(made[:, :10], plain[:, :10])
    moes = integration.layers_of(model)
    assert len(moes) == 3 and len({moe.workspace for moe in moes}) == 1
    for moe in moes:
        moe.synchronize()


def test_the_experts_hold_in_a_full_graph(model):
    model.set_experts_implementation("megamoe")
    torch._dynamo.reset()
    block = model.model.layers[0].mlp
    x = torch.randn(1, 16, block.gate.weight.shape[1], device=DEVICE).bfloat16()
    with torch.no_grad():
        expected = block(x)
        assert difference(torch.compile(block, fullgraph=True)(x), expected) < 0.03


def test_the_whole_model_in_one_graph(model):
    model.set_experts_implementation("megamoe")
    held = tokens(1)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.no_grad():
        with torch.cuda.stream(side):
            for _ in range(3):
                model(held, use_cache=False)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = model(held, use_cache=False).logits
        held.copy_(tokens()[:, 5:6])
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(logits, model(held, use_cache=False).logits)


def logits(model, implementation: str, ids: torch.Tensor) -> torch.Tensor:
    model.set_experts_implementation(implementation)
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def usual_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """The median over tokens: a rounding gives some tokens to another expert."""
    a, b = a.float().flatten(0, 1), b.float().flatten(0, 1)
    return ((a - b).norm(dim=1) / b.norm(dim=1)).median().item()


@pytest.mark.parametrize("batch,length", [(4, 1024), (5, 1000), (4, 1)])
def test_the_sizes_of_a_large_model(large, batch, length):
    """Also in more than one launch."""
    ids = torch.randint(512, (batch, length), device=DEVICE)
    own, grouped, found = (
        logits(large, name, ids) for name in ("eager", "grouped_mm", "megamoe_30b")
    )
    print(usual_difference(grouped, own), usual_difference(found, own))
    assert usual_difference(found, own) < 0.05
    coarse = logits(large, "megamoe_30b_mxfp4", ids)  # of 4 bits: 0.2 in a layer
    assert 2 * usual_difference(found, own) < usual_difference(coarse, own) < 1.0
    for moe in integration.layers_of(large):
        moe.synchronize()
    integration.release(large)


def test_weights_that_move_and_change(large):
    ids = torch.randint(512, (2, 64), device=DEVICE)
    first = logits(large, "megamoe_30b", ids)
    held = torch.cuda.memory_allocated()
    large.to("cpu")
    experts_bytes = sum(p.nbytes for n, p in large.named_parameters() if "experts" in n)
    assert held - torch.cuda.memory_allocated() > experts_bytes
    large.to(DEVICE)
    assert torch.equal(logits(large, "megamoe_30b", ids), first)
    with torch.no_grad():
        large.model.layers[0].mlp.experts.down_proj.mul_(-1)
        found, own = logits(large, "megamoe_30b", ids), logits(large, "eager", ids)
        large.model.layers[0].mlp.experts.down_proj.mul_(-1)
    assert usual_difference(found, own) < 0.05 < usual_difference(first, own)


def test_no_layer_is_made_in_a_capture(large):
    integration.release(large)
    x = torch.randn(4, 2048, device=DEVICE).bfloat16()
    experts = large.model.layers[0].mlp.experts
    given = x, torch.zeros(4, 8, dtype=torch.int64, device=DEVICE), torch.ones(4, 8, device=DEVICE)
    large.set_experts_implementation("megamoe_30b")
    with torch.no_grad():
        with pytest.raises(RuntimeError, match="run the model once before"):  # noqa: SIM117
            with torch.cuda.graph(torch.cuda.CUDAGraph()):
                experts(*given)
        torch.cuda.synchronize()
        expected = experts(*given)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = experts(*given)
        graph.replay()
        assert torch.equal(y, expected)
