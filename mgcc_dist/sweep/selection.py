"""Options that select runs of a sweep, for `mgcc sweep` and `mgcc slurm`."""

from dataclasses import dataclass

from mgcc_dist.common.options import argument
from mgcc_dist.common.value_types import FileOrName, Name
from mgcc_dist.sweep.expansion import Sweep, read_sweep, select


@dataclass(frozen=True)
class SweepOptions:
    sweep: FileOrName = argument(positional=True)
    """sweep file, or the name of a shipped sweep"""


@dataclass(frozen=True)
class SelectionOptions(SweepOptions):
    datasets: tuple[Name, ...] = argument((), nargs="+")
    """only runs on these data sets, and the steps that they need"""
    rows: tuple[Name, ...] = argument((), nargs="+")
    """only these rows"""
    seeds: tuple[int, ...] = argument((), nargs="+")
    """only these seeds"""

    def read(self) -> Sweep:
        """Read the sweep and select its runs.

        Raises:
            UserError: the sweep can't be read, or has no such data set, row or seed.
        """
        return select(read_sweep(self.sweep), self.datasets, self.rows, self.seeds)
