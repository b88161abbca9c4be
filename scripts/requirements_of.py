"""Print what an installed package needs, without some of it: `python scripts/requirements_of.py PACKAGE [--without NAME ...]`.

For a package installed with `--no-deps` because some of its requirements are large or do not exist for this machine. Local versions
(`==2.13.0+cpu`) lose their label, which is an index's own.
"""

import argparse
import re
from importlib.metadata import requires


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package")
    parser.add_argument("--without", nargs="*", default=[])
    arguments = parser.parse_args()
    for line in requires(arguments.package) or []:
        name = re.match(r"[\w.-]+", line)
        if "extra ==" not in line and name is not None and name[0] not in arguments.without:
            print(re.sub(r"\+\w+", "", line))


if __name__ == "__main__":
    main()
