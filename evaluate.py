"""A model answers benchmarks, and its answers become numbers one can quote (paper §4).

    questions -> n answers each -> the letter each gives, by our rule and by the benchmark's own
              -> figures with intervals

An answer that cannot be read, or that was cut off, is wrong and stays in the denominator; how many
is printed beside. What the figures are stands in score.py, tables and pictures in tables.py and
figures.py, the page of single cases in cases.py.

    python evaluate.py run --engine vllm:out/dpo/merged --questions medxpertqa.jsonl mmmu.jsonl \\
        --images . -n 32 --out out/stage2
    # the same questions, or with --shared those that two runs share: who is better, how surely,
    # and whether by the benchmark's own rule too, or only in more answers that can be read
    python evaluate.py compare --results out/stage1 out/stage2
    # beside the paper's Tables 1 and 2, whatever was evaluated; and the paper's Figures 4 to 6
    python evaluate.py table --results out/base out/stage1 out/stage2 --out out/tables
    python evaluate.py plot --results out/base out/stage1 out/stage2 --out out/plots
    python evaluate.py cases out/stage1 out/stage2 --only stage1-wrong,stage2-right \\
        --questions medxpertqa.jsonl --out cases.html
    # one page of the whole method
    python evaluate.py report --results out/base out/stage1 out/stage2 --out out/report

run reads questions.jsonl; writes OUT/predictions.jsonl, OUT/verdicts.jsonl (with --judge),
OUT/results.json, OUT/stage.json. results.json has an entry for each question, from which all the
other commands work, without the model.

Where we depart from the paper, or it is silent:
  1. T = 0.5 is the paper's for majority vote and pass@n; its main tables name no decoding. Ours:
     the same samples serve all figures, so MV@1 = pass@1 = accuracy.
  2. For n below N, MV@n is a mean over seeded subsets (the paper may have used the first n).
  3. With --judge one chain of every image question is judged (--judge-samples), right or wrong, so
     that a stage cannot look better by answering less; by the seed the same one at every stage.
  4. --prompt paper is Appendix A's system prompt for whatever model is asked; official is the
     benchmark's own prompt; bare is the question alone, for models that reason unasked.
  5. --open-ended takes the options away (Fig. 8) and has an engine say which answers mean the
     reference.
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import answers
import bill
import cases
import data
import figures
import flags
import official
import score
import stage
import tables
from asking import (
    SPEED, Ask, Sampling, add_flags, ask_all, ask_yes_no, checkpoint, identity, image_paths,
    label_cost, prompt_ask, question_asks, read_verdict, replies_file, reply_row, setup_of,
)  # fmt: skip
from engines import Replicas, open_engine
from judge import CRITERIA, judge_all, print_report, read_report
from judge import cost as judge_cost

# ours: paper silent
GRADE_PROMPT = """A medical question was answered freely. Does the answer mean the same as the reference answer? Other words and more detail are fine; another finding, drug, disease or amount is not.
Return your judgement as JSON and nothing else:
{"Correct": "Yes/No"}
<Question> %s </Question>
<Reference> %s </Reference>
<Answer> %s </Answer>"""


# ---------------------------------------------------------------------------------------------------------------
# run


def make_ask(question: data.Question, style: str, image_root: Path, samples: int) -> Ask:
    """The question as the prompt's style puts it. Raises RowError for an image that is not there."""
    if style == "official":
        messages, images = official.messages(question)
        return Ask(question.id, messages, image_paths(replace(question, images=images), image_root), tuple(range(samples)))
    ask = question_asks([question], image_root, samples)[0]
    return ask if style == "paper" else replace(ask, messages=ask.messages[1:])


def ask_for_letters(engine, asks: dict[str, Ask], rows: list[dict], questions: dict[str, data.Question], sampling: Sampling, args: argparse.Namespace) -> None:
    """MedXpertQA's second turn: the letter, asked for after each finished chain, is added to the response."""
    second = {}  # by the row's place: the same chain is asked about once, and another chain anew
    for place, row in enumerate(rows):
        turn = official.second_turn(questions[row["id"]], row["response"]) if row["finish_reason"] == "stop" else None
        if turn:
            second[place] = replace(asks[row["id"]], id=f"{row['id']}/{data.content_hash(turn)[:16]}", messages=[*asks[row["id"]].messages, *turn], samples=(0,))
    wanted, path = list({ask.id: ask for ask in second.values()}.values()), replies_file(args, "letter", engine.spec, sampling)
    said = ask_all(engine, wanted, sampling, path, lambda reply: reply_row(reply, engine.spec), "letters") if wanted else {}
    for place, ask in second.items():
        row, letter = rows[place], said[ask.id, 0]
        response = f"{row['response']}\n\n{official.trigger(questions[row['id']])} {letter['response']}"
        row |= {"response": response, "response_sha": data.response_hash(response), "token_ids": None, "finish_reason": letter["finish_reason"]}


