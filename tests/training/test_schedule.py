"""Schedules at their corners, and the configuration's round trip and refusals."""

from pathlib import Path

import pytest
from foldscan.models import FormatError, HybridConfig
from foldscan.training import TrainConfig, learning_rate
from foldscan.training.schedule import fraction_done, is_due

MODEL = {"pattern": "M-", "vocab_size": 32, "hidden_size": 16}


def config(**changes: object) -> TrainConfig:
    return TrainConfig(
        **{
            "model": HybridConfig(**MODEL),
            "run_dir": "r",
            "corpus": "stdlib",
            "steps": 100,
            "warmup_steps": 10,
            "lr": 1.0,
            "min_lr": 0.1,
            **changes,
        }
    )


def test_warmup_is_linear_from_the_first_step() -> None:
    assert [learning_rate(config(), s) for s in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
    assert learning_rate(config(warmup_steps=0), 0) == 1.0


def test_cosine_ends_at_the_minimum() -> None:
    c = config()
    assert learning_rate(c, 10) == pytest.approx(1.0)
    assert learning_rate(c, 55) == pytest.approx(0.55)
    assert learning_rate(c, 99) == pytest.approx(0.1, abs=2e-3)
    rates = [learning_rate(c, s) for s in range(10, 100)]
    assert rates == sorted(rates, reverse=True)


def test_wsd_is_flat_then_falls() -> None:
    c = config(schedule="wsd", decay_fraction=0.25)
    assert {learning_rate(c, s) for s in range(10, 76)} == {1.0}
    assert learning_rate(c, 88) == pytest.approx(1 - 0.9 * 13 / 25)
    assert learning_rate(c, 100) == pytest.approx(0.1)
    assert {learning_rate(config(schedule="constant"), s) for s in range(10, 100)} == {1.0}


def test_limited_time_pulls_the_schedule_along() -> None:
    c = config(max_seconds=10.0, schedule="wsd", decay_fraction=0.5)
    assert fraction_done(c, 20, 1.0) == 0.2 and fraction_done(c, 20, 6.0) == 0.6 and fraction_done(c, 20, 11.0) == 1.0
    assert learning_rate(c, 20, 1.0) == 1.0
    assert learning_rate(c, 20, 7.5) == pytest.approx(0.55) == learning_rate(c, 75, 1.0)
    assert learning_rate(config(), 20, 1e9) == learning_rate(config(), 20)


def test_what_is_due_is_due_as_often_with_limited_time() -> None:
    assert [s for s in range(1, 11) if is_due(config(), 3, s, 0.0, 0.0)] == [3, 6, 9]
    assert not is_due(config(), 0, 3, 0.0, 1.0)
    c = config(max_seconds=10.0)
    fractions = [0.0, 0.05, 0.3, 0.31, 0.8, 1.0]
    due = [is_due(c, 25, s, fractions[s - 1], fractions[s]) for s in range(1, 6)]
    assert due == [False, True, False, True, True]


def test_yaml_round_trip_and_overrides(tmp_path: Path) -> None:
    c = config(schedule="wsd", clip_norm=0.0)
    c.save(tmp_path / "c.yaml")
    assert TrainConfig.load(tmp_path / "c.yaml") == c
    changed = TrainConfig.load(tmp_path / "c.yaml", ["lr=3e-1", "model.hidden_size=24", "resume_me=1"][:2])
    assert (changed.lr, changed.model.hidden_size) == (0.3, 24)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["speed=9"], "'speed' is not a field"),
        (["steps"], "override 'steps': want key=value"),
        (["steps=many"], "'steps' is 'many'"),
        (["steps=0"], "steps: got 0"),
        (["model.pattern=Z"], "pattern: got 'Z'"),
        (["lr.deep=1"], "'lr' has no fields"),
        (["schedule=step"], "schedule: got 'step'"),
        (["precision=fp8"], "precision: got 'fp8'"),
        (["min_lr=2"], "min_lr"),
        (["train_data=x"], "corpus, train_data"),
    ],
)
def test_wrong_overrides_are_named(tmp_path: Path, overrides: list[str], message: str) -> None:
    config().save(tmp_path / "c.yaml")
    with pytest.raises(FormatError, match=message):
        TrainConfig.load(tmp_path / "c.yaml", overrides)


def test_a_tokenizer_is_wanted_with_token_files() -> None:
    with pytest.raises(ValueError, match="tokenizer: got None"):
        config(corpus=None, train_data="t")


def test_the_shipped_configuration_loads() -> None:
    files = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
    assert files
    for file in files:
        assert TrainConfig.load(file).model.vocab_size == 0
