"""A model that others wrote: transformers' Qwen3-MoE with its experts run by the layer, eager and
compiled in both modes that serve; forward and generate.

On a machine without a GPU it runs on the CPU if transformers is there.
"""

from __future__ import annotations

import os

import pytest
import torch

from megamoe import MegaMoE
from tests.conftest import have_gpu
from tests.gpu.configs import CONFIGS

transformers = pytest.importorskip("transformers", reason="needs transformers")

DEVICE = "cuda" if have_gpu() else "cpu"
BATCH, LENGTH, NEW_TOKENS = (4, 48, 12) if have_gpu() else (1, 8, 3)


def experts(self, hidden_states, top_k_index, top_k_weights):
    """What transformers calls in place of its own expert loop."""
    return self.fused(hidden_states, top_k_index, top_k_weights.float())


@pytest.fixture(scope="module")
def model():
    """Random weights; every layer's experts as a MegaMoE, all on one workspace."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS["megamoe"] = experts
    fields = dict(CONFIGS["qwen3_block"])
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        hidden_size=fields["hidden_size"],
        moe_intermediate_size=fields["intermediate_size"],
        num_experts=fields["num_experts"],
        num_experts_per_tok=fields["top_k"],
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        vocab_size=512,
        norm_topk_prob=True,
        initializer_range=0.2,
    )
    model = transformers.Qwen3MoeForCausalLM(config).to(torch.bfloat16).to(DEVICE).eval()
    workspace = None
    for layer in model.model.layers:
        block = layer.mlp.experts
        fused = MegaMoE(
            world=fields["num_ranks"],
            kernel_dir=os.environ.get("MEGAMOE_KERNEL_DIR"),
            workspace=workspace,
            device=DEVICE,
            **{k: v for k, v in fields.items() if k not in ("kernel", "num_ranks")},
        )
        fused.load_weights(block.gate_up_proj.data, block.down_proj.data)
        block.fused, workspace = fused, fused.workspace
    return model


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
    if mode == "reduce-overhead" and not have_gpu():
        pytest.skip("needs a GPU: CUDA graphs")
    model.set_experts_implementation("megamoe")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch.no_grad():
        expected = model(tokens()).logits
        compiled = torch.compile(model.forward, mode=mode)
        for _ in range(3):  # the third is a replay
            assert difference(compiled(tokens()).logits, expected) < 0.03
        breaks = sum(torch._dynamo.utils.counters["graph_break"].values())
        assert breaks == 0, dict(torch._dynamo.utils.counters["graph_break"])
        plain = model.generate(tokens(8), max_new_tokens=NEW_TOKENS, do_sample=False)
        monkeypatch.setattr(model, "forward", compiled)  # as its documentation does
        made = model.generate(tokens(8), max_new_tokens=NEW_TOKENS, do_sample=False)
    assert made.shape == plain.shape
    # Rounding may decide a token, and then all after it: the first ones must agree.
    assert torch.equal(made[:, :10], plain[:, :10])
    for layer in model.model.layers:
        layer.mlp.experts.fused.synchronize()


def test_the_experts_hold_in_a_full_graph(model):
    model.set_experts_implementation("megamoe")
    torch._dynamo.reset()
    block = model.model.layers[0].mlp
    x = torch.randn(1, 16, block.gate.weight.shape[1], device=DEVICE).bfloat16()
    with torch.no_grad():
        expected = block(x)
        assert difference(torch.compile(block, fullgraph=True)(x), expected) < 0.03


def test_the_whole_model_in_one_graph(model):
    if not have_gpu():
        pytest.skip("needs a GPU: CUDA graphs")
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
