"""A checkpoint and the layers that are loaded from it."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megamoe.checkpoint.conversions import Conversion, num_blocks, possible
from megamoe.checkpoint.encodings import Stored, check, detect, listed
from megamoe.checkpoint.files import CheckpointError, Files
from megamoe.checkpoint.model_config import read_config
from megamoe.checkpoint.names import experts_by_layer
from megamoe.module import MegaMoE
from megamoe.progress import Progress
from megamoe.reference import Weights


@dataclass(frozen=True)
class Loaded:
    """What a load has done. experts: numbers of those that were read; encoding: how they are
    stored.

    requantized_groups: of 4-bit weights, see `MegaMoE.load_weights`. inexact_blocks, of num_blocks:
    128 x 128 blocks of MXFP4 with a value that "fp8_block" does not hold exactly, which was
    rounded: those whose exponents differ by more than 14.
    """

    layer: int
    experts: range
    encoding: str
    precision: str
    requantized_groups: int
    inexact_blocks: int
    num_blocks: int


class Checkpoint:
    """The routed experts of a checkpoint in safetensors files.

    path: a directory with `model.safetensors.index.json` or `model.safetensors`, or one such file;
    `config.json` beside it is read if it is there. Only names are read here.

    Encodings: bf16; fp8_block (e4m3 and a scale per 128 x 128); fp8_channel (e4m3 and a scale per
    output channel); mxfp4 (as DeepSeek-V4 and compressed-tensors have it); int4 (as
    compressed-tensors has it, with groups of 128). Experts lie in tensors of their own, or all in
    `experts.gate_up_proj` [E, 2I, H] and `experts.down_proj` [E, H, I].

    Raises CheckpointError (a ValueError), naming file and tensor, for what is missing, damaged or
    not supported, and ModuleNotFoundError without the safetensors library.
    """

    def __init__(self, path: Path | str):
        self._files = Files(path)
        self._names = experts_by_layer(self._files.names)
        if not self._names:
            raise CheckpointError(
                f"{self._files.source} names no routed experts, as layers.N.mlp.experts..."
            )
        self._config = read_config(self._files.directory)

    @property
    def layers(self) -> list[int]:
        """Numbers of the layers that have routed experts; a predictor that is named as a layer,
        behind the last (DeepSeek-V3, GLM-4.x), is one of them.
        """
        return list(self._names)

    def describe(self, layer: int | None = None) -> str:
        """A line on the checkpoint and on one layer, by default the first; reads headers alone."""
        stored = self._stored(layer)
        clamp = self._config.activation_clamp
        return (
            f"{self._files.source}: experts in layers {listed(self.layers)}; layer {stored.layer}: "
            f"{stored.num_experts} experts as {stored.encoding.name}, "
            f"hidden_size={stored.hidden_size}, intermediate_size={stored.intermediate_size}, "
            f"top_k={self._config.top_k}, activation_clamp={clamp}; for precision "
            f"{', '.join(possible(stored.encoding))}"
        )

    def moe_arguments(self, layer: int | None = None) -> dict[str, Any]:
        """Arguments of `MegaMoE` that follow from the checkpoint: num_experts, top_k, hidden_size,
        intermediate_size, activation_clamp, and the precision that takes the weights as they are;
        of one layer, by default the first.

        Raises CheckpointError if `config.json` does not name top_k, if tensors have other sizes
        than it says, or if it names an activation that the layer has not.
        """
        stored, config = self._stored(layer), self._config
        self._check_activation()
        if config.top_k is None:
            raise CheckpointError(f"{config.path} is missing, or has no num_experts_per_tok")
        sizes = ("num_experts", "hidden_size", "intermediate_size")
        for size in sizes:
            told, found = getattr(config, size), getattr(stored, size)
            if told not in (None, found):
                raise CheckpointError(
                    f"{config.path} says {size}={told}, but tensors of layer {stored.layer} "
                    f"have {found}"
                )
        return {size: getattr(stored, size) for size in sizes} | {
            "top_k": config.top_k,
            "precision": stored.encoding.precision,
            "activation_clamp": config.activation_clamp,
        }

    def load(self, moe: MegaMoE, layer: int) -> Loaded:
        """Load a layer's experts that live in this process: with a group those of its rank, else
        all.

        Values go into the tensors that the layer has, under captured graphs too, or into new ones
        (see `MegaMoE.load_experts`). What is stored in the layer's precision is copied from mapped
        files to its place; else, and with 4-bit weights, one expert at a time is converted on the
        layer's device: bf16 is quantised (`quantize_weights`), mxfp4 becomes "fp8_block" by powers
        of two. Of tensors of all experts only the parts of these are read. Ranks load on their own:
        nothing is collective. On a terminal a line on stderr says how far it is, for the first
        rank.

        Raises CheckpointError before anything is written for a layer, a size, a precision or an
        activation that does not fit, and for tensors that are missing or have another dtype or
        shape. Values are seen only as they are read: CheckpointError too, but then experts may be
        new (see `MegaMoE.load_experts`), for a scale that is not finite, and for such weights where
        they are quantised.
        """
        stored = self._stored(layer)
        self._check_activation()
        _check_fits(stored, moe, self._config.activation_clamp)
        first, count = moe.first_local_expert, moe.num_local_experts
        experts = range(first, first + count)
        shown = first == 0 and sys.stderr is not None and sys.stderr.isatty()
        progress = Progress(count if shown else 0)
        with self._files.open() as reader:
            check(stored, reader, experts)
            conversion = Conversion(stored, reader, moe.config.precision, moe.device)

            def read(expert: int, into: Weights) -> None:
                progress.start(f"layer {layer}, expert {experts[expert]}")
                conversion.read(experts[expert], into)

            try:
                moe.load_experts(read)
            finally:
                progress.clear()
        return Loaded(
            layer=layer,
            experts=experts,
            encoding=stored.encoding.name,
            precision=moe.config.precision,
            requantized_groups=moe.requantized_groups,
            inexact_blocks=conversion.inexact_blocks,
            num_blocks=num_blocks(stored, count),
        )

    def _stored(self, layer: int | None) -> Stored:
        layer = self.layers[0] if layer is None else layer
        if layer not in self._names:
            raise CheckpointError(
                f"layer={layer!r} has no routed experts in {self._files.source}, which has them in "
                f"layers {listed(self.layers)}"
            )
        with self._files.open() as reader:
            return detect(layer, self._names[layer], reader, self._config.num_experts)

    def _check_activation(self) -> None:
        if self._config.unsupported:
            raise CheckpointError(f"{self._config.path}: {self._config.unsupported}")


def _check_fits(stored: Stored, moe: MegaMoE, clamp: float | None) -> None:
    for size in ("num_experts", "hidden_size", "intermediate_size"):
        found, wanted = getattr(stored, size), getattr(moe.config, size)
        if found != wanted:
            raise CheckpointError(
                f"layer {stored.layer} of the checkpoint has {size}={found}, the layer {wanted}"
            )
    if moe.activation_clamp != clamp:
        raise CheckpointError(
            f"the checkpoint has activation_clamp={clamp}, the layer {moe.activation_clamp}"
        )
