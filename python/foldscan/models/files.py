"""Files that are either whole or not there: temporary name, fsync, rename; and JSON with errors that name the field."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class FormatError(ValueError):
    """A file does not hold what it should. The message names the file and the field."""


def _fsync_path(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def fsync_tree(directory: Path) -> None:
    """Push every file below ``directory``, and the directories themselves, to the disk."""
    for root, _, files in os.walk(directory):
        for name in files:
            _fsync_path(Path(root) / name)
        _fsync_path(Path(root))


@contextlib.contextmanager
def atomic_directory(path: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty directory that becomes ``path`` when the block ends without an exception.

    A reader sees the whole new directory or none of it. With ``overwrite`` an existing ``path`` is first renamed to
    ``<path>.old`` (removed afterwards), so that a crash between the two renames still leaves a complete copy.

    Raises:
        FileExistsError: ``path`` exists and ``overwrite`` is false; raised before anything is written.
    """
    target = Path(path)
    if target.exists() and not overwrite:
        raise FileExistsError(f"{target} already exists")
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
    try:
        yield work
        work.chmod(0o755)
        fsync_tree(work)
        if target.exists():
            old = target.with_name(target.name + ".old")
            if old.exists():
                shutil.rmtree(old)
            os.rename(target, old)
            os.rename(work, target)
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.rename(work, target)
        _fsync_path(target.parent)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


def atomic_write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file under a temporary name, fsync it, rename it over ``path``."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    fd, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
    try:
        with os.fdopen(fd, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, target)
        _fsync_path(target.parent)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write ``value`` as indented JSON, atomically."""
    atomic_write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        FormatError: the file is missing, is not JSON, or holds something other than an object.
    """
    file = Path(path)
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FormatError(f"{file}: no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise FormatError(f"{file}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise FormatError(f"{file}: got a JSON {type(value).__name__}, want an object")
    return value


def want_field(record: dict[str, Any], field: str, kind: type | tuple[type, ...], where: object) -> Any:
    """``record[field]``, checked to be of type ``kind``; a missing or mistyped field raises FormatError naming both."""
    if field not in record:
        raise FormatError(f"{where}: field {field!r} is missing")
    value = record[field]
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is int):
        names = kind.__name__ if isinstance(kind, type) else " or ".join(k.__name__ for k in kind)
        raise FormatError(f"{where}: field {field!r} is {value!r}, want {names}")
    return value
