"""Tables of an evaluation: runs side by side, and ours under the paper's (§4, App. D).

    table          one column a result, one row a figure: Markdown, also aligned for a terminal
    paper_tables   table1.md, table2.md and .csv: our rows, with interval, under the paper's

A column of paper_tables is a benchmark, a subset of it and a number of questions. What was asked
otherwise than in the paper (another benchmark, fewer questions, without options) has columns of its
own, right of the paper's, where the paper's rows have "–".

reads results of score.read_results. A result's name says its size and stage, SIZE/STAGE: "7B/base",
"7B/Stage-I", "32B/Stage-II". A size of PAPER_SIZES stands beside the paper's values. A result of
another name is in every table and picture that needs no stage.

Where we depart from the paper, or it is silent: it gives no intervals, ours are 95 %. Its tables
are printed as they are, misprints included, with a note wherever a value cannot be k of n
questions. A Δ of ours compares the same questions or is not given: some of the paper's compare 288
with 286 (note c).
"""

import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import data
from command.sheets import write_sheet
from judge import CRITERIA
from report import score

STAGES = ("base", "Stage-I", "Stage-II")
PAPER_SIZES = {  # the paper's models, by the size in a name
    "7B": "QwenVL2.5-7B", "8B": "InternVL3.0-8B", "32B": "QwenVL2.5-32B", "72B": "QwenVL2.5-72B",
}  # fmt: skip
TITLES = {
    "medxpertqa-mm": "MedXpertQA-MM", "medxpertqa-text": "MedXpertQA-Text", "mmmu": "MMMU-Health",
    "mmmu-pro": "MMMU-Pro-Health", "mmmu-pro-vision": "MMMU-Pro-Health, vision", "medqa": "MedQA",
    "medbullets-op4": "Medbullets, 4 options", "medbullets-op5": "Medbullets, 5 options",
}  # fmt: skip
OPEN = ", open-ended"  # after the name of a benchmark that was asked without its options


def stage_of(result: dict) -> tuple[str, str]:
    """(size, stage) from a name SIZE/STAGE; ("", name) of any other."""
    size, _, stage = result["name"].rpartition("/")
    return size, stage


def distinct(names: list[str]) -> None:
    """Raises RowError for two results of one name."""
    if twice := [name for name in names if names.count(name) > 1]:
        same = f"results.json: name: two results are called {twice[0]!r}"
        raise data.RowError(f"{same}; nothing would tell them apart; evaluate with --name")


def absent(sizes: Iterable[str], results: list[dict]) -> list[str]:
    """The names SIZE/STAGE of these sizes that no result has."""
    names = {result["name"] for result in results}
    wanted = [f"{size}/{stage}" for size in sizes for stage in STAGES]
    return [name for name in wanted if name not in names]


# --------------------------------------------------------------------------------------------------
# One column a result


def markdown(rows: list[list[str]]) -> str:
    """Rows of cells, the header first."""
    rows = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = []
    for row in rows:
        lines.append(f"| {' | '.join(cell.ljust(width) for cell, width in zip(row, widths))} |")
    rule = "|".join("-" * (width + 2) for width in widths)
    return "\n".join([lines[0], f"|{rule}|", *lines[1:]])


def interval(found: list[float], form: str = ".2f") -> str:
    """[value, low, high] as text."""
    value, low, high = (format(number, form) for number in found)
    return f"{value} ({low} … {high})"


ROWS = (  # label, and key of the figures or of their criteria
    ("questions × samples", "questions"),
    ("accuracy", "accuracy"),
    ("accuracy, by the benchmark's rule (official.py)", "official"),
    ("… which cannot read, of all answers", "official_unparsed"),
    ("majority vote", "majority"),
    ("any right (pass@n)", "pass"),
    ("chains with a readable verdict", "judged"),
    ("chains that meet all four criteria", "all_criteria"),
    *((f"… {name.replace('_', ' ')}", name) for name in CRITERIA),
    ("hallucinate, of those that look", "hallucinated"),
    ("accuracy, answers forced where none is readable", "forced"),
    ("words a chain", "words"),
    ("… median", "words_median"),
    ("… 95th percentile", "words_95"),
    ("loop, of all answers", "loops"),
    ("cannot be read, of all answers", "unparsed"),
    ("… cut off, of all answers", "cut_off"),
    ("… prompt over long, of all answers", "over_long"),
    ("… unanswered, of all answers", "unanswered"),
)
RARE = {"over_long": 0, "unanswered": 0}  # such a row is shown where there are any
FORMS = {  # of figures that are neither a share nor a share with its interval
    "questions": "{questions} × {samples}", "judged": "{judged} of {sent}",
    "hallucinated": "{hallucinated:.3f} of {judged_looking}", "words": "{words:.0f}",
    "words_median": "{words_median:.0f}", "words_95": "{words_95}",
}  # fmt: skip


