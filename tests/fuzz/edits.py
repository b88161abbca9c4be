"""Changes to one file of a directory, as JSON: drawn at random by what the file is, and made again from a corpus.

{"file": F, "kind": "delete"}                                   it is not there
{"file": F, "kind": "cut", "to": part of its size}              it breaks off
{"file": F, "kind": "grow", "by": bytes}                        something follows
{"file": F, "kind": "bytes", "at": [[part of its size, value]]}
{"file": F, "kind": "words", "at": [[offset, hexadecimal]]}     lengths and counts in binary headers
{"file": F, "kind": "json" | "header", "path": [...]}           with "value", "drop" or "rename": of JSON, of safetensors
{"file": F, "kind": "line", "number": N, "text": T}             of a text
{"file": F, "kind": "nest", "depth": N}                         brackets in brackets
{"file": F, "kind": "link", "to": path}                         a symbolic link in its place
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

__all__ = ["Edit", "apply", "random_edit"]

Edit = dict[str, Any]

SCALARS = [None, True, False, -1, 0, 1, 2, 3, 7, 2**31, 2**63, -(2**63), 0.5, 1e308, float("nan"), float("inf")]
STRINGS = ["", "x", "native", "float16", "BF16", "F8_E8M0", "int4-g32", "trellis2", "../outside/secret", "9" * 5000, "\ud800", "a" * 70000]
NESTED = [[], {}, [1, 2, 3], ["x"], [[]], {"x": 1}, [None] * 3, [-1, 5], [1 << 40, 1 << 20], {"scheme": "int4-g32"}]
WORDS = ["00" * 8, "ff" * 8, "ff" * 7 + "7f", "00000000ffffff7f", "01", "ffffffff", "0000008000000000", "0000000001000000"]
LINES = [
    "{",
    "[]",
    '{"text": 3}',
    '{"text": null}',
    '{"messages": [{}]}',
    '{"messages": [{"role": 1, "content": {}}]}',
    "\x00",
    "\ud7ff\u202e",
    "[" * 9000,
]


def apply(edit: Edit, directory: Path) -> None:
    """Makes the change."""
    path, kind = directory / edit["file"], edit["kind"]
    content = path.read_bytes()
    path.unlink()
    if kind == "delete":
        return
    if kind == "link":
        path.symlink_to(edit["to"])
        return
    path.write_bytes(_changed(content, edit))


def _changed(content: bytes, edit: Edit) -> bytes:
    match edit["kind"]:
        case "cut":
            found = content[: int(len(content) * edit["to"])]
        case "grow":
            found = content + bytes(range(edit["by"]))
        case "bytes" | "words":
            found = _patched(content, edit["at"])
        case "json":
            found = json.dumps(_set(json.loads(content), edit)).encode()
        case "header":
            length = int.from_bytes(content[:8], "little")
            header = json.dumps(_set(json.loads(content[8 : 8 + length]), edit)).encode()
            header += b" " * (-len(header) % 8)
            found = len(header).to_bytes(8, "little") + header + content[8 + length :]
        case "line":
            lines = content.decode("utf-8").split("\n")
            lines[edit["number"] % len(lines)] = edit["text"]
            found = "\n".join(lines).encode("utf-8", "surrogatepass")
        case "nest":
            found = b"[" * edit["depth"] + b"]" * edit["depth"]
        case other:
            raise ValueError(other)
    return found


def _patched(content: bytes, at: list[tuple[float, int | str]]) -> bytes:
    found = bytearray(content)
    for where, value in at:
        own = bytes([value]) if isinstance(value, int) else bytes.fromhex(value)
        start = int(len(found) * where) if isinstance(where, float) else where
        found[start : start + len(own)] = own
    return bytes(found)


def _set(value: Any, edit: Edit) -> Any:
    if not edit["path"]:
        return edit["value"]
    *way, last = edit["path"]
    place = value
    for key in way:
        place = place[key]
    if edit.get("drop"):
        del place[last]
    elif "rename" in edit:
        place[edit["rename"]] = place.pop(last)
    else:
        place[last] = edit["value"]
    return value


def random_edit(random: Random, directory: Path, *, links: bool = False) -> Edit:
    """One of a file that `directory` has; with `links` also links to what is outside."""
    files = sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file() and path.suffix != ".html")
    file = random.choice(files)
    path, chosen = directory / file, random.random()
    edit: Edit = {"file": file, "kind": "bytes", "at": [[random.random(), random.randrange(256)] for _ in range(random.randint(1, 8))]}
    if links and chosen < 0.05:
        edit = {"file": file, "kind": "link", "to": str(directory.parent / "outside" / "made")}
    elif chosen < 0.25:
        edit = _coarse(random, file)
    elif path.suffix == ".json":
        edit = _tree(random, file, "json", json.loads(path.read_bytes()))
    elif path.suffix == ".safetensors" and chosen < 0.85:
        with path.open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        edit = _tree(random, file, "header", header)
    elif path.suffix == ".gguf" and chosen < 0.9:
        size = min(path.stat().st_size, 6000)
        edit = {"file": file, "kind": "words", "at": [[random.randrange(size), random.choice(WORDS)] for _ in range(random.randint(1, 3))]}
    elif path.suffix in (".txt", ".jsonl"):
        edit = {"file": file, "kind": "line", "number": random.randrange(1000), "text": random.choice(LINES)}
    return edit


def _coarse(random: Random, file: str) -> Edit:
    kind = random.choice(["delete", "cut", "cut", "grow", "bytes", "nest"])
    more: dict[str, Any] = {
        "delete": {},
        "cut": {"to": random.choice([0.0, random.random()])},
        "grow": {"by": random.randrange(1, 100)},
        "bytes": {"at": [[random.random() ** 3, random.randrange(256)] for _ in range(random.randint(1, 8))]},
        "nest": {"depth": random.choice([1, 100, 200_000])},
    }[kind]
    return {"file": file, "kind": kind, **more}


def _tree(random: Random, file: str, kind: str, value: Any) -> Edit:
    """A change at a random place; of lists only the first few entries, so that long ones do not take all."""
    paths = list(_paths(value))
    path = random.choice(paths)
    edit: Edit = {"file": file, "kind": kind, "path": list(path)}
    old = value
    for key in path:
        old = old[key]
    chosen = random.random()
    if path and isinstance(path[-1], str) and chosen < 0.15:
        return {**edit, "drop": True} if chosen < 0.1 else {**edit, "rename": random.choice(["x", "", str(path[-1]) + "x"])}
    if isinstance(old, bool) and chosen < 0.5:
        return {**edit, "value": not old}
    if isinstance(old, int | float) and chosen < 0.5:
        return {**edit, "value": random.choice([old + 1, old - 1, -old, old * 2, old // 2, str(old), float(old), old * 10**6])}
    if isinstance(old, list) and chosen < 0.4:
        return {**edit, "value": random.choice([old[1:], old[::-1], old + old[:1], old * 2])}
    if isinstance(old, str) and chosen < 0.4:  # what another place has
        others = [other for other in _values(value) if isinstance(other, str)]
        return {**edit, "value": random.choice(others)}
    return {**edit, "value": random.choice(random.choice([SCALARS, STRINGS, NESTED]))}


def _paths(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    yield path
    entries = value.items() if isinstance(value, dict) else enumerate(value[:4]) if isinstance(value, list) else ()
    for key, inner in entries:
        yield from _paths(inner, (*path, key))


def _values(value: Any) -> Iterator[Any]:
    yield value
    for inner in value.values() if isinstance(value, dict) else value[:4] if isinstance(value, list) else ():
        yield from _values(inner)
