"""Sheets that a human's spreadsheet opens: no cell is a formula, and every text comes back."""

import csv
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import data
from benchmarks import descriptions
from command import sheets
from report import tables

ROOT = Path(__file__).resolve().parent.parent
STARTS = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")  # OWASP, CSV injection
HARMFUL = (
    "=1+1", '=HYPERLINK("http://x")', "+ Stage I", "-2+3", "- fever", "@SUM(A1)", "\t=1", "＝1",
)  # fmt: skip
BEGINS = st.lists(st.sampled_from(["'", *STARTS, "1", ".5", " "]), max_size=4).map("".join)
TEXT = st.builds(str.__add__, BEGINS, st.text(st.characters(codec="utf-8"), max_size=6))


def cells(path: Path) -> list[list[str]]:
    """Rows of cells under the header, as a spreadsheet sees them."""
    with open(path, newline="", encoding="utf-8-sig") as file:
        return list(csv.reader(file))[1:]


def is_formula(cell: str) -> bool:
    return cell.startswith(STARTS) and not re.fullmatch(r"[-+]\d+(\.\d+)?", cell, re.ASCII)


@given(st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=4))
@settings(max_examples=300, deadline=None)
def test_no_cell_is_a_formula_and_every_text_comes_back(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("sheet") / "sheet.csv"
    sheets.write_sheet(path, ["one", "two"], rows)
    assert not [cell for row in cells(path) for cell in row if is_formula(cell)]
    found = [(row["one"], row["two"]) for _, row in sheets.read_sheet(path, ["one", "two"])]
    assert found == rows


@pytest.mark.parametrize("text", HARMFUL)
def test_a_formula_is_marked_and_read_the_same_with_the_mark_or_without(tmp_path, text):
    sheets.write_sheet(tmp_path / "sheet.csv", ["text"], [[text]])
    assert cells(tmp_path / "sheet.csv") == [["'" + text]]
    with open(tmp_path / "saved.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["text"], [text]])  # Excel drops the mark of an edited cell
    for name in ("sheet.csv", "saved.csv"):
        ((_, row),) = sheets.read_sheet(tmp_path / name, ["text"])
        assert row == {"text": text}


SAFE = ("-6.72", "+4.55", "-3", "'tis", "''", "x=1", " =1", "id:-1+1", "")


@pytest.mark.parametrize("text", SAFE)
def test_numbers_and_common_texts_are_written_as_they_are(tmp_path, text):
    sheets.write_sheet(tmp_path / "sheet.csv", ["text", "n"], [[text, 1]])
    assert cells(tmp_path / "sheet.csv") == [[text, "1"]]


def test_a_question_under_review_comes_back_though_it_begins_like_a_formula(tmp_path):
    questions = [
        data.Question(text, {}, "x", [], id=str(number), meta={"needs_review": "- lost"})
        for number, text in enumerate(HARMFUL)
    ]
    descriptions.write_review(tmp_path / "review.csv", questions)
    assert not [cell for row in cells(tmp_path / "review.csv") for cell in row if is_formula(cell)]
    reviewed = descriptions.read_reviewed(str(tmp_path / "review.csv"))
    assert reviewed == {str(i): (text.strip(), "- lost") for i, text in enumerate(HARMFUL)}


def test_gains_in_the_tables_stay_numbers(tmp_path):
    tables.paper_tables([], tmp_path)
    gains = {row[4] for row in cells(tmp_path / "table1.csv") if row[3] == "delta"}
    assert {"+2.85", "-6.72"} <= gains and all(map(float, gains))


def test_sheets_are_written_in_one_place():
    folders = ("command", "engines", "benchmarks", "clinic", "report")
    paths = [*ROOT.glob("*.py"), *(path for name in folders for path in (ROOT / name).glob("*.py"))]
    texts = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in paths}
    writers = [name for name, text in texts.items() if re.search(r"csv\.(Dict)?[wW]riter", text)]
    assert writers == ["command/sheets.py"]
