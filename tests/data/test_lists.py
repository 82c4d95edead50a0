import zipfile

import pytest

from mgcc_dist.common.errors import UserError
from mgcc_dist.data.readers import lists, markup
from mgcc_dist.data.readers.lists import number_in, read_list

COLUMNS = ("Image", "Type")


def write_workbook(path, sheet, shared=None):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as book:
        book.writestr("xl/worksheets/sheet1.xml", f"<x:worksheet xmlns:x='urn:sheet'>{sheet}</x:worksheet>")
        if shared:
            book.writestr("xl/sharedStrings.xml", shared)
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
def test_numbers_lose_what_differs_between_lists_and_files(text, name):
    assert number_in(text) == name


def test_csv_may_have_a_byte_order_mark_spaces_quotes_other_columns_and_empty_rows(tmp_path):
    path = tmp_path / "list.csv"
    path.write_bytes(b'\xef\xbb\xbfNote, Type ,Image\r\n"a,b",Benign, 7 \r\n\r\n,,\r\nc,Malignant,8\r\nshort\r\n')
    table = read_list(path, COLUMNS)
    assert table.rows == {"7": {"Image": "7", "Type": "Benign"}, "8": {"Image": "8", "Type": "Malignant"}}
    assert table.problems == []


def test_workbook_cells_of_every_kind_are_read_in_their_places(tmp_path):
    rows = "<x:row r='1'><x:c r='B1' t='s'><x:v>1</x:v></x:c><x:c r='AA1' t='inlineStr'><x:is><x:t>Ty</x:t>"
    rows += "<x:t>pe</x:t></x:is></x:c></x:row><x:row r='2'><x:c r='B2'><x:v>3</x:v></x:c>"
    rows += "<x:c r='AA2' t='str'><x:v>Benign</x:v></x:c></x:row><x:row r='3'><x:c r='B3'><x:v>4</x:v></x:c></x:row>"
    shared = "<sst><si><t>other</t></si><si><r><t>Ima</t></r><r><t>ge</t></r></si></sst>"
    path = write_workbook(tmp_path / "list.xlsx", rows, shared)
    assert read_list(path, COLUMNS, number_in).rows == {
        "3": {"Image": "3", "Type": "Benign"},
        "4": {"Image": "4", "Type": ""},
    }


def test_a_missing_column_is_named_with_those_there_are(tmp_path):
    (tmp_path / "list.csv").write_text("Image,Kind\n1,Benign\n")
    with pytest.raises(UserError, match=r"list\.csv has no column 'Type'; its columns are Image, Kind"):
        read_list(tmp_path / "list.csv", COLUMNS)
    (tmp_path / "empty.csv").write_text("")
    with pytest.raises(UserError, match=r"empty\.csv has no column 'Image'"):
        read_list(tmp_path / "empty.csv", COLUMNS)


def unreadable():
    cell = "<x:row r='1'><x:c r='{}' t='{}'><x:v>{}</x:v></x:c></x:row>"
    yield "latin.csv", lambda path: path.write_bytes(b"Image,Type\n1,\xe9\n")
    yield "open quote.csv", lambda path: path.write_text('Image,Type\n1,"Benign\n')
    yield "no zip.xlsx", lambda path: path.write_bytes(b"Image,Type")
    yield "other zip.xlsx", lambda path: zipfile.ZipFile(path, "w").close()
    yield "number.xlsx", lambda path: write_workbook(path, cell.format("A1", "s", "one"), "<sst/>")
    yield "nowhere.xlsx", lambda path: write_workbook(path, cell.format("ABCDE1", "n", "1"))
    yield "no place.xlsx", lambda path: write_workbook(path, cell.format("", "n", "1"))
    yield "cut.xlsx", lambda path: path.write_bytes(write_workbook(path, "<x:row/>").read_bytes()[:-40])


@pytest.mark.parametrize(("name", "write"), list(unreadable()))
def test_a_list_that_cannot_be_read_is_one_error_with_advice(tmp_path, name, write):
    write(tmp_path / name)
    with pytest.raises(UserError, match=rf"{name} is not a readable list \(.*\); save it as CSV in UTF-8"):
        read_list(tmp_path / name, COLUMNS)


def test_a_workbook_that_unpacks_to_too_much_or_defines_entities_is_refused(tmp_path, monkeypatch):
    path = write_workbook(tmp_path / "list.xlsx", " " * 10_000)
    monkeypatch.setattr(lists, "MOST", 5_000)
    with pytest.raises(UserError, match=r"its xl/worksheets/sheet1\.xml is over 5000 bytes"):
        read_list(path, COLUMNS)
    with zipfile.ZipFile(path, "w") as book:
        book.writestr("xl/worksheets/sheet1.xml", '<!DOCTYPE a [<!ENTITY e "e">]><a>&e;</a>')
    with pytest.raises(UserError, match="DOCTYPE"):
        read_list(path, COLUMNS)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"<a>",
        b"<a/><b/>",
        b"<?xml version='1.0' encoding='none'?><a/>",
        b"<!DOCTYPE a><a/>",
        b'<!DOCTYPE a SYSTEM "file:///etc/passwd"><a/>',
        '<!DOCTYPE a [<!ENTITY e "e">]><a>&e;</a>'.encode("utf-16"),
        b"<a>&undefined;</a>",
    ],
)
def test_markup_refuses_what_is_not_plain_xml(content):
    with pytest.raises(ValueError, match=r"DOCTYPE|not well-formed"):
        markup.parse(content)


def test_markup_keeps_text_and_attributes_and_drops_namespaces():
    root = markup.parse(b"<x:a xmlns:x='urn:x' k='v'>1 &lt; 2<x:b>&#233;</x:b></x:a>")
    assert (root.tag, root.get("k"), root.text, root.findtext("b")) == ("a", "v", "1 < 2", "é")
