"""How far the judge agrees with humans (paper §3.3, Fig. 3).

    python -m report sample -n 1000 --verdicts verdicts.jsonl --rollouts rollouts.jsonl \\
        --questions image.jsonl --images images --out human
    python -m report agree --human a.csv b.csv --key human/key.jsonl --verdicts verdicts.jsonl \\
        --out agreement

`sample` writes a blinded sheet for raters, OUT/sheet, and its key, OUT/key.jsonl. `agree` reads the
sheets they filled in; writes agreement.json and agreement.png.

Where we depart from the paper, or it is silent: it names neither sampling nor interval.
"""

import argparse
import math
import random
import shutil
import time
from collections.abc import Callable, Collection
from operator import itemgetter
from pathlib import Path

import numpy as np

import data
from command import schema, stage
from command.sheets import read_sheet, write_sheet
from engines.inference import image_paths
from judge import CRITERIA
from rollout import read_rollouts

RESAMPLES = 2000  # ours: bootstrap over cases
# the raters fill in the last four
SHEET = ("id", "question", "options", "answer", "response", "images", *CRITERIA)
YES, NO = ("yes", "y", "1", "true"), ("no", "n", "0", "false")  # ours: a rater's words
MISTAKES = 20  # ours: so many are listed
chain_of = itemgetter("id", "response_sha")  # of a row: which chain it is about


def sample(args: argparse.Namespace) -> None:
    """Draws chains with a readable verdict, each text once, into a sheet without the verdicts."""
    started, out = time.time(), Path(args.out)
    if not stage.open_folder(args, [args.verdicts, args.rollouts, args.questions]):
        return
    questions = {question.id: question for question in schema.read_questions(args.questions)}
    rollouts = read_rollouts(args.rollouts, questions)
    chains = {chain_of(row): row["response"] for row in rollouts}
    verdicts = schema.read_rows(args.verdicts, "verdicts")
    judged = {chain_of(row) for row in verdicts if row["criteria"]}
    if missing := judged - chains.keys():
        lack = f"{len(missing)} verdicts are on texts that {args.rollouts} does not have"
        raise data.RowError(f"{args.verdicts}: {lack}; give the file they were made from")
    if len(judged) < args.n:
        have = f"{len(judged)} chains have a readable verdict, fewer than -n {args.n}"
        raise data.RowError(f"{args.verdicts}: {have}; ask for fewer")
    sheet, key, images = [], [], out / "sheet" / "images"
    images.mkdir(parents=True, exist_ok=True)
    drawn = random.Random(args.seed).sample(sorted(judged), args.n)
    for number, (id, sha) in enumerate(drawn, 1):
        question, case, copies = questions[id], f"case-{number:04d}", []
        for path in image_paths(question, Path(args.images)):
            # a file's own name may tell the answer
            copies.append(f"{case}-{len(copies) + 1}{path.suffix}")
            shutil.copyfile(path, images / copies[-1])
        options = "\n".join(f"({letter}) {text}" for letter, text in question.options.items())
        texts = [question.question, options, question.written_answer(), chains[id, sha]]
        sheet.append([case, *texts, " ".join(copies), *[""] * len(CRITERIA)])
        key.append({"case": case, "id": id, "response_sha": sha})
    write_sheet(out / "sheet" / "sheet.csv", SHEET, sheet)
    data.write_jsonl(out / "key.jsonl", key)
    print(f"{args.n} of {len(judged)} judged chains. {out / 'sheet'} is for the raters: each fills")
    print(f"in a copy of sheet.csv, Yes or No in the columns {', '.join(CRITERIA)}.")
    print(f"Keep {out / 'key.jsonl'} to yourself: it says which chain is which.")
    # the sheet is not among the outputs, since raters may fill it in where it lies
    stage.finish(args, [out / "key.jsonl"], started, {"cases": args.n})


