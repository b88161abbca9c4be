"""Quantized models in the layouts of all tools, made by Roundel and changed to what only others write."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import gguf
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import roundel
from e2e import tiny
from roundel.formats.bits import pack_rows, unpack_rows
from roundel.formats.gptq import pack_groups
from roundel.grids import parse_scheme
from roundel.rounding.nearest import nearest

NEAREST = {"curvature": "identity", "sweeps": 0, "prefix_aware": False, "sequences": 1, "eval_sequences": 1}
"""Settings that take the least time."""


def save_wide(directory: Path) -> Path:
    """A Llama of widths that are multiples of 128, of two layers."""
    torch.manual_seed(0)
    sizes = {**tiny.SIZES, "hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
    LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=4)).to(torch.bfloat16).save_pretrained(directory)
    tiny.make_tokenizer(starts=True).save_pretrained(directory)
    return directory


def as_version_2(path: Path, _wide: Path) -> None:
    """Zero points of GPTQ as they are, no longer one less."""
    tensors = load_file(path / "model.safetensors")
    for name in [name for name in tensors if name.endswith("qzeros")]:
        zeros = unpack_rows(tensors[name], 4, tensors[name].shape[1] * 8)
        tensors[name] = pack_rows(zeros + 1, 4)
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"]["checkpoint_format"] = "gptq_v2"
    (path / "config.json").write_text(json.dumps(config))
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def in_activation_order(path: Path, wide: Path) -> None:
    """GPTQ's groups are of columns that are anywhere."""
    tensors, original = load_file(path / "model.safetensors"), load_file(wide / "model.safetensors")
    grid = parse_scheme("int4-g64")
    for name in [name for name in tensors if name.endswith("g_idx")]:
        stem = name.removesuffix("g_idx")
        W = original[f"{stem}weight"].float()
        order = torch.randperm(W.shape[1], generator=torch.Generator().manual_seed(0))
        scales = grid.fit_scales(W[:, order], torch.ones(W.shape[1]), torch.float16)
        codes = nearest(W[:, order], grid, scales)[:, torch.argsort(order)]
        zeros = torch.full(scales["scale"].shape, 7, dtype=torch.int16)
        own = pack_groups(codes.to(torch.int16) + 8, zeros, scales["scale"], 4)
        tensors |= {f"{stem}{part}": value for part, value in own.items()}
        tensors[name] = (torch.argsort(order) // 64).int()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def in_shards(path: Path, _wide: Path) -> None:
    """Two files and an index; parts of one linear are in both."""
    tensors = load_file(path / "model.safetensors")
    index = {name: f"model-0000{1 + place % 2}-of-00002.safetensors" for place, name in enumerate(sorted(tensors))}
    for file in set(index.values()):
        save_file({name: tensors[name] for name in index if index[name] == file}, path / file, metadata={"format": "pt"})
    (path / "model.safetensors").unlink()
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


LEFT = "model.layers.0.mlp.up_proj"
MIXED = {
    "blk.0.ffn_up.weight": GGMLQuantizationType.Q4_1,  # which has no grid here
    "blk.0.ffn_down.weight": GGMLQuantizationType.Q8_0,
    "blk.1.ffn_up.weight": GGMLQuantizationType.F16,
    "blk.1.attn_q.weight": GGMLQuantizationType.Q5_0,
}


def rewritten(file: Path, original: Path, targets: Sequence[Path]) -> None:
    """The tensors of a GGUF file, some in other types, in one file or several."""
    reader, dense = GGUFReader(file), load_file(original / "model.safetensors")["model.layers.1.mlp.up_proj.weight"]
    architecture = reader.get_field("general.architecture")
    assert architecture is not None
    writers = [GGUFWriter(target, architecture.contents()) for target in targets]
    for place, tensor in enumerate(reader.tensors):
        kind, data = MIXED.get(tensor.name, tensor.tensor_type), tensor.data
        if kind != tensor.tensor_type:
            values = dense.float().numpy() if kind == GGMLQuantizationType.F16 else gguf.dequantize(data, tensor.tensor_type)
            data = gguf.quantize(values, kind)
        writers[place % len(writers)].add_tensor(tensor.name, data, raw_dtype=kind)
    for writer in writers:
        for field in reader.fields.values():
            if not field.name.startswith("GGUF.") and field.name != architecture.name:
                inner = field.types[-1] if len(field.types) > 1 else None
                writer.add_key_value(field.name, field.contents(), field.types[0], inner)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def of_mixed_types(path: Path, wide: Path) -> None:
    shutil.move(path / "model.gguf", path.parent / "uniform.gguf")
    rewritten(path.parent / "uniform.gguf", wide, [path / "model.gguf"])


def split(path: Path, wide: Path) -> None:
    shutil.move(path / "model.gguf", path.parent / "whole.gguf")
    rewritten(path.parent / "whole.gguf", wide, [path / f"model-0000{part}-of-00002.gguf" for part in (1, 2)])


LAYOUTS: dict[str, tuple[str, str, Callable[[Path, Path], None] | None]] = {
    "compressed-tensors": ("int3-g32", "compressed-tensors", None),
    "shards": ("int4-g64-asym", "compressed-tensors", in_shards),
    "nvfp4": ("nvfp4", "compressed-tensors", None),
    "mxfp4": ("mxfp4", "compressed-tensors", None),
    "fp8": ("fp8", "compressed-tensors", None),
    "gptq": ("int4-g64", "gptq", None),
    "gptq_v2": ("int4-g64", "gptq", as_version_2),
    "act-order": ("int4-g64", "gptq", in_activation_order),
    "auto-round": ("int4-g64-asym", "auto-round", None),
    "awq": ("int4-g32-asym", "awq", None),
    "mlx": ("int3-g64-affine", "mlx", None),
    "exl3": ("trellis2", "exl3", None),
    "gguf": ("q4_0", "gguf", of_mixed_types),
    "split": ("q4_0", "gguf", split),
}
"""Scheme, format and what is changed."""


class Made:
    """Each layout of a model, once; not to be changed."""

    def __init__(self, wide: Path, quantize: Callable[..., roundel.Quantized], directory: Path) -> None:
        self.wide, self._quantize, self._directory = wide, quantize, directory

    def plain(self, scheme: str, form: str) -> Path:
        """Rounded to nearest, as Roundel writes it."""
        path = self._directory / f"{scheme}-{form}"
        if not path.exists():
            some = {"include": ("*.1.self_attn.o_proj",)} if form == "exl3" else {}  # trellises take long
            self._quantize(self.wide, path, scheme=scheme, format=form, **NEAREST, **some)
        return path

    def __call__(self, kind: str) -> Path:
        scheme, form, change = LAYOUTS[kind]
        path = self._directory / kind / "given"
        if not path.exists():
            shutil.copytree(self.plain(scheme, form), path)
            if change is not None:
                change(path, self.wide)
        return path


def files(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(path.iterdir())}
