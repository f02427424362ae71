"""From samples to figures: intervals, majority vote, pass@n, paired comparisons (paper §4).

    accuracy   mean over questions of the share of right samples
    MV@n       the answer most of n samples agree on; unreadable ones abstain; ties go to the
               earliest sampled
    pass@n     1 - C(N - c, n) / C(N, n): unbiased, from N samples of which c are right
               (paper §4.3, Fig. 6)
    McNemar    exact and two-sided, on the questions that only one of two models' votes get right

results.json has one entry a question, from which every figure can be made again without the model:

    id, source, image (bool), answer, groups {question_type, modality, ...},
    choices [letter or null, a sample each], right [bool], official {choices, right} or null,
    forced [right, also by a second turn that asks for the letter], where evaluate.py --force,
    ended ["stop", "length", ...], words [int], loops [bool],
    criteria [{four booleans}, {} for an unreadable verdict, null where none was asked for]

An answer that cannot be read, was cut off or was never given is wrong and stays in the denominator.

Where we depart from the paper, or it is silent: it gives no intervals. Ours are at 95 %, over
questions, since samples of one question are not independent: Wilson's for shares, resampling for
differences and ratios. For means of shares Wilson's are rather too wide: such a mean varies less
than the formula supposes.
"""

import json
import math
import random
import statistics
from collections import Counter
from functools import lru_cache
from itertools import combinations
from pathlib import Path

import answers
import benchmarks
import data
from benchmarks import modalities
from judge import CRITERIA

VOTE_SUBSETS = 100  # ours: seeded subsets behind MV@n
RESAMPLES = 10_000  # ours: bootstrap over questions
GROUPS = (*benchmarks.SUBSETS, "kind")  # keys of a question's meta that reports are split by


# --------------------------------------------------------------------------------------------------
# Statistics


