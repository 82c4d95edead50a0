"""Program: image folders in, WebDataset shards out; and split files for shard folders.

python -m mgcc_dist.shards busi    --root Dataset_BUSI_with_GT --out out/busi
python -m mgcc_dist.shards busbra  --root BUSBRA --out out/busbra
python -m mgcc_dist.shards folder  --root my_images --out out/mine --size 256
python -m mgcc_dist.shards phantom --count 256 --out out/phantom
python -m mgcc_dist.shards split   --root out/mine --out mine.json --validation 0.3 --labeled 0.5 --seed 1

docs/how-to/datasets.md lists the data sets with the files that each command expects.
"""

import sys
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from inspect import getdoc
from pathlib import Path

from jsonargparse import ArgumentError, ArgumentParser, Namespace
from jsonargparse.typing import ClosedUnitInterval, NonNegativeInt, PositiveInt, restricted_number_type

from mgcc_dist.common.config import HelpFormatter
from mgcc_dist.common.errors import UserError, run_program
from mgcc_dist.data.convert import SKIPPED, summary, write_shards
from mgcc_dist.data.readers.registry import READERS, Phantoms, Reader
from mgcc_dist.data.records import INDEX, ShardFolder
from mgcc_dist.data.splits import leaks, make_split, read_split, write_split

PhantomSize = restricted_number_type("PhantomSize", int, (">=", 16), docstring="int of 16 or more")


def main(argv: Sequence[str] | None = None) -> None:
    run: dict[str, Callable[[Namespace], None]] = {
        **{name: partial(convert_files, read) for name, read in READERS.items()},
        "phantom": draw_phantoms,
        "split": write_split_file,
    }
    parser = _parser()
    words = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    try:
        arguments = parser.parse_args(words)
        run[arguments.command](arguments[arguments.command])
    except ArgumentError as error:
        raise UserError(" ".join(error.message.split())) from error
    except OSError as error:
        raise UserError(str(error)) from error


def convert_files(read: Callable[[Path], Reader], arguments: Namespace) -> None:
    _convert(read(arguments.root), arguments, arguments.size or None, arguments.skip_bad)


def draw_phantoms(arguments: Namespace) -> None:
    _convert(Phantoms(arguments.count, arguments.seed, arguments.size), arguments, None, skip_bad=False)


def _convert(reader: Reader, arguments: Namespace, size: int | None, skip_bad: bool) -> None:
    there = (arguments.out / INDEX).exists()
    shards = write_shards(reader, arguments.out, size, arguments.per_shard, skip_bad)
    print(summary(shards) + (", there already" if there else ""))
    if skipped := shards.index["skipped"]:
        print(f"{skipped} files skipped, see {arguments.out / SKIPPED}")
    for note in reader.notes:
        print(note)


def write_split_file(arguments: Namespace) -> None:
    shards = ShardFolder.open(arguments.root, verify=False)
    validation = round(arguments.validation * len(shards))
    labeled = round(arguments.labeled * (len(shards) - validation))
    split = make_split(shards.records, arguments.seed, validation, labeled, arguments.grouped, arguments.out.stem)
    if arguments.out.exists():
        if read_split(arguments.out) != split:
            raise UserError(f"{arguments.out} is there already and another split; give another --out or remove it")
        print(f"{arguments.out}: there already")
        return
    parts = {"labeled": split.labeled, "unlabeled": split.unlabeled, "validation": split.validation}
    category = {record.key: record.category for record in shards.records}
    leaking = len(leaks(split, shards.records))
    write_split(
        arguments.out,
        split,
        dataset=shards.dataset,
        kind="grouped" if arguments.grouped else "random",
        seed=arguments.seed,
        made_by=f"python -m mgcc_dist.shards split --validation {arguments.validation} --labeled {arguments.labeled}"
        f" --seed {arguments.seed}" + (" --grouped" if arguments.grouped else ""),
        notes="Stratified by class. "
        + ("No group is" if arguments.grouped else "Groups are not looked at; a grouped split keeps them from being")
        + " on both sides: near-duplicate images, or a patient's where patients are known.",
        validation_records_with_group_in_training=leaking,
        classes={part: dict(sorted(Counter(category[key] for key in keys).items())) for part, keys in parts.items()},
    )
    print(f"{arguments.out}: {', '.join(f'{len(keys)} {part}' for part, keys in parts.items())}")
    if leaking:
        print(f"{leaking} validation records have a near-duplicate or their patient in training; --grouped avoids it")


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="shards", description=__doc__, formatter_class=HelpFormatter, exit_on_error=False, allow_abbrev=False
    )
    commands = parser.add_subcommands(dest="command", metavar="NAME")

    def add(name: str, text: str, options: Callable[[ArgumentParser], None]) -> None:
        command = ArgumentParser(
            description=text, formatter_class=HelpFormatter, exit_on_error=False, allow_abbrev=False
        )
        options(command)
        commands.add_subcommand(name, command, help=text.partition("\n")[0])

    for name, read in READERS.items():
        add(name, (getdoc(read) or name).partition("\n\nRaises:")[0], _file_options)
    add("phantom", "built-in synthetic images that look like breast ultrasound, with masks", _phantom_options)
    add("split", "which records of a shard folder are labeled, unlabeled, validation", _split_options)
    return parser


def _shard_options(command: ArgumentParser) -> None:
    command.add_argument(
        "--out",
        type=Path,
        required=True,
        help="folder to write: shards and index.json; a finished one made with the same arguments is left as it is",
    )
    command.add_argument("--per-shard", type=PositiveInt, default=128, help="records per shard")


def _file_options(command: ArgumentParser) -> None:
    command.add_argument("--root", type=Path, required=True, help="folder of the data set")
    _shard_options(command)
    command.add_argument(
        "--size",
        type=NonNegativeInt,
        default=0,
        help="pixels: stretch to SIZE x SIZE, images bilinear with antialiasing, masks nearest; 0 keeps the original "
        "sizes (training resizes what it loads, in the paper to 512 and 256)",
    )
    command.add_argument(
        "--skip-bad",
        action="store_true",
        help="list files that cannot be used in OUT/skipped.json instead of stopping at the first",
    )


def _phantom_options(command: ArgumentParser) -> None:
    _shard_options(command)
    command.add_argument("--count", type=PositiveInt, default=256, help="number of images")
    command.add_argument("--seed", type=NonNegativeInt, default=0, help="image I of a seed is always the same")
    command.add_argument("--size", type=PhantomSize, default=128, help="pixels a side")


def _split_options(command: ArgumentParser) -> None:
    command.add_argument("--root", type=Path, required=True, help="shard folder")
    command.add_argument("--out", type=Path, required=True, help="JSON file to write; its stem is the split's name")
    command.add_argument(
        "--validation",
        type=ClosedUnitInterval,
        default=0.3,
        help="share of the records that is for validation (the paper's BUSI split: 254 of 780, 0.3256)",
    )
    command.add_argument(
        "--labeled",
        type=ClosedUnitInterval,
        default=0.5,
        help="share of the training records that is labeled (the paper: 0.5)",
    )
    command.add_argument("--seed", type=NonNegativeInt, default=1, help="another seed gives another split")
    command.add_argument(
        "--grouped",
        action="store_true",
        help="keep near-duplicates, or a patient's images, on one side: validation then shows nothing seen in training",
    )


if __name__ == "__main__":
    run_program("shards", main)
