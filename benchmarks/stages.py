"""The stages of benchmarks.suite, the most valuable first."""

import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.step import TOY_SIZE, TOY_WIDTHS
from benchmarks.train_step import MIXED
from mgcc_dist.kernels import TABLE_PATH

Command = list[str]
"""a module and its options: what follows `python -m`"""


@dataclass(frozen=True)
class Context:
    """What the stages of one suite have in common."""

    out: Path
    work: Path
    """folder for what is not a result: run folders, phantom data, compiled kernels"""
    cuda: bool
    quick: bool
    shards: Path | None = None
    split: str = "busi_random_1"
    images: Path | None = None
    total_seconds: float | None = None
    modules: tuple[str, ...] = ()
    """those that the selected stages run"""

    def result(self, stage: str) -> Path:
        return self.out / f"{stage}.json"

    @property
    def size(self) -> list[str]:
        """Options of the benchmarks that take a training step."""
        if self.quick:
            return ["--size", str(TOY_SIZE), "--widths", *map(str, TOY_WIDTHS), "--batch", "1"]
        return ["--paper"] if self.cuda else []

    @property
    def table(self) -> Path:
        """The kernel table to write: on a GPU the one that `auto` reads, whose CPU rows are of quiet machines."""
        return TABLE_PATH if self.cuda and not self.quick else self.out / "measured.json"


MakeCommand = Callable[[Context, float], Command]
Needs = Callable[[Context], str | None]


def no_requirement(context: Context) -> None:
    return None


@dataclass(frozen=True)
class Stage:
    name: str
    description: str
    command: MakeCommand
    """given the seconds after which it should have ended"""
    share: float
    """of the time: a stage gets what is left, times its share over the shares of all stages still to come"""
    least: float
    """seconds; with less left the stage is skipped"""
    most: float = math.inf
    """seconds"""
    grace: float = 5
    """seconds between SIGTERM and SIGKILL, part of the stage's time"""
    needs: Needs = no_requirement
    """why the stage cannot run; None if it can"""
    background: bool = False
    """runs alongside the next stage"""
    on_request: bool = False
    """not one of the default stages"""
    writes_table: bool = False
    """its kernel table is copied to the suite's folder"""


def needs_cuda(context: Context) -> str | None:
    return None if context.cuda else "needs a CUDA device"


def needs_workloads(context: Context) -> str | None:
    return "has no toy sizes on a CPU" if context.quick and not context.cuda else None


def needs_images(context: Context) -> str | None:
    return None if context.images else "needs --images"


def environment(context: Context, seconds: float) -> Command:
    return ["benchmarks.environment", *_out(context, "environment"), "--modules", *context.modules]


def precompile(context: Context, seconds: float) -> Command:
    return ["benchmarks.precompile", *_out(context, "precompile")]


def gpu_tests(context: Context, seconds: float) -> Command:
    return ["benchmarks.gpu_tests", *_out(context, "gpu_tests")]


def kernels(operation: str) -> MakeCommand:
    def command(context: Context, seconds: float) -> Command:
        start_last = seconds - (25 if context.cuda and not context.quick else 5)  # a workload compiles its kernels
        options = ["--op", operation, "--no-compile", "--seconds", _number(start_last)]
        if context.quick:
            options += ["--quick", *([] if context.cuda else ["--dtypes", "float32"])]
        return [
            *("mgcc_dist.bench", *options, "--write-table", str(context.table)),
            *("--json", str(context.result(f"kernels_{operation}"))),
        ]

    return command


def train_step(context: Context, seconds: float) -> Command:
    command = ["benchmarks.train_step", *_out(context, "train_step"), *context.size, "--seconds", _number(seconds)]
    if context.cuda:
        return [*command, "--combinations", "--steps", "3" if context.quick else "21"]
    if context.quick:
        return [*command, "--ablate", "channels_last", "--steps", "3"]
    return [*command, "--ablate", "channels_last", "bf16", "phase_upconv", "fused_sgd", "two_forwards"]


def profile(name: str, settings: str) -> MakeCommand:
    def command(context: Context, seconds: float) -> Command:
        used = settings.split() if context.cuda else ["channels_last"]
        steps = ["--steps", "1"] if context.cuda or context.quick else []  # ten thousand events, slow to add up
        return ["benchmarks.profile_step", *_out(context, name), *context.size, *steps, "--settings", *used]

    return command


def latency(context: Context, seconds: float) -> Command:
    toy = ["--size", str(TOY_SIZE), "--widths", *map(str, TOY_WIDTHS)]
    return ["benchmarks.latency", *_out(context, "latency"), *(toy if context.quick else [])]


