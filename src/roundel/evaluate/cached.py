"""The original's logits on disk: whoever compares many quantizations of one model runs the original once.

Layout: `DIR/KEY/SEQUENCE-START.safetensors`, one file of one tensor `logits`, `(slice, vocabulary)`, for each slice of tokens of each
sequence (`sweeps.Layers.slices`), in the type in which the model gives them, so that a KL from the cache has the same bits; and
`DIR/KEY/about.json`. The key is a digest of all that the logits depend on: the files of the model (path, size, time of change), the tokens,
the type, the device, the batch size and the versions. An entry is whole or not there. When a new one would make the cache larger than its
cap the entries that have not been used for longest go; one that is larger than the cap is not kept.

Cost: `tokens * vocabulary` numbers; 64 sequences of 512 tokens with 150k words take 20 GB in float32, 10 GB in bfloat16.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from roundel import processes
from roundel.errors import StorageError
from roundel.evaluate.divergence import ModelLogits, Part
from roundel.store import is_there, staged_directory, storage, write_json
from roundel.sweeps import Layers
from roundel.types import TokenBatch

__all__ = ["CachedLogits", "LogitCache", "RunLogits", "reference_key"]


def reference_key(model: Path, about: dict[str, Any]) -> str:
    """Of the files in the directory of a model, and of `about`, which is everything else that its logits depend on."""
    files = [
        [str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns]
        for path in sorted(model.iterdir())
        if path.suffix in (".json", ".safetensors", ".bin")
    ]
    return hashlib.sha256(json.dumps([files, about], sort_keys=True).encode()).hexdigest()[:32]


@dataclass(frozen=True, kw_only=True)
class CachedLogits:
    """A whole entry; stands for the model in `compare_models`."""

    path: Path
    about: dict[str, Any]

    def of(self, batch: TokenBatch) -> list[Part]:
        """Of sequences of the entry's text.

        Raises (when a slice is asked for):
            StorageError: the entry has been damaged.
        """
        return [partial(self._read, sequence) for sequence in batch.sequence_ids]

    def _read(self, sequence: int, part: slice) -> Tensor:
        path = _file(self.path, sequence, part)
        try:
            with safe_open(path, framework="pt") as stored:
                found: Tensor = stored.get_tensor("logits")
                return found
        except (OSError, SafetensorError) as error:
            raise StorageError(f"{path} cannot be read ({error}); remove {self.path}, it is made again") from error


@dataclass(frozen=True, kw_only=True)
class RunLogits:
    """A model whose logits go through `keep` as they are formed."""

    model: ModelLogits
    keep: Callable[[int, slice, Tensor], None]

    @property
    def layers(self) -> Layers:
        """Of the model."""
        return self.model.layers

    def of(self, batch: TokenBatch) -> list[Part]:
        """Of the model."""

        def kept(sequence: int, own: Part, part: slice) -> Tensor:
            found = own(part)
            self.keep(sequence, part, found)
            return found

        return [partial(kept, sequence, own) for sequence, own in zip(batch.sequence_ids, self.model.of(batch), strict=True)]


@dataclass(frozen=True, kw_only=True)
class LogitCache:
    """A directory of entries that takes at most `cap` bytes."""

    path: Path
    cap: int

    def find(self, key: str) -> CachedLogits | None:
        """The entry, now the one used last."""
        place = self.path / key
        try:
            about = json.loads((place / "about.json").read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return None
        if not isinstance(about, dict) or "duplicate" not in about:
            return None
        os.utime(place)
        return CachedLogits(path=place, about=about)

    @contextlib.contextmanager
    def entry(self, key: str, size: int, about: dict[str, Any]) -> Iterator[Callable[[int, slice, Tensor], None]]:
        """What keeps a sequence's logits in a new entry, which is there when the block ends well; `size` bytes must fit into the cap.

        Raises:
            StorageError: the disk is full, or the directory cannot be written to.
        """
        assert size <= self.cap
        self._make_room(size, key)
        with staged_directory(self.path / key) as staging:

            def keep(sequence: int, part: slice, logits: Tensor) -> None:
                target = _file(staging, sequence, part)
                with storage(target):
                    save_file({"logits": logits.detach().cpu().contiguous()}, target)

            yield keep
            write_json(staging / "about.json", about)

    def _make_room(self, size: int, key: str) -> None:
        if not processes.first():
            return
        shutil.rmtree(self.path / key, ignore_errors=True)  # without about.json it is none of ours, or damaged
        if not is_there(self.path, Path.is_dir):
            return
        entries = sorted((path for path in self.path.iterdir() if (path / "about.json").is_file()), key=lambda path: path.stat().st_mtime)
        sizes = {path: sum(file.stat().st_size for file in path.iterdir()) for path in entries}
        for path in entries:
            if sum(sizes.values()) + size <= self.cap:
                break
            shutil.rmtree(path, ignore_errors=True)
            del sizes[path]


def _file(directory: Path, sequence: int, part: slice) -> Path:
    return directory / f"{sequence:012x}-{part.start:06d}.safetensors"
