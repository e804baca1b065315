"""Makes transformers' Auto classes know `model_type="longllama"`, without loading transformers for it."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

_AUTO_CONFIGS = "transformers.models.auto.configuration_auto"
# Llama's configuration, which ours builds on, can only be imported once this module is whole.
_AUTO_MODELS = "transformers.models.auto.modeling_auto"
_LONGLLAMA_CONFIG = "llamory.longllama.configuration"


def register() -> None:
    """Register now if transformers has loaded its tables of models, else as soon as it does."""
    if _AUTO_CONFIGS in sys.modules:
        _register()
    elif not any(isinstance(finder, _RegisteringFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _RegisteringFinder())


def _register() -> None:
    # Our module registers itself at its end; if it is being imported right now, it gets there by itself.
    if _LONGLLAMA_CONFIG not in sys.modules:
        importlib.import_module(_LONGLLAMA_CONFIG)


class _RegisteringFinder(MetaPathFinder):
    """Finds transformers' tables as everybody else does, and lets their loader register afterwards."""

    def __init__(self) -> None:
        self._searching = False

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,  # noqa: ARG002
        target: ModuleType | None = None,  # noqa: ARG002
    ) -> ModuleSpec | None:
        if fullname not in (_AUTO_CONFIGS, _AUTO_MODELS) or self._searching:
            return None
        self._searching = True  # the search below comes here again and must go on to the real finders
        try:
            spec = find_spec(fullname)
        finally:
            self._searching = False
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisteringLoader(spec.loader)
        return spec


class _RegisteringLoader(Loader):
    """Loads as the given loader does, then registers."""

    def __init__(self, loader: Loader):
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        # The table of models loads that of configurations on its way, and is the one to wait for then.
        if module.__name__ == _AUTO_MODELS or _AUTO_MODELS not in sys.modules:
            _register()