def read_all(paths: list[str]) -> dict[str, data.Question]:
    """Questions of several files by id. One that two benchmarks share counts in both, the second under an id with its source.
    Raises RowError where one id stands for two questions."""
    found: dict[str, data.Question] = {}
    for path in paths:
        for question in data.read_questions(path):
            held = found.setdefault(question.id, question)
            if replace(held, source=question.source, meta=question.meta) != question:
                raise data.RowError(f"{path}: id {question.id!r} stands for another question in an earlier file; give one of them another id")
            if held.source != question.source:
                found[f"{question.id}-{question.source}"] = replace(question, id=f"{question.id}-{question.source}")
    return found


def read_answers(rows: list[dict], questions: dict[str, data.Question], open_ended: bool) -> None:
    """Adds to each row what it says and whether that is right: `extracted`, `correct` by our rule, and where the benchmark
    has a rule of its own `official`, `official_correct`. An answer that was not finished says nothing."""
    for row in rows:
        question, finished = questions[row["id"]], row["finish_reason"] == "stop"
        row["extracted"] = score.choice_of(row["response"], question) if finished else None
        row["correct"] = finished and answers.is_correct(row["response"], question)
        if official.has_rule(question) and not open_ended:
            row["official"] = official.choice(row["response"], question) if finished else None
            row["official_correct"] = row["official"] == question.answer


def grade(rows: list[dict], questions: dict[str, data.Question], spec: str, args: argparse.Namespace) -> int:
    """Has an engine say which free answers mean the reference; those with its very words are right already. What it does not
    say readably is wrong. Returns how many those are."""
    engine = open_engine(spec, setup_of(args))
    unsure = [row for row in rows if row["extracted"] and not row["correct"]]
    asks = [prompt_ask(row["id"], GRADE_PROMPT % (questions[row["id"]].question, questions[row["id"]].answer, answers.free_answer(row["response"])), []) for row in unsure]
    said = ask_yes_no(engine, asks, ("Correct",), "grader", args)
    graded = [read_verdict(said[ask.id], ("Correct",))[0] for ask in asks]
    for row, verdict in zip(unsure, graded):
        row["correct"] = bool(verdict and verdict["Correct"])
    return sum(verdict is None for verdict in graded)


def by_source(entries: list[dict]) -> dict[str, list[dict]]:
    """Entries by benchmark; image and text questions apart where they were sampled differently often."""
    sources: dict[str, list[dict]] = {}
    for entry in entries:
        sources.setdefault(entry["source"] or "no source", []).append(entry)
    even = {source: members for source, members in sources.items() if len({len(entry["choices"]) for entry in members}) == 1}
    return even | by_source_and_kind([entry for source, members in sources.items() if source not in even for entry in members])


def by_source_and_kind(entries: list[dict]) -> dict[str, list[dict]]:
    """Entries by benchmark, image and text questions apart where a benchmark has both."""
    kinds: dict[str, set[bool]] = {}
    for entry in entries:
        kinds.setdefault(entry["source"], set()).add(entry["image"])
    groups: dict[str, list[dict]] = {}
    for entry in entries:
        kind = f", {'image' if entry['image'] else 'text'}" if len(kinds[entry["source"]]) == 2 else ""
        groups.setdefault(f"{entry['source'] or 'no source'}{kind}", []).append(entry)
    return groups


def subsets(entries: list[dict]) -> dict[str, dict]:
    """{"modality=CT": figures, ...}"""
    values = sorted({(key, value) for entry in entries for key, value in entry["groups"].items()})
    return {f"{key}={value}": score.summarise([entry for entry in entries if entry["groups"].get(key) == value]) for key, value in values}


