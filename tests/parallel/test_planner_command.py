"""``foldscan plan``: what it prints, JSON, pictures and errors."""

import json
from pathlib import Path

import pytest
from foldscan.cli import main
from foldscan.parallel.planner import plan


def test_command_prints_the_ranking_and_why(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    picture = tmp_path / "new" / "mappings.png"
    command = ["plan", "--model", "mixtral-8x22b-g8t8", "--gpus", "128", "--top", "3", "--plot", str(picture)]
    assert main(command) == 0
    out = capsys.readouterr().out
    best = plan("mixtral-8x22b-g8t8", gpus=128)[0]
    for text in ("Modelled, not measured", str(best.mapping), f"MFU {100 * best.mfu:.1f} %", "EP dispatch, combine"):
        assert text in out
    assert "Dispatcher: dedup" in out and "quicker than" in out and "Memory" in out
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_command_shows_one_mapping(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", "--model", "mixtral-8x22b", "--gpus", "128", "--mapping"]
    assert main([*command, "tp=2,etp=2,ep=4,pp=8,method=unfolded", "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert round(100 * value["asked"]["mfu"], 1) == 47.4 and value["asked"]["fits"]
    assert main([*command, "tp=8"]) == 0
    out = capsys.readouterr().out
    assert "does not fit" in out and "quicker than folded tp8 cp1 dp16" in out
    assert main(["plan", "--model", "mixtral-8x22b", "--gpus", "8", "--mapping", "ep=8"]) == 0  # nothing fits on eight
    out = capsys.readouterr().out
    assert "does not fit" in out and "quicker" not in out and "mappings fit" not in out


def test_command_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", "--model", "mixtral-8x22b", "--gpus", "128", "--top", "2", "--constants", "hand-set", "--json"]
    assert main(command) == 0
    value = json.loads(capsys.readouterr().out)
    assert len(value["ranking"]) == 2 and value["constants"] == "hand-set" and value["fitting_mappings"] > 100
    best = plan("mixtral-8x22b", gpus=128, constants="hand-set")[0]
    first = value["ranking"][0]
    assert first == json.loads(json.dumps(best.to_dict()))
    assert first["mapping"]["ep"] == best.mapping.ep and first["seconds"] == sum(first["terms"].values())
    assert set(first["bytes"]["ep"]["forward"]) == {"intra", "inter"}


def test_command_over_gpu_counts(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    picture = tmp_path / "scale.svg"
    command = ["plan", "--model", "mixtral-8x22b", "--gpus", "128", "--scale", "8,128,256", "--grow-gbs"]
    assert main([*command, "--plot", str(picture)]) == 0
    out = capsys.readouterr().out
    assert "none fits" in out and "512" in out and "<svg" in picture.read_text()
    assert main([*command, "--json"]) == 0
    points = json.loads(capsys.readouterr().out)["points"]
    assert [p["gbs"] for p in points] == [16, 256, 512] and points[0]["best"] is None
    assert points[1]["best"]["mfu"] >= points[1]["unfolded"]["mfu"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "deepseek-v3"], "deepseek-v3 is not covered"),
        (["--model", "mixtral-8x22b", "--top", "0"], "--top: got 0"),
        (["--model", "mixtral-8x22b", "--plot", "x.gif"], "plot: got 'x.gif', want a file name that ends in .png"),
        (["--model", "mixtral-8x22b", "--mapping", "tq=2"], "--mapping: got 'tq=2'"),
        (["--model", "mixtral-8x22b", "--mapping", "tp=two"], "--mapping: got 'two'"),
        (["--model", "mixtral-8x22b", "--mapping", "tp=16"], "tp: got 16, want a divisor of kv_heads = 8"),
        (["--model", "mixtral-8x22b", "--scale", "1k"], "--scale: got '1k'"),
        (["--model", "mixtral-8x22b", "--scale", "1", "--plot", "x.png"], "scale: got no GPU count with a mapping"),
        (["--model", "mixtral-8x22b", "--memory", "5"], "no mapping of mixtral-8x22b to 128 GPUs fits in 5.0 GB"),
    ],
)
def test_command_errors_in_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--gpus", "128", *arguments]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
