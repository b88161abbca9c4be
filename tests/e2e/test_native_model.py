"""The native format in Transformers: load, generate, save, load again; hostile files refused; without roundel no silent load."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

from e2e import tiny
from roundel.errors import ModelError
from roundel.formats.native import METHOD, Native
from roundel.grids import Grid, ScalarGrid, TileGrid, parse_scheme
from roundel.grids.trellis import Trellis
from roundel.integration.linear import QuantizedLinear
from roundel.integration.quantizer import RoundelConfig, RoundelQuantizer, register
from roundel.models import load_model, locate
from roundel.rotation import Rotation
from roundel.rounding.round import dequantized
from roundel.types import RoundedWeight

FORMAT = Native()
SCHEMES = ("int2-g32", "int4-channel-asym", "fp8", "mxfp4", "nvfp4", "q4_0", "lattice2", "trellis2", "trellis2-hyb-s10")
ROTATIONS = (None, "hadamard")


def nearest(W: Tensor, grid: Grid, rotation: Rotation | None) -> RoundedWeight:
    """The weight without curvature; of a trellis only some walk, since the best one takes long."""
    rotated = W.float() if rotation is None else rotation.rotate_weight(W.float())
    scales = grid.fit_scales(rotated, torch.ones(W.shape[1]), torch.bfloat16)
    shape = (W.shape[0], W.shape[1])
    if isinstance(grid, ScalarGrid):
        codes = grid.encode(rotated, *grid.affine(scales, shape, torch.float32))
    else:
        assert isinstance(grid, TileGrid)
        rows, columns = grid.tile(*shape)
        down, across = -(-shape[0] // rows), -(-shape[1] // columns)
        if isinstance(grid, Trellis):
            random = torch.Generator().manual_seed(W.numel())
            codes = torch.randint(2**grid.shift, (down * across, 256 // grid.values), generator=random).to(torch.uint8)
        else:
            codes = grid.encode_tiles(grid.to_tiles(rotated) / scales["scale"])
        codes = codes.unflatten(0, (down, across))
    return RoundedWeight(scheme=grid.name, codes=codes, scales=scales, shape=shape, rotation=rotation)


def write(
    source: Path, output: Path, schemes: tuple[str, ...], rotations: tuple[str | None, ...] = ROTATIONS
) -> tuple[Path, PreTrainedModel]:
    """A native checkpoint of a model, its linears' schemes and rotations in turn, and the same model with dense weights."""
    model = AutoModelForCausalLM.from_pretrained(source)
    head = model.get_output_embeddings()
    rounded: dict[str, RoundedWeight] = {}
    for name, module in model.named_modules():
        if type(module) is nn.Linear and module is not head:
            number = len(rounded)
            kind = rotations[number // len(schemes) % len(rotations)]
            shape = module.out_features, module.in_features
            rotation = None if kind is None else Rotation.draw(*shape, kind, seed=number)
            rounded[name] = nearest(module.weight.detach(), parse_scheme(schemes[number % len(schemes)]), rotation)
            module.weight.data = dequantized(rounded[name]).to(module.weight.dtype)
    tensors = load_file(source / "model.safetensors")
    for name, weight in rounded.items():
        del tensors[f"{name}.weight"]
        tensors |= {f"{name}.{tensor}": packed for tensor, packed in FORMAT.pack(weight).items()}
    output.mkdir()
    save_file(tensors, output / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = FORMAT.config(rounded, [] if config["tie_word_embeddings"] else ["lm_head"])
    (output / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return output, model


@contextmanager
def rewritten(directory: Path, output: Path) -> Iterator[tuple[dict[str, Any], dict[str, Tensor]]]:
    """A copy of a checkpoint, with what is done to its config and its tensors within the context."""
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    tensors = load_file(directory / "model.safetensors")
    yield config, tensors
    output.mkdir()
    (output / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(tensors, output / "model.safetensors", metadata={"format": "pt"})


def logits(model: PreTrainedModel) -> Tensor:
    ids = torch.arange(24).reshape(2, 12) * 7 % tiny.VOCABULARY
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.fixture(scope="module")
def checkpoint(model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama, untied, one scheme for all; not to be changed."""
    return write(model(), tmp_path_factory.mktemp("native") / "out", ("int4-g32",), (None,))[0]


@pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen2", "gemma2", "phi3", "opt", "gpt-neox"])
def test_a_loaded_model_computes_saves_and_loads_again(name: str, model: Callable[..., Path], tmp_path: Path) -> None:
    path, dense = write(model(name), tmp_path / "out", SCHEMES)
    loaded, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not any(info.values())
    kinds = [module.layout.scheme for module in loaded.modules() if isinstance(module, QuantizedLinear)]
    assert len(kinds) == len(tiny.architectures()[name]().linears)
    assert set(kinds) == set(SCHEMES[: len(kinds)])
    expected = logits(dense)
    torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=1e-4 * expected.abs().max().item())
    ids = torch.tensor([[5, 6, 7]])
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(loaded.generate(ids, **options), dense.generate(ids, **options))

    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (path / "model.safetensors").read_bytes()
    headers = [json.loads((each / "config.json").read_text())["quantization_config"] for each in (path, tmp_path / "again")]
    assert headers[0] == headers[1]
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), logits(loaded))


def test_without_rotation_float32_is_exact(model: Callable[..., Path], tmp_path: Path) -> None:
    path, dense = write(model(), tmp_path / "out", SCHEMES, (None,))
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(path)), logits(dense))


def test_the_own_loader_takes_it(checkpoint: Path) -> None:
    """`roundel evaluate` on such a directory."""
    loaded = load_model(checkpoint, device=torch.device("cpu"), dtype=torch.float32)
    assert torch.equal(logits(loaded), logits(AutoModelForCausalLM.from_pretrained(checkpoint)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_types_of_the_model_do_not_touch_packed_tensors(checkpoint: Path, dtype: torch.dtype) -> None:
    stored = load_file(checkpoint / "model.safetensors")
    loaded = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype)
    moved = AutoModelForCausalLM.from_pretrained(checkpoint).to(dtype)
    for model in (loaded, moved):
        assert logits(model).dtype == dtype
        for name, module in model.named_modules():
            if isinstance(module, QuantizedLinear):
                for tensor, value in module.packed.items():
                    assert value.dtype == stored[f"{name}.{tensor}"].dtype
                    assert torch.equal(value, stored[f"{name}.{tensor}"])


@pytest.mark.parametrize("scheme", ["trellis2", "int2-g64"])
def test_memory_is_that_of_the_file(scheme: str, tmp_path: Path) -> None:
    path, _ = write(locate("demo"), tmp_path / "out", (scheme,), (None,))
    loaded = AutoModelForCausalLM.from_pretrained(path)
    in_memory = sum(tensor.nbytes for tensor in [*loaded.parameters(), *loaded.buffers()])
    file = (path / "model.safetensors").stat().st_size
    assert in_memory == pytest.approx(file, rel=0.02)
    assert file < 0.6 * (locate("demo") / "model.safetensors").stat().st_size
    linears = [module for module in loaded.modules() if isinstance(module, QuantizedLinear)]
    packed = sum(tensor.nbytes for module in linears for tensor in module.packed.values())
    assert 8 * packed / sum(module.in_features * module.out_features for module in linears) < 2.3


def test_dequantize_gives_a_dense_model(checkpoint: Path, tmp_path: Path) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(checkpoint)
    expected = logits(loaded)
    loaded.dequantize()
    assert not any(isinstance(module, QuantizedLinear) for module in loaded.modules())
    loaded.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), expected)


def test_registering_again_does_nothing() -> None:
    register()
    assert AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] is RoundelConfig
    assert AUTO_QUANTIZER_MAPPING[METHOD] is RoundelQuantizer


def test_it_does_not_quantize_while_loading(checkpoint: Path, model: Callable[..., Path]) -> None:
    header = json.loads((checkpoint / "config.json").read_text())["quantization_config"]
    with pytest.raises(ValueError, match="pre-quantized"):
        AutoModelForCausalLM.from_pretrained(model(), quantization_config=RoundelConfig(**header))


# --- refusals


def first(tensors: Mapping[str, Tensor]) -> str:
    return next(name for name, tensor in sorted(tensors.items()) if tensor.dtype == torch.int32)


def shape_changed(tensors: dict[str, Tensor]) -> None:
    tensors[first(tensors)] = tensors[first(tensors)][:-1].clone()


def type_changed(tensors: dict[str, Tensor]) -> None:
    name = first(tensors).replace("weight", "scale")
    tensors[name] = tensors[name].float()


def removed(tensors: dict[str, Tensor]) -> None:
    del tensors[first(tensors).replace("weight", "scale")]


def not_finite(tensors: dict[str, Tensor]) -> None:
    tensors[first(tensors).replace("weight", "scale")][3, 1] = torch.nan


@pytest.mark.parametrize("ignoring", [False, True])
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (shape_changed, r"weight is int32 \(\d+,\); by quantization_config it is int32"),
        (type_changed, r"scale is float32 .* by quantization_config it is bfloat16"),
        (removed, "lacks model.layers.*scale, which quantization_config promises"),
        (not_finite, r"model\.layers\.0\..*: int4-g32: scale holds NaN"),
    ],
)
def test_damaged_tensors_are_refused(
    checkpoint: Path, tmp_path: Path, change: Callable[[dict[str, Tensor]], None], reason: str, ignoring: bool
) -> None:
    with rewritten(checkpoint, tmp_path / "out") as (_, tensors):
        change(tensors)
    with pytest.raises(ModelError, match=reason):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out", ignore_mismatched_sizes=ignoring)
    with pytest.raises(ModelError, match=reason):
        load_model(tmp_path / "out", device=torch.device("cpu"), dtype=torch.float32)


def group_of(header: dict[str, Any], **changes: Any) -> None:
    header["groups"][0] = {**header["groups"][0], **changes}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda h: h.update(version=2), "version 2 of the format; this Roundel reads version 1"),
        (lambda h: group_of(h, shape=[96, 32]), r"weight has shape \(96, 32\); by the rest of config.json it is"),
        (lambda h: group_of(h, modules=["model.layers.7.mlp.up_proj"]), "no such linear"),
        (lambda h: group_of(h, modules=["model.layers.0.mlp.experts.3.up_proj"]), "no such linear"),
        (lambda h: group_of(h, modules=["model.embed_tokens"]), "a Embedding cannot be packed"),
        (lambda h: group_of(h, modules=[""]), "cannot be packed"),
    ],
)
def test_hostile_headers_are_refused(checkpoint: Path, tmp_path: Path, change: Callable[[dict[str, Any]], None], reason: str) -> None:
    with rewritten(checkpoint, tmp_path / "out") as (config, _):
        change(config["quantization_config"])
    with pytest.raises(ModelError, match=reason):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_a_tied_head_is_refused(model: Callable[..., Path], tmp_path: Path) -> None:
    path, _ = write(model("llama-tied"), tmp_path / "tied", ("int4-g32",), (None,))
    with rewritten(path, tmp_path / "out") as (config, _):
        group = deepcopy(config["quantization_config"]["groups"][0])
        config["quantization_config"]["groups"].append({**group, "shape": [tiny.VOCABULARY, tiny.WIDTH], "modules": ["lm_head"]})
    with pytest.raises(ModelError, match=r"lm_head: .*shares its weight"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


WITHOUT = """
import sys
from transformers import AutoModelForCausalLM
try:
    AutoModelForCausalLM.from_pretrained(sys.argv[1])
except RuntimeError as error:
    print(error)
else:
    print("loaded")
assert not any(name.startswith("roundel") for name in sys.modules)
"""


def test_without_roundel_nothing_is_loaded(checkpoint: Path) -> None:
    """Transformers only warns of an unknown method; the shape of the packed weight stops it."""
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, str(checkpoint)], env=dict(os.environ), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "ignore_mismatched_sizes" in done.stdout
    assert "Unknown quantization type, got roundel" in done.stderr
    assert "MISMATCH" in done.stderr


def test_the_configuration_alone_is_read(checkpoint: Path) -> None:
    assert AutoConfig.from_pretrained(checkpoint).quantization_config["quant_method"] == METHOD
