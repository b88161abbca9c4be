"""`upload`: what was written, to the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from roundel.commands.line.options import JsonFile, Quiet
from roundel.commands.line.output import emit, print_rows

__all__ = ["upload"]


def upload(
    directory: Annotated[Path, typer.Argument(help="What quantize, tune or export has written, in any format.")],
    repo: Annotated[str, typer.Argument(help="USER/NAME on the Hub; made if it is not there.")],
    private: Annotated[bool, typer.Option("--private", help="Make a private repository; one that exists must be private.")] = False,
    revision: Annotated[
        str | None,
        typer.Option("--revision", "--branch", metavar="BRANCH", help="Branch to commit to, made if it is not there; default: main."),
    ] = None,
    message: Annotated[str | None, typer.Option(help="Of the commit; default: model, scheme and format.")] = None,
    token: Annotated[
        str | None,
        typer.Option(help="One that may write; default: HF_TOKEN, or that of hf auth login, which others on this machine do not see."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go up; no network is used.")] = False,
    json_file: JsonFile = None,
    quiet: Quiet = False,
) -> None:
    """Commit a written directory and its model card to a repository of the Hub; the same command goes on after a crash."""
    from roundel.commands.upload import upload as run
    from roundel.progress import make_progress

    details = run(
        directory,
        repo,
        private=private,
        revision=revision,
        message=message,
        token=token,
        dry_run=dry_run,
        progress=make_progress(quiet=quiet),
    )
    emit(details, json_file)
    if quiet or str(json_file) == "-":
        return
    if dry_run:
        _show(details)
    else:
        print(f"{directory}: {len(details['files'])} files in {details['url']}, commit {details['commit']}")


def _show(details: dict[str, Any]) -> None:
    rows = [[file["path"], f"{file['size']:,}", "large storage" if file["large"] else "in git"] for file in details["files"]]
    print_rows(f"would go to {details['repository']}, branch {details['revision']}: {details['bytes']:,} bytes", rows)
    print(f"message: {details['message']}")
    for name in details["left_out"]:
        print(f"stays here: {name}")
    print("card:")
    for key, value in details["card"].items():
        print(f"  {key}: {', '.join(map(str, value)) if isinstance(value, list) else value}")
