"""Which rank of a run is named when it makes no progress."""

import os
import socket
import time
from dataclasses import asdict
from types import SimpleNamespace

import pytest

from mgcc_dist.common.files import write_json
from mgcc_dist.slurm.status import stalled
from mgcc_dist.train import heartbeat
from mgcc_dist.train.heartbeat import FOLDER, Heartbeat, RankState, describe_ranks, first_alive, read_states

NOW = time.time()


@pytest.fixture(autouse=True)
def frozen_time(monkeypatch):
    monkeypatch.setattr(time, "time", lambda: NOW)


def rank(number, step, phase, since=10.0, written=0.0, pid=None, host=None):
    """Return a rank's state; `since` and `written` are in seconds before now, the process is this one."""
    return RankState(number, host or socket.gethostname(), pid or os.getpid(), step, phase, NOW - since, NOW - written)


WAITS = [rank(0, 7, "training", 99), rank(2, 7, "training", 98)]


@pytest.mark.parametrize(
    ("state", "text"),
    [
        (rank(1, 7, "waiting for a batch", 80), "has been in step 8, waiting for a batch for 0:01:20"),
        (rank(1, 7, "training", 90), "has been in step 8, training for 0:01:30"),
        (rank(1, 6, "saving a checkpoint", 70), "has been in step 7, saving a checkpoint for 0:01:10"),
        (rank(1, 7, "training", 80, pid=2**22 + 1), "has ended, last seen in step 8, training"),
        (rank(1, 7, "training", 80, 75, host="n7"), "has not answered for 0:01:15, last seen in step 8, training"),
    ],
)
def test_the_rank_that_the_others_wait_for_is_named(state, text):
    states = [WAITS[0], state] if state.phase == "training" and text.startswith("has been") else [*WAITS, state]
    described = describe_ranks(states, own=0)
    assert described.startswith(f"rank 1 (process {state.pid} on {state.host}) ")
    assert described.endswith(text)


def test_ranks_of_several_nodes_that_all_wait_may_have_lost_their_network():
    states = [*WAITS, rank(1, 7, "training", 97, host="n7")]
    assert describe_ranks(states, own=0).endswith(", like all others: the network between the nodes may be cut")
    states[1] = rank(2, 7, "validating", 98)
    assert describe_ranks(states, own=0).endswith("validating for 0:01:38")


@pytest.mark.parametrize(
    ("states", "text"),
    [
        ([], ""),
        ([rank(0, 7, "training"), rank(1, 7, "training")], ""),
        (
            [rank(0, 7, "training", 900, 700), rank(1, 7, "training", 900, 650)],
            "stalled: no rank has answered for 0:10:50",
        ),
        ([rank(0, 7, "training", 2000), rank(1, 7, "waiting for a batch", 2001)], "stalled: rank 1 ("),
    ],
)
def test_status_shows_a_run_without_progress_as_stalled(states, text, tmp_path):
    for state in states:
        write_json(tmp_path / FOLDER / f"rank_{state.rank}.json", asdict(state))
    assert read_states(tmp_path) == states
    assert stalled(tmp_path).startswith(text) if text else stalled(tmp_path) == ""


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_removes_the_states_of_ranks_that_it_no_longer_has(tmp_path, ranks, monkeypatch):
    monkeypatch.setattr(heartbeat, "_set_timeout", lambda _: None)
    for state in (rank(0, 7, "training"), rank(1, 7, "training"), rank(3, 7, "training", pid=2**22 + 1)):
        write_json(tmp_path / FOLDER / f"rank_{state.rank}.json", asdict(state))
    accelerator = SimpleNamespace(num_processes=ranks, process_index=0, is_main_process=True)
    with Heartbeat(tmp_path, 0, 30, accelerator):
        assert [state.rank for state in read_states(tmp_path)] == [0, 1][: ranks if ranks > 1 else 0]


def test_the_first_rank_that_still_runs_warns():
    ended = rank(0, 7, "training", pid=2**22 + 1)
    frozen = rank(1, 7, "training", 900, 70, host="n7")
    assert first_alive([ended, frozen, rank(2, 7, "training", 900), rank(3, 7, "training")], default=3) == 2
    assert first_alive([], default=3) == 3


def test_a_heartbeat_that_is_damaged_or_removed_meanwhile_is_ignored(tmp_path):
    (tmp_path / FOLDER).mkdir()
    (tmp_path / FOLDER / "rank_0.json").write_text('{"rank": 0')
    (tmp_path / FOLDER / "rank_1.json").write_text("{}")
    (tmp_path / FOLDER / "rank_2.json").symlink_to(tmp_path / "removed")
    assert read_states(tmp_path) == []
