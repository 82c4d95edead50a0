"""Convert image folders to WebDataset shards, index shards of other programs, and create split files.

mgcc shards busi    --root Dataset_BUSI_with_GT --out out/busi
mgcc shards busbra  --root BUSBRA --out out/busbra
mgcc shards folder  --root my_images --out out/mine --size 256
mgcc shards phantom --count 256 --out out/phantom
mgcc shards index   shards_of_others
mgcc shards split   --root out/mine --out mine.json --validation 0.3 --labeled 0.5 --seed 1

docs/how-to/datasets.md lists the files that each command expects.
"""

import logging
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from inspect import getdoc
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from mgcc_dist.common.errors import UserError, one_line, run_program
from mgcc_dist.common.options import argument, flag
from mgcc_dist.common.program import Command, Program
from mgcc_dist.common.value_types import FilePath, Folder, FolderPath, Name, NonNegativeInt, PositiveInt, UnitInterval
from mgcc_dist.common.words import counted
from mgcc_dist.data.file_listing import readable_name
from mgcc_dist.data.readers.folder import folder
from mgcc_dist.data.readers.patients import SUBFOLDER, is_list
from mgcc_dist.data.readers.phantoms import Phantoms
from mgcc_dist.data.readers.reader import ImageFileReader, Reader, knows_patients
from mgcc_dist.data.readers.registry import READERS
from mgcc_dist.data.records import INDEX

logger = logging.getLogger("mgcc_dist.shards")

SPLIT_NOTES = {  # as in the shipped split files
    "grouped": "Stratified by class. No group is on both sides: near-duplicate images, or a patient's where patients "
    "are known.",
    "random": "Stratified by class. Groups are not looked at; a grouped split keeps them from being on both sides: "
    "near-duplicate images, or a patient's where patients are known.",
}

if TYPE_CHECKING:
    from mgcc_dist.data.records import ShardFolder
    from mgcc_dist.data.splits import Split

    PhantomSize = int
    PixelBits = int
else:
    from jsonargparse.typing import restricted_number_type

    PhantomSize = Annotated[restricted_number_type("PhantomSize", int, (">=", 16)), "integer from 16"]
    PixelBits = Annotated[
        restricted_number_type("PixelBits", int, [(">=", 8), ("<=", 16)], join="and"), "integer from 8 to 16"
    ]


@dataclass(frozen=True)
class FilesConfig:
    root: FolderPath
    """folder of the data set"""
    out: FolderPath
    """folder to write; a complete one made with the same arguments is kept"""
    per_shard: PositiveInt = 128
    """records per shard"""
    size: NonNegativeInt = 0
    """stretch images and masks to SIZE x SIZE pixels (antialiased bilinear, masks with a threshold at the midpoint); 0
    keeps the original sizes, and training resizes on loading"""
    skip_bad: bool = flag()
    """skip unusable files and list them in OUT/skipped.json instead of stopping at the first"""
    label_values: tuple[NonNegativeInt, ...] = argument((), nargs="+")
    """values of the mask files that are lesion, for masks with several labels; all others are background"""
    bits: PixelBits | None = None
    """bits that 16-bit images use, such as 12; none takes the smallest of 8, 10, 12, 14 and 16 that fits all images"""


@dataclass(frozen=True)
class SimilarFilesConfig(FilesConfig):
    groups: Literal["similar", "none"] = "similar"
    """what a grouped split keeps together: near-duplicates, or nothing; the search is slow for large data sets"""


@dataclass(frozen=True)
class FolderConfig(FilesConfig):
    name: Name | None = None
    """name of the data set in shards, results and reports; none takes the name of the folder OUT"""
    groups: Literal["similar", "patient", "none"] = "similar"
    """what a grouped split keeps together: near-duplicates, the images of a patient, or nothing"""
    patient: str = SUBFOLDER
    """with --groups patient: `subfolder`, the folder of an image; a CSV with the columns image and patient; or a
    regular expression for the file name whose first group is the patient, such as '(case_[0-9]+)_'"""


