"""The whole demo at its smallest: everything is written, and nothing of anyone else's is removed."""

import dataclasses
import json
from pathlib import Path

import pytest
from foldscan.data import Tokenizer
from foldscan.demo import run, run_demo
from foldscan.models import load_pretrained


def test_the_demo_from_text_to_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = dataclasses.replace(
        run.SMOKE, vocab=384, batch_tokens=256, train_bytes=1 << 16, held_out_bytes=1 << 12, new_tokens=8, rounds=1
    )
    monkeypatch.setattr(run, "SMOKE", tiny)
    run_dir = tmp_path / "demo"
    summary = run_demo(run_dir=run_dir, smoke=True, seconds=1.0, quiet=True)
    assert summary == json.loads((run_dir / "summary.json").read_text())
    assert set(summary["bits_per_byte"]) == {"this model", "byte 4-gram", "lzma"}
    assert 1 < summary["bits_per_byte"]["this model"] < 6
    assert summary["parsed"]["all"] == 8 and summary["tokens"] > 0
    assert all(v["foldscan"] > 0 and v["eager"] > 0 for v in summary["tokens_per_second"].values())
    page = (run_dir / "report.html").read_text()
    assert f"{summary['bits_per_byte']['this model']:.2f}" in page and "expert layer 2" in page
    tokenizer = Tokenizer.load(run_dir / "model")
    assert load_pretrained(run_dir / "model").config.vocab_size == tokenizer.vocab_size


def test_a_folder_that_is_no_demo_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "precious").write_text("weights")
    with pytest.raises(FileExistsError, match="no demo"):
        run_demo(run_dir=tmp_path, quiet=True)
    assert (tmp_path / "checkpoints" / "precious").read_text() == "weights"


def test_time_must_be_positive(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="seconds: got 0"):
        run_demo(run_dir=tmp_path / "demo", seconds=0, quiet=True)
    assert list(tmp_path.iterdir()) == []
