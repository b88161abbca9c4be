"""Any quantized model that can be read, by its original."""

from __future__ import annotations

from pathlib import Path

from roundel.artifacts.source import Source
from roundel.errors import ModelError, damaged
from roundel.given.base import Given
from roundel.given.directory import open_directory
from roundel.given.gguf import gguf_files, open_gguf
from roundel.models import locate
from roundel.store import is_there

__all__ = ["open_given"]


def open_given(model: str, source: Source) -> Given:
    """A GGUF file, a directory or a model of the Hub, quantized from `source` or from a model of its shape.

    Raises:
        ModelError: it cannot be read, is none of these, or of another model.
    """
    path = Path(model)
    if is_there(path, Path.is_file) and path.suffix != ".gguf":
        raise ModelError(f"{path}: expected a .gguf file, or a directory")
    path = path if is_there(path, Path.is_file) else locate(model, ["*"])
    with damaged(ModelError, path):
        return open_gguf(path, source) if gguf_files(path) else open_directory(path, source)
