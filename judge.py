"""Multimodal Medical Reasoning Preference (paper §3.3): who reasons well among those who answered right.

    Y   = { y : the answer of y is right, by rule }          wrong ones are filtered out before any judge is asked
    Y_p = { y in Y : all four criteria are met }             Logical Consistency, Image Analysis Involvement,
    Y_n = { y in Y : any of the four is not met }            No Hallucination, Reflection Presence
    pairs = some of Y_p x Y_n, question by question

The judge gets the images and the prompt of the paper's Appendix A, and replies with JSON. A reply that cannot be read is
no verdict: asked again up to three times, then stored with its error, counted, and left out of both sides. Replies are kept
by a hash of what was asked: the same text on the same question is never judged twice, whichever rollout it came from.

    python judge.py verdicts --judge clinic:judge --rollouts rollouts.jsonl --questions questions.jsonl --images . --out out/verdicts
    python judge.py pairs --verdicts out/verdicts/verdicts.jsonl --rollouts ... --questions ... --out out/pairs
    python judge.py sample -n 1000 --verdicts ... --rollouts ... --questions ... --images . --out out/human    a sheet for humans
    python judge.py agree --human sheet.csv --key out/human/key.jsonl --verdicts ... --out out/agree           Figure 3

reads questions.jsonl, rollouts.jsonl; writes verdicts.jsonl, then pairs.jsonl with a report (report.json, printed);
sample writes OUT/sheet (CSV and images, for the raters) and OUT/key.jsonl (not for them); agree writes agreement.json and .png

Where we depart from the paper, or it is silent:
  1. The judge also returns Answer_Correctness, which the rule has settled. Where it says No, rule and judge contradict
     each other: the row is left out and counted.
  2. How pairs are chosen is not said. All of Y_p x Y_n is our default: with 8 samples at 40 to 45 % accuracy it gives
     about the paper's 4,432 and 5,224 pairs from 2,000 questions, which one negative a positive does not.
  3. An answer cut off by the token limit counts as wrong, so it is never a negative. Samples of one text are one.
  4. --criteria cuts pairs under fewer than the four. A chain is then positive if it meets those.
  5. The paper compares "scores" of humans and judge and names no scale. Ours is the number of criteria met, 0 to 4, a mean
     over the raters where there are several. It finds 68.9 % within +-SD, which is 1.02, and does not say of what: whole
     numbers cannot give that around 0 unless the mean is 0.45 or more off. We report both, around 0 and around the mean.
"""

import argparse
import math
import random
import shutil
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

import answers
import bill
import data
import flags
import stage
from asking import (
    SPEED, Ask, Engine, add_flags, ask_yes_no, checkpoint, identity, image_paths, label_cost,
    prompt_ask, read_verdict, setup_of,
)  # fmt: skip
from descriptions import read_sheet, write_sheet
from engines import open_engine
from rollout import cut_off

KEYS = data.JUDGED
CRITERIA = KEYS[1:]  # MMRP, paper 3.3

# paper App. A; the three slots are question, ground truth and the model's whole response
JUDGE_PROMPT = """You are an expert reasoning evaluator.
I will provide you:

* A question with images.
* The groundtruth of the question
* A model-generated answer, including its reasoning process.

Your task is to critically evaluate the reasoning based on the following five aspects:

1. **Answer Correctness**: Is the final answer correct based on the question?
2. **Logical Consistency**: Is the reasoning process logically coherent and step-by-step valid?
3. **Image Analysis Involvement**: Does the reasoning process demonstrate appropriate analysis of any visual information mentioned or implied in the question?
4. **No Hallucination**: Does the reasoning process avoid introducing irrelevant or hallucinated information not supported by the question or known facts?
5. **Reflection Presence**: Does the reasoning show any self-checking, verification, or reflection on possible uncertainties?

Please return the evaluation in the following JSON format:

{
    "Answer_Correctness": "Yes/No",
    "Logical_Consistency": "Yes/No",
    "Image_Analysis_Involvement": "Yes/No",
    "No_Hallucination": "Yes/No",
    "Reflection_Presence": "Yes/No"
}

<Question> %s </Question>
<Groundtruth> %s </Groundtruth>
<Answer> %s </Answer>"""


