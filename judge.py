"""Multimodal Medical Reasoning Preference (paper 3.3): which right answers are reasoned well.

    Y   = { y : finished, and right by rule }          the others never reach the judge
    Y_p = { y in Y : all four criteria are met }       Logical Consistency, Image Analysis
    Y_n = { y in Y : any of the four is not met }      Involvement, No Hallucination, Reflection
    pairs = some of Y_p x Y_n, question by question

The judge gets the images and the prompt of the paper's Appendix A, and answers with JSON. A judge
that is no local checkpoint is asked up to three times, until its answer can be read. A chain
without a readable verdict keeps the error and is on neither side. Equal texts on one question are
judged once.

    python judge.py verdicts --judge clinic:judge --rollouts rollouts.jsonl \\
        --questions questions.jsonl --images . --out out/verdicts
    python judge.py pairs --verdicts out/verdicts/verdicts.jsonl --rollouts rollouts.jsonl \\
        --questions questions.jsonl --out out/pairs

reads questions.jsonl, rollouts.jsonl; writes verdicts.jsonl, then pairs.jsonl and report.json

Where we depart from the paper, or it is silent:
  1. The judge also returns Answer_Correctness, which the rule has decided. A row where it says No
     is left out and counted.
  2. How pairs are chosen is not said. All of Y_p x Y_n is our default: with 8 samples at 40 to 45 %
     accuracy, half of the right chains positive and questions equally hard, it gives about the
     paper's 4,432 and 5,224 pairs from 2,000 image questions; one negative a positive does not.
  3. An answer cut off by the token limit is not in Y, so it is on neither side.
  4. --criteria may name fewer than four: a chain that meets these is positive.
"""

import argparse
import random
import statistics
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import product
from pathlib import Path

import answers
import data
from command import flags, schema, stage
from engines import bill, inference, open_engine
from engines.inference import Engine, Request
from rollout import read_rollouts, warn_cut_off

Questions = dict[str, data.Question]  # by id
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


def judge_request(question: data.Question, rollout: dict, image_root: Path) -> Request:
    """The Appendix A prompt about one rollout, with the question's images. Its id is a hash of all
    of that, so two rollouts of one text are one request."""
    text = data.question_text(question), question.written_answer(), rollout["response"]
    images = inference.image_paths(question, image_root)
    return inference.prompt_request(question.id, JUDGE_PROMPT % text, images)


def verdict_row(rollout: dict, judge: str, completion: dict) -> dict:
    """A row of verdicts.jsonl: the parsed criteria, or null and the error."""
    criteria, error = inference.read_verdict(completion, KEYS)
    row = {key: rollout[key] for key in ("id", "sample", "response_sha")}
    row |= {"criteria": criteria, "error": error, "judge": judge, "raw": completion["raw"]}
    return {**row, "verdict_sha": data.content_hash(row)[:16]}


def judge_chains(
    engine: Engine, rollouts: list[dict], questions: Questions, args: argparse.Namespace
) -> list[dict]:
    """A verdict on each rollout, in their order. What was judged before is not asked again."""
    requests = [judge_request(questions[row["id"]], row, Path(args.images)) for row in rollouts]
    completions = inference.ask_yes_no(engine, requests, KEYS, "judge", args)
    found = [completions[request.id] for request in requests]
    return [verdict_row(row, engine.spec, said) for row, said in zip(rollouts, found)]


def cost(chains: Iterable[tuple[data.Question, int]], args: argparse.Namespace) -> bill.Cost:
    """What judging chains may cost at most, given each one's question and characters."""
    sizes = []
    for question, characters in chains:
        text = JUDGE_PROMPT + data.question_text(question) + question.written_answer()
        sizes.append((len(text) + characters, len(question.images)))
    return inference.label_cost("judge", args.judge, sizes, args)


def right_by_rule(rollouts: list[dict], questions: Questions) -> list[dict]:
    return [row for row in rollouts if answers.is_right(row, questions[row["id"]])]