def make_results(entries: list[dict]) -> dict:
    """All figures of one run: image and text questions, each benchmark with its subsets, and the subsets of the image questions."""
    groups = {kind: [entry for entry in entries if entry["image"] == (kind == "image")] for kind in ("image", "text")}
    return {
        "groups": {kind: score.summarise(members) for kind, members in groups.items() if members},
        "benchmarks": {name: {"figures": score.summarise(members), "subsets": subsets(members)} for name, members in by_source(entries).items()},
        "subsets": subsets(groups["image"]),
        "entries": entries,
    }


def judged_samples(by_id: dict[str, data.Question], args: argparse.Namespace) -> set[tuple[str, int]]:
    """(id, sample) of the chains that the judge is to see, --judge-samples of each image question,
    drawn by the seed alone, so that every run over these questions has the same."""
    count, n = args.judge_samples or args.n[0], args.n[0]
    chosen = set()
    for key, question in by_id.items():
        if question.images:
            rng = random.Random(data.sample_seed(args.seed, key, n))
            chosen |= {(key, sample) for sample in rng.sample(range(n), min(count, n))}
    return chosen


def questions_of(args: argparse.Namespace) -> dict[str, data.Question]:
    """The questions of a run by id, without options where it is to be open-ended."""
    chosen = data.some(read_all(args.questions).values(), args.limit)
    return {q.id: q.opened() if args.open_ended else q for q in chosen}


def asks_of(by_id: dict[str, data.Question], args: argparse.Namespace) -> list[Ask]:
    """Every question, so often as its kind is sampled."""
    often = {True: args.n[0], False: args.n[-1]}
    return [make_ask(q, args.prompt, Path(args.images), often[bool(q.images)]) for q in by_id.values()]


def costs(
    by_id: dict[str, data.Question], asks: Iterable[Ask], args: argparse.Namespace
) -> list[bill.Cost]:
    """What the engine, the grader and the judge may be asked at most."""
    longest = bill.LETTERS * args.max_tokens  # characters of a chain
    of_all = list(bill.sizes(asks))
    found = [bill.cost("evaluate", args.engine, of_all, 1, args.max_tokens, args.pixels)]
    if args.open_ended:
        graded = [(len(GRADE_PROMPT) + letters + longest, 0) for letters, _ in of_all]
        found.append(label_cost("grader", args.open_ended, graded, args))
    if args.judge:
        chains = [(by_id[key], longest) for key, _ in judged_samples(by_id, args)]
        found.append(judge_cost(chains, args))
    return found


def write_results(path: Path, results: dict) -> None:
    """results.json with its figures laid out to be read and its entries one a line."""
    figures_text = json.dumps({key: value for key, value in results.items() if key != "entries"}, indent=1, ensure_ascii=False)
    lines = ",\n  ".join(json.dumps(entry, ensure_ascii=False) for entry in results["entries"])
    data.write_text(path, f'{figures_text[:-2]},\n "entries": [\n  {lines}\n ]\n}}\n')


