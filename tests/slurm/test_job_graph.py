"""From a sweep to jobs: dependencies, arrays, resources and the sbatch script. Needs no Slurm."""

import os
import shlex
import sys
from pathlib import Path

import pytest
import yaml
from sweep_files import write_sweep

from mgcc_dist.common.command_line import parse
from mgcc_dist.common.config import CONFIGS, resolve
from mgcc_dist.common.errors import UserError
from mgcc_dist.common.identity import digest, identity
from mgcc_dist.methods.segment_config import SegmentConfig
from mgcc_dist.slurm import batch, job_graph, resources, submit
from mgcc_dist.slurm.job_graph import Job
from mgcc_dist.sweep import runs as sweep_runs
from mgcc_dist.sweep.expansion import read_sweep
from mgcc_dist.sweep.steps import read_program

GOLDEN = Path(__file__).parent / "golden"
LDM = {
    "run": "ldm --preset demo --data.shards {folder}/shards --data.split {folder}/split.json --sampling.seed {{seed}} "
    "--out {folder}/ldm_{{seed}} --until {{stage}}",
    "makes": {
        "autoencoder": "{folder}/ldm_{{seed}}/autoencoder/result.json",
        "denoiser": "{folder}/ldm_{{seed}}/denoiser/result.json",
        "samples": "{folder}/ldm_{{seed}}/samples/index.json",
        "gallery": "{folder}/ldm_{{seed}}/gallery.png",
    },
}


def tasks_of(path, **cluster):
    return job_graph.build_tasks(read_sweep(path), cluster, "cluster.yaml")


def with_ldm(folder):
    """Write the sweep with a diffusion model per seed; MGCC needs its samples, U-Net does not."""
    path = write_sweep(folder)
    ldm = {
        "run": LDM["run"].format(folder=folder),
        "makes": {stage: output.format(folder=folder) for stage, output in LDM["makes"].items()},
    }
    prepare = read(path)["datasets"]["Phantom"]["prepare"] | {"ldm": ldm}
    unet = read(path)["rows"]["U-Net"] | {"needs": ["shards", "split"]}
    rows = {"U-Net": unet, "MGCC": {"data": {"synthetic": f"{folder}/ldm_{{seed}}/samples"}}}
    return write_sweep(folder, datasets={"Phantom": {"prepare": prepare}}, rows=rows)


def read(path):
    return yaml.safe_load(path.read_text())


def test_runs_and_steps_wait_for_all_that_they_need(tmp_path):
    depends_on = {task.name: task.depends_on for task in tasks_of(with_ldm(tmp_path))}
    data = ("prepare/phantom/shards", "prepare/phantom/split")
    unet, mgcc = (
        next(key for key in depends_on if key.startswith(f"phantom/{row}/seed_2")) for row in ("u-net", "mgcc")
    )
    stages = tuple(f"prepare/phantom/ldm-{stage}-seed_2" for stage in LDM["makes"])
    assert depends_on[unet] == data
    assert depends_on[mgcc] == (*data, *stages)
    assert depends_on["prepare/phantom/split"] == data[:1]
    assert depends_on["prepare/phantom/ldm-denoiser-seed_2"] == (*data, stages[0])
    assert set(depends_on["report"]) == {
        name for name in depends_on if "/seed_" in name and not name.startswith("prepare")
    }


def test_steps_and_runs_carry_their_configs_in_files(tmp_path):
    tasks = [task for task in tasks_of(with_ldm(tmp_path)) if task.name != "report"]
    files = [tmp_path / "tiny" / "configs" / f"{task.name}.yaml" for task in tasks]
    assert job_graph.write_configs(tasks) == files
    for task, file in zip(tasks, files, strict=True):
        module, *words = task.command[1:]
        assert words[-2:] == ["--config", str(file)]
        assert len(words) == 2 + module.endswith("shards")  # shards has subcommands
        assert read_program((module.removeprefix("mgcc_dist."), *words)).config == task.source.config
        assert "--config" not in task.readable_command
    assert job_graph.write_configs(tasks) == []


