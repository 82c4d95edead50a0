"""The images that the generative stage learns: those of one split's training side, with or without labels."""

import numpy as np
from accelerate import Accelerator
from torch import Tensor

from mgcc_dist.data.loader import EvalLoader, StreamLoader
from mgcc_dist.data.records import ShardFolder
from mgcc_dist.data.sources import Source, Subset, subset_by_keys
from mgcc_dist.data.splits import Split
from mgcc_dist.diffusion.config import DataConfig


class Images:
    """A split's training images and held-out (validation) images, as loaders."""

    def __init__(self, config: DataConfig, data: ShardFolder, split: Split) -> None:
        self.size = config.image_size
        counts = {"training": len(split.labeled + split.unlabeled), "held_out": len(split.validation)}
        self.facts = {"dataset": data.dataset, "split": split.name, "images": counts}
        """what result.json says of them"""
        self.mirror = config.mirror
        self.workers = config.workers
        self.data = data
        self.learned = subset_by_keys(data, split.labeled + split.unlabeled)
        """the training images of `data`"""
        self.unseen = subset_by_keys(data, split.validation)
        """its held-out images"""

    def training(self, batch: int, seed: int, accelerator: Accelerator) -> StreamLoader:
        """Endless batches of training images, in the unlabeled stream."""
        return StreamLoader(
            labeled=None,
            unlabeled=self.learned,
            batch_labeled=0,
            batch_unlabeled=batch,
            image_size=self.size,
            seed=seed,
            rank=accelerator.process_index,
            world=accelerator.num_processes,
            workers=self.workers,
            augment="mirror" if self.mirror else False,
        )

    def training_once(self, batch: int, accelerator: Accelerator) -> EvalLoader:
        """Every training image once over all ranks."""
        return self._once(self.learned, batch, accelerator)

    def held_out(self, batch: int, accelerator: Accelerator) -> EvalLoader:
        """Every held-out image once over all ranks."""
        return self._once(self.unseen, batch, accelerator)

    def _once(self, source: Source, batch: int, accelerator: Accelerator) -> EvalLoader:
        return EvalLoader(
            source,
            batch=batch,
            image_size=self.size,
            rank=accelerator.process_index,
            world=accelerator.num_processes,
            workers=self.workers,
        )

    def examples(self, count: int) -> Tensor:
        """Held-out images [count,1,H,W] in [-1, 1], spread evenly over the split."""
        chosen = np.linspace(0, len(self.unseen) - 1, min(count, len(self.unseen))).round().astype(int)
        loader = EvalLoader(Subset(self.unseen, chosen.tolist()), count, self.size, rank=0, world=1, workers=0)
        return next(iter(loader.batches())).to("cpu").images
