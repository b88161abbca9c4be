"""Runs docs/tutorial.md as printed, in an empty environment: `make newcomer MODEL=DIR`.

    python scripts/run_tutorial.py MODEL

The files of this repository are copied to a new directory. There, in one shell that has nothing of this one but PATH and the settings of
pip, every `sh` block of the page runs in order, and every Python block is first written to the file that the line before it names. In the
place of the Hub's model stands MODEL, a local directory (or `demo`), under the id that the page names, so commands are run to the letter. A
model without a chat template gets one that hands the question on as it is. The first command that fails ends it, with its exit code.
"""

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "tutorial.md"
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
KEPT = ("LANG", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "OMP_NUM_THREADS")
PLAIN = "{% for message in messages %}{{ message.content }}\n{% endfor %}"


def script(page: str) -> str:
    """The page as one shell script, which says each command, and when it began, before it runs."""
    lines = ["set -e"]
    for file, language, block in re.findall(r"(?:`([\w.]+\.py)`:\n\n)?^```(sh|python)\n(.*?)^```", page, re.DOTALL | re.MULTILINE):
        if language == "python":
            assert file, "a Python block of the tutorial names no file"
            lines.append(f"cat > {file} <<'END_OF_FILE'\n{block}END_OF_FILE")
        else:
            for line in block.splitlines():
                lines += [f"printf '\\n%(%T)T $ %s\\n' -1 {shlex.quote(line)}", line]
    return "\n".join(lines) + "\n"


def copy_repository(target: Path) -> None:
    """What is tracked, or new and not ignored."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, target / name)


def link_model(model: Path, target: Path) -> None:
    """The files of a model under the id that the page names."""
    target.mkdir(parents=True)
    for file in model.iterdir():
        (target / file.name).symlink_to(file)
    settings = target / "tokenizer_config.json"
    if not (target / "chat_template.jinja").exists() and "chat_template" not in settings.read_text(encoding="utf-8"):
        (target / "chat_template.jinja").write_text(PLAIN, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="A directory, or demo.")
    given = parser.parse_args().model
    model = ROOT / "src" / "roundel" / "demo" / "model" if given == "demo" else Path(given).resolve()
    if not (model / "config.json").is_file():
        parser.error(f"{model} is no model directory")
    with tempfile.TemporaryDirectory(prefix="roundel-newcomer-") as place:
        clone = Path(place) / "roundel"
        copy_repository(clone)
        link_model(model, clone / MODEL)
        environment = {name: value for name, value in os.environ.items() if name in KEPT or name.startswith("PIP_")}
        environment |= {"HOME": place, "PATH": f"{sys.base_prefix}/bin:{os.environ['PATH']}"}
        if (settings := Path.home() / ".config" / "pip" / "pip.conf").is_file():
            environment.setdefault("PIP_CONFIG_FILE", str(settings))
        done = subprocess.run(["bash", "-c", script(PAGE.read_text(encoding="utf-8"))], cwd=clone, env=environment, check=False)
    sys.exit(done.returncode)


if __name__ == "__main__":
    main()
