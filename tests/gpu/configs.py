"""Configurations of the GPU tests: one list, so that their kernels can be built ahead of time on
another machine.
"""

from __future__ import annotations

import dataclasses

from megamoe.config import PARTS, KernelConfig, MoEConfig, select
from megamoe.precision import PRECISIONS


def layer(
    num_experts, top_k, hidden, intermediate, tokens, ranks, precision="bf16", shared=0, **kernel
) -> dict:
    config = MoEConfig(num_experts, top_k, hidden, intermediate, tokens, ranks, precision, shared)
    return {**dataclasses.asdict(config), "kernel": kernel}


def split(fields: dict) -> tuple[MoEConfig, KernelConfig]:
    """The problem of such fields, and the kernel that is selected for it."""
    problem = {name: value for name, value in fields.items() if name != "kernel"}
    config = MoEConfig(**problem)
    return config, select(config, **fields["kernel"])


SMALL = {f"small{ranks}": layer(16, 4, 512, 256, 256, ranks) for ranks in (1, 2, 4, 8)}
EDGE = {
    "narrow": layer(4, 2, 128, 128, 64, 2),  # one K block pair, a tile wider than H
    "odd_hidden": layer(8, 16, 384, 384, 96, 4),  # H is not a multiple of the tile, K = 16
    "one_expert_per_rank": layer(8, 1, 256, 128, 300, 8),
    "sixteen_ranks": layer(32, 4, 256, 128, 64, 16),
    "many_experts": layer(384, 6, 256, 128, 64, 2),
    "tiny_ring": layer(8, 4, 256, 256, 512, 2, pool_blocks=3, group_blocks=2),
    "one_block_ring": layer(8, 4, 256, 256, 256, 4, pool_blocks=1, group_blocks=1),
}
#: More virtual ranks than torch has streams of a device.
MANY = {f"ranks{n}": layer(2 * n, 2, 128, 128, 16, n) for n in (33, 48, 72)}
STRESS = {f"stress{ranks}": layer(16, 4, 256, 128, 64, ranks, pool_blocks=12) for ranks in (2, 8)}


def _scaled(short: str, precision: str) -> dict[str, dict]:
    """What a recipe with scales is tried with: fewer kernels, the same kinds."""
    return {
        f"{short}1": layer(16, 4, 512, 256, 256, 1, precision),
        f"{short}4": layer(16, 4, 512, 256, 256, 4, precision),
        f"{short}_narrow": layer(4, 2, 128, 128, 64, 2, precision),
        f"{short}_odd": layer(8, 16, 384, 384, 96, 4, precision),
        f"{short}_ring": layer(8, 4, 256, 256, 512, 2, precision, pool_blocks=3, group_blocks=2),
    }


SCALED = {
    **_scaled("block", "fp8_block"),
    **_scaled("channel", "fp8_channel"),
    **_scaled("mxfp4", "fp8_mxfp4"),
    **_scaled("mxfp4_token", "fp8_mxfp4_token"),
    **_scaled("int4", "fp8_int4"),
}
STRESS["block_stress8"] = layer(16, 4, 256, 128, 64, 8, "fp8_block", pool_blocks=12)
#: With experts that every token goes to.
SHARED = {
    "shared1": layer(16, 4, 512, 256, 256, 1, shared=1),
    "shared4": layer(16, 4, 512, 256, 256, 4, shared=2),
    "shared_block1": layer(16, 4, 512, 256, 256, 1, "fp8_block", shared=1),
    "shared_block4": layer(16, 4, 512, 256, 256, 4, "fp8_block", shared=1),
    "shared_ring": layer(8, 4, 256, 256, 512, 2, "fp8_block", 1, pool_blocks=3, group_blocks=2),
    "shared_mxfp44": layer(16, 4, 512, 256, 256, 4, "fp8_mxfp4", shared=1),
}
QWEN3 = {  # of a small Qwen3-MoE, and with the sizes of Qwen3-30B-A3B
    "qwen3_block": layer(16, 4, 256, 128, 512, 1),
    "qwen3_30b": layer(128, 8, 2048, 768, 4096, 1),
    "qwen3_30b_mxfp4": layer(128, 8, 2048, 768, 4096, 1, "fp8_mxfp4"),
}
#: 1.6 GB of weights: some 0.4 ms on H200, long beside what timing adds, whatever the clocks do.
TIMED = {"timed1": layer(32, 8, 4096, 2048, 64, 1)}
#: Every part alone, of a layer whose ring holds all rows.
ALONE = {
    f"{only}_{precision}": layer(16, 4, 512, 256, 256, 2, precision, only=only)
    for only in PARTS
    for precision in PRECISIONS
}
#: Dispatch alone over a ring that is too small: nobody frees its slots.
ALONE["dispatch_ring"] = layer(8, 4, 256, 256, 512, 2, pool_blocks=3, only="dispatch")
#: Fields of routers (`router_config.RouterConfig`): of models, and of the layers small1 and block1.
ROUTERS: dict[str, dict] = {
    "v3": dict(num_experts=256, top_k=8, score="sigmoid", num_groups=8, topk_groups=4,
               correction_bias=True),
    "pro": dict(num_experts=384, top_k=6, score="sqrtsoftplus", correction_bias=True),
    "pro_hashed": dict(num_experts=384, top_k=6, score="sqrtsoftplus", hashed=True),
    "qwen3": dict(num_experts=128, top_k=8),
    "gpt_oss": dict(num_experts=128, top_k=4, softmax_over="chosen", logits="bfloat16"),
    "largest": dict(num_experts=512, top_k=16, score="sigmoid"),
    "odd": dict(num_experts=39, top_k=4, renormalize=False, logits="bfloat16"),
    "small": dict(num_experts=16, top_k=4),
}  # fmt: skip
CONFIGS = {**SMALL, **EDGE, **MANY, **SCALED, **SHARED, **STRESS, **QWEN3, **TIMED, **ALONE}