# ---------------------------------------------------------------------------------------------------------------
# Verdicts


def ground_truth(question: data.Question) -> str:
    """The answer as judge and raters see it: "B. MRI", or the reference text of an open-ended question."""
    return f"{question.answer}. {question.answer_text()}" if question.options else question.answer


def judge_ask(question: data.Question, rollout: dict, image_root: Path) -> Ask:
    """The Appendix A prompt about one rollout, with the question's images. Its id is a hash of all of that, so two rollouts
    of one text are one ask."""
    prompt = JUDGE_PROMPT % (data.question_text(question), ground_truth(question), rollout["response"])
    return prompt_ask(question.id, prompt, image_paths(question, image_root))


def verdict_row(rollout: dict, judge: str, reply: dict) -> dict:
    """A row of verdicts.jsonl: the parsed criteria, or null and the error."""
    criteria, error = read_verdict(reply, KEYS)
    row = {"id": rollout["id"], "sample": rollout["sample"], "response_sha": rollout["response_sha"], "criteria": criteria, "error": error, "judge": judge, "raw": reply["raw"]}
    return {**row, "verdict_sha": data.content_hash(row)[:16]}


def judge_all(engine: Engine, rollouts: list[dict], questions: dict[str, data.Question], args: argparse.Namespace) -> list[dict]:
    """A verdict on each rollout, in their order. A kill, a retry or new rollouts ask nothing twice."""
    asks = [judge_ask(questions[row["id"]], row, Path(args.images)) for row in rollouts]
    said = ask_yes_no(engine, asks, KEYS, "judge", args)
    return [verdict_row(row, engine.spec, said[ask.id]) for row, ask in zip(rollouts, asks)]


def cost(chains: Iterable[tuple[data.Question, int]], args: argparse.Namespace) -> bill.Cost:
    """What judging chains may cost at most, given each one's question and characters."""
    prompt = len(JUDGE_PROMPT)
    sizes = (
        (prompt + len(data.question_text(question) + ground_truth(question)) + letters, len(question.images))
        for question, letters in chains
    )
    return label_cost("judge", args.judge, sizes, args)


def right_by_rule(rollouts: list[dict], questions: dict[str, data.Question]) -> list[dict]:
    """The rollouts that were finished and whose answer is right."""
    return [row for row in rollouts if row["finish_reason"] == "stop" and answers.is_correct(row["response"], questions[row["id"]])]


def read_rollouts(path: str, questions: dict[str, data.Question]) -> list[dict]:
    rows = data.read_rows(path, "rollouts")
    if any(row["id"] not in questions for row in rows):
        lines = data.read_jsonl(path)
        where, id = next((where, row["id"]) for where, row in lines if row["id"] not in questions)
        known = "give the file the rollouts were made from"
        raise data.RowError(f"{where}: id: {id!r} is not in the questions; {known}")
    return rows


def verdicts(args: argparse.Namespace) -> None:
    started, out = time.time(), Path(args.out)
    questions = {question.id: question for question in data.read_questions(args.questions)}
    inputs = [args.rollouts, args.questions, *filter(None, [checkpoint(args.judge)])]
    if not stage.open_folder(args, inputs, SPEED, data.image_files(args.images, map(vars, questions.values()))):
        return
    rollouts = read_rollouts(args.rollouts, questions)
    right = right_by_rule(rollouts, questions)
    print(f"{len(rollouts)} candidates, {len(right)} right by rule: those go to {args.judge}")
    chains = [(questions[row["id"]], len(row["response"])) for row in right]
    bill.announce([cost(chains, args)], args.images_may_leave)
    answered_by = identity(args.judge)  # before it is asked: its folder may be trained anew
    engine = open_engine(args.judge, setup_of(args))
    rows = judge_all(engine, right, questions, args)
    data.write_jsonl(out / "verdicts.jsonl", rows)
    unread = sum(row["criteria"] is None for row in rows)
    print(f"{len(rows)} verdicts, {unread} unreadable and left out")
    figures = {"judged": len(rows), "unreadable": unread}
    stage.finish(args, [out / "verdicts.jsonl"], started, figures, {args.judge: answered_by})