def training_run(context: Context, seconds: float) -> Command:
    data = ["--shards", str(context.shards), "--split", context.split] if context.shards else []
    length = ["--total-seconds", _number(context.total_seconds)] if context.total_seconds else []
    if context.quick:
        length = ["--steps", "4"]
    return [
        *("benchmarks.training_run", *_out(context, "training_run"), *context.size, *data, *length),
        *("--seconds", _number(seconds), "--folder", str(context.work / "training_run")),
        *("--step-times", str(context.result("train_step"))),
    ]


def runs_per_gpu(context: Context, seconds: float) -> Command:
    options = ["--runs", "1", "2", "--seconds", "1"] if context.quick else []
    return ["benchmarks.runs_per_gpu", *_out(context, "runs_per_gpu"), *context.size, *options]


def sampling(context: Context, seconds: float) -> Command:
    quick = "--preset demo --batch 2 --rounds 1 --steps 4 --fast-steps 2 --reference 0"
    return ["benchmarks.sampling", *_out(context, "sampling"), *(quick.split() if context.quick else [])]


def latents(context: Context, seconds: float) -> Command:
    quick = "--preset demo --rounds 1 --steps 2"
    return ["benchmarks.latents", *_out(context, "latents"), *(quick.split() if context.quick else [])]


def loader(context: Context, seconds: float) -> Command:
    options = "--rounds 1 --batches 3" if context.quick else "--rounds 2"
    return ["benchmarks.loader", *_out(context, "loader"), "--root", str(context.images), *options.split()]


def predict(context: Context, seconds: float) -> Command:
    quick = "--size 64 --count 4 --rounds 1"
    options = quick.split() if context.quick else []
    return ["benchmarks.predict", *_out(context, "predict"), "--images", str(context.images), *options]


def kernel_stage(
    operation: str, description: str, share: float, least: float, most: float, needs: Needs = no_requirement
) -> Stage:
    command = kernels(operation)
    return Stage(f"kernels_{operation}", description, command, share, least, most, needs=needs, writes_table=True)


def extra(name: str, description: str, command: MakeCommand, needs: Needs = no_requirement) -> Stage:
    return Stage(name, description, command, share=60, least=30, most=200, needs=needs, on_request=True)


_ORDERED = (
    Stage("environment", "versions, device, imports of all stages", environment, share=20, least=20, most=60),
    Stage(
        "precompile",
        "compile the Triton kernels on all cores, during the GPU tests",
        precompile,
        share=0,
        least=120,
        needs=needs_cuda,
        background=True,
    ),
    Stage("gpu_tests", "tests that need a GPU", gpu_tests, share=110, least=30, most=150, needs=needs_cuda),
    kernel_stage("mixer", "ConvMixer kernels", share=65, least=60, most=90, needs=needs_workloads),
    kernel_stage("msag", "gate kernels", share=110, least=80, most=180, needs=needs_workloads),
    kernel_stage("upconv", "up-convolution kernels", share=75, least=60, most=120),
    Stage("train_step", "settings of a complete training step", train_step, share=270, least=80, most=450),
    Stage("profile", "profile of a training step", profile("profile", MIXED), share=45, least=20, most=60),
    Stage(
        "profile_kernels",
        "profile of a training step with Triton kernels",
        profile("profile_kernels", f"{MIXED} fused_kernels"),
        share=45,
        least=20,
        most=60,
        needs=needs_cuda,
    ),
    Stage("latency", "one image through the network, next to the paper", latency, share=25, least=15, most=60),
    Stage("training_run", "full-size MGCC training", training_run, share=250, least=120),
    extra("runs_per_gpu", "several runs on one device", runs_per_gpu),
    extra("sampling", "diffusion sampling against diffusers", sampling),
    extra("latents", "denoiser training on stored latents", latents),
    extra("loader", "shard loader against image files", loader, needs_images),
    extra("predict", "inference against the eager network", predict, needs_images),
)
STAGES = {stage.name: stage for stage in _ORDERED}


def modules(stages: Iterable[Stage], context: Context) -> tuple[str, ...]:
    """Return the modules that `stages` run."""
    return tuple(dict.fromkeys(stage.command(context, 60.0)[0] for stage in stages))


def python(command: Command) -> list[str]:
    return [sys.executable, "-m", *command]


def _out(context: Context, stage: str) -> list[str]:
    return ["--out", str(context.result(stage))]


def _number(seconds: float) -> str:
    return f"{max(0.0, seconds):.0f}"
