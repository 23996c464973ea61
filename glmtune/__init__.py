"""glmtune: fine-tune, evaluate and use ChatGLM and other chat models. Importing this is light; heavy modules load on first use."""

import logging
import os
from typing import TYPE_CHECKING, Any

from .autoload import watch

# Threads that wait by spinning starve each other when the machine is shared: the same run took 24 s asleep and 317 s spinning (LOG.md).
# OpenMP reads this when torch is loaded, so it must be set before.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# oneDNN keeps what it made for each shape of a product, 1024 of them: micro-batches differ in length, and a run grew by half a gigabyte (LOG.md).
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
# transformers may load bitsandbytes behind our back; it then tells everybody about a faster kernel of Intel's.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

__version__ = "0.3.0"
__all__ = ["Loaded", "Report", "Run", "UserError", "load", "load_run", "train"]

_HOME = {
    "load": "loaded",
    "Loaded": "loaded",
    "train": "training",
    "Report": "training",
    "load_run": "run",
    "Run": "run",
    "UserError": "errors",
}

watch()

if TYPE_CHECKING:
    from .errors import UserError
    from .loaded import Loaded, load
    from .run import Run, load_run
    from .training import Report, train


def __getattr__(name: str) -> Any:
    import importlib

    if name in ("families", "methods"):
        return importlib.import_module(f".{name}", __name__)
    if name not in _HOME:
        raise AttributeError(f"module 'glmtune' has no attribute '{name}'")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
