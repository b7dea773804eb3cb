"""How a layer's routed experts are stored: encoding and shapes, and whether all is there.

Owns the table of encodings. Which one a layer has is told from suffixes, dtypes and shapes, never
from the name of a model. Neighbours: `names` sorts the names, `conversions` makes weights of a
layer's precision out of an encoding.

Legend: E experts, N rows (output channels) and K columns of a matrix, H hidden, I intermediate.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

from megamoe.checkpoint.files import CheckpointError, Header, Reader
from megamoe.checkpoint.names import DOWN, GATE_UP, ExpertNames
from megamoe.precision import NO_SCALES, PRECISIONS, WHOLE_ROW, Operand

Shape = tuple[int, ...]
SCALE_SUFFIXES = ("weight_scale_inv", "scale", "weight_scale")


@dataclass(frozen=True)
class Encoding:
    """One way to store a matrix [N, K].

    precision: the recipe whose weights have the same values; what a layer should be made with.
    weight: suffix, and dtypes that it may have; item_values: how many values one item holds.
    scales: dtypes of scales; their block is that of the recipe's weights. unread: suffixes of
    tensors that say nothing more.
    """

    name: str
    precision: str
    weight: str
    weight_dtypes: tuple[str, ...]
    item_values: int = 1
    scales: tuple[str, ...] = ()
    unread: frozenset[str] = frozenset()

    @property
    def operand(self) -> Operand:
        return PRECISIONS[self.precision].weights

    @property
    def block(self) -> str:
        """In words, what shares a scale."""
        rows, columns = self.operand.scale_block
        if not rows:
            return "no scales"
        whose = "per row" if columns == WHOLE_ROW else f"per {rows} x {columns} values"
        return f"scales {whose}, {' or '.join(self.scales)},"

    def weight_shape(self, rows: int, columns: int) -> Shape:
        return rows, columns // self.item_values

    def scale_shapes(self, rows: int, columns: int) -> list[Shape]:
        """Shapes that scales may have."""
        block = self.operand.scale_block
        if block == NO_SCALES:
            return []
        if block[1] == WHOLE_ROW:
            return [(rows, 1), (rows,)]
        return [(-(-rows // block[0]), -(-columns // block[1]))]


ENCODINGS = (
    Encoding("bf16", "bf16", "weight", ("BF16",)),
    # DeepSeek-V3 and all that follow it; in DeepSeek-V4 scales are powers of two.
    Encoding(
        "fp8_block", "fp8_block", "weight", ("F8_E4M3",), scales=("F32", "BF16", "F8_E8M0")
    ),
    # compressed-tensors "float-quantized", by channel.
    Encoding("fp8_channel", "fp8_channel", "weight", ("F8_E4M3",), scales=("F32", "BF16")),
    # DeepSeek-V4.
    Encoding(
        "mxfp4", "fp8_mxfp4", "weight", ("I8", "U8"), item_values=2, scales=("F8_E8M0", "U8")
    ),
    # compressed-tensors "mxfp4-pack-quantized".
    Encoding(
        "mxfp4", "fp8_mxfp4", "weight_packed", ("U8",), item_values=2, scales=("F8_E8M0", "U8")
    ),
    # compressed-tensors "pack-quantized": value + 8, eight in an int32.
    Encoding(
        "int4", "fp8_int4", "weight_packed", ("I32",), item_values=8, scales=("F32", "BF16"),
        unread=frozenset({"weight_shape"}),
    ),
)  # fmt: skip

_GPT_OSS = (
    "is a layout of gpt-oss, which is not supported: its gate and up rows are interleaved, it has "
    "biases, and its activation is another than SwiGLU"
)
#: Suffixes that no encoding has, and why; what says most comes first.
_REFUSED = {
    "blocks": _GPT_OSS,
    "scales": _GPT_OSS,
    "bias": "is a bias, which the layer does not have",
    "weight_zero_point": "is a zero point: only symmetric integers are supported",
    "weight_g_idx": "orders columns by activation, which is not supported",
    "weight_global_scale": "is a scale of NVFP4, which is not supported",
    "weight_scale_2": "is a scale of NVFP4, which is not supported",
}


@dataclass(frozen=True)
class Stored:
    """The experts of one layer: E, H, I, and how they are stored; scale: suffix of the scales, or
    None.
    """

    layer: int
    names: ExpertNames
    encoding: Encoding
    scale: str | None
    num_experts: int
    hidden_size: int
    intermediate_size: int

    @property
    def suffixes(self) -> list[str]:
        """Of the tensors that are read, of every matrix."""
        return [self.encoding.weight, *([self.scale] if self.scale else [])]

    def name_of(self, expert: int, part: str, suffix: str) -> str:
        return self.names.matrices[None if self.names.fused else expert, part][suffix]

    def read(self, reader: Reader, expert: int, part: str, suffix: str) -> torch.Tensor:
        """A tensor of one expert, as it is stored; see `Reader.read`."""
        at = expert if self.names.fused else None
        return reader.read(self.name_of(expert, part, suffix), at)

    def shapes(self, part: str, suffix: str) -> list[Shape]:
        """Shapes that a tensor may have, with the first axis of a tensor of all experts."""
        hidden, intermediate = self.hidden_size, self.intermediate_size
        rows, columns = (hidden, intermediate) if part == DOWN else (intermediate, hidden)
        rows *= 2 if part == GATE_UP else 1
        weight = suffix == self.encoding.weight
        found = (
            [self.encoding.weight_shape(rows, columns)]
            if weight
            else self.encoding.scale_shapes(rows, columns)
        )
        return [(self.num_experts, *shape) for shape in found] if self.names.fused else found

    def dtypes(self, suffix: str) -> tuple[str, ...]:
        weight = suffix == self.encoding.weight
        return self.encoding.weight_dtypes if weight else self.encoding.scales


def listed(numbers: Iterable[int]) -> str:
    """Numbers in order, neighbours as a range: "0, 3..7"."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}..{b}" for a, b in runs)