def wilson(share: float, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share of `count` questions."""
    z = statistics.NormalDist().inv_cdf(0.975)
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    root = math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    half = z / (1 + z * z / count) * root
    return max(0.0, middle - half), min(1.0, middle + half)


def resolution(questions: int) -> str:
    """What an accuracy over so many questions can tell, in points, at worst (p = .5): the half
    width of its 95 % interval, and the differences found with 80 % power at 5 %, two-sided:

        two runs, other questions   (z_.975 + z_.8) sqrt(2 p (1 - p) / n)
        two runs, same questions    (z_.975 + z_.8) sqrt(d / n), where a share d is answered
                                    differently; d = .3 is ours
    """
    normal = statistics.NormalDist()
    half, both = normal.inv_cdf(0.975), normal.inv_cdf(0.975) + normal.inv_cdf(0.8)
    own, apart = 100 * half * math.sqrt(0.25 / questions), math.sqrt(0.5 / questions)
    paired = math.sqrt(0.3 / questions)
    found = [min(100.0, 100 * both * share) for share in (apart, paired)]
    return (
        f"{questions} questions: ± {own:.1f} points; detects {found[0]:.0f} between two runs, "
        f"{found[1]:.0f} paired at 30 % disagreement, at 80 % power"
    )


def mean_and_interval(values: list[float]) -> list[float]:
    """[mean, low, high] of one value a question, each between 0 and 1."""
    mean = statistics.fmean(values)
    return [mean, *wilson(mean, len(values))]


def pass_at(n: int, samples: int, right: int) -> float:
    """Chance that a random n of the samples hold a right one."""
    return 1.0 - math.comb(samples - right, n) / math.comb(samples, n)


def majority(choices: list[str | None]) -> str | None:
    """The commonest readable choice; of tied ones the earliest sampled; None if all abstain."""
    counts = Counter(choice for choice in choices if choice is not None)  # in order of appearance
    return counts.most_common(1)[0][0] if counts else None


def vote(choices: list[str | None], right: list[bool]) -> bool:
    """Whether the majority's choice is right, by the first sample with it."""
    winner = majority(choices)
    return winner is not None and right[choices.index(winner)]


@lru_cache(maxsize=None)  # a question is in several groups, with the same vote
def majority_at(n: int, choices: tuple, right: tuple, seed: int) -> float:
    """Share of the n-subsets of the samples, in their order, whose majority is right; of
    VOTE_SUBSETS random ones where there are more than that."""
    everything, rng = range(len(choices)), random.Random(seed)
    # single samples are always taken all: MV@1 is the accuracy
    if math.comb(len(choices), n) <= max(VOTE_SUBSETS, len(choices)):
        subsets = combinations(everything, n)
    else:
        subsets = (sorted(rng.sample(everything, n)) for _ in range(VOTE_SUBSETS))
    return statistics.fmean(vote([choices[i] for i in s], [right[i] for i in s]) for s in subsets)


def sizes(most: int) -> list[int]:
    """1, 2, 4, 8 ... and all there are."""
    return [*(1 << k for k in range(most.bit_length()) if 1 << k < most), most]


def mcnemar(only_first: int, only_second: int) -> float:
    """Two-sided exact p-value. Null hypothesis: which model alone is right is a fair coin."""
    count, few = only_first + only_second, min(only_first, only_second)
    return min(1.0, 2 * sum(math.comb(count, i) for i in range(few + 1)) / 2**count)


def bootstrap(values: list[float], seed: int = 0) -> tuple[float, float]:
    """95 % interval of the mean of one value a question, of any sign, by resampling questions."""
    import numpy as np

    rng, numbers = np.random.default_rng(seed), np.asarray(values, dtype=float)
    size = 100, len(numbers)  # so many at a time: one by one is slow, all at once much memory
    draws = (rng.integers(len(numbers), size=size) for _ in range(RESAMPLES // 100))
    means = np.concatenate([numbers[drawn].mean(axis=1) for drawn in draws])
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def ratio_interval(sides: list[list[tuple[float, float]]], seed: int = 0) -> list[float]:
    """[value, low, high] of sum / count over questions, or of two such ratios, the first less the
    second; 95 % interval by resampling questions, the same ones on both sides. sides: of each the
    (sum, count) of every question."""
    import numpy as np

    pairs = np.asarray(sides, dtype=float)  # (sides, questions, 2)
    rng, count, draws = np.random.default_rng(seed), pairs.shape[1], []
    for _ in range(RESAMPLES // 10):  # ours: one by one, as sums of pairs; fewer are enough
        total = pairs[:, rng.integers(count, size=count)].sum(1)
        with np.errstate(invalid="ignore"):  # no question of a side was drawn
            draws.append(total[:, 0] / total[:, 1])

    def difference(ratios) -> float:
        return ratios[0] - (ratios[1] if len(ratios) > 1 else 0.0)

    value, drawn = pairs.sum(1), difference(np.array(draws).T)
    low, high = np.nanquantile(drawn, [0.025, 0.975])
    return [float(difference(value[:, 0] / value[:, 1])), float(low), float(high)]


# --------------------------------------------------------------------------------------------------
# Entries


def choice_of(row: dict, question: data.Question) -> str | None:
    """What votes are counted by: the letter or, open-ended, the normalised answer, and where it is
    in the reference's words the reference. An unfinished completion has no choice."""
    if row["finish_reason"] != "stop":
        return None
    if question.options:
        return answers.extract_choice(row["response"], question.options)
    if answers.is_correct(row["response"], question):
        return question.answer
    return data.normalise(answers.free_answer(row["response"]) or "") or None


def entry(question: data.Question, rows: list[dict], verdicts: dict[tuple, dict | None]) -> dict:
    """One question's entry. rows: its samples in order, each with response, finish_reason,
    extracted, correct and, where the benchmark has a rule of its own, official and
    official_correct. verdicts: (id, sample) -> criteria, None for an unreadable verdict."""
    groups = {key: str(question.meta[key]) for key in GROUPS if question.meta.get(key)}
    if "modality" in groups:
        groups["modality"] = modalities.modality(groups["modality"])
    found = {
        "id": question.id,
        "source": question.source,
        "image": bool(question.images),
        "answer": question.answer,
        "groups": groups,
        "choices": [row["extracted"] for row in rows],
        "right": [row["correct"] for row in rows],
        "official": None,
        "ended": [row["finish_reason"] for row in rows],
        "words": [],
        "loops": [],
        "criteria": [],
    }
    if any("forced" in row for row in rows):
        forced = [row.get("forced") == question.answer for row in rows]
        found["forced"] = [row["correct"] or right for row, right in zip(rows, forced)]
    if "official" in rows[0]:
        choices, right = zip(*((row["official"], row["official_correct"]) for row in rows))
        found["official"] = {"choices": list(choices), "right": list(right)}
    for row in rows:
        thinking = row["response"].split("</think>")[0].removeprefix("<think>")
        found["words"].append(len(thinking.split()))
        found["loops"].append(answers.loop(row["response"]) is not None)
        key = row["id"], row["sample"]
        met = verdicts.get(key) or {}
        read = {name: met[name] for name in CRITERIA if met}
        found["criteria"].append(read if key in verdicts else None)
    return found


def flatten(entries: list[dict], key: str) -> list:
    """One value a sample, over all questions."""
    return [value for found in entries for value in found[key]]


def summarise(entries: list[dict]) -> dict:
    """All figures of one group of questions with equally many samples. Shares with an interval are
    [value, low, high]. Raises ValueError for an empty group, or for different numbers of
    samples."""
    counts = {len(found["choices"]) for found in entries}
    if len(counts) != 1:
        raise ValueError(f"one group of questions has {sorted(counts)} samples a question")
    samples, ended = counts.pop(), flatten(entries, "ended")
    figures = {
        "questions": len(entries),
        "samples": samples,
        "accuracy": mean_and_interval([statistics.fmean(found["right"]) for found in entries]),
        "unparsed": statistics.fmean(choice is None for choice in flatten(entries, "choices")),
        # parts of the unparsed, as shares of all answers too: thinking that never ended, prompts
        # too long to be asked, and no answer given at all
        "cut_off": ended.count("length") / len(ended),
        "over_long": ended.count("overlong") / len(ended),
        "unanswered": sum(end in ("blocked", "refused", "empty") for end in ended) / len(ended),
        "loops": statistics.fmean(flatten(entries, "loops")),
        **lengths(flatten(entries, "words")),
        "majority": {},
        "pass": {},
    }
    for n in sizes(samples):
        votes, passes = [], []
        for found in entries:
            choices, right = tuple(found["choices"]), tuple(found["right"])
            votes.append(majority_at(n, choices, right, data.sample_seed(0, found["id"], n)))
            passes.append(pass_at(n, samples, sum(right)))
        figures["majority"][str(n)] = mean_and_interval(votes)
        figures["pass"][str(n)] = mean_and_interval(passes)
    if any("forced" in found for found in entries):
        right = [statistics.fmean(found.get("forced", found["right"])) for found in entries]
        figures["forced"] = mean_and_interval(right)
    ruled = [found["official"] for found in entries]
    if all(ruled):
        figures["official"] = mean_and_interval([statistics.fmean(one["right"]) for one in ruled])
        unread = [choice is None for choice in flatten(ruled, "choices")]
        figures["official_unparsed"] = statistics.fmean(unread)
    return figures | judged_figures(entries)


def lengths(words: list[int]) -> dict[str, float]:
    """Mean, median and 95th percentile of the words a chain."""
    ordered = sorted(words)
    return {
        "words": statistics.fmean(words),
        "words_median": statistics.median(words),
        "words_95": ordered[math.ceil(0.95 * len(ordered)) - 1],
    }


def judged_counts(entries: list[dict]) -> dict[str, int]:
    """Numbers of chains: sent to the judge, with a readable verdict, meeting all criteria, looking
    at the image, and of these hallucinating (the others say nothing of the image)."""
    sent = [given for given in flatten(entries, "criteria") if given is not None]
    judged = [given for given in sent if given]
    looking = [given for given in judged if given["Image_Analysis_Involvement"]]
    return {
        "sent": len(sent),
        "judged": len(judged),
        "met": sum(all(given.values()) for given in judged),
        "looking": len(looking),
        "hallucinated": sum(not given["No_Hallucination"] for given in looking),
    }


def judged_figures(entries: list[dict]) -> dict:
    """Shares of the chains that have a readable verdict; {} where none has."""
    counts = judged_counts(entries)
    judged = [given for given in flatten(entries, "criteria") if given]
    if not judged:
        return {}
    met, looking = counts["met"] / len(judged), counts["looking"]
    return {
        "judged": len(judged),
        "sent": counts["sent"],
        "criteria": {name: statistics.fmean(given[name] for given in judged) for name in CRITERIA},
        "all_criteria": [met, *wilson(met, sum(any(found["criteria"]) for found in entries))],
        "judged_looking": looking,
        "hallucinated": counts["hallucinated"] / looking if looking else None,
    }


# --------------------------------------------------------------------------------------------------
# results.json


def names_of(found: dict) -> tuple[str, str]:
    """What an entry's benchmark may be called: "mmmu", or with its kind "mmmu, text"."""
    source = found["source"] or "no source"
    return source, f"{source}, {'image' if found['image'] else 'text'}"


def by_source(entries: list[dict], by_kind: bool = False) -> dict[str, list[dict]]:
    """Entries by benchmark. One with image and text questions is two groups, if by_kind or if the
    two were sampled differently often."""
    asked: dict[str, set] = {}  # by benchmark: each kind (with an image or not), number of samples
    for found in entries:
        asked.setdefault(names_of(found)[0], set()).add((found["image"], len(found["choices"])))
    groups: dict[str, list[dict]] = {}
    for found in entries:
        source, with_kind = names_of(found)
        kinds, counts = map(set, zip(*asked[source]))
        apart = len(kinds) == 2 and (by_kind or len(counts) > 1)
        groups.setdefault(with_kind if apart else source, []).append(found)
    return groups


def subsets(entries: list[dict]) -> dict[str, dict]:
    """{"modality=CT": figures, ...}"""
    parts: dict[tuple[str, str], list[dict]] = {}
    for found in entries:
        for pair in found["groups"].items():
            parts.setdefault(pair, []).append(found)
    return {f"{key}={value}": summarise(parts[key, value]) for key, value in sorted(parts)}


def make_results(entries: list[dict]) -> dict:
    """All figures of one run: of image and text questions, of each benchmark and its subsets, and
    of the subsets of the image questions."""
    image = [found for found in entries if found["image"]]
    groups = {"image": image, "text": [found for found in entries if not found["image"]]}
    return {
        "groups": {kind: summarise(members) for kind, members in groups.items() if members},
        "benchmarks": {
            name: {"figures": summarise(members), "subsets": subsets(members)}
            for name, members in by_source(entries).items()
        },
        "subsets": subsets(image),
        "entries": entries,
    }


def write_results(path: Path, results: dict) -> None:
    """results.json: the figures indented, the entries one a line."""
    figures = {key: value for key, value in results.items() if key != "entries"}
    text = json.dumps(figures, indent=1, ensure_ascii=False)
    lines = ",\n  ".join(json.dumps(found, ensure_ascii=False) for found in results["entries"])
    data.write_text(path, f'{text[:-2]},\n "entries": [\n  {lines}\n ]\n}}\n')


def read_results(folder: str | Path) -> dict:
    """What evaluate.py wrote of one run. Raises RowError where it is not there, torn, or without a
    key, as from an older version."""
    path = Path(folder) / "results.json"
    if not path.is_file():
        raise data.RowError(f"{path}: no such file; evaluate.py writes it into its --out")
    results = data.read_json(path)
    data.need({"results": results}, str(path), results=dict)
    figures = dict.fromkeys(("groups", "benchmarks", "subsets"), dict)
    data.need(results, str(path), name=str, **figures, entries=list)
    keys = dict.fromkeys(("id", "source", "answer"), str) | {"image": bool, "official": object}
    keys |= dict.fromkeys(("choices", "right", "ended", "criteria"), list)
    for number, found in enumerate(results["entries"], 1):
        data.need({"entry": found}, f"{path}: entry {number}", entry=dict)
        data.need(found, f"{path}: entry {number}", **keys)
    if not results["entries"]:
        raise data.RowError(f"{path}: no question in it; run the evaluation again")
    return results


# --------------------------------------------------------------------------------------------------
# Two runs


def shared(first: list[dict], second: list[dict]) -> list[tuple[dict, dict]]:
    """The two entries of each question that both runs have, in the first's order. A question is the
    same by its id (made from its text, options and images, unless its file names one), source, kind
    and answer."""

    def identity(found: dict) -> tuple:
        return found["id"], found["source"], found["image"], found["answer"]

    other = {identity(found): found for found in second}
    return [(found, other[identity(found)]) for found in first if identity(found) in other]


def compared_shares(found: dict) -> dict[str, float]:
    """What two runs are compared by, of one question: by our rule and, where it has one, by the
    benchmark's own."""
    shares = {
        "difference": statistics.fmean(found["right"]),
        "readable_difference": statistics.fmean(choice is not None for choice in found["choices"]),
        "vote_difference": vote(found["choices"], found["right"]),
    }
    if found["official"]:
        shares["official_difference"] = statistics.fmean(found["official"]["right"])
    return shares


def compare(first: list[dict], second: list[dict]) -> dict:
    """Two models on the same questions, second less first. Differences are [mean, low, high]: in
    accuracy by our rule and, where all entries have it, by the benchmark's own; in the share of
    readable answers; and in accuracy by majority vote, with McNemar's test on the votes. Raises
    RowError where the questions, or their answers, are not the same."""
    pairs = shared(first, second)
    if not len(first) == len(second) == len(pairs):
        counts = f"{len(first)} and {len(second)} questions, of which {len(pairs)} are the same"
        raise data.RowError(f"{counts} by id and answer")
    before, after = ([compared_shares(found) for found in run] for run in zip(*pairs))
    figures: dict = {"questions": len(pairs)}
    for name in before[0]:
        if all(name in shares for shares in before + after):
            values = [two[name] - one[name] for one, two in zip(before, after)]
            figures[name] = [statistics.fmean(values), *bootstrap(values)]
    gained = [two["vote_difference"] - one["vote_difference"] for one, two in zip(before, after)]
    only_first, only_second = gained.count(-1), gained.count(1)
    p = mcnemar(only_first, only_second)
    return {**figures, "only_first": only_first, "only_second": only_second, "p": p}
