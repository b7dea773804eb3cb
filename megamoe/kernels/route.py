"""The router: logits of a token in, the experts that it goes to and their weights out.

A warp has a token. Its lanes hold neighbouring experts each, a group of experts is a power of two
of neighbouring lanes, and so a lower lane, or a lower place in a lane, is a lower expert: the first
of equals is the lowest. What is compared are `key`s, integers in the order of floats.

    load     every lane its experts (nothing where a table chooses)
    score    exponentials by FMA, so that every device has the same bits
    groups   two best of each, over its lanes; a group's rank among all
    choose   K times the largest key of the warp, which is then struck out: lane k has expert k
    weigh    lane k loads the logit of expert k again, from L1, and computes its weight

A launch may begin beside the kernel before it, and lets the one behind it begin at once: both wait
before they touch memory.
"""

from __future__ import annotations

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Float32, Int32, Int64, const_expr, range_constexpr

from megamoe.kernels.ptx import (
    LOG2_E,
    as_float,
    as_word,
    fma,
    global_ptr,
    load_global_if,
    max_or_nan,
    rsqrt_approx,
    store_global,
    unpack_bf16x2,
)
from megamoe.router_config import (
    LOGITS,
    OVER_ALL,
    OVER_CHOSEN,
    RENORMALIZE_EPS,
    SIGMOID,
    SOFTMAX,
    TOKENS_PER_CTA,
    WARP,
    RouterArguments,
    RouterConfig,
)

arch = cute.arch
select = cutlass.select_

#: Key of NaN, the largest; of what cannot be chosen, below that of -inf.
NAN_KEY, DEAD = 0x7FFFFFFF, -0x80000000
INFINITY = float("inf")
#: Above every place of an expert.
NOWHERE = 1 << 20
#: Adding it rounds to an integer, which is then in the lower bits.
ROUNDER = 12582912.0  # 1.5 * 2^23
LN2_HIGH, LN2_LOW = 0.693145751953125, 1.42860682030941723212e-6  # the first has 15 bits
#: exp is 0 below: what is left of the normal range.
LOWEST = -87.0
EXP_TERMS = (1 / 5040, 1 / 720, 1 / 120, 1 / 24, 1 / 6, 1 / 2, 1.0, 1.0)
#: log1p(t) / t for t in 0..1, off by at most 5e-9 of it; no division, as a series of atanh has.
LOG1P_TERMS = (
    -0.003244024235755205, 0.019851457327604294, -0.056959524750709534, 0.10603653639554977,
    -0.15305592119693756, 0.1967593878507614, -0.24954134225845337, 0.3332996368408203,
    -0.4999990165233612, 1.0,
)  # fmt: skip


def polynomial(terms, x):
    """Sum of terms times powers of x, the highest first."""
    total = Float32(terms[0])
    for term in terms[1:]:
        total = fma(total, x, Float32(term))
    return total


def exp_below_zero(x):
    """exp of x <= 0, to about 1 unit in the last place: 2^n times a polynomial of what is left.
    0 below LOWEST; NaN stays.
    """
    bounded = max_or_nan(x, Float32(LOWEST))
    rounded = fma(bounded, Float32(LOG2_E), Float32(ROUNDER))
    n = rounded - Float32(ROUNDER)
    rest = fma(n, Float32(-LN2_HIGH), bounded)
    rest = fma(n, Float32(-LN2_LOW), rest)
    power = as_float((as_word(rounded) << 23) + Int32(0x3F800000))  # 2^n
    return select(x < Float32(LOWEST), Float32(0.0), polynomial(EXP_TERMS, rest) * power)


# Division and square root have a branch for rare operands, so that one score would wait for the
# other. These have none, and their last correction is exact but for one result in a million: they
# give the bits of IEEE, whatever the approximation began with.


def quotient(a, b):
    """a / b, rounded to nearest, for b of 1 to 2."""
    inverse = arch.rcp_approx(b)
    inverse = fma(fma(-b, inverse, Float32(1.0)), inverse, inverse)
    result = a * inverse
    return fma(fma(-b, result, a), inverse, result)


