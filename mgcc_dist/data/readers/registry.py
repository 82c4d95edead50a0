"""The datasets that `mgcc shards` reads, by the names of its commands.

To add a dataset, add a file to this folder and a line here; its function's docstring becomes the command's help.
"""

from collections.abc import Callable
from pathlib import Path

from mgcc_dist.data.readers.bus import bus
from mgcc_dist.data.readers.busbra import busbra
from mgcc_dist.data.readers.busi import busi
from mgcc_dist.data.readers.datasetb import datasetb
from mgcc_dist.data.readers.ddti import ddti
from mgcc_dist.data.readers.folder import folder
from mgcc_dist.data.readers.reader import ImageFileReader
from mgcc_dist.data.readers.tn3k import tn3k
from mgcc_dist.data.readers.tnscui2020 import tnscui2020

READERS: dict[str, Callable[[Path], ImageFileReader]] = {
    reader.__name__: reader for reader in (busi, busbra, bus, datasetb, tn3k, tnscui2020, ddti, folder)
}

PATIENTS_KNOWN = {busbra.__name__, ddti.__name__}
"""readers whose groups are always patients, never near-duplicates"""
