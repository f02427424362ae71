"""Multimodal Medical Reasoning Preference (paper 3.3): who reasons well among the right answers.

    Y   = { y : the answer of y is right, by rule }    the others never reach the judge
    Y_p = { y in Y : all four criteria are met }       Logical Consistency, Image Analysis
    Y_n = { y in Y : any of the four is not met }      Involvement, No Hallucination, Reflection
    pairs = some of Y_p x Y_n, question by question

The judge gets the images and the prompt of the paper's Appendix A, and answers with JSON. A
completion that cannot be read is no verdict: it is retried up to three times, then stored with its
error, counted, and left out of both sides. The same text on the same question is judged once,
whichever rollout it came from.

    python judge.py verdicts --judge clinic:judge --rollouts rollouts.jsonl \\
        --questions questions.jsonl --images . --out out/verdicts
    python judge.py pairs --verdicts out/verdicts/verdicts.jsonl --rollouts rollouts.jsonl \\
        --questions questions.jsonl --out out/pairs

reads questions.jsonl, rollouts.jsonl; writes verdicts.jsonl, then pairs.jsonl and report.json.
Agreement with humans (Figure 3) is python -m report sample, and agree.

Where we depart from the paper, or it is silent:
  1. The judge also returns Answer_Correctness, which the rule has decided. If it says No, rule and
     judge contradict each other: the row is left out and counted.
  2. How pairs are chosen is not said. All of Y_p x Y_n is our default: with 8 samples at 40 to 45 %
     accuracy it gives about the paper's 4,432 and 5,224 pairs from 2,000 questions; one negative a
     positive does not.
  3. An answer cut off by the token limit counts as wrong, so it is never a negative. Samples of one
     text are one.
  4. --criteria pairs under fewer than the four: a chain that meets those is positive.
"""

import argparse
import random
import statistics
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import answers
import data
from command import flags, schema, stage
from engines import bill, open_engine
from engines.inference import (
    SPEED,
    Engine,
    Request,
    add_flags,
    ask_yes_no,
    checkpoint,
    identity,
    image_paths,
    label_cost,
    prompt_request,
    read_verdict,
    setup_of,
)
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
3. **Image Analysis Involvement**: Does the reasoning process demonstrate appropriate analysis \
of any visual information mentioned or implied in the question?
4. **No Hallucination**: Does the reasoning process avoid introducing irrelevant or hallucinated \
information not supported by the question or known facts?
5. **Reflection Presence**: Does the reasoning show any self-checking, verification, or reflection \
on possible uncertainties?

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


# --------------------------------------------------------------------------------------------------
# Verdicts


def ground_truth(question: data.Question) -> str:
    """The answer as judge and raters see it: "B. MRI", or an open-ended question's reference."""
    return f"{question.answer}. {question.answer_text()}" if question.options else question.answer


def judge_request(question: data.Question, rollout: dict, image_root: Path) -> Request:
    """The Appendix A prompt about one rollout, with the question's images. Its id is a hash of all
    of that, so two rollouts of one text are one request."""
    text = data.question_text(question), ground_truth(question), rollout["response"]
    return prompt_request(question.id, JUDGE_PROMPT % text, image_paths(question, image_root))


def verdict_row(rollout: dict, judge: str, completion: dict) -> dict:
    """A row of verdicts.jsonl: the parsed criteria, or null and the error."""
    criteria, error = read_verdict(completion, KEYS)
    row = {
        "id": rollout["id"],
        "sample": rollout["sample"],
        "response_sha": rollout["response_sha"],
        "criteria": criteria,
        "error": error,
        "judge": judge,
        "raw": completion["raw"],
    }
    return {**row, "verdict_sha": data.content_hash(row)[:16]}


def judge_chains(
    engine: Engine,
    rollouts: list[dict],
    questions: dict[str, data.Question],
    args: argparse.Namespace,
) -> list[dict]:
    """A verdict on each rollout, in their order. What was judged before is not asked again."""
    requests = [judge_request(questions[row["id"]], row, Path(args.images)) for row in rollouts]
    completions = ask_yes_no(engine, requests, KEYS, "judge", args)
    both = zip(rollouts, requests)
    return [verdict_row(row, engine.spec, completions[request.id]) for row, request in both]


def cost(chains: Iterable[tuple[data.Question, int]], args: argparse.Namespace) -> bill.Cost:
    """What judging chains may cost at most, given each one's question and characters."""

    def size(question: data.Question, letters: int) -> tuple[int, int]:
        text = data.question_text(question) + ground_truth(question)
        return len(JUDGE_PROMPT) + len(text) + letters, len(question.images)

    return label_cost("judge", args.judge, (size(*chain) for chain in chains), args)


def right_by_rule(rollouts: list[dict], questions: dict[str, data.Question]) -> list[dict]:
    """The rollouts that were finished and whose answer is right."""
    ended = [row for row in rollouts if row["finish_reason"] == "stop"]
    return [row for row in ended if answers.is_correct(row["response"], questions[row["id"]])]


