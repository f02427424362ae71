"""Multimodal Medical Reasoning Preference (paper §3.3): who reasons well among those who answered right.

    Y   = { y : the answer of y is right, by rule }          wrong ones are filtered out before any judge is asked
    Y_p = { y in Y : all four criteria are met }             Logical Consistency, Image Analysis Involvement,
    Y_n = { y in Y : any of the four is not met }            No Hallucination, Reflection Presence
    pairs = some of Y_p x Y_n, question by question

The judge gets the images and the prompt of the paper's Appendix A, and replies with JSON. A reply that cannot be read is
no verdict: asked again up to three times, then stored with its error, counted, and left out of both sides.

    python judge.py verdicts --judge clinic:judge --rollouts rollouts.jsonl --questions questions.jsonl --images . --out out/verdicts
    python judge.py pairs --verdicts out/verdicts/verdicts.jsonl --rollouts ... --questions ... --out out/pairs

reads questions.jsonl, rollouts.jsonl; writes verdicts.jsonl, then pairs.jsonl with a report (report.json, printed)

Where we depart from the paper, or it is silent:
  1. The judge also returns Answer_Correctness, which the rule has settled. Where it says No, rule and judge contradict
     each other: the row is left out and counted.
  2. How pairs are chosen is not said. All of Y_p x Y_n is our default: with 8 samples at 40 to 45 % accuracy it gives
     about the paper's 4,432 and 5,224 pairs from 2,000 questions, which one negative a positive does not.
  3. An answer cut off by the token limit counts as wrong, so it is never a negative. Samples of one text are one.
"""

import argparse
import json
import random
import re
import statistics
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import data
from engines import Ask, Engine, Sampling, add_flags, ask_all, open_engine, setup_of

CRITERIA = ("Logical_Consistency", "Image_Analysis_Involvement", "No_Hallucination", "Reflection_Presence")  # MMRP, paper 3.3
KEYS = ("Answer_Correctness", *CRITERIA)
ATTEMPTS = 3  # ours: paper silent

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


def parse_verdict(reply: str) -> dict[str, bool]:
    """{key: bool} for the five keys of Appendix A. Raises ValueError with the reason if the reply is anything else.

    The last balanced {...} that is JSON counts, so prose and code fences around it do no harm; keys and values may be in
    any case. "Yes/No" is the prompt echoed, a missing key or another word is no judgement: both are errors.
    """
    found, end = None, 0
    decoder = json.JSONDecoder()
    for brace in re.finditer(r"\{", reply):
        if brace.start() < end:  # inside an object that has been read
            continue
        try:
            value, end = decoder.raw_decode(reply, brace.start())
        except json.JSONDecodeError:
            continue
        if isinstance(value, dict):
            found = value
    if found is None:
        raise ValueError("no JSON object in the reply")
    lowered = {str(key).strip().casefold(): value for key, value in found.items()}
    verdict = {}
    for key in KEYS:
        if key.casefold() not in lowered:
            raise ValueError(f"key {key} is missing")
        value = lowered[key.casefold()]
        word = str(value).strip().casefold().rstrip(".")
        if word not in ("yes", "no", "true", "false"):
            raise ValueError(f"{key} is {value!r}, neither Yes nor No")
        verdict[key] = word in ("yes", "true")
    return verdict


def judge_ask(question: data.Question, rollout: dict, image_root: Path) -> Ask:
    """The Appendix A prompt about one rollout, with the question's images."""
    truth = f"{question.answer}. {question.answer_text()}" if question.options else question.answer
    prompt = JUDGE_PROMPT % (data.question_text(question), truth, rollout["response"])
    key = f"{rollout['id']}/{rollout['sample']}/{rollout['response_sha']}"
    return Ask(key, [{"role": "user", "content": prompt}], [image_root / image for image in question.images], (0,))


def verdict_row(rollout: dict, judge: str, raw: str, finish_reason: str) -> dict:
    """A row of verdicts.jsonl: the parsed criteria, or null and the error. Only a finished reply is a verdict: one that was
    cut off may have been about to correct itself."""
    try:
        if finish_reason != "stop":
            raise ValueError(f"the reply is not finished: {finish_reason}")
        criteria, error = parse_verdict(raw), None
    except ValueError as reason:
        criteria, error = None, str(reason)
    row = {"id": rollout["id"], "sample": rollout["sample"], "response_sha": rollout["response_sha"], "criteria": criteria, "error": error, "judge": judge, "raw": raw}
    return {**row, "verdict_sha": data.content_hash(row)[:16]}


