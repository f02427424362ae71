"""A model answers benchmarks: accuracy, majority vote and pass@n with intervals (paper §4).

    questions -> n completions each -> the letter each gives, by our rule and by the benchmark's own
              -> figures with intervals

A completion that cannot be read, or was cut off, is wrong and stays in the denominator.
report/score.py defines the figures; `python -m report` makes tables, pictures and pages from them.

    python evaluate.py --engine vllm:out/dpo/merged --questions medxpertqa.jsonl mmmu.jsonl \\
        --images . -n 32 --out out/stage2

reads questions.jsonl; writes OUT/predictions.jsonl, OUT/verdicts.jsonl (with --judge),
OUT/results.json (an entry for each question, from which reports are made) and OUT/stage.json.

Where we depart from the paper, or it is silent:
  1. T = 0.5 is the paper's for majority vote and pass@n; its main tables name no decoding. Ours:
     the same samples serve all figures, so MV@1 = pass@1 = accuracy.
  2. For n below N, MV@n is a mean over seeded subsets (the paper may have used the first n).
  3. With --judge one chain of every image question is judged (--judge-samples), right or wrong, so
     that a stage cannot look better by answering less. It is the same sample at every stage. An
     empty chain is not sent and meets no criterion; unreadable verdicts are left out, and counted.
  4. --prompt paper is Appendix A's system prompt for whatever model is asked; official is the
     benchmark's own prompt; bare is the question alone, for models that reason unasked.
  5. --open-ended removes the options (Fig. 8), and an engine says which answers mean the reference.
     Votes count other words for it as other answers, so MV@n is a lower bound there.
"""

import argparse
import random
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path

import answers
import data
from benchmarks import official
from command import flags, schema, stage
from engines import bill, inference, open_engine
from engines.inference import Request, Sampling, checkpoint, identity, setup_of
from judge import CRITERIA, Questions, judge_chains
from judge import cost as judge_cost
from report import score

# ours: paper silent
GRADE_PROMPT = """A medical question was answered freely. Does the answer mean the same as the \
reference answer? Other words and more detail are fine; another finding, drug, disease or amount \
is not.
Return your judgement as JSON and nothing else:
{"Correct": "Yes/No"}
<Question> %s </Question>
<Reference> %s </Reference>
<Answer> %s </Answer>"""
# ours: paper silent
FORCE_PROMPT = "Give the letter of the option that you choose, and nothing else."


def read_all(paths: list[str]) -> Questions:
    """Questions of several files by id. A question that two benchmarks share counts in both: under
    another source it is kept again, as ID-SOURCE, so runs to be compared need the files in one
    order. Raises RowError where one id stands for two questions, whatever their meta."""
    found: Questions = {}
    for path in paths:
        for question in schema.read_questions(path):
            held = found.setdefault(question.id, question)
            if replace(held, source=question.source, meta=question.meta) != question:
                where = f"{path}: id {question.id!r} stands for another question"
                raise data.RowError(f"{where} in an earlier file; give one of them another id")
            if held.source != question.source:
                key = f"{question.id}-{question.source}"
                found[key] = replace(question, id=key)
    return found


def questions_of(args: argparse.Namespace) -> Questions:
    """The questions of a run by id; without options if it is open-ended."""
    chosen = data.draw(read_all(args.questions).values(), args.limit)
    return {q.id: q.opened() if args.open_ended else q for q in chosen}


def make_request(question: data.Question, style: str, image_root: Path, samples: int) -> Request:
    """The question in the prompt's style. Raises RowError for an image that is not there."""
    messages, images = data.prompt_messages(question), question.images
    if style == "bare":
        messages = messages[1:]
    elif style == "official":
        messages, images = official.messages(question)
    paths = inference.image_paths(replace(question, images=images), image_root)
    return Request(question.id, messages, paths, tuple(range(samples)))


def requests_of(questions: Questions, args: argparse.Namespace) -> dict[str, Request]:
    """A request for every question, by its id, with as many samples as its kind has."""
    found = {}
    for key, question in questions.items():
        samples = args.n[0] if question.images else args.n[-1]
        found[key] = make_request(question, args.prompt, Path(args.images), samples)
    return found


