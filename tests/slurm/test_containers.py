"""Programs in containers: the commands, and jobs on the testbed.

A stand-in for Apptainer starts the jobs. With MGCC_TEST_IMAGE=mgcc.sif, the Apptainer on the PATH starts them.
"""

import os
import random
import re
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import ranks
import yaml
from jobs import dispatch, have_ended, job_of, last_step, read_log, run_without_slurm, send_signal, until_in_slurm
from same_run import assert_same_run
from sweep_files import write_sweep, write_two_node_sweep

from mgcc_dist.common.errors import UserError
from mgcc_dist.common.files import read_json
from mgcc_dist.slurm import batch, job_graph, resources, submit
from mgcc_dist.slurm.job_graph import Job
from mgcc_dist.sweep.expansion import read_sweep

FAKE = Path(__file__).parent / "fake_apptainer"


@pytest.fixture
def image(tmp_path):
    """Return the image that MGCC_TEST_IMAGE names, or one for the stand-in: it holds this Python and package."""
    if real := os.environ.get("MGCC_TEST_IMAGE"):
        return Path(real)
    path = tmp_path / "mgcc.sif"
    path.write_text(f"{sys.prefix}\n{sys.base_prefix}\n{ranks.REPOSITORY}\n")
    return path


@pytest.fixture
def container_file(tmp_path, image, monkeypatch):
    """Return a cluster file that uses the image; put the stand-in on the PATH unless MGCC_TEST_IMAGE names one."""
    if "MGCC_TEST_IMAGE" not in os.environ:
        runtime = tmp_path / "bin" / "apptainer"
        runtime.parent.mkdir()
        shutil.copy(FAKE, runtime)
        monkeypatch.setenv("PATH", f"{runtime.parent}:{os.environ['PATH']}")
    path = tmp_path / "cluster.yaml"
    path.write_text(yaml.safe_dump({"container": {"runtime": "apptainer", "image": str(image)}}))
    return path


def container_of(**keys):
    return resources.merge_resources([("x.yaml", {"container": keys})]).container


def test_apptainer_binds_folders_with_the_targets_of_links_and_no_folder_twice(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "in two words").mkdir(parents=True)
    (tmp_path / "disk").mkdir()
    (tmp_path / "data" / "link").symlink_to(tmp_path / "disk")
    keys = {"binds": ["/models:/m", "$WORK"], "args": ["--env=A=b c"]}
    found = container_of(runtime="apptainer", image="mgcc.sif", **keys)
    folders = [tmp_path / "data" / name for name in ("", "in two words", "link")]
    words = found.python(folders, scratch="/local/$USER", gpus=True)
    assert words.replace(str(tmp_path), "HERE") == (
        "apptainer exec --bind HERE/data:HERE/data --bind HERE/disk:HERE/disk "
        '--bind "/local/$USER:/local/$USER" --bind "/models:/m" --bind "$WORK:$WORK" '
        "--pwd HERE --nv '--env=A=b c' \"HERE/mgcc.sif\" python3"
    )
    assert found.python_in_batch_script(words) == words
    with pytest.raises(UserError, match=r"/a:b: cannot be bound into a container, because of its `:` or `,`"):
        found.python([Path("/a:b")], None, gpus=False)


@pytest.mark.parametrize(
    ("image", "shown"),
    [
        ("nvcr.io#lab/mgcc:1", "nvcr.io#lab/mgcc:1"),
        ("/images/mgcc.sqsh", "/images/mgcc.sqsh"),
        ("a.sqsh", "HERE/a.sqsh"),
    ],
)
def test_pyxis_gets_options_of_srun(tmp_path, monkeypatch, image, shown):
    monkeypatch.chdir(tmp_path)
    found = container_of(runtime="pyxis", image=image, args=["--no-container-mount-home"])
    words = found.python([tmp_path], scratch="/local/$USER", gpus=True)
    assert words.replace(str(tmp_path), "HERE") == (
        f'--container-image="{shown}" --container-mounts=HERE:HERE,"/local/$USER:/local/$USER" '
        "--container-workdir=HERE --no-container-mount-home python3"
    )
    assert found.python_in_batch_script(words).startswith("srun --overlap --nodes=1 --ntasks-per-node=1 --ntasks=1 ")


def test_a_batch_script_runs_programs_in_the_container_and_scontrol_outside(tmp_path):
    data = tmp_path / "data"
    (data / "shards").mkdir(parents=True)
    path = write_sweep(tmp_path, datasets={"Phantom": {"data": {"shards": str(data / "shards")}}})
    keys = {"container": {"runtime": "singularity", "image": "docker://lab/mgcc"}, "gpus": 0}
    tasks = job_graph.build_tasks(read_sweep(path), keys, "cluster.yaml")
    script = batch.batch_script(Job("x", [tasks[0]]), tmp_path / "elsewhere" / "jobs", None)
    binds = " ".join(f"--bind {folder}:{folder}" for folder in sorted([tmp_path, Path.cwd()]))
    python = f'singularity exec {binds} --pwd {Path.cwd()} "docker://lab/mgcc" python3'
    assert f" {python} -u -m submitit.core._submit " in script
    assert f"is_running && {python} -m mgcc_dist.slurm.retry $code " in script
    assert '; then ask requeue "$job"; ' in script
    assert "unset PYTHONPATH PYTHONHOME\nexport PYTHONNOUSERSITE=1\nexport OMP_NUM_THREADS=1\n" in script


