"""Samples that need no file."""

import numpy as np

from mgcc_dist.data.sample import Sample

SIZE = 4


class InMemoryDataset:
    """`count` random images of `shape`; the mask is where the image is bright."""

    def __init__(self, name, count, shape=(SIZE, SIZE), labeled=True):
        self.name, self.count, self.shape, self.labeled = name, count, shape, labeled

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        image = np.random.default_rng((ord(self.name), index)).integers(0, 256, self.shape, dtype=np.uint8)
        mask = np.where(image > 127, 255, 0).astype(np.uint8) if self.labeled else None
        return Sample(f"{self.name}{index}", image, mask, {})