# ---------------------------------------------------------------------------------------------------------------
# Pairs

RULES = ("all", "per-positive", "one", "length-matched")
# ours: a warning says so below these; the paper has 4,432 and 5,224 pairs (3.3)
FEW_PAIRS, FEW_QUESTIONS = 100, 20
# what the sampler told of a chain, where it did (rollout.py): dpo.py compares its own (drift.py)
LOGPS = ("logp", "token_logps")


def choose_pairs(positives: list[dict], negatives: list[dict], rule: str, cap: int, rng: random.Random) -> list[tuple[dict, dict]]:
    """(chosen, rejected) of one question. Each candidate has "response".

    all: every positive with every negative; per-positive: one negative for each positive; one: a single pair;
    length-matched: for each positive the unused negative of the nearest length. cap > 0 bounds the number of pairs.
    """
    unique = [list({row["response"]: row for row in rows}.values()) for rows in (positives, negatives)]
    good, bad = (rng.sample(rows, len(rows)) for rows in unique)
    if not good or not bad:
        return []
    if rule == "all":
        pairs = [(g, b) for g in good for b in bad]
        rng.shuffle(pairs)
    elif rule == "per-positive":
        pairs = [(g, bad[i % len(bad)]) for i, g in enumerate(good)]
    elif rule == "one":
        pairs = [(good[0], bad[0])]
    elif rule == "length-matched":
        pairs, left = [], list(bad)
        for g in good:
            if left:
                nearest = min(left, key=lambda b: abs(len(b["response"]) - len(g["response"])))
                left.remove(nearest)
                pairs.append((g, nearest))
    else:
        raise ValueError(f"pairing rule {rule!r}; known are {RULES}")
    return pairs[:cap] if cap else pairs


def mean(values: list[float]) -> float | None:
    return round(statistics.fmean(values), 3) if values else None


def make_pairs(
    rollouts: list[dict], verdict_rows: list[dict], questions: dict[str, data.Question], rule: str, cap: int, seed: int, criteria: Sequence[str] = CRITERIA
) -> tuple[list[dict], dict]:
    """(pairs.jsonl rows, report). A chain that meets all of `criteria` is positive, one that fails any of them negative.
    The report follows every candidate to where it ended."""
    right = right_by_rule(rollouts, questions)
    by_key = {(row["id"], row["sample"], row["response_sha"]): row for row in verdict_rows}
    report = {"criteria": list(criteria), "candidates": len(rollouts), "unfinished": sum(r["finish_reason"] != "stop" for r in rollouts), "correct": len(right), "no_verdict": 0, "rule_and_judge_disagree": 0}
    sides: dict[str, tuple[list, list]] = {}
    failed_by: Counter = Counter()
    for rollout in right:
        judged = by_key.get((rollout["id"], rollout["sample"], rollout["response_sha"]))
        if judged is None or judged["criteria"] is None:
            report["no_verdict"] += 1
            continue
        met = judged["criteria"]
        if not met["Answer_Correctness"]:
            report["rule_and_judge_disagree"] += 1
            continue
        failed = [name for name in criteria if not met[name]]
        failed_by.update(failed)
        candidate = {**rollout, "failed": failed, "verdict": judged["verdict_sha"]}
        sides.setdefault(rollout["id"], ([], []))[bool(failed)].append(candidate)
    rows, with_pairs, duplicates = [], 0, set()
    for key, (positives, negatives) in sides.items():
        question = questions[key]
        chosen_pairs = choose_pairs(positives, negatives, rule, cap, random.Random(data.sample_seed(seed, key, 0)))
        with_pairs += bool(chosen_pairs)
        for good, bad in chosen_pairs:
            if good["response"] == bad["response"] or (key, good["response"], bad["response"]) in duplicates:
                continue  # one text, judged both ways: no preference
            duplicates.add((key, good["response"], bad["response"]))
            rows.append({
                "id": key, "prompt": data.prompt_messages(question), "images": question.images,
                "chosen": good["response"], "rejected": bad["response"], "chosen_sample": good["sample"], "rejected_sample": bad["sample"],
                "chosen_token_ids": good["token_ids"], "rejected_token_ids": bad["token_ids"],
                "chosen_verdict": good["verdict"], "rejected_verdict": bad["verdict"], "failed": bad["failed"],
                **{f"chosen_{key}": good[key] for key in LOGPS if key in good},
                **{f"rejected_{key}": bad[key] for key in LOGPS if key in bad},
            })  # fmt: skip
    report |= {
        "positive": sum(len(good) for good, _ in sides.values()),
        "negative": sum(len(bad) for _, bad in sides.values()),
        "negatives_failing": {name: failed_by[name] for name in criteria},
        "questions": len({row["id"] for row in rollouts}),
        "questions_with_pairs": with_pairs,
        "pairs": len(rows),
        "pairs_failing": {name: sum(name in row["failed"] for row in rows) for name in criteria},
        "words": {side: mean([len(row[side].split()) for row in rows]) for side in ("chosen", "rejected")},
    }
    return rows, report


