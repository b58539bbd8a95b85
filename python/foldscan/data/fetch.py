"""Fetch pinned public packages with the registries' own clients into a cache folder outside the repository."""

from __future__ import annotations

import fnmatch
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path, PurePosixPath

import yaml

from foldscan.models.files import FormatError, atomic_directory


class FetchError(RuntimeError):
    """A package could not be brought: no client, no network, or not the file that was pinned."""


@dataclass(frozen=True)
class Package:
    """One pinned entry of ``packages.yaml``."""

    name: str
    registry: str
    package: str
    version: str
    sha256: str
    keep: tuple[str, ...]
    licence: str
    about: str


def packages() -> dict[str, Package]:
    """All packages that `fetch` knows, by name."""
    text = resources.files("foldscan.data").joinpath("packages.yaml").read_text(encoding="utf-8")
    table = {}
    for name, entry in yaml.safe_load(text).items():
        try:
            table[name] = Package(
                name=name, **{**entry, "keep": tuple(entry["keep"]), "version": str(entry["version"])}
            )
        except (KeyError, TypeError) as error:
            raise FormatError(f"packages.yaml: entry {name!r}: {error}") from None
    return table


def cache_folder() -> Path:
    """``$FOLDSCAN_CACHE``, or ``~/.cache/foldscan``."""
    override = os.environ.get("FOLDSCAN_CACHE")
    return Path(override) if override else Path.home() / ".cache" / "foldscan"


def _command(package: Package) -> list[str]:
    if package.registry == "pypi":
        return [
            *[sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"],
            f"{package.package}=={package.version}",
        ]
    if package.registry == "npm":
        return ["npm", "pack", "--silent", f"{package.package}@{package.version}"]
    if package.registry == "debian":
        return ["apt-get", "download", f"{package.package}={package.version}"]
    raise FormatError(f"packages.yaml: entry {package.name!r}: registry {package.registry!r}, want pypi, npm or debian")


_MISSING = {
    "npm": "the npm client (Debian: apt-get install npm)",
    "apt-get": "apt-get, which only Debian and its relatives have",
    "dpkg-deb": "dpkg-deb, which only Debian and its relatives have",
}


def _run(command: Sequence[str], folder: Path, what: str) -> None:
    if shutil.which(command[0]) is None:
        raise FetchError(f"{what} needs {_MISSING.get(command[0], command[0])}, and {command[0]!r} is not on the PATH")
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=900)
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
        raise FetchError(f"{what}: {' '.join(command[:3])} ... failed with status {done.returncode}: {lines[-1]}")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _wanted(member: str, keep: Sequence[str]) -> bool:
    return any(fnmatch.fnmatch(member, pattern) for pattern in keep)


def _target(root: Path, member: str, archive: Path) -> Path:
    path = PurePosixPath(member)
    if path.is_absolute() or ".." in path.parts:
        raise FetchError(f"{archive.name}: member {member!r} would be written outside the cache")
    target = root.joinpath(*path.parts)
    target.parent.mkdir(parents=True, exist_ok=True)
    return target


def _unpack(archive: Path, keep: Sequence[str], root: Path) -> None:
    if archive.suffix == ".deb":
        with tempfile.TemporaryDirectory() as scratch:
            _run(["dpkg-deb", "-x", str(archive), scratch], root, f"unpacking {archive.name}")
            for file in sorted(Path(scratch).rglob("*")):
                member = file.relative_to(scratch).as_posix()
                if file.is_file() and not file.is_symlink() and _wanted(member, keep):
                    shutil.copyfile(file, _target(root, member, archive))
    elif archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            for member in wheel.namelist():
                if not member.endswith("/") and _wanted(member, keep):
                    with wheel.open(member) as source, open(_target(root, member, archive), "wb") as out:
                        shutil.copyfileobj(source, out)
    else:
        with tarfile.open(archive) as tar:
            for info in tar:
                if info.isfile() and _wanted(info.name, keep):
                    content = tar.extractfile(info)
                    assert content is not None
                    with content, open(_target(root, info.name, archive), "wb") as out:
                        shutil.copyfileobj(content, out)


def fetch(name: str, *, cache: Path | None = None, download: bool = True) -> Path:
    """The folder of an unpacked package, downloading it first when the cache does not hold it.

    The download is checked against the pinned SHA-256 before anything of it is unpacked; the folder appears complete
    or not at all.

    Args:
        name: a key of `packages`.
        cache: folder to use instead of `cache_folder()`.
        download: with False, only look in the cache.

    Raises:
        ValueError: unknown ``name``.
        FetchError: no client, no network, a wrong checksum, or not in the cache and ``download`` is false.
    """
    known = packages()
    if name not in known:
        raise ValueError(f"name: got {name!r}, want one of {', '.join(sorted(known))}")
    package = known[name]
    target = (cache or cache_folder()) / f"{name}-{package.version}"
    if target.is_dir():
        return target
    if not download:
        raise FetchError(f"{name} is not in the cache; fetch it with: foldscan data fetch {name}")
    with tempfile.TemporaryDirectory() as scratch_name:
        scratch = Path(scratch_name)
        scratch.chmod(0o777)  # apt drops its privileges and then writes here
        _run(_command(package), scratch, f"fetching {name}")
        files = sorted(p for p in scratch.iterdir() if p.is_file())
        if len(files) != 1:
            raise FetchError(f"fetching {name}: the client left {len(files)} files, want 1")
        got = _sha256(files[0])
        if got != package.sha256:
            raise FetchError(f"fetching {name}: {files[0].name} has SHA-256 {got}, want {package.sha256}")
        with atomic_directory(target) as work:
            _unpack(files[0], package.keep, work)
            if not any(p.is_file() for p in work.rglob("*")):
                raise FetchError(f"fetching {name}: no member of {files[0].name} matches {package.keep}")
    return target
