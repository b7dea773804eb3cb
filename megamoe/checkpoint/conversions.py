"""What an encoding becomes in a layer's precision.

A pair that is not in `possible` is refused: values are never decoded and rounded a second time.
Every conversion has one expert at a time on the layer's device.
"""

from __future__ import annotations

import torch

from megamoe.checkpoint.encodings import Encoding, Stored
from megamoe.checkpoint.files import CheckpointError, Reader
from megamoe.checkpoint.names import DOWN, GATE, UP
from megamoe.fourbit import NAN_EXPONENT, to_fp8_block
from megamoe.precision import FP8_BLOCK, PRECISIONS, Precision, precision_of
from megamoe.reference import Weights
from megamoe.weights import empty_weights, quantize_weights

#: INT4 of compressed-tensors is value + 8: this makes two's complement of the two of a byte.
_SIGN_BITS = 0x88


def possible(encoding: Encoding) -> list[str]:
    """Precisions that a layer with these weights may have, the best first."""
    same = [name for name, recipe in PRECISIONS.items() if recipe.weights == encoding.operand]
    if encoding.name == "bf16":
        return [*same, *(name for name in PRECISIONS if name not in same)]
    return [*same, "fp8_block"] if encoding.name == "mxfp4" else same


def _copy(source: torch.Tensor, into: torch.Tensor) -> None:
    """Stored values into a tensor of a layer: bytes as they are, scales exactly."""
    if into.dtype == torch.uint8:
        source = source.view(torch.uint8)
    into.copy_(source.view(into.shape))


def _is_finite(values: torch.Tensor) -> bool:
    """Of codes of 4 bits, which all are, and of exponents too. Waits for the device."""
    if values.dtype == torch.uint8:
        return not bool((values == NAN_EXPONENT).any())
    return bool(torch.isfinite(values).all())


class Conversion:
    """Reads experts of a layer for one precision.

    inexact_blocks: of the experts that were read, how many 128 x 128 blocks have a value that
    "fp8_block" does not hold exactly; 0 but for MXFP4. Raises CheckpointError for a precision that
    is not `possible`.
    """

    def __init__(self, stored: Stored, reader: Reader, precision: str, device: torch.device):
        allowed = possible(stored.encoding)
        if precision not in allowed:
            raise CheckpointError(
                f"layer {stored.layer} is stored as {stored.encoding.name}, which cannot become "
                f"precision={precision!r}: make the layer with one of {allowed}"
            )
        self._stored, self._reader = stored, reader
        self._recipe: Precision = precision_of(precision)
        self.inexact_blocks = 0
        self._one: Weights | None = None  # an expert as it is stored, if it is converted
        if self._recipe.weights != stored.encoding.operand:
            own = precision_of(stored.encoding.precision)
            self._one = empty_weights(own, 1, stored.hidden_size, stored.intermediate_size, device)

    def read(self, expert: int, into: Weights) -> None:
        """Write an expert of the checkpoint into tensors of this one expert."""
        if self._one is None:
            self._read_stored(expert, into)
            return
        self._read_stored(expert, self._one.of(0))
        for source, target in zip(self._converted(self._one), into, strict=True):
            if source is not None and target is not None:
                target.copy_(source[0])

    def _converted(self, one: Weights) -> Weights:
        if self._stored.encoding.name == "bf16":
            return quantize_weights(one.w13, one.w2, self._recipe.name)
        assert one.w13_scale is not None and one.w2_scale is not None
        w13, w2 = to_fp8_block(one.w13, one.w13_scale), to_fp8_block(one.w2, one.w2_scale)
        self.inexact_blocks += w13.num_inexact_blocks + w2.num_inexact_blocks
        return Weights(w13.stored, w2.stored, w13.scale, w2.scale)

    def _read_stored(self, expert: int, into: Weights) -> None:
        """An expert as it is stored; the gate's rows before those of up."""
        stored = self._stored
        quantised = self._one is not None and stored.scale is None
        for suffix in stored.suffixes:
            scale = suffix != stored.encoding.weight
            w13, w2 = (into.w13_scale, into.w2_scale) if scale else (into.w13, into.w2)
            assert w13 is not None and w2 is not None
            rows = len(w13) // 2
            places = {GATE: w13[:rows], UP: w13[rows:], DOWN: w2}
            for part in stored.names.parts:
                source = stored.read(self._reader, expert, part, suffix)
                place = places.get(part, w13)
                _copy(source, place)
                if (scale or quantised) and not _is_finite(place):
                    name = stored.name_of(expert, part, suffix)
                    raise CheckpointError(
                        f"{self._reader.path_of(name)}: {name} has a value of expert {expert} that "
                        "is not finite"
                    )
        if stored.encoding.name == "int4":
            into.w13.bitwise_xor_(_SIGN_BITS)
            into.w2.bitwise_xor_(_SIGN_BITS)


def num_blocks(stored: Stored, experts: int) -> int:
    """128 x 128 blocks of so many experts."""
    return experts * 3 * stored.hidden_size * stored.intermediate_size // FP8_BLOCK**2
