"""Progress of long work: bars on a terminal, plain lines now and then in a log."""

import io

import pytest

from saap.eval.cli import progress
from saap.eval.cli.terminal import Terminal


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass when the test says so."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def shown(monkeypatch, terminal: bool) -> io.StringIO:
    file = io.StringIO()
    monkeypatch.setattr(progress, "errors", Terminal(file=file, force_terminal=terminal, width=80))
    return file


def test_a_log_gets_a_line_now_and_then(monkeypatch, clock):
    file = shown(monkeypatch, terminal=False)
    with progress.progress_bars() as report:
        for done in range(0, 101, 5):
            report(f"routers (loss {done / 7:.2f})", done, 100)
            clock[0] += 6.5
    lines = file.getvalue().splitlines()
    assert lines[0] == "routers (loss 2.86): 20%, 0:26, 1:44 left"
    assert lines[-1] == "routers (loss 14.29): 100%, 2:10"
    assert len(lines) == 5
    assert "\x1b" not in file.getvalue()
    assert "\r" not in file.getvalue()


def test_what_is_done_at_once_needs_no_line(monkeypatch, clock):
    file = shown(monkeypatch, terminal=False)
    with progress.one_bar("read") as report:
        for done in range(1, 5):
            report("8,192 tokens", done, 4)
            clock[0] += 1
    assert file.getvalue() == ""


def test_long_work_tells_hours():
    assert progress.duration(59.6) == "1:00"
    assert progress.duration(3 * 3600 + 62) == "3:01:02"


def test_a_terminal_gets_bars(monkeypatch):
    file = shown(monkeypatch, terminal=True)
    with progress.progress_bars() as report:
        report("k-means", 1, 2)
        report("routers (loss 1.00)", 0, 3)
        report("routers (loss 0.50)", 3, 3)
    last = file.getvalue()
    assert "k-means" in last
    assert "routers (loss 0.50)" in last
    assert "50%" in last
    assert "100%" in last


def test_nothing_is_shown_where_nothing_was_reported(monkeypatch):
    file = shown(monkeypatch, terminal=True)
    with pytest.raises(ValueError, match="refused"), progress.progress_bars():
        raise ValueError("refused before any work")
    assert file.getvalue() == ""
