"""Program: image folders in, WebDataset shards out; and split files for shard folders.

python -m mgcc_dist.shards busi    --root Dataset_BUSI_with_GT --out out/busi
python -m mgcc_dist.shards busbra  --root BUSBRA --out out/busbra
python -m mgcc_dist.shards folder  --root my_images --out out/mine --size 256
python -m mgcc_dist.shards phantom --count 256 --out out/phantom
python -m mgcc_dist.shards split   --root out/mine --out mine.json --validation 0.3 --labeled 0.5 --seed 1

docs/how-to/datasets.md lists the data sets with the files that each command expects.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from inspect import getdoc
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from mgcc_dist.common.errors import UserError, run_program
from mgcc_dist.common.options import flag
from mgcc_dist.common.program import Command, Program
from mgcc_dist.common.value_types import FilePath, FolderPath, NonNegativeInt, PositiveInt, UnitInterval
from mgcc_dist.data.readers.registry import READERS, Phantoms, Reader
from mgcc_dist.data.records import INDEX

if TYPE_CHECKING:
    PhantomSize = int
else:
    from jsonargparse.typing import restricted_number_type

    PhantomSize = Annotated[restricted_number_type("PhantomSize", int, (">=", 16)), "integer from 16"]


@dataclass(frozen=True)
class FilesConfig:
    root: FolderPath
    """folder of the data set"""
    out: FolderPath
    """folder to write: shards and index.json; a finished one made with the same arguments is left as it is"""
    per_shard: PositiveInt = 128
    """records per shard"""
    size: NonNegativeInt = 0
    """pixels: stretch to SIZE x SIZE, images bilinear with antialiasing, masks nearest; 0 keeps the original sizes
    (training resizes what it loads, in the paper to 512 and 256)"""
    skip_bad: bool = flag()
    """list files that cannot be used in OUT/skipped.json instead of stopping at the first"""


@dataclass(frozen=True)
class PhantomConfig:
    out: FolderPath
    """folder to write: shards and index.json; a finished one made with the same arguments is left as it is"""
    per_shard: PositiveInt = 128
    """records per shard"""
    count: PositiveInt = 256
    """number of images"""
    seed: NonNegativeInt = 0
    """image I of a seed is always the same"""
    size: PhantomSize = 128
    """pixels a side"""


@dataclass(frozen=True)
class SplitConfig:
    root: FolderPath
    """shard folder"""
    out: FilePath
    """JSON file to write; its stem is the split's name"""
    validation: UnitInterval = 0.3
    """share of the records that is for validation (the paper's BUSI split: 254 of 780, 0.3256)"""
    labeled: UnitInterval = 0.5
    """share of the training records that is labeled (the paper: 0.5)"""
    seed: NonNegativeInt = 1
    """another seed gives another split"""
    grouped: bool = flag()
    """keep near-duplicates, or a patient's images, on one side: validation then shows nothing seen in training"""


def convert_files(read: Callable[[Path], Reader], config: FilesConfig) -> None:
    _convert(read(config.root), config.out, config.per_shard, config.size or None, config.skip_bad)


def draw_phantoms(config: PhantomConfig) -> None:
    _convert(Phantoms(config.count, config.seed, config.size), config.out, config.per_shard)


def _convert(reader: Reader, out: Path, per_shard: int, size: int | None = None, skip_bad: bool = False) -> None:
    from mgcc_dist.data.convert import SKIPPED, summary, write_shards

    there = (out / INDEX).exists()
    shards = write_shards(reader, out, size, per_shard, skip_bad)
    print(summary(shards) + (", there already" if there else ""))
    if skipped := shards.index["skipped"]:
        print(f"{skipped} files skipped, see {out / SKIPPED}")
    for note in reader.notes:
        print(note)


def write_split_file(config: SplitConfig) -> None:
    from mgcc_dist.data.records import ShardFolder
    from mgcc_dist.data.splits import leaks, make_split, read_split, write_split

    shards = ShardFolder.open(config.root, verify=False)
    validation = round(config.validation * len(shards))
    labeled = round(config.labeled * (len(shards) - validation))
    split = make_split(shards.records, config.seed, validation, labeled, config.grouped, config.out.stem)
    if config.out.exists():
        if read_split(config.out) != split:
            raise UserError(f"{config.out} is there already and another split; give another --out or remove it")
        print(f"{config.out}: there already")
        return
    parts = {"labeled": split.labeled, "unlabeled": split.unlabeled, "validation": split.validation}
    category = {record.key: record.category for record in shards.records}
    leaking = len(leaks(split, shards.records))
    write_split(
        config.out,
        split,
        dataset=shards.dataset,
        kind="grouped" if config.grouped else "random",
        seed=config.seed,
        made_by=f"python -m mgcc_dist.shards split --validation {config.validation} --labeled {config.labeled}"
        f" --seed {config.seed}" + (" --grouped" if config.grouped else ""),
        notes="Stratified by class. "
        + ("No group is" if config.grouped else "Groups are not looked at; a grouped split keeps them from being")
        + " on both sides: near-duplicate images, or a patient's where patients are known.",
        validation_records_with_group_in_training=leaking,
        classes={part: dict(sorted(Counter(category[key] for key in keys).items())) for part, keys in parts.items()},
    )
    print(f"{config.out}: {', '.join(f'{len(keys)} {part}' for part, keys in parts.items())}")
    if leaking:
        print(f"{leaking} validation records have a near-duplicate or their patient in training; --grouped avoids it")


def _files_command(read: Callable[[Path], Reader]) -> Command:
    text = (getdoc(read) or "").partition("\n\nRaises:")[0]
    return Command(FilesConfig, partial(convert_files, read), text.partition("\n")[0], text)


PROGRAM = Program(
    "shards",
    __doc__,
    commands={
        **{name: _files_command(read) for name, read in READERS.items()},
        "phantom": Command(
            PhantomConfig, draw_phantoms, "built-in synthetic images that look like breast ultrasound, with masks"
        ),
        "split": Command(
            SplitConfig, write_split_file, "which records of a shard folder are labeled, unlabeled, validation"
        ),
    },
)


def main(argv: Sequence[str] | None = None) -> None:
    try:
        PROGRAM.main(argv)
    except OSError as error:
        raise UserError(str(error)) from error


if __name__ == "__main__":
    run_program("shards", main)
