"""`mgcc slurm doctor`: the lines for what a site lacks, from recorded outputs of Slurm 22.05. Needs no Slurm."""

import getpass
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("submitit")

from mgcc_dist.common.errors import UserError
from mgcc_dist.slurm import cluster, doctor, node_check
from mgcc_dist.slurm.__main__ import main
from mgcc_dist.slurm.container import Container
from mgcc_dist.slurm.resources import Resources

PARTITIONS = """\
PartitionName=cpu AllowGroups=ALL AllowAccounts=ALL AllowQos=ALL AllocNodes=ALL Default=YES QoS=N/A DefaultTime=NONE \
GraceTime=120 Hidden=NO MaxNodes=UNLIMITED MaxTime=1-00:00:00 PreemptMode=REQUEUE State=UP TotalCPUs=8 TotalNodes=2
PartitionName=gpu AllowGroups=ALL AllowAccounts=ALL AllowQos=ALL AllocNodes=ALL Default=NO QoS=N/A DefaultTime=NONE \
GraceTime=60 Hidden=NO MaxNodes=UNLIMITED MaxTime=UNLIMITED PreemptMode=CANCEL State=UP TotalCPUs=64 TotalNodes=3
PartitionName=old AllowGroups=ALL Default=NO MaxTime=UNLIMITED PreemptMode=OFF State=DRAIN TotalCPUs=64 TotalNodes=3
"""
CONFIG = """\
Configuration data as of 2026-11-28T00:20:00
AccountingStorageEnforce = associations,limits,qos
JobRequeue              = 1
MaxArraySize            = 1001
PreemptMode             = REQUEUE
PreemptType             = preempt/partition_prio
"""
ANSWERS = {
    "scontrol --version": "slurm-wlm 22.05.8\n",
    "scontrol ping": "Slurmctld(primary) at head is UP\n",
    "scontrol show config": CONFIG,
    "scontrol show partition": PARTITIONS,
    "sinfo %t": "mix|1\ndown*|1\n",
    "sinfo %G": "gpu:a100:4(S:0-1)\ngpu:a100:2(S:0),nvme:1\n(null)\n",
    "sacctmgr": "lab|normal,scavenger\nother|normal\n",
    "sacct": "",
}


@pytest.fixture
def answers(monkeypatch):
    """Replace Slurm's commands by recorded answers; an exception is raised. Return them by command, to change them."""
    texts = dict(ANSWERS)

    def run(*command):
        line = " ".join(command)
        keys = [key for key in texts if all(word in line for word in key.split())]
        text = texts[max(keys, key=len)]
        if isinstance(text, Exception):
            raise text
        return text

    monkeypatch.setattr(cluster, "run", run)
    monkeypatch.setattr(cluster, "check_accepted", lambda requested: None)
    monkeypatch.setattr(doctor, "REQUIRED", ())
    return texts


def site_checks(**requested):
    """Return state and text of each check of the site by name."""
    checks = doctor.check_site(Resources(**requested), cluster.settings())
    return {check.name: (check.state, f"{check.detail} {check.advice}") for check in checks}


def test_a_site_on_which_all_works(answers):
    assert doctor.check_version().state == "ok"
    checks = site_checks(account="lab", qos="scavenger")
    assert {state for state, _ in checks.values()} == {"ok"}
    assert "cpu: 1 of 2 nodes can run jobs" in checks["partition"][1]
    assert "cpu: PreemptMode=REQUEUE" in checks["preemption"][1]
    checks = site_checks(partition="gpu", account="lab", gpus="a100:4")
    assert checks["GPUs"] == ("ok", "a100:4 per node requested; nodes of gpu have: 4 x a100 ")
    answers["scontrol --version"] = "slurm 23.11.4\n"  # another packager's words
    assert doctor.check_version().state == "ok"