def read_rollouts(path: str, questions: dict[str, data.Question]) -> list[dict]:
    rows = schema.read_rows(path, "rollouts")
    if any(row["id"] not in questions for row in rows):
        lines = data.read_jsonl(path)
        where, id = next((where, row["id"]) for where, row in lines if row["id"] not in questions)
        known = "give the file the rollouts were made from"
        raise data.RowError(f"{where}: id: {id!r} is not in the questions; {known}")
    return rows


def verdicts(args: argparse.Namespace) -> None:
    started, out = time.time(), Path(args.out)
    questions = {question.id: question for question in schema.read_questions(args.questions)}
    inputs = [args.rollouts, args.questions, *filter(None, [checkpoint(args.judge)])]
    images = data.image_files(args.images, map(vars, questions.values()))
    if not stage.open_folder(args, inputs, SPEED, images):
        return
    rollouts = read_rollouts(args.rollouts, questions)
    right = right_by_rule(rollouts, questions)
    print(f"{len(rollouts)} candidates, {len(right)} right by rule: those go to {args.judge}")
    chains = [(questions[row["id"]], len(row["response"])) for row in right]
    bill.announce([cost(chains, args)], args.images_may_leave)
    answered_by = identity(args.judge)  # before it is asked: its folder may be trained anew
    engine = open_engine(args.judge, setup_of(args))
    rows = judge_chains(engine, right, questions, args)
    data.write_jsonl(out / "verdicts.jsonl", rows)
    unread = sum(row["criteria"] is None for row in rows)
    print(f"{len(rows)} verdicts, {unread} unreadable and left out")
    figures = {"judged": len(rows), "unreadable": unread}
    stage.finish(args, [out / "verdicts.jsonl"], started, figures, {args.judge: answered_by})


# --------------------------------------------------------------------------------------------------
# Pairs

PAIR_RULES = ("all", "per-positive", "one", "length-matched")
# ours: a warning says so below these; the paper has 4,432 and 5,224 pairs (3.3)
FEW_PAIRS, FEW_QUESTIONS = 100, 20
# the sampler's log-probabilities, if it told them (rollout.py); dpo.py compares its own
LOGPS = ("logp", "token_logps")


def choose_pairs(
    positives: list[dict], negatives: list[dict], rule: str, cap: int, rng: random.Random
) -> list[tuple[dict, dict]]:
    """(chosen, rejected) of one question. Each candidate has "response".

    all: every positive with every negative; per-positive: one negative for each positive; one: a
    single pair; length-matched: for each positive the unused negative of the nearest length.
    cap > 0 bounds the number of pairs.
    """
    texts = ({row["response"]: row for row in rows} for rows in (positives, negatives))
    good, bad = (rng.sample(list(rows.values()), len(rows)) for rows in texts)
    if not good or not bad:
        return []
    if rule == "all":
        pairs = [(g, b) for g in good for b in bad]
        rng.shuffle(pairs)
    elif rule == "per-positive":
        pairs = [(g, bad[i % len(bad)]) for i, g in enumerate(good)]
    elif rule == "one":
        pairs = [(good[0], bad[0])]
    else:  # length-matched
        pairs, left = [], list(bad)
        for g in good:
            if left:
                nearest = min(left, key=lambda b: abs(len(b["response"]) - len(g["response"])))
                left.remove(nearest)
                pairs.append((g, nearest))
    return pairs[:cap] if cap else pairs


def mean(values: list[float]) -> float | None:
    return round(statistics.fmean(values), 3) if values else None


Sides = dict[str, tuple[list[dict], list[dict]]]  # question id -> its positives and negatives


def sort_out(
    right: list[dict], verdict_rows: list[dict], criteria: Sequence[str]
) -> tuple[Sides, Counter]:
    """(Y_p and Y_n of each question, how many chains have no verdict, are called wrong by the
    judge, or fail a criterion). A chain that meets all of `criteria` is positive, any other
    negative."""
    by_key = {(row["id"], row["sample"], row["response_sha"]): row for row in verdict_rows}
    sides: Sides = {}
    counts: Counter = Counter()
    for rollout in right:
        judged = by_key.get((rollout["id"], rollout["sample"], rollout["response_sha"]))
        if judged is None or judged["criteria"] is None:
            counts["no_verdict"] += 1
            continue
        met = judged["criteria"]
        if not met["Answer_Correctness"]:
            counts["rule_and_judge_disagree"] += 1
            continue
        failed = [name for name in criteria if not met[name]]
        counts.update(failed)
        candidate = {**rollout, "failed": failed, "verdict": judged["verdict_sha"]}
        sides.setdefault(rollout["id"], ([], []))[bool(failed)].append(candidate)
    return sides, counts