def verdicts(args: argparse.Namespace) -> None:
    started, out = time.time(), Path(args.out)
    questions = {question.id: question for question in schema.read_questions(args.questions)}
    inputs = [args.rollouts, args.questions, *filter(None, [inference.checkpoint(args.judge)])]
    images = data.image_files(args.images, map(vars, questions.values()))
    if not stage.open_folder(args, inputs, inference.FREE, images):
        return
    rollouts = read_rollouts(args.rollouts, questions)
    right = right_by_rule(rollouts, questions)
    print(f"{len(rollouts)} candidates, {len(right)} right by rule: those go to {args.judge}")
    chains = [(questions[row["id"]], len(row["response"])) for row in right]
    bill.announce([cost(chains, args)], args.images_may_leave)
    # before the judge is asked: its folder may be trained anew
    answered_by = inference.identity(args.judge)
    engine = open_engine(args.judge, inference.setup_of(args))
    rows = judge_chains(engine, right, questions, args)
    data.write_jsonl(out / "verdicts.jsonl", rows)
    unread = sum(row["criteria"] is None for row in rows)
    print(f"{len(rows)} chains judged, {unread} without a readable verdict: these make no pairs")
    figures = {"judged": len(rows), "unreadable": unread}
    stage.finish(args, [out / "verdicts.jsonl"], started, figures, {args.judge: answered_by})


PAIR_RULES = ("all", "length-matched")
# ours: a warning says so below these; the paper has 4,432 and 5,224 pairs (3.3)
FEW_PAIRS, FEW_QUESTIONS = 100, 20
# what becomes of a right chain
OUTCOMES = ("no_verdict", "rule_and_judge_disagree", "positive", "negative")


def choose_pairs(
    positives: list[dict], negatives: list[dict], rule: str, cap: int, rng: random.Random
) -> list[tuple[dict, dict]]:
    """(chosen, rejected) of one question, in random order, at most `cap` unless it is 0. all: every
    positive with every negative; length-matched: positives in random order, each with the unused
    negative of the nearest length in characters, until one side is used up. Equal texts count
    once."""
    texts = ({row["response"]: row for row in rows} for rows in (positives, negatives))
    good, bad = (list(rows.values()) for rows in texts)
    if rule == "all":
        pairs = list(product(good, bad))
        rng.shuffle(pairs)
    else:
        rng.shuffle(good)
        pairs = []
        for one in good[: len(bad)]:
            length = len(one["response"])
            nearest = min(bad, key=lambda other: abs(len(other["response"]) - length))
            bad.remove(nearest)
            pairs.append((one, nearest))
    return pairs[:cap] if cap else pairs


def sort_out(
    right: list[dict], verdict_rows: list[dict], criteria: Sequence[str]
) -> tuple[dict[str, tuple[list, list]], Counter]:
    """({question id: its Y_p and Y_n}, chains of each of OUTCOMES and those that fail each
    criterion). A chain that meets all of `criteria` is positive, any other negative."""
    by_key = {(row["id"], row["sample"], row["response_sha"]): row for row in verdict_rows}
    sides: dict[str, tuple[list, list]] = {}
    counts: Counter = Counter()
    for rollout in right:
        judged = by_key.get((rollout["id"], rollout["sample"], rollout["response_sha"]))
        if judged is None or judged["criteria"] is None:
            counts["no_verdict"] += 1
        elif not judged["criteria"]["Answer_Correctness"]:
            counts["rule_and_judge_disagree"] += 1
        else:
            failed = [name for name in criteria if not judged["criteria"][name]]
            counts.update(failed)
            candidate = {**rollout, "failed": failed, "verdict": judged["verdict_sha"]}
            positives, negatives = sides.setdefault(rollout["id"], ([], []))
            (negatives if failed else positives).append(candidate)
            counts["negative" if failed else "positive"] += 1
    return sides, counts


def pair_row(question: data.Question, good: dict, bad: dict) -> dict:
    """A row of pairs.jsonl. It has the sampler's log-probabilities where rollouts.jsonl has them:
    reference.gate_drift compares them with the trainer's."""
    row = {"id": question.id, "prompt": data.prompt_messages(question), "images": question.images}
    row["failed"] = bad["failed"]
    kept = ("sample", "token_ids", "verdict", "logp", "token_logps")
    for side, chain in (("chosen", good), ("rejected", bad)):
        row[side] = chain["response"]
        row |= {f"{side}_{key}": chain[key] for key in kept if key in chain}
    return row


