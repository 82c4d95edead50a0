"""Resume a ZeRO checkpoint on another number of ranks, through DeepSpeed's universal checkpoints.

DeepSpeed's converter writes weights and moments of Adam, which all ranks saved in shards, as one file per parameter.
Each rank reads its new shards from these. The moving average is converted in the same way, in the place of the weights.
"""

import contextlib
import io
import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from mgcc_dist.common.distributed import raise_on_all_ranks
from mgcc_dist.common.errors import UserError
from mgcc_dist.train.ema import Ema

_SHARDS = "pytorch_model"
"""subfolder of a checkpoint with DeepSpeed's files"""
_UNIVERSAL = ".universal"
"""scratch folder next to the checkpoints"""


def load_resharded(path: Path, ema: Ema | None, accelerator: Accelerator) -> None:
    """Load the weights, the optimizer's state and the average of the checkpoint `path`. Collective.

    Raises:
        UserError: DeepSpeed can't convert the optimizer's state.
    """
    from deepspeed.utils import safe_set_full_fp32_param

    universal = path.parent / _UNIVERSAL
    with raise_on_all_ranks():
        if accelerator.is_main_process:
            shutil.rmtree(universal, ignore_errors=True)
            try:
                _convert(path, path / _SHARDS, universal / "weights")
                if ema:
                    _copy_with_averages(path, universal / "shards")
                    _convert(path, universal / "shards", universal / "average")
            except BaseException:
                shutil.rmtree(universal, ignore_errors=True)  # free its space
                raise
    engine: Any = accelerator.deepspeed_engine_wrapped.engine
    engine._config.load_universal_checkpoint = True
    try:
        engine.load_checkpoint(str(universal), tag="weights")
    finally:
        engine._config.load_universal_checkpoint = False
    _load_untrained(universal / "weights", engine.module)
    if ema:
        with ema.applied():  # where the weights are, DeepSpeed finds its shard of a parameter
            for name, parameter in engine.module.named_parameters():
                if parameter.requires_grad:
                    average = _read(universal / "average" / "zero" / name / "fp32.pt")
                    shape = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3 leaves the module empty tensors
                    safe_set_full_fp32_param(parameter, average.view(shape).to(accelerator.device))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(universal, ignore_errors=True)


def _convert(checkpoint: Path, shards: Path, out: Path) -> None:
    """Run DeepSpeed's converter, without what it prints."""
    from deepspeed.checkpoint import ds_to_universal

    options = Namespace(
        input_folder=str(shards),
        output_folder=str(out),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            ds_to_universal.main(options)
    except KeyError as error:
        if error.args != ("exp_avg",):
            raise
        raise UserError(
            f"{checkpoint}: was saved by another number of ranks, and DeepSpeed converts only the state of adam and "
            "adamw. Resume it on that number of ranks."
        ) from error


def _copy_with_averages(checkpoint: Path, out: Path) -> None:
    """Copy DeepSpeed's files with the shards of the average in place of the fp32 weights."""
    out.mkdir(parents=True)
    for file in sorted((checkpoint / _SHARDS).iterdir()):
        if not file.name.endswith("_optim_states.pt"):
            shutil.copy(file, out)
            continue
        rank = int(file.name.partition("zero_pp_rank_")[2].partition("_")[0])
        averages = load_file(checkpoint / f"ema-{rank:05d}.safetensors")
        saved = torch.load(file, map_location="cpu", weights_only=False)
        state = saved["optimizer_state_dict"]
        key = "fp32_flat_groups" if "fp32_flat_groups" in state else "single_partition_of_fp32_groups"
        state[key] = [averages[str(i)][: shard.numel()] for i, shard in enumerate(state[key])]  # without padding
        torch.save(saved, out / file.name)


def _read(path: Path) -> torch.Tensor:
    """Return a converted tensor, which ZeRO-1 and -2 save in a dictionary."""
    content = torch.load(path, map_location="cpu", weights_only=False)
    return content["param"] if isinstance(content, dict) else content


def _load_untrained(universal: Path, module: torch.nn.Module) -> None:
    """Load buffers and parameters that are not trained, which universal checkpoints leave out."""
    file = next(iter(sorted(universal.glob("*model_states.pt"))))
    saved = torch.load(file, map_location="cpu", weights_only=False)["module"]
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    for name, tensor in module.state_dict().items():
        if name not in trained and name in saved and saved[name].shape == tensor.shape:
            tensor.copy_(saved[name])
