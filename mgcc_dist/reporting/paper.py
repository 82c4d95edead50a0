"""The paper's result tables, read from configs/paper/tables.yaml."""

from dataclasses import dataclass
from typing import Any

import yaml

from mgcc_dist.common.errors import UserError
from mgcc_dist.sweep.schema import PAPER_TABLES


@dataclass(frozen=True)
class PaperTable:
    name: str
    """"Table I", ..."""
    setting: str
    rows: dict[str, dict[str, Any]]
    """Tables I to VI: row -> data set -> metric -> [mean, standard deviation or None]; VII: row -> metric -> value"""

    def score(self, row: str, dataset: str, metric: str) -> tuple[float, float | None] | None:
        """Return mean and standard deviation in percent, or None if the paper does not report this metric."""
        cell = self.rows.get(row, {}).get(dataset, {}).get(metric)
        return (cell[0], cell[1]) if cell else None


def load_paper_table(key: str) -> PaperTable:
    """Read the table of key `key`, such as table_I.

    Raises:
        UserError: the paper has no such table.
    """
    tables = yaml.safe_load(PAPER_TABLES.read_text(encoding="utf-8"))
    if key not in tables:
        raise UserError(f"paper: {key!r} is not one of the paper's tables. Choose one of: {', '.join(tables)}.")
    return PaperTable(key.replace("table_", "Table "), tables[key]["setting"], tables[key]["rows"])