def read_report(path: Path) -> dict:
    report = data.read_json(path)
    data.need({"report": report}, str(path), report=dict)
    figures = {"criteria": list, "pairs_failing": dict, "negatives_failing": dict, "words": dict}
    data.need(report, str(path), **figures, candidates=int, correct=int, no_verdict=int, pairs=int)
    return report


def print_report(report: dict) -> None:
    if len(report["criteria"]) < len(CRITERIA):
        print("positive is a chain that meets " + ", ".join(report["criteria"]))
    print("candidates -> correct -> judged -> positive / negative -> questions with pairs -> pairs")
    judged = report["correct"] - report["no_verdict"] - report["rule_and_judge_disagree"]
    print(f"{report['candidates']} -> {report['correct']} -> {judged} -> {report['positive']} / {report['negative']} -> {report['questions_with_pairs']} of {report['questions']} -> {report['pairs']}")
    print("why negatives fail:   " + ", ".join(f"{name} {count}" for name, count in report["negatives_failing"].items()))
    words = report["words"]
    print(f"length in words:      chosen {words['chosen']}, rejected {words['rejected']}")


def few(report: dict) -> str | None:
    """A warning where the pairs are few, or of few questions."""
    count, questions = report["pairs"], report["questions_with_pairs"]
    if count >= FEW_PAIRS and questions >= FEW_QUESTIONS:
        return None
    return (
        f"warning: {count} pairs of {questions} questions: what DPO learns from so few is noise; "
        f"at least {FEW_PAIRS} of {FEW_QUESTIONS} are wanted: ask more questions, or take more "
        "answers of each (rollout.py -n)"
    )


def pairs(args: argparse.Namespace) -> None:
    started, out = time.time(), Path(args.out)
    if not stage.open_folder(args, [args.rollouts, args.questions, args.verdicts]):
        return
    questions = {question.id: question for question in data.read_questions(args.questions)}
    rollouts = read_rollouts(args.rollouts, questions)
    judged = data.read_rows(args.verdicts, "verdicts")
    criteria = [name for name in CRITERIA if name in args.criteria]
    rows, report = make_pairs(rollouts, judged, questions, args.rule, args.cap, args.seed, criteria)
    data.write_jsonl(out / "pairs.jsonl", rows)
    data.write_json(out / "report.json", report)
    print_report(report)
    for said in filter(None, (cut_off(rollouts), few(report))):
        print(said)
    figures = {name: value for name, value in report.items() if isinstance(value, int)}
    stage.finish(args, [out / "pairs.jsonl", out / "report.json"], started, figures)


# ---------------------------------------------------------------------------------------------------------------
# Agreement with humans (paper §3.3, Fig. 3)

RESAMPLES = 2000  # ours: bootstrap over cases
SHEET = ("id", "question", "options", "answer", "response", "images", *CRITERIA)  # the raters fill in the last four


CELL = 32_767  # characters of a cell, in the spreadsheets that raters use