def read_ratings(path: str, cases: Collection[str]) -> dict[str, dict[str, bool]]:
    """{case: {criterion: met}} from a sheet that a rater filled in. Raises RowError that lists
    mistakes by row and column: a sheet with a mistake is not used at all."""
    found, mistakes = {}, []
    for number, row in read_sheet(path, ["id", *CRITERIA]):
        case, where = row["id"], f"row {number} ({row['id']}), column"
        if case not in cases:
            mistakes.append(f"{where} id: is not a case of the key; rows must keep their id")
        elif case in found:
            mistakes.append(f"{where} id: is there twice; remove one of the rows")
        found[case] = {}
        for name in CRITERIA:
            word = row[name].strip().casefold()
            if word not in YES + NO:
                message = f"{row[name]!r} is neither Yes nor No" if word else "is empty"
                mistakes.append(f"{where} {name}: {message}")
            found[case][name] = word in YES
    mistakes += [f"{case} is missing; it needs its row" for case in cases if case not in found]
    if mistakes:
        more = len(mistakes) - MISTAKES
        lines = [f"{path}: {len(mistakes)} mistakes; nothing was computed", *mistakes[:MISTAKES]]
        lines += [f"... and {more} more"] if more > 0 else []
        raise data.RowError("\n  ".join(lines))
    return found


def kappa(first: np.ndarray, second: np.ndarray) -> float | None:
    """Cohen's kappa of two raters' answers, bool (N,): (p_o - p_e) / (1 - p_e), the agreement
    beyond what their shares of Yes give by chance. None where both raters give the same answer to
    every case: chance then explains all agreement."""
    chance = first.mean() * second.mean() + (1 - first.mean()) * (1 - second.mean())
    return float(((first == second).mean() - chance) / (1 - chance)) if chance < 1 else None


def differences(cases: np.ndarray) -> np.ndarray:
    """Human score minus judge's score, (C,). A score is the number of criteria met, averaged over
    the raters."""
    return cases[:, :-1].sum(2).mean(1) - cases[:, -1].sum(1)


def agreement(cases: np.ndarray) -> dict[str, float | None]:
    """Every figure of the study, from bool (C cases, raters and then the judge, four criteria).
    Each rater is compared with the judge on each criterion; "all" is whether all four are met."""
    scores = differences(cases)
    mean, spread = scores.mean(), scores.std(ddof=1)
    band = spread + 1e-9  # a mean over raters such as 1/3 is not exact
    figures = {
        "mean": mean,
        "sd": spread,
        "within_sd_of_0": (np.abs(scores) <= band).mean(),
        "within_sd_of_mean": (np.abs(scores - mean) <= band).mean(),
    }
    # met: (C, raters and the judge)
    for name, met in [*zip(CRITERIA, np.moveaxis(cases, 2, 0)), ("all", cases.all(2))]:
        human, judge = met[:, :-1].ravel(), np.repeat(met[:, -1], met.shape[1] - 1)
        figures[f"{name}.human_yes"] = human.mean()
        figures[f"{name}.judge_yes"] = judge.mean()
        figures[f"{name}.accuracy"] = (human == judge).mean()
        figures[f"{name}.kappa"] = kappa(human, judge)
    return {name: None if value is None else float(value) for name, value in figures.items()}


def agreement_intervals(
    cases: np.ndarray, figures_of: Callable[[np.ndarray], dict], resamples: int, seed: int
) -> dict[str, tuple[float, float] | None]:
    """The 95 % percentile interval of each figure over cases drawn with replacement. None for a
    figure that no draw has."""
    rng, intervals = np.random.default_rng(seed), {}
    draws = [figures_of(cases[rng.integers(len(cases), size=len(cases))]) for _ in range(resamples)]
    for name in draws[0]:
        values = sorted(draw[name] for draw in draws if draw[name] is not None)
        low, high = int(0.025 * len(values)), math.ceil(0.975 * len(values)) - 1
        intervals[name] = (values[low], values[high]) if values else None
    return intervals


