"""Integers of one rank's launch that follow from the configuration, named as the protocol names
them. The kernel and the tests both read them from here.
"""

from __future__ import annotations

from dataclasses import dataclass

from megamoe.budget import b_stage_bytes, weight_scale_bytes
from megamoe.config import KernelConfig, MoEConfig, pool_blocks
from megamoe.regions import LayerLayout
from megamoe.schedule import ceil_div
from megamoe.wire import scale_words
from workspace.layout import COUNTER, PADDING


@dataclass(frozen=True)
class LaunchShape:
    """`config` and `kernel` as one launch needs them; its field is called `shape`."""

    config: MoEConfig
    kernel: KernelConfig
    layout: LayerLayout

    @property
    def local_experts(self) -> int:
        """Experts that this rank computes (e)."""
        return self.config.local_experts

    @property
    def ring(self) -> int:
        """Pool blocks of the ring (R)."""
        return pool_blocks(self.config, self.kernel)

    @property
    def fc1_columns(self) -> int:
        """Tile columns of FC1: gate and up rows together."""
        return ceil_div(2 * self.config.intermediate_size, self.kernel.block_n)

    @property
    def fc2_columns(self) -> int:
        return ceil_div(self.config.hidden_size, self.kernel.block_n)

    @property
    def fc1_k_blocks(self) -> int:
        """K blocks of an FC1 tile."""
        return self.config.hidden_size // self.kernel.block_k

    @property
    def fc2_k_blocks(self) -> int:
        return self.config.intermediate_size // self.kernel.block_k

    @property
    def fc1_done(self) -> int:
        """`fc1_done_counter` of a block whose FC1 tiles are all stored: one report a tile."""
        return self.fc1_columns

    @property
    def fc2_done(self) -> int:
        """`fc2_done_counter` of a block whose FC2 tiles are all stored."""
        return self.fc2_columns

    @property
    def slot_free(self) -> int:
        """`fc2_done_counter` of a block whose ring slot is clean and free: all tiles, then the
        cleaner's report.
        """
        return self.fc2_columns + 1

    def stream(self, num_ctas, experts=None) -> tuple:
        """Arguments of `schedule.seek_walk` after the counts, which are those of `experts` experts:
        by default of all local ones. Experts without rows may be left out.
        """
        kernel = self.kernel
        return (
            self.local_experts if experts is None else experts, kernel.block_m, kernel.group_blocks,
            self.fc1_columns, self.fc2_columns, kernel.lag_waves * num_ctas, self.ring,
        )  # fmt: skip

    @property
    def row_group(self) -> int:
        """Rows of a block that are loaded and multiplied together, or not at all."""
        return self.kernel.architecture.group_rows

    @property
    def token_row_bytes(self) -> int:
        return self.config.recipe.tokens.num_bytes(self.config.hidden_size)

    @property
    def fc1_out_row_bytes(self) -> int:
        return self.config.recipe.hidden.num_bytes(self.config.intermediate_size)

    @property
    def token_scale_bytes(self) -> int:
        """Bytes of a row of `input_scale_buffer`."""
        return 4 * scale_words(self.config.token_scales)

    @property
    def weight_scale_bytes(self) -> int:
        """Shared memory for the block scales of one tile's weights."""
        return weight_scale_bytes(self.config)

    @property
    def b_stage_bytes(self) -> int:
        """Shared memory for a K block of a tile's weights."""
        return b_stage_bytes(self.config, self.kernel)

    @property
    def output_row_bytes(self) -> int:
        return self.config.hidden_size * self.config.recipe.output_bytes

    @property
    def counters(self) -> tuple[str, ...]:
        """Regions that the clean-up of a launch zeroes."""
        return tuple(region.name for region in self.layout.of_kind(COUNTER))

    @property
    def paddings(self) -> tuple[str, ...]:
        """Regions of which the report warp that frees a pool block zeroes the block."""
        return tuple(region.name for region in self.layout.of_kind(PADDING))
