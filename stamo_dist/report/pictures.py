"""Pictures of a page as data URIs, compressed so that a report of many can be sent around."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

from PIL import Image, ImageSequence, features

_QUALITY = 90
_LARGEST = 16383  # pixels a side that WebP can hold


def embed(picture: Path) -> dict[str, Any]:
    """An image for the page, as WebP where that is smaller than the file; animations stay animations.

    Returns `uri` (its content), `width`, `height`, and `wide`, for a strip that is scrolled, not shrunk, on phones.
    """
    content = picture.read_bytes()
    with Image.open(io.BytesIO(content)) as image:
        width, height = image.size
        kind = Image.MIME[image.format or "PNG"]
        if features.check("webp") and max(width, height) <= _LARGEST:
            smaller = _webp(image)
            if len(smaller) < len(content):
                content, kind = smaller, "image/webp"
    uri = f"data:{kind};base64,{base64.b64encode(content).decode()}"
    return {"uri": uri, "width": width, "height": height, "wide": width > 2.2 * height}


def _webp(image: Image.Image) -> bytes:
    frames, durations = [], []
    for frame in ImageSequence.Iterator(image):
        frames.append(frame.convert("RGBA" if "A" in frame.getbands() or "transparency" in frame.info else "RGB"))
        durations.append(int(frame.info.get("duration", 100)))
    animation: dict[str, Any] = {}
    if len(frames) > 1:
        loop = image.info.get("loop", 1)
        animation = {"save_all": True, "append_images": frames[1:], "duration": durations, "loop": loop}
    out = io.BytesIO()
    frames[0].save(out, "WEBP", quality=_QUALITY, method=4, **animation)
    return out.getvalue()
