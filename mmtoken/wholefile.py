"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mmtoken.errors import InputError


def check_target(path: str | os.PathLike[str], field: str, suffix: str = "") -> Path:
    """`path`, if a file could be written there: ask before the work, not after it.

    Raises:
        InputError: its folder is missing or cannot be written to, it is a folder itself, or it does not end in
            `suffix`.
    """
    target = Path(path)
    name = f"{field}={os.fspath(path)!r}"
    if not target.name.endswith(suffix):
        raise InputError(f"{name} is not a {suffix} file; give a name that ends in {suffix}.")
    if target.is_dir():
        raise InputError(f"{name} is a directory; give the name of a file.")
    if not target.parent.is_dir():
        raise InputError(f"{name}: the folder {str(target.parent)!r} does not exist; make it first.")
    if not os.access(target.parent, os.W_OK):
        raise InputError(f"{name}: the folder {str(target.parent)!r} cannot be written to; give another one.")
    return target


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path beside `path` that takes its name when the block ends, and is gone if the block fails."""
    target = Path(path)
    handle, name = tempfile.mkstemp(prefix=f".{target.stem}-", suffix=target.suffix, dir=target.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """An empty folder beside `path` that takes its name when the block ends, and is gone if the block fails.

    What lay at `path` is replaced as a whole, and is back if the last step fails.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    whole, old = work / "new", work / "old"
    whole.mkdir()
    try:
        yield whole
        if target.exists():
            target.rename(old)
        try:
            whole.rename(target)
        except BaseException:
            if old.exists():
                old.rename(target)
            raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
