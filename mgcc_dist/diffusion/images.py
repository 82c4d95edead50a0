"""Training and validation images of the generative stage. Labels are not used."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import Subset

from mgcc_dist.data.datasets import SampleDataset, subset_by_keys
from mgcc_dist.data.loader import EvalLoader, ImageTrainLoader
from mgcc_dist.data.records import ShardFolder
from mgcc_dist.data.splits import Split
from mgcc_dist.diffusion.config import DataConfig


class ImageData:
    """The training and validation images of a split, and loaders for them."""

    def __init__(self, config: DataConfig, shards: ShardFolder, split: Split, files: Sequence[Path] = ()) -> None:
        self.size = config.image_size
        counts = {"training": len(split.labeled + split.unlabeled), "held_out": len(split.validation)}
        self.info = {"dataset": shards.dataset, "split": split.name, "images": counts}
        """description for result.json"""
        self.files = files
        """split file and index of the shards, whose content a run must not change"""
        self.mirror = config.mirror
        self.workers = config.workers
        self.shards = shards
        self.train = subset_by_keys(shards, split.labeled + split.unlabeled)
        self.val = subset_by_keys(shards, split.validation)

    def train_loader(self, batch: int, seed: int, accelerator: Accelerator) -> ImageTrainLoader:
        """Return an endless loader of shuffled training images, as the unlabeled stream."""
        return ImageTrainLoader(
            labeled=None,
            unlabeled=self.train,
            batch_labeled=0,
            batch_unlabeled=batch,
            image_size=self.size,
            seed=seed,
            rank=accelerator.process_index,
            world=accelerator.num_processes,
            workers=self.workers,
            augment="mirror" if self.mirror else "none",
        )

    def train_eval_loader(self, batch: int, accelerator: Accelerator) -> EvalLoader:
        """Return a loader that yields every training image once, without augmentation, divided over the ranks."""
        return self.eval_loader(self.train, batch, accelerator)

    def val_loader(self, batch: int, accelerator: Accelerator) -> EvalLoader:
        """Return a loader that yields every validation image once, divided over the ranks."""
        return self.eval_loader(self.val, batch, accelerator)

    def eval_loader(self, dataset: SampleDataset, batch: int, accelerator: Accelerator) -> EvalLoader:
        """Return a loader that yields every image of `dataset` once, at the size of these, divided over the ranks."""
        return EvalLoader(
            dataset,
            batch=batch,
            image_size=self.size,
            rank=accelerator.process_index,
            world=accelerator.num_processes,
            workers=self.workers,
        )

    def val_examples(self, count: int) -> Tensor:
        """Return at most `count` validation images [N,1,H,W] in [-1, 1], spaced evenly over the split."""
        indices = np.linspace(0, len(self.val) - 1, min(count, len(self.val))).round().astype(int)
        loader = EvalLoader(Subset(self.val, indices.tolist()), count, self.size, rank=0, world=1, workers=0)
        return next(iter(loader.batches())).to("cpu").images
