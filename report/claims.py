"""What several runs of the demo show: the paper's claims, a difference in every run.

    python -m report claims --runs runs/claims/seed-21 runs/claims/seed-22 --out docs/claims.md

A claim is a difference between two shares on the same image questions. It is *shown* if it has the
claimed sign in every run and each run's 95 % interval, which resamples questions, excludes 0 (for
"rises or holds": excludes a loss of 2 points). Beside it stands the t interval over runs: it also
holds what differs from seed to seed, which the interval over questions does not.

reads of each run the three evaluations (results.json, predictions.jsonl), looking.json where it is
there, and the films of its world; writes claims.md and, beside it, claims.png.

Where we depart from the paper, or it is silent: it has one run, and gives no intervals.
"""

import argparse
import math
import statistics
import textwrap
from pathlib import Path
from typing import NamedTuple

import data
from clinic import world
from command import stage
from report import figures, looking, score, tables

BASE, STAGE1, STAGE2 = "base", "stage1", "stage2"  # folders eval-NAME and look-NAME of a run
HOLDS = 0.02  # ours: a loss that "holds" excludes
# ours: from 1 to a few samples the vote rises almost by definition
FEW, SLOPE = 4, "rise of the majority vote from 4 samples to all"
# 97.5 % points of Student's t by degrees of freedom, that is runs - 1
T = (math.nan, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
Counts = dict[str, tuple[float, float]]  # question id -> (sum, count); a share is a ratio of sums


class Claim(NamedTuple):
    """before, after: (stage, measure). direction: +1 rises, -1 falls, 0 rises or holds. paper: the
    stages between which the paper has this difference, of its 7B on MedXpertQA-MM."""

    text: str
    before: tuple[str, str]
    after: tuple[str, str]
    direction: int
    paper: tuple[str, str] | None = None


CLAIMS = (
    Claim("text-only Stage I raises accuracy on image questions",
          (BASE, "accuracy"), (STAGE1, "accuracy"), 1, ("base", "Stage-I")),
    Claim("Stage II raises the share of chains that meet all four criteria",
          (STAGE1, "met"), (STAGE2, "met"), 1),
    Claim("with Stage II accuracy on image questions rises or holds",
          (STAGE1, "accuracy"), (STAGE2, "accuracy"), 0, ("Stage-I", "Stage-II")),
    Claim("Stage I raises hallucination among chains that look at the image",
          (BASE, "hallucinated"), (STAGE1, "hallucinated"), 1),
    Claim("Stage II lowers hallucination among chains that look at the image",
          (STAGE1, "hallucinated"), (STAGE2, "hallucinated"), -1),
    Claim("… of the sign alone: chains that name a wrong one, of those that name one",
          (STAGE1, "misread"), (STAGE2, "misread"), -1),
    Claim("… of number or side, with the right sign",
          (STAGE1, "miscounted"), (STAGE2, "miscounted"), -1),
    Claim("majority vote raises accuracy after Stage II",
          (STAGE2, "accuracy"), (STAGE2, "vote"), 1),
    Claim(f"the {SLOPE} is larger after Stage II than at the base",
          (BASE, "slope"), (STAGE2, "slope"), 1),
    Claim("Stage I makes answers follow the film that is shown (follow less stay)",
          (BASE, "follows"), (STAGE1, "follows"), 1),
    Claim("Stage II makes answers follow the film that is shown",
          (STAGE1, "follows"), (STAGE2, "follows"), 1),
)  # fmt: skip


# --------------------------------------------------------------------------------------------------
# Measures of one stage of one run


def of_results(folder: Path) -> dict[str, Counts]:
    """From results.json, of the image questions."""
    found: dict[str, Counts] = {}
    for entry in score.read_results(folder)["entries"]:
        if entry["image"]:
            choices, right = tuple(entry["choices"]), tuple(entry["right"])
            judged, vote = score.judged_counts([entry]), score.vote(choices, right)
            few = score.majority_at(min(FEW, len(right)), choices, right, 0)
            sums = {
                "accuracy": (sum(right), len(right)),
                "vote": (vote, 1),
                "slope": (vote - few, 1),
                "met": (judged["met"], judged["judged"]),
                "hallucinated": (judged["hallucinated"], judged["looking"]),
            }
            for name, pair in sums.items():
                found.setdefault(name, {})[entry["id"]] = pair
    return found


def of_readings(run: Path, name: str) -> dict[str, Counts]:
    """From the chains: what they read, against their films. {} where there is no world."""
    path, questions = run / f"eval-{name}" / "predictions.jsonl", run / "world" / "test.jsonl"
    if not path.exists() or not questions.exists():
        return {}
    films = {
        row["id"]: world.film_truth(run / "world" / row["images"][0])
        for _, row in data.read_jsonl(questions)
        if row["images"]
    }
    found: dict[str, Counts] = {"misread": {}, "miscounted": {}}
    for _, row in data.read_jsonl(path):
        film, key = films.get(row["id"]), row["id"]
        reading = world.MENTION.search(row["response"]) if film else None
        if reading:
            _, _, sign, _ = reading.groups()
            false = sign == film.sign and reading[0] != film.reading()
            for measure, wrong in (("misread", sign != film.sign), ("miscounted", false)):
                total, count = found[measure].get(key, (0, 0))
                found[measure][key] = (total + wrong, count + 1)
    return found


def of_looking(folder: Path) -> dict[str, Counts]:
    """From looking.json; {} where it is not there."""
    if not (folder / "looking.json").exists():
        return {}
    name = "follows, counterfactual"
    entries = {one["id"]: looking.measures(one) for one in looking.read(folder)["entries"]}
    return {"follows": {key: found[name] for key, found in entries.items() if name in found}}


def measures_of(run: Path, name: str) -> dict[str, Counts]:
    found = of_results(run / f"eval-{name}")
    return found | of_readings(run, name) | of_looking(run / f"look-{name}")


# --------------------------------------------------------------------------------------------------
# Claims over runs


def measure_claims(runs: list[Path]) -> list[dict]:
    """A row for each claim that every run can tell of: {claim, levels [(before, after)],
    differences [[value, low, high]] of each run, mean, low, high (t over runs), shown}."""
    stages = [{name: measures_of(run, name) for name in (BASE, STAGE1, STAGE2)} for run in runs]
    rows = []
    for claim in CLAIMS:
        sides = [
            [run[name].get(measure, {}) for name, measure in (claim.before, claim.after)]
            for run in stages
        ]
        if not all(before and after for before, after in sides):
            continue
        levels, differences = [], []
        for before, after in sides:
            keys = [key for key in after if key in before]
            pairs = [[side[key] for key in keys] for side in (after, before)]
            levels.append(tuple(ratio(side) for side in reversed(pairs)))
            differences.append(score.ratio_interval(pairs))
        rows.append(
            {
                "claim": claim.text,
                "levels": levels,
                "differences": differences,
                "shown": all(shows(one, claim.direction) for one in differences),
                "paper": claim.paper and paper_difference(*claim.paper),
                **over_runs([one[0] for one in differences]),
            }
        )
    return rows


def ratio(pairs: list[tuple[float, float]]) -> float:
    return sum(total for total, _ in pairs) / max(1e-12, sum(count for _, count in pairs))


def paper_difference(before: str, after: str) -> float:
    model = tables.PAPER_SIZES["7B"]
    return (tables.paper_overall(model, after) - tables.paper_overall(model, before)) / 100


def shows(difference: list[float], direction: int) -> bool:
    """Whether one run's interval excludes the claim's opposite."""
    _, low, high = difference
    return {1: low > 0, -1: high < 0, 0: low > -HOLDS}[direction]


def over_runs(values: list[float]) -> dict[str, float]:
    """Mean and 95 % t interval over runs; without an interval for one run, or more than ten."""
    mean, half = statistics.fmean(values), math.nan
    if 1 < len(values) <= len(T):
        half = T[len(values) - 1] * statistics.stdev(values) / math.sqrt(len(values))
    return {"mean": mean, "low": mean - half, "high": mean + half}


def plot(rows: list[dict], path: Path) -> None:
    """Claims as intervals around zero: each run's over questions, and the t interval over runs."""
    sheet, axes = figures.canvas(1, 1, 9, 0.55 * len(rows) + 1)
    axis = axes[0, 0]
    for at, row in enumerate(rows):
        low, high = row["low"], row["high"]
        if not math.isnan(low):
            axis.plot([low, high], [at, at], color="#c0c0c0", linewidth=7, solid_capstyle="butt")
        for number, found in enumerate(row["differences"]):
            height = at + 0.14 * (number - (len(row["differences"]) - 1) / 2)
            value, off = figures.intervals([found])
            look = figures.LOOKS[number % len(figures.LOOKS)]
            axis.errorbar(value, height, xerr=off, fmt=look.marker, color="#303030", markersize=4)
        if row["paper"]:
            axis.plot(row["paper"], at, "D", color="#c0504d")
    axis.axvline(0, color="#808080", linewidth=0.8)
    words = [textwrap.fill(row["claim"], 60) for row in rows]
    axis.set_yticks(range(len(rows)), words, fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel(
        "difference\npoints: runs, 95 % over questions; grey: 95 % t over runs\n"
        "red: the paper's 7B on MedXpertQA-MM"
    )
    figures.save(sheet, path)


HEADER = """# What the miniature shows

Runs: {}. Each has its own seed for world, base model, training and sampling, and test questions \
that no setting was chosen on.
A claim is shown if each run has the claimed sign and its 95 % interval over questions excludes 0 \
("holds": excludes a loss of {:.2f}). The t interval is over runs.

"""


def claims(args: argparse.Namespace) -> None:
    rows = measure_claims([Path(run) for run in args.runs])
    first = [
        "claim",
        "before → after",
        "difference",
        "mean",
        "95 % t interval",
        "paper, 7B",
        "shown",
    ]
    cells = [first]
    for row in rows:
        interval = f"{row['low']:+.3f} … {row['high']:+.3f}"
        cells.append(
            [
                row["claim"],
                ", ".join(f"{before:.3f} → {after:.3f}" for before, after in row["levels"]),
                ", ".join(f"{one[0]:+.3f}" for one in row["differences"]),
                f"{row['mean']:+.3f}",
                "" if math.isnan(row["low"]) else interval,
                f"{row['paper']:+.3f}" if row["paper"] else "",
                "yes" if row["shown"] else "**no**",
            ]
        )
    picture = Path(args.out).with_suffix(".png")
    text = HEADER.format(len(args.runs), HOLDS) + tables.markdown(cells)
    text += f"\n\n![The claims as intervals around zero]({picture.name})"
    stage.new_file(args.out, text + "\n")
    plot(rows, picture)
    print(text)