def run(args: argparse.Namespace) -> None:
    started, out = time.time(), Path(args.out)
    if len(args.n) > 2:
        given = f"-n {' '.join(map(str, args.n))}"
        raise data.RowError(f"{given}: expected one number of samples, or two: of image and of text questions")
    if args.open_ended and args.prompt == "official":
        raise data.RowError("--open-ended with --prompt official: the benchmarks' own prompts ask for a letter; take paper or bare")
    specs = [spec for spec in (args.engine, args.open_ended, args.judge) if spec]
    by_id = questions_of(args)
    inputs = [*args.questions, *filter(None, map(checkpoint, specs))]
    if not stage.open_folder(args, inputs, SPEED, data.image_files(args.images, map(vars, by_id.values()))):
        return
    asks = {ask.id: ask for ask in asks_of(by_id, args)}
    bill.announce(costs(by_id, asks.values(), args), args.images_may_leave)
    sampling = Sampling(args.temperature, args.top_p, args.max_tokens, args.seed)
    path = replies_file(args, "evaluate", args.engine, sampling)
    # each before it is asked: its folder may be trained anew in the meantime
    answered_by = {args.engine: identity(args.engine)}
    engine = open_engine(args.engine, setup_of(args))
    rows = []
    for kind in ("image", "text"):  # apart, so that a batch has one number of samples a question
        part = [ask for ask in asks.values() if bool(by_id[ask.id].images) == (kind == "image")]
        said = ask_all(engine, part, sampling, path, lambda reply: reply_row(reply, args.engine), f"{kind} questions") if part else {}
        rows += [said[ask.id, k] for ask in part for k in ask.samples]
    if args.prompt == "official":
        ask_for_letters(engine, asks, rows, by_id, sampling, args)
    if isinstance(engine, Replicas):
        engine.close()
    del engine  # grader and judge, if they are local, want its memory
    read_answers(rows, by_id, bool(args.open_ended))
    ungraded = 0
    if args.open_ended:
        answered_by[args.open_ended] = identity(args.open_ended)
        ungraded = grade(rows, by_id, args.open_ended, args)
    data.write_jsonl(out / "predictions.jsonl", rows)

    criteria, outputs = {}, [out / "predictions.jsonl", out / "results.json"]
    if args.judge:
        answered_by[args.judge] = identity(args.judge)
        judge = open_engine(args.judge, setup_of(args))
        # there is nothing to judge in no answer
        chosen = judged_samples(by_id, args)
        chains = [row for row in rows if (row["id"], row["sample"]) in chosen and row["response"].strip()]
        verdicts = judge_all(judge, chains, by_id, args)
        data.write_jsonl(out / "verdicts.jsonl", verdicts)
        criteria = {(row["id"], row["sample"]): row["criteria"] for row in verdicts}
        outputs.append(out / "verdicts.jsonl")
    samples: dict[str, list[dict]] = {key: [] for key in by_id}
    for row in rows:
        samples[row["id"]].append(row)
    entries = [score.entry(question, samples[key], criteria) for key, question in by_id.items()]
    asked = {"name": args.name or out.name, "engine": args.engine, "prompt": args.prompt, "open_ended": args.open_ended, "ungraded": ungraded, "sampling": vars(sampling)}
    results = {**asked, **make_results(entries)}
    write_results(out / "results.json", results)
    print_results(results)
    if ungraded:
        print(f"{ungraded} answers have no readable grade, and count as wrong")
    stage.finish(args, outputs, started, {}, answered_by)


def print_results(results: dict) -> None:
    benchmarks = {name: part["figures"] for name, part in results["benchmarks"].items()}
    for kind, found in [*results["groups"].items(), *benchmarks.items()]:
        (mean, low, high), n = found["accuracy"], str(found["samples"])
        told = f"{results['name']}: {kind} accuracy {mean:.3f} ({low:.3f} … {high:.3f})"
        told += f" on {found['questions']} questions x {found['samples']}"
        if found["samples"] > 1:
            told += f", MV@{n} {found['majority'][n][0]:.3f}, pass@{n} {found['pass'][n][0]:.3f}"
        told += f"; of all answers: unparsed {found['unparsed']:.3f} ("
        told += f"cut off {found['cut_off']:.3f}, over long {found['over_long']:.3f}, "
        told += f"unanswered {found['unanswered']:.3f})"
        if "official" in found:
            told += f"; by the benchmark's own rule {found['official'][0]:.3f}"
        print(told)


# ---------------------------------------------------------------------------------------------------------------
# compare, table, plot, cases, report


def read_results(folders: list[str]) -> list[dict]:
    """With all figures. Raises RowError for a folder that `run` did not finish, or an older version
    wrote."""
    wanted = {"name": str, "groups": dict, "benchmarks": dict, "subsets": dict, "entries": list}
    return [score.read_results(folder, wanted) for folder in folders]


COMPARED = {  # a column of differences, each with its 95 % interval -> its key in score.compare
    "difference in accuracy, 95 % interval": "difference",
    "by the benchmark's own rule": "official_difference",
    "in the share of readable answers": "readable_difference",
    "by majority vote": "vote_difference",
}
COUNTED = ("only the first's vote is right", "only the second's", "McNemar's p")


def compared(first: dict, second: dict, notes: list[str]) -> Iterator[list[str]]:
    """A row for each benchmark and kind of question that both runs were asked; what only one was
    asked goes to `notes`. Raises RowError for a benchmark of which they have other questions."""
    names = f"{first['name']} and {second['name']}"
    parts = [by_source_and_kind(result["entries"]) for result in (first, second)]
    both = [key for key in parts[0] if key in parts[1]]
    if not both:
        asked = " and ".join(", ".join(part) for part in parts)
        raise data.RowError(f"{names}: no benchmark in common; {asked}")
    if alone := [key for key in {**parts[0], **parts[1]} if key not in both]:
        notes.append(f"* not compared, since only one of {names} was asked: {', '.join(alone)}")
    for key in both:
        try:
            found = score.compare(parts[0][key], parts[1][key])
        except data.RowError as error:
            how = "--shared compares those that both have"
            raise data.RowError(f"{names}, {key}: {error}; {how}") from None
        row = [f"{key} ({found['questions']})", f"{first['name']} → {second['name']}"]
        for name in COMPARED.values():
            told = name in found
            row.append("{:+.3f} ({:+.3f} … {:+.3f})".format(*found[name]) if told else "–")
        yield [*row, str(found["only_first"]), str(found["only_second"]), f"{found['p']:.2g}"]


