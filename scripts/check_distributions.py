"""Builds wheel and sdist, and installs and runs each in an environment of its own, away from this checkout.

    python scripts/check_distributions.py [--constraint FILE]

Checked: both have the version of pyproject.toml, `py.typed`, the licence and the embedded model, and the wheel nothing but the package; the
command says its version and quantizes the embedded model, and what it has written is read again.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
SHORT = ["--effort", "quick", "--curvature", "kfac", "--sequences", "16", "--seq-len", "64", "--eval-sequences", "4"]


def run(*line: str | Path, directory: Path) -> str:
    """What a command says on standard output; its errors end this."""
    return subprocess.run([str(part) for part in line], cwd=directory, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def expect(holds: bool, what: str) -> None:
    """Ends this where something does not hold."""
    if not holds:
        raise SystemExit(f"not so: {what}")


def check_contents(wheel: Path, sdist: Path) -> None:
    """What is in the files."""
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    with tarfile.open(sdist) as archive:
        sources = {name.partition("/")[2] for name in archive.getnames()}
    for needed in ("roundel/py.typed", "roundel/demo/model/model.safetensors", "roundel/commands/app.py"):
        expect(needed in names, f"{needed} is in the wheel")
        expect(f"src/{needed}" in sources, f"{needed} is in the sdist")
    expect(any(name.endswith("licenses/LICENSE") for name in names) and "LICENSE" in sources, "both have the licence")
    expect(all(name.startswith(("roundel/", "roundel-")) for name in names), "the wheel has nothing but the package")


def check_installed(file: Path, version: str, scratch: Path, constraint: Path | None) -> None:
    """In an empty environment."""
    home = scratch / file.name
    venv.create(home / "venv", with_pip=True)
    python, roundel = home / "venv" / "bin" / "python", home / "venv" / "bin" / "roundel"
    limits = [] if constraint is None else ["--constraint", constraint.absolute()]
    run(python, "-m", "pip", "install", "--quiet", "--no-compile", "--disable-pip-version-check", *limits, file, directory=home)
    expect(run(roundel, "--version", directory=home) == f"roundel {version}", f"{file.name} says version {version}")
    where = run(python, "-c", "import roundel; print(roundel.__file__, roundel.__version__)", directory=home)
    expect(where.startswith(str(home)) and where.endswith(f" {version}"), f"{file.name} is what is imported, in version {version}")
    run(roundel, "quantize", "demo", "-o", "out", "--calibration", "stdlib", *SHORT, "--quiet", directory=home)
    run(roundel, "export", "out", "--to", "native", "-o", "exported", "--quiet", directory=home)
    expect((home / "exported" / "model.safetensors").is_file(), "what was written is read again")
    print(f"{file.name}: installed, says {version}, quantizes", flush=True)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--constraint", type=Path)
    given = parser.parse_args()
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        venv.create(scratch / "build", with_pip=True)
        python = scratch / "build" / "bin" / "python"
        run(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "build", directory=scratch)
        run(python, "-m", "build", "--outdir", scratch / "dist", ROOT, directory=scratch)
        (wheel,), (sdist,) = (scratch / "dist").glob("*.whl"), (scratch / "dist").glob("*.tar.gz")
        expect(f"-{version}-" in wheel.name and sdist.name == f"roundel-{version}.tar.gz", f"both are of version {version}")
        check_contents(wheel, sdist)
        for file in (wheel, sdist):
            check_installed(file, version, scratch, given.constraint)


if __name__ == "__main__":
    sys.exit(main())