def sample(args: argparse.Namespace) -> None:
    """Draws chains with a readable verdict, each text once, and lays them out for raters who must not know the verdicts."""
    started, out, image_root = time.time(), Path(args.out), Path(args.images)
    if not stage.open_folder(args, [args.verdicts, args.rollouts, args.questions]):
        return
    questions = {question.id: question for question in data.read_questions(args.questions)}
    chains = {(row["id"], row["response_sha"]): row for row in read_rollouts(args.rollouts, questions)}
    judged = {(row["id"], row["response_sha"]) for row in data.read_rows(args.verdicts, "verdicts") if row["criteria"]}
    if missing := judged - chains.keys():
        raise data.RowError(f"{args.verdicts}: {len(missing)} verdicts are on texts that {args.rollouts} does not have; give the file they were made from")
    if len(judged) < args.n:
        raise data.RowError(f"{args.verdicts}: {len(judged)} chains have a readable verdict, fewer than -n {args.n}; ask for fewer")
    drawn = random.Random(args.seed).sample(sorted(judged), args.n)
    sheet, key = [], []
    (out / "sheet" / "images").mkdir(parents=True, exist_ok=True)
    for number, (question_id, response_sha) in enumerate(drawn, 1):
        question, case, copies = questions[question_id], f"case-{number:04d}", []
        for index, image in enumerate(image_paths(question, image_root), 1):  # under new names: a file's own may tell the answer
            copies.append(f"{case}-{index}{image.suffix}")
            shutil.copyfile(image, out / "sheet" / "images" / copies[-1])
        options = "\n".join(f"({letter}) {text}" for letter, text in question.options.items())
        told = (case, question.question, options, ground_truth(question), chains[question_id, response_sha]["response"], " ".join(copies))
        if longest := max((cell for cell in told if len(cell) > CELL), key=len, default=None):
            print(f"{case}: a text of {len(longest)} characters; a spreadsheet shows {CELL} of them, so have it read from sheet.csv itself")
        sheet.append([*told, *[""] * len(CRITERIA)])
        key.append({"case": case, "id": question_id, "response_sha": response_sha})
    write_sheet(out / "sheet" / "sheet.csv", list(SHEET), sheet)
    data.write_jsonl(out / "key.jsonl", key)
    print(f"{args.n} of {len(judged)} judged chains. {out / 'sheet'} is for the raters: Yes or No in the columns {', '.join(CRITERIA)}.")
    print(f"Each rater fills in a copy of sheet.csv. Keep {out / 'key.jsonl'} to yourself: it says which chain is which.")
    stage.finish(args, [out / "key.jsonl"], started, {"cases": args.n})  # raters may fill in the sheet where it lies


def read_ratings(path: str, cases: Sequence[str]) -> dict[str, dict[str, bool]]:
    """{case: {criterion: met}} from a sheet that a rater filled in. Raises RowError that lists every mistake by row and
    column: a sheet counts whole or not at all."""
    rows = read_sheet(path, ["id", *CRITERIA])
    found, mistakes = {}, []
    for number, row in rows:
        where, case = f"row {number} ({row['id']})", row["id"]
        if case not in cases:
            mistakes.append(f"{where}, column id: is not a case of the key; rows must keep the id they were given")
        elif case in found:
            mistakes.append(f"{where}, column id: is there twice; remove one of the rows")
        found[case] = {}
        for name in CRITERIA:
            word = (row[name] or "").strip().casefold()
            if word not in ("yes", "y", "1", "true", "no", "n", "0", "false"):
                mistakes.append(f"{where}, column {name}: " + (f"{row[name]!r} is neither Yes nor No" if word else "is empty; every criterion needs Yes or No"))
            found[case][name] = word in ("yes", "y", "1", "true")
    mistakes += [f"{case} is missing; every case of the key needs its row" for case in cases if case not in found]
    if mistakes:
        more = f"\n  ... and {len(mistakes) - 20} more" if len(mistakes) > 20 else ""
        raise data.RowError(f"{path}: {len(mistakes)} mistakes; nothing was computed\n  " + "\n  ".join(mistakes[:20]) + more)
    return found


def kappa(first: np.ndarray, second: np.ndarray) -> float | None:
    """Cohen's kappa of two raters' answers, bool (N,): (p_o - p_e) / (1 - p_e), the agreement beyond what their shares of Yes
    give by chance. None where both always say the same one thing: chance then explains all."""
    chance = first.mean() * second.mean() + (1 - first.mean()) * (1 - second.mean())
    return float(((first == second).mean() - chance) / (1 - chance)) if chance < 1 else None