def compare(args: argparse.Namespace) -> None:
    """Each run against the one before it."""
    if len(args.results) < 2:
        given = f"--results {' '.join(args.results)}"
        raise data.RowError(f"{given}: one run has nothing to be compared with; give two or more")
    results = read_results(args.results)
    rows, notes = [["questions", "first → second", *COMPARED, *COUNTED]], []
    for runs in zip(results, results[1:]):
        if args.shared:
            runs = only_shared(*runs, notes)
        rows += compared(*runs, notes)
    text = "\n".join([tables.markdown(rows), *([""] if notes else []), *notes])
    print(text)
    if args.out:
        read = [Path(folder) / "results.json" for folder in args.results]
        stage.new_file(args.out, text + "\n", read)


def only_shared(first: dict, second: dict, notes: list[str]) -> list[dict]:
    """Two results with the entries of the questions that both have; `notes` say how many others
    there were. Raises RowError where there is none."""
    pairs = score.shared(first["entries"], second["entries"])
    if not pairs:
        names = f"{first['name']} and {second['name']}"
        raise data.RowError(f"{names}: --shared: no question in common")
    kept = [{**run, "entries": list(part)} for run, part in zip((first, second), zip(*pairs))]
    left = [
        f"{len(run['entries']) - len(pairs)} of {run['name']}'s {len(run['entries'])}"
        for run in (first, second)
    ]
    notes.append(f"* {len(pairs)} questions are in both runs; left out: {' and '.join(left)}.")
    return kept


def draw(args: argparse.Namespace) -> None:
    """`table` and `plot`: what the paper shows, from whatever results have it; what they lack is said."""
    started, results = time.time(), read_results(args.results)
    if not stage.open_folder(args, [Path(folder) / "results.json" for folder in args.results]):
        return
    paths, left_out = args.what(results, Path(args.out))
    stage.finish(args, paths, started, {})
    for path in paths:
        if path.suffix == ".md":
            print(path.read_text(encoding="utf-8"))
    print("\n".join([*left_out, "written: " + ", ".join(map(str, paths))]))


def show_cases(args: argparse.Namespace) -> None:
    questions = list(read_all(args.questions).values())
    runs = [cases.read_run(folder) for folder in args.results]
    count = cases.write_page(
        runs, questions, args.images, args.only, args.n, args.out, args.questions
    )
    print(f"{args.out}: {count} cases")


def report(args: argparse.Namespace) -> None:
    started, out = time.time(), Path(args.out)
    if bool(args.sft) != bool(args.dpo):
        raise data.RowError("--sft and --dpo go together: the curves of both stages are on one picture")
    inputs = [Path(folder) / "results.json" for folder in args.results]
    inputs += [Path(folder) / "metrics.jsonl" for folder in (args.sft, args.dpo) if folder]
    inputs += [Path(args.pairs) / name for name in ("pairs.jsonl", "report.json") if args.pairs]
    results = read_results(args.results)
    if not stage.open_folder(args, inputs):
        return
    # all is read before anything is written, so that a mistake in a row leaves the folder free
    curves = [data.read_metrics(folder) for folder in (args.sft, args.dpo) if folder]
    pairs = data.read_rows(Path(args.pairs) / "pairs.jsonl", "pairs") if args.pairs else []
    text, outputs = tables.table(results), [out / "table.md"]
    data.write_text(out / "table.md", text + "\n")
    if curves:
        figures.plot_report(results, *curves, out / "report.png")
        outputs.append(out / "report.png")
    if pairs:
        figures.plot_films(pairs, Path(args.images), out / "films.png")
        outputs += [out / "films.png"] if (out / "films.png").exists() else []
        print_report(read_report(Path(args.pairs) / "report.json"))
    print("\n" + text)
    stage.finish(args, outputs, started, {})


# ---------------------------------------------------------------------------------------------------------------
# claims

