"""The importance matrix is read back by llama.cpp's own Python reader, and the names are those of its own table."""

import re
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from laws.problems import draw
from roundel.errors import FactorsError, ModelError
from roundel.formats.imatrix import Imatrix, architecture, read, tensor_names, write

NAMES = ["blk.1.ffn_down.weight", "blk.0.attn_q.weight", "blk.11.attn_q.weight"]


def example() -> Imatrix:
    values = {name: draw(5 + k, 1, seed=k)[:, 0].square() for k, name in enumerate(NAMES)}
    return Imatrix(
        architecture="qwen3moe", dataset="my text: a, b", sequences=12, seq_len=34, values=values, counts=dict.fromkeys(NAMES, 408)
    )


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    matrix = example()
    write(tmp_path / "m.gguf", matrix)
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    keys = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert keys == {
        "general.architecture": "qwen3moe",
        "general.type": "imatrix",
        "imatrix.datasets": ["my text: a, b"],
        "imatrix.chunk_count": 12,
        "imatrix.chunk_size": 34,
    }
    for name in ("imatrix.chunk_count", "imatrix.chunk_size"):
        assert reader.fields[name].types == [gguf.GGUFValueType.UINT32]
    assert [tensor.name for tensor in reader.tensors] == [f"{name}.{part}" for name in sorted(NAMES) for part in ("in_sum2", "counts")]
    found = {tensor.name: tensor for tensor in reader.tensors}
    for name in NAMES:
        sums, counts = found[f"{name}.in_sum2"], found[f"{name}.counts"]
        assert sums.tensor_type == counts.tensor_type == gguf.GGMLQuantizationType.F32
        assert list(sums.shape) == [len(matrix.values[name])]
        assert counts.data.tolist() == [408.0]
        torch.testing.assert_close(torch.tensor(sums.data) / 408, matrix.values[name].float(), rtol=1e-6, atol=0)


def test_files_of_both_forms_are_read(tmp_path: Path) -> None:
    matrix = example()
    write(tmp_path / "m.gguf", matrix)
    old = len(NAMES).to_bytes(4, "little")
    for name in NAMES:
        values = (3 * matrix.values[name]).float().numpy()  # times chunks
        old += len(name).to_bytes(4, "little") + name.encode()
        old += (3).to_bytes(4, "little") + len(values).to_bytes(4, "little") + values.tobytes()
    (tmp_path / "m.dat").write_bytes(old + (99).to_bytes(4, "little") + b"rest")
    for found in (read(tmp_path / "m.gguf"), read(tmp_path / "m.dat")):
        assert set(found) == set(NAMES)
        for name in NAMES:
            sums, counts = found[name]
            assert sums.shape == (1, len(matrix.values[name]))
            torch.testing.assert_close(sums[0] / counts, matrix.values[name].float(), rtol=1e-6, atol=0)


def test_sums_of_experts_are_one_row_each(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "qwen3moe")
    writer.add_tensor("blk.0.ffn_down_exps.weight.in_sum2", np.arange(12, dtype=np.float32).reshape(3, 4))
    writer.add_tensor("blk.0.ffn_down_exps.weight.counts", np.array([[5], [0], [7]], dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    ((sums, counts),) = read(tmp_path / "m.gguf").values()
    assert counts.tolist() == [5, 0, 7]
    assert sums.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]


@pytest.mark.parametrize(
    "content",
    [b"", b"GGUF", b"\1\0\0\0\4\0\0\0name\1\0\0\0\xff\0\0\0", b"\xff\xff\xff\x7f", b"\1\0\0\0\xff\xff\xff\xff" + bytes(20), bytes(4)],
)
def test_what_is_no_importance_matrix_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "m.dat").write_bytes(content)
    with pytest.raises(FactorsError, match="importance matrix"):
        read(tmp_path / "m.dat")


def test_sums_that_are_none_are_refused(tmp_path: Path) -> None:
    matrix = example()
    matrix.values["blk.0.attn_q.weight"][0] = -1
    write(tmp_path / "m.gguf", matrix)
    with pytest.raises(FactorsError, match="no sums of squares"):
        read(tmp_path / "m.gguf")


def test_equal_matrices_give_equal_bytes(tmp_path: Path) -> None:
    matrix = example()
    backwards = Imatrix(**{**vars(matrix), "values": dict(reversed(matrix.values.items()))})
    for name, each in (("a", matrix), ("b", backwards)):
        write(tmp_path / name, each)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize(
    ("model_type", "expected"),
    [
        ("llama", "llama"),
        ("mistral", "llama"),
        ("qwen2_moe", "qwen2moe"),
        ("qwen3", "qwen3"),
        ("gemma3_text", "gemma3"),
        ("gpt_neox", "gptneox"),
        ("gpt_oss", "gpt-oss"),
        ("deepseek_v3", "deepseek2"),
        ("phi", "phi2"),
    ],
)
def test_model_types_have_their_architectures(model_type: str, expected: str) -> None:
    assert architecture(model_type) == expected


def test_other_names_are_names_that_gguf_knows() -> None:
    from roundel.formats.imatrix import _OTHER_NAMES

    assert set(_OTHER_NAMES.values()) <= set(gguf.MODEL_ARCH_NAMES.values())


@pytest.mark.parametrize("model_type", ["opt", "", "no_such"])
def test_an_unknown_model_type_is_named(model_type: str) -> None:
    with pytest.raises(ModelError, match=re.escape(f"model type {model_type!r}")):
        architecture(model_type)


def test_names_are_those_of_llama_cpp() -> None:
    modules = {
        "model.layers.0.self_attn.q_proj": "blk.0.attn_q.weight",
        "model.layers.41.self_attn.o_proj": "blk.41.attn_output.weight",
        "model.language_model.layers.3.mlp.gate_proj": "blk.3.ffn_gate.weight",
        "model.layers.3.mlp.down_proj": "blk.3.ffn_down.weight",
    }
    assert tensor_names("llama", [*modules, "model.layers.0.mlp.experts.5.up_proj", "model.vision_tower.layers.0.fc9"]) == modules


def test_reordered_columns_are_left_out() -> None:
    modules = ["model.layers.0.linear_attn.out_proj", "model.layers.3.self_attn.o_proj"]
    assert tensor_names(architecture("qwen3_5_text"), modules) == {modules[1]: "blk.3.attn_output.weight"}