@pytest.mark.parametrize(
    ("changed", "requested", "name", "state", "text"),
    [
        ({}, {"partition": "gup"}, "partition", "failed", "'gup' does not exist. Choose from: cpu, gpu, old."),
        ({}, {"time": "2-00:00:00"}, "partition", "failed", "exceeds the limit 1-00:00:00 of partition cpu"),
        ({}, {"partition": "old"}, "partition", "failed", "old is DRAIN Choose another one of cpu, gpu, old"),
        ({"sinfo %t": "down*|1\ndrain|1\n"}, {}, "partition", "failed", "cpu: 0 of 2 nodes can run jobs"),
        ({}, {"account": "lba"}, "account, qos", "failed", "account lba is not one of yours (lab, other)"),
        ({}, {"account": "other", "qos": "scavenger"}, "account, qos", "failed", "qos scavenger is not one of yours"),
        ({"sacctmgr": ""}, {}, "account, qos", "failed", "you have no account, and this site requires one"),
        (
            {"scontrol show config": CONFIG.replace("associations,limits,qos", "none")},
            *({"account": "lba"}, "account, qos", "warning", "account lba is not one of yours"),
        ),
        (
            {"sacctmgr": UserError("sacctmgr: You are not running a supported accounting_storage plugin")},
            *({"account": "lab"}, "account, qos", "warning", "account lab; not checked (sacctmgr: You are not running"),
        ),
        ({"sinfo %G": "(null)\n"}, {"gpus": 1}, "GPUs", "failed", "nodes of cpu have: none Choose a partition with"),
        ({}, {"gpus": "h100:1"}, "GPUs", "failed", "1 x h100 per node requested; nodes of cpu have: 4 x a100"),
        ({}, {"gres": "gpu:a100:8"}, "GPUs", "failed", "8 x a100 per node requested"),
        (
            {"sacct": UserError("sacct: Slurm accounting storage is disabled")},
            *({}, "accounting", "warning", "Slurm accounting storage is disabled"),
        ),
        (
            *({}, {"partition": "gpu"}, "preemption", "warning"),
            "not requeued (PreemptMode=CANCEL) A run that saves within the grace time (60 s for gpu) requeues",
        ),
    ],
)
def test_what_a_site_lacks_is_named_with_what_to_do(answers, changed, requested, name, state, text):
    answers |= changed
    found = site_checks(**requested)[name]
    assert found[0] == state
    assert text in found[1]


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"scontrol --version": "slurm 20.02.7\n"}, "slurm 20.02.7 is older than 20.11"),
        ({"scontrol ping": "Slurmctld(primary) at head is DOWN\n"}, "at head is DOWN"),
        ({"scontrol ping": UserError("scontrol: no answer within a minute.")}, "no answer within a minute"),
    ],
)
def test_an_old_slurm_or_one_that_does_not_answer_ends_the_checks(answers, tmp_path, changed, text):
    answers |= changed
    *_, last = doctor.examine(None, "mgcc_demo", tmp_path, 1)
    assert (last.name, last.state) == ("Slurm", "failed")
    assert text in last.detail


