"""The factors directory: what a collection has summed up, on disk; documented in docs/format.md.

It holds *sums*, not factors, so that collections merge and add up over processes by addition: one file for each group of decoder layers,
written whole when the backward sweep has visited the group. `header.json` comes first and says what is to be collected; the directory is
complete when every linear that it names is in a file. So a kill at any moment leaves a state to go on from.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from roundel.artifacts.curvatures import lower_of, pack_lower, symmetric_of
from roundel.curvature import Sketch, parse_curvature
from roundel.errors import FactorsError, damaged
from roundel.linalg.gram import symmetrise
from roundel.models import Checkpoint
from roundel.recipes import FACTOR_TYPES, Recipe
from roundel.store import json_of, staged_file, storage, umask, write_json
from roundel.types import Factors, KroneckerFactors

__all__ = ["FactorsDirectory", "Header", "merge", "model_fingerprint"]

SCHEMA_VERSION = 3
LARGEST = 1 << 40
"""No size in a header reaches it."""
SAMPLES = 1024
"""Entries of each weight that go into a model's fingerprint."""


@dataclass(frozen=True, kw_only=True)
class Header:
    """What is collected from what; equal in all fields but `sequence_ids` and `layers` for two collections that can be merged.

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
    """How many there were in all: those of all parts, and those that the estimator leaves out to choose by."""
    seq_len: int
    tokens_sha256: str
    sequence_ids: tuple[int, ...]
    layers: dict[str, tuple[int, int]]
    pilot: int = 0
    """How many of `sequence_ids`, the first, make pass 0 alone."""
    factor_type: str = "float32"
    """Of the square matrices in its files, one of `FACTOR_TYPES`."""

    @property
    def tokens(self) -> int:
        """How many tokens `sequence_ids` have; written to header.json for its readers."""
        return len(self.sequence_ids) * self.seq_len

    def check_types(self) -> None:
        """Refuses values of other types than the fields have: all but the layers' shapes come from JSON as they are.

        Raises:
            TypeError, ValueError: one has; a shape or a number is none.
        """
        expected: dict[str, tuple[type, ...]] = {"str": (str,), "str | None": (str, type(None)), "int": (int,)}
        for field in dataclasses.fields(Header):
            value, kinds = getattr(self, field.name), expected.get(str(field.type))
            if kinds is not None and type(value) not in kinds:
                raise TypeError(f"{field.name} is {_short(value)}")
        sizes = [self.sequences, self.seq_len, self.pilot + 1, *(side for shape in self.layers.values() for side in shape)]
        if not all(0 < size < LARGEST for size in sizes) or not all(type(number) is int for number in self.sequence_ids):
            raise ValueError("a number of sequences, tokens, rows or columns is none")
        parse_curvature(self.curvature)

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


def _pack(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """The lower triangle of a square matrix, row by row, in this type if it is float32; anything else as it is."""
    if not _is_square(matrix):
        return matrix.cpu().clone()
    return pack_lower(matrix.to(dtype) if matrix.dtype == torch.float32 else matrix)


def _unpack(packed: Tensor, like: Tensor) -> Tensor:
    """What `_pack` was given, with zeros above the diagonal of a square matrix."""
    try:
        full = lower_of(packed) if _is_square(like) else packed
    except ValueError as error:
        raise FactorsError(f"a sum has {packed.numel()} entries, expected those of a triangle; the file is damaged") from error
    if full.shape != like.shape or full.dtype not in (like.dtype, torch.bfloat16):
        raise FactorsError(f"a sum has shape {tuple(full.shape)}, expected {tuple(like.shape)}; the file is damaged")
    return full.to(like.dtype)


def _carried(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What estimators carry, with symmetric matrices unpacked."""
    own = {key.removeprefix("carry."): value for key, value in stored.items() if key.startswith("carry.")}
    if not all(torch.isfinite(value).all() for value in own.values()):
        raise FactorsError("what passes carry holds NaN or infinite values; the file is damaged")
    try:
        return {key.removeprefix("lower."): symmetric_of(value) if key.startswith("lower.") else value for key, value in own.items()}
    except ValueError as error:
        raise FactorsError(f"{error}; the file is damaged") from error


def _is_square(matrix: Tensor) -> bool:
    return matrix.ndim == 2 and matrix.shape[0] == matrix.shape[1]


