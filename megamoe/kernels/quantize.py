"""FP8 quantisation on the device, as `reference.quantize` defines it: scale = amax / 448 of a
block, stored value = e4m3(value * (1 / scale)), rounded to nearest even.

`quantize_input` is the step of `count` that turns a BF16 input into the rows that peers pull.
"""

from __future__ import annotations

import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, const_expr, range_constexpr

from megamoe.fourbit_layout import place_of
from megamoe.kernels.launch import Launch, address
from megamoe.kernels.ptx import (
    global_ptr,
    load_global_v4_if,
    pack_e4m3x4,
    store_global,
    store_global_v2,
    unpack_bf16x2,
)
from megamoe.ordering import INPUT_QUANTIZED
from megamoe.precision import FP8_BLOCK, FP8_MAX, FP8_MIN_AMAX, WHOLE_ROW

arch = cute.arch

LANE_COLUMNS = 8  # 16 bytes of BF16
WARP_COLUMNS = 32 * LANE_COLUMNS
MAX_LOADS = 8  # in flight per lane


def magnitude(values):
    """Largest |value| of a Python list of Float32."""
    largest = arch.fmax(values[0], -values[0])
    for value in values[1:]:
        largest = arch.fmax(largest, arch.fmax(value, -value))
    return largest


def largest_of_lanes(value, lanes: int):
    """Maximum over aligned groups of `lanes` neighbouring lanes (a power of two)."""
    step = 1
    while step < lanes:
        value = arch.fmax(value, arch.shuffle_sync_bfly(value, offset=step))
        step *= 2
    return value


def scale_of(amax):
    """(scale, 1 / scale) of a block."""
    scale = arch.fmax(amax, Float32(FP8_MIN_AMAX)) / Float32(FP8_MAX)
    return scale, Float32(1.0) / scale


def loads_in_flight(hidden: int) -> int:
    """Loads of a lane at a time: as many as split a row evenly."""
    steps = -(-hidden // WARP_COLUMNS)
    return max(loads for loads in range(1, MAX_LOADS + 1) if steps % loads == 0)


@cute.jit
def load_columns(launch: Launch, token, first, lane):
    """`loads_in_flight` x 8 columns of a BF16 row per lane, as words; zeros past the row's end and
    past the last token.
    """
    hidden = launch.shape.config.hidden_size
    row = launch.x + Int64(token) * (2 * hidden)
    loaded = []
    for part in range_constexpr(loads_in_flight(hidden)):
        column = first + part * WARP_COLUMNS + lane * LANE_COLUMNS
        inside = Int32(column < hidden) & Int32(token < launch.num_tokens)
        loaded.append(load_global_v4_if(row + Int64(column) * 2, inside))
    return [list(words) for words in loaded]


def unpack(loaded):
    """What `load_columns` returned as Float32."""
    pairs = [[unpack_bf16x2(word) for word in words] for words in loaded]
    return [[value for pair in part for value in pair] for part in pairs]


@cute.jit
def store_columns(launch: Launch, token, first, lane, values, inverses):
    """Quantise what `load_columns` returned and store it to the row that peers pull."""
    hidden = launch.shape.config.hidden_size
    row = address(launch, "input_token_buffer", token)
    for part in range_constexpr(len(values)):
        column = first + part * WARP_COLUMNS + lane * LANE_COLUMNS
        if column < hidden:
            scaled = [value * inverses[part] for value in values[part]]
            words = pack_e4m3x4(scaled[:4]), pack_e4m3x4(scaled[4:])
            if const_expr(launch.shape.config.recipe.weights.packed):
                for half in range_constexpr(2):
                    store_global(row + place_of(column + 4 * half), words[half])
            else:
                store_global_v2(row + column, *words)


@cute.jit
def store_scale(launch: Launch, token, index, scale):
    word = address(launch, "input_scale_buffer", token) + Int64(index) * 4
    global_ptr(word, Float32)[0] = scale


@cute.jit
def quantize_input(launch: Launch):
    """Whole grid: BF16 `x` -> input_token_buffer and input_scale_buffer, unless the host staged
    them (x == 0). A warp takes up to 2048 columns of a token, or with a scale per row all of it.
    """
    config, threads = launch.shape.config, launch.shape.kernel.num_threads
    hidden = config.hidden_size
    span = loads_in_flight(hidden) * WARP_COLUMNS
    spans = (hidden + span - 1) // span
    lane = launch.thread % 32
    worker = launch.cta * (threads // 32) + launch.thread // 32
    workers = launch.num_ctas * (threads // 32)
    if launch.x != 0:
        if const_expr(config.recipe.tokens.scale_columns == WHOLE_ROW):
            for token in range(worker, launch.num_tokens, workers):
                amax = Float32(0.0)
                for part in range(spans):
                    values = unpack(load_columns(launch, token, part * span, lane))
                    for piece in values:
                        amax = arch.fmax(amax, magnitude(piece))
                scale, inverse = scale_of(largest_of_lanes(amax, 32))
                for part in range(spans):
                    values = unpack(load_columns(launch, token, part * span, lane))
                    inverses = [inverse] * len(values)
                    store_columns(launch, token, part * span, lane, values, inverses)
                if lane == 0:
                    store_scale(launch, token, 0, scale)
        else:
            lanes = FP8_BLOCK // LANE_COLUMNS
            loaded = load_columns(launch, worker // spans, worker % spans * span, lane)
            for item in range(worker, launch.num_tokens * spans, workers):
                token, first = item // spans, item % spans * span
                values = unpack(loaded)
                ahead = item + workers  # its loads are in flight meanwhile
                loaded = load_columns(launch, ahead // spans, ahead % spans * span, lane)
                scales = [scale_of(largest_of_lanes(magnitude(piece), lanes)) for piece in values]
                inverses = [inverse for _, inverse in scales]
                store_columns(launch, token, first, lane, values, inverses)
                for part in range_constexpr(len(values)):
                    column = first + part * WARP_COLUMNS + lane * LANE_COLUMNS
                    if lane % lanes == 0 and column < hidden:
                        store_scale(launch, token, column // FP8_BLOCK, scales[part][0])
        arch.fence_proxy(INPUT_QUANTIZED.kind)
