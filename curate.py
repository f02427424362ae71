"""A question bank becomes training questions: no leak, not too easy, not unsolvable (paper §3.1: 54K -> 5K).

    keep q  iff  q is no benchmark question                                     (data leakage)
            and  no baseline model solves it directly                           (hard enough)
            and  each of two experts solves it in at least one of 4 attempts    (solvable)

Text and image questions pass the same filters, then part: text questions become Stage I's demonstrations, image
questions Stage II's preference pairs. Every rejected question is kept with the filter that rejected it and why.

    python curate.py all --questions bank.jsonl --images . --against test.jsonl --baselines hf:base \\
        --experts clinic:expert-a clinic:expert-b --out out/curate

reads questions.jsonl files; writes OUT/text.jsonl, OUT/image.jsonl, OUT/rejected.jsonl, OUT/funnel.json, OUT/stage.json

Where we depart from the paper, or it is silent:
  1. "Eliminate samples that could be solved directly" by two baselines: dropped if *any* of them is right in one greedy
     attempt. (Its 8 to 12 % that remain are hard to reach if both must solve a question to drop it.)
  2. What is a leak is said in leaks.py.
  3. The paper also drops pattern-recognition questions by Gemini's label, and removes image descriptions from questions
     by GPT-4o and hand. Both need an outside model, and are not here yet.
"""

import argparse
import sys
import time
from pathlib import Path

import data
import leaks
from asking import Sampling, add_flags, ask_all, question_asks, reply_row, setup_of
from engines import checkpoint, open_engine

ATTEMPTS = 4  # paper 3.1

Rejection = dict  # {"filter", "reason"}, and "evidence" of a leak


def solved_by(role: str, spec: str, questions: list[data.Question], args: argparse.Namespace, attempts: int, temperature: float) -> dict[str, bool]:
    """Whether an engine got each question right in at least one attempt. Replies are kept in OUT, nothing is asked twice.

    Attempts go round by round, and a question that is solved is not asked again: the result is the same, for fewer requests.
    """
    path = Path(args.out) / (f"{role}-" + "".join(c if c.isalnum() else "-" for c in spec).strip("-") + ".jsonl")
    sampling = Sampling(temperature, 1.0, args.max_tokens, args.seed)
    data.settle(path, {"engine": spec, **vars(sampling), "pixels": args.pixels, "tiles": args.tiles})
    engine = open_engine(spec, setup_of(args))
    solved = {question.id: False for question in questions}
    by_id = {question.id: question for question in questions}
    for attempt in range(attempts):
        asks = question_asks([q for q in questions if not solved[q.id]], Path(args.images), 1)
        asks = [type(ask)(ask.id, ask.messages, ask.images, (attempt,)) for ask in asks]
        for row in ask_all(engine, asks, sampling, path, lambda reply: reply_row(reply, spec), f"{spec}, attempt {attempt + 1}"):
            solved[row["id"]] |= row["finish_reason"] == "stop" and data.is_correct(row["response"], by_id[row["id"]])
    return solved


def difficulty_filter(questions: list[data.Question], args: argparse.Namespace) -> dict[str, Rejection]:
    """Questions that any baseline answers right, at once and greedily."""
    rejected: dict[str, Rejection] = {}
    for spec in args.baselines:
        solved = solved_by("baseline", spec, [q for q in questions if q.id not in rejected], args, 1, 0.0)
        rejected |= {key: {"filter": "difficulty", "reason": f"solved directly by {spec}"} for key, right in solved.items() if right}
    return rejected


def solvable_filter(questions: list[data.Question], args: argparse.Namespace) -> dict[str, Rejection]:
    """Questions that some expert never gets right: AND over experts of OR over attempts."""
    rejected: dict[str, Rejection] = {}
    for spec in args.experts:
        solved = solved_by("expert", spec, [q for q in questions if q.id not in rejected], args, args.attempts, 1.0)
        rejected |= {key: {"filter": "solvable", "reason": f"{spec} failed all {args.attempts} attempts"} for key, right in solved.items() if not right}
    return rejected


