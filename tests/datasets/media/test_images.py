"""Pictures come back whole, upright and RGB; everything else is one InputError that says what to do."""

from __future__ import annotations

import re
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from mmtoken.datasets.media.images import read_image
from mmtoken.errors import InputError


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _png(width: int, height: int) -> bytes:
    """A PNG whose header claims a size and whose pixels are a few zeros."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = _chunk(b"IHDR", header) + _chunk(b"IDAT", zlib.compress(b"\0" * 100)) + _chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def _bmp(width: int, height: int) -> bytes:
    info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + info


def _truncated(path: Path) -> None:
    Image.effect_noise((64, 64), 50).save(path)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def _frames(path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(path, save_all=True, append_images=frames[1:])


_BAD: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "a forged header": ("x.png", lambda p: p.write_bytes(_png(30000, 30000)), "900000000 pixels, above the limit"),
    "a forged BMP header": ("x.bmp", lambda p: p.write_bytes(_bmp(30000, 30000)), "900000000 pixels, above"),
    "a header above the limit": ("x.png", lambda p: p.write_bytes(_png(9000, 9000)), "9000 x 9000 = 81000000"),
    "no pixels": ("x.png", lambda p: p.write_bytes(_png(0, 0)), "0 x 0"),
    "too few pixels": ("x.png", lambda p: p.write_bytes(_png(100, 100)), "truncated or damaged"),
    "a truncated PNG": ("x.png", _truncated, "truncated or damaged"),
    "a truncated JPEG": ("x.jpg", _truncated, "truncated or damaged"),
    "an empty file": ("x.png", lambda p: p.write_bytes(b""), "0 bytes"),
    "a directory": ("x.png", lambda p: p.mkdir(), "is a directory"),
    "a missing file": ("x.png", lambda p: None, "does not exist"),
    "text": ("x.png", lambda p: p.write_text("a cat"), "is no picture"),
    "an SVG": ("x.svg", lambda p: p.write_text("<svg xmlns='http://www.w3.org/2000/svg'/>"), "is no picture"),
    "PostScript": ("x.eps", lambda p: p.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), "no picture"),
    "a video": ("x.mp4", lambda p: p.write_bytes(b"\0\0\0\x18ftypmp42" + b"\0" * 100), "is no picture"),
    "an animated GIF": ("x.gif", _frames, "holds 2 frames"),
    "an animated WebP": ("x.webp", _frames, "holds 2 frames"),
    "a TIFF of two pages": ("x.tiff", _frames, "holds 2 frames"),
    "floating-point pixels": ("x.tiff", lambda p: Image.new("F", (4, 4), 3.0).save(p), "floating-point"),
}


@pytest.mark.parametrize("case", _BAD)
def test_what_is_no_usable_picture_is_one_error_with_field_value_and_fix(case: str, tmp_path: Path) -> None:
    name, make, words = _BAD[case]
    file = tmp_path / name
    make(file)
    with pytest.raises(InputError) as caught:
        read_image(file, field="--image")
    message = str(caught.value)
    assert message.startswith(f"--image={str(file)!r} ") and words in message
    assert re.search(r"[;,] (give|save|scale)|save it anew", message), "no fix named"
    assert "\n" not in message


@pytest.mark.parametrize("value", [None, 3, b"x.png", ["x.png"]])
def test_a_path_of_another_type_is_refused(value: object) -> None:
    with pytest.raises(InputError, match=r"image=.* give the path of"):
        read_image(value)  # type: ignore[arg-type]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_upright(orientation: int, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = Image.new("RGB", (6, 4), "black")
    picture.putpixel((0, 0), (255, 255, 255))
    picture.save(tmp_path / "x.png", exif=exif)
    # Where the EXIF standard puts the first stored pixel.
    size, corner = {
        1: ((6, 4), (0, 0)), 2: ((6, 4), (5, 0)), 3: ((6, 4), (5, 3)), 4: ((6, 4), (0, 3)),
        5: ((4, 6), (0, 0)), 6: ((4, 6), (3, 0)), 7: ((4, 6), (3, 5)), 8: ((4, 6), (0, 5)),
    }[orientation]  # fmt: skip
    read = read_image(tmp_path / "x.png")
    assert read.size == size and read.getpixel(corner) == (255, 255, 255)


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("1", 1, (255, 255, 255)),
        ("L", 90, (90, 90, 90)),
        ("LA", (90, 0), (90, 90, 90)),
        ("RGBA", (10, 20, 30, 0), (10, 20, 30)),
        ("I;16", 0x8000, (128, 128, 128)),
        ("P", 0, (7, 8, 9)),
    ],
)
def test_every_mode_becomes_rgb(mode: str, colour: object, expected: tuple[int, ...], tmp_path: Path) -> None:
    picture = Image.new(mode, (5, 3), colour)  # type: ignore[arg-type]
    if mode == "P":
        picture.putpalette([7, 8, 9, 1, 1, 1])
    picture.save(tmp_path / "x.png")
    read = read_image(tmp_path / "x.png")
    assert (read.mode, read.size, read.getpixel((2, 1))) == ("RGB", (5, 3), expected)


def test_a_telephone_picture_with_a_preview_is_read(tmp_path: Path) -> None:
    frames = [Image.new("RGB", size, "red") for size in ((16, 8), (4, 2))]
    frames[0].save(tmp_path / "x.jpg", format="MPO", save_all=True, append_images=frames[1:])
    assert read_image(tmp_path / "x.jpg").size == (16, 8)


def test_the_limit_counts_pixels_before_decoding(tmp_path: Path) -> None:
    Image.new("RGB", (10, 10)).save(tmp_path / "x.png")
    assert read_image(tmp_path / "x.png", max_pixels=100).size == (10, 10)
    with pytest.raises(InputError, match="limit of 99"):
        read_image(tmp_path / "x.png", max_pixels=99)


def test_reading_needs_no_torch() -> None:
    code = "import sys, mmtoken.datasets.media.images; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
