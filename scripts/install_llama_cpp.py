"""llama.cpp in a directory: its libraries as compiled for an npm package, and three of its tools, compiled here against those.

    python scripts/install_llama_cpp.py DIRECTORY

`@node-llama-cpp/linux-x64` has libllama and libggml, with a CPU library for each set of instructions, of which the best is taken when it is
loaded. `node-llama-cpp` has llama.cpp's source of the same release as a git bundle, and so the headers, and the tools that come with no
package: `llama-imatrix`, `llama-quantize` and `llama-perplexity` are a source file each (half a minute on two cores). Both packages are
pinned by version and by npm's SHA-512 of the archive. llama-cpp-python, installed without a llama.cpp, finds these libraries by
`LLAMA_CPP_LIB_PATH=DIRECTORY`. For tests and benchmarks; the package itself uses none of it.

Needs npm, git, a C++17 compiler, Linux on x86-64, and some 200 MB of temporary space.
"""

from __future__ import annotations

import base64
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

VERSION = "3.22.1"
"""Of both packages."""
LLAMA_CPP = "0.5.0"
"""The release of llama.cpp in them."""
PACKAGES = {
    "@node-llama-cpp/linux-x64": "5uCCDNqWCNfaAm8aR/Uzxbo4HBpKgNF91kCHPepKhgMgV2OAmatoefbOlMihsqCiH2Od35E/eUHQCFbfRBJuOg==",
    "node-llama-cpp": "bltIipuWmc123H7tMIgDGKSsSrhmhlQYeVUC48XTjVW7XGJJiJJyCdlTMzQ/LiWoPkGDpcL4FviDpgw7qfTiDw==",
}
"""SHA-512 of their archives."""
TOOLS = {
    "llama-imatrix": ["tools/imatrix/imatrix.cpp"],
    "llama-quantize": ["tools/quantize/quantize.cpp", "tools/quantize/main.cpp"],
    "llama-perplexity": ["tools/perplexity/perplexity.cpp", "tools/perplexity/flushing_main.cpp"],
}
FLUSHING_MAIN = """#include "log.h"

int llama_perplexity(int argc, char ** argv);

int main(int argc, char ** argv) {
    const int status = llama_perplexity(argc, argv);
    common_log_flush(common_log_main());
    return status;
}
"""
"""In place of the tool's own, which may end before its last lines, the results, are printed."""
INCLUDES = ["include", "ggml/include", "common", "vendor"]
LIBRARIES = ["libllama-common.so", f"libllama.v{LLAMA_CPP}.so", f"libggml.v{LLAMA_CPP}.so", "libggml-base.so"]

LATER = [f"llama_batch_ext_{each}" for each in ["init", "free", "clear", "add", "add_token", "add_embd", "add_seq"]]
LATER += [f"llama_batch_ext_set_{each}" for each in ["embd_token", "embd_state", "output_embd", "output_logits", "pos"]]
LATER += ["llama_process", "llama_get_causal_attn"]
"""What llama-cpp-python 0.3.36 looks for when it is imported, this release lacks, and its `Llama` does not use."""


def unpacked(package: str, digest: str, folder: Path) -> Path:
    """The directory of a package, fetched by npm."""
    folder.mkdir()
    line = ["npm", "pack", "--silent", "--json", "--pack-destination", str(folder), f"{package}@{VERSION}"]
    subprocess.run(line, check=True, stdout=subprocess.DEVNULL, cwd=folder)
    (archive,) = folder.glob("*.tgz")
    found = base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()
    if found != digest:
        raise SystemExit(f"Error: {package} {VERSION}: the archive's SHA-512 is {found}, not {digest}")
    with tarfile.open(archive) as content:
        content.extractall(folder, filter="data")
    return folder / "package"


def install(directory: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        binary, source = (
            unpacked(package, digest, Path(scratch) / str(number)) for number, (package, digest) in enumerate(PACKAGES.items())
        )
        directory.mkdir(parents=True)
        for library in (binary / "bins" / "linux-x64").glob("*.so"):
            shutil.copy(library, directory)
        tree = Path(scratch) / "source"
        detached = ["git", "-c", "advice.detachedHead=false", "clone", "--quiet", str(source / "llama" / "gitRelease.bundle"), str(tree)]
        subprocess.run(detached, check=True)
        (tree / "tools" / "perplexity" / "flushing_main.cpp").write_text(FLUSHING_MAIN, encoding="utf-8")
        for tool, files in TOOLS.items():
            line = [os.environ.get("CXX", "c++"), "-std=c++17", "-O1", *(f"-I{each}" for each in [*INCLUDES, str(Path(files[0]).parent)])]
            line += [*files, "-o", str(directory / tool), f"-L{directory}", *(f"-l:{each}" for each in LIBRARIES)]
            subprocess.run([*line, "-Wl,-rpath,$ORIGIN", "-pthread"], check=True, cwd=tree)
    _named_for_llama_cpp_python(directory)


def _named_for_llama_cpp_python(directory: Path) -> None:
    """`libllama.so` and `libggml.so`: the former the library, and `LATER`, which end the program."""
    (directory / "libggml.so").symlink_to(LIBRARIES[2])
    code = "#include <stdlib.h>\n" + "".join(f"void {name}(void) {{ abort(); }}\n" for name in LATER)
    line = [os.environ.get("CC", "cc"), "-shared", "-fPIC", "-x", "c", "-", "-o", "libllama.so", "-L.", "-Wl,--no-as-needed"]
    subprocess.run([*line, f"-l:{LIBRARIES[1]}", "-Wl,-rpath,$ORIGIN"], check=True, cwd=directory, input=code, text=True)


if __name__ == "__main__":
    target = Path(sys.argv[1]).resolve()
    if target.exists():
        if not (target / LIBRARIES[-1]).is_file():
            raise SystemExit(f"Error: {target} is there and holds no llama.cpp: name a new directory")
        shutil.rmtree(target)
    install(target)
