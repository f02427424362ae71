"""Does the model look? The measures of looking.py's answers, by stage, with intervals.

    python -m report looking --results out/look-base out/look-stage1 out/look-stage2 --out out/looks

A measure is a ratio of sums over questions. Its 95 % interval resamples questions; a difference
between two stages resamples the questions that both have, the same ones in both.

reads looking.json of each run; writes OUT/looking.md, OUT/looking.png.

Where we depart from the paper, or it is silent: it does not ask. looking.py defines the measures.
"""

import argparse
import statistics
import textwrap
import time
from pathlib import Path

import data
from command import stage
from report import figures, score, tables

MEASURES = {  # of looking.py, as tables call them
    "accuracy, real": "accuracy, own image",
    "changed, again": "answers that differ, own image twice: the floor",
    "changes": "answers that another image changes, less the floor",
    "sight": "accuracy, own image less another",
    "follows, counterfactual": "follows the image shown, less stays with its own",
    "ungrounded": "reads another image, yet answers as for its own",
    "invented": "reads a normal image, and hallucinates",
    "accuracy, grey": "accuracy, grey image",
    "unparsed, grey": "unreadable answers, grey image",
    "accuracy, mean": "accuracy, image in its mean colour",
    "unparsed, mean": "unreadable answers, image in its mean colour",
    "blind": "accuracy within reach without an image",
}
DRAWN = ("changes", "sight", "follows, counterfactual", "ungrounded", "invented")
JUDGED = ("swapped", "normal")  # of looking.py's arms, those whose chains a judge sees


def changed(first: list, second: list) -> float:
    """Share of all pairs of an answer of each that differ. Two unreadable ones do not."""
    return statistics.fmean(one != other for one in first for other in second)


def measures(entry: dict) -> dict[str, tuple[float, float]]:
    """{measure: (sum, count)} of one question."""
    choices, answer = entry["choices"], entry["answer"]

    def share(arm: str, wanted: str | None) -> float:
        return statistics.fmean(choice == wanted for choice in choices[arm])

    found = {"blind": entry["blind"]}
    for arm in choices:
        found[f"accuracy, {arm}"] = share(arm, answer)
        found[f"unparsed, {arm}"] = share(arm, None)
        if arm != "real":
            found[f"changed, {arm}"] = changed(choices["real"], choices[arm])
    if "swapped" in choices:
        found["changes"] = found["changed, swapped"] - found["changed, again"]
        found["sight"] = found["accuracy, real"] - found["accuracy, swapped"]
    for arm, other in entry["follows"].items():
        found[f"follows, {arm}"] = share(arm, other) - share(arm, answer)
    sums = {name: (value, 1.0) for name, value in found.items()}

    def reading(arm: str) -> list[tuple[str | None, dict]]:
        """(choice, criteria) of the chains that read this arm's image."""
        judged = zip(choices.get(arm, ()), entry["criteria"].get(arm, ()))
        return [(one, met) for one, met in judged if met and met["Image_Analysis_Involvement"]]

    if chains := reading("swapped"):
        same = [share("real", one) if one is not None else 0.0 for one, _ in chains]
        sums["ungrounded"] = (sum(same), len(same))
    if chains := reading("normal"):
        sums["invented"] = (sum(not met["No_Hallucination"] for _, met in chains), len(chains))
    return sums


def figures_of(entries: list[dict]) -> dict[str, list[float]]:
    """{measure: [value, low, high]}"""
    found: dict[str, list[tuple[float, float]]] = {}
    for entry in entries:
        for name, pair in measures(entry).items():
            found.setdefault(name, []).append(pair)
    return {name: score.ratio_interval([pairs]) for name, pairs in found.items()}


def differences(first: list[dict], second: list[dict]) -> dict[str, list[float]]:
    """{measure: [second less first, low, high]}, over the questions that both have."""
    before, after = ({entry["id"]: measures(entry) for entry in run} for run in (first, second))
    both = [(before[key], after[key]) for key in before if key in after]
    found = {}
    for name in MEASURES:
        # a question without the measure on one side has weight 0 there
        sides = [[pair[side].get(name, (0.0, 0.0)) for pair in both] for side in (1, 0)]
        if all(sum(count for _, count in side) for side in sides):
            found[name] = score.ratio_interval(sides)
    return found


def read(folder: str | Path) -> dict:
    path = Path(folder) / "looking.json"
    if not path.is_file():
        raise data.RowError(f"{path}: no such file; looking.py writes it into its --out")
    return data.read_json(path)


def cell(found: list[float] | None, sign: str = "") -> str:
    return "" if found is None else tables.interval(found, f"{sign}.2f")


def table(runs: list[dict]) -> str:
    """Measures by stage, then the differences from each stage to the next."""
    steps = list(zip(runs, runs[1:]))
    names = [run["name"] for run in runs] + [f"{b['name']} less {a['name']}" for a, b in steps]
    changes = [differences(a["entries"], b["entries"]) for a, b in steps]
    rows = [["measure, 95 % interval over questions", *names]]
    for name, words in MEASURES.items():
        cells = [cell(run["figures"].get(name)) for run in runs]
        if any(cells):
            rows.append([words, *cells, *(cell(one.get(name), "+") for one in changes)])
    return tables.markdown(rows)


def plot(runs: list[dict], path: Path) -> None:
    """Each measure by stage, with its interval."""
    shown = [name for name in DRAWN if any(name in run["figures"] for run in runs)]
    sheet, axes = figures.canvas(1, len(shown), 3 * len(shown), 3)
    for axis, name in zip(axes[0], shown):
        for at, (run, look) in enumerate(zip(runs, figures.LOOKS * len(runs))):
            if found := run["figures"].get(name):
                mean, off = figures.intervals([found])
                axis.errorbar(at, mean, off, fmt=look.marker, color=look.shade, ecolor="#404040")
        axis.axhline(0, color="#808080", linewidth=0.8)
        axis.set_xticks(range(len(runs)), [run["name"].replace("/", "/\n") for run in runs])
        axis.set_xlim(-0.5, len(runs) - 0.5)
        axis.set_title("\n".join(textwrap.wrap(MEASURES[name], 30)), fontsize=9)
    figures.save(sheet, path)


def looking(args: argparse.Namespace) -> None:
    started, out = time.time(), Path(args.out)
    runs = [read(folder) for folder in args.results]
    if not stage.open_folder(args, [Path(folder) / "looking.json" for folder in args.results]):
        return
    text = table(runs)
    data.write_text(out / "looking.md", text + "\n")
    plot(runs, out / "looking.png")
    print(text)
    stage.finish(args, [out / "looking.md", out / "looking.png"], started, {})