def test_stages_depend_task_by_task_and_runs_only_on_their_own_split(tmp_path):
    jobs = job_graph.build_jobs(tasks_of(with_ldm(tmp_path)), [], 1000, "x")
    by_kind = {}
    for job in jobs:
        by_kind.setdefault(job.tasks[0].kind, []).append(job)
    autoencoder, denoiser = by_kind["ldm autoencoder"][0], by_kind["ldm denoiser"][0]
    assert [len(by_kind[f"ldm {stage}"]) for stage in LDM["makes"]] == [1, 1, 1, 1]
    assert (len(autoencoder.tasks), denoiser.corresponds_to) == (3, autoencoder.name)
    assert sorted(len(job.tasks) for job in by_kind["runs"]) == [
        1,
        1,
        1,
        3,
    ]  # one per split for MGCC, one array for U-Net
    ids, numbers = {}, {}
    for number, job in enumerate(jobs, 10):
        numbers[job.name] = str(number)
        array = len(job.tasks) > 1
        ids |= {task.name: f"{number}_{k}" if array else str(number) for k, task in enumerate(job.tasks)}
    options = {job.name: job_graph.dependency_option(job, ids, numbers) for job in jobs}
    assert options[denoiser.name] == f"aftercorr:{numbers[autoencoder.name]}"
    assert options[autoencoder.name] == "afterok:11"  # the split, which depends on the shards
    gallery = numbers[by_kind["ldm gallery"][0].name]
    per_split = {options[job.name] for job in by_kind["runs"] if len(job.tasks) == 1}
    assert per_split == {f"afterok:{gallery}_{k}" for k in range(3)}
    runs = ":".join(numbers[job.name] for job in by_kind["runs"])
    assert options[jobs[-1].name] == f"afterany:{runs}"


def test_the_demo_of_table_3_becomes_thirteen_jobs():
    jobs = job_graph.build_jobs(tasks_of(CONFIGS / "sweeps" / "table_3_demo.yaml"), [], 1000, "x")
    assert [(job.tasks[0].kind, len(job.tasks), bool(job.corresponds_to)) for job in jobs] == [
        ("shards", 1, False),
        ("split", 3, False),
        *((f"ldm {stage}", 3, True) for stage in LDM["makes"]),
        *(("runs", 1, False), ("runs", 2, False)) * 3,
        ("report", 1, False),
    ]


def test_arrays_are_split_at_the_maximum_size(tmp_path):
    tasks = [task for task in tasks_of(write_sweep(tmp_path, seeds=list(range(1, 12)))) if task.run]
    assert [len(job.tasks) for job in job_graph.build_jobs(tasks, [], 10, "x")] == [10, 10, 2]


def test_a_thousand_runs_are_two_jobs_and_each_row_is_checked_once(tmp_path, monkeypatch):
    """Checking a thousand configs one by one would take a quarter of a minute at every command."""
    resolved = []
    monkeypatch.setattr(sweep_runs, "resolve", lambda *words: resolved.append(words) or resolve(*words))
    tasks = tasks_of(write_sweep(tmp_path, seeds=list(range(1, 501)), datasets={"Phantom": {}}))
    assert len(resolved) == 2
    assert [len(job.tasks) for job in job_graph.build_jobs(tasks, [], 1001, "x")] == [1000, 1]
    runs = [task.run for task in tasks if task.run]
    assert len({run.folder for run in runs}) == len({digest(identity(run.config)) for run in runs}) == 1000
    last = parse(SegmentConfig, runs[-1].command()[2:], CONFIGS / "segment", "mgcc_demo")
    assert last == runs[-1].config


@pytest.fixture
def fake_slurm(tmp_path, monkeypatch):
    """Put an sbatch that accepts every script as job 12, and an srun, on the PATH."""
    for name, line in (("sbatch", "echo Submitted batch job 12"), ("srun", "")):
        command = tmp_path / "bin" / name
        command.parent.mkdir(exist_ok=True)
        command.write_text(f"#!/bin/sh\n{line}\n")
        command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")


