"""Routed experts from safetensors checkpoints into layers; see `Checkpoint`.

    files          which file holds a tensor; headers and memory-mapped reads
    names          the names of routed experts, by layer
    encodings      how a layer's experts are stored: dtypes, scales, shapes, what is refused
    model_config   what `config.json` says of the layer
    conversions    what an encoding becomes in a precision of the layer
    checkpoint     the whole, for users

Needs the `safetensors` library (`pip install 'megamoe[checkpoint]'`).
"""

from megamoe.checkpoint.checkpoint import Checkpoint, Loaded
from megamoe.checkpoint.files import CheckpointError

__all__ = ["Checkpoint", "CheckpointError", "Loaded"]