def make_pairs(
    rollouts: list[dict],
    verdict_rows: list[dict],
    questions: Questions,
    rule: str,
    cap: int,
    seed: int,
    criteria: Sequence[str] = CRITERIA,
) -> tuple[list[dict], dict]:
    """(pairs.jsonl rows, report). The report follows every candidate to where it ended."""
    right = right_by_rule(rollouts, questions)
    sides, counts = sort_out(right, verdict_rows, criteria)
    rows = []
    for key, (positives, negatives) in sides.items():
        rng = random.Random(data.sample_seed(seed, key, 0))
        for good, bad in choose_pairs(positives, negatives, rule, cap, rng):
            if good["response"] != bad["response"]:  # else a verdict was edited by hand
                rows.append(pair_row(questions[key], good, bad))
    words = {side: [len(row[side].split()) for row in rows] for side in ("chosen", "rejected")}
    report = {
        "criteria": list(criteria),
        "candidates": len(rollouts),
        "unfinished": sum(row["finish_reason"] != "stop" for row in rollouts),
        "correct": len(right),
        **{name: counts[name] for name in OUTCOMES},
        "negatives_failing": {name: counts[name] for name in criteria},
        "questions": len({row["id"] for row in rollouts}),
        "questions_with_pairs": len({row["id"] for row in rows}),
        "pairs": len(rows),
        "pairs_failing": {name: sum(name in row["failed"] for row in rows) for name in criteria},
        "words": {side: round(statistics.fmean(n), 3) if n else None for side, n in words.items()},
    }
    return rows, report


def print_report(report: dict) -> None:
    if len(report["criteria"]) < len(CRITERIA):
        print("positive is a chain that meets " + ", ".join(report["criteria"]))
    print("candidates -> correct -> positive / negative -> questions with pairs -> pairs")
    line = "{candidates} -> {correct} -> {positive} / {negative} -> "
    print(f"{line}{{questions_with_pairs}} of {{questions}} -> {{pairs}}".format(**report))
    line = "on neither side:      {no_verdict} without a verdict, "
    print(f"{line}{{rule_and_judge_disagree}} that the judge calls wrong".format(**report))
    failing = [f"{name} {count}" for name, count in report["negatives_failing"].items()]
    print("why negatives fail:   " + ", ".join(failing))
    print("length in words:      chosen {chosen}, rejected {rejected}".format(**report["words"]))


def warn_few(report: dict) -> str | None:
    """A warning if the pairs are few, or of few questions."""
    count, asked = report["pairs"], report["questions_with_pairs"]
    if count >= FEW_PAIRS and asked >= FEW_QUESTIONS:
        return None
    more = "ask more questions, or take more answers of each (rollout.py -n)"
    return f"warning: {count} pairs of {asked} questions: DPO learns noise from so few; {more}"


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
    for warning in filter(None, [warn_cut_off(rollouts), warn_few(report)]):
        print(warning)
    figures = {name: value for name, value in report.items() if isinstance(value, int)}
    stage.finish(args, [out / "pairs.jsonl", out / "report.json"], started, figures)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Judge rollouts, and build preference pairs.")
    commands = parser.add_subparsers(dest="command", required=True)
    judged = commands.add_parser("verdicts", help="ask the judge about what is right by rule")
    paired = commands.add_parser("pairs", help="pair all-criteria chains with any-failed ones")
    for command, run in ((judged, verdicts), (paired, pairs)):
        command.set_defaults(run=run)
        for name in ("--rollouts", "--questions", "--out"):
            command.add_argument(name, required=True)
        command.add_argument("--seed", type=flags.SEED, default=0)
    judged.add_argument("--judge", required=True, help="engine spec of the judge")
    judged.add_argument("--images", default=".", help="image root")
    inference.add_flags(judged)
    add, four = paired.add_argument, list(CRITERIA)  # paper 3.3
    add("--verdicts", required=True, help="verdicts.jsonl")
    add("--criteria", nargs="+", choices=four, default=four, help="what a positive must meet")
    add("--rule", choices=PAIR_RULES, default="all")  # ours: paper silent
    add("--cap", type=flags.whole(0), default=0, help="most pairs of a question; 0: all")  # ours
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    args.run(args)


if __name__ == "__main__":
    flags.run_script(main)