def test_the_sbatch_script_matches_the_golden_file(tmp_path, fake_slurm):
    """Review changes of the script, then copy the new text into the golden file."""
    job = Job("tiny-runs-3", [task for task in tasks_of(write_sweep(tmp_path), **CLUSTER) if task.run])
    assert submit.submit_job(job, tmp_path / "jobs", "afterok:11:12") == [f"12_{index}" for index in range(6)]
    text = (tmp_path / "jobs" / "12_submission.sh").read_text()
    assert batch.batch_script(job, tmp_path / "jobs", "afterok:11:12") == text  # what --dry-run shows
    text = text.replace(str(tmp_path), "OUT").replace(sys.executable, "PYTHON")
    assert text == (GOLDEN / "array.sbatch").read_text()
    # `sbatch --test-only` checks the same options that the script sets.
    options = {shlex.split(line)[1] for line in text.splitlines() if line.startswith("#SBATCH")}
    assert set(job.resources.sbatch_options()) <= options


def test_a_log_folder_that_submitit_would_rename_is_refused(tmp_path, fake_slurm):
    job = Job("x", [task for task in tasks_of(write_sweep(tmp_path)) if task.run])
    with pytest.raises(UserError, match=r"replace %t in .*50%test/jobs"):
        submit.submit_job(job, tmp_path / "50%test" / "jobs", None)
    assert not (tmp_path / "50%test").exists()


CLUSTER = {
    "partition": "gpu",
    "account": "lab",
    "qos": "scavenger",
    "constraint": "a100|h100",
    "exclude": "n[7-8]",
    "nodes": 2,
    "nodelist": "n[1-2]",
    "licenses": "mri:1",
    "wckey": "mgcc",
    "gpus": "a100:4",
    "tasks_per_node": 4,
    "parallel": 5,
    "modules": ["cuda/12.4"],
    "setup": ["ulimit -n 4096"],
    "node_setup": ["nvidia-smi -L", "echo it's node $SLURM_NODEID"],
    "scratch": "/local/$USER",
    "srun_args": ["--mpi=none"],
    "extra": {"reservation": "mri", "exclusive": True},
}


@pytest.mark.parametrize(
    ("time", "minutes"), [("90", 90), ("1:30:00", 90), ("2:30", 3), ("1-0", 1440), ("1-01:30", 1530), ("0:00:30", 1)]
)
def test_time_limits_are_parsed_like_slurm_s(time, minutes):
    assert resources.to_minutes(time) == minutes


def test_gpus_of_a_type_are_counted():
    merged = resources.merge_resources([("x", {"gpus": "a100:2"})])
    assert merged.gpu_count == 2
    assert "--gpus-per-node=a100:2" in merged.sbatch_options()
    with pytest.raises(UserError, match="needs one rank and at most one GPU"):
        resources.merge_resources([("x", {"gpus": "a100:2", "runs_per_gpu": 2})])


def test_gres_replaces_gpus_and_no_wckey_is_sent_by_default(tmp_path):
    run = tasks_of(write_sweep(tmp_path), gres="gpu:a100:1", gpus=1)[0]
    script = batch.batch_script(Job("x", [run]), tmp_path / "jobs", None)
    assert "#SBATCH --gres=gpu:a100:1" in script
    assert "gpus-per-node" not in script
    assert "wckey" not in script


@pytest.mark.parametrize(
    ("gres", "count"),
    [
        ("gpu", 1),
        ("gpu:2", 2),
        ("gpu:a100", 1),
        ("gpu:a100:4(S:0-1)", 4),
        ("gpu:1,gpu:h100:2,nvme:9", 3),
        ("shard:8", 0),
    ],
)
def test_gpus_of_gres_are_counted(gres, count):
    assert resources.Resources(gres=gres).gpu_count == count


