"""Whole checkpoints in every form of compressed-tensors, read by Transformers without any code of ours: the very weights and logits.

What Transformers 5.23 with compressed-tensors 0.20 cannot read as it is, is here too, so that a release that can is noticed.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, PreTrainedModel
from transformers.utils import logging

from e2e import tiny
from roundel.formats.compressed_tensors import CompressedTensors, share_tensor_scale
from roundel.grids import ScalarGrid, parse_scheme
from roundel.grids.inputs import CALIBRATED, round_inputs
from roundel.rounding.round import dequantized
from roundel.types import RoundedWeight

FORMAT = CompressedTensors()
IDS = torch.arange(24).view(2, 12) * 11 % tiny.VOCABULARY

PLAIN = [
    *("int2-g16", "int3-g32", "int4-channel", "int5-tensor", "int8-g32", "fp8", "fp8-tensor"),
    *("int8-channel-a8", "int8-tensor-a8", "fp8-a8", "int4-g16,fp8-tensor-a8"),
    "int3-g16,int4-channel,fp8,int6-g32",
]
"""Read by `from_pretrained(directory)` in float32, without further ado."""

CLIPPING = 1024.0
"""So that some of the inputs, those above 448 * 6 / 1024, are too large."""

SMALL_FLOATS = ["nvfp4", "mxfp4"]
"""Decompressed to bfloat16, which holds them exactly: in a float32 model only on request."""

ASYMMETRIC = ["int2-g16-asym", "int3-g32-asym", "int4-channel-asym", "int8-g16-asym"]
"""Not read by default: the place for zero points is made as large as if they were not packed."""

MIXED = ["int3-g32-asym,int4-g16,nvfp4,fp8", "mxfp4,int8-channel-asym"]


def rounded(scheme: str, W: Tensor) -> RoundedWeight:
    grid = parse_scheme(scheme)
    assert isinstance(grid, ScalarGrid)
    shape = (W.shape[0], W.shape[1])
    scales = grid.fit_scales(W, torch.ones(shape[1]), torch.bfloat16)
    if grid.inputs == "nvfp4":
        scales[CALIBRATED] = torch.full((1, 1), CLIPPING)
    return RoundedWeight(scheme=scheme, codes=grid.encode(W, *grid.affine(scales, shape, W.dtype)), scales=scales, shape=shape)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], tuple[Path, Tensor]]:
    """`written(architecture, schemes)`: a checkpoint whose linears have these schemes in turn, and the logits that it stands for."""
    made: dict[tuple[str, str], tuple[Path, Tensor]] = {}

    def make(architecture: str, schemes: str) -> tuple[Path, Tensor]:
        if (architecture, schemes) in made:
            return made[architecture, schemes]
        path = tmp_path_factory.mktemp("checkpoint")
        model = tiny.make_model(architecture).to(torch.bfloat16)
        with quiet():
            model.save_pretrained(path)
        linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"]
        kinds = schemes.split(",")
        tensors = load_file(path / "model.safetensors")
        weights = {name: rounded(kinds[k % len(kinds)], tensors.pop(f"{name}.weight").float()) for k, name in enumerate(sorted(linears))}
        for name, weight in weights.items():
            tensors |= {f"{name}.{part}": tensor for part, tensor in FORMAT.pack(weight).items()}
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((path / "config.json").read_text())
        ignore = ["lm_head"]
        (path / "config.json").write_text(json.dumps(config | {"quantization_config": FORMAT.config(weights, ignore)}))
        dense = tiny.make_model(architecture)
        dense.load_state_dict({name: value.float() for name, value in model.state_dict().items()})
        for name, weight in weights.items():
            linear = dense.get_submodule(name)
            linear.weight.data = dequantized(weight)
            if (kind := parse_scheme(weight.scheme).inputs) is not None:
                linear.register_forward_pre_hook(lambda _module, args, kind=kind: (round_inputs(args[0], kind, CLIPPING),))
        made[architecture, schemes] = path, logits(dense)
        return made[architecture, schemes]

    return make


@contextlib.contextmanager
def quiet() -> Any:
    verbosity = logging.get_verbosity()
    logging.set_verbosity(50)
    logging.disable_progress_bar()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(verbosity)
        logging.enable_progress_bar()


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad(), quiet():
        return model.eval()(IDS).logits.float()


def load(path: Path, **settings: Any) -> PreTrainedModel:
    with quiet():
        return AutoModelForCausalLM.from_pretrained(path, **{"dtype": torch.float32, **settings})


@pytest.mark.parametrize(
    ("architecture", "schemes"), [*(("llama", schemes) for schemes in PLAIN), ("qwen3", PLAIN[-1]), ("gemma3", PLAIN[-1])]
)
def test_plain_transformers_reads_the_very_weights(architecture: str, schemes: str, written) -> None:
    path, expected = written(architecture, schemes)
    assert torch.equal(logits(load(path)), expected)


@pytest.mark.parametrize(("architecture", "schemes"), [("llama", "nvfp4"), ("qwen3", "mxfp4"), ("gemma3", "nvfp4")])
@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
def test_small_floats_are_exact_where_they_are_dequantized_at_once(architecture: str, schemes: str, written) -> None:
    path, expected = written(architecture, schemes)
    dense = load(path, quantization_config=CompressedTensorsConfig(dequantize=True))
    assert torch.equal(logits(dense), expected)
    model = load(path, dtype=torch.bfloat16)
    logits(model)  # the weights unfold at the first call
    for name, module in dense.named_modules():
        if isinstance(module, nn.Linear):
            assert torch.equal(model.get_submodule(name).weight.float(), module.weight), name
    with pytest.raises(RuntimeError, match="same dtype"):  # if this does not raise any more, docs/engines/vllm.md can be shorter
        logits(load(path))


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
def test_inputs_of_four_bits_are_rounded_as_measured(written) -> None:
    path, expected = written("llama", "nvfp4-a4")
    model = load(path, dtype=torch.bfloat16)
    logits(model)  # the weights unfold
    found = logits(nn.Module.float(model))
    assert torch.equal(found, expected)
    dense = load(path, quantization_config=CompressedTensorsConfig(dequantize=True))
    assert not torch.allclose(logits(dense), expected, atol=0.1)  # which rounds no inputs


@pytest.mark.parametrize("schemes", ASYMMETRIC)
@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
def test_zero_points_are_read_with_dequantize(schemes: str, written) -> None:
    """Products are then rounded to the 16 bits of the scales, and the model is that of `W_hat` so rounded."""
    path, expected = written("llama", schemes)
    with pytest.raises(
        RuntimeError, match="ignore_mismatched_sizes"
    ):  # if this does not raise any more, docs/engines/vllm.md can be shorter
        load(path)
    found = load(path, quantization_config=CompressedTensorsConfig(dequantize=True))
    model = load(path, quantization_config=CompressedTensorsConfig(dequantize=True))
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"]
    stored = load_file(path / "model.safetensors")
    for name in names:
        module = model.get_submodule(name)
        shape = (module.weight.shape[0], module.weight.shape[1])
        parts = {key.removeprefix(f"{name}."): value for key, value in stored.items() if key.startswith(f"{name}.")}
        weight = FORMAT.unpack({key: parts[key] for key in parts if key.startswith("weight")}, parse_scheme(schemes), shape)
        assert torch.equal(module.weight, dequantized(weight, torch.bfloat16).float()), name
        module.weight.data = dequantized(weight)
    assert torch.equal(logits(model), expected)
    assert not torch.equal(logits(found), expected)


@pytest.mark.parametrize("schemes", [SMALL_FLOATS[0], ASYMMETRIC[1], *MIXED])
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3"])
def test_everything_is_exact_once_zero_points_are_in_their_place(architecture: str, schemes: str, written) -> None:
    """By the public methods of both libraries, in float32: what an evaluation should use."""
    path, expected = written(architecture, schemes)
    with quiet():
        model, info = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True
        )
        stored = load_file(path / "model.safetensors")
        for name, *_ in info["mismatched_keys"]:
            assert name.endswith(".weight_zero_point")
            module, _, parameter = name.rpartition(".")
            setattr(model.get_submodule(module), parameter, nn.Parameter(stored[name], requires_grad=False))
        model.hf_quantizer.compressor.decompress_model(model)
    assert not info["missing_keys"]
    assert torch.equal(logits(model.to(torch.float32)), expected)


def test_one_tensor_scale_for_query_key_and_value_changes_nothing(written) -> None:
    """vLLM takes the largest global scale of those that it runs as one."""
    path, _ = written("llama", "nvfp4")
    stored = load_file(path / "model.safetensors")
    names = [f"model.layers.0.self_attn.{part}_proj" for part in "qkv"]
    parts = {}
    for name in names:
        tensors = {key.removeprefix(f"{name}."): value for key, value in stored.items() if key.startswith(f"{name}.")}
        parts[name] = FORMAT.unpack(tensors, parse_scheme("nvfp4"), (tensors["weight_packed"].shape[0], 64))
    shared = share_tensor_scale(parts)
    assert len({FORMAT.pack(part)["weight_global_scale"].item() for part in shared.values()}) == 1
    for name in names:
        assert torch.equal(dequantized(shared[name]), dequantized(parts[name]))
