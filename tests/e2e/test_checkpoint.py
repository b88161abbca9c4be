"""What is written loads in plain Transformers, where Roundel is not installed, and gives exactly the weights that were chosen.

One Python in which `import roundel` fails loads every checkpoint with `AutoModelForCausalLM.from_pretrained` alone, next to
a dense copy of the original whose linears hold our own dequantized weights, and reports the difference of their logits.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from roundel.formats import FORMATS
from roundel.grids import parse_scheme
from roundel.models import load_model
from roundel.rounding.round import dequantized
from roundel.store import SHARD_BYTES, write_shards
from roundel.types import RoundedWeight

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CASES = [
    (name, scheme, dtype)
    for name in ("llama", "opt")
    for scheme in ("int2-g32", "int3-g32", "int3-channel", "int4-g32", "int8-channel")
    for dtype in DTYPES
    if (name, dtype) == ("llama", "float32") or scheme == "int3-g32" or (name, scheme) == ("llama", "int4-g32")
]
SHARDED = ("llama", "int4-g32", "bfloat16")

STRANGER = """
import json, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "roundel":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())
import torch
from transformers import AutoModelForCausalLM

def load(path):
    model, info = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()

ids = torch.arange(256).reshape(4, 64) + 40
answers = []
with torch.no_grad():
    for packed, dense in json.loads(sys.argv[1]):
        ours, theirs = load(packed), load(dense)
        logits, expected = ours(input_ids=ids).logits, theirs(input_ids=ids).logits
        answers.append({"difference": (logits - expected).abs().max().item(), "size": expected.abs().max().item()})
assert "roundel" not in sys.modules
try:
    import roundel
except ModuleNotFoundError:
    print(json.dumps(answers))
