"""Kill two-node jobs at random moments, and compare their final weights with those of undisturbed jobs by sha256.

    eval "$(slurm/testbed/up)"
    python -m benchmarks.kill_trials --rounds 5 --kills 5 --out out/kills

Runs on the Slurm of slurm/testbed. A round trains a segmentation network and a diffusion model at the same time, each
on two ranks, and kills each of them `--kills` times: by SIGUSR2 and SIGTERM of Slurm, by SIGKILL of a rank or of srun,
and by SIGKILL of a slurmd, which starts again seconds later. The moments are uniform in half of the time that an
undisturbed round takes. OUT/kills.json lists every kill.
"""

import argparse
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import psutil
import yaml

from mgcc_dist.common.environment import benchmark_header
from mgcc_dist.common.files import read_json, sha256_of, write_json
from mgcc_dist.data.convert import write_shards
from mgcc_dist.data.readers.phantoms import Phantoms
from mgcc_dist.data.splits import make_split, write_split
from mgcc_dist.train.metrics_logger import read_rows

KINDS = ("USR2", "TERM", "rank", "srun", "slurmd")
SIZE = 32
LDM: dict[str, dict[str, Any]] = {
    "data": {"phantom": 40, "image_size": 16, "workers": 0},
    "autoencoder": {"channels": [4, 4, 8], "layers": 1, "latent_channels": 2, "norm_groups": 4, "batch": 2},
    "denoiser": {"channels": [8, 8], "attention": [False, True], "layers": 1, "norm_groups": 4, "head_channels": 4}
    | {"batch": 2},
}


@dataclass
class Kill:
    round: int
    job: str
    kind: str
    seconds: float
    """after the job's latest start"""
    step: int
    """latest step in the metrics"""
    same: bool = False
    """the job's final weights are those of the undisturbed one"""


@dataclass
class Victim:
    """A job that is killed."""

    name: str
    id: str
    folders: list[Path]
    """its run folders, in the order in which they train"""
    left: int
    """kills to come"""
    started: float | None = None
    """time at which its latest start was first seen"""
    due: float = 0.0
    restarts: int = 0
    """of the start that will be killed next"""
    sending: list[subprocess.Popen[bytes]] = field(default_factory=list)
    """scancel repeats a signal for a minute while the job is requeued"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the jobs and of kills.json")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--kills", type=int, default=5, help="of each of the two jobs of a round")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    state = Path(os.environ["SLURM_CONF"]).parent
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "split.json").is_file():
        shards = write_shards(Phantoms(count=40, seed=0, size=SIZE), out / "shards")
        split = make_split(shards.records, seed=0, validation=10, labeled=15, grouped=False, name="split")
        write_split(out / "split.json", split)
    chance = random.Random(options.seed)
    begin = time.monotonic()
    _, expected = run_round(out, 0, options.steps, 0, 0.0, chance, state)
    longest = time.monotonic() - begin
    kills: list[Kill] = []
    for number in range(1, options.rounds + 1):
        done, weights = run_round(out, number, options.steps, options.kills, longest, chance, state)
        for kill in done:
            kill.same = weights[kill.job] == expected[kill.job]
        kills += done
        same = sum(kill.same for kill in kills)
        print(f"round {number}: the same weights after {same} of {len(kills)} kills", flush=True)
        header = benchmark_header("benchmarks.kill_trials")
        listed = {"sha256": expected, "rows": count_by_kind(kills), "kills": [asdict(kill) for kill in kills]}
        write_json(out / "kills.json", header | listed)


def count_by_kind(kills: list[Kill]) -> dict[str, dict[str, int]]:
    """Return, per kind, the number of kills, and of those after which the weights were the same."""
    groups = {kind: [kill.same for kill in kills if kill.kind == kind] for kind in KINDS}
    return {kind: {"kills": len(same), "same_weights": sum(same)} for kind, same in groups.items()}


def run_round(
    out: Path, number: int, steps: int, count: int, longest: float, chance: random.Random, state: Path
) -> tuple[list[Kill], dict[str, list[str]]]:
    """Run both jobs with `count` kills each; return the kills, and per job the sha256 of its final weights."""
    sweep = write_sweep(out, number, steps)
    subprocess.run([sys.executable, "-m", "mgcc_dist.slurm", "submit", sweep], check=True, stdout=subprocess.DEVNULL)
    folder = out / f"round_{number}"
    jobs = read_json(folder / "jobs.json")["jobs"]
    (run,) = (name for name in jobs if name.startswith("phantom/"))
    (step,) = (name for name in jobs if name.startswith("prepare/"))
    stages = [folder / "ldm" / stage for stage in ("autoencoder", "denoiser")]
    victims = [Victim("segment", jobs[run], [folder / run], count), Victim("ldm", jobs[step], stages, count)]
    kills: list[Kill] = []
    while victims_left := [victim for victim in victims if victim.id in queue()]:
        start_requeued_jobs()
        for victim in victims_left:
            if kill := kill_if_due(victim, longest, chance, state):
                kills.append(kill)
                kill.round = number
                print(f"round {number}: {kill.job} killed by {kill.kind} after step {kill.step}", flush=True)
        time.sleep(0.5)
    for victim in victims:
        stop_sending(victim)
    files = {victim.name: [path / "last" / "model.safetensors" for path in victim.folders] for victim in victims}
    return kills, {name: [sha256_of(path) if path.is_file() else "" for path in paths] for name, paths in files.items()}


def kill_if_due(victim: Victim, longest: float, chance: random.Random, state: Path) -> Kill | None:
    """Kill a job if its moment has come, and choose the next moment when it has restarted."""
    now = time.monotonic()
    shown = slurm("scontrol", "show", "job", "-o", victim.id)
    if not victim.left or " JobState=RUNNING " not in shown:
        return None
    restarts = int(re.search(r" Restarts=(\d+)", shown).group(1))  # type: ignore[union-attr]
    if victim.started is None:
        if restarts < victim.restarts:
            return None
        stop_sending(victim)
        victim.started, victim.restarts = now, restarts
        victim.due = now + chance.uniform(0, longest / 2)
    if now < victim.due:
        return None
    kind = chance.choice(KINDS)
    if not send(kind, victim, chance, state):
        return None
    victim.left -= 1
    rows = [row for folder in victim.folders for row in read_rows(folder / "metrics.jsonl")[-1:]]
    kill = Kill(0, victim.name, kind, round(now - victim.started, 1), rows[-1]["step"] if rows else 0)
    if kind == "slurmd":  # the same start continues
        victim.due = now + chance.uniform(0, longest / 2)
    else:
        victim.started, victim.restarts = None, restarts + 1
    return kill


def send(kind: str, victim: Victim, chance: random.Random, state: Path) -> bool:
    """Kill by one of KINDS; return whether there was anything to kill."""
    if kind in ("USR2", "TERM"):
        victim.sending.append(subprocess.Popen(["scancel", f"--signal={kind}", victim.id], stderr=subprocess.DEVNULL))
        return True
    if kind == "slurmd":
        node = chance.choice(["n1", "n2"])
        daemon = psutil.Process(int((state / "pid" / f"slurmd-{node}").read_text()))
        daemon.kill()
        daemon.wait(30)
        time.sleep(chance.uniform(0, 5))
        subprocess.run(["slurmd", "-N", node], check=True, env=os.environ | {"PATH": f"{os.environ['PATH']}:/usr/sbin"})
        return True
    found = [process for name, process in processes(victim) if name == kind]
    for process in [chance.choice(found)] if kind == "rank" and found else found:
        process.kill()
    return bool(found)


def processes(victim: Victim) -> Iterator[tuple[str, psutil.Process]]:
    """Yield ("rank", ...) and ("srun", ...) for the processes of the job's current start."""
    for process in psutil.process_iter():
        try:
            words = process.cmdline()
            kind = "srun" if process.name() == "srun" else "rank" if "submitit.core._submit" in words else ""
            if not kind:
                continue
            environment = process.environ()
        except psutil.Error:
            continue
        start = environment.get("SLURM_JOB_ID"), int(environment.get("SLURM_RESTART_COUNT", 0))
        if start == (victim.id, victim.restarts):
            yield kind, process