RESAMPLES = 2000  # ours: bootstrap over questions
STAGES = ("eval-base", "eval-stage1", "eval-stage2")  # folders of a run of the demo


def per_question(folder: Path) -> dict[str, dict[str, float]]:
    """{id: figures} of the image questions of one evaluation. Shares are kept as (sum, count) pairs, to be resampled."""
    by_id = {}
    for entry in read_results([str(folder)])[0]["entries"]:
        if entry["image"]:
            judged = [criteria for criteria in entry["criteria"] if criteria]
            looking = [criteria for criteria in judged if criteria["Image_Analysis_Involvement"]]
            by_id[entry["id"]] = {
                "right": sum(entry["right"]), "samples": len(entry["right"]), "vote": float(score.vote(entry["choices"], entry["right"])),
                "judged": len(judged), "all": sum(all(criteria[name] for name in CRITERIA) for criteria in judged),
                "looking": len(looking), "false": sum(not criteria["No_Hallucination"] for criteria in looking),
            }  # fmt: skip
    return by_id


def share(over: str, of: str):
    """A figure of a list of questions: sum of one count over sum of another."""
    return lambda entries: sum(e[over] for e in entries) / max(1, sum(e[of] for e in entries))


CLAIMS = (  # name, figure, before, after, the direction claimed: +1 rises, -1 falls, 0 rises or holds
    ("text-only Stage I raises accuracy on image questions", share("right", "samples"), "eval-base", "eval-stage1", 1),
    ("Stage II raises the share of chains that meet all four criteria", share("all", "judged"), "eval-stage1", "eval-stage2", 1),
    ("with Stage II accuracy on image questions rises or holds", share("right", "samples"), "eval-stage1", "eval-stage2", 0),
    ("Stage II lowers hallucination among chains that look at the image", share("false", "looking"), "eval-stage1", "eval-stage2", -1),
    ("majority vote raises accuracy after Stage II", lambda entries: statistics.fmean(e["vote"] for e in entries), None, "eval-stage2", 1),
)


def measure_claims(runs: list[Path]) -> list[dict]:
    """Each claim over several runs (seeds): the difference in every run, their mean, and a 95 % interval from resampling
    questions within each run, the same questions before and after."""
    found = []
    seen = [{name: per_question(run / name) for name in STAGES} for run in runs]
    accuracy = share("right", "samples")
    for text, figure, before, after, direction in CLAIMS:
        def difference(tables: dict, ids: list[str]) -> tuple[float, float]:
            late = [tables[after][key] for key in ids]
            return (figure([tables[before][key] for key in ids]) if before else accuracy(late)), figure(late)

        levels = [difference(tables, list(tables[after])) for tables in seen]
        rng, draws = random.Random(0), []
        for _ in range(RESAMPLES):
            resampled = [difference(tables, rng.choices(list(tables[after]), k=len(tables[after]))) for tables in seen]
            draws.append(statistics.fmean(b - a for a, b in resampled))
        draws.sort()
        low, high = draws[int(0.025 * RESAMPLES)], draws[int(0.975 * RESAMPLES) - 1]
        shown = {1: low > 0, -1: high < 0, 0: low > -0.02}[direction]  # "holds": a loss of more than 2 points is excluded
        found.append({"claim": text, "levels": levels, "mean": statistics.fmean(b - a for a, b in levels), "low": low, "high": high, "shown": shown})
    return found


