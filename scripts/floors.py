"""Prints the oldest versions that pyproject.toml allows of what Roundel needs, one requirement a line.

python scripts/floors.py [NAME==VERSION ...]      those of the command line take the place of the floor
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path


def main() -> None:
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    given = {line.partition("==")[0]: line for line in sys.argv[1:]}
    for line in project["dependencies"]:
        found = re.match(r"([\w-]+)(?:\[\w+\])?>=([\d.]+)", line)
        if found is None:
            raise SystemExit(f"pyproject.toml: {line} has no floor")
        print(given.get(found[1], f"{found[1]}=={found[2]}"))


if __name__ == "__main__":
    main()
