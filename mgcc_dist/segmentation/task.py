"""A segmentation run as a task of the training loop: its batches, validation and final scores."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import ConcatDataset, Subset

from mgcc_dist.common.distributed import raise_on_all_ranks
from mgcc_dist.common.errors import SharedError, UserError
from mgcc_dist.common.progress import ProgressBar
from mgcc_dist.data import selection
from mgcc_dist.data.datasets import SampleDataset, labeled_subset, subset_by_keys
from mgcc_dist.data.loader import EvalLoader, ImageTrainLoader, Ranks, Stream
from mgcc_dist.data.records import ShardFolder
from mgcc_dist.data.remote import is_url
from mgcc_dist.data.sample import Sample
from mgcc_dist.data.shard_cache import ShardCache
from mgcc_dist.data.splits import Split
from mgcc_dist.evaluation.gallery import segmentation_gallery
from mgcc_dist.evaluation.metrics import summarize
from mgcc_dist.evaluation.scores import CachedBatches, score_images
from mgcc_dist.inference.loading import header, load_predictor
from mgcc_dist.kernels.dispatcher import fuse
from mgcc_dist.methods.method import Method, build
from mgcc_dist.methods.segment_config import SegmentConfig
from mgcc_dist.models.config import EncoderDecoderConfig
from mgcc_dist.models.pretrained import with_architecture
from mgcc_dist.segmentation.initial_weights import load_initial_weights, with_saved_encoder
from mgcc_dist.train.loop import total_steps
from mgcc_dist.train.saved_run import has_checkpoint
from mgcc_dist.train.schedules import Progress
from mgcc_dist.train.weights import count_parameters, deepspeed_precision, is_sharded, zero_stage

UnlabeledDataset = ShardFolder | Subset[Sample] | ConcatDataset[Sample]


class SegmentationTask:
    """Train a method on a stream of labeled and a stream of unlabeled images."""

    name = "segment"
    best_metric = "iou"
    best_is_higher = True

    def __init__(
        self,
        config: SegmentConfig,
        data: ShardFolder,
        split: Split,
        accelerator: Accelerator,
        cache: ShardCache | None = None,
    ) -> None:
        self.config = config
        self.data = data
        self.cache = cache
        self.verify = accelerator.is_local_main_process  # one rank per node verifies checksums
        self.module = _build_module(config, accelerator)
        method = _as_method(self.module)
        selection.warn_if_synthetic(data)
        labeled, rest = self._training_keys(split)
        unlabeled = self._unlabeled(rest) if method.uses_unlabeled else {}
        synthetic = unlabeled.get("synthetic")
        self.synthetic = selection.provenance(synthetic) if isinstance(synthetic, ShardFolder) else None
        """checkpoint and selection that the synthetic images come from"""
        pairs = self._pairs()
        self.synthetic_labeled = selection.provenance(pairs) if pairs else None
        """the same of the synthetic images with masks"""
        _check_batch(config, method.uses_unlabeled, bool(unlabeled))
        _check_pixels(config)
        self.counts = {
            "labeled": len(labeled),
            "unlabeled": sum(map(len, unlabeled.values())),
            **{kind: len(source) for kind, source in unlabeled.items()},
            **({"synthetic_labeled": len(pairs)} if pairs else {}),
            "validation": len(split.validation),
            **({"test": len(split.test)} if split.test else {}),
        }
        sources = list(unlabeled.values())
        self.loader = ImageTrainLoader(
            Stream(labeled_subset(data, labeled, "labeled"), config.data.batch_labeled),
            Stream(ConcatDataset(sources), config.data.batch_unlabeled) if sources else None,
            synthetic=Stream(pairs, config.data.batch_synthetic) if pairs else None,
            image_size=config.data.image_size,
            fit=config.data.fit,
            shard_window=config.data.shard_window,
            seed=config.loop.seed,
            ranks=Ranks.of(accelerator),
            workers=config.data.workers,
            augment=config.data.augment,
        )
        batches = accelerator.num_processes * config.loop.accumulation
        method.check_length(total_steps(config.loop, self.loader, batches) * batches * config.data.batch_labeled)
        by_shard = config.data.shard_window is not None
        validation = labeled_subset(data, split.validation, "validation", by_shard)
        self.validation = self._evaluation(validation, accelerator, in_step=True)
        self.test: CachedBatches | None = None
        if split.test:
            self.test = self._evaluation(labeled_subset(data, split.test, "test", by_shard), accelerator)
        self.external = [(folder, self._evaluation(folder, accelerator)) for folder in self._external()]
        if cache:
            cache.require_room(config.data.shard_window)

    def parameters(self) -> dict[str, int]:
        """Number of parameters of the inference network, and of everything that is trained."""
        return {
            "inference": count_parameters(_as_method(self.module).predictor()),
            "training": count_parameters(self.module),
        }

    def after_step(self, progress: Progress) -> None:
        _as_method(self.module).after_step(progress)

    def validate(self, module: nn.Module, accelerator: Accelerator) -> dict[str, float]:
        """Mean validation scores under the corrected protocol (evaluation/metrics.py)."""
        images = score_images(
            self.network(module), self.validation, accelerator, surface=False, fit=self.config.data.fit
        )
        return summarize(images)["corrected"]

    def network(self, module: nn.Module) -> nn.Module:
        return _as_method(module).predictor()

    def header(self) -> dict[str, Any]:
        network = with_architecture(self.config.network, self.module)
        return header(self.config.method, network, self.config.data.image_size, self.config.data.fit)

    def score_saved(self, run: Path, weights: Literal["best", "last"], accelerator: Accelerator) -> dict[str, Any]:
        """Score a saved network image by image, with surface distances; draw RUN/WEIGHTS/gallery.png.

        The test part is scored with the best weights only, which validation has chosen.
        """
        network, _ = load_predictor(run, weights)
        network.to(accelerator.device)
        scored = self._scored(network, weights, self.data, self.validation, accelerator)
        with raise_on_all_ranks():
            if accelerator.is_main_process:
                gallery = run / weights / "gallery.png"
                size, fit = self.config.data.image_size, self.config.data.fit
                segmentation_gallery(network, self.data, scored["images"], size, gallery, fit=fit)
        if self.test and weights == "best":
            scored["test"] = self._scored(network, weights, self.data, self.test, accelerator)
        if self.external:
            scored["external"] = {
                folder.dataset: self._scored(network, weights, folder, batches, accelerator)
                for folder, batches in self.external
            }
        return scored

    def _scored(
        self, network: nn.Module, weights: str, data: ShardFolder, batches: CachedBatches, accelerator: Accelerator
    ) -> dict[str, Any]:
        total, share = len(batches.loader.dataset), len(batches.loader.indices)
        with ProgressBar(total, f"scoring {weights} weights on {data.dataset}", "images", share=share) as bar:
            counted = bar.count(batches, lambda batch: len(batch.keys))
            images = score_images(network, counted, accelerator, surface=True, fit=self.config.data.fit)
        records = {record.key: record for record in data.records}
        for image in images:
            record = records[image["key"]]
            image |= {"class": record.category, "group": record.group}
        return {"summary": summarize(images), "images": images}

    def _training_keys(self, split: Split) -> tuple[Sequence[str], Sequence[str]]:
        """Return the keys of the split that are trained on with their masks, and those without."""
        if self.config.data.labels == "half":
            return split.labeled, split.unlabeled
        masked = {record.key for record in self.data.records if record.labeled}
        return [key for key in split.train if key in masked], [key for key in split.train if key not in masked]

    def _unlabeled(self, training: Sequence[str]) -> dict[str, UnlabeledDataset]:
        """Sources of unlabeled images that the config asks for: "training" (these keys), "synthetic", "similar"."""
        config, sources = self.config.data, dict[str, UnlabeledDataset]()
        if config.unlabeled and training:
            sources["training"] = subset_by_keys(self.data, training)
        if config.synthetic:
            if not is_url(config.synthetic) and not Path(config.synthetic).exists():
                raise UserError(
                    f"data.synthetic: {config.synthetic} does not exist. Create it with `mgcc ldm`, or pass "
                    "--data.synthetic null to train without synthetic images."
                )
            sources["synthetic"] = self._open_other(config.synthetic, "synthetic")
        if config.similar:
            sources["similar"] = ConcatDataset([self._open_other(folder, "similar") for folder in config.similar])
        return sources

    def _pairs(self) -> ShardFolder | None:
        """Open the synthetic images with masks, if the config asks for any."""
        if not self.config.data.synthetic_labeled:
            return None
        pairs = self._open_other(self.config.data.synthetic_labeled, "synthetic_labeled")
        if unmasked := [record.key for record in pairs.records if not record.labeled]:
            raise UserError(
                f"data.synthetic_labeled: {len(unmasked)} of {len(pairs)} records of {pairs.folder} have no mask, the "
                f"first is {unmasked[0]!r}. Sample them with `mgcc ldm --denoiser.masks labeled`, or pass the folder "
                "as data.synthetic, which needs no masks."
            )
        return pairs

    def _external(self) -> list[ShardFolder]:
        """Open the other labeled data sets that the trained network is scored on."""
        folders = [self._open_other(folder, "external") for folder in self.config.data.external]
        names = Counter(folder.dataset for folder in folders)
        if repeated := [name for name, times in names.items() if times > 1]:
            raise UserError(
                f"data.external: {names[repeated[0]]} shard folders are called {repeated[0]!r}, and results are by "
                "name. Convert one of them with another --name."
            )
        for folder in folders:
            if unmasked := [record.key for record in folder.records if not record.labeled]:
                raise UserError(
                    f"data.external: {len(unmasked)} records of {folder.folder} have no mask, the first is "
                    f"{unmasked[0]!r}. Only labeled images can be scored."
                )
            if selection.is_synthetic(folder):
                raise UserError(
                    f"data.external: {folder.folder} holds samples of `mgcc ldm`, and scores on them say nothing about "
                    "real images. Pass real images; to train on the samples, pass them as data.synthetic_labeled."
                )
        return folders

    def _open_other(self, folder: str, key: str) -> ShardFolder:
        """Open the folder of another data set than data.shards.

        Raises:
            UserError: it holds the same images, those of the validation part among them.
        """
        other = ShardFolder.open(folder, self.verify, self.cache)
        if other.content_sha256 == self.data.content_sha256:
            raise UserError(
                f"data.{key}: {other.folder} holds the same images as data.shards, so training and validation would "
                "share images. Pass another data set."
            )
        return other

    def _evaluation(self, source: SampleDataset, accelerator: Accelerator, in_step: bool = False) -> CachedBatches:
        data = self.config.data
        loader = EvalLoader(
            source,
            batch=data.batch_labeled + data.batch_unlabeled,
            image_size=data.image_size,
            ranks=Ranks.of(accelerator),
            workers=data.workers,
            fit=data.fit,
            in_step=in_step,
        )
        return CachedBatches(loader, accelerator.device)


def _build_module(config: SegmentConfig, accelerator: Accelerator) -> nn.Module:
    """Build the method with its initial weights, kernels and memory layout.

    Raises:
        UserError: it can't train the network, the initial weights do not fit, or DeepSpeed can't train it.
    """
    network = with_saved_encoder(config.network, config.init)
    if zero_stage(accelerator) == 3 and isinstance(network, EncoderDecoderConfig) and network.encoder:
        raise SharedError(
            "network.encoder: a pretrained encoder can't be trained with ZeRO-3. Use ZeRO-2, ZeRO-1 or DDP "
            "(launch/README.md)."
        )
    with raise_on_all_ranks():
        method = build(config.method, network)
        if config.init and not has_checkpoint(Path(config.out)):
            load_initial_weights(method, Path(config.init), network)
    module: nn.Module = fuse(method, config.kernels)
    _check_sharding(module, config, accelerator)
    if not is_sharded(accelerator):  # DeepSpeed and FSDP2 need contiguous parameters
        # Convolutions are faster in this layout: 12 % on two CPU cores.
        module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return module


def _check_sharding(module: nn.Module, config: SegmentConfig, accelerator: Accelerator) -> None:
    """Raise SharedError if DeepSpeed can't train the module as the launch file asks for."""
    precision = deepspeed_precision(accelerator)
    if not all(weight.requires_grad for weight in module.parameters()):
        teacher = f"method.name: {config.method.name} averages the weights of a teacher, which "
        if zero_stage(accelerator) == 3:
            raise SharedError(f"{teacher}ZeRO-3 partitions. Use ZeRO-2, ZeRO-1 or DDP (launch/README.md).")
        if precision != "no":
            raise SharedError(
                f"{teacher}DeepSpeed keeps in {precision}, too coarse for an average. Set loop.precision no, or use "
                "DDP (launch/README.md)."
            )
    if precision != "no" and any(isinstance(each, nn.BatchNorm2d) for each in module.modules()):
        raise SharedError(
            f"network.name: {config.network.name} has BatchNorm, and DeepSpeed would give it {precision} weights next "
            "to float32 statistics, which PyTorch refuses. Set loop.precision no, or use DDP or FSDP2 for "
            f"{precision} (launch/README.md)."
        )


