"""Transformers loads Roundel's own checkpoints after `import roundel`, which imports neither Transformers nor torch.

Where Transformers' registries are there already, `integration.quantizer.register` adds to them at once. Otherwise a finder on
`sys.meta_path` waits for the module that holds them; its own loader loads it, and then they are added to.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

__all__ = ["register_when_imported"]

REGISTRIES = "transformers.quantizers.auto"


class _Registering(Loader):
    """Loads as another loader does, and registers afterwards."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self.loader  # sources and resources are asked of it
        self.loader.exec_module(module)
        _register()


class _Finder(MetaPathFinder):
    """Finds the module of the registries alone."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != REGISTRIES or (spec := PathFinder.find_spec(fullname, path, target)) is None or spec.loader is None:
            return None
        spec.loader = _Registering(spec.loader)
        return spec


def register_when_imported() -> None:
    """Makes Transformers know the method `roundel` from the moment that it is there."""
    if REGISTRIES in sys.modules:
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _register() -> None:
    from roundel.integration.quantizer import register

    register()
