"""The address at which the ranks of a Slurm job meet."""

import socket

import pytest

from mgcc_dist.common.distributed import set_distributed_environment

VARIABLES = {
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_JOB_ID": "70012",
}


@pytest.fixture
def environment(monkeypatch):
    """Set Slurm's variables of a job step, and return a dictionary that stands for `os.environ`."""
    variables = dict(VARIABLES)
    monkeypatch.setattr("os.environ", variables)
    return variables


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("gpu-[007-010,12]", "gpu-007"),
        ("a[3,5],b1", "a3"),
        ("rack[1-2]node[10-11].site", "rack1node10.site"),
    ],
)
def test_ranks_meet_on_the_first_node_of_the_step(environment, monkeypatch, nodes, first):
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: [])
    environment["SLURM_STEP_NODELIST"] = nodes
    set_distributed_environment()
    expected = {"MASTER_ADDR": first, "MASTER_PORT": "20012", "RANK": "3", "LOCAL_WORLD_SIZE": "2"}
    assert expected.items() <= environment.items()


def test_without_scontrol_ranks_meet_where_srun_was_started(environment, monkeypatch, tmp_path):
    def unknown_name(*_):
        raise OSError

    monkeypatch.setattr(socket, "getaddrinfo", unknown_name)
    environment |= {
        "SLURM_STEP_NODELIST": "n[1-2]",
        "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.7",
        "PATH": str(tmp_path),
    }
    set_distributed_environment()
    assert environment["MASTER_ADDR"] == "10.0.0.7"
