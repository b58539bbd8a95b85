"""The loop learns, records, and resumes bit for bit: after a stop, and after kill -9 at random moments."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from foldscan.data import TokenFile
from foldscan.models import FormatError, load_pretrained
from foldscan.training import evaluate
from foldscan.training.checkpoint import checkpoints
from foldscan.training.metrics import read_metrics
from foldscan.training.optimizer import decays, make_optimizer
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent))
import small_run


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    small_run.write_data(folder)
    return folder


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of an uninterrupted run."""
    torch.set_num_threads(2)
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    small_run.run(data, run_dir)
    return run_dir


def final_state(run_dir: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the last checkpoint: weights, router biases, optimizer, random state."""
    last = checkpoints(run_dir)[-1]
    return {**load_file(last / "model.safetensors"), **load_file(last / "training.safetensors")}


def assert_same_bits(a: Path, b: Path) -> None:
    first, second = final_state(a), final_state(b)
    assert first.keys() == second.keys()
    different = [n for n in first if not torch.equal(first[n], second[n])]
    assert not different
    assert (
        json.loads((checkpoints(a)[-1] / "training.json").read_text())["data"]
        == (json.loads((checkpoints(b)[-1] / "training.json").read_text())["data"])
    )


def test_it_learns_and_leaves_everything(whole: Path, data: Path) -> None:
    records = read_metrics(whole / "metrics.jsonl")
    train = [r for r in records if r["kind"] == "train"]
    assert [r["step"] for r in train] == [3, 6, 9, 12, 15, 18, 21, 24]
    assert train[0]["loss"] > 5 and train[-1]["loss"] < 3.5
    assert train[-1]["tokens"] == 24 * 2 * 96
    assert all(abs(sum(layer) - 1) < 1e-3 for layer in train[-1]["expert_load"])
    assert [r["step"] for r in records if r["kind"] == "eval"] == [10, 20, 24]
    assert [p.name for p in checkpoints(whole)] == ["step_00000020", "step_00000024"]
    assert not [p for p in (whole / "checkpoints").iterdir() if p.name.startswith(".")]
    assert (whole / "config.yaml").is_file()
    assert "torch" in json.loads((whole / "environment.json").read_text())["versions"]
    model = load_pretrained(checkpoints(whole)[-1])
    file = TokenFile(data / "valid.tokens")
    found = evaluate(model, file, batch_tokens=96, seq_length=64, max_tokens=300, precision="bf16")
    assert found.bits_per_byte == records[-1]["bits_per_byte"]


@pytest.mark.parametrize("stop", [5, 11, 20])
def test_stopped_and_resumed_is_the_same_bits(data: Path, whole: Path, tmp_path: Path, stop: int) -> None:
    config = small_run.run_config(data, tmp_path / "run")

    class Stop:
        """Ends the run from outside at a step that is a checkpoint or lies between two."""

        def start(self, *_: Any) -> None: ...
        def evaluation(self, *_: Any) -> None: ...
        def stop(self) -> None: ...

        def step(self, step: int, record: dict[str, Any]) -> None:
            if step >= stop:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        small_run.train(config, listener=Stop())
    small_run.run(data, tmp_path / "run", resume=True)
    assert_same_bits(tmp_path / "run", whole)
    kept = [(r["kind"], r["step"]) for r in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    assert len(kept) == len(set(kept)) and kept[-1] == ("eval", 24)


def test_killed_five_times_is_the_same_bits(data: Path, tmp_path: Path) -> None:
    """kill -9 at random moments, some of them while a checkpoint is written (one every step)."""
    steps = 40
    reference = tmp_path / "reference"
    small_run.run(data, reference, steps=steps)
    victim = tmp_path / "victim"
    source = Path(small_run.__file__)
    command = [sys.executable, str(source), str(data), str(victim), "2", str(steps)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    chance = random.Random(7)
    kills = 0
    for _ in range(40):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        assert process.stdout is not None and process.stdout.readline() == "started\n"
        if kills < 5:
            before = len(checkpoints(victim)) and checkpoints(victim)[-1].name
            # Wait for some progress, so that five kills fall all over the run, then a random moment longer.
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline and process.poll() is None:
                names = [p.name for p in checkpoints(victim)]
                if names and names[-1] != before:
                    break
                time.sleep(0.002)
            time.sleep(chance.uniform(0, 0.1))
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                kills += 1
        output, _ = process.communicate()
        if process.returncode == 0:
            assert output.endswith("finished\n")
            break
        assert process.returncode == -signal.SIGKILL
    assert kills == 5
    assert_same_bits(victim, reference)
    assert [p.name for p in (victim / "checkpoints").iterdir() if p.name.startswith(".")] == []


def test_a_run_is_not_overwritten(data: Path, whole: Path) -> None:
    with pytest.raises(FileExistsError, match="step_00000024"):
        small_run.run(data, whole)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda c: (c / "training.json").write_text("{"), r"training\.json: not valid JSON"),
        (lambda c: (c / "training.json").write_text("{}"), "field 'step' is missing"),
        (lambda c: (c / "training.safetensors").write_bytes(b"junk"), r"training\.safetensors: not a safetensors"),
        (lambda c: (c / "model.safetensors").unlink(), r"step_00000005: tensor 'embeddings.weight' is missing"),
        (lambda c: (c / "config.json").write_text('{"pattern":"M","vocab_size":9,"hidden_size":9}'), r"config\.json"),
    ],
)
def test_a_damaged_checkpoint_is_named(data: Path, tmp_path: Path, damage: Any, message: str) -> None:
    small_run.run(data, tmp_path / "run", steps=5)
    damage(checkpoints(tmp_path / "run")[-1])
    with pytest.raises(FormatError, match=message):
        small_run.run(data, tmp_path / "run", resume=True, steps=6)


def test_another_seed_is_another_run(data: Path, whole: Path) -> None:
    with pytest.raises(FormatError, match="seed"):
        small_run.run(data, whole, resume=True, seed=1)


def test_accumulation_is_a_larger_batch(data: Path, tmp_path: Path) -> None:
    """Two half batches give the update of one whole batch, up to rounding. Pieces of one token are cut by no batch's
    end, and Adam with a huge epsilon moves by the gradient rather than by its sign."""
    common = {"precision": "fp32", "steps": 1, "seq_length": 1, "warmup_steps": 0, "adam_eps": 1.0, "lr": 1.0}
    split = small_run.run(data, tmp_path / "a", batch_tokens=96, accumulation=2, **common)
    whole = small_run.run(data, tmp_path / "b", batch_tokens=192, accumulation=1, **common)
    half = small_run.run(data, tmp_path / "c", batch_tokens=96, accumulation=1, **common)
    flat = [torch.cat([p.detach().flatten() for p in r.model.parameters()]) for r in (split, whole, half)]
    error = float((flat[0] - flat[1]).abs().max())
    assert error < 1e-5 < 1e-3 < float((flat[2] - flat[1]).abs().max())


def test_activation_checkpointing_is_the_same_run(data: Path, tmp_path: Path) -> None:
    small_run.run(data, tmp_path / "a", steps=4)
    small_run.run(data, tmp_path / "b", steps=4, activation_checkpointing=True)
    assert_same_bits(tmp_path / "a", tmp_path / "b")


def test_decay_acts_on_matrices_only(data: Path, tmp_path: Path) -> None:
    model = small_run.run(data, tmp_path / "a", steps=1).model
    decayed = {n for n, p in model.named_parameters() if decays(n, p)}
    assert not [n for n in decayed if any(w in n for w in ("norm", "bias", "A_log", "conv1d", "mixer.D"))]
    assert "embeddings.weight" in decayed and "layers.3.mixer.experts.up_proj" in decayed
    groups = make_optimizer(list(model.named_parameters()), small_run.run_config(data, tmp_path)).param_groups
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))
    assert [g["weight_decay"] for g in groups] == [0.1, 0.0]


def test_a_gradient_that_is_not_finite_stops_the_run(data: Path, tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError, match="gradient norm"):
        small_run.run(data, tmp_path / "run", lr=1e30, min_lr=0.0, warmup_steps=0, clip_norm=0.0, precision="fp32")


def test_a_run_limited_in_time_ends_in_time(data: Path, tmp_path: Path) -> None:
    result = small_run.run(data, tmp_path / "run", steps=100000, max_seconds=0.5, eval_every=50000, checkpoint_every=0)
    assert 0 < result.progress.step < 100000 and result.progress.seconds >= 0.5
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert records[-1]["kind"] == "eval" and len([r for r in records if r["kind"] == "eval"]) <= 2
    train = [r for r in records if r["kind"] == "train"]
    assert [r["done"] for r in train] == sorted({r["done"] for r in train}) and train[-1]["done"] == 1
    assert checkpoints(tmp_path / "run") == [result.checkpoint]


def test_tensorboard_files_appear(data: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="needs tensorboard")
    small_run.run(data, tmp_path / "run", steps=3, tensorboard=True)
    assert list((tmp_path / "run" / "tensorboard").glob("events.*"))


def test_evaluation_is_the_sum_over_documents(data: Path, whole: Path) -> None:
    model = load_pretrained(checkpoints(whole)[-1])
    file = TokenFile(data / "valid.tokens")
    found = evaluate(model, file, batch_tokens=50, seq_length=1000)
    nats = 0.0
    for index in range(file.num_documents):
        ids = torch.tensor(file.document(index).astype("int64"))
        labels = torch.cat([ids[1:], torch.tensor([256])])
        with torch.no_grad():
            logp = model.logits(model(ids)).double().log_softmax(-1)
        nats -= float(logp[torch.arange(len(ids)), labels].sum())
    assert found.nats == pytest.approx(nats, rel=1e-5)
    assert (found.tokens, found.bytes, found.documents) == (file.num_tokens, file.num_bytes, 10)
    part = evaluate(model, file, batch_tokens=50, seq_length=1000, max_tokens=int(file.starts[3]))
    assert part.documents == 3 and part.bytes == file.byte_starts[3]
