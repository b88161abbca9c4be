"""`upload`: a directory that Roundel has written becomes a repository of the Hugging Face Hub, or the next commit of one.

Everything goes through `huggingface_hub.upload_folder`, which compares with what is there: a call that was interrupted, made again, sends
only what is missing, and large directories come in several commits. Its other function, `upload_large_folder`, takes no message and is gone
from later versions. Only files at the top of a directory go up, and chat templates; what else lies there (work directories, hidden files,
logs) stays, and is listed.

The directory and its card are checked before anything is sent, without the network. What the Hub checks in a card's metadata itself
(`license` is one of its list, say), it refuses before it takes any file.

Not done: pull requests, deleting files of the repository, editing the card (what README.md says goes up).
"""

from __future__ import annotations

import glob
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, get_token, metadata_load
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import (  # type: ignore[attr-defined]
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
    validate_repo_id,
)

from roundel.artifacts.checkpoints import GGUF_FILE, owners, read_report
from roundel.errors import ModelError, OutputError, RoundelError, damaged
from roundel.models import Checkpoint
from roundel.progress import Bars, Progress, Silent

__all__ = ["upload"]

LARGE = 10_000_000
"""Bytes from which on the Hub takes a file into its large storage, whatever it is."""

TEMPORARY = (".log", ".tmp", ".part", ".lock")

WEIGHTS = (".safetensors", ".gguf")


