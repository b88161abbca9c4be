"""Weights that others have quantized: how they are stored, and the numbers that they stand for.

A quantized weight is several tensors with a common name and ends of their own. `N, K = d_out, d_in`, groups of `g` columns.

    fp8       weight e4m3 (N, K), weight_scale_inv or weight_scale: one, for each row, or for each block      W = weight scale
    modelopt  the same; or e2m1 in bytes, the even column in the lower half, (N, K / 2), weight_scale e4m3 (N, K / 16),
              weight_scale_2 one                                                                              W = weight scale scale_2
    mxfp4     NAME_blocks e2m1 in bytes (E, N, K / 32, 16), NAME_scales (E, N, K / 32), exponents + 127       W = blocks 2^scales,
              of experts that are stored transposed                                                          NAME is (E, K, N)
    gptq      qweight int32, b-bit codes down K, (K b / 32, N); qzeros along N (K / g, N b / 32), one less than the zero point in the
              first version of the format; scales (K / g, N); g_idx (K,), the group of a column               W = (q - z) scale
    auto-round as gptq, zero points as they are where packing_format is `auto_round`, or as awq
    awq       qweight int32 (K, N / 8), qzeros (K / g, N / 8), eight columns in a word in the order 0 2 4 6 1 3 5 7; scales (K / g, N)

Sources: DeepSeek-V3's model card, NVIDIA's ModelOpt, OCP Microscaling Formats 1.0, AutoGPTQ and GPTQModel, AutoAWQ ("gemm").

Cost: one weight at a time, in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from roundel.errors import ModelError, reason_of
from roundel.formats.awq import PLACES
from roundel.formats.bits import unpack_rows

__all__ = ["METHODS", "Layout", "Packed", "find", "layout_of"]

E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])
DROPPED = (".input_scale", ".activation_scale", ".k_scale", ".v_scale", ".output_scale")
"""Of activations and caches in few bits, which the decoded model has none of."""

Parts = Mapping[str, Tensor]
Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Layout:
    """How the parts of a weight are called and put together."""

    mark: str
    """The end of the name by which a weight is found."""

    others: tuple[str, ...]
    """Ends of the others; which of them there are differs."""

    weight: str
    """The end in the decoded model."""

    decode: Callable[[Parts, Settings], Tensor]
    """From the parts by their ends, and what config.json says, to the weight."""


@dataclass(frozen=True)
class Packed:
    """One weight of a checkpoint: its parts' names by their ends."""

    layout: Layout
    parts: dict[str, str]

    def decoded(self, read: Callable[[str], Tensor], settings: Settings) -> Tensor:
        """In the type of its scales if that has 16 bits, else in bfloat16.

        Raises:
            ModelError: parts do not fit together.
        """
        parts = {end: read(name) for end, name in self.parts.items()}
        kinds = [part.dtype for part in parts.values() if part.dtype in (torch.float16, torch.bfloat16)]
        try:
            W = self.layout.decode(parts, settings)
        except Exception as error:  # shapes, types and settings that do not fit together
            raise ModelError(f"{self.parts[self.layout.mark]} cannot be decoded: {reason_of(error)}") from error
        return W.to(kinds[0] if kinds else torch.bfloat16)


