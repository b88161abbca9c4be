"""All measurements of docs/results.md, from nothing: `make studies MODELS=DIR TEXT=DIR`.

    python studies/run_all.py [--models DIR] [--text DIR] [--tasks DIR] [--only NAME ...] [--work DIR]

Runs the commands below in `--work`, where `MODELS`, `TEXT` and `TASKS` are the given directories (stories260K, tinystories.txt and the
tasks' documents are in them; what needs one that is not given is left out), copies what they have written to `benchmarks/results/`, with
the commit in `benchmarks/results/studies.json`, draws the figures into `docs/figures/` (`figures.py`) and writes the tables (`tables.py`).
Every command goes on where an earlier run of it has stopped. All of it takes days on two cores, most of them for trellises and AutoRound.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import figures
import tables

from roundel.commands.compare import ABLATION
from roundel.stages.report import versions
from roundel.store import write_json

ROOT = Path(__file__).resolve().parent.parent
RESULTS, FIGURES = ROOT / "benchmarks" / "results", ROOT / "docs" / "figures"

STORIES = "MODELS/stories260K --calibration TEXT/tinystories.txt --seq-len 256 --eval-sequences 128"
DEMO = "demo --calibration stdlib --eval-data stdlib-heldout --seq-len 256 --eval-sequences 64"
INTEGERS = {32: "int2-g32,int3-g32,int4-g32", 64: "int2-g64,int3-g64,int4-g64"}
SMALL_TRELLISES = {bits: f"trellis2-s{bits},trellis3-s{bits},trellis4-s{bits}" for bits in (8, 10)}
"""By state bits."""

ESTIMATORS = "auto,sketch-b,sketch-a,fastkron"
ROTATABLE = ",".join(label for label in ABLATION if label != "guided")
"""`guided` has factors of their own for groups of rows."""


def schemes(group: int, blocks: str) -> str:
    integers = ",".join(f"int{bits}-g{group}" for bits in (2, 3, 4, 8))
    return f"trellis2,trellis3,trellis4,lattice2,{integers},int2-g{group}-asym,int3-g{group}-asym,int4-g{group}-asym,{blocks}"


@dataclass(frozen=True, kw_only=True)
class Study:
    """One command, and which of its files become what."""

    command: str
    files: dict[str, str]
    """From the working directory to the repository."""


def comparison(name: str, model: str, rest: str, *, figures: dict[str, str] | None = None) -> tuple[str, Study]:
    """`roundel compare`, with the plots that the page shows."""
    files = {f"{name}/compare.json": f"benchmarks/results/{name}.json"}
    files |= {f"{name}/{plot}": f"docs/figures/{figure}" for plot, figure in (figures or {}).items()}
    return name, Study(command=f"roundel compare {model} {rest} -o {name} --resume", files=files)


def script(name: str, command: str, *, file: str = "") -> tuple[str, Study]:
    """A script that writes one JSON file."""
    written = file or f"{name}.json"
    return name, Study(command=f"{command} -o {written}", files={written: f"benchmarks/results/{written}"})


STUDIES = dict(
    [
        comparison(
            "curvatures-stories260K",
            STORIES,
            f"--sequences 512 --seeds 3 --schemes {INTEGERS[32]}",
            figures={"kl.png": "curvatures-stories260K.png", "ranking.png": "ranking-stories260K.png"},
        ),
        comparison(
            "curvatures-demo",
            DEMO,
            f"--sequences 128 --seeds 3 --schemes {INTEGERS[64]}",
            figures={"kl.png": "curvatures-demo.png", "ranking.png": "ranking-demo.png"},
        ),
        comparison(
            "curvatures-demo-mixture",
            f"MODELS/demo-mixture {DEMO.removeprefix('demo ')}",
            f"--sequences 128 --seeds 3 --curvatures auto,gptq,nearest --schemes {INTEGERS[64]}",
        ),
        comparison(
            "trellises-stories260K",
            STORIES,
            f"--sequences 128 --seeds 3 --curvatures {ROTATABLE} --schemes {SMALL_TRELLISES[10]}",
            figures={"kl.png": "trellises-stories260K.png"},
        ),
        comparison(
            "trellises-demo",
            DEMO,
            f"--sequences 128 --seeds 3 --curvatures {ROTATABLE} --schemes {SMALL_TRELLISES[8]}",
            figures={"kl.png": "trellises-demo.png"},
        ),
        comparison(
            "sequences-stories260K",
            STORIES,
            f"--sequences 32,64,128,256,512 --seeds 3 --curvatures {ESTIMATORS} --schemes int3-g32,int4-g32",
            figures={"sequences.png": "sequences-stories260K.png"},
        ),
        comparison("sequences-demo", DEMO, f"--sequences 16,32,64,128 --seeds 1 --curvatures {ESTIMATORS} --schemes int3-g64,int4-g64"),
        comparison(
            "schemes-stories260K",
            STORIES,
            f"--sequences 256 --seeds 3 --curvatures pilot --schemes {schemes(32, 'mxfp4,nvfp4,fp8,q4_0,iq4_nl,q8_0')}",
        ),
        comparison(
            "schemes-demo",
            DEMO,
            "--sequences 128 --seeds 3 --curvatures pilot --schemes "
            + schemes(64, "mxfp4,nvfp4,fp8,q2_k,q3_k,q4_k,q5_k,q6_k,q4_0,iq4_nl,q8_0"),
            figures={"rates.png": "rates-demo.png"},
        ),
        comparison(
            "schemes-rotated-stories260K",
            STORIES,
            "--sequences 256 --seeds 3 --curvatures pilot --rotate online --schemes int2-tensor,int3-tensor,int4-tensor",
        ),
        comparison(
            "schemes-rotated-demo",
            DEMO,
            "--sequences 128 --seeds 3 --curvatures pilot --rotate online --schemes int2-tensor,int3-tensor,int4-tensor",
        ),
        script(
            "allocation-stories260K",
            f"python studies/allocation.py {STORIES} --sequences 256 --scheme int3-g32",
        ),
        script("allocation-demo", f"python studies/allocation.py {DEMO} --sequences 128 --scheme int3-g64"),
        script(
            "target-size-demo",
            "python studies/target_size.py demo --calibration stdlib --eval-data stdlib-heldout --seq-len 128 --eval-sequences 64 "
            "--sequences 32 --types q2_k,q3_k,iq4_xs",
        ),
        script(
            "fused-demo", f"python studies/fused_rotation.py {DEMO} --sequences 128 --schemes int4-g128,int3-g128,int2-g64 --seeds 0 1 2"
        ),
        script(
            "tuning-stories260K",
            f"python studies/tuning.py {STORIES} --sequences 512 --schemes {INTEGERS[32]} --figure docs/figures",
        ),
        script("tuning-demo", f"python studies/tuning.py {DEMO} --sequences 512 --schemes {INTEGERS[64]} --figure docs/figures"),
        script("peers-stories260K", f"python benchmarks/peers/run.py {STORIES} --group 32"),
        script("peers-demo", f"python benchmarks/peers/run.py {DEMO} --group 64"),
        script("tasks-stories260K", f"python studies/tasks.py {STORIES} --task-data TASKS --sequences 512 --schemes {INTEGERS[32]}"),
        script("tasks-demo", f"python studies/tasks.py {DEMO} --task-data TASKS --sequences 512 --schemes {INTEGERS[64]}"),
        script("distortion", "python benchmarks/viterbi.py", file="distortion.json"),
        script("collection", "python benchmarks/collection.py"),
    ]
)


def run(study: Study, work: Path) -> float:
    """Seconds of one study, whose files are then in the repository."""
    words = shlex.split(study.command.replace("docs/figures", str(FIGURES)))
    if words[0] == "roundel":
        words = [sys.executable, "-m", *words]
    else:
        words = [sys.executable, str(ROOT / words[1]), *words[2:]]
        if "viterbi" in words[1]:
            words = [*words[:-2], "--distortion", words[-1]]
    began = time.monotonic()
    subprocess.run(words, cwd=work, check=True)
    for source, target in study.files.items():
        if (work / source).exists():
            shutil.copyfile(work / source, ROOT / target)
    return time.monotonic() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--tasks", type=Path)
    parser.add_argument("--only", nargs="*", choices=STUDIES, default=list(STUDIES))
    parser.add_argument("--work", type=Path, default=ROOT / "out-studies")
    given = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    given.work.mkdir(exist_ok=True)
    places = {"MODELS": given.models, "TEXT": given.text, "TASKS": given.tasks}
    for name, place in places.items():
        if place is not None and not (given.work / name).exists():
            (given.work / name).symlink_to(place.resolve())
    log = RESULTS / "studies.json"
    done = json.loads(log.read_text(encoding="utf-8")) if log.exists() else {}
    for name in given.only:
        study = STUDIES[name]
        if missing := [f"--{kind.lower()}" for kind, place in places.items() if kind in study.command and place is None]:
            print(f"{name}: needs {' and '.join(missing)}", flush=True)
            continue
        print(f"{name}: {study.command}", flush=True)
        seconds = run(study, given.work)
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
        done[name] = {"command": study.command, "commit": commit, "versions": versions(), "seconds": round(seconds)}
        write_json(log, done)
    tables.main([])
    figures.draw(figures.FIGURES)


if __name__ == "__main__":
    main()