def _check_batch(config: SegmentConfig, uses_unlabeled: bool, has_unlabeled: bool) -> None:
    """Raise UserError unless batches contain unlabeled images exactly if the method uses them."""
    name, batch = config.method.name, config.data.batch_unlabeled
    if batch and not uses_unlabeled:
        raise UserError(f"data.batch_unlabeled: method {name} uses no unlabeled images. Set it to 0, not {batch}.")
    if uses_unlabeled and not batch:
        raise UserError(f"data.batch_unlabeled: method {name} needs unlabeled images, so this must not be 0")
    if uses_unlabeled and not has_unlabeled:
        raise UserError(
            f"method.name: {name} needs unlabeled images and there are none. "
            "Set data.synthetic or data.similar, or data.labels half with data.unlabeled true."
        )


def _check_pixels(config: SegmentConfig) -> None:
    """Raise UserError if BatchNorm would get one value per channel: one image, of one pixel at the lowest level."""
    data, strides = config.data, config.network.strides
    if not config.network.has_batch_norm or data.image_size > strides[-1]:
        return
    for key in ("batch_labeled", "batch_unlabeled"):
        if getattr(data, key) == 1:
            raise UserError(
                f"data.{key}: BatchNorm can't train on one image of one pixel, which is what {len(strides)} levels "
                f"leave of data.image_size {data.image_size}. Set a larger image_size or {key} 2."
            )


def _as_method(module: nn.Module) -> Method:
    assert isinstance(module, Method)
    return module