@dataclass(frozen=True)
class PhantomConfig:
    out: FolderPath
    """folder to write; a complete one made with the same arguments is kept"""
    per_shard: PositiveInt = 128
    """records per shard"""
    count: PositiveInt = 256
    """number of images"""
    seed: NonNegativeInt = 0
    """random seed; image I of a seed is always the same"""
    size: PhantomSize = 128
    """pixels per side"""


@dataclass(frozen=True)
class IndexConfig:
    root: str = argument(positional=True)
    """folder of WebDataset tars; or tars in one folder or at one URL, such as 'https://host/data/x-{000..123}.tar'"""
    out: FolderPath | None = None
    """folder to write index.json to; none: that of the tars"""
    name: Name | None = None
    """name of the data set in results and reports; none takes the name of the folder of index.json"""
    images: tuple[str, ...] = argument(("png", "jpg", "jpeg", "tif", "tiff"), nargs="+")
    """extensions of images, all after the first dot of the name; the first that a record has is its image"""
    masks: tuple[str, ...] = argument(("mask.png", "seg.png"), nargs="+")
    """extensions of masks; records without one are unlabeled"""
    classes: tuple[str, ...] = argument(("cls", "json"), nargs="+")
    """extensions of files with the class: text, or json"""
    class_key: str = "class"
    """key of the class in json files"""
    group_key: str = "group"
    """key of what a grouped split keeps together, such as the patient, in json files"""
    skip_bad: bool = flag()
    """skip unusable records instead of stopping at the first"""
    label_values: tuple[NonNegativeInt, ...] = argument((), nargs="+")
    """values of the mask files that are lesion, for masks with several labels"""
    bits: PixelBits | None = None
    """bits that 16-bit images use; none takes the smallest of 8, 10, 12, 14 and 16 that fits all images"""


@dataclass(frozen=True)
class SplitConfig:
    root: Folder
    """shard folder, or its URL"""
    out: FilePath
    """JSON file to write; the split is named after it"""
    validation: UnitInterval = 0.3
    """fraction of the records with a mask (of all, if none has one) for validation (paper, BUSI: 254 of 780, 0.3256)"""
    labeled: UnitInterval = 0.5
    """fraction of the training records with a mask that is labeled (paper: 0.5); the others, and records without a
    mask, are unlabeled"""
    seed: NonNegativeInt = 1
    """random seed"""
    grouped: bool = flag()
    """keep near-duplicates and images of the same patient together, in training, in validation or in the test part"""
    test: UnitInterval = 0.0
    """fraction of the records with a mask for the test part, which is scored once; `validation` is a fraction of the
    others"""
    folds: NonNegativeInt = 0
    """number of folds: writes OUT_1.json, OUT_2.json, ..., each with another part of the data as its test part"""
    published_folds: bool = flag()
    """use the folds that the authors of BUS-BRA or TN3K published, if the shards were converted with them"""


def convert_files(read: Callable[[Path], ImageFileReader], config: FilesConfig) -> None:
    reader = read(config.root)
    if isinstance(config, SimilarFilesConfig) and config.groups == "none":
        reader.leave_ungrouped()
    _convert_files(reader, config)


def convert_folder(config: FolderConfig) -> None:
    reader = folder(config.root, config.patient if config.groups == "patient" else "")
    if config.groups == "none":
        reader.leave_ungrouped()
    reader.dataset = config.name or _dataset_name(config.out)
    if config.name:
        if not re.fullmatch(r"[\w-]+", config.name):
            raise UserError(f"--name {config.name}: use only letters, digits, - and _")
        reader.arguments["name"] = config.name
    if config.groups == "patient":
        reader.arguments["patient"] = Path(config.patient).name if is_list(config.patient) else config.patient
    _convert_files(reader, config)


def _dataset_name(folder: Path) -> str:
    """Return the name of a data set after its folder, with `_` for what a name can't have."""
    return re.sub(r"[^\w-]", "_", readable_name(folder.resolve().name))


