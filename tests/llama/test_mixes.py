"""Which tensor gets which type: what `llama-quantize --dry-run` says of its mixes, and what we do."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter
from transformers import AutoConfig

from llama.engine import HOME, LIBRARY
from llama.files import save_model, write
from roundel.formats.gguf_mixes import MIXES, mix_types
from roundel.recipes import Recipe, with_block_type

pytestmark = pytest.mark.skipif(not LIBRARY.is_file(), reason="no llama.cpp in this environment: make test-llama")

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "grouped": ("llama", {"num_hidden_layers": 17, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 32}),
    "tied": ("llama-tied", {"num_hidden_layers": 9, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32}),
    "narrow": ("qwen3", {"num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 320}),
    "experts": ("mixtral", {"num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4, "num_local_experts": 8}),
    "80 layers": ("llama", {"num_hidden_layers": 80, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 32}),
}


def imatrix(path: Path, original: Path) -> None:
    """Of ones."""
    writer = GGUFWriter(path, "llama")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["ones"])
    writer.add_uint32("imatrix.chunk_count", 1)
    writer.add_uint32("imatrix.chunk_size", 1)
    for tensor in GGUFReader(original).tensors:
        shape = tensor.shape.tolist()
        if len(shape) > 1 and tensor.name != "token_embd.weight":
            experts = shape[2] if len(shape) > 2 else 1
            writer.add_tensor(f"{tensor.name}.in_sum2", np.ones((experts, shape[0]), np.float32))
            writer.add_tensor(f"{tensor.name}.counts", np.ones((experts, 1), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def said(mix: str, original: Path, matrix: Path) -> dict[str, str]:
    """Of each tensor that is quantized."""
    line = [HOME / "llama-quantize", "--dry-run", "--imatrix", matrix, original, mix.upper(), "1"]
    done = subprocess.run([*map(str, line)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = re.findall(r"^\[ *\d+/ *\d+\] +(\S+) +- .*-> +\S+ MiB \((\w+)\)", done.stdout + done.stderr, re.MULTILINE)
    return {name: kind.lower() for name, kind in found}


@pytest.mark.parametrize("case", CASES)
def test_all_mixes(case: str, tmp_path: Path) -> None:
    name, changes = CASES[case]
    source = save_model(tmp_path / "source", name, **changes)
    original, matrix = tmp_path / "original.gguf", tmp_path / "ones.gguf"
    write(source, original, lambda _name, _linear: None, dense="f16")
    imatrix(matrix, original)
    shapes = {each.name: each.shape.tolist() for each in GGUFReader(original).tensors}
    ends = {"token_embd.weight": "embedding", "output.weight": "head"} if "output.weight" in shapes else {"token_embd.weight": "head"}
    config = AutoConfig.from_pretrained(source)
    for mix in MIXES:
        recipe = Recipe.of(**with_block_type({"mix": mix}))
        theirs = said(mix, original, matrix)
        assert set(theirs) == {each for each in shapes if len(shapes[each]) > 1 and "ffn_gate_inp" not in each}
        chosen = mix_types(mix, {each: each for each in theirs if each not in ends}, config)
        ours = {each: recipe.fitting(kind, shapes[each][0]) for each, kind in chosen.items()}
        ours |= {each: recipe.usual_ends(role, shapes[each][1], shapes[each][0])[0] for each, role in ends.items()}  # type: ignore[arg-type]
        for each, kind in theirs.items():
            if not ((mix, case) == ("q3_k_l", "experts") and "attn_output" in each):  # as `gguf_mixes` says
                assert ours[each] == kind.replace("q5_1", "q5_0"), (mix, each)