def detect(
    layer: int, names: ExpertNames, reader: Reader, num_experts: int | None = None
) -> Stored:
    """How a layer's experts are stored, by those of its first expert; reads headers alone.
    num_experts: how many the model says that it has. Raises CheckpointError for what is not
    supported.
    """
    if names.unknown:
        raise _error(reader, names.unknown[0], "is unknown among routed experts, or there twice")
    if names.mixed:
        raise _lacking(reader, layer, "has tensors of one expert and tensors of all")
    for suffix, why in _REFUSED.items():
        for found in names.matrices.values():
            if suffix in found:
                raise _error(reader, found[suffix], why)
    first = None if names.fused else names.experts[0]
    found = names.matrices.get((first, names.parts[0]), {})
    weight = next((suffix for suffix in ("weight", "weight_packed") if suffix in found), None)
    if weight is None:
        whose = "" if first is None else f" of expert {first}"
        raise _lacking(reader, layer, f"has no {names.parts[0]} weights{whose}")
    scales = [suffix for suffix in SCALE_SUFFIXES if suffix in found]
    if len(scales) > 1:
        raise _error(reader, found[scales[1]], f"is a second scale beside {found[scales[0]]}")
    stored = _matching(layer, names, reader, found, weight, scales[0] if scales else None)
    if names.fused:
        return _upright(reader, stored)
    return replace(stored, num_experts=max(stored.num_experts, num_experts or 0))


