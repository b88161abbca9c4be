"""A job needs no network, and writes in the places that it is given and in caches: watched by an audit hook in a process of its own.

Where the system allows it the process has no network interface at all.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

WATCHED = """
import json, os, sys

found = {"written": [], "reached": []}
PATHS = {"os.mkdir": 1, "os.rename": 2, "os.remove": 1, "os.rmdir": 1, "os.link": 2, "os.symlink": 2, "os.chmod": 1, "os.truncate": 1}

def watch(event, given):
    if event == "open":
        path, mode, flags = given
        writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC) if isinstance(flags, int) else 0
        if writes and isinstance(path, (str, bytes, os.PathLike)):
            found["written"].append(os.path.abspath(os.fsdecode(path)))
    elif event in PATHS:
        found["written"] += [os.path.abspath(os.fsdecode(p)) for p in given[: PATHS[event]] if isinstance(p, (str, bytes, os.PathLike))]
    elif event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        found["reached"].append(repr(given))

sys.addaudithook(watch)
import torch
import roundel

torch.set_num_threads(1)
model, text, place = sys.argv[1:]
short = {"sequences": 4, "seq_len": 16, "eval_sequences": 2, "calibration": text}
roundel.collect_factors(model, output=f"{place}/factors", curvature="kfac", **short)
given = {"scheme": "int4-g32", "sweeps": 1, "natural_places": 0, **short}
roundel.quantize(model, output=f"{place}/out", work=f"{place}/work", curvature="kfac", **given)
roundel.export(f"{place}/out", output=f"{place}/exported", to="native")
roundel.evaluate(f"{place}/out", reference=model, data=text, sequences=2, seq_len=16, cache=f"{place}/cache")
refined = {"sweeps": 1, "natural_places": 0, "curvature": "kfac", **short}
roundel.refine(f"{place}/out", reference=model, output=f"{place}/refined", work=f"{place}/work-2", **refined)
print(json.dumps(found))
"""


@pytest.fixture
def alone() -> list[str]:
    """The beginning of a command line that has no network, where that is possible."""
    try:
        cut = subprocess.run(["unshare", "-rn", "true"], check=False, capture_output=True).returncode == 0
    except OSError:
        cut = False
    return ["unshare", "-rn"] if cut else []


def listed(directories: Iterable[Path]) -> set[Path]:
    return {path for directory in directories for path in directory.iterdir()}


def is_cache(path: Path) -> bool:
    """The user's, numba's beside the source, torch's, and devices."""
    own = (Path.home() / ".cache", Path.home() / ".config" / "matplotlib", Path("/dev"))
    return any(path.is_relative_to(each) for each in own) or any(
        part == "__pycache__" or part.startswith("torchinductor_") for part in path.parts
    )


def test_a_job_needs_no_network_and_writes_where_it_may(alone, model, text, tmp_path: Path) -> None:
    place, scratch = tmp_path / "place", tmp_path / "scratch"
    place.mkdir()
    scratch.mkdir()
    around = (model(), text.parent, Path.home(), Path.cwd())
    before = listed(around)
    hub = {"HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"}  # nothing says that there is no network
    environment = {name: value for name, value in os.environ.items() if name not in hub}
    environment |= {"TMPDIR": str(scratch), "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    line = [*alone, sys.executable, "-c", WATCHED, str(model()), str(text), str(place)]
    ended = subprocess.run(line, check=False, capture_output=True, text=True, env=environment)
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout)
    assert found["reached"] == []
    written = {Path(path) for path in found["written"]}
    assert place / "out" in written  # the hook sees what is done
    outside = {path for path in written if not any(path.is_relative_to(own) for own in (place, scratch)) and not is_cache(path)}
    assert outside == set()
    assert {path.name for path in place.iterdir()} == {"factors", "out", "work", "exported", "cache", "refined", "work-2"}
    assert list(scratch.iterdir()) == []
    assert listed(around) == before  # also by libraries that no hook sees