def cell(figures: dict, key: str) -> str:
    """One figure as text; "–" where there is none."""
    value = figures.get(key)
    if value is None:
        return "–"
    if key in FORMS:
        return FORMS[key].format(**figures)
    if isinstance(value, dict):  # by number of samples
        n = max(value, key=int)
        return f"{cell(value, n)}, n = {n}"
    return "{:.3f} ({:.2f} … {:.2f})".format(*value) if isinstance(value, list) else f"{value:.3f}"


def table(results: list[dict]) -> str:
    """One column a result, as Markdown. A row that no result can fill is left out. Where there are
    several benchmarks or modalities, each has rows of its own: accuracy, and of a benchmark also
    that by its own rule, where it has one. Under it stands what each number of questions can
    tell."""
    groups = []
    for kind in ("image", "text"):
        found = [result["groups"].get(kind, {}) for result in results]
        groups.append((f"{kind} questions", ROWS, found))
    benchmarks = list(dict.fromkeys(name for result in results for name in result["benchmarks"]))
    if len({name.partition(", ")[0] for name in benchmarks}) > 1:
        for name in benchmarks:
            parts = [result["benchmarks"].get(name, {}) for result in results]
            groups.append((name, ROWS[:4], [part.get("figures", {}) for part in parts]))
    notes = []  # of modalities, which are small, the interval says enough
    for group, _, found in groups:
        counts = dict.fromkeys(figures["questions"] for figures in found if figures)
        notes += [f"* {group}: {score.resolution(count)}" for count in counts]
    subsets = dict.fromkeys(name for result in results for name in result["subsets"])
    modalities = [name for name in subsets if name.startswith("modality=")]
    for name in modalities if len(modalities) > 1 else []:
        found = [result["subsets"].get(name, {}) for result in results]
        groups.append((f"image questions, {name.partition('=')[2]}", ROWS[:2], found))
    lines = [["", *(result["name"] for result in results)]]
    for group, rows, found in groups:
        found = [{**figures, **figures.get("criteria", {})} for figures in found]
        for label, key in rows:
            if any(figures.get(key) not in (None, RARE.get(key)) for figures in found):
                lines.append([f"{group}: {label}", *(cell(figures, key) for figures in found)])
    return "\n".join([markdown(lines), "", *notes])


# --------------------------------------------------------------------------------------------------
# The paper's tables, as it prints them, and ours under them