def upload(
    directory: str | Path,
    repo: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
    token: str | None = None,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Makes the repository if there is none, and commits the directory's files to it.

    Args:
        directory: As `quantize`, `tune` or `export` has written it, in any format.
        repo: `USER/NAME`, or `NAME` for the token's own user.
        private: Make a private repository; one that exists must be private then.
        revision: The branch; made if there is none. Default: main.
        message: Of the commit.
        token: One that may write; by default that of `HF_TOKEN` or of `hf auth login`.
        dry_run: Send nothing, and use no network.
        progress: Where to report; silent by default.

    Returns:
        What went up or would: `files` with sizes, `left_out`, `card` (the metadata), `warnings`, and if it went up `url` and `commit`.

    Raises:
        ModelError: the directory is not one of Roundel's, or not whole.
        OutputError: the card, the name, the token or the Hub does not allow it.
    """
    path, progress = Path(directory), progress or Silent()
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise OutputError(f"{repo!r} cannot be the name of a repository, such as me/{path.absolute().name}: {error}") from error
    report = _checked(path)
    card = _metadata(path / "README.md")
    files, left_out = _files(path)
    details: dict[str, Any] = {
        "repository": repo,
        "revision": revision or "main",
        "private": private,
        "message": message
        or f"{Path(report['model']['name']).name} in {report['scheme']} as {report['format']}, by Roundel {report['roundel']}",
        "files": [{"path": name, "size": size, "large": _large(name, size)} for name, size in files.items()],
        "bytes": sum(files.values()),
        "left_out": left_out,
        "card": card,
        "warnings": _warnings(card, report),
        "dry_run": dry_run,
    }
    for line in details["warnings"]:
        progress.warn(line)
    if not dry_run:
        if not (token or get_token()):
            raise OutputError("no token for the Hub: set HF_TOKEN to one that may write, or run: hf auth login")
        details |= _sent(path, details, token, progress)
    return details


def _checked(path: Path) -> dict[str, Any]:
    """roundel.json of a directory that has all that it says."""
    report = read_report(path)
    for name in ("config.json", "README.md"):
        if not (path / name).is_file():
            raise ModelError(f"{path} has no {name}: it is not whole; copy it again from where it was written")
    if report.get("format") == "gguf":
        if not (path / GGUF_FILE).is_file():
            raise ModelError(f"{path} has no {GGUF_FILE}: it is not whole; copy it again from where it was written")
        return report
    checkpoint, index = Checkpoint.open(path), path / "model.safetensors.index.json"
    with damaged(ModelError, index):
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()) if index.is_file() else {"model.safetensors"}
    missing = sorted(name for name in shards if not (path / name).is_file())
    missing += sorted(set(report["layers"]) - set(owners(checkpoint, report["layers"]).values()))
    if missing:
        raise ModelError(f"{path} lacks {missing[0]}: it is not whole; copy it again from where it was written")
    return report


def _metadata(card: Path) -> dict[str, Any]:
    """The YAML section of a card, checked as far as the Hub's rules can be without it."""
    try:
        found = metadata_load(card) or {}
        bases = found.get("base_model", [])
        for base in [bases] if isinstance(bases, str) else bases:
            validate_repo_id(base)
    except HFValidationError as error:
        raise OutputError(f"{card}: base_model is no model of the Hub ({error}); correct that line or remove it") from error
    except Exception as error:  # of the YAML reader, which has its own
        raise OutputError(f"{card}: its metadata, between the lines of ---, cannot be read: {str(error).splitlines()[0]}") from error
    return found


def _files(path: Path) -> tuple[dict[str, int], list[str]]:
    """Sizes of the files that go up, by name, and the names of what stays here."""
    mine = {file.relative_to(path).as_posix(): file for file in [*path.iterdir(), *path.glob("additional_chat_templates/*.jinja")]}
    kept = {
        name: file.stat().st_size
        for name, file in mine.items()
        if file.is_file() and not file.name.startswith(".") and file.suffix not in TEMPORARY
    }
    others = (name + "/" * file.is_dir() for name, file in mine.items() if name not in kept and name != "additional_chat_templates")
    return dict(sorted(kept.items())), sorted(others)


def _large(name: str, size: int) -> bool:
    return name.endswith(WEIGHTS) or size >= LARGE


def _warnings(card: Mapping[str, Any], report: Mapping[str, Any]) -> list[str]:
    found = [f"README.md has no {key}, {use}" for key, use in _WANTED.items() if not card.get(key)]
    named = (report["model"]["name"], *(report["recipe"].get(key) for key in ("calibration", "eval_data")))
    paths = sorted({str(value) for value in named if value and Path(str(value)).is_absolute()})
    return found + ([f"roundel.json and README.md name paths of this machine: {', '.join(paths)}"] if paths else [])


_WANTED = {
    "license": "by which the Hub tells what may be done with the model: add `license: ...` to its head",
    "base_model": "by which the Hub lists it under the original: add `base_model: USER/NAME` to its head",
}


def _sent(path: Path, details: Mapping[str, Any], token: str | None, progress: Progress) -> dict[str, str]:
    repo, api = str(details["repository"]), HfApi(token=token, library_name="roundel")
    with _hub(repo):
        repo = api.create_repo(repo, private=details["private"] or None, exist_ok=True).repo_id
        if details["private"] and not api.model_info(repo).private:
            raise OutputError(f"{repo} exists and is public: choose another name, or make it private in its settings on the Hub")
        if details["revision"] != "main":
            api.create_branch(repo, branch=details["revision"], exist_ok=True)
        with _shown(progress):
            commit = api.upload_folder(
                repo_id=repo,
                folder_path=path,
                revision=details["revision"],
                commit_message=details["message"],
                allow_patterns=[glob.escape(file["path"]) for file in details["files"]],
            )
    return {"repository": repo, "url": f"{api.endpoint}/{repo}", "commit": commit.oid}


@contextmanager
def _shown(progress: Progress) -> Iterator[None]:
    """On a terminal the library's bars, which count bytes; elsewhere our lines."""
    if isinstance(progress, Bars):
        yield
        return
    had = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        with progress.stage("uploading", 1) as advance:
            yield
            advance(1)
    finally:
        if had:
            enable_progress_bars()


_REASONS = {
    401: "the Hub does not know this token: make one that may write at https://huggingface.co/settings/tokens, then hf auth login",
    403: "this token may not write there: the repository or its owner is another's, or the token only reads; choose a name of your own, "
    "USER/NAME, or another token",
    404: "there is no such user, repository or branch that this token sees",
}


@contextmanager
def _hub(repo: str) -> Iterator[None]:
    """Turns what the library raises, of a dozen types, into one error."""
    try:
        yield
    except RoundelError:
        raise
    except Exception as error:
        first: BaseException = error
        while first.__cause__ is not None and not hasattr(first, "response"):
            first = first.__cause__
        status = getattr(getattr(first, "response", None), "status_code", 0)
        said = " ".join(str(first).split()) or type(first).__name__
        reason = _REASONS.get(status, "the same command, given again, sends what is missing")
        raise OutputError(f"the Hub did not take {repo}: {reason} ({said[:300]})") from error