def square_root(x):
    """sqrt(x), rounded to nearest, for a normal x; 0, infinity and NaN stay."""
    inverse = rsqrt_approx(x)
    result = x * inverse
    result = fma(fma(-result, result, x), inverse * Float32(0.5), result)
    inside = Int32(x > Float32(0.0)) & Int32(x < Float32(INFINITY))
    return select(inside == 1, result, x)


def sigmoid(x):
    """1 / (1 + exp(-x)), of whose exponential nothing overflows."""
    e = exp_below_zero(-magnitude(x))
    return quotient(select(x < Float32(0.0), e, Float32(1.0)), e + Float32(1.0))


def sqrt_softplus(x):
    """sqrt(log(1 + exp(x))) = sqrt(max(x, 0) + log1p(exp(-|x|)))."""
    t = exp_below_zero(-magnitude(x))
    return square_root(fma(t, polynomial(LOG1P_TERMS, t), max_or_nan(x, Float32(0.0))))


def magnitude(x):
    return as_float(as_word(x) & Int32(0x7FFFFFFF))


def key(value):
    """An Int32 that is in the order of floats; one for both zeros, NaN above all."""
    word = as_word(value)
    ordered = word ^ ((word >> 31) & Int32(0x7FFFFFFF))
    ordered = select(value == Float32(0.0), Int32(0), ordered)
    return select(value != value, Int32(NAN_KEY), ordered)


def value_of(ordered):
    """The float of a key; that of DEAD is NaN."""
    return as_float(ordered ^ ((ordered >> 31) & Int32(0x7FFFFFFF)))


def largest(keys):
    best = keys[0]
    for other in keys[1:]:
        best = max_of(best, other)
    return best


def max_of(a, b):
    return select(a > b, a, b)


def min_of(a, b):
    return select(a < b, a, b)


def sum_of_lanes(value, lanes: int = WARP):
    """Over aligned groups of lanes, in an order of its own: the same bits in every lane."""
    step = 1
    while step < lanes:
        value = value + arch.shuffle_sync_bfly(value, offset=step)
        step *= 2
    return value


