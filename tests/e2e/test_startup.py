"""Help, version and completion are there at once: what takes seconds to import is imported by what computes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import roundel
from roundel.commands import compare
from roundel.recipes import Recipe
from roundel.settings import ABLATION, Settings

HEAVY = ("torch", "transformers", "numba", "numpy", "scipy", "matplotlib", "safetensors")

RUN = """
import json, sys
from roundel.commands.app import main
sys.argv = ["roundel", *sys.argv[1:]]
try:
    main()
finally:
    print(json.dumps(sorted(sys.modules)), file=sys.stderr)
"""


def python(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A process of its own."""
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
        env={**os.environ, **environment},
    )


@pytest.mark.parametrize(
    ("arguments", "environment", "said"),
    [
        (["--help"], {}, "quantize"),
        (["--version"], {}, "roundel 0"),
        (["quantize", "--help"], {}, "--scheme"),
        (["compare", "--help"], {}, "--curvatures"),
        ([], {"_ROUNDEL_COMPLETE": "complete_bash", "COMP_WORDS": "roundel quant", "COMP_CWORD": "1"}, "quantize"),
        ([], {"_ROUNDEL_COMPLETE": "source_bash"}, "roundel"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_nothing_heavy_is_imported(arguments: list[str], environment: dict[str, str], said: str) -> None:
    done = python(RUN, *arguments, **environment)
    assert said in done.stdout
    modules = json.loads(done.stderr.splitlines()[-1])
    assert "roundel.commands.app" in modules
    assert [name for name in HEAVY if name in modules] == []


def test_the_defaults_are_those_of_recipes() -> None:
    assert Settings(**Recipe().__dict__) == Settings()
    assert ABLATION == compare.ABLATION


def test_names_are_imported_when_used() -> None:
    python(
        "import sys, roundel\n"
        "assert set(roundel.__all__) <= set(dir(roundel))\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)\n"
        "import roundel.evaluate.report\n"  # a package of the same name as the function
        "from roundel import evaluate\n"
        "from roundel import *\n"
        "assert callable(evaluate) and roundel.evaluate is evaluate\n"
        "assert roundel.Recipe is sys.modules['roundel.recipes'].Recipe"
    )
    with pytest.raises(AttributeError, match="nothing"):
        _ = roundel.nothing  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def native(model, quantize, tmp_path_factory) -> Path:
    """A checkpoint that Transformers alone cannot load."""
    return quantize(model(), tmp_path_factory.mktemp("native") / "out", scheme="int4-g32", format="native", curvature="identity").path


@pytest.mark.parametrize(
    "imports",
    [
        pytest.param(
            "import roundel; assert 'transformers' not in sys.modules; from transformers import AutoModelForCausalLM",
            marks=pytest.mark.slow,
        ),
        "from transformers import AutoModelForCausalLM; import roundel",
        pytest.param(
            "import transformers.quantizers.auto as auto; import roundel; assert 'roundel' in auto.AUTO_QUANTIZER_MAPPING",
            marks=pytest.mark.slow,
        ),
    ],
    ids=["roundel first", "transformers first", "registries first"],
)
def test_transformers_loads_native_checkpoints_in_any_order(imports: str, native: Path) -> None:
    python(
        f"import sys; {imports}\n"
        "from transformers import AutoModelForCausalLM\n"
        "from transformers.quantizers import auto\n"
        "assert type(auto.__loader__).__name__ == type(auto.__spec__.loader).__name__ == 'SourceFileLoader'\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "assert type(model.model.layers[0].mlp.up_proj).__name__ == 'QuantizedLinear'\n",
        str(native),
    )
