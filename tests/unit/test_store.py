"""Directories and files that are either whole or not there."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from roundel import store
from roundel.errors import ModelError, NumericalError, OutputError, StorageError, damaged
from roundel.store import check_output, copy_files, staged_directory, storage, write_json, write_shards
from roundel.sweeps import HiddenStates


def test_a_staged_directory_appears_when_the_block_ends(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "out"
    with staged_directory(target) as staging:
        (staging / "a").write_text("1")
        assert not target.exists()
        assert staging.parent == target.parent
    assert (target / "a").read_text() == "1"
    assert list(target.parent.iterdir()) == [target]
    mask = os.umask(0)
    os.umask(mask)
    assert target.stat().st_mode & 0o777 == 0o777 & ~mask


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_staged_directory_vanishes_on_any_error(tmp_path: Path, error: type[BaseException]) -> None:
    def fill() -> None:
        with staged_directory(tmp_path / "out") as staging:
            (staging / "a").write_text("1")
            raise error

    with pytest.raises(error):
        fill()
    assert list(tmp_path.iterdir()) == []


def test_an_existing_directory_that_is_not_empty_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("precious")
    with pytest.raises(OutputError, match="not an empty directory"), staged_directory(tmp_path):
        pytest.fail("the block must not run")
    assert (tmp_path / "a").read_text() == "precious"


def test_an_existing_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("precious")
    with pytest.raises(OutputError, match="not an empty directory"):
        check_output(tmp_path / "out")


def test_an_empty_directory_is_filled(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with staged_directory(tmp_path / "out") as staging:
        (staging / "a").write_text("1")
    assert (tmp_path / "out" / "a").exists()


def test_a_parent_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="not a directory that you may write to"):
        check_output(tmp_path / "file" / "out")


def test_a_target_filled_in_the_meantime_is_kept(tmp_path: Path) -> None:
    target = tmp_path / "out"

    def race() -> None:
        with staged_directory(target):
            target.mkdir()
            (target / "a").write_text("precious")

    with pytest.raises(StorageError):
        race()
    assert list(tmp_path.iterdir()) == [target]
    assert (target / "a").read_text() == "precious"


def test_a_full_disk_is_a_storage_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store.os, "replace", full)
    with pytest.raises(StorageError, match=r"writing .*x\.json failed: no space is left"):
        write_json(tmp_path / "x.json", {})
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(StorageError, match="no space is left"), staged_directory(tmp_path / "out"):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_really_full_device_is_a_storage_error() -> None:
    with pytest.raises(StorageError, match="no space is left"), storage(Path("/dev/full")):
        Path("/dev/full").write_text("x")


def test_write_json_replaces_atomically(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"ä": 1})
    assert json.loads(path.read_text(encoding="utf-8")) == {"ä": 1}
    assert "ä" in path.read_text(encoding="utf-8")
    with pytest.raises(NumericalError, match="a would be no number"):
        write_json(path, {"a": float("nan")})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text(encoding="utf-8")) == {"ä": 1}
    write_json(path, [2])
    assert json.loads(path.read_text()) == [2]
    assert list(tmp_path.iterdir()) == [path]


def produced(unit: str) -> dict[str, torch.Tensor]:
    return {f"{unit}.a": torch.full((4,), float(ord(unit))), f"{unit}.b": torch.zeros(2, dtype=torch.int64)}


SIZES = dict.fromkeys("uvwxy", 32)


def test_a_number_that_json_cannot_hold_is_one_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(NumericalError, match=r"^layers\.model\.q_proj\.1\.loss would be no number"):
        write_json(tmp_path / "x.json", {"seed": 1, "layers": {"model.q_proj": [{}, {"loss": float("inf")}]}})
    assert not any(tmp_path.iterdir())


def test_few_bytes_are_one_file_without_an_index(tmp_path: Path) -> None:
    done: list[int] = []
    assert write_shards(tmp_path, SIZES, produced, advance=done.append) == 5 * 32
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]
    assert done == [1] * 5
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert len(file.keys()) == 10


@pytest.mark.parametrize(("shard_bytes", "per_shard"), [(64, [2, 2, 1]), (95, [2, 2, 1]), (96, [3, 2]), (1, [1] * 5)])
def test_shards_hold_whole_units_and_the_index_finds_them(tmp_path: Path, shard_bytes: int, per_shard: list[int]) -> None:
    total = write_shards(tmp_path, SIZES, produced, shard_bytes=shard_bytes)
    names = [f"model-{k:05d}-of-{len(per_shard):05d}.safetensors" for k in range(1, len(per_shard) + 1)]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert {p.name for p in tmp_path.iterdir()} == {*names, "model.safetensors.index.json"}
    assert index["metadata"]["total_size"] == total == 5 * 32
    contents = {name: load_file(tmp_path / name) for name in names}
    assert [len(contents[name]) for name in names] == [2 * units for units in per_shard]
    for unit in SIZES:
        for key, tensor in produced(unit).items():
            assert torch.equal(contents[index["weight_map"][key]][key], tensor)


def test_one_shard_is_in_memory_at_a_time(tmp_path: Path) -> None:
    seen: list[int] = []

    def produce(unit: str) -> dict[str, torch.Tensor]:
        seen.append(len(list(tmp_path.glob("*.safetensors"))))
        return produced(unit)

    write_shards(tmp_path, SIZES, produce, shard_bytes=64)
    assert seen == [0, 0, 1, 1, 2]


def test_a_shard_that_cannot_be_written_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"model\.safetensors failed"):
        write_shards(tmp_path / "missing", SIZES, produced)


def test_copied_files_are_the_tokenizers_not_the_weights_or_code(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    for name in (
        "tokenizer.json",
        "config.json",
        "vocab.txt",
        "LICENSE",
        "chat.jinja",
        "model.safetensors",
        "pytorch_model.bin",
        "code.py",
    ):
        (source / name).write_text(name)
    copy_files(source, target, leave_out={"config.json"})
    assert {p.name for p in target.iterdir()} == {"tokenizer.json", "vocab.txt", "LICENSE", "chat.jinja"}


def test_nothing_is_written_through_a_link(tmp_path: Path) -> None:
    """Neither under the temporary name of a file, nor in its place."""
    outside = tmp_path / "outside"
    outside.write_text("untouched")
    for name in (".a.json.tmp", "a.json"):
        (tmp_path / name).symlink_to(outside)
        write_json(tmp_path / "a.json", 1)
        assert (tmp_path / "a.json").read_text() == "1\n"
        (tmp_path / "a.json").unlink()
    (tmp_path / ".a.bin.part").symlink_to(outside)
    with pytest.raises(StorageError, match=r"a\.bin failed"):
        HiddenStates((1, 1, 1), torch.float32, tmp_path / "a.bin")
    assert outside.read_text() == "untouched"


def test_a_damaged_file_is_one_error_of_its_kind_and_memory_stays_what_it_is() -> None:
    def raised(error: BaseException) -> None:
        with damaged(ModelError, "x.json", "start again"):
            raise error

    panic = type("PanicException", (BaseException,), {})
    found = [
        (KeyError("a"), "no 'a'"),
        (RecursionError("too deep"), "too deep"),
        (panic("it fell over"), "it fell over"),
        (ValueError(), "ValueError"),
    ]
    for error, reason in found:
        with pytest.raises(ModelError, match=rf"^x\.json cannot be read \({reason}\): start again$"):
            raised(error)
    for error in (MemoryError(), KeyboardInterrupt(), StorageError("full")):
        with pytest.raises(type(error)):
            raised(error)
