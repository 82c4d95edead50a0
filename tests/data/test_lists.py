import datetime
import sys

import openpyxl
import pytest

from mgcc_dist.common.errors import UserError
from mgcc_dist.data.readers.lists import image_number, read_list

COLUMNS = ("Image", "Type")


def write_workbook(path, rows):
    book = openpyxl.Workbook()
    for row in rows:
        book.active.append(row)
    book.create_sheet("other").append(["not", "read"])
    book.save(path)
    return path


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("case001", "1"),
        ("000010.png", "10"),
        ("0", "0"),
        ("0000.jpg", "0"),
        ("12.0", "12"),
        ("total", "total"),
        ("", ""),
    ],
)
def test_image_numbers_of_lists_and_files_are_normalised(text, name):
    assert image_number(text) == name


def test_csv_may_have_a_byte_order_mark_spaces_quotes_other_columns_and_empty_rows(tmp_path):
    path = tmp_path / "list.csv"
    path.write_bytes(b'\xef\xbb\xbfNote, Type ,Image\r\n"a,b",Benign, 7 \r\n\r\n,,\r\nc,Malignant,8\r\nshort\r\n')
    table = read_list(path, COLUMNS)
    assert table.rows == {"7": {"Image": "7", "Type": "Benign"}, "8": {"Image": "8", "Type": "Malignant"}}
    assert table.bad_files == []


def test_workbook_cells_of_every_type_are_read_in_their_columns(tmp_path):
    day = datetime.date(2024, 5, 1)
    rows = [["Note", "Image", day, "Type"], [None, 3, 1.5, "Benign"], [], [day, "case004.png"], ["", 5.0, True, 1]]
    path = write_workbook(tmp_path / "list.xlsx", rows)
    assert read_list(path, COLUMNS, image_number).rows == {
        "3": {"Image": "3", "Type": "Benign"},
        "4": {"Image": "case004.png", "Type": ""},
        "5": {"Image": "5", "Type": "1"},
    }


def test_missing_column_is_reported_with_the_existing_ones(tmp_path):
    (tmp_path / "list.csv").write_text("Image,Kind\n1,Benign\n")
    with pytest.raises(UserError, match=r"list\.csv: has no column 'Type', only Image, Kind"):
        read_list(tmp_path / "list.csv", COLUMNS)
    (tmp_path / "empty.csv").write_text("")
    with pytest.raises(UserError, match=r"empty\.csv: has no column 'Image'"):
        read_list(tmp_path / "empty.csv", COLUMNS)


def truncated_workbook(path):
    path.write_bytes(write_workbook(path, [COLUMNS]).read_bytes()[:-40])


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("latin.csv", lambda path: path.write_bytes(b"Image,Type\n1,\xe9\n")),
        ("open quote.csv", lambda path: path.write_text('Image,Type\n1,"Benign\n')),
        ("no zip.xlsx", lambda path: path.write_bytes(b"Image,Type")),
        ("truncated.xlsx", truncated_workbook),
    ],
)
def test_unreadable_list_is_one_error_with_advice(tmp_path, name, write):
    write(tmp_path / name)
    with pytest.raises(UserError, match=rf"{name}: not a readable list \(.*\)\. Save it as CSV in UTF-8\."):
        read_list(tmp_path / name, COLUMNS)


@pytest.mark.parametrize("module", ["openpyxl", "defusedxml"])
def test_workbook_without_the_extra_is_one_error_that_names_it(tmp_path, monkeypatch, module):
    path = write_workbook(tmp_path / "list.xlsx", [COLUMNS])
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=r"list\.xlsx: reading a workbook needs `pip install 'mgcc-dist\[readers\]'`"):
        read_list(path, COLUMNS)
