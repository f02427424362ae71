"""From samples to numbers that survive review: intervals, majority vote, pass@n, paired comparisons (paper §4).

    accuracy   mean over questions of the share of right samples
    MV@n       the answer most of n samples agree on; unreadable ones abstain; ties go to the earliest sampled
    pass@n     1 - C(N - c, n) / C(N, n): unbiased, from N samples of which c are right               (paper §4.3, Fig. 6)
    McNemar    of the questions that only one of two models gets right, how many are whose: exact, two-sided

One entry a question holds all that any figure is made of, so that a report can be made again without the model:

    id, source, image (bool), answer, groups {question_type, modality, ...}, choices [letter or null, a sample each],
    right [bool], official {choices, right} or null, ended ["stop", "length", ...], words [int],
    criteria [{four booleans}, {} where the verdict cannot be read, null where none was asked for]

An answer that cannot be read, that was cut off or that was never given is wrong and stays in the denominator.

Where we depart from the paper, or it is silent: it gives no intervals. Ours are Wilson's at 95 %, over questions (samples
of one question are not independent); where a question counts in part, a mean of shares varies less than the single
answers that Wilson's formula supposes, and the interval is too wide rather than too narrow.
"""

import math
import random
import statistics
from collections import Counter
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import answers
import benchmarks
import data
from judge import CRITERIA

SUBSETS = 100  # ours: seeded subsets behind MV@n
RESAMPLES = 10_000  # ours: bootstrap over questions
GROUPS = (*benchmarks.SUBSETS, "kind")  # keys of a question's meta that reports are split by


# ---------------------------------------------------------------------------------------------------------------
# Statistics


