"""Format-independent views of tables: grouped column headings and rows of formatted cells."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from mgcc_dist.evaluation.statistics import MIN_IMAGES, RESAMPLES, Interval
from mgcc_dist.reporting.image_arrays import METRICS, PROTOCOLS
from mgcc_dist.reporting.runs import format_names
from mgcc_dist.reporting.tables import ResultTable, RowResult, Score

METRIC_LABELS = {"iou": "IoU", "recall": "Recall", "precision": "Precision", "f1": "F1"}
NO_VALUE = "\N{EN DASH}"
DELTA = "Δ"
SIGNIFICANCE_LEVEL = 0.05
DETAILS_TITLE = (
    f"Paired tests: mean difference, 95 % interval and Holm-corrected p; bold where p is below {SIGNIFICANCE_LEVEL}"
)


@dataclass(frozen=True)
class Cell:
    text: str
    bold: bool = False
    significant: bool = False
    """differs significantly from the reference row; shown with a dagger"""
    note: str = ""
    """a second line on an HTML page, in parentheses elsewhere; such as an interval"""
    shaded: bool = False
    """set apart on an HTML page"""

    @property
    def plain(self) -> str:
        """The text and, in parentheses, the note."""
        return f"{self.text} ({self.note})" if self.note else self.text


@dataclass(frozen=True)
class TableView:
    caption: str
    column_groups: list[tuple[str, list[str]]]
    """group heading, headings of its columns"""
    rows: list[tuple[str, list[Cell]]]
    """row name, one cell per column"""
    runs: dict[str, str] = field(default_factory=dict)
    """names of a row's runs, by row name"""


@dataclass(frozen=True)
class Picture:
    source: str
    """data URI"""
    alt: str
    caption: str = ""
    photo: bool = False
    """whether it is on white, unlike a chart, which is transparent"""


@dataclass(frozen=True)
class ReportSection:
    title: str
    notes: list[str]
    """scope and limitations, shown before the tables"""
    tables: list[TableView]
    legend: list[str]
    """how to read the tables, shown after them"""
    details: list[TableView] = field(default_factory=list)
    """tables that an HTML page may collapse"""
    details_title: str = "More metrics"
    pictures: list[Picture] = field(default_factory=list)
    """shown before the tables, on an HTML page only"""


def mean_cell(interval: Interval | None, shaded: bool = False) -> Cell:
    """Format a mean in percent, with its interval as the note."""
    if interval is None:
        return Cell(NO_VALUE, shaded=shaded)
    known = interval.low is not None and interval.high is not None
    return Cell(
        f"{interval.mean:.1f}", note=f"{interval.low:.1f} to {interval.high:.1f}" if known else "", shaded=shaded
    )


def sweep_section(table: ResultTable) -> ReportSection:
    """Return a sweep's table, next to the paper's, with the paired tests as details."""
    sweep, paper = table.sweep, table.paper
    results = [result for rows in table.results.values() for result in rows.values()]
    finished, expected = sum(len(result.finished) for result in results), sum(result.expected for result in results)
    notes = [sweep.notes, f"{finished} of {expected} runs are finished."]
    if paper:
        notes.append(f"{paper.name} of the paper: {paper.setting}.")
    for dataset, column in sweep.columns.items():
        if paper and column != dataset and any(column in row for row in paper.rows.values()):
            notes.append(
                f"{dataset} replaces the paper's {column}, so differences from the paper include that of the data sets."
            )
    for dataset, rows in table.results.items():
        for row, result in rows.items():
            repeats = result.repeats
            notes += [
                f"{row} on {dataset}: {run.name}{repeats[run.folder]}, so it is not counted in mean and deviation."
                for run in result.finished.values()
                if run.folder in repeats
            ]
    tables, details = [], []
    for dataset, rows in table.results.items():
        tables.append(_comparison_with_paper(f"{dataset}, protocol of the paper's released code", rows))
        tables.append(_other_protocols(f"{dataset}, corrected and lesion protocols", rows))
        if sweep.reference and any(score.test for result in rows.values() for score in result.scores.values()):
            details += [_paired_tests(dataset, rows, sweep.reference, protocol) for protocol in PROTOCOLS]
    return ReportSection(sweep.title, [note for note in notes if note], tables, _legend(table), details, DETAILS_TITLE)


def format_run_count(result: RowResult) -> str:
    """Return "3 of 3", or "1 of 3, 1 unfinished"."""
    unfinished = f", {len(result.unfinished)} unfinished" if result.unfinished else ""
    return f"{len(result.finished)} of {result.expected}{unfinished}"


def format_score(mean: float | None, std: float | None) -> str:
    """Format a mean in percent with its standard deviation, if there is one."""
    if mean is None:
        return NO_VALUE
    return f"{mean:.2f}" if std is None else f"{mean:.2f} ± {std:.2f}"


