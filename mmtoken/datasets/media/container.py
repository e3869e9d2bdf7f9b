"""What kind of file is this? Decided from its first bytes, before a decoder library sees it."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from mmtoken.datasets.media.limits import Refusal

KINDS = "an MP4, MOV, MKV, WebM or AVI file"

# Boxes that an MP4 or MOV file may begin with (ISO/IEC 14496-12 and the QuickTime format).
_BOXES = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"uuid", b"pnot", b"styp", b"sidx", b"moof")

_OTHERS = (
    (b"#EXTM3U", "is a playlist, which names other files"),
    (b"ffconcat", "is a list of other files"),
    (b"\x89PNG", "is a picture"),
    (b"\xff\xd8\xff", "is a picture"),
    (b"GIF8", "is a picture"),
    (b"BM", "is a picture"),
    (b"YUV4MPEG2", "holds raw frames"),
)


def open_regular(path: str) -> int:
    """A descriptor of a regular file, which the caller closes. A pipe or device is refused and never waited for.

    Raises:
        Refusal: no such file, no permission, or something other than a file.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise Refusal(f"does not exist; give the path of {KINDS}.") from None
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise Refusal(f"cannot be opened ({reason}); give the path of {KINDS}.") from None
    try:
        mode = os.fstat(handle).st_mode
        if not stat.S_ISREG(mode):
            kind = "directory" if stat.S_ISDIR(mode) else "device or pipe"
            raise Refusal(f"is a {kind}; give the path of {KINDS}.")
        check_kind(os.pread(handle, 16, 0))
        os.set_blocking(handle, True)
    except BaseException:
        os.close(handle)
        raise
    return handle


def check_kind(head: bytes) -> None:
    """Refuse what does not begin as a supported container does.

    Decoder libraries guess the kind by themselves and know formats that open other files; what passes here cannot be
    one of them, because those are text.

    Raises:
        Refusal: the first bytes (at least 12) are those of another format.
    """
    if not head:
        raise Refusal(f"is empty (0 bytes); give {KINDS}.")
    mp4 = head[4:8] in _BOXES
    matroska = head.startswith(b"\x1a\x45\xdf\xa3")
    avi = head.startswith(b"RIFF") and head[8:12] == b"AVI "
    if mp4 or matroska or avi:
        return
    for magic, what in _OTHERS:
        if head.startswith(magic):
            raise Refusal(f"{what}; give {KINDS}.")
    raise Refusal(f"is no video (its first bytes are {head[:8].hex(' ')}); give {KINDS}.")


def is_camera(source: str) -> bool:
    """A Linux camera: /dev/video and a number, there or not."""
    path = Path(source)
    return str(path.parent) == "/dev" and path.name.startswith("video") and path.name[5:].isdigit()
