"""Makes `import glmtune` enough for transformers' Auto classes to open our own models (ChatGLM-6B, Baichuan-13B), at no cost before
they are asked for: the names are put into transformers' tables when it loads them, the classes are imported when they are looked up."""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from typing import Any

OURS = {  # model_type: (file, config class, model class)
    "chatglm1": ("chatglm1", "ChatGLM1Config", "ChatGLM1ForCausalLM"),
    "llama_alibi": ("alibi", "AlibiConfig", "AlibiForCausalLM"),
}
TABLES = {  # transformers' tables of names, and which of a model's classes stands in each
    "transformers.models.auto.configuration_auto": ("CONFIG_MAPPING_NAMES", 1),
    "transformers.models.auto.modeling_auto": ("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", 2),
}


class _Stand(types.ModuleType):
    """Stands where transformers looks for a model's code; imports ours at the first question."""

    def __init__(self, name: str, file: str):
        super().__init__(name)
        self._file = file

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(importlib.import_module(f".families.{self._file}", __package__), name)


class _Watch(importlib.abc.MetaPathFinder):
    """Finds nothing itself: lets the other finders find a table, and adds our names when it has been loaded."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if fullname not in TABLES:
            return None
        sys.meta_path.remove(self)
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            sys.meta_path.insert(0, self)
        if spec is None or spec.loader is None:
            return spec
        load = spec.loader.exec_module

        def load_and_add(module: Any) -> None:
            load(module)
            _add(module)

        spec.loader.exec_module = load_and_add  # type: ignore[method-assign]
        return spec


def _add(table: Any) -> None:
    name, which = TABLES[table.__name__]
    for model_type, ours in OURS.items():
        getattr(table, name)[model_type] = ours[which]


def register() -> None:
    """Our classes through transformers' own functions, at once."""
    from transformers import AutoConfig, AutoModelForCausalLM

    for model_type, (file, config, model) in OURS.items():
        found = importlib.import_module(f".families.{file}", __package__)
        AutoConfig.register(model_type, getattr(found, config), exist_ok=True)
        AutoModelForCausalLM.register(getattr(found, config), getattr(found, model), exist_ok=True)


def watch() -> None:
    """To be called once, when glmtune is imported."""
    for model_type, (file, _, _) in OURS.items():
        sys.modules.setdefault(f"transformers.models.{model_type}", _Stand(f"transformers.models.{model_type}", file))
    if any(table in sys.modules for table in TABLES):  # transformers came first: its tables are made, only it can add to them
        register()
    else:
        sys.meta_path.insert(0, _Watch())
