"""The progress bar: on a terminal it fits its width, elsewhere it is plain log lines."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios

import pytest

from mgcc_dist.common import progress
from mgcc_dist.common.log import configure_logging
from mgcc_dist.common.progress import ProgressBar, track

DRAWN = """
from mgcc_dist.common.log import configure_logging, PACKAGE
from mgcc_dist.common.progress import ProgressBar
configure_logging()
with ProgressBar(30000, "encoding validation images", "images") as bar:
    bar.show(loss=0.123456, supervised=1.23456e-05, consistency=0.98765)
    bar.update(12000)
    bar._bar.refresh()
    PACKAGE.info("a line in between")
    bar.update(18000)
"""


@pytest.fixture
def clock(monkeypatch):
    """Time that a test sets, in seconds."""

    class Clock:
        now = 100.0

        def monotonic(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


@pytest.fixture
def lines(capfd):
    """The log lines so far, without time, rank and level."""
    configure_logging()

    def read():
        text = capfd.readouterr().err
        assert "\r" not in text
        return [line.partition(" INFO ")[2] for line in text.splitlines()]

    return read


def test_a_bar_of_a_terminal_of_80_columns_fits_it_and_shows_the_time_left():
    read, write = pty.openpty()
    fcntl.ioctl(write, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    environment = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "TQDM_DISABLE")}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    process = subprocess.Popen([sys.executable, "-c", DRAWN], stderr=write, env=environment)
    os.close(write)
    drawn = b""
    while True:
        try:
            drawn += os.read(read, 4096)
        except OSError:  # the other end is closed
            break
    assert process.wait() == 0
    drawings = re.split(r"[\r\n]+", drawn.decode())
    assert all(len(each.replace("\x1b[A", "")) <= 80 for each in drawings)
    assert any(
        re.match(r"encoding validation images:  40%\|.*12000/30000 \[\d\d:\d\d<\d\d:\d\d", one) for one in drawings
    )
    [logged] = [each for each in drawings if "in between" in each]
    assert re.fullmatch(r"[-\d]+ [:\d]+ \[rank 0\] INFO a line in between", logged.strip())


def test_without_a_terminal_there_is_a_plain_line_every_5_percent(clock, lines):
    with ProgressBar(200, "sampling", "images") as bar:
        for _ in range(100):
            clock.now += 2
            bar.update(2)
        bar.show(loss=0.25)
    shown = lines()
    assert shown[0] == "sampling: 10/200 images (5%), 1 images/s, 03:10 left"
    assert shown[-1] == "sampling: 200/200 images (100%), 1 images/s, took 03:20, loss=0.25"
    assert len(shown) == 20


def test_fast_work_logs_a_line_in_10_seconds_and_slow_work_one_in_3_minutes(clock, lines):
    with ProgressBar(1000, "fast", "images") as bar:
        for _ in range(100):
            clock.now += 0.25
            bar.update(10)
    assert [line.partition(",")[0] for line in lines()] == [
        "fast: 400/1000 images (40%)",
        "fast: 800/1000 images (80%)",
        "fast: 1000/1000 images (100%)",
    ]
    with ProgressBar(1000, "slow", "steps") as bar:
        for _ in range(4):
            clock.now += 100
            bar.update()
    assert [line.partition(",")[0] for line in lines()] == ["slow: 2/1000 steps (0%)", "slow: 4/1000 steps (0%)"]


def test_a_resumed_bar_computes_its_rate_from_this_start_only(clock, lines):
    with ProgressBar(100, "segment", "steps", initial=80) as bar:
        clock.now += 10
        bar.update(10)
    assert lines()[0] == "segment: 90/100 steps (90%), 1 steps/s, 00:10 left"


@pytest.mark.parametrize(("total", "share"), [(7, 4), (7, 3), (100, 50), (3, 3)])
def test_work_that_is_divided_over_the_ranks_is_counted_on_all_of_them(total, share, clock, lines):
    """Without this, two ranks that score 100 images show `50/50 images`."""
    with ProgressBar(total, "scoring", "images", share=share) as bar:
        done = []
        for _ in range(share):
            clock.now += 1
            bar.update()
            done.append(bar.done)
    assert done == [own * total // share for own in range(1, share + 1)]
    assert lines()[-1].startswith(f"scoring: {total}/{total} images (100%), {total / share:.3g} images/s, ")


def test_a_rank_without_a_share_of_the_work_shows_nothing(lines, clock):
    with ProgressBar(3, "sampling", "images", share=0):
        pass
    assert lines() == []


@pytest.mark.parametrize("variables", [{"RANK": "1"}, {"MGCC_LOG_LEVEL": "warning"}])
def test_other_ranks_and_quiet_programs_show_no_progress(variables, monkeypatch, capfd, clock):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    configure_logging()
    assert list(track(range(3), "writing", "images")) == [0, 1, 2]
    assert capfd.readouterr().err == ""
