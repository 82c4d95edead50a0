"""The datasets that `mgcc shards` reads, by the names of its commands.

To add a dataset, register its function here or, from a plugin, with `READERS.register_function`; its docstring becomes
the command's help.
"""

from mgcc_dist.common.components import Registry
from mgcc_dist.data.readers.bus import bus
from mgcc_dist.data.readers.busbra import busbra
from mgcc_dist.data.readers.busi import busi
from mgcc_dist.data.readers.datasetb import datasetb
from mgcc_dist.data.readers.ddti import ddti
from mgcc_dist.data.readers.folder import folder
from mgcc_dist.data.readers.reader import ImageFileReader
from mgcc_dist.data.readers.tn3k import tn3k
from mgcc_dist.data.readers.tnscui2020 import tnscui2020

READERS = Registry("reader", ImageFileReader)
for _reader in (busi, busbra, bus, datasetb, tn3k, tnscui2020, ddti, folder):
    READERS.register_function(_reader)
