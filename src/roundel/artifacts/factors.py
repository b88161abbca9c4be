"""The factors directory: what a collection has summed up so far, on disk; documented in docs/format.md.

It holds *sums*, not factors, so that collections resume, merge and add up over processes by addition. `header.json`
names the one sums file that is valid; a new sums file is written completely before the header is replaced, and the
old one removed after, so a kill at any moment leaves a state to go on from.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from roundel.curvature import parse_curvature
from roundel.curvature.collect import Collection
from roundel.errors import FactorsError
from roundel.models import Checkpoint
from roundel.recipes import Recipe
from roundel.store import storage, umask, write_json
from roundel.types import KroneckerFactors

__all__ = ["Header", "load", "merge", "model_fingerprint", "restore", "save"]

SCHEMA_VERSION = 1
SAMPLES = 1024
"""Entries of each weight that go into a model's fingerprint."""


@dataclass(frozen=True, kw_only=True)
class Header:
    """What was collected from what; equal in all fields but `done`, `sequence_ids` and `layers` for two collections that can be merged.

    `model`, as the user named it, and `revision`, the Hub's commit if it was one of its snapshots, only say where the model was found: the
    fingerprint decides whether two models are the same.
    """

    model: str
    revision: str | None
    model_fingerprint: str
    curvature: str
    labels: str
    seed: int
    calibration: str
    sequences: int
    """How many were asked for: those of all parts, and those that the estimator leaves out to choose by."""
    seq_len: int
    tokens_sha256: str
    sequence_ids: tuple[int, ...]
    layers: dict[str, tuple[int, int]]
    pilot: int = 0
    """How many of `sequence_ids`, the first, make pass 0 alone."""
    index: int = 0
    """The pass that is being summed."""
    done: int = 0
    """How many of `sequence_ids` are in its sums."""
    sums: str = ""
    """Name of the sums file."""

    @property
    def tokens(self) -> int:
        """How many tokens `sequence_ids` have; written to header.json for its readers."""
        return len(self.sequence_ids) * self.seq_len

    @property
    def complete(self) -> bool:
        """Whether nothing is left to collect."""
        wanted = len(self.sequence_ids) - (self.pilot if self.index > 0 else 0)
        return self.index == parse_curvature(self.curvature).passes - 1 and self.done == wanted

    def applied_to(self, recipe: Recipe) -> Recipe:
        """The recipe with this collection's curvature, labels, text, sequences and seed."""
        return dataclasses.replace(
            recipe,
            curvature=self.curvature,
            labels=self.labels,
            calibration=self.calibration,
            sequences=self.sequences,
            seq_len=self.seq_len,
            seed=self.seed,
        )

    def check_complete(self) -> None:
        """Refuses a collection that is not finished.

        Raises:
            FactorsError: something is left to collect.
        """
        if not self.complete:
            raise FactorsError("the factors are not complete; finish them with roundel collect --resume")

    def check_same(self, other: Header, *ignored: str) -> None:
        """Refuses another collection's header; `model` and `revision` may differ.

        Raises:
            FactorsError: names the first field that differs.
        """
        for field in dataclasses.fields(Header):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            if field.name not in (*ignored, "model", "revision") and mine != theirs:
                raise FactorsError(f"the factors differ in {field.name}: {_short(mine)} and {_short(theirs)}")


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def model_fingerprint(checkpoint: Checkpoint) -> str:
    """SHA-256 of every tensor's name, type, shape and 1024 entries spread over it: two models that differ by training differ here."""
    digest = hashlib.sha256()
    for name in sorted(checkpoint):
        tensor = checkpoint.read(name)
        flat = tensor.flatten()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        step = max(1, flat.numel() // SAMPLES)
        digest.update(flat[::step].contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _pack(matrix: Tensor) -> Tensor:
    """The lower triangle of a square matrix, row by row; anything else as it is."""
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        return matrix.cpu().clone()
    rows, columns = torch.tril_indices(*matrix.shape)
    return matrix.cpu()[rows, columns]


def _unpack(packed: Tensor, like: Tensor) -> Tensor:
    if like.ndim != 2 or like.shape[0] != like.shape[1]:
        full = packed
    else:
        rows, columns = torch.tril_indices(*like.shape)
        if packed.shape != (rows.numel(),):
            raise FactorsError(f"a sum has {packed.numel()} entries, expected {rows.numel()}; the file is damaged")
        full = torch.zeros(like.shape, dtype=packed.dtype)
        full[rows, columns] = packed
    if full.shape != like.shape or full.dtype != like.dtype:
        raise FactorsError(f"a sum has shape {tuple(full.shape)}, expected {tuple(like.shape)}; the file is damaged")
    return full


def save(directory: Path, header: Header, collection: Collection) -> Header:
    """Writes the state of a collection; returns the header as written."""
    header = dataclasses.replace(
        header, index=collection.index, done=collection.done, sums=f"sums-{collection.index}-{collection.done}.safetensors"
    )
    tensors: dict[str, Tensor] = {}
    for name, sketch in collection.sketches.items():
        tensors[f"{name}::tokens"] = torch.tensor(sketch.tokens)
        tensors.update({f"{name}::{key}": _pack(total) for key, total in sketch.sums.items()})
    for name, factors in collection.previous.items():
        tensors[f"{name}::previous.H_out"] = _pack(factors.H_out)
        tensors[f"{name}::previous.H_in"] = _pack(factors.H_in)
        tensors[f"{name}::previous.scale"] = torch.tensor(factors.scale, dtype=torch.float64)
        tensors.update({f"{name}::carry.{key}": value.cpu().contiguous() for key, value in factors.carry.items()})
    temporary = directory / f".{header.sums}.tmp"
    with storage(directory / header.sums):
        directory.mkdir(parents=True, exist_ok=True)
        save_file(tensors, temporary)
        temporary.chmod(0o666 & ~umask())
        temporary.replace(directory / header.sums)
    stored = {"schema_version": SCHEMA_VERSION, "kind": "factors", **dataclasses.asdict(header), "tokens": header.tokens}
    write_json(directory / "header.json", stored)
    for old in directory.glob("sums-*.safetensors"):
        if old.name != header.sums:
            old.unlink()
    return header


def load(directory: Path) -> tuple[Header, dict[str, Tensor]]:
    """Header and packed sums of a factors directory.

    Raises:
        FactorsError: not a factors directory, of an unknown version, or damaged.
    """
    try:
        stored = json.loads((directory / "header.json").read_text(encoding="utf-8"))
        if stored.pop("kind") != "factors" or stored.pop("schema_version") != SCHEMA_VERSION:
            raise FactorsError(f"{directory} is no factors directory of version {SCHEMA_VERSION}")
        stored.pop("tokens")
        layers = {name: (int(shape[0]), int(shape[1])) for name, shape in stored.pop("layers").items()}
        header = Header(**{**stored, "layers": layers, "sequence_ids": tuple(stored["sequence_ids"])})
        if Path(header.sums).name != header.sums:
            raise FactorsError(f"{directory}/header.json names a file elsewhere: {header.sums}")
    except (OSError, KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise FactorsError(f"{directory} is no factors directory: its header.json cannot be read ({error})") from error
    try:
        return header, load_file(directory / header.sums)
    except (OSError, SafetensorError) as error:
        raise FactorsError(f"{directory / header.sums} is missing or damaged: {error}; collect again") from error


def restore(header: Header, tensors: Mapping[str, Tensor], device: torch.device) -> Collection:
    """The collection that was saved, to go on with or to read factors from.

    Raises:
        FactorsError: a sum is missing or has another shape than the header says.
    """
    estimator = parse_curvature(header.curvature)
    collection = Collection(index=header.index, done=header.done)
    try:
        for name, (d_out, d_in) in header.layers.items():
            if f"{name}::previous.scale" in tensors:
                zeros_out, zeros_in = torch.zeros(d_out, d_out), torch.zeros(d_in, d_in)
                collection.previous[name] = KroneckerFactors(
                    H_out=_mirrored(_unpack(tensors[f"{name}::previous.H_out"], zeros_out)).to(device),
                    H_in=_mirrored(_unpack(tensors[f"{name}::previous.H_in"], zeros_in)).to(device),
                    scale=tensors[f"{name}::previous.scale"].item(),
                    carry={
                        key.removeprefix(f"{name}::carry."): value.to(device)
                        for key, value in tensors.items()
                        if key.startswith(f"{name}::carry.")
                    },
                )
            sketch = estimator.sketch(d_out, d_in, device, index=header.index, previous=collection.previous.get(name))
            sketch.tokens = int(tensors[f"{name}::tokens"])
            for key, total in sketch.sums.items():
                total.copy_(_unpack(tensors[f"{name}::{key}"], total))
            collection.sketches[name] = sketch
    except KeyError as error:
        raise FactorsError(f"the sums file lacks {error.args[0]}; it is damaged") from error
    return collection


def _mirrored(lower: Tensor) -> Tensor:
    return lower + lower.tril(-1).T


def _same_pilot(one: Collection, other: Collection) -> bool:
    """Whether the sums of two collections have the same weights."""
    return one.previous.keys() == other.previous.keys() and all(
        torch.equal(mine.H_out, other.previous[name].H_out) and torch.equal(mine.H_in, other.previous[name].H_in)
        for name, mine in one.previous.items()
    )


def merge(directories: list[Path], output: Path) -> Header:
    """Adds up complete collections of different sequences, or joins those of different layers of the same sequences.

    Raises:
        FactorsError: they are incomplete, overlap, or differ in anything else.
    """
    if len(directories) < 2:
        raise FactorsError("expected at least two factors directories")
    parts = []
    for directory in directories:
        header, tensors = load(directory)
        if not header.complete:
            raise FactorsError(f"{directory} is not complete; finish it with roundel collect --resume")
        parts.append((header, restore(header, tensors, torch.device("cpu"))))
    header, total = parts[0]
    for other, collection in parts[1:]:
        header.check_same(other, "sequence_ids", "layers", "tokens_sha256", "done", "sums")
        if header.sequence_ids == other.sequence_ids and header.tokens_sha256 == other.tokens_sha256:
            twice = set(header.layers) & set(other.layers)
            if twice:
                raise FactorsError(f"both hold {sorted(twice)[0]} from the same sequences; nothing is to be merged")
            total.sketches.update(collection.sketches)
            total.previous.update(collection.previous)
            header = dataclasses.replace(header, layers={**header.layers, **other.layers})
            continue
        header.check_same(other, "sequence_ids", "tokens_sha256", "done", "sums")
        if set(header.sequence_ids[header.pilot :]) & set(other.sequence_ids[header.pilot :]):
            raise FactorsError("the collections share sequences, which would count twice")
        if header.index > 0 and not (header.pilot and _same_pilot(total, collection)):
            raise FactorsError(
                f"{header.curvature} weights its sums by those of a pass before, and these sums have other weights: they cannot be added; "
                "collect parts of the same sequences with --part"
            )
        for name, sketch in total.sketches.items():
            sketch.merge(collection.sketches[name])
        combined = hashlib.sha256((header.tokens_sha256 + other.tokens_sha256).encode()).hexdigest()
        header = dataclasses.replace(header, sequence_ids=header.sequence_ids + other.sequence_ids[header.pilot :], tokens_sha256=combined)
        total.done += collection.done
    return save(output, header, total)
