"""Work that waits until another module is imported, which may never happen."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from importlib.abc import MetaPathFinder
from types import ModuleType
from typing import Any


def when_imported(name: str, action: Callable[[ModuleType], None]) -> None:
    """Call ``action(module)`` right after ``name`` has been imported; now, if it has been.

    For a module that is slow to import and that most programs never need. An action must tolerate
    being called again: the module may be reloaded.
    """
    if name in sys.modules:
        action(import_module(name))  # perhaps another thread is still importing it: this waits
        return
    # A reload of this package comes here again. By name: the class is a new one then.
    sys.meta_path[:] = [f for f in sys.meta_path if getattr(f, "awaits", None) != (__name__, name)]
    sys.meta_path.insert(0, _Watcher(name, action))


class _Watcher(MetaPathFinder):
    """Finds the module as the other finders do, with a loader that calls the action."""

    def __init__(self, name: str, action: Callable[[ModuleType], None]):
        self.awaits, self.action = (__name__, name), action

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != self.awaits[1]:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        found = (finder.find_spec(name, path, target) for finder in others)
        if spec := next(filter(None, found), None):
            loader: Any = spec.loader
            execute = loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                if module.__name__ == name:  # a loader may serve others, too
                    self.action(module)

            loader.exec_module = exec_module
        return spec