@dataclass(frozen=True, kw_only=True)
class FactorsDirectory:
    """A directory and which of its files holds which linear."""

    path: Path
    header: Header
    files: dict[str, Path]

    @classmethod
    def create(cls, path: Path, header: Header) -> FactorsDirectory:
        """An empty one.

        Raises:
            StorageError: the disk refuses.
        """
        with storage(path):
            path.mkdir(parents=True, exist_ok=True)
        stored = {"schema_version": SCHEMA_VERSION, "kind": "factors", **dataclasses.asdict(header), "tokens": header.tokens}
        write_json(path / "header.json", stored)
        return cls(path=path, header=header, files={})

    @classmethod
    def open(cls, path: Path) -> FactorsDirectory:
        """One that was made.

        Raises:
            FactorsError: not a factors directory, of an unknown version, or damaged.
        """
        with damaged(FactorsError, path / "header.json", "this is no factors directory, or a damaged one"):
            stored = json_of((path / "header.json").read_text(encoding="utf-8"))
            if stored.pop("kind") != "factors" or stored.pop("schema_version") != SCHEMA_VERSION:
                raise FactorsError(f"{path} is no factors directory of version {SCHEMA_VERSION}: collect again")
            stored.pop("tokens")
            layers = {name: (int(shape[0]), int(shape[1])) for name, shape in stored.pop("layers").items()}
            header = Header(**{**stored, "layers": layers, "sequence_ids": tuple(stored["sequence_ids"])})
            if header.factor_type not in FACTOR_TYPES:
                raise ValueError(f"factor_type {header.factor_type!r}")
            header.check_types()
        files: dict[str, Path] = {}
        for file in sorted(path.glob("sums-*.safetensors")):
            with damaged(FactorsError, file, "it is damaged; collect again"), safe_open(file, framework="pt") as tensors:
                files |= {key.removesuffix("::tokens"): file for key in tensors.keys() if key.endswith("::tokens")}  # noqa: SIM118
        return cls(path=path, header=header, files={name: files[name] for name in header.layers if name in files})

    @property
    def complete(self) -> bool:
        """Whether nothing is left to collect."""
        return set(self.files) == set(self.header.layers)

    def check_complete(self) -> None:
        """Refuses a directory that is not.

        Raises:
            FactorsError: it is not.
        """
        if not self.complete:
            raise FactorsError("the factors are not complete; finish them with roundel collect --resume")

    def save(self, index: int, sketches: Mapping[str, Sketch], previous: Mapping[str, KroneckerFactors]) -> None:
        """Writes the sums of a group, and the factors of the pass before.

        Raises:
            StorageError: the disk refuses.
        """
        tensors: dict[str, Tensor] = {}
        dtype = getattr(torch, self.header.factor_type)
        for name, sketch in sketches.items():
            tensors[f"{name}::tokens"] = torch.tensor(sketch.tokens)
            tensors[f"{name}::rows"] = torch.tensor(sketch.rows)
            tensors.update({f"{name}::{key}": _pack(total, dtype) for key, total in sketch.sums.items()})
        for name, factors in previous.items():
            tensors[f"{name}::previous.H_out"] = _pack(factors.H_out, dtype)
            tensors[f"{name}::previous.H_in"] = _pack(factors.H_in, dtype)
            tensors[f"{name}::previous.scale"] = torch.tensor(factors.scale, dtype=torch.float64)
            for key, value in factors.carry.items():
                if _is_square(value) and torch.equal(value, value.T):
                    tensors[f"{name}::carry.lower.{key}"] = _pack(value, dtype)
                else:
                    tensors[f"{name}::carry.{key}"] = value.cpu().contiguous()
        target = self.path / f"sums-{index:04d}.safetensors"
        with staged_file(target) as temporary:
            save_file(tensors, temporary)
            temporary.chmod(0o666 & ~umask())
        self.files.update(dict.fromkeys(sketches, target))

    def restore(self, name: str, device: torch.device) -> tuple[Sketch, KroneckerFactors | None]:
        """The sums of a linear, and the factors of the pass before.

        Raises:
            FactorsError: a sum is missing or has another shape than the header says.
        """
        estimator, (d_out, d_in), file = parse_curvature(self.header.curvature), self.header.layers[name], self.files[name]
        with damaged(FactorsError, file, "it is damaged; collect again"):
            with safe_open(file, framework="pt") as stored:
                own = {
                    key.removeprefix(f"{name}::"): stored.get_tensor(key)
                    for key in stored.keys()  # noqa: SIM118 (not a dict)
                    if key.startswith(f"{name}::")
                }
            previous = None
            if "previous.scale" in own:
                previous = KroneckerFactors(
                    H_out=symmetrise(_unpack(own["previous.H_out"], torch.zeros(d_out, d_out))).to(device),
                    H_in=symmetrise(_unpack(own["previous.H_in"], torch.zeros(d_in, d_in))).to(device),
                    scale=own["previous.scale"].item(),
                    carry={key: value.to(device) for key, value in _carried(own).items()},
                )
            sketch = estimator.sketch(d_out, d_in, device, index=estimator.passes - 1, previous=previous)
            sketch.tokens, sketch.rows = int(own["tokens"]), int(own.get("rows", own["tokens"]))
            for key, total in sketch.sums.items():
                total.copy_(_unpack(own[key], total))
            if sketch.pending():
                raise FactorsError(f"{file}: the sums of {name} end in a batch of {sketch.pending()}; the file is damaged, collect again")
        return sketch, previous

    def sketches(self, names: Iterable[str], device: torch.device) -> dict[str, Sketch]:
        """The sums of some linears."""
        return {name: self.restore(name, device)[0] for name in names}

    def factors(self) -> dict[str, Factors]:
        """Of all linears, in memory."""
        return {name: self.restore(name, torch.device("cpu"))[0].factors() for name in self.header.layers}