class RouterKernel:
    """The kernel of one configuration. Integers only until `__call__` is traced."""

    def __init__(self, config: RouterConfig):
        self.config = config

    # ------------------------------------------------------------------ host
    @cute.jit
    def __call__(self, arguments: RouterArguments, stream: cuda.CUstream):
        ctas = (arguments.num_tokens + (TOKENS_PER_CTA - 1)) // TOKENS_PER_CTA
        self.kernel(arguments).launch(
            grid=(ctas, 1, 1),
            block=(WARP * TOKENS_PER_CTA, 1, 1),
            use_pdl=True,
            stream=stream,
        )

    # ---------------------------------------------------------------- device
    @cute.kernel
    def kernel(self, launch: RouterArguments):
        thread, _, _ = arch.thread_idx()
        cta, _, _ = arch.block_idx()
        token = cta * TOKENS_PER_CTA + thread // WARP
        lane = thread % WARP
        arch.griddepcontrol_launch_dependents()
        arch.griddepcontrol_wait()
        if token < launch.num_tokens:
            expert, weight = Int32(-1), Float32(0.0)
            if self.is_token(launch, token) == 1:
                expert, weight = self.route(launch, token, lane)
            self.store(launch, token, lane, expert, weight)

    @cute.jit
    def is_token(self, launch: RouterArguments, token) -> Int32:
        """0 for padding."""
        valid = launch.num_valid
        if launch.valid_tokens != 0:
            valid = min_of(valid, global_ptr(launch.valid_tokens)[0])
        good = Int32(token < valid)
        if launch.mask != 0:
            byte = global_ptr(launch.mask + token, cutlass.Uint8, 1)[0]
            good = good & Int32(byte != cutlass.Uint8(0))
        return good

    @cute.jit
    def route(self, launch: RouterArguments, token, lane):
        """(expert or -1, weight) of slot `lane` of a token; -1 and 0 for lanes from K on."""
        config = self.config
        softmax = config.score == SOFTMAX and config.softmax_over == OVER_ALL
        row = launch.logits + Int64(token) * launch.row_bytes
        top, total = Float32(0.0), Float32(1.0)
        if const_expr(config.reads_rows):
            logits = self.load(row, lane, LOGITS[config.logits])
            if const_expr(softmax):
                keys = self.living(lane, [key(logit) for logit in logits])
                top = value_of(arch.warp_redux_sync(largest(keys), "max"))
                total = sum_of_lanes(sum_up([exp_below_zero(x - top) for x in logits]))
        if const_expr(config.hashed):
            expert = self.look_up(launch, token, lane)
        else:
            expert = self.choose(launch, lane, logits, top, total)
        return self.weigh(row, expert, top, total, launch.scaling_factor)

    # Rows: experts of a lane

    def first_in_group(self, lane):
        return lane % self.config.lanes_per_group * self.config.experts_per_lane

    def first_expert(self, lane):
        config = self.config
        return lane // config.lanes_per_group * config.group_size + self.first_in_group(lane)

    def load(self, row, lane, item: int):
        """The values of a lane's experts as a list of Float32; -inf where it has none."""
        config = self.config
        size = config.load_bytes(item)
        first, inside = self.first_expert(lane), self.first_in_group(lane)
        words = []
        for at in range(0, config.experts_per_lane, size // item):
            there = Int32(inside + at < config.group_size)
            words += load_global_if(row + Int64(first + at) * item, there, size)
        values = [as_float(word) for word in words]
        if item == 2:
            values = [value for word in words for value in unpack_bf16x2(word)]
            values = values[:: 2 if size == 2 else 1]
        if config.experts_per_lane * config.lanes_per_group == config.group_size:
            return values
        return [
            select(inside + j < config.group_size, value, Float32(-INFINITY))
            for j, value in enumerate(values)
        ]

    def living(self, lane, keys):
        """The keys, DEAD where a lane has no expert."""
        config = self.config
        if config.experts_per_lane * config.lanes_per_group == config.group_size:
            return keys
        inside = self.first_in_group(lane)
        return [
            select(inside + j < config.group_size, one, Int32(DEAD)) for j, one in enumerate(keys)
        ]

    # Scores

    def score(self, logit, top, total):
        """Of a logit; top, total: the largest logit and the sum of exponentials of a softmax."""
        if self.config.score == SOFTMAX:
            return exp_below_zero(logit - top) / total
        return sigmoid(logit) if self.config.score == SIGMOID else sqrt_softplus(logit)

    # Choosing

    @cute.jit
    def choose(self, launch: RouterArguments, lane, logits: list, top, total) -> Int32:
        """The expert of slot `lane`, -1 from K on."""
        config = self.config
        values = logits
        if const_expr(not config.chooses_by_logit):
            values = [self.score(logit, top, total) for logit in logits]
            if const_expr(config.correction_bias):
                biases = self.load(launch.correction_bias, lane, 4)
                values = [values[j] + biases[j] for j in range(len(values))]
        keys = self.living(lane, [key(value) for value in values])
        if const_expr(config.num_groups > 1):
            kept = self.rank_of_group(lane, keys) < config.topk_groups
            keys = [select(kept, one, Int32(DEAD)) for one in keys]
        first = self.first_expert(lane)
        expert = Int32(-1)
        for slot in range_constexpr(config.top_k):
            best = arch.warp_redux_sync(largest(keys), "max")
            place = Int32(NOWHERE)
            for j in reversed(range(len(keys))):
                place = select(keys[j] == best, Int32(j), place)
            winner = arch.warp_redux_sync(first + place, "min")
            if const_expr(slot + 1 < config.top_k):
                mine = winner - first
                keys = [select(mine == j, Int32(DEAD), one) for j, one in enumerate(keys)]
            expert = select(lane == slot, winner, expert)
        return expert

    def rank_of_group(self, lane, keys):
        """How many groups are better than that of this lane: the two best of its experts sum
        higher, or as high and it has a lower number.
        """
        config = self.config
        best, second = keys[0], Int32(DEAD)
        for one in keys[1:]:
            second = max_of(second, min_of(best, one))
            best = max_of(best, one)
        step = 1
        while step < config.lanes_per_group:
            other_best = arch.shuffle_sync_bfly(best, offset=step)
            other_second = arch.shuffle_sync_bfly(second, offset=step)
            second = max_of(min_of(best, other_best), max_of(second, other_second))
            best = max_of(best, other_best)
            step *= 2
        mine = key(value_of(best) + value_of(second))
        group, rank = lane // config.lanes_per_group, Int32(0)
        for other in range(config.num_groups):
            theirs = arch.shuffle_sync(mine, other * config.lanes_per_group)
            ahead = Int32(theirs > mine) | (Int32(theirs == mine) & Int32(group > other))
            rank = rank + ahead
        return rank

    @cute.jit
    def look_up(self, launch: RouterArguments, token, lane) -> Int32:
        """The expert that the table has for slot `lane` of a token, -1 for none."""
        config = self.config
        number = Int64(0)
        if launch.wide_ids == 1:
            number = global_ptr(launch.input_ids + Int64(token) * 8, Int64, 8)[0]
        else:
            number = Int64(global_ptr(launch.input_ids + Int64(token) * 4)[0])
        expert = Int64(-1)
        if number >= 0 and number < launch.vocabulary and lane < config.top_k:
            at = number * config.top_k + lane
            if launch.wide_table == 1:
                expert = global_ptr(launch.tid2eid + at * 8, Int64, 8)[0]
            else:
                expert = Int64(global_ptr(launch.tid2eid + at * 4)[0])
        found = Int32(-1)
        if expert >= 0 and expert < config.num_experts:
            found = Int32(expert)
        return found

    # Weights

    @cute.jit
    def weigh(self, row, expert, top, total, factor):
        """(expert, weight) of a lane that has one, (-1, 0) of the others."""
        config = self.config
        item: Constexpr = LOGITS[config.logits]
        there = Int32(expert >= 0)
        (word,) = load_global_if(row + Int64(expert) * item, there, item)
        logit = as_float(word) if item == 4 else unpack_bf16x2(word)[0]
        if const_expr(config.softmax_over == OVER_CHOSEN):
            best = select(there == 1, key(logit), Int32(DEAD))
            top = value_of(arch.warp_redux_sync(best, "max"))
            weight = select(there == 1, exp_below_zero(logit - top), Float32(0.0))
            weight = weight / sum_of_lanes(weight)
        else:
            weight = select(there == 1, self.score(logit, top, total), Float32(0.0))
        if const_expr(config.renormalize and config.softmax_over == OVER_ALL):
            weight = weight / (sum_of_lanes(weight) + Float32(RENORMALIZE_EPS))
        weight = select(there == 1, weight * factor, Float32(0.0))
        return expert, weight

    @cute.jit
    def store(self, launch: RouterArguments, token, lane, expert, weight):
        config = self.config
        if lane < config.top_k:
            slot = Int64(token) * config.top_k + lane
            store_global(launch.topk_weights + slot * 4, as_word(weight))
            if launch.wide_idx == 1:
                global_ptr(launch.topk_idx + slot * 8, Int64, 8)[0] = Int64(expert)
            else:
                store_global(launch.topk_idx + slot * 4, expert)


def sum_up(values):
    """Of a list, neighbours first."""
    while len(values) > 1:
        pairs = zip(values[::2], values[1::2], strict=False)
        values = [a + b for a, b in pairs] + values[len(values) // 2 * 2 :]
    return values[0]