"""


def read(directory: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


def dense_copy(source: Path, packed: Path, scheme: str, target: Path) -> Path:
    """The original in float32, its linears filled with the dequantized weights of `packed`."""
    grid, tensors = parse_scheme(scheme), read(packed)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    replaced = 0
    for name, module in model.named_modules():
        prefix = f"{name}.weight_"
        own = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(prefix)}
        if own:
            module.weight.data = dequantized(unpacked(own, grid))
            replaced += 1
    assert replaced * 3 == sum(".weight_" in key for key in tensors)
    model.save_pretrained(target)
    return target


def unpacked(tensors: dict[str, torch.Tensor], grid) -> RoundedWeight:
    d_out, d_in = tensors["weight_shape"].tolist()
    return FORMATS["compressed-tensors"].unpack(tensors, grid, (d_out, d_in))


@pytest.fixture(scope="module")
def checkpoints(model, quantize, tmp_path_factory) -> dict[tuple[str, str, str, bool], tuple[Path, Path]]:
    """(packed, dense) directories by model, scheme, source type and whether there are several shards."""
    root = tmp_path_factory.mktemp("checkpoints")
    made = {}
    for case in CASES:
        name, scheme, dtype = case
        source, packed = model(name, DTYPES[dtype]), root / "-".join(case)
        quantize(source, packed, scheme=scheme, curvature="kfac", sweeps=1)
        made[*case, False] = packed, dense_copy(source, packed, scheme, root / ("dense-" + packed.name))
    with pytest.MonkeyPatch.context() as patch:

        def small_shards(*args, **options) -> int:
            return write_shards(*args, shard_bytes=40_000, **options)

        patch.setattr("roundel.artifacts.checkpoints.write_shards", small_shards)
        packed = root / "sharded"
        quantize(model(SHARDED[0], DTYPES[SHARDED[2]]), packed, scheme=SHARDED[1], curvature="kfac", sweeps=1)
    made[*SHARDED, True] = packed, made[*SHARDED, False][1]
    return made


@pytest.fixture(scope="module")
def answers(checkpoints) -> dict[tuple[str, str, str, bool], dict[str, float]]:
    paths = json.dumps([[str(path) for path in pair] for pair in checkpoints.values()])
    done = subprocess.run([sys.executable, "-c", STRANGER, paths], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return dict(zip(checkpoints, json.loads(done.stdout), strict=True))


@pytest.mark.parametrize("case", [(*case, False) for case in CASES] + [(*SHARDED, True)], ids=lambda case: "-".join(map(str, case)))
def test_plain_transformers_gives_exactly_our_logits(case, answers) -> None:
    assert answers[case]["size"] > 0.1
    assert answers[case]["difference"] == 0.0


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_packed_tensors_are_what_the_format_says(case, checkpoints) -> None:
    _name, scheme, dtype = case
    grid = parse_scheme(scheme)
    tensors = read(checkpoints[*case, False][0])
    modules = [key.removesuffix(".weight_packed") for key in tensors if key.endswith(".weight_packed")]
    for module in modules:
        own = {part: tensors[f"{module}.{part}"] for part in ("weight_packed", "weight_scale", "weight_shape")}
        assert own["weight_scale"].dtype == (torch.bfloat16 if dtype == "bfloat16" else torch.float16)
        rounded = unpacked(own, grid)
        low, high = grid.code_range
        assert low <= rounded.codes.min() < rounded.codes.max() <= high
        assert all(torch.equal(own[key], value) for key, value in FORMATS["compressed-tensors"].pack(rounded).items())


def test_shards_hold_the_same_tensors_and_have_an_index(checkpoints) -> None:
    whole, parts = (checkpoints[*SHARDED, sharded][0] for sharded in (False, True))
    files = sorted(p.name for p in parts.glob("*.safetensors"))
    assert len(files) >= 3
    assert files == [f"model-{k:05d}-of-{len(files):05d}.safetensors" for k in range(1, len(files) + 1)]
    index = json.loads((parts / "model.safetensors.index.json").read_text())
    stored = {file: load_file(parts / file) for file in files}
    assert index["weight_map"] == {name: file for file, tensors in stored.items() for name in tensors}
    one, several = read(whole), read(parts)
    assert one.keys() == several.keys()
    assert all(torch.equal(one[name], several[name]) for name in one)
    sizes = {file: sum(t.numel() * t.element_size() for t in tensors.values()) for file, tensors in stored.items()}
    assert index["metadata"]["total_size"] == sum(sizes.values())
    units = {file: {name.partition(".weight_")[0] for name in tensors} for file, tensors in stored.items()}
    assert all(size <= 40_000 or len(units[file]) == 1 for file, size in sizes.items())
    assert SHARD_BYTES > 1e9


def test_a_source_in_several_shards(model, quantize, tmp_path: Path) -> None:
    whole = AutoModelForCausalLM.from_pretrained(model(), dtype=torch.float32)
    source = tmp_path / "source"
    whole.save_pretrained(source, max_shard_size="60KB")
    for file in model().iterdir():
        if file.suffix == ".json" and not (source / file.name).exists():
            (source / file.name).write_bytes(file.read_bytes())
    assert len(list(source.glob("*.safetensors"))) > 2
    outputs = [tmp_path / "one", tmp_path / "several"]
    for path, output in zip((model(), source), outputs, strict=True):
        quantize(path, output, scheme="int4-g32", curvature="identity", sweeps=0)
    one, several = map(read, outputs)
    assert sorted(one) == sorted(several)
    assert all(torch.equal(one[name], several[name]) for name in one)
    assert not (outputs[1] / "model.safetensors.index.json").exists()


def test_what_is_evaluated_is_what_users_load(quantized) -> None:
    """`load_model`, which the reported KL comes from, has our own dequantized weights to the bit."""
    loaded = load_model(quantized.path, device=torch.device("cpu"), dtype=torch.float32)
    grid, tensors = parse_scheme("int4-g32"), read(quantized.path)
    for name in quantized.details["layers"]:
        own = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.weight_")}
        assert torch.equal(loaded.get_submodule(name).weight, dequantized(unpacked(own, grid)))
