"""What several runs of the demo show, with intervals.

    python -m report claims --runs runs/claims/seed-21 runs/claims/seed-22 --out CLAIMS.md

A claim is a difference between two figures: in every run, their mean, and a 95 % interval of the
mean. The interval resamples questions within each run, the same ones before and after.

reads results.json of each run's three evaluations; writes CLAIMS.md.

Where we depart from the paper, or it is silent: it has one run, and gives no intervals.
"""

import argparse
import random
import statistics
from dataclasses import dataclass
from pathlib import Path

from command import stage
from report import score

RESAMPLES = 2000  # ours: bootstrap over questions
STAGES = ("eval-base", "eval-stage1", "eval-stage2")  # folders of a run of the demo


@dataclass(frozen=True)
class Claim:
    """Figures are shares: keys of a question's counts, of which the first is summed over the second
    (`counts_of`). direction: +1 rises, -1 falls, 0 rises or holds."""

    text: str
    before: tuple[str, str, str]  # stage, and the two keys
    after: tuple[str, str, str]
    direction: int


CLAIMS = (
    Claim(
        "text-only Stage I raises accuracy on image questions",
        ("eval-base", "right", "samples"), ("eval-stage1", "right", "samples"), 1,
    ),
    Claim(
        "Stage II raises the share of chains that meet all four criteria",
        ("eval-stage1", "all", "judged"), ("eval-stage2", "all", "judged"), 1,
    ),
    Claim(
        "with Stage II accuracy on image questions rises or holds",
        ("eval-stage1", "right", "samples"), ("eval-stage2", "right", "samples"), 0,
    ),
    Claim(
        "Stage II lowers hallucination among chains that look at the image",
        ("eval-stage1", "false", "looking"), ("eval-stage2", "false", "looking"), -1,
    ),
    Claim(
        "majority vote raises accuracy after Stage II",
        ("eval-stage2", "right", "samples"), ("eval-stage2", "vote", "questions"), 1,
    ),
)  # fmt: skip


def counts_of(folder: Path) -> dict[str, dict[str, float]]:
    """{id: counts} of the image questions of one evaluation. A share is kept as two counts, so that
    questions can be resampled."""
    by_id = {}
    for entry in score.read_results(folder)["entries"]:
        if entry["image"]:
            judged = [criteria for criteria in entry["criteria"] if criteria]
            looking = [criteria for criteria in judged if criteria["Image_Analysis_Involvement"]]
            by_id[entry["id"]] = {
                "questions": 1,
                "right": sum(entry["right"]),
                "samples": len(entry["right"]),
                "vote": score.vote(entry["choices"], entry["right"]),
                "judged": len(judged),
                "all": sum(all(criteria.values()) for criteria in judged),
                "looking": len(looking),
                "false": sum(not criteria["No_Hallucination"] for criteria in looking),
            }
    return by_id


def measure(figure: tuple[str, str, str], run: dict[str, dict], ids: list[str]) -> float:
    """A share over these questions of a run. run: by stage, the counts of each question."""
    stage, over, of = figure
    chosen = [run[stage][key] for key in ids]
    return sum(counts[over] for counts in chosen) / max(1, sum(counts[of] for counts in chosen))


def measure_claims(runs: list[Path]) -> list[dict]:
    """Each claim over several runs: {claim, levels [(before, after) of each run], mean, low,
    high, shown}."""
    found = []
    tables = [{name: counts_of(run / name) for name in STAGES} for run in runs]
    for claim in CLAIMS:
        ids = [list(run[claim.after[0]]) for run in tables]
        levels = [
            (measure(claim.before, run, keys), measure(claim.after, run, keys))
            for run, keys in zip(tables, ids)
        ]
        rng, draws = random.Random(0), []
        for _ in range(RESAMPLES):
            differences = []
            for run, keys in zip(tables, ids):
                drawn = rng.choices(keys, k=len(keys))
                before, after = (measure(end, run, drawn) for end in (claim.before, claim.after))
                differences.append(after - before)
            draws.append(statistics.fmean(differences))
        draws.sort()
        low, high = draws[int(0.025 * RESAMPLES)], draws[int(0.975 * RESAMPLES) - 1]
        # "holds": a loss of more than 2 points is excluded
        shown = {1: low > 0, -1: high < 0, 0: low > -0.02}[claim.direction]
        mean = statistics.fmean(after - before for before, after in levels)
        row = {"claim": claim.text, "levels": levels, "mean": mean}
        found.append({**row, "low": low, "high": high, "shown": shown})
    return found


HEADER = """# What the miniature shows

Runs: {}. Each has its own seed for world, base model, training and sampling, and test questions \
that no setting was chosen on.
Before and after in each run, the mean difference, and its 95 % interval (bootstrap over questions \
within runs).

| claim | before → after, run by run | mean difference | 95 % interval | shown |
|---|---|---|---|---|"""


def claims(args: argparse.Namespace) -> None:
    lines = [HEADER.format(len(args.runs))]
    for row in measure_claims([Path(run) for run in args.runs]):
        runs = ", ".join(f"{before:.3f} → {after:.3f}" for before, after in row["levels"])
        interval = f"{row['low']:+.3f} … {row['high']:+.3f}"
        shown = "yes" if row["shown"] else "**no**"
        lines.append(f"| {row['claim']} | {runs} | {row['mean']:+.3f} | {interval} | {shown} |")
    text = "\n".join(lines)
    read = [Path(run) / name / "results.json" for run in args.runs for name in STAGES]
    stage.new_file(args.out, text + "\n", read)
    print(text)
