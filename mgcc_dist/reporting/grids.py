"""Tables as every format shows them: headings over columns, rows of short texts, some bold, some with a mark."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from mgcc_dist.evaluation.statistics import MIN_IMAGES, RESAMPLES
from mgcc_dist.reporting.tables import METRICS, PROTOCOLS, Cell, Score, Table

NAMES = {"iou": "IoU", "recall": "Recall", "precision": "Precision", "f1": "F1"}
NONE = "\N{EN DASH}"
DIFFERENCE = "Δ"
SIGNIFICANT = 0.05


@dataclass(frozen=True)
class Text:
    text: str
    bold: bool = False
    mark: bool = False
    """differs significantly from the reference"""


@dataclass(frozen=True)
class Grid:
    caption: str
    groups: list[tuple[str, list[str]]]
    """headings, each over columns with headings of their own"""
    rows: list[tuple[str, list[Text]]]
    """name, a text for each column"""


@dataclass(frozen=True)
class Section:
    title: str
    notes: list[str]
    """what it is and is not, before the tables"""
    grids: list[Grid]
    legend: list[str]
    """how to read the tables, after them"""
    details: list[Grid] = field(default_factory=list)
    """tables that a page may fold away"""


def section(table: Table) -> Section:
    sweep, paper = table.sweep, table.paper
    cells = [cell for column in table.cells.values() for cell in column.values()]
    finished, asked = sum(len(cell.finished) for cell in cells), sum(cell.asked for cell in cells)
    notes = [sweep.notes, f"{finished} of {asked} runs are finished."]
    if paper:
        notes.append(f"{paper.name} of the paper: {paper.setting}.")
    for dataset, column in sweep.columns.items():
        if paper and column != dataset and any(column in row for row in paper.rows.values()):
            notes.append(f"{dataset} stands in for the paper's {column}, so the differences are between data sets too.")
    grids, details = [], []
    for dataset, rows in table.cells.items():
        grids.append(_beside_the_paper(f"{dataset}, protocol of the paper's released code", rows))
        grids.append(_other_protocols(f"{dataset}, corrected protocol and lesions alone", rows))
        if sweep.reference and any(score.test for cell in rows.values() for score in cell.scores.values()):
            details += [_tests(dataset, rows, sweep.reference, protocol) for protocol in PROTOCOLS]
    return Section(sweep.title, [note for note in notes if note], grids, _legend(table), details)


def _beside_the_paper(caption: str, cells: dict[str, Cell]) -> Grid:
    groups: list[tuple[str, list[str]]] = [("", ["runs"])]
    columns: list[dict[str, Text]] = [{row: Text(runs(cell)) for row, cell in cells.items()}]
    for metric in METRICS:
        scores = {row: cell.scores["paper", metric] for row, cell in cells.items()}
        columns.append(_ours(scores))
        if not any(score.paper for score in scores.values()):
            groups.append((NAMES[metric], ["ours"]))
            continue
        groups.append((NAMES[metric], ["ours", "paper", DIFFERENCE]))
        columns.append(_bold({row: _paper(score) for row, score in scores.items()}, _paper_mean, scores))
        columns.append({row: Text(_signed(score.difference)) for row, score in scores.items()})
    return _grid(caption, groups, columns, list(cells))


def _other_protocols(caption: str, cells: dict[str, Cell]) -> Grid:
    protocols = PROTOCOLS[1:]
    columns = [
        _ours({row: cell.scores[protocol, metric] for row, cell in cells.items()})
        for protocol in protocols
        for metric in METRICS
    ]
    return _grid(caption, [(each, [NAMES[m] for m in METRICS]) for each in protocols], columns, list(cells))


def _tests(dataset: str, cells: dict[str, Cell], reference: str, protocol: str) -> Grid:
    others = [row for row in cells if row != reference]
    columns: list[dict[str, Text]] = []
    for metric in METRICS:
        tested = {row: _tested(cells[row].scores[protocol, metric]) for row in others}
        columns += [{row: texts[place] for row, texts in tested.items()} for place in range(3)]
    caption = f"{dataset}, {protocol} protocol: {reference} minus each other row, over the same images"
    return _grid(caption, [(NAMES[m], ["mean", "95 % interval", "p"]) for m in METRICS], columns, others)


def _tested(score: Score) -> list[Text]:
    """Mean difference, interval, p value."""
    if score.test is None or score.p_holm is None:
        return [Text(NONE)] * 3
    interval = f"{_signed(score.test.low, 1)} to {_signed(score.test.high, 1)}"
    p = "< 0.001" if score.p_holm < 0.001 else f"{score.p_holm:.3f}"
    return [Text(_signed(score.test.mean), bold=score.p_holm < SIGNIFICANT), Text(interval), Text(p)]


def _legend(table: Table) -> list[str]:
    sweep = table.sweep
    lines = [
        "In percent: mean ± sample standard deviation over the runs, each at its best step, which is chosen on these "
        "same images. Bold is the best of a column, among the rows with most runs.",
    ]
    if table.paper:
        lines.append(
            f"{DIFFERENCE} is ours minus the paper's. Only its own protocol compares: it counts an empty truth as all "
            "foreground in recall, precision and F1. Corrected: 100 where truth and prediction are both empty. Lesion: "
            "the images with a lesion alone."
        )
    if sweep.reference:
        lines.append(
            f"† differs from {sweep.reference}, p < {SIGNIFICANT}: paired bootstrap over images ({RESAMPLES:,} "
            f"resamples, two-sided, {MIN_IMAGES} images or more) of the splits that both have, Holm-corrected over the "
            "rows of a column. It says that these trained networks differ, not that other seeds would agree."
        )
    return lines


def _grid(
    caption: str, groups: list[tuple[str, list[str]]], columns: Sequence[dict[str, Text]], rows: Sequence[str]
) -> Grid:
    return Grid(caption, groups, [(row, [column[row] for column in columns]) for row in rows])


def _ours(scores: dict[str, Score]) -> dict[str, Text]:
    texts = {
        row: Text(figure(score.mean, score.deviation), mark=_is_significant(score)) for row, score in scores.items()
    }
    most = max(len(score.values) for score in scores.values())
    return _bold(texts, lambda score: score.mean if len(score.values) == most else None, scores)


def _bold(texts: dict[str, Text], value: Callable[[Score], float | None], scores: dict[str, Score]) -> dict[str, Text]:
    """The texts, with the highest bold as far as two decimals tell; none where there is nothing to compare."""
    values = {row: round(number, 2) for row, score in scores.items() if (number := value(score)) is not None}
    best = max(values.values()) if len(values) > 1 else None
    bold = {row for row, number in values.items() if number == best}
    return {row: Text(text.text, row in bold, text.mark) for row, text in texts.items()}


def _paper_mean(score: Score) -> float | None:
    return score.paper[0] if score.paper else None


def _paper(score: Score) -> Text:
    return Text(figure(*score.paper) if score.paper else NONE)


def figure(mean: float | None, deviation: float | None) -> str:
    if mean is None:
        return NONE
    return f"{mean:.2f}" if deviation is None else f"{mean:.2f} ± {deviation:.2f}"


def _signed(number: float | None, places: int = 2) -> str:
    """With a true minus sign, which is as wide as the plus sign; what rounds to 0 has none."""
    if number is None:
        return NONE
    sign = "" if round(number, places) == 0 else "+" if number > 0 else "\N{MINUS SIGN}"
    return f"{sign}{abs(number):.{places}f}"


def _is_significant(score: Score) -> bool:
    return score.p_holm is not None and score.p_holm < SIGNIFICANT


def runs(cell: Cell) -> str:
    """3 of 3; 1 of 3, 1 unfinished"""
    unfinished = f", {len(cell.unfinished)} unfinished" if cell.unfinished else ""
    return f"{len(cell.finished)} of {cell.asked}{unfinished}"
