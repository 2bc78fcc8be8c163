"""openm3: the open MiniMax-M3 system in Python, from the sparse attention operator upwards.

    model = openm3.load("m3-tiny")
    ids = model.tokenizer.chat([{"role": "user", "content": "Hello"}])
    text = model.tokenizer.decode(model.generate(ids, max_new_tokens=24))

Names resolve on first use, so `import openm3` is quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from openm3.config import ModelConfig as ModelConfig
    from openm3.errors import OpenM3Error as OpenM3Error
    from openm3.model.model import Model as Model
    from openm3.model.model import Trace as Trace
    from openm3.model.model import load as load
    from openm3.ops.dispatch import use as use
    from openm3.tokens.tokenizer import Tokenizer as Tokenizer

__version__ = "0.1.0"

__all__ = ["Model", "ModelConfig", "OpenM3Error", "Tokenizer", "Trace", "__version__", "load", "use"]

_HOMES = {
    "Model": "openm3.model.model",
    "ModelConfig": "openm3.config",
    "OpenM3Error": "openm3.errors",
    "Tokenizer": "openm3.tokens.tokenizer",
    "Trace": "openm3.model.model",
    "load": "openm3.model.model",
    "use": "openm3.ops.dispatch",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'openm3' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