def pair_row(question: data.Question, good: dict, bad: dict) -> dict:
    """A row of pairs.jsonl, which TRL and LLaMA-Factory read too."""
    row = {
        "id": question.id,
        "prompt": data.prompt_messages(question),
        "images": question.images,
        "failed": bad["failed"],
    }
    for side, chain in (("chosen", good), ("rejected", bad)):
        row[side] = chain["response"]
        row |= {f"{side}_{key}": chain[key] for key in ("sample", "token_ids", "verdict")}
        row |= {f"{side}_{key}": chain[key] for key in LOGPS if key in chain}
    return row


def make_pairs(
    rollouts: list[dict],
    verdict_rows: list[dict],
    questions: dict[str, data.Question],
    rule: str,
    cap: int,
    seed: int,
    criteria: Sequence[str] = CRITERIA,
) -> tuple[list[dict], dict]:
    """(pairs.jsonl rows, report). The report follows every candidate to where it ended."""
    right = right_by_rule(rollouts, questions)
    sides, counts = sort_out(right, verdict_rows, criteria)
    rows, paired = [], set()
    for key, (positives, negatives) in sides.items():
        rng = random.Random(data.sample_seed(seed, key, 0))
        for good, bad in choose_pairs(positives, negatives, rule, cap, rng):
            if good["response"] != bad["response"]:  # one text, judged both ways: no preference
                rows.append(pair_row(questions[key], good, bad))
            paired.add(key)
    report = {
        "criteria": list(criteria),
        "candidates": len(rollouts),
        "unfinished": sum(row["finish_reason"] != "stop" for row in rollouts),
        "correct": len(right),
        "no_verdict": counts["no_verdict"],
        "rule_and_judge_disagree": counts["rule_and_judge_disagree"],
        "positive": sum(len(good) for good, _ in sides.values()),
        "negative": sum(len(bad) for _, bad in sides.values()),
        "negatives_failing": {name: counts[name] for name in criteria},
        "questions": len({row["id"] for row in rollouts}),
        "questions_with_pairs": len(paired),
        "pairs": len(rows),
        "pairs_failing": {name: sum(name in row["failed"] for row in rows) for name in criteria},
        "words": {
            side: mean([len(row[side].split()) for row in rows]) for side in ("chosen", "rejected")
        },
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
    sides = f"{report['positive']} / {report['negative']}"
    asked = f"{report['questions_with_pairs']} of {report['questions']}"
    counts = [report["candidates"], report["correct"], judged, sides, asked, report["pairs"]]
    print(" -> ".join(map(str, counts)))
    failing = report["negatives_failing"].items()
    print("why negatives fail:   " + ", ".join(f"{name} {count}" for name, count in failing))
    words = report["words"]
    print(f"length in words:      chosen {words['chosen']}, rejected {words['rejected']}")


def few(report: dict) -> str | None:
    """A warning if the pairs are few, or of few questions."""
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
    questions = {question.id: question for question in schema.read_questions(args.questions)}
    rollouts = read_rollouts(args.rollouts, questions)
    judged = schema.read_rows(args.verdicts, "verdicts")
    criteria = [name for name in CRITERIA if name in args.criteria]
    rows, report = make_pairs(rollouts, judged, questions, args.rule, args.cap, args.seed, criteria)
    data.write_jsonl(out / "pairs.jsonl", rows)
    data.write_json(out / "report.json", report)
    print_report(report)
    for said in filter(None, (cut_off(rollouts), few(report))):
        print(said)
    figures = {name: value for name, value in report.items() if isinstance(value, int)}
    stage.finish(args, [out / "pairs.jsonl", out / "report.json"], started, figures)


def parse(argv: list[str] | None) -> argparse.Namespace:
    said = "Judge rollouts against the four criteria, build preference pairs."
    parser = argparse.ArgumentParser(description=said)
    commands = parser.add_subparsers(dest="command", required=True)
    said = "ask the judge about every rollout that is right by rule"
    judged = commands.add_parser("verdicts", help=said)
    paired = commands.add_parser("pairs", help="pair all-criteria chains with any-failed ones")
    for command in (judged, paired):
        command.add_argument("--rollouts", required=True)
        command.add_argument("--questions", required=True)
        command.add_argument("--out", required=True, help="folder to write")
        command.add_argument("--seed", type=flags.SEED, default=0)
    judged.add_argument("--judge", required=True, help="engine spec of the judge")
    judged.add_argument("--images", default=".", help="image root")
    add_flags(judged)
    judged.set_defaults(run=verdicts)
    add = paired.add_argument
    add("--verdicts", required=True, help="verdicts.jsonl")
    every = list(CRITERIA)  # paper 3.3
    add("--criteria", nargs="+", choices=every, default=every, help="what a positive must meet")
    add("--rule", choices=PAIR_RULES, default="all")  # ours: paper silent
    said = "most pairs of one question; 0 keeps all"
    add("--cap", type=flags.whole(0), default=0, help=said)  # ours: paper silent
    paired.set_defaults(run=pairs)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    args.run(args)


if __name__ == "__main__":
    flags.run_script(main)
