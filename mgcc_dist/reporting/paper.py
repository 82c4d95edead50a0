"""The paper's tables, from configs/paper/tables.yaml."""

from dataclasses import dataclass
from typing import Any

import yaml

from mgcc_dist.common.config import CONFIGS
from mgcc_dist.common.errors import UserError

TABLES = CONFIGS / "paper" / "tables.yaml"


@dataclass(frozen=True)
class PaperTable:
    name: str
    """"Table I", ..."""
    setting: str
    rows: dict[str, dict[str, Any]]
    """I to VI: row -> data set -> metric -> [mean, standard deviation or None]; VII: row -> quantity -> number"""

    def score(self, row: str, dataset: str, metric: str) -> tuple[float, float | None] | None:
        """Mean and standard deviation in percent; None where the paper has no such figure."""
        cell = self.rows.get(row, {}).get(dataset, {}).get(metric)
        return (cell[0], cell[1]) if cell else None


def paper_table(key: str) -> PaperTable:
    """The table of that key, such as table_I.

    Raises:
        UserError: there is none.
    """
    tables = yaml.safe_load(TABLES.read_text(encoding="utf-8"))
    if key not in tables:
        raise UserError(f"paper: {key} is not one of the paper's tables; configs/paper holds {', '.join(tables)}")
    return PaperTable(key.replace("table_", "Table "), tables[key]["setting"], tables[key]["rows"])