def wilson(share: float, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share of `count` questions. Raises ValueError where there are none."""
    if count < 1:
        raise ValueError("a share of no questions has no interval")
    z = statistics.NormalDist().inv_cdf(0.975)
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, middle - half), min(1.0, middle + half)


def mean_and_interval(values: list[float]) -> list[float]:
    """[mean, low, high] of one value a question, each between 0 and 1."""
    mean = statistics.fmean(values)
    return [mean, *wilson(mean, len(values))]


def pass_at(n: int, samples: int, right: int) -> float:
    """Chance that a random n of the samples hold a right one. Raises ValueError for n > samples."""
    if n > samples:
        raise ValueError(f"pass@{n} needs at least {n} samples, there are {samples}")
    return 1.0 - math.comb(samples - right, n) / math.comb(samples, n)


def majority(choices: list[str | None]) -> str | None:
    """The commonest readable choice; of tied ones the earliest sampled; None if all abstain."""
    counts = Counter(choice for choice in choices if choice is not None)  # keeps the order of first appearance
    return counts.most_common(1)[0][0] if counts else None


def vote(choices: list[str | None], right: list[bool]) -> bool:
    """Whether the majority's choice is right. An open-ended answer is as right as the first sample that gave it."""
    winner = majority(choices)
    return winner is not None and right[choices.index(winner)]


def shared_vote(choices: list[str | None], right: list[bool]) -> float:
    """The chance that the vote is right if a tie is broken by lot."""
    counts = Counter(choice for choice in choices if choice is not None)
    tied = [choice for choice, count in counts.items() if count == max(counts.values())]
    return statistics.fmean(right[choices.index(choice)] for choice in tied) if tied else 0.0


@lru_cache(maxsize=None)  # a question is in several groups, and the vote of its samples is always the same
def majority_at(n: int, choices: tuple[str | None, ...], right: tuple[bool, ...], seed: int) -> float:
    """Share of random n-subsets of the samples, in their order, whose majority is right."""
    if n == len(choices):
        return float(vote(choices, right))
    if n == 1:
        return statistics.fmean(right)
    rng = random.Random(seed)
    subsets = (sorted(rng.sample(range(len(choices)), n)) for _ in range(SUBSETS))
    return statistics.fmean(vote([choices[i] for i in subset], [right[i] for i in subset]) for subset in subsets)


def sizes(most: int) -> list[int]:
    """1, 2, 4, 8 ... and all there are."""
    return [*(1 << k for k in range(most.bit_length()) if 1 << k < most), most]


def mcnemar(only_first: int, only_second: int) -> float:
    """Two-sided p-value, exact: if neither model were better, who alone is right would be a fair coin for each question."""
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


# ---------------------------------------------------------------------------------------------------------------
# Entries

def read_results(folder: str | Path, wanted: dict[str, type]) -> dict:
    """What evaluate.py run wrote of one run. Raises RowError where it is not there, torn, or
    without a wanted key."""
    path = Path(folder) / "results.json"
    if not path.is_file():
        raise data.RowError(f"{path}: no such file; evaluate.py run writes it into its --out")
    results = data.read_json(path)
    data.need({"results": results}, str(path), results=dict)
    data.need(results, str(path), **wanted)
    for number, found in enumerate(results["entries"], 1):
        data.need({"entry": found}, f"{path}: entry {number}", entry=dict)
        texts = {"id": str, "source": str, "answer": str, "official": object}  # official: or null
        lists = dict.fromkeys(("choices", "right", "ended", "criteria"), list)
        data.need(found, f"{path}: entry {number}", **texts, **lists, image=bool)
    if not results["entries"]:
        raise data.RowError(f"{path}: no question in it; run the evaluation again")
    return results


def choice_of(response: str, question: data.Question) -> str | None:
    """What votes are counted by: the letter or, open-ended, the normalised answer (the reference as it is written, where equal)."""
    if question.options:
        return answers.extract_choice(response, question.options)
    said = data.normalise(answers.free_answer(response) or "")
    return question.answer if said == data.normalise(question.answer) else said or None


def met(verdict: dict | None) -> dict[str, bool]:
    """The four criteria of a verdict; {} where it cannot be read."""
    return {name: verdict[name] for name in CRITERIA} if verdict else {}


def entry(question: data.Question, rows: list[dict], verdicts: dict[tuple, dict | None]) -> dict:
    """One question's entry. rows: its samples in order, each with response, finish_reason, extracted, correct and, where the
    benchmark has a rule of its own, official and official_correct. verdicts: (id, sample) -> criteria."""
    thinking = [row["response"].split("</think>")[0].removeprefix("<think>") for row in rows]
    own_rule = "official" in rows[0]
    return {
        "id": question.id, "source": question.source, "image": bool(question.images), "answer": question.answer,
        "groups": {
            key: data.modality(str(told)) if key == "modality" else str(told)
            for key in GROUPS if (told := question.meta.get(key))
        },
        "choices": [row["extracted"] for row in rows], "right": [row["correct"] for row in rows],
        "official": {"choices": [row["official"] for row in rows], "right": [row["official_correct"] for row in rows]} if own_rule else None,
        "ended": [row["finish_reason"] for row in rows], "words": [len(text.split()) for text in thinking],
        "criteria": [met(verdicts[key]) if (key := (row["id"], row["sample"])) in verdicts else None for row in rows],
    }  # fmt: skip


def flat(entries: list[dict], key: str) -> list:
    """One value a sample, over all questions."""
    return [value for found in entries for value in found[key]]


def summarise(entries: list[dict]) -> dict:
    """All figures of one group of questions with equally many samples. Shares with an interval are
    [value, low, high]. Raises ValueError for an empty group, or one whose questions have different
    numbers of samples."""
    counts = {len(found["choices"]) for found in entries}
    if len(counts) != 1:
        told = f"one group of questions has {sorted(counts)} samples a question"
        raise ValueError(f"{told}; score them apart")
    samples, ended = counts.pop(), flat(entries, "ended")
    lots = [shared_vote(found["choices"], found["right"]) for found in entries]
    figures = {
        "questions": len(entries), "samples": samples,
        "accuracy": mean_and_interval([statistics.fmean(found["right"]) for found in entries]),
        "unparsed": statistics.fmean(choice is None for choice in flat(entries, "choices")),
        # parts of the unparsed, as shares of all answers too: thinking that never ended, prompts
        # too long to be asked, and no answer given at all
        "cut_off": ended.count("length") / len(ended),
        "over_long": ended.count("overlong") / len(ended),
        "unanswered": sum(end in ("blocked", "refused", "empty") for end in ended) / len(ended),
        "words": statistics.fmean(flat(entries, "words")),
        "majority": {}, "pass": {}, "ties_by_lot": mean_and_interval(lots),
    }  # fmt: skip
    for n in sizes(samples):
        votes, passes = [], []
        for found in entries:
            choices, right = tuple(found["choices"]), tuple(found["right"])
            votes.append(majority_at(n, choices, right, data.sample_seed(0, found["id"], n)))
            passes.append(pass_at(n, samples, sum(right)))
        figures["majority"][str(n)] = mean_and_interval(votes)
        figures["pass"][str(n)] = mean_and_interval(passes)
    ruled = [found["official"] for found in entries]
    if all(ruled):
        figures["official"] = mean_and_interval([statistics.fmean(one["right"]) for one in ruled])
        unread = statistics.fmean(choice is None for choice in flat(ruled, "choices"))
        figures["official_unparsed"] = unread
    return figures | judged_figures(entries)


def judged_figures(entries: list[dict]) -> dict:
    """Shares of the chains that have a readable verdict; {} where none has."""
    judged = [given for given in flat(entries, "criteria") if given]
    if not judged:
        return {}
    looking = [given for given in judged if given["Image_Analysis_Involvement"]]
    met = statistics.fmean(all(given.values()) for given in judged)
    return {
        "judged": len(judged), "sent": sum(given is not None for given in flat(entries, "criteria")),
        "criteria": {name: statistics.fmean(given[name] for given in judged) for name in CRITERIA},
        "all_criteria": [met, *wilson(met, sum(any(found["criteria"]) for found in entries))], "judged_looking": len(looking),
        # among chains that look at the image: one that never looks cannot see things that are not there
        "hallucinated": statistics.fmean(not given["No_Hallucination"] for given in looking) if looking else None,
    }  # fmt: skip


def shared(first: list[dict], second: list[dict]) -> list[tuple[dict, dict]]:
    """The two entries of each question that both runs have, in the first's order. A question is
    the same by its id, which unless its file names one is made from its text, options and images,
    and by all else that an entry holds of it: source, kind and answer."""
    keys = ("id", "source", "image", "answer")
    other = {tuple(found[key] for key in keys): found for found in second}
    pairs = ((found, other.get(tuple(found[key] for key in keys))) for found in first)
    return [(one, two) for one, two in pairs if two]


def compare(first: list[dict], second: list[dict]) -> dict:
    """Two models on the same questions, second less first. Differences are [mean, low, high]: in
    accuracy by our rule and, where all entries have it, by the benchmark's own; in the share of
    answers that can be read, which tells form from medicine; and in accuracy by majority vote,
    with McNemar's test on the votes. Raises RowError where the questions, or their answers, are
    not the same."""
    pairs = shared(first, second)
    if not len(first) == len(second) == len(pairs):
        counts = f"{len(first)} and {len(second)} questions, of which {len(pairs)} are the same"
        raise data.RowError(f"{counts} by id and answer")

    def difference(value: Callable[[dict], float]) -> list[float]:
        values = [value(two) - value(one) for one, two in pairs]
        return [statistics.fmean(values), *bootstrap(values)]

    def voted(found: dict) -> bool:
        return vote(found["choices"], found["right"])

    votes = Counter((voted(one), voted(two)) for one, two in pairs)
    only_first, only_second = votes[True, False], votes[False, True]
    figures = {
        "questions": len(pairs),
        "difference": difference(lambda found: statistics.fmean(found["right"])),
        "readable_difference": difference(
            lambda found: statistics.fmean(choice is not None for choice in found["choices"])
        ),
        "vote_difference": difference(voted),
        "only_first": only_first, "only_second": only_second, "p": mcnemar(only_first, only_second),
    }  # fmt: skip
    if all(one["official"] and two["official"] for one, two in pairs):
        figures["official_difference"] = difference(
            lambda found: statistics.fmean(found["official"]["right"])
        )
    return figures
