"""infra/sizes.py as a module; by its path, since pytest knows tests/infra as `infra`."""

from __future__ import annotations

import importlib.util
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

AT = Path(__file__).parents[2] / "infra" / "sizes.py"


@cache
def sizes() -> ModuleType:
    """The module, loaded once."""
    spec = importlib.util.spec_from_file_location("sizes", AT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["sizes"] = module  # dataclasses ask for it
    spec.loader.exec_module(module)
    return module
