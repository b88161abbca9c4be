"""Writing directories that are either whole or not there.

Everything goes to a hidden sibling of the target, on the same file system, which is renamed into place at the very
end and removed on any error, Ctrl-C included. A disk that refuses becomes a `StorageError` that says so.
"""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from roundel import processes
from roundel.errors import NumericalError, OutputError, StorageError

__all__ = [
    "check_output",
    "common",
    "copy_files",
    "hidden_beside",
    "is_there",
    "json_of",
    "json_text",
    "locked",
    "staged_directory",
    "staged_file",
    "storage",
    "umask",
    "write_config",
    "write_json",
    "write_shards",
    "write_text",
]

SHARD_BYTES = 2 * 1024**3
TERMS = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY")
"""How files begin that say what may be done with a model."""


def is_there(path: Path, kind: Callable[[Path], bool] = Path.exists) -> bool:
    """`path.exists()`, `is_dir()` or `is_file()`, and False for a name that is too long for the file system, where those raise an error."""
    try:
        return kind(path)
    except OSError:
        return False


def check_output(target: Path) -> None:
    """Refuses a target that cannot become a new directory.

    Raises:
        OutputError: it exists and is not an empty directory, or its parent cannot be written to.
    """
    if is_there(target) and (not target.is_dir() or any(target.iterdir())):
        raise OutputError(f"{target} exists and is not an empty directory; choose another or remove it")
    parent = target.absolute().parent
    while not is_there(parent):
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise OutputError(f"{target} cannot be made: {parent} is not a directory that you may write to")


@contextmanager
def storage(path: Path, doing: str = "writing") -> Iterator[None]:
    """Turns the errors of a full or failing disk into one `StorageError` about `path`."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or f"the disk took no more ({error})"  # NumPy's have no number
        raise StorageError(f"{doing} {path} failed: {_REASONS.get(error.errno or 0, reason)}") from error
    except SafetensorError as error:  # has the number in its text
        found = re.search(r"os error (\d+)", str(error))
        raise StorageError(f"{doing} {path} failed: {_REASONS.get(int(found[1]), error) if found else error}") from error


_REASONS = {
    errno.ENOSPC: "no space is left on the disk",
    errno.EDQUOT: "your disk quota is used up",
    errno.EFBIG: "the file grew too large",
}


@contextmanager
def staged_directory(target: Path) -> Iterator[Path]:
    """A directory to fill, which becomes `target` when the block ends well and vanishes when it does not; one for all processes.

    Raises:
        OutputError: as `check_output`.
        StorageError: it cannot be made or renamed.
    """
    check_output(target)
    staging = hidden_beside(target)
    try:
        yield staging
        processes.wait()
        if processes.first():
            with storage(target):
                staging.chmod(0o777 & ~umask())
                os.replace(staging, target)
    except BaseException:
        if processes.first():
            shutil.rmtree(staging, ignore_errors=True)
        raise


def hidden_beside(target: Path, kind: str = "") -> Path:
    """A new hidden directory beside `target`, one for all processes.

    Raises:
        StorageError: it cannot be made, or not all see it.
    """

    def made() -> str:
        parent = target.absolute().parent
        with storage(parent):
            parent.mkdir(parents=True, exist_ok=True)
            return tempfile.mkdtemp(prefix=f".{target.name}.{kind}", dir=parent)

    return common(Path(processes.from_first(made)))


def common(directory: Path) -> Path:
    """A directory that the first process has made, and that others must see; all ask, and none goes on before all have looked.

    Raises:
        StorageError: they do not.
    """
    if not directory.is_dir():
        raise StorageError(
            f"{directory} of the first process is not here: all processes need the output, and --work, on a file system that they share"
        )
    processes.wait()
    return directory


@contextmanager
def locked(file: Path) -> Iterator[None]:
    """Within the context, or until the process ends, no other is at work in the directory of this file; both are made if need be.

    Raises:
        StorageError: another process is, or the disk refuses.
    """
    with storage(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        lock = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise StorageError(f"another process is at work in {file.parent}; wait for it, or give another directory") from error
        yield
    finally:
        os.close(lock)


@contextmanager
def staged_file(target: Path) -> Iterator[Path]:
    """The path of a file to write, which takes `target`'s place when the block ends well and vanishes when it does not.

    Raises:
        StorageError: it cannot be written or renamed.
    """
    temporary = target.with_name(f".{target.name}.tmp")
    with storage(target):
        temporary.unlink(missing_ok=True)  # left behind, or a link to somewhere else
        try:
            yield temporary
            os.replace(temporary, target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def umask() -> int:
    """The process's mask for new files, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def json_text(value: Any) -> str:
    """Indented JSON, in which half of a surrogate pair, that a string can have and UTF-8 cannot, is escaped.

    Raises:
        NumericalError: a number is NaN or infinite; JSON has neither.
    """
    try:
        text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    except ValueError as error:
        raise NumericalError(
            f"{_not_finite(value)} would be no number: something that it was computed from is too large or damaged"
        ) from error
    return text.encode(errors="backslashreplace").decode()


