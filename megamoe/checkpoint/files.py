"""The files of a checkpoint: which one holds a tensor, and reading parts of it.

Headers alone are read until a part of a tensor is asked for, which is then mapped into memory and
not copied. Every error is a `CheckpointError` that names the file, and the tensor where there is
one. Knows nothing of experts.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class CheckpointError(ValueError):
    """A checkpoint is damaged, incomplete or of a kind that is not supported, or does not fit the
    layer; the message names the file and the tensor.
    """


class Header(NamedTuple):
    """Of one tensor: dtype as safetensors spells it ("BF16"), and shape."""

    dtype: str
    shape: tuple[int, ...]


def read_json(path: Path) -> dict[str, Any]:
    """An object of a JSON file. Raises CheckpointError for what cannot be read, or is none."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return found


def open_file(path: Path):
    """`safetensors.safe_open`, which reads the header and maps the rest."""
    try:
        from safetensors import safe_open
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "checkpoints are read with safetensors: pip install 'megamoe[checkpoint]'",
            name=error.name,
        ) from error
    from safetensors import SafetensorError

    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing") from error
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read, or is not complete: {error}") from error


class Reader:
    """Open files of a checkpoint; made by `Files.open`."""

    def __init__(self, files: Files, stack: contextlib.ExitStack):
        self._files, self._stack = files, stack
        self._opened: dict[Path, tuple[Any, frozenset[str]]] = {}

    def _slice(self, name: str):
        path = self.path_of(name)
        if path not in self._opened:
            opened = self._stack.enter_context(open_file(path))
            self._opened[path] = opened, frozenset(opened.keys())
        opened, names = self._opened[path]
        if name not in names:
            raise CheckpointError(f"{path} has no tensor {name}, which {self.source} names")
        return opened.get_slice(name)

    @property
    def source(self) -> Path:
        """The file that names all tensors."""
        return self._files.source

    def path_of(self, name: str) -> Path:
        """The file of a tensor."""
        return self._files.path_of(name)

    def header(self, name: str) -> Header:
        """dtype and shape; reads no values."""
        part = self._slice(name)
        return Header(part.get_dtype(), tuple(part.get_shape()))

    def read(self, name: str, at: int | None = None) -> torch.Tensor:
        """A tensor, or what it has at an index of its first axis: mapped memory on the CPU that is
        only to be read, and only until the files are closed.
        """
        part = self._slice(name)
        return part[:] if at is None else part[at]


class Files:
    """The safetensors files of a checkpoint.

    path: a directory with `model.safetensors.index.json` or `model.safetensors`, or a file.
    names: of all tensors. source: the file that names them.
    """

    def __init__(self, path: Path | str):
        path = Path(path)
        if path.is_dir():
            self.directory = path
            found = [path / name for name in (INDEX, SINGLE) if (path / name).is_file()]
            if not found:
                raise CheckpointError(f"{path} has neither {INDEX} nor {SINGLE}")
            self.source = found[0]
        else:
            self.directory, self.source = path.parent, path
        self._path_of = self._read_names()

    def _read_names(self) -> dict[str, Path]:
        if self.source.suffix != ".json":
            with open_file(self.source) as opened:
                return dict.fromkeys(opened.keys(), self.source)
        files = read_json(self.source).get("weight_map")
        if not isinstance(files, dict):
            raise CheckpointError(f"{self.source} has no weight_map")
        for name, file in files.items():
            # A name with a folder could lead out of the checkpoint.
            if not isinstance(file, str) or Path(file).name != file:
                raise CheckpointError(f"{self.source} places {name} in {file!r}, no name of a file")
        return {name: self.directory / file for name, file in files.items()}

    @property
    def names(self) -> list[str]:
        return list(self._path_of)

    def path_of(self, name: str) -> Path:
        """The file of a tensor that is among the names."""
        return self._path_of[name]

    @contextlib.contextmanager
    def open(self) -> Iterator[Reader]:
        """Files are opened as they are needed, and closed at the end."""
        with contextlib.ExitStack() as stack:
            yield Reader(self, stack)
