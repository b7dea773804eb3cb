"""The arguments of a forward: one item per rank, checked before anything is launched."""

from __future__ import annotations

import bisect
import itertools
from typing import Any

import torch

from megamoe.config import MoEConfig
from megamoe.weights import ALIGNMENT, address_of, check_tensor
from workspace.views import Workspace

#: Arguments of a forward, in order; those after the third may be None.
NAMES = ("x", "topk_idx", "topk_weights", "x_scale", "out", "expert_counts")
REQUIRED = 3
#: The output that nobody passed.
IMPLICIT = "the output"


def columns_of(single: bool, *arguments: Any) -> list[list]:
    """The arguments of a forward as lists with one item per rank; `single`: they are plain."""
    if single:
        return [[argument] for argument in arguments]
    columns: list[list] = []
    for position, (name, argument) in enumerate(zip(NAMES, arguments, strict=True)):
        if argument is None and position >= REQUIRED:
            argument = [None] * len(columns[0])
        try:
            columns.append(list(argument))
        except TypeError:
            kind = type(argument).__name__
            raise ValueError(
                f"{name} must be a tensor, or a list of one for each rank, got {kind}"
            ) from None
    return columns


class InputCheck:
    """What a forward of one layer takes, settled once, because every forward is checked."""

    def __init__(self, config: MoEConfig, device: torch.device, workspace: Workspace):
        self.config, self.device = config, device
        self.ranks = workspace.local_ranks
        self.output = getattr(torch, config.recipe.output)
        self.output_row_bytes = config.hidden_size * self.output.itemsize
        views = [workspace.regions(rank) for rank in self.ranks]
        self.outputs = [view["layer_output"].data_ptr() for view in views]
        scaled = config.recipe.tokens.has_scales
        self.scales = [view["input_scale_buffer"] for view in views if scaled]

    def rows(self, single: bool, *arguments: Any) -> list[tuple]:
        """The arguments of a forward by rank of this process (see NAMES), checked; `single`: they
        are plain. Raises ValueError, naming the argument, unless they are what the layer takes.
        """
        if single and len(self.ranks) == 1:
            rows = [arguments]
        else:
            columns = columns_of(single, *arguments)
            for name, items in zip(NAMES, columns, strict=True):
                if len(items) != len(self.ranks):
                    raise ValueError(
                        f"{name} holds {len(items)} tensors, expected one for each of "
                        f"{len(self.ranks)} ranks"
                    )
            rows = list(zip(*columns, strict=True))
        read: list[tuple] = []
        written: list[tuple] = []
        for number, row in enumerate(rows):
            self._check_rank(number, read, written, *row)
        self._check_apart(read, [span for span in written if span[0] < span[1]])
        return rows

    def _label(self, name: str, number: int) -> str:
        """How errors call an argument of rank number `number` of this process."""
        return f"{name}[{number}]" if len(self.ranks) > 1 else name

    def _place(
        self, name: str, number: int, tensor, shape: tuple, dtype: torch.dtype, alignment: int = 1
    ) -> tuple[int, int, str, int]:
        """(begin, end, name, number) of the memory of an argument that has the right shape etc."""
        address = address_of(tensor, shape, dtype, self.device, alignment)
        if address is None:
            label = self._label(name, number)
            check_tensor(label, tensor, shape, dtype, self.device, alignment)
            raise AssertionError(f"{label} has no address, and nothing is wrong with it")
        return address, address + tensor.nbytes, name, number

    def _check_rank(
        self, number: int, read: list, written: list, x, idx, weight, scale, out, count
    ) -> None:
        """Check the arguments of one rank; add memory that is read, and that is written."""
        config, place = self.config, self._place
        hidden = config.hidden_size
        if not isinstance(x, torch.Tensor) or x.dim() != 2:
            label = self._label("x", number)
            raise ValueError(f"{label} must be a tensor of shape [T, {hidden}]")
        tokens = x.shape[0]
        if tokens > config.max_tokens_per_rank:
            raise ValueError(
                f"{self._label('x', number)} has T={tokens} tokens > "
                f"max_tokens_per_rank={config.max_tokens_per_rank}"
            )
        rows, choices = (tokens, hidden), (tokens, config.top_k)
        token, quantized = torch.bfloat16, config.recipe.tokens.has_scales
        if scale is not None or (quantized and x.dtype == torch.float8_e4m3fn):
            token = self._check_scale(number, x, scale)
            begin = scale.data_ptr()
            read.append((begin, begin + scale.nbytes, "x_scale", number))
        read.append(place("x", number, x, rows, token, ALIGNMENT))
        read.append(place("topk_weights", number, weight, choices, torch.float32))
        narrow = getattr(idx, "dtype", None) == torch.int32
        read.append(place("topk_idx", number, idx, choices, torch.int32 if narrow else torch.int64))
        if out is None:
            begin = self.outputs[number]
            written.append((begin, begin + tokens * self.output_row_bytes, IMPLICIT, number))
        else:
            written.append(place("out", number, out, rows, self.output, ALIGNMENT))
            _check_writable(self._label("out", number), out)
        if count is not None:
            routed = (config.experts_per_rank,)
            written.append(place("expert_counts", number, count, routed, torch.int32))
            _check_writable(self._label("expert_counts", number), count)

    def _check_scale(self, number: int, x: torch.Tensor, scale: Any) -> torch.dtype:
        """Check the scales of a quantised x; the dtype that x must have."""
        config, label = self.config, self._label("x_scale", number)
        if not config.recipe.tokens.has_scales:
            raise ValueError(f"{label} is given, but precision={config.precision!r} has no scales")
        shape = (x.shape[0], config.token_scales)
        if scale is None:
            raise ValueError(
                f"{label} is missing: x of {x.dtype} needs float32 {list(shape)} with "
                f"precision={config.precision!r}"
            )
        buffer = self.scales[number][: x.shape[0], : config.token_scales]
        there = isinstance(scale, torch.Tensor) and scale.data_ptr() == buffer.data_ptr()
        if not (there and scale.dtype == buffer.dtype and scale.numel()):
            check_tensor(label, scale, shape, torch.float32, self.device)
        elif scale.shape != shape or scale.stride() != buffer.stride():
            raise ValueError(
                f"{label} starts in the scale buffer, but has shape {list(scale.shape)} and "
                f"strides {list(scale.stride())}, expected {list(shape)} and "
                f"{list(buffer.stride())}"
            )
        return getattr(torch, config.recipe.tokens.storage)

    def _check_apart(self, read: list[tuple], written: list[tuple]) -> None:
        """Raise ValueError if what a forward writes shares memory with what it reads, on any rank,
        or with something else that it writes: rows are written while ranks still read others. Items
        are (begin, end, name, number).
        """
        spans = written
        if len(written) > 1:
            spans = sorted(written)
            for first, second in itertools.pairwise(spans):
                if second[0] < first[1]:
                    labels = sorted(self._label(*span[2:]) for span in (first, second))
                    raise ValueError(f"{labels[0]} and {labels[1]} overlap")
        near = spans
        for begin, end, name, number in read:
            if len(spans) > 2:  # else a look at both is quicker
                at = bisect.bisect(spans, (begin,))
                near = spans[max(at - 1, 0) : at + 1]
            for other_begin, other_end, other, other_number in near:
                if begin < other_end and other_begin < end:
                    hint = ": pass out=, or a copy" if other == IMPLICIT else ""
                    label = self._label(other, other_number)
                    raise ValueError(f"{label} and {self._label(name, number)} overlap{hint}")


def _check_writable(name: str, tensor: torch.Tensor) -> None:
    """Raise ValueError, naming the tensor, if autograd forbids to write it in place here."""
    if tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} requires grad, but a forward records none")
    if tensor.is_inference() and not torch.is_inference_mode_enabled():
        raise ValueError(f"{name} is an inference tensor, used outside of torch.inference_mode")