def _scaled(parts: Parts, settings: Settings) -> Tensor:
    """FP8 with scales of any of its shapes."""
    q = parts["weight"].float()
    scale = (parts["weight_scale_inv"] if "weight_scale_inv" in parts else parts["weight_scale"]).float()
    if scale.numel() == 1:
        return q * scale.reshape(())
    if scale.ndim == 1:
        return q * scale[:, None]
    block = settings.get("weight_block_size") or [-(-side // n) for side, n in zip(q.shape[-2:], scale.shape[-2:], strict=True)]
    if scale.shape[-1] == 1:
        block = [block[0] if scale.shape[-2] != q.shape[-2] else 1, q.shape[-1]]
    for side in (0, 1):
        scale = scale.repeat_interleave(block[side], side - 2).narrow(side - 2, 0, q.shape[side - 2])
    return q * scale


def _fp4(packed: Tensor) -> Tensor:
    """The numbers of e2m1 in bytes, twice as many in the last dimension."""
    codes = packed.view(torch.uint8).long()
    return E2M1[torch.stack((codes & 15, codes >> 4), -1).flatten(-2)]


def _modelopt(parts: Parts, settings: Settings) -> Tensor:
    if parts["weight"].dtype is not torch.uint8:
        return _scaled(parts, settings)
    values = _fp4(parts["weight"])
    scale = parts["weight_scale"].float() * parts["weight_scale_2"].float()
    W: Tensor = values * scale.repeat_interleave(values.shape[-1] // scale.shape[-1], -1)
    return W


def _mxfp4(parts: Parts, _settings: Settings) -> Tensor:
    values = _fp4(parts["_blocks"])
    return (values * torch.exp2(parts["_scales"].float() - 127)[..., None]).flatten(-2).mT.contiguous()


def _gptq(parts: Parts, settings: Settings) -> Tensor:
    qweight, scales = parts["qweight"], parts["scales"].float()
    groups, d_out = scales.shape
    bits = parts["qzeros"].shape[1] * 32 // d_out
    d_in = qweight.shape[0] * 32 // bits
    group = int(settings.get("group_size", -1))
    if group <= 0 or -(-d_in // group) != groups:  # which is that of most linears
        group = d_in // groups
    of_column = parts["g_idx"].long() if "g_idx" in parts else torch.arange(d_in) // group
    zeros = unpack_rows(parts["qzeros"].contiguous(), bits, d_out).float()
    if settings.get("checkpoint_format", "gptq") != "gptq_v2" and settings.get("packing_format") != "auto_round":
        zeros = (zeros + 1) % 2**bits
    q = unpack_rows(qweight.T.contiguous(), bits, d_in).float()
    return (q - zeros[of_column].T) * scales[of_column].T


def _awq(parts: Parts, settings: Settings) -> Tensor:
    bits, scales = int(settings.get("bits", 4)), parts["scales"].float()
    q, zeros = (
        unpack_rows(parts[end].contiguous(), bits, scales.shape[1]).unflatten(1, (-1, 8))[..., PLACES].flatten(1).float()
        for end in ("qweight", "qzeros")
    )
    group = len(q) // len(scales)
    W: Tensor = (q - zeros.repeat_interleave(group, 0)) * scales.repeat_interleave(group, 0)
    return W.T.contiguous()


_FP8 = Layout("weight", ("weight_scale_inv", "weight_scale"), "weight", _scaled)
_GPTQ = Layout("qweight", ("qzeros", "scales", "g_idx"), "weight", _gptq)
_AWQ = Layout("qweight", ("qzeros", "scales"), "weight", _awq)
METHODS: dict[str, Layout] = {
    "fp8": _FP8,
    "modelopt": Layout("weight", ("weight_scale_2", "weight_scale"), "weight", _modelopt),
    "mxfp4": Layout("_blocks", ("_scales",), "", _mxfp4),
    "gptq": _GPTQ,
    "awq": _AWQ,
    "auto-round": _GPTQ,
}
"""By `quant_method`."""


def layout_of(method: str, settings: Settings) -> Layout | None:
    """Of a checkpoint by its `quantization_config`; None if it cannot be decoded here."""
    if method == "gptq" and settings.get("checkpoint_format", "gptq") not in ("gptq", "gptq_v2"):
        return None
    if method == "awq" and (str(settings.get("version", "gemm")).lower() != "gemm" or int(settings.get("bits", 4)) != 4):
        return None
    if method == "auto-round":
        packing = str(settings.get("packing_format")) if settings.get("data_type", "int") == "int" else ""
        return {"auto_round": _GPTQ, "auto_round:auto_gptq": _GPTQ, "auto_round:auto_awq": _AWQ}.get(packing)
    return METHODS.get(method)


def find(layout: Layout, kinds: Mapping[str, str]) -> tuple[dict[str, Packed], list[str]]:
    """The packed weights of a checkpoint by the name that they have decoded, and all tensors that stay as they are.

    Args:
        layout: Its layout.
        kinds: Types of all tensors, as safetensors calls them, by name.
    """
    packed: dict[str, Packed] = {}
    for name in kinds:
        stem = name.removesuffix(layout.mark)
        parts = {layout.mark: name} | {end: stem + end for end in layout.others if stem + end in kinds}
        if name.endswith(layout.mark) and len(parts) > 1:
            packed[stem + layout.weight] = Packed(layout, parts)
    taken = {name for each in packed.values() for name in each.parts.values()}
    return packed, [name for name in kinds if name not in taken and not name.endswith(DROPPED)]