def claims(args: argparse.Namespace) -> None:
    found = measure_claims([Path(run) for run in args.runs])
    lines = [
        "# What the miniature shows",
        "",
        f"Runs: {len(args.runs)}. Each has its own seed for world, base model, training and sampling, and test questions that no setting was chosen on.",
        "Before and after in each run, the mean difference, and its 95 % interval (bootstrap over questions within runs).",
        "",
        "| claim | before → after, run by run | mean difference | 95 % interval | shown |",
        "|---|---|---|---|---|",
    ]
    for row in found:
        runs = ", ".join(f"{a:.3f} → {b:.3f}" for a, b in row["levels"])
        lines.append(f"| {row['claim']} | {runs} | {row['mean']:+.3f} | {row['low']:+.3f} … {row['high']:+.3f} | {'yes' if row['shown'] else '**no**'} |")
    read = [Path(run) / name / "results.json" for run in args.runs for name in STAGES]
    stage.new_file(args.out, "\n".join(lines) + "\n", read)
    print("\n".join(lines))


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Evaluate a model, or look at evaluations.")
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("run", help="ask an engine and score its answers")
    one.add_argument("--engine", required=True, help="engine spec of the model")
    one.add_argument(
        "--questions", nargs="+", required=True, help="questions.jsonl of one or more benchmarks"
    )
    one.add_argument("--images", default=".", help="image root")
    one.add_argument("--out", required=True, help="folder to write")
    one.add_argument("--name", default="", help="how tables call it; default: the folder's name")
    one.add_argument(
        "-n", type=flags.SAMPLES, nargs="+", default=[1], metavar="N",
        help="samples of a question; the paper's MV@n and pass@n use 32. "
        "A second number: of a question without images",
    )  # fmt: skip
    one.add_argument("--temperature", type=flags.temperature, default=0.5)  # paper 4.3
    one.add_argument(
        "--top-p", type=flags.number(above=0, high=1), default=1.0
    )  # ours: paper silent
    one.add_argument("--max-tokens", type=flags.TOKENS, default=8192)  # ours: paper silent
    one.add_argument(
        "--prompt", choices=["paper", "official", "bare"], default="paper", help="whose prompt"
    )
    one.add_argument(
        "--open-ended", default="", metavar="GRADER",
        help="without options; this engine says which answers mean the reference",
    )  # fmt: skip
    one.add_argument("--judge", default="", help="engine spec; judges chains on image questions")
    one.add_argument(
        "--judge-samples", type=flags.whole(0), default=1,  # ours: paper silent
        help="chains of each image question that are judged; 0: all",
    )  # fmt: skip
    one.add_argument(
        "--limit", type=flags.whole(0), default=0,
        help="so many text and so many image questions only; 0: all",
    )  # fmt: skip
    add_flags(one)
    one.add_argument("--seed", type=flags.SEED, default=0)
    one.set_defaults(act=run)
    pair = commands.add_parser(
        "compare", help="each run against the one before it, on the same questions"
    )
    pair.add_argument("--results", nargs="+", required=True, help="folders of `run`")
    pair.add_argument(
        "--shared", action="store_true", help="only the questions that both runs have"
    )
    pair.add_argument("--out", default="", help="Markdown file to write")
    pair.set_defaults(act=compare)
    pages = (
        ("table", tables.paper_tables, "our rows and columns beside the paper's Tables 1 and 2"),
        ("plot", figures.plot_paper, "the paper's Figures 4, 5 and 6, and accuracy by modality"),
    )
    for name, what, said in pages:
        drawn = commands.add_parser(name, help=said)
        drawn.add_argument(
            "--results", nargs="+", required=True,
            help="folders of `run`, named SIZE/STAGE where a figure is by size and stage",
        )  # fmt: skip
        drawn.add_argument("--out", required=True, help="folder to write")
        drawn.set_defaults(act=draw, what=what)
    seen = commands.add_parser("cases", help="single cases as one page, chains side by side")
    seen.add_argument("results", nargs="+", help="folders of `run`")
    seen.add_argument(
        "--only", default="", help="conditions such as stage1-wrong,stage2-right; see cases.py"
    )
    seen.add_argument("-n", type=flags.whole(1), default=20, help="most cases on the page")
    seen.add_argument(
        "--questions", nargs="+", required=True, help="what the runs were evaluated on"
    )
    seen.add_argument("--images", default=".", help="image root")
    seen.add_argument("--out", default="cases.html", help="page to write")
    seen.set_defaults(act=show_cases)
    many = commands.add_parser(
        "report", help="the stages of a run of the method: table, curves, pairs"
    )
    many.add_argument(
        "--results", nargs="+", required=True, help="folders of `run`, in the order of the stages"
    )
    many.add_argument("--sft", default="", help="Stage I folder, for its curves")
    many.add_argument("--dpo", default="", help="Stage II folder, for its curves")
    many.add_argument(
        "--pairs", default="",
        help="folder of judge.py pairs, for the sheet of films and the report",
    )  # fmt: skip
    many.add_argument("--images", default=".", help="image root")
    many.add_argument("--out", required=True, help="folder to write")
    many.set_defaults(act=report)
    over = commands.add_parser("claims", help="what several runs of the demo show, with intervals")
    over.add_argument("--runs", nargs="+", required=True, help="run folders")
    over.add_argument("--out", default="CLAIMS.md", help="file to write")
    over.set_defaults(act=claims)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    args.act(args)


if __name__ == "__main__":
    flags.run_script(main)
