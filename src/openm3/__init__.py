"""openm3: the open MiniMax-M3 system in Python, from the sparse attention operator upwards.

    model = openm3.load("m3-tiny")
    ids = model.tokenizer.chat([{"role": "user", "content": "Hello"}])
    text = model.tokenizer.decode(model.generate(ids, max_new_tokens=24))

    engine = openm3.Engine("m3-tiny")
    completions = engine.generate([ids, other_ids], openm3.SamplingParams(max_tokens=64))

Names resolve on first use, so `import openm3` is quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from openm3.config import EngineConfig as EngineConfig
    from openm3.config import ModelConfig as ModelConfig
    from openm3.engine.asynchronous import AsyncEngine as AsyncEngine
    from openm3.engine.engine import Engine as Engine
    from openm3.engine.request import Completion as Completion
    from openm3.engine.request import Delta as Delta
    from openm3.engine.request import SamplingParams as SamplingParams
    from openm3.errors import OpenM3Error as OpenM3Error
    from openm3.model.model import Model as Model
    from openm3.model.model import Trace as Trace
    from openm3.model.model import load as load
    from openm3.ops.dispatch import use as use
    from openm3.tokens.media import Media as Media
    from openm3.tokens.pictures import ImageOptions as ImageOptions
    from openm3.tokens.pictures import read_image as read_image
    from openm3.tokens.sources import MediaLimits as MediaLimits
    from openm3.tokens.tokenizer import Tokenizer as Tokenizer
    from openm3.tokens.video import VideoOptions as VideoOptions
    from openm3.tokens.video import read_video as read_video
    from openm3.tokens.video import video_from_frames as video_from_frames

__version__ = "0.1.0"

__all__ = [
    "AsyncEngine",
    "Completion",
    "Delta",
    "Engine",
    "EngineConfig",
    "ImageOptions",
    "Media",
    "MediaLimits",
    "Model",
    "ModelConfig",
    "OpenM3Error",
    "SamplingParams",
    "Tokenizer",
    "Trace",
    "VideoOptions",
    "__version__",
    "load",
    "read_image",
    "read_video",
    "use",
    "video_from_frames",
]

_HOMES = {
    "AsyncEngine": "openm3.engine.asynchronous",
    "Completion": "openm3.engine.request",
    "Delta": "openm3.engine.request",
    "Engine": "openm3.engine.engine",
    "EngineConfig": "openm3.config",
    "ImageOptions": "openm3.tokens.pictures",
    "Media": "openm3.tokens.media",
    "MediaLimits": "openm3.tokens.sources",
    "Model": "openm3.model.model",
    "ModelConfig": "openm3.config",
    "OpenM3Error": "openm3.errors",
    "SamplingParams": "openm3.engine.request",
    "Tokenizer": "openm3.tokens.tokenizer",
    "Trace": "openm3.model.model",
    "VideoOptions": "openm3.tokens.video",
    "load": "openm3.model.model",
    "read_image": "openm3.tokens.pictures",
    "read_video": "openm3.tokens.video",
    "use": "openm3.ops.dispatch",
    "video_from_frames": "openm3.tokens.video",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'openm3' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