def run(args: argparse.Namespace) -> None:
    started, out, image_root = time.time(), Path(args.out), Path(args.images)
    out.mkdir(parents=True, exist_ok=True)
    bank = list({question.id: question for path in args.questions for question in data.read_questions(path)}.values())
    benchmarks = [question for path in args.against for question in data.read_questions(path)]
    question_asks(bank + benchmarks, image_root, 1)  # every image must be there before an engine is asked
    filters = (
        ("leak", lambda left: leaks.find(left, benchmarks, image_root, args.ngram, args.jaccard, args.distance)),
        ("difficulty", lambda left: difficulty_filter(left, args)),
        ("solvable", lambda left: solvable_filter(left, args)),
    )
    def count(left: list[data.Question]) -> dict:
        by_modality: dict[str, int] = {}
        for question in left:
            modality = question.meta.get("modality", "unknown") if question.images else "text"
            by_modality[modality] = by_modality.get(modality, 0) + 1
        return {"text": sum(not q.images for q in left), "image": sum(bool(q.images) for q in left), "modality": dict(sorted(by_modality.items()))}

    left, rejected = bank, {}
    funnel = [{"filter": "bank", **count(bank)}]
    for name, apply in filters:
        rejected |= apply(left)
        left = [question for question in left if question.id not in rejected]
        funnel.append({"filter": name, **count(left)})
    data.write_jsonl(out / "rejected.jsonl", ({**q.to_row(), **rejected[q.id]} for q in bank if q.id in rejected))
    data.write_jsonl(out / "text.jsonl", (q.to_row() for q in left if not q.images))
    data.write_jsonl(out / "image.jsonl", (q.to_row() for q in left if q.images))
    data.write_json(out / "funnel.json", funnel)
    print_funnel(funnel)
    specs = [*args.baselines, *args.experts]
    inputs = [*args.questions, *args.against, *filter(None, map(checkpoint, specs))]
    data.write_stage(out, args, inputs, [out / name for name in ("text.jsonl", "image.jsonl", "rejected.jsonl", "funnel.json")], started)


def print_funnel(funnel: list[dict]) -> None:
    print("questions left after    text   image")
    for row in funnel:
        print(f"  {row['filter']:<18} {row['text']:>7} {row['image']:>7}   " + ", ".join(f"{name} {count}" for name, count in row["modality"].items() if name != "text"))


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Filter a question bank into training questions.")
    commands = parser.add_subparsers(dest="command", required=True)
    every = commands.add_parser("all", help="leak, difficulty, solvable, in this order: the cheapest first")
    every.add_argument("--questions", nargs="+", required=True, help="the bank")
    every.add_argument("--images", default=".", help="image root")
    every.add_argument("--against", nargs="+", default=[], help="benchmark questions that must not leak")
    every.add_argument("--baselines", nargs="+", default=[], help="engines that must not solve a question directly")
    every.add_argument("--experts", nargs="+", default=[], help="engines that must each solve it at least once")
    every.add_argument("--attempts", type=int, default=ATTEMPTS, help="of each expert")
    every.add_argument("--ngram", type=int, default=leaks.NGRAM, help="words in a row that may not be shared with a benchmark; 0: any may")
    every.add_argument("--jaccard", type=float, default=leaks.JACCARD, help="similarity from which on a stem is a benchmark's; 0: none is")
    every.add_argument("--distance", type=int, default=leaks.DISTANCE, help="bits of 64 up to which an image is a benchmark's; 0: same file only")
    every.add_argument("--out", required=True, help="folder to write")
    every.add_argument("--max-tokens", type=int, default=2048)  # ours: paper silent
    add_flags(every)
    every.add_argument("--seed", type=int, default=0)
    every.set_defaults(run=run)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    args.run(args)


if __name__ == "__main__":
    main(sys.argv[1:])
