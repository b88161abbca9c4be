"""Roundel shrinks a language model to 2-8 bits per weight while keeping its output distribution.

Its names are imported when they are first used, because torch and Transformers take seconds.
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from roundel.errors import RoundelError
from roundel.registration import register_when_imported

if TYPE_CHECKING:
    from roundel.commands.evaluate import Evaluation, evaluate, evaluate_several
    from roundel.commands.upload import upload
    from roundel.recipes import Recipe
    from roundel.stages.collecting import collect_factors
    from roundel.stages.export import export, export_imatrix
    from roundel.stages.quantize import quantize
    from roundel.stages.refine import refine
    from roundel.stages.report import Quantized
    from roundel.stages.tune import tune

    __version__: str

__all__ = [
    "Evaluation",
    "Quantized",
    "Recipe",
    "RoundelError",
    "__version__",
    "collect_factors",
    "evaluate",
    "evaluate_several",
    "export",
    "export_imatrix",
    "quantize",
    "refine",
    "tune",
    "upload",
]

_HOMES = {
    "Evaluation": "roundel.commands.evaluate",
    "Quantized": "roundel.stages.report",
    "Recipe": "roundel.recipes",
    "collect_factors": "roundel.stages.collecting",
    "evaluate": "roundel.commands.evaluate",
    "evaluate_several": "roundel.commands.evaluate",
    "export": "roundel.stages.export",
    "export_imatrix": "roundel.stages.export",
    "quantize": "roundel.stages.quantize",
    "refine": "roundel.stages.refine",
    "tune": "roundel.stages.tune",
    "upload": "roundel.commands.upload",
}
"""Where a name comes from."""


class _Package(ModuleType):
    """Of which `evaluate` is the function: Python would set it to the package of that name as soon as a module in there is imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        value: Any = version("roundel")
    elif name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register_when_imported()  # Transformers then loads Roundel's own checkpoints