def stop_sending(victim: Victim) -> None:
    while victim.sending:
        process = victim.sending.pop()
        process.kill()
        process.wait()


def write_sweep(out: Path, number: int, steps: int) -> Path:
    """Write the sweep of a round: MGCC, and independently a diffusion model, each on two nodes."""
    folder = out / f"round_{number}"
    loop = {"steps": steps, "log_every": 1, "checkpoint_every": 7}
    config = out / "ldm.yaml"
    networks = {stage: keys | {"loop": loop} if stage != "data" else keys for stage, keys in LDM.items()}
    config.write_text(yaml.safe_dump(networks, sort_keys=False))
    content: dict[str, Any] = {
        "title": "Kills",
        "out": str(folder),
        "preset": "mgcc_demo",
        "seeds": [1],
        "resources": {"cpus": 1, "nodes": 2, "attempts": 99, "environment": {"OMP_NUM_THREADS": "1"}},
        "defaults": {
            "data": {"shards": str(out / "shards"), "split": str(out / "split.json"), "synthetic": None}
            | {"image_size": SIZE, "workers": 0, "batch_labeled": 2, "batch_unlabeled": 2},
            "network": {"widths": [4, 8, 8, 8]},
            "loop": loop | {"epochs": None, "validate_every": 10},
        },
        "datasets": {
            "Phantom": {
                "prepare": {
                    "ldm": {
                        "run": f"ldm --config {config} --out {folder / 'ldm'} --until denoiser",
                        "makes": str(folder / "ldm" / "denoiser" / "result.json"),
                        "resources": {"cpus": 1, "gpus": 0, "nodes": 2, "attempts": 99, "time": "1:00:00"}
                        | {"environment": {"OMP_NUM_THREADS": "1"}},
                    }
                },
                "needs": [],
            }
        },
        "rows": {"MGCC": {}},
    }
    path = out / f"round_{number}.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def queue() -> dict[str, tuple[str, str, str]]:
    """Return state, reason and time of submission or requeue of every job."""
    rows = (line.split("|") for line in slurm("squeue", "-h", "-o", "%i|%T|%r|%V").splitlines())
    return {job: (state, reason, since) for job, state, reason, since in rows}


def start_requeued_jobs() -> None:
    """Skip most of Slurm's two-minute delay of requeued jobs (slurm/testbed/README.md)."""
    for job, (state, reason, since) in queue().items():
        is_late = datetime.fromisoformat(since) < datetime.now() - timedelta(seconds=2)
        if (state, reason) == ("PENDING", "BeginTime") and is_late:
            slurm("scontrol", "update", f"JobId={job}", "StartTime=now")


def slurm(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60).stdout


if __name__ == "__main__":
    main()
