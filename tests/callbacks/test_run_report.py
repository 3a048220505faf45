"""RunReport: what it prints, word for word."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from lit_symopt.callbacks import RunReport

module = sys.modules[RunReport.__module__]


def trainer(step: int, loss: float | None, log_dir: Path | None = None) -> Any:
    metrics = {} if loss is None else {"val/loss": loss}
    loggers = [] if log_dir is None else [Mock()]
    return Mock(global_step=step, callback_metrics=metrics, log_dir=str(log_dir), loggers=loggers, is_global_zero=True)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Mock:
    clock = Mock(return_value=100.0)
    monkeypatch.setattr(module, "perf_counter", clock)
    return clock


def test_it_prints_both_losses_perplexity_tokens_seconds_and_the_command(
    tmp_path: Path, clock: Mock, capsys: pytest.CaptureFixture[str]
) -> None:
    report, model, logs = RunReport(), Mock(tokens_seen=819_200), tmp_path / "my runs/version_0"
    report.on_fit_start(trainer(0, None), model)
    report.on_validation_end(trainer(0, math.log(4096)), model)
    report.on_validation_end(trainer(200, 5.0), model)
    report.on_validation_end(trainer(400, math.log(50)), model)
    clock.return_value = 161.5
    report.on_fit_end(trainer(400, math.log(50), logs), model)
    assert capsys.readouterr().out == (
        "\nFinished at step 400.\n"
        "  validation loss   8.3178 at step 0, 3.9120 at step 400 (nats a token)\n"
        "  perplexity        4,096.00, 50.00\n"
        "  trained on        819,200 tokens in 61.5 s, validation included\n"
        f"  logs              {logs}\n"
        f"  to look at them   tensorboard --load_fast=false --logdir '{logs.parent}'\n"
    )


def test_a_resumed_run_reports_the_start_of_the_first_and_the_seconds_of_both(clock: Mock) -> None:
    first, model = RunReport(), Mock(tokens_seen=10)
    first.on_fit_start(trainer(0, None), model)
    first.on_validation_end(trainer(0, 8.0), model)
    clock.return_value = 110.0
    saved = first.state_dict()
    second = RunReport()
    second.load_state_dict(saved)
    second.on_fit_start(trainer(5, None), model)
    second.on_validation_end(trainer(9, 4.0), model)
    clock.return_value = 115.0
    text = second.text(trainer(9, 4.0), model)
    assert "8.0000 at step 0, 4.0000 at step 9" in text
    assert "in 15.0 s" in text


def test_it_says_so_when_nothing_was_measured_or_not_at_the_end(clock: Mock) -> None:
    report, model = RunReport(), Mock(spec=[])
    report.on_fit_start(trainer(0, None), model)
    report.on_validation_end(trainer(0, None), model)
    text = report.text(trainer(30, None), model)
    assert "not measured: no validation logged 'val/loss'" in text
    assert "took              0.0 s" in text
    assert "logs" not in text
    report.on_validation_end(trainer(20, 6.0), model)
    assert "no validation since step 20: see val_check_interval" in report.text(trainer(30, None), model)


def test_a_loss_beyond_all_bounds_is_printed(clock: Mock) -> None:
    report = RunReport()
    report.on_validation_end(trainer(3, 1e6), Mock())
    assert "1000000.0000 at step 3" in report.text(trainer(3, None), Mock(tokens_seen=1))
