"""Train one segmentation run: any method, any network, one split, one seed.

    mgcc segment --preset mgcc_busi --data.shards out/busi --out out/runs/mgcc_1                           # one process
    accelerate launch -m mgcc_dist.segment --preset mgcc_busi --data.shards out/busi --out out/runs/mgcc_1  # several

Writes `best/model.safetensors` and `last/model.safetensors` (read by `mgcc predict`) and `result.json` with the scores
of every validation image (read by `mgcc report`). Rerun the same command to resume.
"""

import logging
import time
from dataclasses import asdict
from pathlib import Path

from mgcc_dist.common.config import CONFIGS
from mgcc_dist.common.errors import run_program
from mgcc_dist.common.program import Command, Program
from mgcc_dist.methods.segment_config import SegmentConfig

logger = logging.getLogger("mgcc_dist.segment")


def run(config: SegmentConfig) -> None:
    """Train and score one run, from shards to result.json; return at once if that exists."""
    from accelerate.utils import set_seed

    from mgcc_dist.common.distributed import create_accelerator, describe, raise_on_all_ranks
    from mgcc_dist.data.records import ShardFolder, index_file
    from mgcc_dist.data.shard_cache import open_cache
    from mgcc_dist.data.splits import locate_split, read_split
    from mgcc_dist.models.pretrained import backbone_weights
    from mgcc_dist.segmentation.task import SegmentationTask
    from mgcc_dist.train.initial_weights import describe_initial_weights, existing_weights
    from mgcc_dist.train.loop import fit
    from mgcc_dist.train.run_folder import check_inputs, hash_inputs, open_run_folder, write_result
    from mgcc_dist.train.saved_run import is_finished, read_result
    from mgcc_dist.train.trackers import track_images

    began = time.monotonic()
    accelerator = create_accelerator(config.loop.precision)
    folder = Path(config.out)
    open_run_folder(folder, config, accelerator, config.fixed_length)
    logger.info("segment: %s", describe(accelerator))
    finished = is_finished(folder)
    if not finished:  # before the split, which is made from the shards
        cache = open_cache(config.data.cache, config.data.cache_gb)
        data = ShardFolder.open(config.data.shards, accelerator.is_local_main_process, cache)
    sources = [config.data.shards, config.data.synthetic, config.data.synthetic_labeled]
    sources += [*config.data.similar, *config.data.external]
    split_file = locate_split(config.data.split)
    inputs = [split_file, *(index_file(source) for source in sources if source)]
    inputs += existing_weights(config.init, "best")
    if finished:
        inputs = [file for file in inputs if isinstance(file, Path)]  # without a network
        inputs += backbone_weights(config.network)
        check_inputs(folder, read_result(folder).get("inputs", {}), hash_inputs(inputs))
        logger.info("segment: %s already exists; nothing to do", folder / "result.json")
        return

    split = read_split(split_file)
    set_seed(config.loop.seed)
    task = SegmentationTask(config, data, split, accelerator, cache)
    encoder = backbone_weights(config.network)  # the task may have downloaded it
    state = fit(task, config.loop, folder, accelerator, [*inputs, *encoder])

    best = {"step": state.best["step"], "epoch": state.best["epoch"]} | task.score_saved(folder, "best", accelerator)
    epoch = round(task.loader.epoch_of(state.offsets), 4)
    last = {"step": state.step, "epoch": epoch} | task.score_saved(folder, "last", accelerator)
    for scored in (last, *last.get("external", {}).values()):
        del scored["images"]  # half of the file, which nothing reads; `mgcc evaluate --weights last` has them
    result = {
        "program": "segment",
        "method": config.method.name,
        "network": asdict(config.network),
        "dataset": data.dataset,
        "dataset_sha256": data.content_sha256,
        "split": split.name,
        "seed": config.loop.seed,
        "images": task.counts,
        "synthetic": task.synthetic,
        **({"synthetic_labeled": task.synthetic_labeled} if task.synthetic_labeled else {}),
        "init": describe_initial_weights(config.init, state.inputs),
        "encoder": {"weights": str(encoder[0]), "sha256": state.inputs[str(encoder[0])]} if encoder else None,
        "inputs": state.inputs,
        "parameters": task.parameters(),
        "best": best,
        "last": last,
        "steps": state.step,
        "seconds": {"training": round(state.seconds, 1), "last_start": round(time.monotonic() - began, 1)},
    }
    write_result(folder, result, accelerator)
    with raise_on_all_ranks():
        if accelerator.is_main_process:
            track_images(config.loop.tracker, folder, state.step, {"best": folder / "best" / "gallery.png"})
    iou = best["summary"]["corrected"]["iou"]
    logger.info("segment: IoU %.2f %% at the best step -> %s", 100 * iou, folder / "result.json")


PROGRAM = Program(
    "segment",
    __doc__,
    default=Command(
        SegmentConfig,
        run,
        "train one segmentation run",
        __doc__,
        presets=CONFIGS / "segment",
        default_preset="mgcc_demo",
        several_processes=True,
        config_files=True,
        common=(
            *("out", "init", "data.shards", "data.split", "data.labels", "data.synthetic"),
            *("data.image_size", "data.fit", "data.augment"),
            *("data.batch_labeled", "data.batch_unlabeled"),
            *("loop.epochs", "loop.steps", "loop.learning_rate", "loop.precision", "loop.seed"),
            *("network", "method", "kernels"),
        ),
    ),
)
main = PROGRAM.main

if __name__ == "__main__":
    run_program("segment", main)
