"""What a sweep becomes on a cluster: which jobs, what they wait for, what sbatch is told; no Slurm is needed."""

import sys
from pathlib import Path

import pytest
import yaml
from sweep_files import write_sweep

from mgcc_dist.common.config import CONFIGS
from mgcc_dist.common.errors import UserError
from mgcc_dist.common.sweep_file import read_sweep
from mgcc_dist.slurm import plan, resources, submit
from mgcc_dist.slurm.plan import Job

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
    return plan.tasks_of(read_sweep(path), path, cluster, "cluster.yaml")


def with_ldm(folder):
    """The toy sweep with a diffusion model for each seed, of which MGCC needs the samples and U-Net nothing."""
    path = write_sweep(folder)
    ldm = {
        "run": LDM["run"].format(folder=folder),
        "makes": {stage: makes.format(folder=folder) for stage, makes in LDM["makes"].items()},
    }
    prepare = read(path)["datasets"]["Phantom"]["prepare"] | {"ldm": ldm}
    rows = read(path)["rows"] | {"MGCC": {"data": {"synthetic": f"{folder}/ldm_{{seed}}/samples"}}}
    return write_sweep(folder, datasets={"Phantom": {"prepare": prepare}}, rows=rows)


def read(path):
    return yaml.safe_load(path.read_text())


def test_a_run_waits_for_the_last_stage_of_what_makes_its_data_and_for_nothing_else(tmp_path):
    after = {task.name: task.after for task in tasks_of(with_ldm(tmp_path))}
    made = ("prepare/phantom/shards", "prepare/phantom/split")
    unet, mgcc = (next(key for key in after if key.startswith(f"phantom/{row}/seed_2")) for row in ("u-net", "mgcc"))
    assert after[unet] == made
    assert after[mgcc] == (*made, "prepare/phantom/ldm-gallery-seed_2")
    assert after["prepare/phantom/split"] == made[:1]
    assert after["prepare/phantom/ldm-autoencoder-seed_3"] == made
    assert after["prepare/phantom/ldm-denoiser-seed_3"] == ("prepare/phantom/ldm-autoencoder-seed_3",)
    assert set(after["report"]) == {name for name in after if "/seed_" in name and not name.startswith("prepare")}


def test_stages_go_member_by_member_and_runs_wait_for_their_own_split_only(tmp_path):
    jobs = plan.jobs_of(tasks_of(with_ldm(tmp_path)), [], 1000, "x")
    by_kind = {}
    for job in jobs:
        by_kind.setdefault(job.tasks[0].kind, []).append(job)
    autoencoder, denoiser = by_kind["ldm autoencoder"][0], by_kind["ldm denoiser"][0]
    assert [len(by_kind[f"ldm {stage}"]) for stage in LDM["makes"]] == [1, 1, 1, 1]
    assert (len(autoencoder.tasks), denoiser.matches) == (3, autoencoder.name)
    assert sorted(len(job.tasks) for job in by_kind["runs"]) == [1, 1, 1, 3]  # MGCC's by split; U-Net's in one array
    ids, numbers = {}, {}
    for number, job in enumerate(jobs, 10):
        numbers[job.name] = str(number)
        array = len(job.tasks) > 1
        ids |= {task.name: f"{number}_{k}" if array else str(number) for k, task in enumerate(job.tasks)}
    said = {job.name: plan.dependency(job, ids, numbers) for job in jobs}
    assert said[denoiser.name] == f"aftercorr:{numbers[autoencoder.name]}"
    assert said[autoencoder.name] == "afterok:11"  # the split, which waits for the shards
    gallery = numbers[by_kind["ldm gallery"][0].name]
    own = {said[job.name] for job in by_kind["runs"] if len(job.tasks) == 1}
    assert own == {f"afterok:{gallery}_{k}" for k in range(3)}
    runs = ":".join(numbers[job.name] for job in by_kind["runs"])
    assert said[jobs[-1].name] == f"afterany:{runs}"


def test_the_demo_of_table_3_is_thirteen_jobs_from_images_to_report():
    jobs = plan.jobs_of(tasks_of(CONFIGS / "sweeps" / "table_3_demo.yaml"), [], 1000, "x")
    assert [(job.tasks[0].kind, len(job.tasks), bool(job.matches)) for job in jobs] == [
        ("shards", 1, False),
        ("split", 3, False),
        *((f"ldm {stage}", 3, True) for stage in LDM["makes"]),
        *(("runs", 1, False), ("runs", 2, False)) * 3,
        ("report", 1, False),
    ]


def test_arrays_are_split_at_slurm_s_largest(tmp_path):
    tasks = [task for task in tasks_of(write_sweep(tmp_path, seeds=list(range(1, 12)))) if task.run]
    assert [len(job.tasks) for job in plan.jobs_of(tasks, [], 10, "x")] == [10, 10, 2]


def test_the_sbatch_script_is_the_golden_one(tmp_path):
    """A change in what Slurm is told must be seen: look at it, then write the new text into the file."""
    (first, *more) = [task for task in tasks_of(write_sweep(tmp_path), **CLUSTER) if task.run]
    text = submit.script(Job("tiny-runs-3", [first, *more]), tmp_path / "jobs", "afterok:11:12")
    text = text.replace(str(tmp_path), "OUT").replace(sys.executable, "PYTHON")
    assert text == (GOLDEN / "array.sbatch").read_text()


CLUSTER = {
    "partition": "gpu",
    "account": "lab",
    "qos": "scavenger",
    "constraint": "a100|h100",
    "exclude": "n[7-8]",
    "nodes": 2,
    "gpus": 4,
    "tasks_per_node": 4,
    "parallel": 5,
    "setup": ["module load cuda"],
    "extra": {"reservation": "mri", "exclusive": True},
}


@pytest.mark.parametrize(
    ("time", "minutes"), [("90", 90), ("1:30:00", 90), ("2:30", 3), ("1-0", 1440), ("1-01:30", 1530), ("0:00:30", 1)]
)
def test_time_limits_are_read_as_slurm_reads_them(time, minutes):
    assert resources.minutes(time) == minutes


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"gpu": 1}, "x.yaml: unknown resource 'gpu'; there are partition, account"),
        ({"time": 3600}, "time must be a text in quotes"),
        ({"time": "soon"}, "'soon' is no time limit"),
        ({"gpus": "one"}, "gpus is of another kind than 'one'"),
        ({"nodes": 0}, "nodes must be 1 or more, got 0"),
        ({"nodes": True}, "nodes is of another kind than True"),
        ({"setup": "module load cuda"}, "setup is of another kind"),
    ],
)
def test_wrong_resources_are_refused_with_place_and_key(keys, message):
    with pytest.raises(UserError, match=message):
        resources.read([("x.yaml", keys)])


def test_the_sweep_wins_over_the_cluster_file_which_wins_over_the_preset(tmp_path):
    rows = {"MGCC": {"resources": {"cpus": 7}}}
    (run,) = [task for task in tasks_of(write_sweep(tmp_path, seeds=[1], rows=rows), cpus=5, gpus=2) if task.run]
    assert (run.resources.cpus, run.resources.gpus, run.resources.memory_gb) == (7, 2, 1)


@pytest.mark.parametrize("name", ["one_gpu_partition", "preemptible", "eight_gpu_nodes", "cpu_only"])
def test_shipped_cluster_files_hold_resources(name):
    assert resources.read([(name, resources.cluster_file(name))]).partition
