"""Configurations of the tests with one process per GPU: one list, so that their kernels can be
built ahead of time on another machine.
"""

from __future__ import annotations

from tests.gpu.configs import layer

WORLDS = (2, 4)


def _of_world(ranks: int) -> dict[str, dict]:
    """`ring` differs from the first in max_tokens_per_rank, `stress` in hidden_size: the tests of
    ranks that disagree rely on it.
    """
    name = f"mp{ranks}"
    return {
        name: layer(16, 4, 512, 256, 256, ranks),
        # Every launch goes round a ring of three blocks many times.
        f"{name}_ring": layer(16, 4, 512, 256, 384, ranks, pool_blocks=3, group_blocks=2),
        # H is not a multiple of the tile, K = 16 exceeds E.
        f"{name}_odd": layer(3 * ranks, 16, 384, 384, 96, ranks),
        f"{name}_stress": layer(16, 4, 256, 128, 64, ranks, pool_blocks=4),
        # Several waves of tiles on every SM.
        f"{name}_large": layer(32, 8, 2048, 1024, 1024, ranks),
        f"{name}_block": layer(16, 4, 512, 256, 256, ranks, "fp8_block"),
        f"{name}_channel": layer(16, 4, 512, 256, 256, ranks, "fp8_channel"),
        f"{name}_mxfp4": layer(16, 4, 512, 256, 256, ranks, "fp8_mxfp4"),
        f"{name}_mxfp4_token": layer(16, 4, 512, 256, 256, ranks, "fp8_mxfp4_token"),
        f"{name}_int4": layer(16, 4, 512, 256, 256, ranks, "fp8_int4"),
        f"{name}_shared": layer(16, 4, 512, 256, 256, ranks, "fp8_block", shared=1),
        f"{name}_block_stress": layer(16, 4, 256, 128, 64, ranks, "fp8_block", pool_blocks=4),
    }


CONFIGS = {name: fields for world in WORLDS for name, fields in _of_world(world).items()}
