"""Progress of long work, shown by the main process: a bar on a terminal, otherwise a log line now and then."""

import logging
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

from mgcc_dist.common.log import PACKAGE
from mgcc_dist.common.rank_errors import rank

Item = TypeVar("Item")

logger = logging.getLogger(__name__)

LINE_EVERY_PERCENT = 5
MIN_SECONDS_BETWEEN_LINES = 10  # short work must not fill a log
MAX_SECONDS_BETWEEN_LINES = 180

# The remaining time comes before the parts that a narrow terminal cuts off.
BAR_FORMAT = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_noinv_fmt}{postfix}]"


class ProgressBar:
    """Progress bar with the remaining time.

    On a terminal it is a tqdm bar on stderr, as wide as the terminal. Elsewhere (a Slurm log, a pipe) it logs a plain
    line every 5 %, but no more than one in 10 seconds, no less than one in 3 minutes, and one at the end. Nothing is
    shown on ranks other than 0 or with a log level above INFO.

    Args:
        total: units of work, of all ranks together.
        description: the work, such as `sampling`; each line starts with it.
        unit: what is counted, in the plural, such as `images`.
        initial: units done by an earlier start of the program.
        share: units that this rank does, if the work is divided over the ranks. The bar, which only rank 0 shows, takes
            the other ranks to be as far as this one.
    """

    def __init__(self, total: int, description: str, unit: str, initial: int = 0, share: int | None = None) -> None:
        self.total = total
        self.done = self._initial = self._last_logged = initial
        self._share = total if share is None else share
        self._own = initial
        self._description = description
        self._unit = unit
        self._values: dict[str, str] = {}
        self._began = self._last_line = time.monotonic()
        self._shown = rank() == 0 and PACKAGE.level <= logging.INFO and self._share > 0
        self._bar: tqdm | None = None
        if self._shown and sys.stderr.isatty():
            self._bar = tqdm(
                total=total,
                initial=initial,
                desc=description,
                unit=f" {unit}",
                file=sys.stderr,
                dynamic_ncols=True,
                bar_format=BAR_FORMAT,
            )

    def __enter__(self) -> "ProgressBar":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def update(self, units: int = 1) -> None:
        """Count `units` more as done by this rank."""
        self._own += units
        before, self.done = self.done, self._own * self.total // max(self._share, 1)
        if self._bar is not None:
            self._bar.update(self.done - before)
        elif self._shown:
            since = time.monotonic() - self._last_line
            stepped = 100 * (self.done - self._last_logged) >= LINE_EVERY_PERCENT * self.total
            if self.done < self.total and (
                since >= MAX_SECONDS_BETWEEN_LINES or (stepped and since >= MIN_SECONDS_BETWEEN_LINES)
            ):
                self._log()

    def count(self, items: Iterable[Item], units: Callable[[Item], int] = lambda _: 1) -> Iterator[Item]:
        """Yield `items`; count the `units` of each as done when the caller has finished with it."""
        for item in items:
            yield item
            self.update(units(item))

    def show(self, **values: float) -> None:
        """Show these values next to the progress from now on."""
        self._values |= {key: f"{value:.4g}" for key, value in values.items()}
        if self._bar is not None:
            self._bar.set_postfix(self._values, refresh=False)

    def close(self) -> None:
        """Draw the bar, or log a line, for the last time."""
        if self._bar is not None:
            self._bar.close()
        elif self._shown and self.done > self._last_logged:
            self._log()
        self._shown = False

    def _log(self) -> None:
        """`sampling: 36/725 images (5%), 3.1 images/s, 03:41 left`"""
        now = time.monotonic()
        rate = (self.done - self._initial) / max(now - self._began, 1e-9)
        left = (self.total - self.done) / rate
        parts = [
            f"{self._description}: {self.done}/{self.total} {self._unit} ({100 * self.done / self.total:.0f}%)",
            f"{rate:.3g} {self._unit}/s",
            f"{tqdm.format_interval(left)} left" if left else f"took {tqdm.format_interval(now - self._began)}",
            *(f"{key}={value}" for key, value in self._values.items()),
        ]
        logger.info("%s", ", ".join(parts))
        self._last_line, self._last_logged = now, self.done


def track(items: Collection[Item], description: str, unit: str) -> Iterator[Item]:
    """Yield `items` one by one and show how many of them the caller has finished with."""
    with ProgressBar(len(items), description, unit) as bar:
        yield from bar.count(items)
