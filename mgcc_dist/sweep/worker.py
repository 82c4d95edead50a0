"""A worker of a search: asks the study for trials, runs them, and tells it their values.

A trial runs as a process of `mgcc_dist.segment`. The worker reads its validation scores from metrics.jsonl and passes
them to the pruner. It holds a lock meanwhile; a running trial whose lock is free has lost its worker.
"""

import fcntl
import json
import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from subprocess import Popen, TimeoutExpired
from types import FrameType
from typing import Any

import optuna
import yaml
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, Trial, TrialState

from mgcc_dist.common.config import save
from mgcc_dist.common.errors import EXIT_STOPPED, UserError
from mgcc_dist.common.files import create_folder, read_json, write_json, write_text
from mgcc_dist.common.launcher import stop_with_parent
from mgcc_dist.sweep.search import Parameter, Search, grid_size

logger = logging.getLogger("mgcc_dist.search")

ATTEMPTS = 3
"""starts of a trial that crashes, after which it counts as failed"""
POLL_SECONDS = 0.5
CONFIG = "trial.yaml"
LOG = "log.txt"
LOCK = ".worker"
RUN_LOCK = ".lock"  # of the run folder, held by the process that trains
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
COUNTED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL, TrialState.RUNNING)


class SearchWorker:
    """One of the processes that share a study, and the trial that it runs."""

    def __init__(self, search: Search, number: int) -> None:
        self.search = search
        self.number = number
        self.process: Popen[bytes] | None = None
        self.stopped = False
        """whether this worker was signalled"""
        create_folder(search.folder)
        with _locked(search.folder / ".study"):
            self.study = open_study(search)

    def run(self) -> None:
        """Run trials until the study is complete.

        Raises:
            SystemExit: with EXIT_STOPPED after a signal, once the trial has saved.
        """
        previous = {number: signal.signal(number, self._stop) for number in SIGNALS}
        try:
            while claimed := self._next_trial():
                trial, lock = claimed
                with lock:
                    self._run_trial(trial)
            if self.stopped:
                logger.info("search: stopped by a signal; the next worker resumes what is unfinished")
                sys.exit(EXIT_STOPPED)
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
        self._write_best()
        write_json(self.search.marker(self.number), {"trials": len(self.study.trials)})

    def _stop(self, _number: int, _frame: FrameType | None) -> None:
        """Forward one SIGINT: Slurm may also have signalled the trial, and a second signal of a kind would end it."""
        if not self.stopped and self.process and self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        self.stopped = True

    def _next_trial(self) -> tuple[Trial, Any] | None:
        """Return a trial whose worker was killed, or else a new one, and its lock.

        None if the study has all of its trials, or if this worker was signalled.
        """
        if self.stopped:
            return None
        with _locked(self.search.folder / ".study"):
            trials = self.study.get_trials(deepcopy=False, states=COUNTED)
            for frozen in trials:
                if frozen.state == TrialState.RUNNING and (lock := _try_lock(self._folder(frozen.number) / LOCK)):
                    return Trial(self.study, frozen._trial_id), lock
            limit = self.search.config.study.trials
            if self.search.config.study.sampler == "grid":
                limit = min(limit, grid_size(self.search))
            if len(trials) >= limit:
                return None
            self.study.sampler = sampler(self.search, len(trials))
            trial = self.study.ask({key: distribution(each) for key, each in self.search.space.items()})
            lock = _try_lock(self._folder(trial.number) / LOCK)
            assert lock is not None
            return trial, lock

    def _folder(self, number: int) -> Path:
        return self.search.folder / f"trial_{number:04d}"

    def _run_trial(self, trial: Trial) -> None:
        """Run a trial to its end, until it is pruned, or until this worker is signalled."""
        folder = self._folder(trial.number)
        values = {key: decode(self.search.space[key], value) for key, value in trial.params.items()}
        shown = ", ".join(f"{key} {value}" for key, value in values.items())
        logger.info("search: trial %d: %s -> %s", trial.number, shown, folder)
        try:
            config = self.search.trial_config(trial.number, values)
        except UserError as error:  # this combination of values is impossible
            logger.warning("search: trial %d failed: %s", trial.number, error)
            self._tell(trial, state=TrialState.FAIL)
            return
        save(config, folder / CONFIG)
        while not self.stopped:
            attempts = trial.user_attrs.get("attempts", 0) + 1
            trial.set_user_attr("attempts", attempts)
            with _locked(folder / RUN_LOCK):  # the process of a killed worker may still be saving
                pass
            with (folder / LOG).open("ab") as log:
                words = [sys.executable, "-m", "mgcc_dist.segment", "--config", str(folder / CONFIG)]
                self.process = Popen(words, stdout=log, stderr=log, preexec_fn=partial(_follow_parent, os.getpid()))
            pruned = self._follow(trial, folder)
            code = self.process.wait()
            if (folder / "result.json").is_file():
                summary = read_json(folder / "result.json")["best"]["summary"]
                value = summary["corrected"][self.search.config.study.metric]
                logger.info("search: trial %d: %s %.4f", trial.number, self.search.config.study.metric, value)
                self._tell(trial, value)
                return
            if pruned:
                logger.info("search: trial %d was pruned", trial.number)
                self._tell(trial, state=TrialState.PRUNED)
                return
            if self.stopped or code == EXIT_STOPPED:
                trial.set_user_attr("attempts", attempts - 1)
            elif code > 0 or attempts >= ATTEMPTS:
                logger.warning("search: trial %d failed (exit code %d), see %s", trial.number, code, folder / LOG)
                self._tell(trial, state=TrialState.FAIL)
                return

    def _follow(self, trial: Trial, folder: Path) -> bool:
        """Report the scores of a running trial; return whether it was stopped because the pruner asked for it."""
        assert self.process is not None
        reported = len(self._frozen(trial).intermediate_values)
        while True:
            ended = self.process.poll() is not None
            scores = validation_scores(folder / "metrics.jsonl", self.search.config.study.metric)
            new = list(enumerate(scores[reported:], reported + 1))
            for step, score in new:
                trial.report(score, step)
            reported += len(new)
            if ended:
                return False
            if new and trial.should_prune():
                self.process.send_signal(signal.SIGINT)
                return True
            with suppress(TimeoutExpired):
                self.process.wait(POLL_SECONDS)

    def _tell(self, trial: Trial, value: float | None = None, state: TrialState | None = None) -> None:
        self.study.sampler = optuna.samplers.RandomSampler()  # GridSampler would stop `optimize`, which is not running
        self.study.tell(trial, value, state)

    def _frozen(self, trial: Trial) -> FrozenTrial:
        return self.study.get_trials(deepcopy=False)[trial.number]

    def _write_best(self) -> None:
        """Write the config of the best trial so far as a preset, OUT/search/best.yaml."""
        complete = self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        if not complete:
            raise UserError(f"{self.search.folder}: no trial is complete. See trial_*/{LOG}.")
        best = self.study.best_trial
        values = {key: decode(self.search.space[key], value) for key, value in best.params.items()}
        preset = self.search.as_preset(self.search.trial_config(best.number, values))
        metric = self.search.config.study.metric
        heading = f"# Trial {best.number} of {self.search.path.name}: {metric} {best.value:.4f}, the best of "
        text = yaml.safe_dump(preset, sort_keys=False)
        path = self.search.folder / "best.yaml"
        write_text(path, f"{heading}{len(complete)} complete trials.\n{text}")
        logger.info("search: best trial: %d, %s %.4f -> %s", best.number, metric, best.value, path)


