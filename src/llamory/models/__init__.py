"""Base models: find, load and adapt a checkpoint; register LongLLaMA with transformers' Auto classes."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

_AUTO_CONFIGS = "transformers.models.auto.configuration_auto"
_AUTO_MODELS = "transformers.models.auto.modeling_auto"
_LONGLLAMA_CONFIG = "llamory.longllama.configuration"  # registers its classes when it is imported


def register_longllama() -> None:
    """Make transformers' Auto classes know `model_type="longllama"`, without importing transformers for it."""
    if _AUTO_CONFIGS in sys.modules:
        _import_longllama()
    elif not any(isinstance(finder, _AutoClassFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AutoClassFinder())


def _import_longllama() -> None:
    # A module that is being imported right now registers at its end.
    if _LONGLLAMA_CONFIG not in sys.modules:
        importlib.import_module(_LONGLLAMA_CONFIG)


class _AutoClassFinder(MetaPathFinder):
    """Import hook that registers LongLLaMA after the modules of the Auto classes are executed."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in (_AUTO_CONFIGS, _AUTO_MODELS):
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            # The table of models is complete last, and only then can Llama's configuration be imported.
            if fullname == _AUTO_MODELS or _AUTO_MODELS not in sys.modules:
                _import_longllama()

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