def differences(cases: np.ndarray) -> np.ndarray:
    """Human score minus judge's score, (C,). A score is the number of criteria met; several raters are averaged."""
    return cases[:, :-1].sum(2).mean(1) - cases[:, -1].sum(1)


def agreement(cases: np.ndarray) -> dict[str, float | None]:
    """Every figure of the study, from bool (C cases, raters and then the judge, four criteria). Criteria are compared rater by
    rater with the judge; "all" is whether all four are met."""
    scores = differences(cases)
    mean, spread = scores.mean(), scores.std(ddof=1)
    within = {"within_sd_of_0": np.abs(scores), "within_sd_of_mean": np.abs(scores - mean)}
    figures = {"mean": mean, "sd": spread, **{name: (away <= spread + 1e-9).mean() for name, away in within.items()}}  # 1e-9: a third is not exact
    for name, met in [*zip(CRITERIA, np.moveaxis(cases, 2, 0)), ("all", cases.all(2))]:  # met: (C, raters and the judge)
        human, judge = met[:, :-1].ravel(), np.repeat(met[:, -1], met.shape[1] - 1)
        figures |= {f"{name}.human_yes": human.mean(), f"{name}.judge_yes": judge.mean(), f"{name}.accuracy": (human == judge).mean(), f"{name}.kappa": kappa(human, judge)}
    return {name: None if value is None else float(value) for name, value in figures.items()}


def bootstrap(cases: np.ndarray, figures_of: Callable[[np.ndarray], dict[str, float | None]], resamples: int, seed: int) -> dict[str, tuple[float, float] | None]:
    """The 95 % percentile interval of each figure over cases drawn anew with replacement; None for a figure that no draw has."""
    rng, intervals = np.random.default_rng(seed), {}
    draws = [figures_of(cases[rng.integers(len(cases), size=len(cases))]) for _ in range(resamples)]
    for name in draws[0]:
        values = sorted(draw[name] for draw in draws if draw[name] is not None)
        intervals[name] = (values[int(0.025 * len(values))], values[math.ceil(0.975 * len(values)) - 1]) if values else None
    return intervals