def judged_samples(questions: Questions, args: argparse.Namespace) -> set[tuple[str, int]]:
    """(id, sample) of the chains for the judge: --judge-samples of each image question, drawn by
    --seed, the question's id and -n: the same at every stage."""
    n, chosen = args.n[0], set()
    count = min(args.judge_samples or n, n)
    for key, question in questions.items():
        if question.images:
            rng = random.Random(data.sample_seed(args.seed, key, n))
            chosen |= {(key, sample) for sample in rng.sample(range(n), count)}
    return chosen


def costs(
    questions: Questions, requests: Iterable[Request], args: argparse.Namespace
) -> list[bill.Cost]:
    """What the engine, the grader and the judge may be asked at most."""
    longest, requests = bill.CHARACTERS * args.max_tokens, list(requests)  # characters of a chain
    sizes = list(bill.sizes(requests))
    found = [bill.cost("evaluate", args.engine, sizes, 1, args.max_tokens, args.pixels)]
    second = {"letter": [], "force": []}
    if args.force:
        second["force"] = [r for r in requests if questions[r.id].options]
    if args.prompt == "official":
        second["letter"] = [r for r in requests if official.second_turn(questions[r.id], "")]
    for role, asked in second.items():
        if asked:  # FORCE_PROMPT is longer than what MedXpertQA asks
            again = [
                (len(FORCE_PROMPT) + size + longest, shown) for size, shown in bill.sizes(asked)
            ]
            found.append(bill.cost(role, args.engine, again, 1, args.max_tokens, args.pixels))
    if args.open_ended:
        graded = [(len(GRADE_PROMPT) + size + longest, 0) for size, _ in sizes]
        found.append(inference.label_cost("grader", args.open_ended, graded, args))
    if args.judge:
        chains = [(questions[key], longest) for key, _ in judged_samples(questions, args)]
        found.append(judge_cost(chains, args))
    return found


def sampling_of(args: argparse.Namespace) -> Sampling:
    return Sampling(args.temperature, args.top_p, args.max_tokens, args.seed)


def complete(
    requests: dict[str, Request], questions: Questions, args: argparse.Namespace
) -> list[dict]:
    """Rows of predictions.jsonl, image questions first: completions, what is read from them, and
    second turns."""
    engine, sampling = open_engine(args.engine, setup_of(args)), sampling_of(args)
    to_row = partial(inference.completion_row, spec=args.engine)

    def ask(role: str, part: list[Request]) -> dict[tuple[str, int], dict]:
        return inference.complete_all(engine, part, sampling, role, to_row, args)

    rows = []
    # one kind after the other, so that all questions of a batch have as many samples
    for images in (True, False):
        part = [one for key, one in requests.items() if bool(questions[key].images) == images]
        if part:
            rows += ask("evaluate", part).values()
    if args.prompt == "official":
        ask_for_letters(ask, requests, rows, questions)
    read_answers(rows, questions, bool(args.open_ended))
    if args.force:
        force_answers(ask, requests, rows, questions)
    engine.close()
    return rows


def ask_for_letters(
    ask: Callable, requests: dict[str, Request], rows: list[dict], questions: Questions
) -> None:
    """MedXpertQA's second turn: asks for the letter after each finished chain, and adds it to the
    response, which then has no token ids and no log-probability."""
    ended = [row for row in rows if row["finish_reason"] == "stop"]
    turns = [official.second_turn(questions[row["id"]], row["response"]) for row in ended]
    asked = [(row, turn) for row, turn in zip(ended, turns) if turn]
    for row, letter in second_turns(ask, "letter", requests, asked):
        row["response"] += f"\n\n{official.trigger(questions[row['id']])} {letter['response']}"
        row["response_sha"] = data.response_hash(row["response"])
        row |= {"token_ids": None, "logp": None, "finish_reason": letter["finish_reason"]}


def second_turns(
    ask: Callable, role: str, requests: dict[str, Request], asked: list[tuple[dict, list[dict]]]
) -> list[tuple[dict, dict]]:
    """(row, its second completion). asked: rows, and the turns that are added to a row's request.
    Rows of one question with the same turns are asked once."""
    second, keys = {}, []
    for row, turns in asked:
        first, key = requests[row["id"]], f"{row['id']}/{data.content_hash(turns)[:16]}"
        second[key] = replace(first, id=key, messages=[*first.messages, *turns], samples=(0,))
        keys.append((row, key))
    found = ask(role, list(second.values())) if second else {}
    return [(row, found[key, 0]) for row, key in keys]


