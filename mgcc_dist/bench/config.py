"""Options of `mgcc bench`."""

from dataclasses import dataclass
from typing import Literal

from mgcc_dist.common.options import argument, flag
from mgcc_dist.common.value_types import FilePath, Name
from mgcc_dist.kernels import TABLE_PATH

DtypeName = Literal["float32", "float16", "bfloat16"]


@dataclass(frozen=True)
class BenchConfig:
    op: Name | None = None
    """measure only this operation, such as upconv, msag or mixer"""
    json: FilePath | None = argument(None, alias="out")
    """write all results to this file; --out is the same"""
    png: FilePath | None = None
    """plot speedups and roofline shares to this file"""
    write_table: FilePath | None = argument(None, nargs="?", const=TABLE_PATH)
    """replace this device's rows of a kernel table; without a file, those of measured.json, which `auto` reads"""
    quick: bool = flag()
    """fewer shapes, shorter rounds, no torch.compile"""
    no_compile: bool = flag()
    """skip torch.compile"""
    seconds: float = 240.0
    """start no workload after this time"""
    dtypes: tuple[DtypeName, ...] = argument((), nargs="+")
    """dtypes to measure; without any, bfloat16, and on a CPU float32, and bfloat16 if native"""