def test_numbers_in_the_environment_are_exported_and_only_the_job_s_own_folder_is_removed():
    job = resources.merge_resources([("x", {"environment": {"OMP_NUM_THREADS": 4}, "scratch": "/local/$USER"})])
    assert "export OMP_NUM_THREADS=4" in job.executor_parameters()["setup"]
    (removal,) = job.teardown_lines()  # `setup` may change TMPDIR
    assert removal.endswith('rm -rf "/local/$USER/mgcc-$SLURM_JOB_ID"')


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"gpu": 1}, r"x\.yaml: unknown resource 'gpu'\. Did you mean gpus\? Known resources: partition, account"),
        ({"time": 3600}, "time must be a string in quotes"),
        ({"time": "soon"}, "'soon' is not a time limit"),
        ({"gpus": "one"}, "gpus must be a number, or a type and a number like \"a100:2\", got 'one'"),
        ({"gpus": 1.5}, "gpus must be an integer, got 1.5"),
        ({"srun_args": ["mpi=none"]}, "srun_args must be options with their dashes, like --mpi=none, got 'mpi=none'"),
        ({"scratch": "/local/a b"}, "scratch must be an absolute path without quotes and spaces, got '/local/a b'"),
        ({"scratch": "local"}, "scratch must be an absolute path"),
        ({"nodes": 0}, "nodes must be at least 1, got 0"),
        ({"nodes": True}, "nodes must be an integer, got True"),
        ({"setup": "module load cuda"}, "setup must be a list"),
        ({"modules": [12.1]}, r"modules must be a list of strings, got 12\.1\. Put it in quotes"),
        ({"environment": {"A": True}}, r"environment: A must be a string, got True\. Put it in quotes"),
        ({"environment": {"A B": "1"}}, "environment: 'A B' is not a name of an environment variable"),
        ({"memory_gb": float("nan")}, "memory_gb must be positive, got nan"),
        ({"gres": "gpu:a100:2", "runs_per_gpu": 2}, "needs one rank and at most one GPU"),
        ({"gres": "gpu:2,nvme:1", "runs_per_gpu": 2}, "needs one rank and at most one GPU"),
    ],
)
def test_invalid_resources_are_rejected_with_source_and_key(keys, message):
    with pytest.raises(UserError, match=message):
        resources.merge_resources([("x.yaml", keys)])


@pytest.mark.parametrize(
    ("program", "preset", "gpus", "time"),
    [
        ("segment", "mgcc_busi", 1, "24:00:00"),
        ("segment", "unet_busi", 1, "12:00:00"),
        ("segment", "mgcc_demo", 0, "1:00:00"),
        ("segment", "{folder}/mine.yaml", 1, "12:00:00"),
        ("segment", "{folder}/without_base.yaml", 1, "24:00:00"),
        ("ldm", None, 1, "48:00:00"),
    ],
)
def test_a_new_preset_has_the_resources_of_its_program_or_base(tmp_path, program, preset, gpus, time):
    (tmp_path / "mine.yaml").write_text("base: middle.yaml")
    (tmp_path / "middle.yaml").write_text("base: unet_busi")
    (tmp_path / "without_base.yaml").write_text("")
    defaults = resources.program_defaults(program, preset and preset.format(folder=tmp_path))
    assert (defaults["gpus"], defaults["time"]) == (gpus, time)


@pytest.mark.parametrize(
    ("arguments", "gpus"),
    [
        (("ldm",), 0),  # its default preset is the demo
        (("ldm", "--preset", "busi"), 1),
        (("ldm", "--preset=busi_small"), 0),
        (("ldm", "--config", f"{CONFIGS}/ldm/demo.yaml"), 1),
        (("shards", "busi", "--root", "x", "--out", "y"), 0),
    ],
)
def test_a_step_has_the_resources_of_its_preset(arguments, gpus):
    program = read_program(arguments)
    assert resources.program_defaults(program.words[0], program.preset).get("gpus", 0) == gpus


def test_the_sweep_overrides_the_cluster_file_which_overrides_the_preset(tmp_path):
    rows = {"MGCC": {"resources": {"cpus": 7}}}
    (run,) = [task for task in tasks_of(write_sweep(tmp_path, seeds=[1], rows=rows), cpus=5, gpus=2) if task.run]
    assert (run.resources.cpus, run.resources.gpus, run.resources.memory_gb) == (7, 2, 1)


@pytest.mark.parametrize("name", ["one_gpu_partition", "preemptible", "eight_gpu_nodes", "cpu_only"])
def test_shipped_cluster_files_are_valid(name):
    assert resources.merge_resources([(name, resources.load_cluster_file(name))]).partition