MM, PRO = "medxpertqa-mm", "mmmu-pro"
# benchmark, subset ("" is all of it, "delta" its gain over the base model), questions (by the
# denominators that its values fit)
COLUMNS1 = (
    (MM, "question_type=Reasoning", 1446), (MM, "question_type=Understanding", 554),
    (MM, "", 2000), (MM, "delta", 2000), ("mmmu", "", 150), ("mmmu", "delta", 150),
    (PRO, "", 286), (PRO, "delta", 286),
)  # fmt: skip
COLUMNS2 = (
    (MM, "medical_task=Treatment", 448), (MM, "medical_task=Basic Science", 353),
    (MM, "medical_task=Diagnosis", 1199), *COLUMNS1[:4],
)  # fmt: skip
# a cell: as printed, then its notes, then its questions where they are not the column's
TABLE1 = """
GPT-4o                   40.73      48.19     42.80       –      59.33  –      40.91       –
QvQ-Max                  35.20      38.99     36.25       –      70.67  –      52.10       –
OpenAI-o1                52.78a/144 65.45a/55 56.28a/199  –      60.00  –      41.96       –
Gemini-2.5-Pro           61.69      69.13     63.75       –      80.67  –      66.08       –
QwenVL2.5-32B            26.00f     30.86f    27.35f      –      63.33  –      48.25       –
QwenVL2.5-72B            27.10      31.58     28.35       –      70.00  –      50.35       –
InternVL3.0-38B          26.90      29.24     27.55       –      68.00  –      45.10       –
InternVL3.0-78B          28.80b     35.92     30.20       –      71.33  –      51.40       –
QwenVL2.5-7B             19.99      22.56     20.70       –      55.33  –      28.47c/288  –
InternVL3.0-8B           21.09      23.83     21.85       –      61.33  –      36.71       –
GMAI-VL-R1 SFT           –          –         23.55       +2.85  56.00  +0.67  32.99c/288  +4.52
GMAI-VL-R1 RLT           –          –         23.80       +3.10  57.33  +2.00  34.03cd/288 +5.56
QwenVL2.5-7B +Stage-I    24.48      26.90     25.15       +4.45  62.00  +6.67  36.36       +7.89c
QwenVL2.5-7B +Stage-II   25.80      28.52     26.55       +5.85  66.00  +10.67 38.81       +10.34c
Chiron-o1                23.30e     25.10e    24.20e      +2.34e 54.60e -6.72e 33.90e      -2.80e
InternVL3.0-8B +Stage-I  26.14      28.52     26.80       +4.95  69.33  +8.00  43.36       +6.65
InternVL3.0-8B +Stage-II 25.93      31.05     27.35       +5.50  70.00  +8.67  48.95       +12.24
"""
TABLE2 = """
QwenVL2.5-32B             28.13      25.78     27.61       26.07f  30.87f  27.40f  +0.00
QwenVL2.5-32B +Stage-I    33.03      30.31     32.19       31.60   33.21   32.05   +4.65
QwenVL2.5-32B +Stage-II   35.93      32.57     32.86       33.54   33.39   33.50   +6.10
QwenVL2.5-72B             30.36      24.08     28.86       27.11   31.59   28.35   +0.00
QwenVL2.5-72B +Stage-I    40.40      41.93     38.62       39.21   40.61   39.60   +11.25
QwenVL2.5-72B +Stage-II   41.52      42.49     39.45       39.63   42.60   40.45   +12.10
"""
TABLES = {1: (COLUMNS1, TABLE1), 2: (COLUMNS2, TABLE2)}
NOTES = {
    "a": "of MedXpertQA's sampled subset: 76 of 144, 36 of 55, 112 of 199",
    "b": "cannot be: 604 of 2000 less 199 of 554 leaves 405 of 1446, 28.01",
    "c": "82, 95 and 98 of 288 questions, all other rows are of 286; the Δ of Stage-I and Stage-II "
    "mixes the two",
    "d": "the paper's text says 33.45",
    "e": "to one decimal and mostly no k of n: 337 of 1446 and 139 of 554 would be 23.80 overall; "
    "each Δ is .01 off",
    "f": "two runs: 547 of 2000 in Table 1, 548 in Table 2",
}
OURS = (
    "* Ours: in brackets the 95 % interval, over questions. The paper gives none; "
    "some of its values are rounded, others cut off."
)
FIELDS = (  # of the CSV, one line a value
    "by", "method", "benchmark", "subset", "percent", "low", "high", "questions", "samples",
    "notes", "prompt", "temperature",
)  # fmt: skip


def paper_records(number: int) -> Iterator[dict]:
    """The paper's Table 1 or 2, one record a value; percent is the text as printed."""
    columns, text = TABLES[number]
    for line in text.strip().splitlines():
        method, *cells = line.rsplit(None, len(columns))
        for (benchmark, subset, questions), cell in zip(columns, cells):
            if printed := re.fullmatch(r"([-+]?\d+\.\d\d)([a-z]*)/?(\d*)", cell):
                percent, notes, n = printed.groups()
                row = ("paper", method.strip(), benchmark, subset, percent, "", "")
                yield dict(zip(FIELDS, (*row, int(n or questions), "", notes, "", "")))


def paper_overall(model: str, stage: str) -> float:
    """The paper's accuracy on MedXpertQA-MM in per cent, from Table 2 where it has the model."""
    method, found = model if stage == "base" else f"{model} +{stage}", math.nan
    for row in (*paper_records(1), *paper_records(2)):
        if (row["method"], row["benchmark"], row["subset"]) == (method, MM, ""):
            found = float(row["percent"])
    return found


def gain(result: dict, results: list[dict], benchmark: str) -> list[float] | None:
    """[difference, low, high] to SIZE/base, or None without that or where it was asked others."""
    base = [other for other in results if other["name"] == f"{stage_of(result)[0]}/base"]
    asked = []
    for run in (*base, result):
        asked.append([found for found in run["entries"] if benchmark in score.names_of(found)])
    try:
        return score.compare(*asked)["difference"] if base else None
    except data.RowError:  # not the same questions
        return None


