"""Atomic writing: a failure leaves what was there, and no rubbish beside it."""

from pathlib import Path

import pytest
from foldscan.models.files import FormatError, atomic_directory, atomic_write_text, read_json, want_field


def test_a_directory_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "d"
    with pytest.raises(RuntimeError), atomic_directory(target) as work:
        (work / "a").write_text("1")
        assert not target.exists()
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with atomic_directory(target) as work:
        (work / "a").write_text("1")
    assert (target / "a").read_text() == "1"
    with pytest.raises(RuntimeError), atomic_directory(target, overwrite=True) as work:
        raise RuntimeError
    assert (target / "a").read_text() == "1"
    with atomic_directory(target, overwrite=True) as work:
        (work / "b").write_text("2")
    assert [p.name for p in target.iterdir()] == ["b"]
    assert [p.name for p in tmp_path.iterdir()] == ["d"]


def test_an_existing_directory_is_not_touched(tmp_path: Path) -> None:
    with pytest.raises(FileExistsError), atomic_directory(tmp_path):
        raise AssertionError("the block must not run")


def test_text_replaces_or_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "t"
    atomic_write_text(file, "one")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        atomic_write_text(file, "two")
    assert file.read_text() == "one"
    assert [p.name for p in tmp_path.iterdir()] == ["t"]


def test_json_errors_name_file_and_field(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    file.write_bytes(b"\xff")
    with pytest.raises(FormatError, match=r"x\.json"):
        read_json(file)
    with pytest.raises(FormatError, match="f: field 'n' is missing"):
        want_field({}, "n", int, "f")
    with pytest.raises(FormatError, match="f: field 'n' is True, want int"):
        want_field({"n": True}, "n", int, "f")
