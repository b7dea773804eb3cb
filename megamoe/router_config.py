"""The problem that a router kernel is built for (`RouterConfig`), what of it is legal, how a warp
shares a row of logits, and the arguments of a launch.

Letters: T tokens, K top-k, E experts, V token ids of a vocabulary. The configuration holds
integers, flags and names, so it keys caches; what changes from launch to launch (T, strides, the
scaling factor, integer widths of ids) is an argument.

Neighbours: `router_reference` and `kernels.route` compute what it describes, `router` launches.
"""

from __future__ import annotations

from ctypes import c_int32, c_void_p
from dataclasses import dataclass, fields

from megamoe.config import MAX_TOP_K
from megamoe.signature import F32, I32, I64, fields_of

MAX_EXPERTS = 512
WARP = 32
SCORES = SOFTMAX, SIGMOID, SQRTSOFTPLUS = ("softmax", "sigmoid", "sqrtsoftplus")
#: What a softmax is taken over: every expert of a row, or those that a token has chosen.
OVER_ALL, OVER_CHOSEN = SOFTMAX_OVER = ("all", "chosen")
#: Bytes of a logit by dtype.
LOGITS = {"float32": 4, "bfloat16": 2}
#: Added to the sum of weights before they are divided by it, as DeepSeek-V3's router does.
RENORMALIZE_EPS = 1e-20
#: Tokens of a CTA, a warp each.
TOKENS_PER_CTA = 4


@dataclass(frozen=True)
class RouterConfig:
    """A router from logits [T, E] to K experts and weights per token.

    score: of an expert, from its logit. softmax_over: which experts a softmax is taken over.
    correction_bias: a bias per expert is added to scores for choosing only. num_groups: groups of
    E / num_groups neighbouring experts, of which those topk_groups are kept whose two best sum
    highest. renormalize: weights of a token are divided by their sum. hashed: a table says which
    experts a token id has, and logits only weigh them. logits: their dtype.
    """

    num_experts: int
    top_k: int
    score: str = SOFTMAX
    softmax_over: str = OVER_ALL
    num_groups: int = 1
    topk_groups: int = 1
    renormalize: bool = True
    correction_bias: bool = False
    hashed: bool = False
    logits: str = "float32"

    @property
    def chooses_by_logit(self) -> bool:
        """Whether logits say which experts are best, as scores grow with them; else scores and
        bias do.
        """
        return not self.correction_bias and self.num_groups == 1

    @property
    def reads_rows(self) -> bool:
        """Whether a launch reads every logit of a token, and not just those of its experts."""
        return not self.hashed or (self.score, self.softmax_over) == (SOFTMAX, OVER_ALL)

    @property
    def group_size(self) -> int:
        return self.num_experts // self.num_groups

    @property
    def lanes_per_group(self) -> int:
        """Neighbouring lanes of a warp that hold the experts of a group."""
        return WARP // self.num_groups

    @property
    def experts_per_lane(self) -> int:
        """Neighbouring experts that a lane holds; the last lanes of a group may have fewer."""
        return -(-self.group_size // self.lanes_per_group)

    def load_bytes(self, item: int) -> int:
        """Bytes of a load of a lane from a row of E items: what a row must be aligned to."""
        starts = self.experts_per_lane * item, self.group_size * item
        return max(size for size in (16, 8, 4, 2) if all(start % size == 0 for start in starts))


def canonical(config: RouterConfig) -> RouterConfig:
    """The same router with the fields that change nothing at one value, so that one kernel does;
    ValueError, naming the field, if it is not legal.
    """
    check(config)
    changes: dict[str, object] = {}
    if config.topk_groups == config.num_groups:
        changes |= {"num_groups": 1, "topk_groups": 1}
    if config.softmax_over == OVER_CHOSEN:
        changes |= {"renormalize": False}  # their sum is one
    return RouterConfig(**{**vars(config), **changes})


def check(config: RouterConfig) -> None:
    """Raise ValueError, naming field and value, unless there is such a router."""
    for field in fields(RouterConfig):
        value = getattr(config, field.name)
        kind = {"int": int, "bool": bool, "str": str}[str(field.type)]
        if type(value) is not kind:
            raise ValueError(f"{field.name}={value!r} must be {_ARTICLES[kind]}")
    _check_within("num_experts", config.num_experts, MAX_EXPERTS)
    _check_within("top_k", config.top_k, min(MAX_TOP_K, config.num_experts))
    for name, choices in (("score", SCORES), ("softmax_over", SOFTMAX_OVER), ("logits", LOGITS)):
        value = getattr(config, name)
        if value not in choices:
            raise ValueError(f"{name}={value!r} is not supported; choose one of {list(choices)}")
    _check_groups(config)
    if config.softmax_over == OVER_CHOSEN:
        refused = {
            f"score={config.score!r}": config.score != SOFTMAX,
            "correction_bias": config.correction_bias,
            f"num_groups={config.num_groups}": config.num_groups > 1,
        }
        for what, given in refused.items():
            if given:
                raise ValueError(
                    f"{what} does not go with softmax_over={OVER_CHOSEN!r}, which chooses by logit"
                )
    if config.hashed:
        if config.correction_bias:
            raise ValueError("correction_bias does not go with tid2eid, which chooses the experts")
        if config.num_groups > 1:
            raise ValueError(
                f"num_groups={config.num_groups} does not go with tid2eid, which chooses the "
                "experts"
            )


_ARTICLES = {int: "an integer", bool: "True or False", str: "a name"}


def _check_within(name: str, value: int, most: int) -> None:
    if not 1 <= value <= most:
        raise ValueError(f"{name}={value} must be in 1..{most}")


def _check_groups(config: RouterConfig) -> None:
    groups, kept, experts = config.num_groups, config.topk_groups, config.num_experts
    if groups < 1 or groups > WARP or groups & (groups - 1):
        raise ValueError(f"num_groups={groups} must be a power of two in 1..{WARP}")
    if experts % groups:
        raise ValueError(f"num_experts={experts} is not divisible by num_groups={groups}")
    _check_within("topk_groups", kept, groups)
    if groups > 1 and config.group_size < 2:
        raise ValueError(
            f"num_groups={groups} leaves groups of {config.group_size} of num_experts={experts}: "
            "a group is judged by its two best"
        )
    if config.top_k > kept * config.group_size:
        raise ValueError(
            f"top_k={config.top_k} is more than the {kept * config.group_size} experts of "
            f"topk_groups={kept} groups"
        )


@dataclass(frozen=True)
class RouterArguments:
    """What a launch reads, in the order of the kernel's parameters. Addresses are in bytes."""

    logits: I64  # float32 or bfloat16 [T, E]
    correction_bias: I64  # float32 [E]
    tid2eid: I64  # int32 or int64 [V, K]
    input_ids: I64  # int32 or int64 [T]
    valid_tokens: I64  # int32: how many of the first rows are tokens; or 0
    mask: I64  # a byte [T], 0 for padding; or 0
    topk_idx: I64  # int32 or int64 [T, K]
    topk_weights: I64  # float32 [T, K]
    row_bytes: I64  # from a row of logits to the next
    vocabulary: I64  # V
    num_tokens: I32  # T
    num_valid: I32  # rows from here on are padding
    wide_table: I32  # 1 if tid2eid holds int64
    wide_ids: I32  # 1 if input_ids holds int64
    wide_idx: I32  # 1 if topk_idx holds int64
    scaling_factor: F32  # of weights


#: Arguments of the C entry, in order.
ARGUMENTS = (*fields_of(RouterArguments), ("stream", c_void_p), ("status", c_int32))