def judge_all(engine: Engine, rollouts: list[dict], questions: dict[str, data.Question], image_root: Path, folder: Path, seed: int) -> list[dict]:
    """A verdict on each rollout. Replies are kept as they come (replies.jsonl), so a kill or a retry asks nothing twice."""
    judged: dict[str, dict] = {}
    asked = {ask.id: (ask, row) for row in rollouts for ask in [judge_ask(questions[row["id"]], row, image_root)]}
    pending = list(asked)
    for attempt in range(ATTEMPTS):
        asks = [replace(asked[key][0], samples=(attempt,)) for key in pending]
        title = "verdicts" if attempt == 0 else f"verdicts, attempt {attempt + 1}"
        sampling = Sampling(0.0, 1.0, 4096, seed)  # ours: paper silent; room for a judge that thinks before its JSON
        replies = ask_all(engine, asks, sampling, folder / "replies.jsonl", lambda r: {"id": r.id, "sample": r.sample, "raw": r.text, "finish_reason": r.finish_reason}, title) if asks else []
        for reply in replies:
            judged[reply["id"]] = verdict_row(asked[reply["id"]][1], engine.spec, reply["raw"], reply["finish_reason"])
        pending = [key for key in pending if judged[key]["criteria"] is None]
        if not pending:
            break
    return list(judged.values())


def right_by_rule(rollouts: list[dict], questions: dict[str, data.Question]) -> list[dict]:
    """The rollouts that were finished and whose answer is right."""
    return [row for row in rollouts if row["finish_reason"] == "stop" and data.is_correct(row["response"], questions[row["id"]])]


def read_rollouts(path: str, questions: dict[str, data.Question]) -> list[dict]:
    rows = []
    for where, row in data.read_jsonl(path):
        data.need(row, where, id=str, sample=int, response=str, finish_reason=str, response_sha=str)
        if "token_ids" not in row:
            raise data.RowError(f"{where}: missing 'token_ids'; null where the engine does not tell them")
        if row["id"] not in questions:
            raise data.RowError(f"{where}: id: {row['id']!r} is not in the questions; give the file the rollouts were made from")
        rows.append(row)
    return rows


def verdicts(args: argparse.Namespace) -> None:
    started, out = time.time(), Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    questions = {question.id: question for question in data.read_questions(args.questions)}
    rollouts = read_rollouts(args.rollouts, questions)
    right = right_by_rule(rollouts, questions)
    print(f"{len(rollouts)} candidates, {len(right)} right by rule: those go to {args.judge}")
    engine = open_engine(args.judge, setup_of(args))
    data.settle(out / "replies.jsonl", {"judge": args.judge, "seed": args.seed})
    rows = judge_all(engine, right, questions, Path(args.images), out, args.seed)
    data.write_jsonl(out / "verdicts.jsonl", rows)
    unread = sum(row["criteria"] is None for row in rows)
    print(f"{len(rows)} verdicts, {unread} unreadable and left out")
    data.write_stage(out, args, [args.rollouts, args.questions], [out / "verdicts.jsonl"], started, judged=len(rows), unreadable=unread)


# ---------------------------------------------------------------------------------------------------------------
# Pairs

RULES = ("all", "per-positive", "one", "length-matched")


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


IMAGE_WORDS = re.compile(r"\b(image|figure|film|picture|scan|x-ray|radiograph|ct|mri|smear|oct|photograph|slide)s?\b", re.I)


def first_look(response: str) -> float | None:
    """Where in the response the image is first mentioned, 0 (at once) to 1 (at the end); None if never (paper §4.2)."""
    match = IMAGE_WORDS.search(response)
    return match.start() / max(1, len(response)) if match else None


def mean(values: list[float]) -> float | None:
    return round(statistics.fmean(values), 3) if values else None


