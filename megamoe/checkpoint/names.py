"""Names of routed experts in checkpoints, sorted by layer.

Two layouts: a tensor per expert and matrix (`experts.5.gate_proj.weight`, or `w1`, `w3`, `w2` for
gate, up, down), or one of all experts (`experts.gate_up_proj`), which transformers 5 writes too.
What a name ends in, the *suffix*, says what it is of its matrix: "weight", or one of the scales.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

#: Where the decoder's layers are: alone, and beside other towers. A layer of another place, as a
#: predictor's (`mtp.0.`), is none of these.
_LAYER = re.compile(
    r"(?:model\.|model\.language_model\.|language_model\.|language_model\.model\.)?"
    r"layers\.(\d+)\.(?:mlp|ffn|block_sparse_moe|feed_forward)\.experts\.(.+)"
)
_OF_ONE = re.compile(r"(\d+)\.(\w+)\.(\w+)")
_OF_ALL = re.compile(r"(gate_up_proj|down_proj)(?:[._](\w+))?")
#: Matrices of an expert, in the order of their rows in w13 and w2.
GATE, UP, GATE_UP, DOWN = "gate", "up", "gate_up", "down"
_PART_OF = {
    "gate_proj": GATE, "up_proj": UP, "down_proj": DOWN,
    "w1": GATE, "w3": UP, "w2": DOWN,
    "gate_up_proj": GATE_UP,
}  # fmt: skip
_PARTS = {False: (GATE, UP, DOWN), True: (GATE_UP, DOWN)}
#: A router's, though it stands there.
_OF_ROUTERS = ("e_score_correction_bias",)


@dataclass
class ExpertNames:
    """Names of one layer's experts. matrices: suffixes and names by expert (None: all of them in
    one tensor) and part; unknown: names that are none of these.
    """

    matrices: dict[tuple[int | None, str], dict[str, str]] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)

    @property
    def fused(self) -> bool:
        """True if a tensor holds all experts."""
        return any(expert is None for expert, _ in self.matrices)

    @property
    def parts(self) -> tuple[str, ...]:
        return _PARTS[self.fused]

    @property
    def mixed(self) -> bool:
        """True if there are tensors of one expert and tensors of all."""
        return self.fused and bool(self.experts)

    @property
    def experts(self) -> list[int]:
        """Numbers of experts that have tensors of their own."""
        return sorted({expert for expert, _ in self.matrices if expert is not None})


def experts_by_layer(names: Iterable[str]) -> dict[int, ExpertNames]:
    """The layers that have routed experts, in order."""
    layers: defaultdict[int, ExpertNames] = defaultdict(ExpertNames)
    for name in names:
        if not (found := _LAYER.fullmatch(name)) or found[2] in _OF_ROUTERS:
            continue
        layer, rest = layers[int(found[1])], found[2]
        matrix: tuple[int | None, str] | None = None
        if (one := _OF_ONE.fullmatch(rest)) and _PART_OF.get(one[2]) in _PARTS[False]:
            matrix, suffix = (int(one[1]), _PART_OF[one[2]]), one[3]
        elif every := _OF_ALL.fullmatch(rest):
            matrix, suffix = (None, _PART_OF[every[1]]), every[2] or "weight"
            suffix = "weight_scale_inv" if suffix == "scale_inv" else suffix
        if matrix is None or suffix in layer.matrices.get(matrix, ()):  # it is there twice
            layer.unknown.append(name)
        else:
            layer.matrices.setdefault(matrix, {})[suffix] = name
    return dict(sorted(layers.items()))
