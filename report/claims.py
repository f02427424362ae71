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
from pathlib import Path
from typing import NamedTuple

from command import stage
from report import score

RESAMPLES = 2000  # ours: bootstrap over questions
STAGES = ("eval-base", "eval-stage1", "eval-stage2")  # folders of a run of the demo
BASE, STAGE1, STAGE2 = STAGES
# what a share counts, of what: keys of counts_of
ACCURACY, VOTE = ("right", "samples"), ("vote", "questions")
MET, HALLUCINATED = ("met", "judged"), ("hallucinated", "looking")


class Claim(NamedTuple):
    """before, after: (stage, the share's two keys). direction: +1 rises, -1 falls, 0 rises or
    holds."""

    text: str
    before: tuple[str, tuple[str, str]]
    after: tuple[str, tuple[str, str]]
    direction: int


CLAIMS = (
    Claim("text-only Stage I raises accuracy on image questions",
          (BASE, ACCURACY), (STAGE1, ACCURACY), 1),
    Claim("Stage II raises the share of chains that meet all four criteria",
          (STAGE1, MET), (STAGE2, MET), 1),
    Claim("with Stage II accuracy on image questions rises or holds",
          (STAGE1, ACCURACY), (STAGE2, ACCURACY), 0),
    Claim("Stage II lowers hallucination among chains that look at the image",
          (STAGE1, HALLUCINATED), (STAGE2, HALLUCINATED), -1),
    Claim("majority vote raises accuracy after Stage II", (STAGE2, ACCURACY), (STAGE2, VOTE), 1),
)  # fmt: skip


def counts_of(folder: Path) -> dict[str, dict[str, float]]:
    """{id: counts} of the image questions of one evaluation. A share is kept as two counts, so that
    questions can be resampled."""
    by_id = {}
    for entry in score.read_results(folder)["entries"]:
        if entry["image"]:
            samples = {"right": sum(entry["right"]), "samples": len(entry["right"])}
            votes = {"vote": score.vote(entry["choices"], entry["right"]), "questions": 1}
            by_id[entry["id"]] = samples | votes | score.judged_counts([entry])
    return by_id


def levels(claim: Claim, run: dict[str, dict], ids: list[str]) -> tuple[float, float]:
    """A claim's shares before and after over these questions of a run. run: by stage, the counts of
    each question."""
    shares = []
    for name, (part, whole) in (claim.before, claim.after):
        counts = [run[name][key] for key in ids]
        shares.append(sum(c[part] for c in counts) / max(1, sum(c[whole] for c in counts)))
    return shares[0], shares[1]


def measure_claims(runs: list[Path]) -> list[dict]:
    """Each claim over several runs: {claim, levels [(before, after) of each run], mean, low,
    high, shown}."""

    def mean_difference(claim: Claim, drawn: list[list[str]]) -> float:
        pairs = [levels(claim, run, ids) for run, ids in zip(tables, drawn)]
        return statistics.fmean(after - before for before, after in pairs)

    tables, found = [{name: counts_of(run / name) for name in STAGES} for run in runs], []
    for claim in CLAIMS:
        ids = [list(run[claim.after[0]]) for run in tables]
        rng, draws = random.Random(0), []
        for _ in range(RESAMPLES):
            drawn = [rng.choices(keys, k=len(keys)) for keys in ids]
            draws.append(mean_difference(claim, drawn))
        draws.sort()
        low, high = draws[int(0.025 * RESAMPLES)], draws[int(0.975 * RESAMPLES) - 1]
        # "holds": a loss of more than 2 points is excluded
        shown = {1: low > 0, -1: high < 0, 0: low > -0.02}[claim.direction]
        pairs = [levels(claim, run, keys) for run, keys in zip(tables, ids)]
        row = {"claim": claim.text, "levels": pairs, "mean": mean_difference(claim, ids)}
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
    stage.new_file(args.out, text + "\n")
    print(text)
