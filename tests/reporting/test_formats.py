"""One table in four formats: each is well formed, escapes special characters, and holds every row."""

import csv
import io
import re

import pytest
from sweep_runs import SUPERVISED, finish_all, make_sweep

from mgcc_dist.report import main
from mgcc_dist.reporting.formats import CSV_COLUMNS

NASTY = "50 % of <b>_$x$ & [U] | #1 \\ {~^}*"
LEVELS = {NASTY: 0.5, "CPS": 0.55, "MGCC": 0.6}
ROWS = {NASTY: SUPERVISED, "CPS": {"method": {"name": "cps"}, "network": {"name": "unet"}}, "MGCC": {}}
# Comparison with the paper, other protocols, three tests; four metrics by split; keys that differ.
TABLES = 10


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Map suffix to content, for a sweep with a missing run and text with special characters of every format."""
    folder = tmp_path_factory.mktemp("formats")
    path = make_sweep(folder, rows=ROWS, notes=NASTY)
    finish_all(path, LEVELS, skip=[("CPS", 2)])
    outs = [folder / f"report{suffix}" for suffix in (".html", ".md", ".tex", ".csv")]
    main(["--sweep", str(path), *(f"--out={out}" for out in outs)])
    return {out.suffix: out.read_text() for out in outs}


def test_latex_is_balanced_and_every_row_has_one_cell_per_column(written):
    text = written[".tex"]
    bare = re.sub(r"\\[\\{}&%$#_]", "", text)  # escaped characters do not open or close groups
    for opening, closing in ("{}", (r"\begin", r"\end")):
        assert bare.count(opening) == bare.count(closing) > 0
    assert bare.count("$") % 2 == 0
    assert not re.search(r"(?<!%)[#~]|[^\x00-\x7f]", bare.replace("%\n", ""))  # only characters that pdflatex accepts
    tabulars = re.findall(r"\\begin\{tabular\}\{(l(?:r+))\}(.*?)\\end\{tabular\}", text, re.DOTALL)
    assert len(tabulars) == TABLES
    for columns, body in tabulars:
        rows = [line for line in body.splitlines() if line.endswith(r"\\")]
        for row in rows[1:]:  # the first has headings that span columns
            assert len(re.findall(r"(?<!\\)&", row)) == len(columns) - 1
        spans = [int(n) for n in re.findall(r"\\multicolumn\{(\d+)\}", rows[0])]
        assert sum(spans) == len(columns) - 1
        assert not any(row.startswith(("[", "*")) for row in rows)
        assert [body.count(rule) for rule in (r"\toprule", r"\midrule", r"\bottomrule")] == [1, 1, 1]
    assert r"$\pm$" in text
    assert r"$^\dagger$" in text
    assert r"\textbf{" in text
    assert r"50 \% of $<$b$>$\_\$x\$ \& {[}U{]}" in text


def test_markdown_rows_have_one_cell_per_heading(written):
    text = written[".md"]
    tables = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert len(tables) == TABLES
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1
    assert "<b>" not in re.sub(r"\\<", "", text)
    assert "| CPS | 1 of 2 |" in text
    assert re.search(r"\| MGCC \| 2 of 2 \| \*\*\d\d\.\d\d ± \d\.\d\d\*\* \| \*\*68\.06 ± 2\.45\*\* \|", text)


def test_csv_has_one_line_per_row_protocol_and_metric(written):
    lines = list(csv.DictReader(io.StringIO(written[".csv"])))
    assert tuple(lines[0]) == CSV_COLUMNS
    assert len(lines) == len(ROWS) * 3 * 4
    cell = {(line["row"], line["protocol"], line["metric"]): line for line in lines}
    line = cell["CPS", "paper", "iou"]
    assert (line["table"], line["data set"], line["runs"], line["missing"]) == ("small", "BUSI", "1", "1")
    assert (line["std"], line["paper mean"], line["paper std"]) == ("", "65.97", "1.46")
    assert float(line["difference"]) == pytest.approx(float(line["mean"]) - 65.97)
    assert float(line["low"]) < float(line["reference minus row"]) < float(line["high"])
    assert float(line["p"]) <= float(line["p_holm"]) <= 1
    assert cell["MGCC", "paper", "iou"]["p"] == ""
    assert cell["CPS", "corrected", "iou"]["paper mean"] == ""
    assert (NASTY, "lesion", "f1") in cell


def test_page_shows_the_sweep_table_first_and_escapes_text(written):
    page = written[".html"]
    headings = re.findall(r"<h2>(.*?)</h2>", page)
    assert headings[:2] == ["A title &amp; more", "Segmentation"]
    assert "<b>_" not in page
    assert "&lt;b&gt;_$x$ &amp; [U]" in page
    assert not re.search(r"(src|href)=\"(?!data:)|url\(|@import|<link|<script", page)
    for tag in ("table", "tr", "td", "th", "section", "div", "details"):
        assert len(re.findall(rf"<{tag}[ >]", page)) == page.count(f"</{tag}>")


def test_missing_runs_are_printed(tmp_path, capsys):
    path = make_sweep(tmp_path)
    main(["--sweep", str(path), "--out", str(tmp_path / "report.md")])
    printed = capsys.readouterr().out.splitlines()
    assert printed[:2] == ["small: 0 of 6 runs are finished", "  U-Net on BUSI: 0 of 2"]
    assert "| U-Net | 0 of 2 | – | **69.69 ± 0.95** |" in (tmp_path / "report.md").read_text()  # noqa: RUF001