def _same_pilot(one: KroneckerFactors | None, other: KroneckerFactors | None) -> bool:
    """Whether sums have the same weights."""
    if one is None or other is None:
        return one is other
    return torch.equal(one.H_out, other.H_out) and torch.equal(one.H_in, other.H_in)


def merge(directories: list[Path], output: Path) -> Header:
    """Adds up complete collections of different sequences, or joins those of different layers of the same sequences.

    Raises:
        FactorsError: they are incomplete, overlap, or differ in anything else.
    """
    if len(directories) < 2:
        raise FactorsError("expected at least two factors directories")
    parts = [FactorsDirectory.open(directory) for directory in directories]
    for directory, part in zip(directories, parts, strict=True):
        if not part.complete:
            raise FactorsError(f"{directory} is not complete; finish it with roundel collect --resume")
    header = parts[0].header
    terms = {name: [parts[0]] for name in header.layers}
    for part in parts[1:]:
        other = part.header
        header.check_same(other, "sequence_ids", "layers", "tokens_sha256")
        if header.sequence_ids == other.sequence_ids and header.tokens_sha256 == other.tokens_sha256:
            if twice := set(header.layers) & set(other.layers):
                raise FactorsError(f"both hold {sorted(twice)[0]} from the same sequences; nothing is to be merged")
            header = dataclasses.replace(header, layers={**header.layers, **other.layers})
            terms |= {name: [part] for name in other.layers}
            continue
        header.check_same(other, "sequence_ids", "tokens_sha256")
        if set(header.sequence_ids[header.pilot :]) & set(other.sequence_ids[header.pilot :]):
            raise FactorsError("the collections share sequences, which would count twice")
        combined = hashlib.sha256((header.tokens_sha256 + other.tokens_sha256).encode()).hexdigest()
        header = dataclasses.replace(header, sequence_ids=header.sequence_ids + other.sequence_ids[header.pilot :], tokens_sha256=combined)
        for own in terms.values():
            own.append(part)
    cpu, weighted = torch.device("cpu"), parse_curvature(header.curvature).passes > 1
    made: FactorsDirectory | None = None
    places: dict[Path, list[str]] = {}
    for name, own in terms.items():
        places.setdefault(own[0].files[name], []).append(name)
    for index, names in enumerate(places.values()):
        sketches: dict[str, Sketch] = {}
        kept: dict[str, KroneckerFactors] = {}
        for name in names:
            sketch, previous = terms[name][0].restore(name, cpu)
            for part in terms[name][1:]:
                more, theirs = part.restore(name, cpu)
                if weighted and not (header.pilot and _same_pilot(previous, theirs)):
                    raise FactorsError(
                        f"{header.curvature} weights its sums by those of a pass before, and these sums have other weights: they cannot be "
                        "added; collect parts of the same sequences with --part"
                    )
                sketch.merge(more)
            sketches[name] = sketch
            if previous is not None:
                kept[name] = previous
        made = made or FactorsDirectory.create(output, header)
        made.save(index, sketches, kept)
    return header