def test_a_row_may_name_another_image_and_a_missing_one_is_refused_before_submission(tmp_path, monkeypatch, caplog):
    (tmp_path / "new.sif").touch()
    rows = {
        "U-Net": {"resources": {"container": {"image": str(tmp_path / "new.sif")}}},
        "MGCC": {},
        "Outside": {"resources": {"container": None}},
    }
    path = write_sweep(tmp_path, rows=rows)
    keys = {"container": {"runtime": "apptainer", "image": str(tmp_path / "old.sif")}}
    tasks = {task.run.row: task for task in job_graph.build_tasks(read_sweep(path), keys, "cluster.yaml") if task.run}
    assert tasks["Outside"].resources.container is None
    monkeypatch.setenv("PATH", str(tmp_path))
    submit.check_containers([tasks["U-Net"]])
    assert "apptainer is not on the PATH here. It must be on that of the nodes." in caplog.text
    with pytest.raises(UserError, match=r"container\.image: .*old\.sif does not exist\. Build it"):
        submit.check_containers(tasks.values())


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"imagee": "x"},
            r"x\.yaml: container: unknown key 'imagee'\. Did you mean image\? Known keys: runtime",
        ),
        ({"runtime": "apptainer"}, "container: image is missing"),
        (
            {"runtime": "aptainer", "image": "x"},
            "container.runtime: expected one of apptainer, singularity, pyxis, got 'aptainer'. Did you mean apptainer?",
        ),
        ({"runtime": "pyxis", "image": "a b"}, "container.image must be without quotes and spaces, got 'a b'"),
        ({"runtime": "pyxis", "image": 1}, "container.image must be a string, got 1"),
        ({"runtime": "pyxis", "image": "x", "binds": "/data"}, "container.binds must be a list of strings"),
        ({"runtime": "pyxis", "image": "x", "binds": ["data"]}, "container.binds must be absolute paths"),
        ({"runtime": "pyxis", "image": "x", "args": ["nv"]}, "container.args must be options with their dashes"),
    ],
)
def test_wrong_keys_of_a_container_are_named(keys, message):
    with pytest.raises(UserError, match=message):
        container_of(**keys)


def start_doctor(folder, cluster_file):
    """Start `doctor` with one more key; its job mostly waits for Slurm's signal."""
    path = folder / "doctor.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(cluster_file.read_text()) | {"scratch": str(folder / "local")}))
    options = ["--cluster-file", path, "--preset", "mgcc_demo", "--folder", folder]
    return ranks.start(ranks.forked(1), ["-m", "mgcc_dist.slurm", "doctor", *options])


@pytest.mark.slurm
def test_a_two_node_job_requeued_in_a_container_has_the_losses_and_weights_of_an_undisturbed_one_outside(
    slurm_up, phantom_data, tmp_path, image, container_file
):
    quiet, noisy = (write_two_node_sweep(tmp_path, phantom_data, name) for name in ("quiet", "noisy"))
    dispatch("submit", noisy, "--cluster-file", str(container_file))
    doctor = start_doctor(tmp_path, container_file)
    undisturbed = ThreadPoolExecutor().submit(run_without_slurm, quiet, 2)
    out, expected = tmp_path / "noisy", tmp_path / "quiet"
    job, stage, step = job_of(out, "prepare"), out / "ldm" / "autoencoder", random.Random(6).randint(3, 15)
    until_in_slurm(lambda: last_step(stage) >= step)
    send_signal(job, "USR2")
    until_in_slurm(lambda: have_ended(job, job_of(out, "report")))
    undisturbed.result()

    log = read_log(out, job)
    assert {start["container"] for start in read_json(stage / "environment.json")} == {str(image)}
    (stopped,) = map(int, re.findall(r"stopped by a signal at step (\d+)", log))
    assert f"from step {stopped} of 30 -> {stage}" in log
    assert_same_run(stage, expected / "ldm" / "autoencoder")
    assert "1 of 1 runs are finished" in dispatch("logs", noisy, "report")  # its data lie in another folder

    output, log = doctor.communicate(timeout=300)
    assert doctor.returncode == 0, output + log
    assert [line.split()[0] for line in output.splitlines()] == ["ok"] * 16 + ["doctor:"], output
    for text in ("Slurm          slurm", f", {image}", "test job       ran on n", "SIGUSR2 arrived"):
        assert text in output
    assert not list(tmp_path.glob(".mgcc-doctor-*"))
