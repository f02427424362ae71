"""Sheets that a human fills in with a spreadsheet: CSV whose cells stay texts.

    write_sheet   rows -> CSV in UTF-8 in which no cell is a formula; never replaces a filled-in one
    read_sheet    CSV -> rows, as texts, or one error that names every row at fault

Where we depart from the paper, or it is silent: it shows no sheet.
"""

import csv
import io
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import data

# A spreadsheet runs a cell that begins so as a formula (OWASP, CSV injection), except a plain
# number such as -6.72. A sheet marks such a cell with a "'" in front, which makes it text. A text
# that looks marked already is marked too, so that reading gives back every text. If a spreadsheet
# has removed the mark, the text is read as it is.
FORMULA = re.compile(r"'*(?![-+]?[0-9]+(?:\.[0-9]+)?\Z)[=+\-@\t\r\n＝＋－＠]")
# characters in a cell; a chain of reasoning is longer than Python's limit of 131,072
csv.field_size_limit(2**31 - 1)


def read_sheet(path: str | Path, columns: list[str]) -> list[tuple[int, dict[str, str]]]:
    """(number, row) of a CSV, numbered as in a spreadsheet: the header is row 1. Raises RowError
    for a file that cannot be read, or that lacks one of `columns`, in its header or in any row:
    such rows are listed together. Marks in front of formulas are removed."""
    with data.open_file(path) as file:
        content = file.read()
    try:
        sheet = csv.DictReader(io.StringIO(content.decode("utf-8-sig"), newline=""))
        rows, names = list(enumerate(sheet, 2)), sheet.fieldnames or []
    except (UnicodeDecodeError, csv.Error) as error:
        message = f"cannot be read ({error}); save the filled-in sheet as CSV in UTF-8"
        raise data.RowError(f"{path}: {message}") from None
    if lost := [name for name in columns if name not in names]:
        wanted = f"expected {' and '.join(columns)} among them"
        faults = [f"no column {lost[0]!r}: columns are {names}, {wanted}"]
    else:
        short = [(number, name) for number, row in rows for name in columns if row[name] is None]
        faults = [f"row {number}: no column {name!r}" for number, name in short]
    if faults:
        shown = faults[:20] + [f"... and {len(faults) - 20} more"] * (len(faults) > 20)
        message = "save the sheet as CSV with commas, its first line unchanged"
        raise data.RowError(f"{path}: {'; '.join(shown)}; {message}")
    return [(number, {name: unmarked(row[name]) for name in names}) for number, row in rows]


def marked(text: str) -> str:
    """A cell's text as a sheet holds it."""
    return "'" + text if FORMULA.match(text) else text


def unmarked(text: str | None) -> str | None:
    """A cell's text without its mark; None if its row lacks it."""
    return text[1:] if text and text[0] == "'" and FORMULA.match(text) else text


def write_sheet(path: Path, columns: Sequence[str], rows: Iterable[Iterable]) -> None:
    """Writes a sheet in which no cell is a formula. The mark in front of the file tells a
    spreadsheet that it is UTF-8. Raises RowError if it exists with other content: a human may have
    filled it in."""
    text = io.StringIO(newline="")
    csv.writer(text).writerows([columns, *([marked(str(cell)) for cell in row] for row in rows)])
    content = text.getvalue().encode("utf-8-sig")
    if path.exists() and path.read_bytes() != content:
        message = "is there already, and a human may have filled it in; move it away"
        raise data.RowError(f"{path}: {message}")
    temporary = data.unfinished(path)
    temporary.write_bytes(content)
    temporary.replace(path)
