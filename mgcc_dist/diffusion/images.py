"""Training and validation images of the generative stage. Masks are used only by a denoiser with `masks`."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import Subset

from mgcc_dist.common.errors import UserError
from mgcc_dist.data.datasets import SampleDataset, subset_by_keys
from mgcc_dist.data.loader import EvalLoader, ImageTrainLoader, Ranks, Stream
from mgcc_dist.data.records import ShardFolder
from mgcc_dist.data.sample import Sample
from mgcc_dist.data.splits import Split
from mgcc_dist.diffusion.config import DataConfig, Masks


class ImageData:
    """The training and validation images of a split, and loaders for them."""

    def __init__(self, config: DataConfig, shards: ShardFolder, split: Split, files: Sequence[Path | str] = ()) -> None:
        self.size = config.image_size
        counts = {"train": len(split.labeled + split.unlabeled), "val": len(split.validation)}
        self.info = {"dataset": shards.dataset, "split": split.name, "images": counts}
        """description for result.json"""
        self.files = files
        """split file and index of the shards, whose content a run must not change"""
        self.mirror = config.mirror
        self.workers = config.workers
        self.shards = shards
        self.split = split
        self.shard_window = config.shard_window
        by_shard = config.shard_window is not None
        self.train = subset_by_keys(shards, split.labeled + split.unlabeled, by_shard)
        self.val = subset_by_keys(shards, split.validation, by_shard)

    def masked(self, masks: Masks) -> Subset[Sample]:
        """Return the training images whose masks a denoiser with `masks` may see.

        Raises:
            UserError: there are none, or a labeled image of the split has no mask.
        """
        has_mask = {record.key for record in self.shards.records if record.labeled}
        keys = {"none": (), "labeled": self.split.labeled, "all": self.split.train}[masks]
        missing = [key for key in self.split.labeled if key not in has_mask]
        if masks == "labeled" and missing:
            raise UserError(
                f"denoiser.masks: {len(missing)} of the {len(keys)} labeled images of split {self.split.name} have no "
                f"mask, the first is {missing[0]!r}. Make a split of this folder with `mgcc shards split`."
            )
        keys = tuple(key for key in keys if key in has_mask)
        if masks != "none" and not keys:
            raise UserError(
                f"denoiser.masks: {masks} needs training images with masks, and split {self.split.name} has none. "
                "Choose a split with labeled images, or set denoiser.masks none."
            )
        return subset_by_keys(self.shards, keys)

    def train_loader(self, batch: int, seed: int, accelerator: Accelerator) -> ImageTrainLoader:
        """Return an endless loader of shuffled training images, as the unlabeled stream."""
        return ImageTrainLoader(
            labeled=None,
            unlabeled=Stream(self.train, batch),
            image_size=self.size,
            shard_window=self.shard_window,
            seed=seed,
            ranks=Ranks.of(accelerator),
            workers=self.workers,
            augment="mirror" if self.mirror else "none",
        )

    def train_eval_loader(self, batch: int, accelerator: Accelerator) -> EvalLoader:
        """Return a loader that yields every training image once, without augmentation, divided over the ranks."""
        return self.eval_loader(self.train, batch, accelerator)

    def val_loader(self, batch: int, accelerator: Accelerator, in_step: bool = False) -> EvalLoader:
        """Return a loader that yields every validation image once, divided over the ranks."""
        return self.eval_loader(self.val, batch, accelerator, in_step)

    def eval_loader(
        self, dataset: SampleDataset, batch: int, accelerator: Accelerator, in_step: bool = False
    ) -> EvalLoader:
        """Return a loader that yields every image of `dataset` once, at the size of these, divided over the ranks."""
        return EvalLoader(
            dataset,
            batch=batch,
            image_size=self.size,
            ranks=Ranks.of(accelerator),
            workers=self.workers,
            in_step=in_step,
        )

    def val_examples(self, count: int) -> Tensor:
        """Return at most `count` validation images [N,1,H,W] in [-1, 1], spaced evenly over the split."""
        indices = np.linspace(0, len(self.val) - 1, min(count, len(self.val))).round().astype(int)
        loader = EvalLoader(Subset(self.val, indices.tolist()), count, self.size, Ranks())
        return next(iter(loader.batches())).to("cpu").images
