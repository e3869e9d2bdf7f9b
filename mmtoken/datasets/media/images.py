"""Image files from outside: read whole, upright and RGB, or refused in one sentence."""

from __future__ import annotations

import os
import re
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from mmtoken.datasets.media.limits import MAX_PIXELS
from mmtoken.errors import InputError

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
"""What is opened. Pillow knows more, some of which (EPS) starts other programs."""

_KINDS = "a PNG, JPEG, WebP, BMP, TIFF or single-frame GIF file"


def read_image(path: str | os.PathLike[str], *, max_pixels: int = MAX_PIXELS, field: str = "image") -> Image.Image:
    """One picture, RGB, turned upright by its EXIF orientation.

    Transparency is dropped and 16-bit grey is scaled to 8 bits. Pictures with several frames are refused: which frame
    is meant is for the caller to say. (The second picture in a telephone's MPO file is a preview and is passed over.)

    Args:
        path: an image file.
        max_pixels: pictures whose header claims more are refused before anything is decoded.
        field: how messages name the input.

    Raises:
        InputError: no such file, not a file, empty, not an image, truncated, 0 x 0, larger than `max_pixels`, or
            animated.
    """
    if not isinstance(path, str | os.PathLike):
        raise InputError(f"{field}={path!r} is a {type(path).__name__}; give the path of {_KINDS}.")
    file = Path(path)
    name = f"{field}={os.fspath(path)!r}"
    if not file.exists():
        raise InputError(f"{name} does not exist; give the path of {_KINDS}.")
    if not file.is_file():
        kind = "directory" if file.is_dir() else "device or pipe"
        raise InputError(f"{name} is a {kind}; give the path of {_KINDS}.")
    if file.stat().st_size == 0:
        raise InputError(f"{name} is empty (0 bytes); give {_KINDS}.")
    try:
        with Image.open(file, formats=FORMATS) as image:
            _check(image, name, max_pixels)
            image.load()
            return _rgb(ImageOps.exif_transpose(image))
    except InputError:
        raise
    except Image.DecompressionBombError as error:
        claimed = "".join(re.findall(r"\((\d+) pixels\)", str(error))) or "more"
        raise InputError(
            f"{name} claims {claimed} pixels, above the limit of {max_pixels}; scale the picture down."
        ) from error
    except UnidentifiedImageError as error:
        raise InputError(
            f"{name} is no picture (another type of file, a damaged header, or 0 x 0 pixels); give {_KINDS}."
        ) from error
    except Exception as error:  # decoders raise whatever they stumble over: OSError, SyntaxError, struct.error, ...
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"{name} cannot be decoded ({reason}); the file is truncated or damaged, save it anew."
        ) from error


def _check(image: Image.Image, name: str, max_pixels: int) -> None:
    """Refuse by what the header says."""
    width, height = image.size
    if width < 1 or height < 1:
        raise InputError(f"{name} is {width} x {height} pixels; give a picture with at least one pixel.")
    if width * height > max_pixels:
        raise InputError(
            f"{name} claims {width} x {height} = {width * height} pixels, above the limit of {max_pixels}; scale the "
            "picture down."
        )
    if image.mode == "F":
        raise InputError(f"{name} holds floating-point pixels of unknown range; save it with 8 bits per channel.")
    frames = getattr(image, "n_frames", 1)  # Pillow gives it to formats that can hold several
    if frames > 1 and image.format != "MPO":  # a JPEG with a preview behind it
        raise InputError(f"{name} holds {frames} frames; save the one you mean as a picture of its own.")


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # 16 bits per pixel; `convert` would clip everything above 255 to white.
        image = image.convert("I").point(lambda value: value / 256).convert("L")
    if "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")