def force_answers(
    ask: Callable, requests: dict[str, Request], rows: list[dict], questions: Questions
) -> None:
    """Asks for the letter after each chain without a readable answer, also one that was cut off.
    `forced` is that letter; None where it cannot be read either, or none was asked for. So a model
    that knows the answer but does not end is told from one that does not know it."""
    asked = []
    for row in rows:
        row["forced"] = None
        options = questions[row["id"]].options
        if options and row["extracted"] is None and row["response"].strip():
            said = {"role": "assistant", "content": row["response"]}
            asked.append((row, [said, {"role": "user", "content": FORCE_PROMPT}]))
    for row, letter in second_turns(ask, "force", requests, asked):
        options, ended = questions[row["id"]].options, letter["finish_reason"] == "stop"
        row["forced"] = answers.extract_choice(letter["response"], options) if ended else None


def read_answers(rows: list[dict], questions: Questions, open_ended: bool) -> None:
    """Adds to each row its choice and whether that is right: `extracted` and `correct` by our rule,
    `official` and `official_correct` by the benchmark's where it has one. An unfinished completion
    has no choice."""
    for row in rows:
        question, finished = questions[row["id"]], row["finish_reason"] == "stop"
        row["extracted"] = score.choice_of(row, question)
        row["correct"] = answers.is_right(row, question)
        if official.has_rule(question) and not open_ended:
            row["official"] = official.choice(row["response"], question) if finished else None
            row["official_correct"] = row["official"] == question.answer


def grade(rows: list[dict], questions: Questions, args: argparse.Namespace) -> int:
    """Asks the grader whether a free answer means the reference, unless it has the reference's very
    words. Returns the number of answers without a readable grade, which count as wrong."""
    engine = open_engine(args.open_ended, setup_of(args))
    unsure, requests = [row for row in rows if row["extracted"] and not row["correct"]], []
    for row in unsure:
        question, answer = questions[row["id"]], answers.free_answer(row["response"])
        prompt = GRADE_PROMPT % (question.question, question.answer, answer)
        requests.append(inference.prompt_request(row["id"], prompt, []))
    completions = inference.ask_yes_no(engine, requests, ("Correct",), "grader", args)
    engine.close()
    ungraded = 0
    for row, request in zip(unsure, requests):
        verdict, _ = inference.read_verdict(completions[request.id], ("Correct",))
        row["correct"] = bool(verdict and verdict["Correct"])
        ungraded += verdict is None
    return ungraded


def judge_rows(
    rows: list[dict], questions: Questions, args: argparse.Namespace
) -> tuple[list[dict], dict[tuple[str, int], dict | None]]:
    """(verdicts on the chains of judged_samples that are not empty, {(id, sample): criteria} of
    all)."""
    chosen = judged_samples(questions, args)
    chains = [row for row in rows if (row["id"], row["sample"]) in chosen]
    said = [row for row in chains if row["response"].strip()]
    verdicts = judge_chains(open_engine(args.judge, setup_of(args)), said, questions, args)
    criteria = {(row["id"], row["sample"]): dict.fromkeys(CRITERIA, False) for row in chains}
    return verdicts, criteria | {(row["id"], row["sample"]): row["criteria"] for row in verdicts}


def print_results(results: dict) -> None:
    benchmarks = {name: part["figures"] for name, part in results["benchmarks"].items()}
    for kind, found in [*results["groups"].items(), *benchmarks.items()]:
        (mean, low, high), n = found["accuracy"], str(found["samples"])
        line = f"{results['name']}: {kind} accuracy {mean:.3f} ({low:.3f} … {high:.3f})"
        line += f" on {found['questions']} questions x {n}"
        if found["samples"] > 1:
            line += f", MV@{n} {found['majority'][n][0]:.3f}, pass@{n} {found['pass'][n][0]:.3f}"
        line += f"; of all answers: unparsed {found['unparsed']:.3f} ("
        line += f"cut off {found['cut_off']:.3f}, over long {found['over_long']:.3f}, "
        line += f"unanswered {found['unanswered']:.3f})"
        line += f"; {found['loops']:.3f} loop"
        if "forced" in found:
            line += f"; accuracy with forced answers {found['forced'][0]:.3f}"
        if "official" in found:
            line += f"; by the benchmark's own rule {found['official'][0]:.3f}"
        print(f"{line}\n    {score.resolution(found['questions'])}")
    if results["ungraded"]:
        print(f"{results['ungraded']} answers have no readable grade, and count as wrong")


