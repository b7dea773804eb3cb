"""The lists of configurations of the GPU tests are legal, and what the tests assume of them."""

from __future__ import annotations

import pytest

from megamoe import budget
from megamoe.config import pool_blocks, supports
from tests.gpu import configs as one_gpu
from tests.gpu.configs import split
from tests.multigpu import configs as many_gpus

ALL = {**one_gpu.CONFIGS, **many_gpus.CONFIGS}


@pytest.mark.parametrize("name", ALL)
def test_the_configuration_is_supported(name):
    config, kernel = split(ALL[name])
    supports(config, kernel)
    budget.check(config, kernel)


@pytest.mark.parametrize("configs", [one_gpu.CONFIGS, many_gpus.CONFIGS])
def test_no_kernel_is_built_twice(configs):
    assert len({split(fields) for fields in configs.values()}) == len(configs)


def test_every_world_has_every_variant():
    variants = (
        "", "_ring", "_odd", "_stress", "_large", "_block", "_channel", "_mxfp4",
        "_mxfp4_token", "_int4", "_shared", "_block_stress",
    )  # fmt: skip
    assert set(many_gpus.CONFIGS) == {f"mp{w}{v}" for w in many_gpus.WORLDS for v in variants}


@pytest.mark.parametrize("world", many_gpus.WORLDS)
def test_what_the_tests_of_ranks_that_disagree_rely_on(world):
    base, other = (many_gpus.CONFIGS[f"mp{world}{variant}"] for variant in ("", "_ring"))
    first = next(key for key in base if base[key] != other[key])
    assert first == "max_tokens_per_rank"
    other = many_gpus.CONFIGS[f"mp{world}_stress"]
    assert next(key for key in base if base[key] != other[key]) == "hidden_size"


@pytest.mark.parametrize("world", many_gpus.WORLDS)
def test_rings_are_small(world):
    for variant, blocks in (("ring", 3), ("stress", 4)):
        assert pool_blocks(*split(many_gpus.CONFIGS[f"mp{world}_{variant}"])) == blocks