def json_of(text: str) -> Any:
    """Parsed JSON whose strings can be written again: escapes can name half of a surrogate pair, which no text holds.

    Raises:
        ValueError: it is none.
    """
    found = json.loads(text)
    if "\\ud" in text.lower():
        json.dumps(found, ensure_ascii=False).encode()
    return found


def _not_finite(value: Any) -> str | None:
    """Where in nested values a number is NaN or infinite: names and places with dots between them."""
    if isinstance(value, float):
        return None if math.isfinite(value) else ""
    inner = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list | tuple) else ()
    for name, each in inner:
        if (place := _not_finite(each)) is not None:
            return f"{name}.{place}".rstrip(".")
    return None


def write_json(path: Path, value: Any) -> None:
    """Writes an indented JSON file atomically, as `write_text`."""
    write_text(path, json_text(value) + "\n")


def write_config(path: Path, config: Mapping[str, Any]) -> None:
    """Writes a model's settings as they were read: older ones of the Hub have Infinity among their numbers, as Mamba `time_step_limit`."""
    write_text(path, json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a file atomically; of several processes the first does. Half of a surrogate pair, which JSON can name, is escaped as there."""
    if not processes.first():
        return
    with staged_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def copy_files(source: Path, target: Path, *, leave_out: set[str]) -> None:
    """Copies a model directory's tokenizer, chat templates, generation settings and terms: everything but weights, code and `leave_out`."""
    templates = source / "additional_chat_templates"
    for path in [*sorted(source.iterdir()), *sorted(templates.glob("*.jinja"))]:
        keep = path.suffix in {".json", ".txt", ".model", ".jinja"} or path.name.startswith(TERMS)
        if path.is_file() and keep and path.name not in leave_out:
            own = target / path.relative_to(source)
            with storage(own):
                own.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, own)


def write_shards(
    directory: Path,
    sizes: Mapping[str, int],
    produce: Callable[[str], dict[str, Tensor]],
    *,
    shard_bytes: int = SHARD_BYTES,
    advance: Callable[[int], None] = lambda _n: None,
) -> int:
    """Writes `model.safetensors`, or `model-0000x-of-0000n.safetensors` with an index, holding one shard in memory at a time.

    Args:
        directory: Where to.
        sizes: Bytes of each unit; a unit is never split.
        produce: The tensors of a unit, made when its turn comes.
        shard_bytes: No shard of several units is larger.
        advance: Called with 1 after each unit.

    Returns:
        Total bytes of tensor data.
    """
    shards: list[list[str]] = [[]]
    filled = 0
    for unit, size in sizes.items():
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(unit)
        filled += size
    total = 0
    where: dict[str, str] = {}
    for number, units in enumerate(shards, 1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors: dict[str, Tensor] = {}
        for unit in units:
            tensors.update(produce(unit))
            advance(1)
        with storage(directory / name):
            save_file(tensors, directory / name, metadata={"format": "pt"})
            (directory / name).chmod(0o666 & ~umask())  # safetensors makes files that only their owner can read
        total += sum(t.numel() * t.element_size() for t in tensors.values())
        where.update(dict.fromkeys(tensors, name))
    if len(shards) > 1:
        write_json(directory / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": where})
    return total