def plot_agreement(cases: np.ndarray, figures: dict, path: Path) -> None:
    """The paper's Figure 3: how many cases have which difference of scores, and the band of one SD."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams["axes.titlesize"] = 10
    step = 1 / (cases.shape[1] - 1)  # a mean over so many raters
    counts = Counter(round(difference / step) for difference in differences(cases))
    mean, spread = figures["mean"], figures["sd"]
    figure, ax = plt.subplots(figsize=(7, 4.5), constrained_layout=True)
    ax.axvspan(-spread, spread, color="#5b8db8", alpha=0.15, lw=0, label=f"0 ± SD: {figures['within_sd_of_0']:.1%} of cases")
    for edge, label in ((mean - spread, f"mean ± SD: {figures['within_sd_of_mean']:.1%}"), (mean + spread, None)):
        ax.axvline(edge, color="#c0504d", ls="--", lw=1, label=label)
    bars = ax.bar([k * step for k in counts], list(counts.values()), 0.85 * step, color="#5b8db8", edgecolor="white")
    ax.bar_label(bars, padding=3, fontsize=8 if step == 1 else 6)
    ax.axvline(mean, color="#c0504d", lw=1.2, label=f"mean {mean:+.2f}, SD {spread:.2f}")
    ax.set(title=f"criteria met, humans minus judge ({len(cases)} cases)", xlabel="difference of scores", ylabel="cases", xticks=range(-4, 5), xlim=(-4.5, 4.5))
    ax.margins(y=0.12)
    ax.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def agree(args: argparse.Namespace) -> None:
    started, out = time.time(), Path(args.out)
    if not stage.open_folder(args, [*args.human, args.key, args.verdicts]):
        return
    key = {row["case"]: (row["id"], row["response_sha"]) for row in data.read_rows(args.key, "key")}
    sheets = [read_ratings(path, list(key)) for path in args.human]
    verdict_of = {(row["id"], row["response_sha"]): row["criteria"] for row in data.read_rows(args.verdicts, "verdicts")}
    if lacking := [case for case, chain in key.items() if chain not in verdict_of]:
        raise data.RowError(f"{args.verdicts}: no verdict on {len(lacking)} of {len(key)} cases, the first is {lacking[0]}; give the verdicts of the same rollouts")
    told = [[*(sheet[case] for sheet in sheets), verdict_of[chain]] for case, chain in key.items() if verdict_of[chain]]
    cases = np.array([[[said[name] for name in CRITERIA] for said in row] for row in told], dtype=bool)  # (C, raters and the judge, 4)
    if len(cases) < 2:
        raise data.RowError(f"{args.verdicts}: {len(cases)} cases have a readable verdict; agreement needs two or more")
    figures = agreement(cases)
    intervals = bootstrap(cases, agreement, RESAMPLES, args.seed)

    def shown(name: str, form: str) -> str:
        if figures[name] is None:
            return "none (one answer only)"
        low, high = intervals[name]
        return f"{figures[name]:{form}} ({low:{form}} to {high:{form}})"

    print(f"{len(cases)} cases, {len(sheets)} raters, {len(key) - len(cases)} left out for an unreadable verdict; in brackets 95 %, bootstrap over cases")
    print(f"score, human minus judge: mean {shown('mean', '+.2f')}, SD {shown('sd', '.2f')}")
    print(f"within ±SD of 0 {shown('within_sd_of_0', '.1%')}, of the mean {shown('within_sd_of_mean', '.1%')}")
    for name in (*CRITERIA, "all"):
        rates = f"Yes: human {figures[f'{name}.human_yes']:.2f}, judge {figures[f'{name}.judge_yes']:.2f}"
        print(f"{name:<27} {rates}   accuracy {shown(f'{name}.accuracy', '.3f')}   kappa {shown(f'{name}.kappa', '.3f')}")
    data.write_json(out / "agreement.json", {"cases": len(cases), "raters": len(sheets), "figures": figures, "intervals": intervals})
    plot_agreement(cases, figures, out / "agreement.png")
    stage.finish(args, [out / "agreement.json", out / "agreement.png"], started, {"cases": len(cases), "raters": len(sheets)})


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Judge rollouts against the four criteria, build preference pairs, compare the judge with humans.")
    commands = parser.add_subparsers(dest="command", required=True)
    ask = commands.add_parser("verdicts", help="ask the judge about every rollout that is right by rule")
    cut = commands.add_parser("pairs", help="pair all-criteria chains with any-failed ones")
    draw = commands.add_parser("sample", help="draw the blinded sheet that humans fill in")
    compare = commands.add_parser("agree", help="compare filled-in sheets with the verdicts")
    for command in (ask, cut, draw):
        command.add_argument("--rollouts", required=True)
        command.add_argument("--questions", required=True)
    for command in (cut, draw, compare):
        command.add_argument("--verdicts", required=True, help="verdicts.jsonl")
    for command in (ask, cut, draw, compare):
        command.add_argument("--out", required=True, help="folder to write")
        command.add_argument("--seed", type=flags.SEED, default=0)
    ask.add_argument("--judge", required=True, help="engine spec of the judge")
    for command in (ask, draw):
        command.add_argument("--images", default=".", help="image root")
    add_flags(ask)
    ask.set_defaults(run=verdicts)
    cut.add_argument("--criteria", nargs="+", choices=CRITERIA, default=list(CRITERIA), help="what a positive must meet")  # paper 3.3: all four
    cut.add_argument("--rule", choices=RULES, default="all")  # ours: paper silent
    cut.add_argument(
        "--cap", type=flags.whole(0), default=0, help="most pairs of one question; 0 keeps all"
    )  # ours: paper silent
    cut.set_defaults(run=pairs)
    draw.add_argument("-n", type=flags.whole(1), default=1000, help="cases")  # paper 3.3
    draw.set_defaults(run=sample)
    compare.add_argument("--human", nargs="+", required=True, help="filled-in sheets, one a rater")
    compare.add_argument("--key", required=True, help="key.jsonl of the sample")
    compare.set_defaults(run=agree)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    args.run(args)


if __name__ == "__main__":
    flags.run_script(main)
