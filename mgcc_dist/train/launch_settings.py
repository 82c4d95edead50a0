"""Settings that a launch file or `accelerate launch` has too: they must agree with the config, which trains the run."""

from typing import Any

from accelerate import Accelerator

from mgcc_dist.common.errors import SharedError
from mgcc_dist.common.launcher import launcher_option
from mgcc_dist.data.loader import TrainLoader
from mgcc_dist.train.config import LoopConfig
from mgcc_dist.train.weights import zero_stage

SECTIONS = {
    "optimizer": ("optimizer", "learning_rate"),
    "scheduler": ("schedule", "warmup_epochs"),
}
"""sections of a DeepSpeed file that the training loop replaces, and the keys to set instead"""


def apply_launch_settings(
    name: str, loader: TrainLoader, config: LoopConfig, accelerator: Accelerator, accumulation: int | None = None
) -> None:
    """Make Accelerate and DeepSpeed use the accumulation, clipping and batch size of the task `name`.

    `accumulation` replaces that of the config, where another number of ranks keeps the global batch size. DeepSpeed's
    settings live as long as the process, so those of its file are remembered for the next task.

    Raises:
        UserError: a launch file or an option of the launcher asks for something else, or DeepSpeed should offload an
            optimizer to the CPU that it can't, and that Accelerate would silently replace by Adam.
    """
    section = "loop" if name == "segment" else f"{name}.loop"
    asked = launcher_option("gradient_accumulation_steps")
    _require_equal(name, "gradient_accumulation_steps", asked, f"{section}.accumulation", config.accumulation)
    clipping = launcher_option("gradient_clipping")
    _require_equal(name, "gradient_clipping", clipping, f"{section}.clip_norm", config.clip_norm)
    accumulation = accumulation or config.accumulation
    accelerator.gradient_accumulation_steps = accumulation  # the launcher's 1 would replace it
    if not zero_stage(accelerator):
        return
    plugin = accelerator.state.deepspeed_plugin
    settings = plugin.deepspeed_config
    plugin.launch_file = file = getattr(plugin, "launch_file", None) or dict(settings)
    batch = loader.batch
    ours = {
        "gradient_accumulation_steps": (f"{section}.accumulation", config.accumulation),
        "gradient_clipping": (f"{section}.clip_norm", config.clip_norm),
        "train_micro_batch_size_per_gpu": ("the batch size", batch),
        "train_batch_size": ("the global batch size", batch * accumulation * accelerator.num_processes),
    }
    for key, (here, value) in ours.items():
        _require_equal(name, key, file.get(key), here, value)
    for key, keys in SECTIONS.items():
        if key in file:
            names = ", ".join(f"{section}.{each}" for each in keys)
            raise SharedError(f"{name}: the launch file has a section {key!r}. Remove it, and set {names}.")
    offload = settings["zero_optimization"].get("offload_optimizer", {}).get("device", "none")
    if offload != "none" and not config.optimizer.offloads:
        raise SharedError(
            f"{name}: {section}.optimizer is {config.optimizer.name}, but DeepSpeed can offload only Adam to the CPU. "
            "Use adam or adamw, or a launch file without offload."
        )
    settings.update({key: value for key, (_, value) in ours.items()} | {"gradient_accumulation_steps": accumulation})


def _require_equal(name: str, key: str, asked: Any, here: str, value: float) -> None:
    """Raise SharedError if the launcher asks for another value than `value`, which `here` has.

    1 accumulation step is also what Accelerate fills in if nothing was asked for.
    """
    if asked in (None, "auto", "none", "None") or float(asked) == value:
        return
    if key == "gradient_accumulation_steps" and float(asked) == 1:
        return
    raise SharedError(
        f"{name}: the launcher or its file sets {key} {asked}, but {here} is {value:g}. "
        f'Set {here} to {float(asked):g}, or remove {key} there (in a DeepSpeed file: "auto").'
    )
