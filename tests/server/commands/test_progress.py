"""Progress displays: content, interruption, and silence outside of a terminal."""

from __future__ import annotations

import pytest

from keysift.server.commands.progress import Update, count_bar, interrupted


def test_a_long_bar_has_the_title_and_the_percentage(capsys: pytest.CaptureFixture[str]) -> None:
    assert not interrupted("starting", lambda update: update(1, 4, "dense, 2,000 tokens"))
    out, err = capsys.readouterr()
    assert out == ""
    assert "dense, 2,000 tokens" in err
    assert "25%" in err


def test_ctrl_c_ends_the_work_and_other_errors_pass(capsys: pytest.CaptureFixture[str]) -> None:
    def press_ctrl_c(update: Update) -> None:
        raise KeyboardInterrupt

    def fail(update: Update) -> None:
        raise ValueError("bad")

    assert interrupted("running", press_ctrl_c)
    with pytest.raises(ValueError, match="bad"):
        interrupted("running", fail)


def test_a_count_bar_prints_nothing_outside_of_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with count_bar("requests", 3) as bar:
        bar.update(2, title="requests, 1 failed")
        bar.stop()
        bar.stop()
    assert capsys.readouterr().err.strip() == ""