def _comparison_with_paper(caption: str, results: dict[str, RowResult]) -> TableView:
    groups: list[tuple[str, list[str]]] = [("", ["runs"])]
    columns: list[dict[str, Cell]] = [{row: Cell(format_run_count(result)) for row, result in results.items()}]
    for metric in METRICS:
        scores = {row: result.scores["paper", metric] for row, result in results.items()}
        columns.append(_our_cells(scores))
        if not any(score.paper for score in scores.values()):
            groups.append((METRIC_LABELS[metric], ["ours"]))
            continue
        groups.append((METRIC_LABELS[metric], ["ours", "paper", DELTA]))
        paper_cells = {
            row: Cell(format_score(*score.paper) if score.paper else NO_VALUE) for row, score in scores.items()
        }
        columns.append(_mark_best(paper_cells, lambda score: score.paper[0] if score.paper else None, scores))
        columns.append({row: Cell(_format_signed(score.difference)) for row, score in scores.items()})
    return _table_view(caption, groups, columns, list(results), _run_names(results))


def _other_protocols(caption: str, results: dict[str, RowResult]) -> TableView:
    protocols = PROTOCOLS[1:]
    columns = [
        _our_cells({row: result.scores[protocol, metric] for row, result in results.items()})
        for protocol in protocols
        for metric in METRICS
    ]
    groups = [(protocol, [METRIC_LABELS[metric] for metric in METRICS]) for protocol in protocols]
    return _table_view(caption, groups, columns, list(results), _run_names(results))


def _paired_tests(dataset: str, results: dict[str, RowResult], reference: str, protocol: str) -> TableView:
    others = [row for row in results if row != reference]
    columns: list[dict[str, Cell]] = []
    for metric in METRICS:
        cells = {row: _test_cells(results[row].scores[protocol, metric]) for row in others}
        columns += [{row: cells[row][index] for row in others} for index in range(3)]
    caption = f"{dataset}, {protocol} protocol: {reference} minus each other row, paired by image"
    groups = [(METRIC_LABELS[metric], ["mean", "95 % interval", "p"]) for metric in METRICS]
    return _table_view(caption, groups, columns, others, _run_names(results))


def _test_cells(score: Score) -> list[Cell]:
    """Return cells for mean difference, confidence interval and p value."""
    if score.test is None or score.p_holm is None:
        return [Cell(NO_VALUE)] * 3
    interval = f"{_format_signed(score.test.low, 1)} to {_format_signed(score.test.high, 1)}"
    p = "< 0.001" if score.p_holm < 0.001 else f"{score.p_holm:.3f}"
    return [Cell(_format_signed(score.test.mean), bold=_is_significant(score)), Cell(interval), Cell(p)]


def _legend(table: ResultTable) -> list[str]:
    sweep = table.sweep
    lines = [
        "In percent: mean ± sample standard deviation over the runs. Each run is scored at its best step, which is "
        "selected on the same validation images. Bold: best of a column among the rows with the most runs.",
    ]
    if table.paper:
        lines.append(
            f"{DELTA} is ours minus the paper's. Compare with the paper only under its own protocol, which counts an "
            "empty ground truth as all foreground in recall, precision and F1. Corrected: a score is 100 if ground "
            "truth and prediction are both empty. Lesion: only images with a lesion."
        )
    if sweep.reference:
        lines.append(
            f"† differs from {sweep.reference} with p < {SIGNIFICANCE_LEVEL}: paired bootstrap over the images of the "
            f"splits that both rows have ({RESAMPLES:,} resamples, two-sided, at least {MIN_IMAGES} images), "
            "Holm-corrected over the rows of a column. The test compares these trained networks; it does not cover "
            "other seeds."
        )
    return lines


def _run_names(results: dict[str, RowResult]) -> dict[str, str]:
    return {row: format_names([run.name for run in result.finished.values()]) for row, result in results.items()}


def _table_view(
    caption: str,
    groups: list[tuple[str, list[str]]],
    columns: Sequence[dict[str, Cell]],
    rows: Sequence[str],
    runs: dict[str, str],
) -> TableView:
    cells = [(row, [column[row] for column in columns]) for row in rows]
    return TableView(caption, groups, cells, {row: names for row in rows if (names := runs.get(row))})


def _our_cells(scores: dict[str, Score]) -> dict[str, Cell]:
    cells = {
        row: Cell(format_score(score.mean, score.std), significant=_is_significant(score))
        for row, score in scores.items()
    }
    most_runs = max(len(score.values) for score in scores.values())
    return _mark_best(cells, lambda score: score.mean if len(score.values) == most_runs else None, scores)


def _mark_best(
    cells: dict[str, Cell], value: Callable[[Score], float | None], scores: dict[str, Score]
) -> dict[str, Cell]:
    """Make the highest values bold, compared at two decimals; none if fewer than two rows have a value."""
    values = {row: round(number, 2) for row, score in scores.items() if (number := value(score)) is not None}
    best = max(values.values()) if len(values) > 1 else None
    bold = {row for row, number in values.items() if number == best}
    return {row: Cell(cell.text, row in bold, cell.significant) for row, cell in cells.items()}


def _format_signed(number: float | None, decimals: int = 2) -> str:
    """Format with a sign; a true minus sign is as wide as the plus sign, and what rounds to 0 has no sign."""
    if number is None:
        return NO_VALUE
    sign = "" if round(number, decimals) == 0 else "+" if number > 0 else "\N{MINUS SIGN}"
    return f"{sign}{abs(number):.{decimals}f}"


def _is_significant(score: Score) -> bool:
    return score.p_holm is not None and score.p_holm < SIGNIFICANCE_LEVEL
