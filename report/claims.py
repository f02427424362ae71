"""What several runs of the demo show: the paper's claims, a difference in every run.

    python -m report claims --runs runs/claims/seed-21 runs/claims/seed-22 --out docs/claims.md

A claim is a difference between two shares on the same test questions. It is *shown* if it has the
claimed sign in every run and each run's 95 % interval, which resamples questions, excludes 0 (for
"rises or holds": excludes a loss of 2 points). Beside it stands the t interval over runs: it also
holds what differs from seed to seed, which the interval over questions does not.

Where all runs have the ablations (clinic/ablations.py), a table of these follows, and a picture
that says how good a judge must be.

reads the run folders (report/miniature.py says what); writes claims.md and, beside it, claims.png
and claims-judges.png.

Where we depart from the paper, or it is silent: it has one run, and gives no intervals.
"""

import argparse
import math
import statistics
import textwrap
from pathlib import Path
from typing import NamedTuple

import data
from clinic import ablations
from clinic.roles import MISREADING
from command import stage
from report import figures, score, tables
from report.miniature import BASE, FEW, STAGE1, STAGE2, Run, ratio, run_measures

HOLDS = 0.02  # ours: a loss that "holds" excludes
# 97.5 % points of Student's t by degrees of freedom, that is runs - 1
T = (math.nan, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
Side = tuple[str, str]  # a stage or an ablation, and a measure


class Claim(NamedTuple):
    """direction: +1 rises, -1 falls, 0 rises or holds, None no claim. paper: the stages between
    which the paper has this difference, of its 7B on MedXpertQA-MM."""

    text: str
    before: Side
    after: Side
    direction: int | None
    paper: tuple[str, str] | None = None


def alone(name: str) -> Claim:
    criterion = ablations.ALONE[name]
    text = f"pairs by {criterion.replace('_', ' ')} alone raise its share"
    return Claim(text, (STAGE1, criterion), (name, criterion), 1)


def elicits(kind: str, percent: int) -> Claim:
    text = f"Stage I on text beats {kind}; its teachers misread {percent} % of films"
    return Claim(text, (f"{kind}-{percent}", "accuracy"), ("text", "accuracy"), 1)


CLAIMS = (
    Claim("text-only Stage I raises accuracy on image questions",
          (BASE, "accuracy"), (STAGE1, "accuracy"), 1, ("base", "Stage-I")),
    Claim("Stage II raises the share of chains that meet all four criteria",
          (STAGE1, "met"), (STAGE2, "met"), 1),
    Claim("with Stage II accuracy on image questions rises or holds",
          (STAGE1, "accuracy"), (STAGE2, "accuracy"), 0, ("Stage-I", "Stage-II")),
    Claim("majority vote raises accuracy after Stage II",
          (STAGE2, "accuracy"), (STAGE2, "vote"), 1),
    Claim(f"the vote rises more from {FEW} samples to all after Stage II than at the base",
          (BASE, "slope"), (STAGE2, "slope"), 1),
    # hallucination
    Claim("Stage I raises hallucination among chains that look at the image",
          (BASE, "hallucinated"), (STAGE1, "hallucinated"), 1),
    Claim("… without the teacher that always writes one sign on the left",
          (BASE, "hallucinated"), ("no-hasty", "hallucinated"), 1),
    Claim("… of the sign alone: chains that name a wrong one, of those that read",
          (BASE, "misread"), (STAGE1, "misread"), 1),
    Claim("Stage II lowers hallucination among chains that look at the image",
          (STAGE1, "hallucinated"), (STAGE2, "hallucinated"), -1),
    Claim("… in what they read alone", (STAGE1, "false reading"), (STAGE2, "false reading"), -1),
    Claim("… of the sign alone", (STAGE1, "misread"), (STAGE2, "misread"), -1),
    Claim("… of number or side, with the right sign",
          (STAGE1, "miscounted"), (STAGE2, "miscounted"), -1),
    Claim("Stage II makes chains that read check themselves",
          (STAGE1, "checks"), (STAGE2, "checks"), 1),
    Claim("… whose checks confirm a wrong diagnosis less often",
          (STAGE1, "false check"), (STAGE2, "false check"), -1),
    Claim("the Stage-II model names the sign better if asked for the film alone",
          (STAGE2, "sign"), (STAGE2, "caption"), 1),
    Claim("where a chain misreads the sign, the model asked for the film alone names it",
          (BASE, "knows"), (STAGE2, "knows"), None),
    # does it look?
    Claim("Stage I makes answers follow the film that is shown (follow less stay)",
          (BASE, "follows"), (STAGE1, "follows"), 1),
    Claim("Stage II makes answers follow the film that is shown",
          (STAGE1, "follows"), (STAGE2, "follows"), 1),
    Claim("Stage I makes chains hallucinate about a normal film",
          (BASE, "invented"), (STAGE1, "invented"), 1),
    Claim("Stage II makes chains hallucinate less about a normal film",
          (STAGE1, "invented"), (STAGE2, "invented"), -1),
    Claim("general vision: asked for the film alone, Stage I names as many signs",
          (BASE, "caption"), (STAGE1, "caption"), 0),
    Claim("… Stage II too", (STAGE1, "caption"), (STAGE2, "caption"), 0),
    # what Stage I learns from
    *(elicits(kind, percent) for kind in ("image", "mixed") for percent in (0, *MISREADING)),
    Claim("… on text questions: Stage I on text beats image",
          ("image-0", "text accuracy"), ("text", "text accuracy"), 1),
    Claim("… and beats mixed", ("mixed-0", "text accuracy"), ("text", "text accuracy"), 1),
    Claim("Stage I gains more where the base knows the rule than where it was withheld",
          ("withheld", "gain, withheld"), ("withheld", "gain, known"), 1),
    # what Stage II learns from: all-criteria chains
    *(Claim(f"Stage II raises all-criteria chains with {percent} % of pairs the wrong way round",
            (STAGE1, "met"), (f"swap-{percent}", "met"), 1) for percent in ablations.SWAPS),
    *(Claim(f"… with pairs of the {judge} judge", (STAGE1, "met"), (name, "met"), 1)
      for judge, name in ablations.JUDGES.items()),
    *map(alone, ablations.ALONE),
    Claim("pairs by the four criteria beat right above wrong answers",
          ("right-wrong", "met"), ("four", "met"), 1),
    Claim("… in accuracy", ("right-wrong", "accuracy"), ("four", "accuracy"), 1),
    Claim("DPO beats SFT on the chosen chains", ("chosen", "met"), ("four", "met"), 1),
    Claim("… in accuracy", ("chosen", "accuracy"), ("four", "accuracy"), 1),
    Claim("… both at ten times the rate", ("chosen-10", "met"), ("four-10", "met"), 1),
    Claim("… in accuracy", ("chosen-10", "accuracy"), ("four-10", "accuracy"), 1),
    Claim("length-matched pairs raise all-criteria chains",
          (STAGE1, "met"), ("length", "met"), 1),
    Claim("whole questions in a step do as well as shuffled pairs",
          ("four", "met"), ("questions", "met"), 0),
)  # fmt: skip


# --------------------------------------------------------------------------------------------------
# Claims over runs


def measure_claims(runs: list[Run]) -> list[dict]:
    """A row for each claim that every run can tell of: {claim, levels [(before, after)],
    differences [[value, low, high]] of each run, mean, low, high (t over runs), shown}. runs: of
    run_measures."""
    rows = []
    for claim in CLAIMS:
        sides = [
            [run[name].get(measure, {}) for name, measure in (claim.before, claim.after)]
            for run in runs
        ]
        if not all(before and after for before, after in sides):
            continue
        levels, differences = [], []
        for before, after in sides:
            # a question without the measure on one side has weight 0 there
            keys = before | after
            pairs = [[side.get(key, (0.0, 0.0)) for key in keys] for side in (after, before)]
            levels.append(tuple(ratio(side) for side in reversed(pairs)))
            differences.append(score.ratio_interval(pairs))
        rows.append(
            {
                "claim": claim.text,
                "levels": levels,
                "differences": differences,
                "shown": all(shows(one, claim.direction) for one in differences)
                if claim.direction is not None
                else None,
                "paper": claim.paper and paper_difference(*claim.paper),
                **over_runs([one[0] for one in differences]),
            }
        )
    return rows


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
    sheet, axes = figures.canvas(1, 1, 9, 0.36 * len(rows) + 1)
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
    words = [textwrap.fill(row["claim"], 70) for row in rows]
    axis.set_yticks(range(len(rows)), words, fontsize=8)
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.set_xlabel(
        "difference\npoints: runs, 95 % over questions; grey: 95 % t over runs\n"
        "red: the paper's 7B on MedXpertQA-MM"
    )
    figures.save(sheet, path)


# --------------------------------------------------------------------------------------------------
# Ablations


COLUMNS = {
    "accuracy": "accuracy",
    "text accuracy": "on text",
    "met": "all four",
    **{criterion: name for name, criterion in ablations.ALONE.items()},
    "hallucinated": "hallucinates",
    "misread": "misreads sign",
}


def true_order(run: Path, name: str) -> float | None:
    """The share of an ablation's pairs that the truth orders so, an all-criteria chain above one
    that fails any, less the share that it orders the other way. None where there are no pairs, or
    wrong answers in them, which have no verdict."""
    path = run / "ablations" / name / "matched" / "pairs.jsonl"
    verdicts = run / "verdicts" / "verdicts.jsonl"
    if not path.exists() or not verdicts.exists():
        return None
    good = {
        (row["id"], row["sample"]): bool(row["criteria"] and all(row["criteria"].values()))
        for _, row in data.read_jsonl(verdicts)
    }
    pairs = [
        [good.get((row["id"], row[f"{side}_sample"])) for side in ("chosen", "rejected")]
        for _, row in data.read_jsonl(path)
    ]
    if any(None in pair for pair in pairs):
        return None
    return statistics.fmean(chosen - rejected for chosen, rejected in pairs)


def pairs_of(folders: list[Path], name: str) -> str:
    """How many pairs an ablation of Stage II learnt from, the fewest and the most of the runs."""
    paths = [folder / "ablations" / name / "matched" / "stage.json" for folder in folders]
    counts = {stage.read_record(path)["figures"]["pairs"] for path in paths if path.exists()}
    return " … ".join(map(str, sorted({min(counts), max(counts)}))) if counts else ""


def ablation_table(
    folders: list[Path], runs: list[Run], orders: dict[str, list[float | None]]
) -> str:
    """Stages and ablations: shares, mean and standard deviation over runs."""

    def cell(values: list[float | None]) -> str:
        if None in values:
            return ""
        spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
        return f"{statistics.fmean(values):.2f}{spread}"

    rows = [["stage or ablation", *COLUMNS.values(), "pairs", "true order of pairs"]]
    for name in runs[0]:
        sides = [run[name] for run in runs]
        if all(sides):
            shares = [[ratio(list(side[key].values())) for side in sides] for key in COLUMNS]
            rows.append([name, *map(cell, shares), pairs_of(folders, name), cell(orders[name])])
    return tables.markdown(rows)


def plot_order(runs: list[Run], orders: dict[str, list[float | None]], path: Path) -> None:
    """How good must a judge be? Stage II against the true order of its pairs."""
    sheet, axes = figures.canvas(1, 2, 9, 3.6)
    curve = ["four", *(f"swap-{percent}" for percent in ablations.SWAPS)]
    for axis, measure in zip(axes[0], ("met", "accuracy")):
        for number, (run, look) in enumerate(zip(runs, figures.LOOKS * len(runs))):
            share = {name: ratio(list(run[name][measure].values())) for name in run if run[name]}
            at = [(orders[name][number], share[name]) for name in curve]
            axis.plot(*zip(*at), color="#a0a0a0", marker=look.marker, markersize=4)
            axis.axhline(share[STAGE1], color="#a0a0a0", linewidth=0.8, linestyle=":")
            for judge, colour in zip(ablations.JUDGES, ("#c0504d", "#4f81bd", "#9bbb59")):
                name, label = ablations.JUDGES[judge], f"{judge} judge" if number == 0 else None
                point = orders[name][number], share[name]
                axis.plot(*point, look.marker, color=colour, label=label)
        axis.set_xlabel("pairs truly ordered, less reversed")
        axis.set_title("all four criteria" if measure == "met" else "accuracy, image questions")
    axes[0, 0].legend(fontsize=8)
    figures.save(sheet, path)


HEADER = """# What the miniature shows

Runs: {}. Each has its own seed for world, base model, training and sampling, and test questions \
that no setting was chosen on.
A claim is shown if each run has the claimed sign and its 95 % interval over questions excludes 0 \
("holds": excludes a loss of {:.2f}). The t interval is over runs.

"""
ABLATIONS = """

## What each stage could have learnt from

Mean and standard deviation over runs, on the test questions; clinic/ablations.py says what each \
ablation is. Accuracy and criteria are of image questions.

{}

True order: the share of pairs that the truth orders so, an all-criteria chain above one that \
fails any, less the share that it orders the other way. In the picture grey is 0 to 50 % of the \
demo's pairs swapped, dotted is Stage I, and a run has its mark. The judges reverse no pair, but \
they pair chains that both fail.

![Stage II by the true order of its pairs]({})"""


def claim_table(rows: list[dict]) -> str:
    first = ["claim", "before → after", "difference", "mean", "95 % t interval", "paper, 7B"]
    cells = [[*first, "shown"]]
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
                {True: "yes", False: "**no**", None: ""}[row["shown"]],
            ]
        )
    return tables.markdown(cells)


def claims(args: argparse.Namespace) -> None:
    folders, out = [Path(run) for run in args.runs], Path(args.out)
    runs = [run_measures(folder) for folder in folders]
    rows = measure_claims(runs)
    text = HEADER.format(len(runs), HOLDS) + claim_table(rows)
    picture, curve = out.with_suffix(".png"), out.with_name(f"{out.stem}-judges.png")
    text += f"\n\n![The claims as intervals around zero]({picture.name})"
    orders = {name: [true_order(folder, name) for folder in folders] for name in runs[0]}
    ablated = all(run[name] for run in runs for name in ablations.NAMES)
    if ablated:
        text += ABLATIONS.format(ablation_table(folders, runs, orders), curve.name)
    stage.new_file(args.out, text + "\n")
    plot(rows, picture)
    if ablated:
        plot_order(runs, orders, curve)
    print(text)
