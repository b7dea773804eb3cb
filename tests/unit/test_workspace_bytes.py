"""`MegaMoE.workspace_bytes`: the size of a workspace before there is one."""

from __future__ import annotations

import pytest
import torch

from megamoe import MegaMoE
from megamoe.config import MoEConfig, select
from megamoe.precision import PRECISIONS
from megamoe.regions import layout_of
from workspace import Workspace
from workspace.layout import KINDS

SMALL = dict(num_experts=8, top_k=2, hidden_size=256, intermediate_size=128, max_tokens_per_rank=40)
#: DeepSeek V4 Pro: 384 experts, top 6, at the largest batch of a rank.
PRO = dict(
    num_experts=384, top_k=6, hidden_size=7168, intermediate_size=3072, max_tokens_per_rank=8192
)


@pytest.mark.parametrize("world", [1, 2, 8])
@pytest.mark.parametrize("options", [None, {"pool_blocks": 3}])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_bytes_are_those_of_the_layout_and_of_the_memory(precision, world, options):
    config = MoEConfig(**SMALL, num_ranks=world, precision=precision)
    layout = layout_of(config, select(config, **(options or {})))
    sizes = MegaMoE.workspace_bytes(
        **SMALL, world=world, kernel_options=options, precision=precision
    )
    assert sizes == {
        **layout.bytes_by_kind(),
        "reset": layout.reset_bytes,
        "total": layout.total_bytes,
    }
    held = Workspace(layout).allocation.spaces[0]
    assert sizes["total"] == sum(space.numel() for space in held.values())
    assert sum(sizes[kind] for kind in KINDS) <= sizes["total"]


def test_a_module_holds_what_was_foretold():
    moe = MegaMoE(**SMALL, world=2, device="cpu")
    assert moe.workspace.total_bytes == MegaMoE.workspace_bytes(**SMALL, world=2)["total"]
    assert moe.workspace.reset_bytes == MegaMoE.workspace_bytes(**SMALL, world=2)["reset"]


def test_no_gpu_is_touched_and_nothing_allocated(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("workspace_bytes must only compute")

    for name in ("is_available", "current_device", "get_device_properties", "device_count"):
        monkeypatch.setattr(torch.cuda, name, refuse)
    for name in ("empty", "zeros"):
        monkeypatch.setattr(torch, name, refuse)
    assert MegaMoE.workspace_bytes(**PRO, world=8)["total"] > 0


def test_the_largest_workspace_that_is_planned_for_fits():
    sizes = MegaMoE.workspace_bytes(**PRO, world=8)
    assert sizes["total"] <= 1.5e9
    assert sizes["reset"] < 1e6  # what a launch leaves clean is small


def test_a_smaller_ring_takes_less():
    full = MegaMoE.workspace_bytes(**PRO, world=8)
    small = MegaMoE.workspace_bytes(**PRO, world=8, kernel_options={"pool_blocks": 64})
    saved = (192 - 64) * 128 * (7168 + 3072) * 2
    assert full["data"] - small["data"] == saved


@pytest.mark.parametrize("precision,scales", [("fp8_block", 7168 // 128), ("fp8_channel", 1)])
def test_fp8_rows_take_half_and_their_scales(precision, scales):
    """A row of the ring holds a token, a hidden row, the token's scales and one per 128 hidden."""
    ring = {"kernel_options": {"pool_blocks": 64}}
    small = MegaMoE.workspace_bytes(**PRO, world=8, precision=precision)
    few = MegaMoE.workspace_bytes(**PRO, world=8, precision=precision, **ring)
    rows = (384 - 64) * 128
    assert small["data"] - few["data"] == rows * (7168 + 3072 + 4 * (scales + 3072 // 128))
    # Twice the rows of BF16, for the same bytes; a row has two words of padding metadata.
    bf16 = MegaMoE.workspace_bytes(**PRO, world=8)
    assert small["reset"] - bf16["reset"] == 192 * 128 * 8


@pytest.mark.parametrize(
    "changes,text",
    [
        ({"hidden_size": 200}, "hidden_size=200"),
        ({"top_k": 17}, "top_k=17"),
        ({"world": 3}, "num_ranks=3"),
        ({"kernel_options": {"pool_block": 3}}, "no field 'pool_block'"),
        ({"precision": "fp3"}, "fp3"),
    ],
)
def test_a_configuration_that_is_not_supported(changes, text):
    with pytest.raises(ValueError, match=text):
        MegaMoE.workspace_bytes(**{**SMALL, **changes})