def plot_agreement(cases: np.ndarray, figures: dict, path: Path) -> None:
    """The paper's Figure 3: the number of cases by difference of scores, and the band of one SD."""
    from matplotlib.figure import Figure

    step = 1 / (cases.shape[1] - 1)  # of a mean over this many raters
    edges = np.arange(-4 - step / 2, 4 + step, step)
    mean, spread = figures["mean"], figures["sd"]
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    ax = figure.subplots()
    label = f"0 ± SD: {figures['within_sd_of_0']:.1%} of cases"
    ax.axvspan(-spread, spread, color="#5b8db8", alpha=0.15, lw=0, label=label)
    label = f"mean {mean:+.2f}, SD {spread:.2f}; ± SD: {figures['within_sd_of_mean']:.1%}"
    ax.axvline(mean, color="#c0504d", lw=1.2, label=label)
    look = {"color": "#5b8db8", "edgecolor": "white", "rwidth": 0.85}
    _, _, bars = ax.hist(differences(cases), edges, **look)
    ax.bar_label(bars, fmt=lambda count: f"{count:.0f}" if count else "", padding=3, fontsize=8)
    ax.set(xlabel="difference of scores", ylabel="cases", xticks=range(-4, 5), xlim=(-4.5, 4.5))
    ax.set_title(f"criteria met, humans minus judge ({len(cases)} cases)", fontsize=10)
    ax.margins(y=0.12)
    ax.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)


def agree(args: argparse.Namespace) -> None:
    started, out = time.time(), Path(args.out)
    if not stage.open_folder(args, [*args.human, args.key, args.verdicts]):
        return
    key = {row["case"]: chain_of(row) for row in schema.read_rows(args.key, "key")}
    sheets = [read_ratings(path, key) for path in args.human]
    verdicts = schema.read_rows(args.verdicts, "verdicts")
    verdict_of = {chain_of(row): row["criteria"] for row in verdicts}
    if lacking := [case for case, chain in key.items() if chain not in verdict_of]:
        lack = f"no verdict on {len(lacking)} of {len(key)} cases, the first is {lacking[0]}"
        raise data.RowError(f"{args.verdicts}: {lack}; give the verdicts of the same rollouts")
    rated = []
    for case, chain in key.items():
        if verdict_of[chain]:
            ratings = [*(sheet[case] for sheet in sheets), verdict_of[chain]]
            rated.append([[rating[name] for name in CRITERIA] for rating in ratings])
    if len(rated) < 2:
        have = f"{len(rated)} cases have a readable verdict"
        raise data.RowError(f"{args.verdicts}: {have}; agreement needs two or more")
    cases = np.array(rated)  # (C, raters and the judge, 4)
    figures = agreement(cases)
    intervals = agreement_intervals(cases, agreement, RESAMPLES, args.seed)
    left_out = f"{len(key) - len(cases)} left out for an unreadable verdict"
    print(f"{len(cases)} cases, {len(sheets)} raters, {left_out}; 95 % by bootstrap over cases")
    print_agreement(figures, intervals)
    counts = {"cases": len(cases), "raters": len(sheets)}
    paths = [out / "agreement.json", out / "agreement.png"]
    data.write_json(paths[0], {**counts, "figures": figures, "intervals": intervals})
    plot_agreement(cases, figures, paths[1])
    stage.finish(args, paths, started, counts)


def print_agreement(figures: dict, intervals: dict) -> None:
    def shown(name: str) -> str:
        if figures[name] is None:
            return "none (one answer only)"
        low, high = intervals[name]
        return f"{figures[name]:.3f} ({low:.3f} to {high:.3f})"

    print(f"score, human minus judge: mean {shown('mean')}, SD {shown('sd')}")
    print(f"within ±SD of 0 {shown('within_sd_of_0')}, of the mean {shown('within_sd_of_mean')}")
    for name in (*CRITERIA, "all"):
        human, judge = figures[f"{name}.human_yes"], figures[f"{name}.judge_yes"]
        rates = f"Yes: human {human:.2f}, judge {judge:.2f}"
        accuracy, k = shown(f"{name}.accuracy"), shown(f"{name}.kappa")
        print(f"{name:<27} {rates}   accuracy {accuracy}   kappa {k}")
