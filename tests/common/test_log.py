"""Log lines of the programs: time, rank, level; on stderr."""

import logging
import re
from pathlib import Path

import pytest

from mgcc_dist.common.errors import EXIT_USER_ERROR, run_program
from mgcc_dist.common.log import configure_logging

logger = logging.getLogger("mgcc_dist.test")


def log_one_of_each():
    logger.debug("some detail")
    logger.info("a step")
    logger.warning("a trap")


@pytest.mark.parametrize(
    ("rank", "level", "shown"),
    [
        ("0", None, ["INFO a step", "WARNING a trap"]),
        ("1", None, ["WARNING a trap"]),
        ("0", "warning", ["WARNING a trap"]),
        ("0", "DEBUG", ["DEBUG some detail", "INFO a step", "WARNING a trap"]),
        ("1", "debug", ["DEBUG some detail", "INFO a step", "WARNING a trap"]),
        ("0", "error", []),
    ],
)
def test_a_line_has_time_and_rank_and_other_ranks_show_warnings_only(rank, level, shown, monkeypatch, capfd):
    monkeypatch.setenv("RANK", rank)
    if level:
        monkeypatch.setenv("MGCC_LOG_LEVEL", level)
    configure_logging()
    configure_logging()  # a second call does not double the lines
    log_one_of_each()
    captured = capfd.readouterr()
    assert captured.out == ""
    lines = [
        re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d \[rank (\d)\] (.*)", line) for line in captured.err.splitlines()
    ]
    assert [(line[1], line[2]) for line in lines] == [(rank, one) for one in shown]


def test_a_newline_in_a_file_name_is_escaped(capfd):
    configure_logging()
    logger.info("%s: skipped %d files", Path("a\nb.png"), 2)
    logger.info("two\nlines")
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 3
    assert lines[0].endswith("INFO a\\nb.png: skipped 2 files")


def test_a_level_that_is_given_wins_over_the_environment(monkeypatch, capfd):
    monkeypatch.setenv("MGCC_LOG_LEVEL", "error")
    configure_logging("info")
    log_one_of_each()
    assert "a step" in capfd.readouterr().err


def test_an_unknown_level_in_the_environment_ends_a_program_in_one_line(monkeypatch, capfd):
    monkeypatch.setenv("MGCC_LOG_LEVEL", "loud")
    with pytest.raises(SystemExit) as ended:
        run_program("shards", log_one_of_each)
    assert ended.value.code == EXIT_USER_ERROR
    assert capfd.readouterr().err == (
        "shards: MGCC_LOG_LEVEL: 'loud' is not a log level. Use one of debug, info, warning, error.\n"
    )


def test_importing_the_library_shows_no_log_lines(capfd):
    logger.info("a step")
    assert capfd.readouterr().err == ""
