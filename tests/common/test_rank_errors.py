"""One rank of a process group reports an error; the others end with its exit code and print nothing."""

from pathlib import Path

import pytest
import ranks
from accelerate.state import AcceleratorState

from mgcc_dist.common.distributed import create_accelerator, raise_on_all_ranks
from mgcc_dist.common.errors import EXIT_USER_ERROR, SharedError, UserError, run_program

# FAILURE is what a rank does while the others wait for it in a collective, or do the same.
PROGRAM = """
import os, signal
import torch.distributed as dist
from mgcc_dist.common.distributed import create_accelerator
from mgcc_dist.common.errors import UserError, run_program

def main():
    create_accelerator()
    rank = dist.get_rank()
    FAILURE
    dist.barrier()

run_program("segment", main)
"""


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("failure", "codes", "lines"),
    [
        ("raise UserError('data.shards: not found')", (2, 2), ["segment: data.shards: not found"]),
        ("if rank == 0: raise UserError('out: damaged')", (2, 2), ["segment: out: damaged"]),
        ("if rank == 1: raise UserError('out: damaged')", (2, 2), ["segment [rank 1]: out: damaged"]),
        (
            "raise UserError(f'shard {rank}: damaged')",
            (2, 2),
            ["segment [rank 1]: shard 1: damaged", "segment: shard 0: damaged"],
        ),
        (
            "if rank == 0: open('/dev/full', 'wb', buffering=0).write(b'x')",
            (2, 2),
            [
                "segment: [Errno 28] No space left on device. What was saved so far is kept. "
                "Free some space and rerun the same command to resume."
            ],
        ),
        (
            "if rank == 1: os.kill(os.getpid(), signal.SIGKILL)",
            (1, -9),
            [
                "segment [rank 0]: another rank has ended (see its error; if there is none, it was killed). "
                "Rerun the same command to resume."
            ],
        ),
    ],
    ids=["all ranks", "rank 0", "rank 1", "each rank its own", "full disk", "killed"],
)
def test_one_rank_reports_what_is_wrong(failure, codes, lines):
    started = ranks.start(ranks.forked(2), ["-c", PROGRAM.replace("FAILURE", failure)])
    _, errors = started.communicate(timeout=ranks.DEADLINE)
    assert sorted(errors.splitlines()) == sorted(lines)
    assert tuple(process.exitcode for process in started.processes) == codes


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/dev/full", r"^\[Errno 28\] No space left on device\. What was saved so far is kept\. Free some space and"),
        ("/dev/null/x", r"^/dev/null/x: can't be read or written \(Not a directory\)$"),
    ],
)
def test_a_full_disk_or_refused_file_of_one_rank_is_raised_on_all(path, message):
    """So that no rank waits in a collective for one that has ended."""
    with pytest.raises(SharedError, match=message), raise_on_all_ranks():
        Path(path).write_text("x")
    with pytest.raises(AssertionError, match="a defect"), raise_on_all_ranks():
        raise AssertionError("a defect")


@pytest.mark.multiprocess
def test_a_crash_keeps_its_traceback_and_the_other_rank_adds_none():
    started = ranks.start(ranks.forked(2), ["-c", PROGRAM.replace("FAILURE", "assert rank, 'a defect'")])
    _, errors = started.communicate(timeout=ranks.DEADLINE)
    assert errors.count("Traceback (most recent call last)") == 1
    assert "AssertionError: a defect" in errors
    assert "segment [rank 1]: another rank has ended" in errors
    assert EXIT_USER_ERROR not in [process.exitcode for process in started.processes]


@pytest.mark.parametrize(
    ("variables", "line"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE: expected an integer from 0, got 'two'."),
        ({"RANK": "x"}, "RANK: expected an integer from 0, got 'x'."),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE: is set without RANK, MASTER_ADDR and MASTER_PORT."),
    ],
)
def test_impossible_variables_of_a_launcher_are_named_in_one_line(variables, line, monkeypatch, capfd):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as ended:
        run_program("segment", lambda: None)
    assert ended.value.code == EXIT_USER_ERROR
    [printed] = capfd.readouterr().err.splitlines()
    assert printed.startswith(f"segment: {line}")


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("MIXED_PRECISION", "fp7", "expected one of no, fp16, bf16, got fp7"),
        ("USE_CPU", "maybe", r"ACCELERATE_USE_CPU: Accelerate refuses an environment variable \(.*maybe\)"),
    ],
)
def test_impossible_settings_of_accelerate_are_refused(variable, value, message, monkeypatch):
    """Without this, a run with the precision fp7 trains in float32."""
    monkeypatch.setenv(f"ACCELERATE_{variable}", value)
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        with pytest.raises(UserError, match=message):
            create_accelerator()
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
