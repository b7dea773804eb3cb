"""What `config.json` says of a model's routed experts: sizes, top-k, activation.

Keys are those of transformers and of the models' own files. A multimodal model has them in
`text_config`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megamoe.checkpoint.files import CheckpointError, read_json

NAME = "config.json"
_NUM_EXPERTS = ("n_routed_experts", "num_local_experts", "num_experts")
_TOP_K = ("num_experts_per_tok",)
_HIDDEN = ("hidden_size",)
_INTERMEDIATE = ("moe_intermediate_size", "intermediate_size")
#: Beginnings of model types whose files do not say that their activation is another.
_OTHER_ACTIVATIONS = {
    "gpt_oss": "SwiGLU with alpha and up + 1",
    "minimax_m3": "SwiGLU with alpha and up + 1",
    "step3p": "SwiGLU that is clamped behind its sigmoid",
}


@dataclass(frozen=True)
class ModelConfig:
    """Of one model; None: the file does not say. unsupported: why the layer cannot compute its
    experts, or None.
    """

    path: Path
    num_experts: int | None = None
    top_k: int | None = None
    hidden_size: int | None = None
    intermediate_size: int | None = None
    activation_clamp: float | None = None
    unsupported: str | None = None


def _unsupported(values: dict[str, Any]) -> str | None:
    model = str(values.get("model_type", ""))
    for beginning, activation in _OTHER_ACTIVATIONS.items():
        if model.startswith(beginning):
            return f"model_type={model!r} has another activation: {activation}"
    activation = values.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        return f"hidden_act={activation!r}: experts of the layer have SwiGLU"
    for key in ("swiglu_alpha", "swiglu_limits"):
        if values.get(key):
            return f"{key}={values[key]!r}: the layer has no such parameter of SwiGLU"
    return None


def _integer(path: Path, values: dict[str, Any], keys: tuple[str, ...]) -> int | None:
    for key in keys:
        if (value := values.get(key)) is not None:
            if not isinstance(value, int) or value < 1:
                raise CheckpointError(f"{path}: {key}={value!r} must be a positive integer")
            return value
    return None


def read_config(directory: Path) -> ModelConfig:
    """The configuration in a directory, all None where there is no file. Raises CheckpointError for
    one that cannot be understood.
    """
    path = directory / NAME
    if not path.is_file():
        return ModelConfig(path)
    values = read_json(path)
    text = values.get("text_config")
    if isinstance(text, dict) and _TOP_K[0] not in values:
        values = {"model_type": values.get("model_type", "")} | text
    clamp = values.get("swiglu_limit")
    if clamp is not None and (isinstance(clamp, bool) or not isinstance(clamp, (int, float))):
        raise CheckpointError(f"{path}: swiglu_limit={clamp!r} must be a number")
    return ModelConfig(
        path,
        num_experts=_integer(path, values, _NUM_EXPERTS),
        top_k=_integer(path, values, _TOP_K),
        hidden_size=_integer(path, values, _HIDDEN),
        intermediate_size=_integer(path, values, _INTERMEDIATE),
        activation_clamp=float(clamp) if clamp else None,
        unsupported=_unsupported(values),
    )
