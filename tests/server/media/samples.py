"""Small pictures, and requests' names for them."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

from PIL import Image

from openm3.server.media.parts import Wanted, media_part

SEEING = Path(__file__).parents[2] / "golden" / "m3-random-s0" / "model"
"""A checkpoint of random weights with a vision tower."""

SIDE = 112
TOKENS = 16
"""Of a picture of that side, which is not resized."""


def picture(colour: str = "red", side: int = SIDE, form: str = "PNG") -> bytes:
    target = io.BytesIO()
    Image.new("RGB", (side, side), colour).save(target, form)
    return target.getvalue()


def uri(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def shown(url: str, kind: str = "image_url", **options: Any) -> Wanted:
    """A part of this kind, as calls have it."""
    part = media_part({"type": kind, kind: {"url": url, **options}}, "messages[0].content[0]")
    assert part is not None
    wanted = part["media"]
    assert isinstance(wanted, Wanted)
    return wanted
