"""Everything that decides a quantized checkpoint, in one value; and the named recipes.

Two runs with equal recipes, model and text write the same bytes. What only changes speed or memory (device, batch size) is no part of it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from roundel.curvature import parse_curvature
from roundel.errors import SchemeError
from roundel.formats import FORMATS, gguf
from roundel.formats.base import check_inputs
from roundel.formats.gguf_mixes import CANDIDATES, MIXES, NARROW
from roundel.grids import Grid, parse_scheme
from roundel.rotation import rotated_shape
from roundel.settings import EFFORTS, Settings
from roundel.sweeps.labels import LABEL_KINDS

__all__ = ["BEST", "GPTQ", "HOLD_ENDS", "NEAREST", "TUNINGS", "WRITTEN", "Recipe", "check_format", "size_in_bytes", "with_block_type"]

TUNINGS = ("none", "end-to-end", "blocks")
ENOUGH_TOKENS = 8192
"""Of calibration text, from which on rounding is prefix-aware."""

PREFIX_SEQUENCES = 192
"""That go along both paths at least, where there is text: they cost forward passes only, and three times as many as give gradients were
worth a tenth of the KL."""

STEPPED_WEIGHTS = 1 << 25
"""Up to which natural-gradient steps are taken where nothing is said. They were worth 12 and 4 % of the KL of models of .2 and 3.4 million
weights, 4 % of that of one of 106 million for half of the time and a fifth of the memory of all else."""

STEP_TOKENS = 4096
"""Of one natural-gradient step."""

CACHES = ("none", "fp8")
"""Types that engines keep keys and values in; none: the model's."""

FACTOR_TYPES = ("float32", "bfloat16")
ROTATIONS = ("auto", "none", "fused", "online", "online128")
MOST_BITS = 16.0
"""Of a weight that is worth quantizing."""

WRITTEN = (*FORMATS, "gguf", "dense")

HOLD_ENDS: dict[str, tuple[str, ...]] = {
    "embedding": ("gguf", "mlx", "dense"),
    "head": ("compressed-tensors", "gguf", "mlx", "dense"),
}
"""Formats whose engines read a quantized one. Of compressed-tensors vLLM reads both, but Transformers (5.23) loads no packed embedding."""

Role = Literal["embedding", "head"]
ROLES: tuple[Role, ...] = ("embedding", "head")


