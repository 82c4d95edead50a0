"""Evaluate trained runs on any labeled shards: scores with intervals, calibration, robustness, one page.

    mgcc evaluate --runs out/runs/mgcc_1 --shards out/busi --split busi_grouped_1 --out out/evaluation

Predicts every image of the subset (or of all the shard folders), as `mgcc predict` does, and scores it at its own size.
Several runs are an ensemble: their mean probability is scored. Writes

    OUT/page.html       everything below on one page that opens offline
    OUT/images.csv      one row per image: IoU, Dice, recall, precision, HD95, ASSD, NSD, confidence, ...
    OUT/summary.json    means with 95 % intervals; by class, lesion size, data set and device; calibration; AURC
    OUT/gallery.png     chosen cases with the contours of ground truth and prediction

--uncertainty decoders, tta or ensemble adds a score per image, how well several predictions agree, and a risk-coverage
curve by that score. --fit-temperature fits a temperature to the validation images and stores it next to the weights;
--calibrated applies it.

Intervals resample patients (groups of the records), so they cover other patients, not other seeds. Choose threshold and
post-processing on validation images and apply them to others: --threshold choose --postprocess choose, then --threshold
OUT --postprocess OUT. A finished evaluation is never replaced; the same command does nothing. With several processes:
accelerate launch -m mgcc_dist.evaluate.
"""

import logging

from mgcc_dist.common.errors import run_program
from mgcc_dist.common.program import Command, Program
from mgcc_dist.common.words import counted
from mgcc_dist.evaluation.config import EvaluateConfig

logger = logging.getLogger("mgcc_dist.evaluate")


def run(config: EvaluateConfig) -> None:
    """Score the images, summarize, and write the page; return at once if that is done."""
    from mgcc_dist.common.distributed import create_accelerator, describe, raise_on_all_ranks
    from mgcc_dist.inference.evaluation import CONDITIONS, Evaluation
    from mgcc_dist.inference.evaluation_inputs import open_inputs
    from mgcc_dist.reporting.evaluation import is_finished, main_table, open_folder, write_evaluation

    accelerator = create_accelerator()
    logger.info("evaluate: %s", describe(accelerator))
    with raise_on_all_ranks():
        inputs = open_inputs(config, accelerator)
    open_folder(config.out, inputs.request, accelerator)
    if is_finished(config.out):
        logger.info("evaluate: %s already exists; nothing to do", config.out / "summary.json")
        return
    evaluation = Evaluation(
        inputs.ensemble,
        inputs.data,
        accelerator,
        config.batch,
        config.workers,
        config.tolerance,
        config.size is None,
        CONDITIONS if config.corruptions else (),
        config.seed,
        inputs.members,
        inputs.temperature,
        config.fit_temperature,
    )
    scores = evaluation.run(inputs.postprocess, inputs.threshold)
    with raise_on_all_ranks():
        if accelerator.is_main_process:
            summary = write_evaluation(config, inputs, scores, accelerator)
            print(main_table(summary))
            logger.info("evaluate: %s -> %s", counted(len(scores.rows), "image"), config.out / "page.html")


PROGRAM = Program(
    "evaluate",
    __doc__,
    Command(EvaluateConfig, run, "evaluate runs on labeled shards", __doc__, several_processes=True),
)
main = PROGRAM.main

if __name__ == "__main__":
    run_program("evaluate", main)
