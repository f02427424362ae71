"""Compares two runs on the same questions: differences with intervals, by each rule of reading.

    python -m report compare --results out/stage1 out/stage2

reads results.json of each run; writes a Markdown file, if one is named. With --shared it compares
only the questions that both runs have.

Where we depart from the paper, or it is silent: it compares single numbers.
"""

import argparse
from collections.abc import Iterator

import data
from command import stage
from report import score, tables

COMPARED = {  # column of differences with 95 % intervals -> its key in score.compare
    "difference in accuracy, 95 % interval": "difference",
    "by the benchmark's own rule": "official_difference",
    "in the share of readable answers": "readable_difference",
    "by majority vote": "vote_difference",
}
COUNTED = ("only the first's vote is right", "only the second's", "McNemar's p")


def compare(args: argparse.Namespace) -> None:
    """Compares each run with the one before it."""
    if len(args.results) < 2:
        given = f"--results {' '.join(args.results)}"
        raise data.RowError(f"{given}: one run has nothing to be compared with; give two or more")
    results = [score.read_results(folder) for folder in args.results]
    rows, notes = [["questions", "first → second", *COMPARED, *COUNTED]], []
    for runs in zip(results, results[1:]):
        if args.shared:
            runs = only_shared(*runs, notes)
        rows += compared(*runs, notes)
    text = "\n".join([tables.markdown(rows), *([""] if notes else []), *notes])
    print(text)
    if args.out:
        stage.new_file(args.out, text + "\n")


def compared(first: dict, second: dict, notes: list[str]) -> Iterator[list[str]]:
    """A row for each benchmark and kind of question that both runs were asked. What only one was
    asked goes to `notes`. Raises RowError for a benchmark whose questions differ between them."""
    names = f"{first['name']} and {second['name']}"
    parts = [score.by_source(result["entries"], by_kind=True) for result in (first, second)]
    both = [key for key in parts[0] if key in parts[1]]
    if not both:
        asked = " and ".join(", ".join(part) for part in parts)
        raise data.RowError(f"{names}: no benchmark in common; {asked}")
    if alone := [key for key in {**parts[0], **parts[1]} if key not in both]:
        notes.append(f"* not compared, since only one of {names} was asked: {', '.join(alone)}")
    for key in both:
        try:
            found = score.compare(parts[0][key], parts[1][key])
        except data.RowError as error:
            how = "--shared compares those that both have"
            raise data.RowError(f"{names}, {key}: {error}; {how}") from None
        told = f"* {key}: {score.resolution(found['questions'])}"
        notes += [told] if told not in notes else []
        row = [f"{key} ({found['questions']})", f"{first['name']} → {second['name']}"]
        for name in COMPARED.values():
            has = name in found
            row.append(tables.interval(found[name], "+.3f") if has else "–")
        yield [*row, str(found["only_first"]), str(found["only_second"]), f"{found['p']:.2g}"]


def only_shared(first: dict, second: dict, notes: list[str]) -> list[dict]:
    """Two results with only the entries of the questions that both have. How many others there
    were goes to `notes`. Raises RowError where no question is in both."""
    pairs = score.shared(first["entries"], second["entries"])
    if not pairs:
        names = f"{first['name']} and {second['name']}"
        raise data.RowError(f"{names}: --shared: no question in common")
    kept, left = [], []
    for run, part in zip((first, second), zip(*pairs)):
        kept.append({**run, "entries": list(part)})
        held = len(run["entries"])
        left.append(f"{held - len(pairs)} of {run['name']}'s {held}")
    notes.append(f"* {len(pairs)} questions are in both runs; left out: {' and '.join(left)}.")
    return kept