def make_pairs(rollouts: list[dict], verdict_rows: list[dict], questions: dict[str, data.Question], rule: str, cap: int, seed: int) -> tuple[list[dict], dict]:
    """(pairs.jsonl rows, report). The report follows every candidate to where it ended."""
    right = right_by_rule(rollouts, questions)
    by_key = {(row["id"], row["sample"], row["response_sha"]): row for row in verdict_rows}
    report = {"candidates": len(rollouts), "cut_off": sum(r["finish_reason"] != "stop" for r in rollouts), "correct": len(right), "no_verdict": 0, "rule_and_judge_disagree": 0}
    sides: dict[str, tuple[list, list]] = {}
    failed_by: Counter = Counter()
    for rollout in right:
        judged = by_key.get((rollout["id"], rollout["sample"], rollout["response_sha"]))
        if judged is None or judged["criteria"] is None:
            report["no_verdict"] += 1
            continue
        criteria = judged["criteria"]
        if not criteria["Answer_Correctness"]:
            report["rule_and_judge_disagree"] += 1
            continue
        failed = [name for name in CRITERIA if not criteria[name]]
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
            })  # fmt: skip
    report |= {
        "positive": sum(len(good) for good, _ in sides.values()),
        "negative": sum(len(bad) for _, bad in sides.values()),
        "negatives_failing": {name: failed_by[name] for name in CRITERIA},
        "questions": len({row["id"] for row in rollouts}),
        "questions_with_pairs": with_pairs,
        "pairs": len(rows),
        "pairs_failing": {name: sum(name in row["failed"] for row in rows) for name in CRITERIA},
        "words": {side: mean([len(row[side].split()) for row in rows]) for side in ("chosen", "rejected")},
        "first_look": {side: mean([look for row in rows if (look := first_look(row[side])) is not None]) for side in ("chosen", "rejected")},
        "never_looks": {side: sum(first_look(row[side]) is None for row in rows) for side in ("chosen", "rejected")},
    }
    return rows, report


def print_report(report: dict) -> None:
    print("candidates -> correct -> judged -> positive / negative -> questions with pairs -> pairs")
    judged = report["correct"] - report["no_verdict"] - report["rule_and_judge_disagree"]
    print(f"{report['candidates']} -> {report['correct']} -> {judged} -> {report['positive']} / {report['negative']} -> {report['questions_with_pairs']} of {report['questions']} -> {report['pairs']}")
    print("why negatives fail:   " + ", ".join(f"{name} {count}" for name, count in report["negatives_failing"].items()))
    for figure, text in (("words", "length in words"), ("first_look", "first look at the image, 0 to 1"), ("never_looks", "never mentions the image")):
        print(f"{text:<34} chosen {report[figure]['chosen']}, rejected {report[figure]['rejected']}")


def pairs(args: argparse.Namespace) -> None:
    started, out = time.time(), Path(args.out)
    questions = {question.id: question for question in data.read_questions(args.questions)}
    rollouts = read_rollouts(args.rollouts, questions)
    judged = [row for _, row in data.read_jsonl(args.verdicts)]
    rows, report = make_pairs(rollouts, judged, questions, args.rule, args.cap, args.seed)
    data.write_jsonl(out / "pairs.jsonl", rows)
    data.write_json(out / "report.json", report)
    print_report(report)
    data.write_stage(out, args, [args.rollouts, args.questions, args.verdicts], [out / "pairs.jsonl"], started, **{k: v for k, v in report.items() if isinstance(v, int)})


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Judge rollouts against the four criteria and build preference pairs.")
    commands = parser.add_subparsers(dest="command", required=True)
    ask = commands.add_parser("verdicts", help="ask the judge about every rollout that is right by rule")
    cut = commands.add_parser("pairs", help="pair all-criteria chains with any-failed ones")
    for command in (ask, cut):
        command.add_argument("--rollouts", required=True)
        command.add_argument("--questions", required=True)
        command.add_argument("--out", required=True, help="folder to write")
        command.add_argument("--seed", type=int, default=0)
    ask.add_argument("--judge", required=True, help="engine spec of the judge")
    ask.add_argument("--images", default=".", help="image root")
    add_flags(ask)
    ask.set_defaults(run=verdicts)
    cut.add_argument("--verdicts", required=True)
    cut.add_argument("--rule", choices=RULES, default="all")  # ours: paper silent
    cut.add_argument("--cap", type=int, default=0, help="most pairs of one question; 0 keeps all")  # ours: paper silent
    cut.set_defaults(run=pairs)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    args.run(args)


if __name__ == "__main__":
    main(sys.argv[1:])