def add_flags(add: Callable) -> None:
    """What is asked, and how; looking.py has the same."""
    add("--engine", required=True, help="engine spec of the model")
    add("--questions", nargs="+", required=True, help="questions.jsonl of one or more benchmarks")
    add("--images", default=".", help="image root")
    add("--out", required=True, help="folder to write")
    add("--name", default="", help="how tables call it; default: the folder's name")
    add("--temperature", type=flags.temperature, default=0.5)  # paper 4.3
    add("--top-p", type=flags.number(above=0, high=1), default=1.0)  # ours: paper silent
    add("--max-tokens", type=flags.TOKENS, default=8192)  # ours: paper silent


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Ask an engine, and score its answers.")
    add = parser.add_argument
    add_flags(add)
    about = "samples of a question (paper: 32); a second number: of one without images"
    add("-n", type=flags.SAMPLES, nargs="+", default=[1], metavar="N", help=about)
    add("--prompt", choices=["paper", "official", "bare"], default="paper", help="whose prompt")
    about = "ask once more for the letter where no answer can be read; counted apart"
    add("--force", action="store_true", help=about)
    about = "no options; this engine says which answers mean the reference"
    add("--open-ended", default="", metavar="GRADER", help=about)
    add("--judge", default="", help="engine spec; judges chains on image questions")
    about = "judged chains of each image question; 0: all"  # default 1 is ours: paper silent
    add("--judge-samples", type=flags.whole(0), default=1, help=about)
    about = "at most so many text questions, and so many with images; 0: all"
    add("--limit", type=flags.whole(0), default=0, help=about)
    inference.add_flags(parser)
    add("--seed", type=flags.SEED, default=0)
    args = parser.parse_args(argv)
    if len(args.n) > 2:
        parser.error("argument -n: expected one number of samples, or two: of image and text")
    if args.open_ended and args.force:
        parser.error("argument --force: a question without options has no letter")
    if args.open_ended and args.prompt == "official":
        parser.error("argument --open-ended: --prompt official asks for a letter")
    return args


def main(argv: list[str] | None = None) -> None:
    args, started = parse(argv), time.time()
    out, questions = Path(args.out), questions_of(args)
    specs = [spec for spec in (args.engine, args.open_ended, args.judge) if spec]
    inputs = [*args.questions, *filter(None, map(checkpoint, specs))]
    images = data.image_files(args.images, map(vars, questions.values()))
    if not stage.open_folder(args, inputs, inference.FREE, images):
        return
    requests = requests_of(questions, args)
    bill.announce(costs(questions, requests.values(), args), args.images_may_leave)
    engines = {spec: identity(spec) for spec in specs}
    rows = complete(requests, questions, args)
    ungraded = grade(rows, questions, args) if args.open_ended else 0
    data.write_jsonl(out / "predictions.jsonl", rows)
    criteria, outputs = {}, [out / "predictions.jsonl", out / "results.json"]
    if args.judge:
        verdicts, criteria = judge_rows(rows, questions, args)
        data.write_jsonl(out / "verdicts.jsonl", verdicts)
        outputs.append(out / "verdicts.jsonl")
    samples: dict[str, list[dict]] = {key: [] for key in questions}
    for row in rows:
        samples[row["id"]].append(row)
    entries = [score.entry(question, samples[key], criteria) for key, question in questions.items()]
    results = {"name": args.name or out.name, "engine": args.engine, "prompt": args.prompt}
    results |= {"open_ended": args.open_ended, "ungraded": ungraded}
    results |= {"sampling": vars(sampling_of(args))} | score.make_results(entries)
    score.write_results(out / "results.json", results)
    print_results(results)
    stage.finish(args, outputs, started, {}, engines)


if __name__ == "__main__":
    flags.run_script(main)