def _convert_files(reader: ImageFileReader, config: FilesConfig) -> None:
    if config.label_values:
        reader.select_labels(config.label_values)
    if config.bits:
        reader.select_bits(config.bits)
    for note in reader.unread:
        logger.warning("shards: %s", note)
    if reader.bits:
        logger.info("shards: 16-bit images are scaled to 8 bits as images of %d bits (--bits)", reader.bits)
    _convert(reader, config.out, config.per_shard, config.size or None, config.skip_bad)


def draw_phantoms(config: PhantomConfig) -> None:
    _convert(Phantoms(config.count, config.seed, config.size), config.out, config.per_shard)


def _convert(reader: Reader, out: Path, per_shard: int, size: int | None = None, skip_bad: bool = False) -> None:
    from mgcc_dist.data.convert import SKIPPED, summarize, write_shards
    from mgcc_dist.data.mask_summary import describe_masks

    existed = (out / INDEX).exists()
    shards = write_shards(reader, out, size, per_shard, skip_bad)
    print(one_line(summarize(shards) + (", already exists" if existed else "")))
    if skipped := shards.index.get("skipped"):
        logger.warning("shards: %s files skipped, see %s", skipped, out / SKIPPED)
    counts = ""  # what an index.json of version 0.1 says about masks
    mask_notes: list[str] = []
    try:
        if "masks" in shards.index:
            counts, mask_notes = describe_masks(shards.index["masks"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{out / INDEX}: its 'masks' are damaged ({error!r}). Choose another --out.") from error
    for note in (*reader.notes, *mask_notes):
        logger.warning("shards: %s", note)
    if counts:
        print(counts)


def write_index_file(config: IndexConfig) -> None:
    from mgcc_dist.data.convert import summarize
    from mgcc_dist.data.indexing import Layout, index_shards, list_shards

    folder = config.out or Path(list_shards(config.root)[0])
    name = config.name or _dataset_name(folder)
    layout = Layout(
        config.images,
        config.masks,
        config.classes,
        config.class_key,
        config.group_key,
        config.label_values,
        config.bits,
    )
    shards = index_shards(config.root, config.out, name, layout, config.skip_bad)
    print(one_line(summarize(shards)))
    if shards.index["skipped"]:
        logger.warning("shards: %s skipped", counted(shards.index["skipped"], "record"))


def write_split_file(config: SplitConfig) -> None:
    from mgcc_dist.common.files import create_folder
    from mgcc_dist.data.records import ShardFolder
    from mgcc_dist.data.splits import choose_test, make_folds, published_folds

    if config.out.is_dir():
        raise UserError(f"{config.out}: is a folder. Set --out to a JSON file.")
    create_folder(config.out.parent)
    shards = ShardFolder.open(config.root, verify=False)
    if [config.test > 0, config.folds > 0, config.published_folds].count(True) > 1:
        raise UserError("--test, --folds and --published-folds: choose one of them")
    name = config.out.stem
    parts: dict[str, tuple[Collection[str], Collection[str]]] = {"": ((), ())}
    if config.published_folds:
        parts = {f"_{fold}": part for fold, part in published_folds(shards.records, str(config.root)).items()}
    elif config.folds:
        folds = make_folds(shards.records, config.seed, config.folds, config.grouped, name)
        parts = {f"_{fold}": (test, ()) for fold, test in enumerate(folds, start=1)}
    elif config.test:
        count = round(config.test * sum(record.labeled for record in shards.records))
        parts = {"": (choose_test(shards.records, config.seed, count, config.grouped, name), ())}
    splits = [
        (config.out.with_name(f"{name}{ending}{config.out.suffix}"), _split(config, shards, f"{name}{ending}", *part))
        for ending, part in parts.items()
    ]
    for path, split in splits:
        _write_split_file(config, shards, path, split)


def _split(
    config: SplitConfig, shards: "ShardFolder", name: str, test: Collection[str], given: Collection[str]
) -> "Split":
    """Make one split with these test records and, unless empty, `given` validation records."""
    from mgcc_dist.data.splits import make_split

    left = {record.key: record.labeled for record in shards.records if record.key not in set(test)}
    with_mask = sum(left.values())
    validation = round(config.validation * (with_mask or len(left)))
    for_training = with_mask - (len(given) or validation)
    labeled = max(round(config.labeled * for_training), 1) if with_mask and config.labeled else 0
    return make_split(shards.records, config.seed, given or validation, labeled, config.grouped, name, test)


def _write_split_file(config: SplitConfig, shards: "ShardFolder", path: Path, split: "Split") -> None:
    from mgcc_dist.data.splits import SUBSETS, TEST, leaks, read_split, write_split

    if path.exists():
        try:
            same = read_split(path) == split
        except UserError as error:
            raise UserError(f"{path}: already exists and is not a split file. Choose another --out.") from error
        if not same:
            raise UserError(f"{path}: already exists with a different split. Choose another --out.")
        logger.info("shards: %s already exists", path)
        return
    subsets = {subset: getattr(split, subset) for subset in SUBSETS if subset != TEST or split.test}
    category = {record.key: record.category for record in shards.records}
    leaking = len(leaks(split, shards.records))
    options = {"test": config.test, "folds": config.folds}
    leaking_test = leaks(split, shards.records, TEST)
    write_split(
        path,
        split,
        dataset=shards.dataset,
        kind="grouped" if config.grouped else "random",
        seed=config.seed,
        made_by=f"python -m mgcc_dist.shards split --validation {config.validation} --labeled {config.labeled}"
        f" --seed {config.seed}"
        + (" --grouped" if config.grouped else "")
        + "".join(f" --{option} {value}" for option, value in options.items() if value)
        + (" --published-folds" if config.published_folds else ""),
        notes=SPLIT_NOTES["grouped" if config.grouped else "random"],
        validation_records_with_group_in_training=leaking,
        **({"test_records_with_group_in_training_or_validation": len(leaking_test)} if split.test else {}),
        classes={subset: dict(sorted(Counter(map(category.get, keys)).items())) for subset, keys in subsets.items()},
    )
    sizes = ", ".join(f"{len(keys)} {subset}" for subset, keys in subsets.items())
    print(one_line(f"{path}: {sizes}"))
    if not any(record.labeled for record in shards.records):
        logger.warning("shards: no record has a mask. The split is for `mgcc ldm`; `mgcc segment` needs masks.")
    if left_out := len(shards) - sum(map(len, subsets.values())):
        logger.warning(
            "shards: %d records without a mask are in no subset: their groups are in %s",
            left_out,
            "validation or test" if split.test else "validation",
        )
    for subset, count in (("validation", leaking), ("test", len(leaking_test))):
        if count:
            logger.warning(
                "shards: %d %s records share a patient with or are near-duplicates of other parts' records. "
                "Use --grouped to avoid this.",
                count,
                subset,
            )


def _files_command(read: Callable[[Path], ImageFileReader]) -> Command:
    text = (getdoc(read) or "").partition("\n\nRaises:")[0]
    if read is folder:
        return Command(FolderConfig, convert_folder, text.partition("\n")[0], text)
    config = FilesConfig if knows_patients(read) else SimilarFilesConfig
    return Command(config, partial(convert_files, read), text.partition("\n")[0], text, module=read.__module__)


class ShardCommands(Mapping[str, Command]):
    """A command per reader, those of plugins too, and `others`."""

    def __init__(self, others: Mapping[str, Command]) -> None:
        self._others = others

    def __getitem__(self, name: str) -> Command:
        if name in self._others:
            return self._others[name]
        if reader := READERS.find(name):
            return _files_command(reader.load())
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return iter([*READERS.names(), *self._others])

    def __len__(self) -> int:
        return len(READERS.names()) + len(self._others)


PROGRAM = Program(
    "shards",
    __doc__,
    commands=ShardCommands(
        {
            "phantom": Command(
                PhantomConfig, draw_phantoms, "built-in synthetic images that look like breast ultrasound, with masks"
            ),
            "index": Command(
                IndexConfig,
                write_index_file,
                "make the index.json of WebDataset tars that another program wrote",
            ),
            "split": Command(
                SplitConfig,
                write_split_file,
                "split a shard folder into labeled, unlabeled and validation records",
            ),
        }
    ),
)


main = PROGRAM.main


if __name__ == "__main__":
    run_program("shards", main)