@dataclass(frozen=True, kw_only=True)
class Recipe(Settings):
    """Settings of one quantization; validated when made.

    Raises:
        SchemeError: a name is unknown or a number out of range.
    """

    def __post_init__(self) -> None:
        for scheme in (self.scheme, *self.schemes):
            parse_scheme(scheme)
        if self.rotate not in ROTATIONS:
            raise SchemeError(f"rotate {self.rotate!r}: expected one of {', '.join(ROTATIONS)}")
        if self.format not in ("auto", *WRITTEN):
            raise SchemeError(f"format {self.format!r}: expected one of {', '.join(('auto', *WRITTEN))}, or gguf:TYPE such as gguf:q4_k")
        if self.target_size is not None:
            size_in_bytes(self.target_size)
        if self.schemes and self.bits is None:
            raise SchemeError("schemes to choose from need bits, the average that they may take: --bits 3.25")
        if self.bits is not None and not 1 <= self.bits <= MOST_BITS:
            raise SchemeError(f"bits is {self.bits}: expected 1 to {MOST_BITS:g} bits per weight, scales included")
        for scheme in self.used_schemes:
            check_format(self.written_format(), parse_scheme(scheme), self.rotation_of(parse_scheme(scheme)))
        if self.written_format() in FORMATS:
            FORMATS[self.written_format()].check_mixture(self.used_schemes)
        if self.mix is not None:
            if self.mix not in MIXES:
                raise SchemeError(f"mix {self.mix!r}: expected one of {', '.join(MIXES)}")
            if self.written_format() != "gguf" or self.bits is not None or self.scheme != MIXES[self.mix].base:
                raise SchemeError(f"mix {self.mix} is one of llama.cpp's: it goes with --format gguf and without --scheme and --bits")
        for role in ("embedding", "head"):
            if (asked := getattr(self, role)) in ("auto", "none"):
                continue
            grid = parse_scheme(asked)
            if self.written_format() not in HOLD_ENDS[role]:
                raise SchemeError(
                    f"--{role} {asked}: the engines of {self.written_format()} read it in 16 bits only; "
                    f"a quantized one is in the formats {', '.join(HOLD_ENDS[role])}"
                )
            if grid.inputs is not None:
                raise SchemeError(f"--{role} {asked}: inputs are rounded in decoder layers only; try {asked.rpartition('-')[0]}")
            if self.rotation_of(grid):
                raise SchemeError(f"--{role} {asked}: embedding and output head cannot be rotated; choose another scheme or --rotate none")
            check_format(self.written_format(), grid, None)
        if self.kv_cache not in CACHES:
            raise SchemeError(f"kv_cache {self.kv_cache!r}: expected one of {', '.join(CACHES)}")
        if self.kv_cache != "none" and not (self.written_format() in FORMATS and FORMATS[self.written_format()].cache_scheme):
            raise SchemeError(f"--kv-cache {self.kv_cache}: {self.written_format()} has no place for its scales; use compressed-tensors")
        if self.tune not in TUNINGS:
            raise SchemeError(f"tune {self.tune!r}: expected one of {', '.join(TUNINGS)}")
        for scheme in self.used_schemes if self.tune != "none" else ():
            if not _holds("native", parse_scheme(scheme), None):  # what tuning keeps
                raise SchemeError(f"--tune {self.tune}: {scheme} cannot be tuned; use --tune none or another scheme")
        for scheme in self.used_schemes if self.natural_places else ():
            if parse_scheme(scheme).inputs:
                raise SchemeError(f"--natural-places {self.natural_places}: gradients do not go through the rounded inputs of {scheme}")
        splits_rows = parse_curvature(self.curvature).row_groups > 1
        for scheme in self.used_schemes:
            if splits_rows and self.rotation_of(parse_scheme(scheme)):
                raise SchemeError(
                    f"{self.curvature} has curvature of their own for groups of rows, which cannot be rotated together as for {scheme}; "
                    "use --rotate none or another curvature"
                )
        if self.factor_type not in FACTOR_TYPES:
            raise SchemeError(f"factor_type {self.factor_type!r}: expected one of {', '.join(FACTOR_TYPES)}")
        if self.labels not in LABEL_KINDS:
            raise SchemeError(f"labels {self.labels!r}: expected one of {', '.join(LABEL_KINDS)}")
        lowest = {
            "sequences": 1,
            "prefix_sequences": 1,
            "natural_places": 0,
            "seq_len": 2,
            "eval_sequences": 1,
            "sweeps": 0,
            "seed": 0,
            "tune_steps": 1,
            "tune_tokens": 1,
        }
        for name, least in lowest.items():
            if (given := getattr(self, name)) is not None and given < least:
                raise SchemeError(f"{name} is {getattr(self, name)}: expected {least} or more")
        if not 0 < self.damping <= 10:
            raise SchemeError(f"damping is {self.damping}: expected more than 0 and at most 10, relative to the mean diagonal")
        if not 0 < self.prefix_damping <= 10:
            raise SchemeError(
                f"prefix_damping is {self.prefix_damping}: expected more than 0 and at most 10, relative to the mean diagonal"
            )
        for name in ("prefix_strength", "stream_strength"):
            if not 0 <= getattr(self, name) <= 1:
                raise SchemeError(f"{name} is {getattr(self, name)}: expected 0 to 1")

    @classmethod
    def of(cls, **given: Any) -> Recipe:
        """The recipe of a named `effort`, `normal` if none is named, with what else is given in place of its settings.

        Raises:
            SchemeError: as for the recipe, or no effort has that name.
        """
        effort = given.get("effort", Settings.effort)
        if effort not in EFFORTS:
            raise SchemeError(f"effort {effort!r}: expected one of {', '.join(EFFORTS)}")
        if given.get("target_size") is not None:
            if given.get("bits") is not None or given.get("mix") is not None:
                raise SchemeError("--target-size says how many bits there are: it goes without --bits and --mix")
            given = {**given, "bits": MOST_BITS}  # until the size of the rest is known (`stages.size`)
        return cls(**{**EFFORTS[effort], **given})

    def corrects(self, tokens: int) -> bool:
        """Whether rounding is prefix-aware, given so many tokens of calibration text: if it is not said, where there is text for it."""
        return tokens >= ENOUGH_TOKENS if self.prefix_aware is None else self.prefix_aware

    @property
    def prefix_count(self) -> int:
        """How many sequences go along both paths, if the text has them: those that give gradients, and more where these are few."""
        return self.prefix_sequences or max(self.sequences, PREFIX_SEQUENCES)

    def natural_steps(self, sequences: int, length: int, *, weights: int) -> tuple[int, int]:
        """At how many places natural-gradient steps are taken, and how many at each, given the calibration text and so many weights.

        If it is not said: such that they cost about what the collection of so many sequences does, at two places or, with much text, four;
        none if the model is not small.
        """
        rounded = self.kv_cache != "none" or any(parse_scheme(scheme).inputs for scheme in self.used_schemes)  # no gradient goes through
        if self.natural_places == 0 or (self.natural_places is None and (rounded or weights > STEPPED_WEIGHTS)):
            return 0, 0
        whole = 6 * sequences / (2.5 * max(1, STEP_TOKENS // length))
        places = self.natural_places or (4 if whole >= 48 else 2)
        return places, min(16, max(4, round(whole / places)))

    @property
    def steps(self) -> int:
        """Of tuning: as many as still lower the KL on text that they have not seen; of each decoder layer with `blocks`."""
        return self.tune_steps or {"none": 0, "end-to-end": 640, "blocks": 200}[self.tune]

    @property
    def step_tokens(self) -> int:
        """Of one step of tuning; the same text in more and smaller steps is worth more end to end (`docs/log.md`, 17)."""
        return self.tune_tokens or {"none": 0, "end-to-end": 2048, "blocks": 4096}[self.tune]

    def rotation_of(self, grid: Grid) -> Literal["hadamard", "hadamard128"] | None:
        """The kind of rotation that weights go through before they are rounded to this grid and that is undone at run time, if any."""
        if self.rotate in ("none", "fused") or (self.rotate == "auto" and not grid.rotates):
            return None
        return "hadamard128" if self.rotate == "online128" or self.format == "exl3" else "hadamard"

    def check_shape(self, scheme: str, d_out: int, d_in: int) -> None:
        """Refuses a weight of a shape that the scheme, its rotation or the format cannot store.

        Raises:
            SchemeError: with the reason, and what would fit.
        """
        grid, form = parse_scheme(self.fitting(scheme, d_in)), self.written_format()
        grid.check(*rotated_shape(self.rotation_of(grid), (d_out, d_in)))
        if form in FORMATS:
            FORMATS[form].check_shape(grid, d_out, d_in)

    def fitting(self, scheme: str, d_in: int) -> str:
        """The scheme, or what llama.cpp takes in its place where its blocks do not divide a width."""
        narrow = self.written_format() == "gguf" and d_in % 256 and d_in % 32 == 0
        return NARROW.get(scheme, scheme) if narrow else scheme

    def usual_ends(self, role: Role, d_out: int, d_in: int) -> tuple[str, ...]:
        """What may stand for an embedding or an output head of this shape where nothing is said; nothing for 16 bits.

        That is what the format's tools make of it; with a target size, all that they make of either end beside any scheme of the linears.
        """
        if self.target_size is not None:
            found = [self.usual_end(one, scheme, d_out, d_in) for scheme in self.used_schemes for one in ROLES]
        elif self.bits is not None and self.written_format() == "gguf":
            found = [self.usual_end(role, min(self.used_schemes, key=lambda s: abs(parse_scheme(s).bits - (self.bits or 0))), d_out, d_in)]
        else:
            found = [self.usual_end(role, self.scheme, d_out, d_in)]
        return tuple(dict.fromkeys(scheme for scheme in found if scheme is not None))

    def usual_end(self, role: Role, beside: str, d_out: int, d_in: int) -> str | None:
        """What the tools of the format make of an end of this shape beside linears of a scheme: a scheme, or None for 16 bits."""
        wanted: tuple[str, ...] = ()
        match self.written_format():
            case "mlx":
                wanted = (beside,)
            case "gguf":
                usual = gguf.usual_end(role, beside) if self.mix is None else getattr(MIXES[self.mix], role)
                wanted = (self.fitting(usual, d_in) if role == "embedding" else usual, "q8_0")
        return next((scheme for scheme in wanted if _divides(scheme, d_out, d_in)), None)

    def candidate_schemes(self) -> tuple[str, ...]:
        """The schemes that `bits` are allocated over: the given ones, or those of `scheme` with all other numbers of bits.

        Raises:
            SchemeError: `scheme` has no number of bits to vary.
        """
        if self.schemes:
            return self.schemes
        if self.format in ("auto", "gguf") and self.scheme in NARROW:
            return CANDIDATES
        found = re.fullmatch(r"([a-z]+)(\d)(-.*)?", self.scheme)
        others = [f"{found[1]}{bits}{found[3] or ''}" for bits in range(1, 9)] if found else []
        known = [scheme for scheme in others if _known(scheme) and self._fits(scheme)]
        if len(known) < 2:
            raise SchemeError(f"{self.scheme} has no number of bits that could vary: give the schemes to choose from (--schemes)")
        return tuple(known)

    def _fits(self, scheme: str) -> bool:
        """Whether the format, if one is named, holds it."""
        grid = parse_scheme(scheme)
        return self.format == "auto" or _holds(self.format, grid, self.rotation_of(grid))

    @property
    def used_schemes(self) -> tuple[str, ...]:
        """All schemes that a linear may get."""
        return (self.scheme,) if self.bits is None else self.candidate_schemes()

    @property
    def fuses(self) -> bool:
        """Whether linears that engines run as one must share a scheme: those of formats whose engines do so."""
        return FORMATS[self.written_format()].fuses if self.written_format() in FORMATS else False

    def written_format(self) -> str:
        """The format's name; for `auto` the first that holds all schemes: compressed-tensors, gguf (llama.cpp's blocks) or native."""
        if self.format != "auto":
            return self.format
        grids = [parse_scheme(scheme) for scheme in self.used_schemes]
        return next(
            form for form in ("compressed-tensors", "gguf", "native") if all(_holds(form, grid, self.rotation_of(grid)) for grid in grids)
        )

    def as_json(self) -> dict[str, Any]:
        """Plain values by name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}


def check_format(form: str, grid: Grid, rotation: str | None) -> None:
    """Refuses a grid that the format cannot hold.

    Raises:
        SchemeError: with the engine's limit and the nearest choice that works.
    """
    check_inputs(form, grid, held=form in FORMATS and FORMATS[form].rounds_inputs)
    if form == "gguf":
        gguf.check(grid, rotation)
    elif form in FORMATS:
        FORMATS[form].check(grid, rotation)


def _divides(scheme: str, d_out: int, d_in: int) -> bool:
    try:
        parse_scheme(scheme).check(d_out, d_in)
    except SchemeError:
        return False
    return True


def _holds(form: str, grid: Grid, rotation: str | None) -> bool:
    try:
        check_format(form, grid, rotation)
    except SchemeError:
        return False
    return True


def size_in_bytes(text: str) -> int:
    """Bytes of a file's size, such as `1.5G` or `800M`, in thousands as files are listed.

    Raises:
        SchemeError: it is none.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)b?", text.strip().lower())
    if found is None or float(found[1]) <= 0:
        raise SchemeError(f"target size {text!r}: expected a size such as 1.5G or 800M")
    return int(float(found[1]) * {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}[found[2]])


def _known(scheme: str) -> bool:
    try:
        parse_scheme(scheme)
    except SchemeError:
        return False
    return True


NEAREST: dict[str, Any] = {"curvature": "identity", "sweeps": 0, "prefix_aware": False}
"""Nearest rounding with searched, signed scales."""

GPTQ: dict[str, Any] = {"curvature": "activation", "sweeps": 0, "prefix_aware": False, "damping": 0.1}
"""LDLQ: one-sided feedback under the input's second moment, damped as is usual there."""

BEST: dict[str, Any] = {}
"""The defaults of `Recipe`."""


def with_block_type(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings in which the format `gguf:q4_k` is the format `gguf` and the scheme `q4_k`, and `gguf:q4_k_m` the mix of that name.

    Raises:
        SchemeError: the settings name another scheme.
    """
    form, colon, scheme = str(settings.get("format", "auto")).partition(":")
    mix = settings.get("mix")
    if mix in MIXES and settings.get("scheme", Recipe.scheme) == Recipe.scheme:
        return {**settings, "scheme": MIXES[mix].base, "format": "gguf" if form == "auto" else form}
    if not colon:
        return dict(settings)
    given = settings.get("scheme", Recipe.scheme)
    if form == "gguf" and scheme in MIXES and not _known(scheme) and given == Recipe.scheme:
        return {**settings, "format": form, "scheme": MIXES[scheme].base, "mix": scheme}
    if form != "gguf" or given not in (scheme, Recipe.scheme):
        raise SchemeError(f"format {form}:{scheme} with scheme {given}: expected gguf:TYPE, and the scheme TYPE or none")
    return {**settings, "format": form, "scheme": scheme}
