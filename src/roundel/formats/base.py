"""What a checkpoint format can do: a Hugging Face directory in which tensors of its own stand for the weights of quantized linears.

Everything else in the directory - norms, embeddings, biases, tokenizer - is as in the original, or has been tuned. A format is pure: from
`RoundedWeight` to named tensors and back, and what `config.json` says about it. Files are written by `artifacts.checkpoints`. (GGUF, in
`formats.gguf`, is one file with metadata of its own.)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from roundel.errors import ModelError, SchemeError
from roundel.grids import Grid, parse_scheme
from roundel.types import RoundedWeight

__all__ = ["FREE", "CheckpointFormat", "check_inputs", "expect", "half_scales", "only_grid"]

FREE = (torch.float16, torch.bfloat16, torch.float32)
"""Types that scales of free type may have."""


def expect(tensors: Mapping[str, Tensor], layout: Mapping[str, tuple[tuple[int, ...], torch.dtype | None]], whose: str) -> None:
    """Refuses tensors of other names, shapes or types than `layout`, in which None stands for a free type.

    Raises:
        ModelError: what there is of `whose`, and what was expected.
    """
    if tensors.keys() != layout.keys():
        given = ", ".join(sorted(tensors)) or "none"
        raise ModelError(f"tensors {given} are not those expected: {whose} has {', '.join(sorted(layout))}")
    for name, (size, dtype) in layout.items():
        tensor = tensors[name]
        if tuple(tensor.shape) != size or (tensor.dtype != dtype if dtype is not None else tensor.dtype not in FREE):
            found, wanted = (str(kind).removeprefix("torch.") for kind in (tensor.dtype, dtype or "a float type"))
            raise ModelError(f"{name} is {found} {tuple(tensor.shape)}; expected {wanted} {size} in {whose}")


def half_scales(form: str, scale: Tensor) -> Tensor:
    """Scales in float16, for formats that have no other.

    Raises:
        SchemeError: some cannot be converted exactly.
    """
    scales = scale.to(torch.float16)
    lost = int((scales.double() != scale.double()).sum())
    if lost:
        raise SchemeError(
            f"{form}: {lost} of {scale.numel()} scales are beyond float16 (magnitudes from {scale.abs().min().item():.1e} to "
            f"{scale.abs().max().item():.1e}); round with float16 scales, or try the format compressed-tensors"
        )
    return scales


def only_grid(form: str, schemes: Iterable[str]) -> Grid:
    """The grid of all weights, for formats that have no place for a second.

    Raises:
        SchemeError: there are several.
    """
    given = sorted(set(schemes))
    if len(given) != 1:
        raise SchemeError(f"{form} holds one scheme in a model, and here are {', '.join(given)}; try the format compressed-tensors")
    return parse_scheme(given[0])


def check_inputs(form: str, grid: Grid, *, held: bool) -> None:
    """Refuses a grid whose inputs engines round, unless that is `held` by the format.

    Raises:
        SchemeError: with what would work.
    """
    if grid.inputs is not None and not held:
        raise SchemeError(
            f"{form} cannot say that inputs are rounded, as {grid.name} asks: use --format compressed-tensors, "
            f"or --scheme {grid.name.rpartition('-')[0]}"
        )


class CheckpointFormat(ABC):
    """One format; without state."""

    fuses: bool = False
    """Whether engines run q, k, v and gate, up as one product, so that they must share a scheme."""

    rounds_inputs: bool = False
    """Whether it can say that engines round what linears read."""

    cache_scheme: Mapping[str, Any] | None = None
    """What config.json says where keys and values are kept in e4m3fn with scales of the checkpoint; None: it cannot say so."""

    section: str = "quantization_config"
    """The key of config.json under which engines look for it."""

    loads: bool = True
    """Whether Transformers reads it, with nothing else than Roundel."""

    scale_dtype: torch.dtype | None = None
    """The type that free scales must have; None: the weight's own, or one of 16 bits."""

    @property
    @abstractmethod
    def name(self) -> str:
        """As users spell it: `--format NAME`."""

    @abstractmethod
    def check(self, grid: Grid, rotation: str | None) -> None:
        """Refuses what no weight in this format can be; called before any work.

        Args:
            grid: Of some linear.
            rotation: The kind of its rotation: `hadamard`, `hadamard128` or None.

        Raises:
            SchemeError: with the engine's limit and the nearest choice that works.
        """

    def outputs(self, d_out: int) -> int:
        """How many of a linear of this width the engine has: biases get zeros for those that are added."""
        return d_out

    def check_mixture(self, schemes: Iterable[str]) -> None:  # noqa: B027 (most formats hold any, side by side)
        """Refuses schemes that cannot be in one model; called before any work.

        Raises:
            SchemeError: with what would work.
        """

    def check_names(self, names: Iterable[str]) -> None:  # noqa: B027 (most engines know modules by any name)
        """Refuses modules that the engine knows by other names.

        Raises:
            SchemeError: with the reason.
        """

    def together(self, rounded: Mapping[str, RoundedWeight]) -> dict[str, RoundedWeight]:
        """Linears that engines run as one product, made to share what they must share; only if `fuses`."""
        return dict(rounded)

    def check_shape(self, grid: Grid, d_out: int, d_in: int) -> None:  # noqa: B027 (most formats hold what the grid does)
        """Refuses a weight of a shape that the format cannot hold, though the grid can; such a linear stays in its precision.

        Raises:
            SchemeError: with the reason.
        """

    def check_weight(self, rounded: RoundedWeight) -> Grid:
        """The grid of a weight that can be in this format; refused as `check` and `check_shape` do."""
        grid, rotation = parse_scheme(rounded.scheme), rounded.rotation
        check_inputs(self.name, grid, held=self.rounds_inputs)
        self.check(grid, None if rotation is None else str(getattr(rotation, "kind", type(rotation).__name__)))
        self.check_shape(grid, *rounded.shape)
        return grid

    @abstractmethod
    def pack(self, rounded: RoundedWeight) -> dict[str, Tensor]:
        """Contiguous CPU tensors of one linear, by their names under the module's (`weight_packed`, ...)."""

    @abstractmethod
    def unpack(self, tensors: Mapping[str, Tensor], grid: Grid, shape: tuple[int, int]) -> RoundedWeight:
        """Inverse of `pack` for a `(d_out, d_in)` weight.

        Raises:
            ModelError: the tensors contradict each other, the grid or the shape.
        """

    @abstractmethod
    def packed_bytes(self, shape: tuple[int, int], grid: Grid, scale_dtype: torch.dtype, rotation: str | None) -> int:
        """Bytes of all tensors that `pack` makes of a `(d_out, d_in)` weight; free scales are in `scale_dtype`."""

    @abstractmethod
    def config(self, rounded: Mapping[str, RoundedWeight], ignore: Sequence[str]) -> dict[str, Any]:
        """What config.json says about it, under `section`.

        Args:
            rounded: All quantized linears, by module name.
            ignore: Names of all linears that are not quantized.
        """

    def wrote(self, config: Mapping[str, Any]) -> bool:
        """Whether a config.json is that of a directory in this format."""
        settings: object = config.get(self.section)
        return isinstance(settings, Mapping) and settings.get("quant_method") == self.name

    def files(self, rounded: Mapping[str, RoundedWeight], tensors: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Any]:
        """Further JSON files of the directory, by name. `tensors` are those of each quantized linear, on the meta device."""
        return {}