def our_records(number: int, results: list[dict], left_out: list[str]) -> Iterator[dict]:
    """Our values for Table 1 or 2 as such records: of the paper's columns, and in Table 1 of every
    other benchmark. What a result has no figures for goes to left_out."""
    for result in results:
        wanted = [column[:2] for column in TABLES[number][0]]
        if number == 1:
            others = [name for name in result["benchmarks"] if (name, "") not in wanted]
            wanted += [(name, subset) for name in others for subset in ("", "delta")]
        asked = result.get("prompt", ""), result.get("sampling", {}).get("temperature", "")
        lacking = []
        for benchmark, subset in wanted:
            part = result["benchmarks"].get(benchmark, {"figures": None, "subsets": {}})
            if subset != "delta":
                figures = part["subsets"].get(subset) if subset else part["figures"]
                values, sign = figures and figures["accuracy"], ""
                lack = f"{benchmark} {subset}".strip()
            elif part["figures"] and stage_of(result)[1] != "base":
                figures, values, sign = part["figures"], gain(result, results, benchmark), "+"
                lack = f"Δ on {benchmark} (no SIZE/base on the same questions)"
            else:
                continue
            if not values:
                lacking.append(lack)
                continue
            name = benchmark + OPEN * bool(result.get("open_ended"))
            percents = [f"{100 * value:{sign}.2f}" for value in values]
            counts = figures["questions"], figures["samples"]
            row = ("ours", result["name"], name, subset, *percents, *counts, "", *asked)
            yield dict(zip(FIELDS, row))
        if lacking:
            left_out.append(f"Table {number}: {result['name']} lacks {', '.join(lacking)}")


def title(benchmark: str, subset: str, questions: int) -> str:
    name = benchmark.removesuffix(OPEN)
    shown = TITLES.get(name, name) + OPEN * benchmark.endswith(OPEN)
    part = "Δ" if subset == "delta" else subset.partition("=")[2] or "Overall"
    return f"{shown} {part} (n = {questions})"


def row_name(record: dict) -> str:
    if record["by"] == "paper":
        return record["method"]
    about = ["ours"]
    about += [f"{record['samples']} samples a question"] if record["samples"] > 1 else []
    about += [f"{record['prompt']} prompt"] if record["prompt"] not in ("", "paper") else []
    return f"{record['method']} ({', '.join(about)})"


def cell_text(record: dict) -> str:
    """The value, as printed or with its interval, and its notes."""
    text, sign = record["percent"], "+" if record["subset"] == "delta" else ""
    if record["by"] == "ours":
        text += f" ({float(record['low']):{sign}.1f} … {float(record['high']):{sign}.1f})"
    return text + "".join(f" [{note}]" for note in record["notes"])


def paper_table(number: int, records: list[dict]) -> str:
    """Table 1 or 2 in Markdown: the paper's columns, then those that only we have."""
    printed = {column[:2]: column for column in TABLES[number][0]}
    rows, others = {}, {}  # others: an ordered set
    for record in records:
        column = record["benchmark"], record["subset"], record["questions"]
        if record["by"] == "paper":  # some of its rows are of other questions than their column
            column = printed[column[:2]]
        if column not in printed.values():
            others[column] = None
        rows.setdefault(row_name(record), {})[column] = cell_text(record)
    benchmarks = [benchmark for benchmark, _, _ in others]
    parts = [*(subset for _, subset in printed), "", "delta"]
    ranks = {c: (benchmarks.index(c[0]), parts.index(c[1]), c[2]) for c in others}
    columns = [*printed.values(), *sorted(others, key=ranks.get)]
    cells = [["accuracy in %", *(title(*column) for column in columns)]]
    cells += [[name, *(row.get(column, "–") for column in columns)] for name, row in rows.items()]
    seen = {note for record in records for note in record["notes"]}
    notes = [f"* [{note}] {text}" for note, text in NOTES.items() if note in seen]
    ours = [one for one in records if one["by"] == "ours" and not one["subset"]]
    counts = dict.fromkeys((one["benchmark"], one["questions"]) for one in ours)
    told = [f"* Ours, {TITLES.get(name, name)}: {score.resolution(n)}" for name, n in counts]
    return "\n".join([markdown(cells), "", *notes, OURS, *told, ""])


def paper_tables(results: list[dict], out: Path) -> tuple[list[Path], list[str]]:
    """Writes table1.md, table1.csv, table2.md, table2.csv. Returns (files, lines that say what
    results lack). Raises RowError for two results of one name."""
    distinct([result["name"] for result in results])
    paths, left_out = [], []
    for number in TABLES:
        records = [*paper_records(number), *our_records(number, results, left_out)]
        paths += [out / f"table{number}.md", out / f"table{number}.csv"]
        data.write_text(paths[-2], paper_table(number, records))
        write_sheet(paths[-1], FIELDS, (record.values() for record in records))
        trained = [s for s, name in PAPER_SIZES.items() if f"{name} +Stage-I" in TABLES[number][1]]
        if missing := absent(trained, results):
            left_out.append(f"Table {number}: no result is called {', '.join(missing)}")
    return paths, left_out