def _matching(
    layer: int,
    names: ExpertNames,
    reader: Reader,
    found: dict[str, str],
    weight: str,
    scale: str | None,
) -> Stored:
    """The encoding that fits the headers of a matrix, the first of its expert."""
    own = reader.header(found[weight])
    if len(own.shape) != (3 if names.fused else 2):
        raise _error(reader, found[weight], f"has shape {list(own.shape)}")
    rows, items = own.shape[-2:]
    if names.fused:
        rows //= 2
    experts = own.shape[0] if names.fused else names.experts[-1] + 1
    its_scale = None if scale is None else reader.header(found[scale])
    expected: list[str] = []
    for encoding in ENCODINGS:
        if weight != encoding.weight or own.dtype not in encoding.weight_dtypes:
            continue
        stored = Stored(layer, names, encoding, scale, experts, items * encoding.item_values, rows)
        if its_scale is None or scale is None:
            if not encoding.scales:
                return stored
            expected.append(f"{encoding.name} has one of {list(SCALE_SUFFIXES)}")
            continue
        shapes = stored.shapes(names.parts[0], scale)
        if its_scale.shape in shapes and its_scale.dtype in encoding.scales:
            return stored
        expected.append(f"{encoding.name} has {encoding.block} of shape {_either(shapes)}")
    if not expected:
        known = sorted({f"{e.weight} {d}" for e in ENCODINGS for d in e.weight_dtypes})
        raise _error(reader, found[weight], f"has dtype {own.dtype}; supported are {known}")
    if its_scale is None or scale is None:
        raise _error(reader, found[weight], f"of {own.dtype} has no scale: {'; '.join(expected)}")
    shape = list(its_scale.shape)
    raise _error(
        reader,
        found[scale],
        f"of {own.dtype} weights is {its_scale.dtype} {shape}, and no scale that is supported: "
        f"{'; '.join(expected)}",
    )


def _upright(reader: Reader, stored: Stored) -> Stored:
    """The same, unless matrices of all experts are transposed."""
    if "weight" in stored.names.matrices.get((None, DOWN), {}):
        name = stored.name_of(0, DOWN, "weight")
        shape = reader.header(name).shape
        double, columns = 2 * stored.intermediate_size, stored.hidden_size
        if shape == (stored.num_experts, columns // 2, double):
            raise _error(
                reader,
                name,
                f"has shape {list(shape)}: matrices that are transposed, [E, H, 2I] and [E, I, H], "
                "are not supported",
            )
    return stored


def check(stored: Stored, reader: Reader, experts: Iterable[int]) -> None:
    """Raise CheckpointError unless every expert of the layer has its names, and the tensors of
    these experts are where they should be, with their dtypes and shapes; reads headers alone.
    """
    names = stored.names
    if not names.fused:
        missing = set(range(stored.num_experts)) - set(names.experts)
        if missing:
            what = f"lacks experts {listed(missing)} of {stored.num_experts}"
            raise _lacking(reader, stored.layer, what)
    if names.fused:
        experts = [0]
    for expert in experts:
        for part in names.parts:
            found = names.matrices.get((None if names.fused else expert, part), {})
            for suffix in sorted(found.keys() - set(stored.suffixes) - stored.encoding.unread):
                raise _error(reader, found[suffix], f"is unknown in {stored.encoding.name}")
            for suffix in stored.suffixes:
                if suffix not in found:
                    whose = "" if names.fused else f" of expert {expert}"
                    what = f"has no {part} {suffix}{whose}, as {stored.encoding.name} needs"
                    raise _lacking(reader, stored.layer, what)
                _check_header(stored, reader, found[suffix], part, suffix)


def _check_header(stored: Stored, reader: Reader, name: str, part: str, suffix: str) -> None:
    header: Header = reader.header(name)
    dtypes, shapes = stored.dtypes(suffix), stored.shapes(part, suffix)
    if header.dtype not in dtypes:
        raise _error(reader, name, f"has dtype {header.dtype}, expected one of {list(dtypes)}")
    if header.shape not in shapes:
        raise _error(reader, name, f"has shape {list(header.shape)}, expected {_either(shapes)}")


def _either(shapes: Iterable[Shape]) -> str:
    return " or ".join(str(list(shape)) for shape in shapes)


def _error(reader: Reader, name: str, what: str) -> CheckpointError:
    return CheckpointError(f"{reader.path_of(name)}: {name} {what}")


def _lacking(reader: Reader, layer: int, what: str) -> CheckpointError:
    return CheckpointError(f"{reader.source}: layer {layer} {what}")