def test_a_wrong_cluster_file_ends_the_checks_with_exit_code_1(tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text("partiton: gpu\n")
    with pytest.raises(SystemExit) as exit:
        main(["doctor", "--cluster-file", str(tmp_path / "mine.yaml")])
    assert exit.value.code == 1
    output = capsys.readouterr().out
    assert output.startswith("failed   cluster file")
    assert "unknown resource 'partiton'. Did you mean partition?" in output
    assert output.endswith("doctor: 1 failed\n")


def test_a_job_that_does_not_start_is_reported_with_slurms_reason_and_cancelled(answers, monkeypatch, tmp_path):
    cancelled = []
    answers["sbatch"] = "12\n"
    monkeypatch.setattr(cluster, "queue", lambda: {"12": cluster.QueueEntry("PENDING", "", "Resources")})
    monkeypatch.setattr(cluster, "cancel", cancelled.extend)
    monkeypatch.setattr(node_check, "POLL_SECONDS", 0.01)
    checks = list(doctor.examine(None, "mgcc_demo", tmp_path, 0.001))
    assert (checks[-1].name, checks[-1].state) == ("test job", "warning")
    assert "job 12 did not start within 0.001 min (Resources); cancelled" in checks[-1].detail
    assert cancelled == ["12"]
    assert not list(tmp_path.iterdir())


GOOD_LOG = """\
doctor: node n7
doctor: token
doctor: scontrol
doctor: setup
doctor: scratch /local/mgcc-12
doctor: runtime apptainer version 1.3.4
doctor: image
doctor: srun 0
"""
REPORT = {
    "python": "3.11.9",
    "executable": "/opt/venv/bin/python3",
    "versions": {"torch": "9.9.9+cu130", "numpy": None},
    "errors": {},
    "gpus": 1,
    "cuda": "13.0",
    "signal_seconds": 21.3,
}
REQUESTED = Resources(gpus=1, modules=["cuda"], scratch="/local", container=Container("apptainer", "/images/mgcc.sif"))


def report_checks(log, report, container="apptainer"):
    requested = replace(REQUESTED, container=Container(container, "/images/mgcc.sif"))
    return list(node_check.read_report(requested, Path("/shared"), log, report))


def test_a_job_in_which_all_works(monkeypatch):
    monkeypatch.setattr(node_check, "_version", lambda package: "9.9.9" if package == "torch" else None)
    checks = report_checks(GOOD_LOG, REPORT)
    assert [check.state for check in checks] == ["ok"] * 10
    assert "SIGUSR2 arrived 21 s after the start" in checks[-1].detail


def without(*keys):
    return "".join(line for line in GOOD_LOG.splitlines(keepends=True) if line.split()[1] not in keys)


def test_a_site_without_pyxis_is_named():
    log = "doctor: node n7\ndoctor: token\ndoctor: scontrol\ndoctor: setup\ndoctor: scratch x\ndoctor: image\n"
    log += "srun: unrecognized option '--container-image=/images/mgcc.sif'\ndoctor: srun 255\n"
    last = report_checks(log, {}, "pyxis")[-1]
    assert (last.name, last.state) == ("container", "failed")
    assert "Pyxis is not installed" in last.detail


@pytest.mark.parametrize(
    ("log", "report", "name", "state", "text"),
    [
        ("", {}, "shared folder", "failed", "/shared: the job ended without a log"),
        (without("token"), REPORT, "shared folder", "failed", "/shared: on node n7 does not see"),
        (without("scontrol"), REPORT, "requeue", "failed", "scontrol does not work on the node"),
        (
            "doctor: node n7\ndoctor: token\nLmod has detected the following error: cuda is unknown\n",
            *({}, "setup", "failed", "cuda is unknown"),
        ),
        (without("scratch"), REPORT, "scratch", "failed", "/local: no output"),
        (without("runtime"), REPORT, "container", "failed", "apptainer is not on the node"),
        (without("image"), REPORT, "container", "failed", "/images/mgcc.sif does not exist on the node"),
        (
            without("srun") + "slurmstepd: error: execve(): python3: No such file or directory\ndoctor: srun 2\n",
            *({}, "srun", "failed", "Python did not start (exit code 2): slurmstepd: error: execve(): python3: No"),
        ),
        (GOOD_LOG, {"python": "3.11.9", "executable": "/x"}, "Python", "failed", "while it imported the packages"),
        (
            *(GOOD_LOG, REPORT | {"errors": {"torch": "ImportError: libcudart.so.13"}}),
            *("Python", "failed", "import torch: ImportError: libcudart.so.13"),
        ),
        (GOOD_LOG, REPORT, "Python", "warning", "torch 9.9.9+cu130 (here "),
        (GOOD_LOG, REPORT | {"gpus": 0, "cuda": None}, "GPUs in job", "failed", "torch is a build for CPUs and sees"),
        (GOOD_LOG, REPORT | {"signal_seconds": None}, "signal", "failed", "no SIGUSR2 before the time limit"),
    ],
)
def test_what_does_not_work_on_a_node_is_named(log, report, name, state, text):
    (check,) = [check for check in report_checks(log, report) if check.name == name]
    assert check.state == state
    assert text in check.detail
    assert check.advice


def test_the_job_asks_for_one_gpu_of_the_type_and_reports_each_step(tmp_path):
    requested = replace(REQUESTED, nodes=4, gpus="a100:4", tasks_per_node=4, cpus=16, memory_gb=512, time="48:00:00")
    requested = replace(requested, extra={"exclusive": True, "reservation": "mri"})
    text = node_check.script(node_check.job_resources(requested), tmp_path, "123")
    for line in (
        *("--nodes=1", "--ntasks-per-node=1", "--gpus-per-node=a100:1", "--cpus-per-task=2", "--mem=4096M"),
        *("--time=2", "--signal=USR2@80", "--reservation=mri"),
    ):
        assert f"#SBATCH {line}\n" in text
    assert "requeue" not in text.replace("mgcc", "")
    assert "exclusive" not in text
    assert text.index("module load cuda") < text.index("doctor: setup") < text.index("apptainer --version")
    assert f'--nv "/images/mgcc.sif" python3 -u {tmp_path}/probe.py {tmp_path} 100 mgcc-dist torch' in text


def test_the_user_is_the_one_who_submits(answers, monkeypatch):
    commands = []
    monkeypatch.setattr(cluster, "run", lambda *words: commands.append(words) or "")
    doctor.check_account(Resources(), {})
    assert commands[0][-1] == f"user={getpass.getuser()}"
