"""What a run of the demo measures: shares over test questions, by stage and by ablation.

A share is a ratio of sums over questions, so that a difference of two can be resampled by question:

    accuracy, text accuracy   right answers          vote, slope     majority vote, and its rise
    met, and each criterion   of the judged chains   hallucinated    of those that look at the image
    sign, misread, miscounted what chains read, against their films: the right sign; a wrong one or
                              none; the right one, but number or side are wrong
    false reading             a reading with any error
    checks, false check       chains that check; of these, those that confirm a wrong diagnosis
    caption, knows            the sign, asked for the film alone: of all films, of misread ones
    follows, invented         looking.py's
    gain, known; withheld     what Stage I gains where the base was taught the rule, and where not

reads results.json and predictions.jsonl of evaluations, looking.json, and the films of the world

Where we depart from the paper, or it is silent: it measures accuracy. All else is ours.
"""

from pathlib import Path

import data
from clinic import ablations, roles, world
from report import looking, score

BASE, STAGE1, STAGE2 = "base", "stage1", "stage2"  # folders eval-NAME and look-NAME of a run
FEW = 4  # ours: from 1 to a few samples the vote rises almost by definition
Counts = dict[str, tuple[float, float]]  # question id -> (sum, count)
Run = dict[str, dict[str, Counts]]  # stage or ablation -> measure -> counts


def of_results(folder: Path) -> dict[str, Counts]:
    """From results.json: of the image questions, and the accuracy on text questions."""
    found: dict[str, Counts] = {}
    for entry in score.read_results(folder)["entries"]:
        choices, right = tuple(entry["choices"]), tuple(entry["right"])
        sums = {"text accuracy": (sum(right), len(right))}
        if entry["image"]:
            judged, vote = score.judged_counts([entry]), score.vote(choices, right)
            few = score.majority_at(min(FEW, len(right)), choices, right, 0)
            verdicts = [given for given in entry["criteria"] if given]
            sums = {
                "accuracy": (sum(right), len(right)),
                "vote": (vote, 1),
                "slope": (vote - few, 1),
                "met": (judged["met"], judged["judged"]),
                "hallucinated": (judged["hallucinated"], judged["looking"]),
            }
            for name in score.CRITERIA:
                sums[name] = (sum(given[name] for given in verdicts), len(verdicts))
        for name, pair in sums.items():
            found.setdefault(name, {})[entry["id"]] = pair
    return found


def films_of(run: Path) -> dict[str, world.Case]:
    """{question id: its film's truth} of the test questions; {} where there is no world."""
    path = run / "world" / "test.jsonl"
    rows = [row for _, row in data.read_jsonl(path) if row["images"]] if path.exists() else []
    return {row["id"]: world.film_truth(run / "world" / row["images"][0]) for row in rows}


def of_readings(folder: Path, films: dict[str, world.Case], named: Counts) -> dict[str, Counts]:
    """From the chains: what they read, against their films. named: of_captions."""
    found: dict[str, Counts] = {}
    path = folder / "predictions.jsonl"
    for _, row in data.read_jsonl(path) if path.exists() else []:
        film, key = films.get(row["id"]), row["id"]
        reading = world.MENTION.search(row["response"]) if film else None
        if reading:
            wrong, false = reading[3] != film.sign, reading[0] != film.reading()
            checks = set(roles.CHECKED.findall(row["response"]))
            seen = {
                "sign": not wrong,
                "misread": wrong,
                "miscounted": false and not wrong,
                "false reading": false,
                "checks": bool(checks),
            }
            if checks:
                seen["false check"] = bool(checks - {(film.diagnosis, film.clue)})
            if wrong and key in named:
                seen["knows"] = named[key][0]
            for measure, value in seen.items():
                total, count = found.setdefault(measure, {}).get(key, (0, 0))
                found[measure][key] = (total + value, count + 1)
    return found


def of_captions(folder: Path, run: Path, films: dict[str, world.Case]) -> Counts:
    """Whether the model names the film's sign if asked for the film alone; {} if it was not."""
    if not (folder / "predictions.jsonl").exists():
        return {}
    asked = {row["id"]: row["images"] for _, row in data.read_jsonl(run / "world/captions.jsonl")}
    said = {}
    for _, row in data.read_jsonl(folder / "predictions.jsonl"):
        reading = world.MENTION.search(row["response"])
        said[asked[row["id"]][0]] = reading[3] if reading else None
    tests = [row for _, row in data.read_jsonl(run / "world/test.jsonl") if row["id"] in films]
    return {row["id"]: (said[row["images"][0]] == films[row["id"]].sign, 1) for row in tests}


def of_looking(folder: Path) -> dict[str, Counts]:
    """From looking.json; {} where it is not there."""
    if not (folder / "looking.json").exists():
        return {}
    names = {"follows": "follows, counterfactual", "invented": "invented"}
    entries = {one["id"]: looking.measures(one) for one in looking.read(folder)["entries"]}
    return {
        short: {key: found[name] for key, found in entries.items() if name in found}
        for short, name in names.items()
    }


def gains(folder: Path, films: dict[str, world.Case]) -> dict[str, Counts]:
    """What Stage I gains in accuracy where the base was taught the rule, and where it was not.
    Familiar patients, whom the base answers directly, are left out."""
    before, after = (of_results(folder / name)["accuracy"] for name in ("eval-base", "eval"))
    found: dict[str, Counts] = {"gain, known": {}, "gain, withheld": {}}
    for key, film in films.items():
        rule = film.sign, film.clue
        if rule not in world.FAMILIAR:
            gain = after[key][0] / after[key][1] - before[key][0] / before[key][1]
            found[f"gain, {'withheld' if rule in world.WITHHELD else 'known'}"][key] = (gain, 1)
    return found


def measures_of(run: Path, name: str, films: dict[str, world.Case]) -> dict[str, Counts]:
    """{measure: its counts} of a stage, or of an ablation; {} of one that was not run."""
    if name in (BASE, STAGE1, STAGE2):
        folder = run / f"eval-{name}"
        named = of_captions(run / "ablations" / "captions" / name, run, films)
        more = of_looking(run / f"look-{name}") | {"caption": named}
        return of_results(folder) | of_readings(folder, films, named) | more
    folder = run / "ablations" / name
    if not (folder / "eval" / "results.json").exists():
        return {}
    more = gains(folder, films) if name == "withheld" else {}
    return of_results(folder / "eval") | of_readings(folder / "eval", films, {}) | more


def run_measures(run: Path) -> Run:
    """{stage or ablation: its measures}"""
    films = films_of(run)
    return {
        name: measures_of(run, name, films) for name in (BASE, STAGE1, STAGE2, *ablations.NAMES)
    }


def ratio(pairs: list[tuple[float, float]]) -> float:
    return sum(total for total, _ in pairs) / max(1e-12, sum(count for _, count in pairs))
