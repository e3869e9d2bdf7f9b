"""Messages between a reader and its decoding process: a JSON header and raw bytes, both with their length in front.

Nothing is unpickled on either side: the process works on hostile files, so what it sends is data and no program.
"""

from __future__ import annotations

import json
import struct
from typing import Any

LENGTHS = struct.Struct(">IQ")
"""Bytes of the header, bytes of the payload."""

MAX_HEADER = 65536


def pack(header: dict[str, Any], payload: int = 0) -> bytes:
    """What goes before `payload` bytes."""
    text = json.dumps(header).encode()
    return LENGTHS.pack(len(text), payload) + text


def lengths(raw: bytes, max_payload: int) -> tuple[int, int]:
    """Lengths of header and payload.

    Raises:
        ValueError: one is longer than it may be.
    """
    header, payload = LENGTHS.unpack(raw)
    if header > MAX_HEADER or payload > max_payload:
        raise ValueError(f"a message of {header} + {payload} bytes where {MAX_HEADER} + {max_payload} are the most")
    return header, payload
