from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

import pytest

from torchfilm.training import TrainConfig

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("budget", [{}, {"steps": 5, "minutes": 2.0}])
def test_a_run_has_exactly_one_budget(budget: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"expected one budget.*Set steps for a run that resumes to the bit"):
        TrainConfig(**budget)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("lr", 0.0, r"TrainConfig\.lr: expected a number above 0, got 0\.0"),
        ("checkpoint_seconds", -1.0, r"checkpoint_seconds: expected a number above 0"),
        ("weight_decay", -0.1, r"weight_decay: expected 0 or more"),
        ("seed", 2**64, r"seed: expected a number below 2\*\*63, got 18446744073709551616"),
        ("cooldown", 1.5, r"cooldown: expected a share in \(0, 1\]"),
        ("ema", 1.0, r"ema: expected a decay in \[0, 1\)"),
        ("schedule", "step", r"schedule: expected one of constant, linear, cosine, got 'step'"),
        ("precision", "float16", r"precision: expected one of float32, bfloat16, got 'float16'"),
    ],
)
def test_a_field_out_of_range_is_named(name: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(steps=5, **{name: value})  # type: ignore[arg-type]


@dataclasses.dataclass(frozen=True)
class WithData(TrainConfig):
    data: Path | None = None


def test_fields_that_others_add_may_be_annotated_for_type_checkers_alone() -> None:
    assert WithData(steps=5).data is None
    with pytest.raises(ValueError, match=r"schedule: expected one of constant, linear, cosine"):
        WithData(steps=5, schedule="step")  # type: ignore[arg-type]


def test_the_rate_warms_up_stays_and_falls_in_a_line_to_zero() -> None:
    config = TrainConfig(steps=1000, lr=2.0, warmup_steps=4, schedule="linear", cooldown=0.25)
    rates = [config.learning_rate(step, config.progress(step, 0.0)) for step in range(1000)]
    assert rates[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert rates[750] == 2.0
    assert rates[875] == pytest.approx(1.0)
    assert rates[999] == pytest.approx(2.0 * 1 / 250)
    assert config.learning_rate(1000, 1.0) == 0.0


def test_the_cosine_is_half_way_at_half_the_budget() -> None:
    config = TrainConfig(minutes=2.0, lr=3.0, warmup_steps=0, schedule="cosine")
    assert config.progress(step=77, seconds=60.0) == 0.5
    assert config.learning_rate(77, 0.5) == pytest.approx(1.5)
    assert config.learning_rate(77, 1 / 3) == pytest.approx(3.0 * 0.5 * (1 + math.cos(math.pi / 3)))
    assert config.progress(step=77, seconds=500.0) == 1.0


def test_a_constant_rate_never_falls() -> None:
    config = TrainConfig(steps=7, lr=0.3, warmup_steps=0, schedule="constant")
    assert {config.learning_rate(step, config.progress(step, 0.0)) for step in range(8)} == {0.3}