def open_study(search: Search) -> optuna.Study:
    """Create or load the study of a search."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    settings, folder = search.config.study, search.folder
    storage: Any = f"sqlite:///{(folder / 'study.db').absolute()}"
    if settings.storage == "journal":
        storage = JournalStorage(JournalFileBackend(str(folder / "study.log")))
    pruners = {
        "median": optuna.pruners.MedianPruner,
        "hyperband": optuna.pruners.HyperbandPruner,
        "none": optuna.pruners.NopPruner,
    }
    return optuna.create_study(
        storage=storage,
        pruner=pruners[settings.pruner](),
        study_name="search",
        direction=settings.direction,
        load_if_exists=True,
    )


def sampler(search: Search, number: int) -> optuna.samplers.BaseSampler:
    """Return the sampler of a trial; each has its own seed, so that workers do not repeat each other's draws."""
    settings = search.config.study
    seed = settings.seed + number
    if settings.sampler == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    if settings.sampler == "tpe":
        return optuna.samplers.TPESampler(seed=seed, constant_liar=True)
    grid = {key: [encode(each, value) for value in each.values] for key, each in search.space.items()}
    return optuna.samplers.GridSampler(grid, seed=settings.seed)


def distribution(parameter: Parameter) -> BaseDistribution:
    """Return the values of a parameter as Optuna draws them."""
    if parameter.choices:
        return CategoricalDistribution([encode(parameter, value) for value in parameter.choices])
    if parameter.is_integer:
        step = int(parameter.step) if parameter.step else 1
        return IntDistribution(int(parameter.low), int(parameter.high), log=parameter.log, step=step)
    return FloatDistribution(parameter.low, parameter.high, log=parameter.log, step=parameter.step)


def encode(parameter: Parameter, value: Any) -> Any:
    """Return a choice as JSON text, because Optuna stores no lists; numbers of a range as they are."""
    return json.dumps(value) if parameter.choices else value


def decode(parameter: Parameter, value: Any) -> Any:
    """Return the value that `encode` stored."""
    return json.loads(value) if parameter.choices else value


def validation_scores(path: Path, metric: str) -> list[float]:
    """Return the scores of all validations so far, from metrics.jsonl; its last line may be incomplete."""
    scores = []
    for line in path.read_text().splitlines() if path.is_file() else ():
        with suppress(json.JSONDecodeError):
            row = json.loads(line)
            if row.get("split") == "validation":
                scores.append(row[metric])
    return scores


def _follow_parent(parent: int) -> None:
    """Let the kernel signal this process when its worker dies; receive SIGINT, which background jobs ignore."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    stop_with_parent(parent, signal.SIGTERM)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Wait for a lock on a file, and hold it."""
    with path.open("a") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        yield


def _try_lock(path: Path) -> Any:
    """Lock a file until it is closed; None if another process holds the lock."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("a")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        return None
    return file
