"""The routers of models, as transformers has them: from the same logits the same experts and, up to
rounding, the same weights; by the definition and by the kernel on a CPU.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import megamoe
from megamoe.dsl import HAVE_DSL
from tests.routers import GPT_OSS, QWEN3, V3, V4, V4_HASHED, on_the_machine

pytest.importorskip("transformers", reason="needs transformers")
pytestmark = pytest.mark.usefixtures("one_thread")

TOKENS, HIDDEN, VOCABULARY = 200, 32, 50


def filled(router: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Random parameters and buffers."""
    rng = torch.Generator().manual_seed(seed)
    for name, tensor in [*router.named_parameters(), *router.named_buffers()]:
        if tensor.is_floating_point():
            spread = 0.2 if name.endswith("bias") else 0.4
            tensor.data = spread * torch.randn(tensor.shape, generator=rng)
    return router


def settings_of(config, **more) -> SimpleNamespace:
    """What a router's constructor reads."""
    return SimpleNamespace(
        num_experts_per_tok=config.top_k, num_experts=config.num_experts,
        num_local_experts=config.num_experts, hidden_size=HIDDEN, n_group=config.num_groups,
        topk_group=config.topk_groups, norm_topk_prob=config.renormalize,
        routed_scaling_factor=2.5, scoring_func=config.score, vocab_size=VOCABULARY, **more,
    )  # fmt: skip


def hidden_states(seed: int = 0) -> torch.Tensor:
    return torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(seed))


def by_expert(idx: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    order = idx.sort(dim=1).indices
    return idx.gather(1, order).long(), weights.gather(1, order)


def compare(config, theirs, **given) -> None:
    """What a model's router returned, (logits, weights, idx), with `route` and the kernel."""
    logits, weights, idx = (part.detach() for part in theirs)
    expected = by_expert(idx, weights)
    names = "score", "softmax_over", "num_groups", "topk_groups", "renormalize"
    settings = {name: getattr(config, name) for name in names}
    ways = [megamoe.route(logits, config.top_k, **settings, **given)]
    if HAVE_DSL and config in (V3, V4, V4_HASHED, QWEN3, GPT_OSS):
        ways.append(on_the_machine(config, logits, **given))
    for way in ways:
        got = by_expert(*way)
        assert torch.equal(got[0], expected[0])
        torch.testing.assert_close(got[1], expected[1], rtol=3e-6, atol=1e-30)


def test_deepseek_v3():
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

    router = filled(DeepseekV3TopkRouter(settings_of(V3)), seed=1)
    bias = router.e_score_correction_bias
    compare(V3, router(hidden_states()), correction_bias=bias, routed_scaling_factor=2.5)


def test_deepseek_v4():
    from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4TopKRouter

    router = filled(DeepseekV4TopKRouter(settings_of(V4)), seed=2)
    bias = router.e_score_correction_bias
    compare(V4, router(hidden_states()), correction_bias=bias, routed_scaling_factor=2.5)


def test_deepseek_v4_by_token_id():
    from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4HashRouter

    router = filled(DeepseekV4HashRouter(settings_of(V4_HASHED)), seed=3)
    rng = torch.Generator().manual_seed(3)
    table = torch.rand(VOCABULARY, V4_HASHED.num_experts, generator=rng).topk(V4_HASHED.top_k)
    router.tid2eid.copy_(table.indices)
    ids = torch.randint(0, VOCABULARY, (TOKENS,), generator=rng)
    theirs = router(hidden_states(), ids)
    given = {"tid2eid": router.tid2eid, "input_ids": ids, "routed_scaling_factor": 2.5}
    compare(V4_HASHED, theirs, **given)


@pytest.mark.parametrize("renormalize", [True, False])
def test_qwen3_moe(renormalize):
    from dataclasses import replace

    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

    config = replace(QWEN3, renormalize=renormalize)
    compare(config, filled(Qwen3MoeTopKRouter(settings_of(config)), seed=4)(hidden_states()))


def test_glm4_moe():
    from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeTopkRouter

    from megamoe.router_config import RouterConfig

    config = RouterConfig(128, 8, "sigmoid")  # its bias is an argument
    router = filled(Glm4MoeTopkRouter(settings_of(config)), seed=5)
    bias = router.e_score_correction_bias
    compare(config, router(hidden_states()), correction_bias=bias, routed_scaling_factor=2.5)


def test_minimax_m2():
    from transformers.models.minimax_m2.modeling_minimax_m2 import MiniMaxM2TopKRouter

    from megamoe.router_config import RouterConfig

    config = RouterConfig(256, 8, "sigmoid")
    router = filled(MiniMaxM2TopKRouter(settings_of(config)), seed=6)
    bias = 0.2 * torch.randn(256, generator=torch.Generator().manual_seed(6))
    compare(config, router(hidden_states(), bias), correction_bias=bias)


def test_gpt_oss():
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter

    compare(GPT_OSS, filled(GptOssTopKRouter(settings_of(GPT_OSS)), seed=7)(hidden_states()))
