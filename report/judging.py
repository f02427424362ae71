"""How good is a judge? Its verdicts against the miniature's truth, and two judges side by side.

    sensitivity   share of Yes where the truth is Yes      specificity   share of No where it is No
    kappa         Cohen's, of judge and truth
    moves         share of verdicts that change when another film is shown, beside the share of
                  truths that do: a verdict that does not move was not looked for
    gap           the first judge's share of Yes less the second's, on the same chains. If the first
                  made the preferences, a gap that grows with Stage II is over-optimisation.

    python -m report judge --judge gemini:gemini-2.5-pro --questions runs/demo/world/test.jsonl \\
        --chains runs/demo/eval-stage2/predictions.jsonl --images runs/demo/world --out runs/judge
    python -m report judges --first runs/7b/eval-stage1 runs/7b/eval-stage2 \\
        --second other/eval-stage1 other/eval-stage2

reads rows of rollout.py or evaluate.py; `judge` writes OUT/judge.json and OUT/stage.json, `judges`
writes nothing.

Where we depart from the paper, or it is silent: it compares its judge with raters (report/
agreement.py). The miniature knows the truth of every chain.
"""

import argparse
import random
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

import data
import judge
import looking
from clinic import roles
from command import schema, stage
from engines import bill, inference, open_engine
from judge import CRITERIA
from report import agreement, score, tables

Verdicts = list[dict[str, bool] | None]  # of each chain, None where it could not be read


def truths(chains: list[dict], asked: dict[str, data.Question], root: Path) -> Verdicts:
    """What a judge without errors says of each chain about a film."""
    found = []
    for row in chains:
        question = asked[row["id"]]
        text, films = data.question_text(question), inference.image_paths(question, root)
        case, kind, options = roles.understand(text, films)
        given = roles.verdict(case, kind, options, question.answer, row["response"])
        found.append({name: given[name] for name in CRITERIA})
    return found


def measure(said: Verdicts, true: Verdicts, said_other: Verdicts, true_other: Verdicts) -> dict:
    """{criterion: figures} over the chains whose verdicts could be read. The last two are about
    the same chains with another film."""
    read = [i for i, one in enumerate(said) if one]
    both = [i for i in read if said_other[i]]
    figures = {}
    for name in CRITERIA:
        given = np.array([said[i][name] for i in read], dtype=bool)
        truth = np.array([true[i][name] for i in read], dtype=bool)
        figures[name] = {
            "sensitivity": share(given[truth]),
            "specificity": share(~given[~truth]),
            "kappa": agreement.kappa(given, truth) if len(read) else None,
            "moves": share(np.array([said[i][name] != said_other[i][name] for i in both])),
            "truth_moves": share(np.array([true[i][name] != true_other[i][name] for i in both])),
        }
    return figures


def share(values: np.ndarray) -> list[float] | None:
    """[share of True, low, high], or None of no values."""
    if not len(values):
        return None
    mean = float(values.mean())
    return [mean, *score.wilson(mean, len(values))]


def cell(value) -> str:
    if value is None:
        return "–"
    return tables.interval(value) if isinstance(value, list) else f"{value:.2f}"


def table(figures: dict) -> str:
    heads = ["sensitivity", "specificity", "kappa", "moves", "truth_moves"]
    rows = [["criterion", *(head.replace("_", " ") for head in heads)]]
    rows += [[name, *(cell(found[head]) for head in heads)] for name, found in figures.items()]
    return tables.markdown(rows)


def judge_films(args: argparse.Namespace) -> None:
    """`judge`: an engine's verdicts on chains about films, against the truth."""
    started, root = time.time(), Path(args.images)
    questions = [one for one in schema.read_questions(args.questions) if one.images]
    swaps = looking.swap(questions, root, args.seed)
    own = {one.id: one for one in questions if one.id in swaps}
    rows = [row for _, row in data.read_jsonl(args.chains) if row["id"] in own]
    # a text that was sampled several times has one verdict, and counts once
    texts = {agreement.chain_of(row): row for row in rows if row["response"].strip()}
    chains = random.Random(args.seed).sample(list(texts.values()), min(args.n, len(texts)))
    print(f"{len(chains)} of {len(texts)} texts; {len(questions) - len(own)} questions not swapped")
    if not chains:
        raise data.RowError(f"{args.chains}: no chain about an image of {args.questions}")
    other = {key: replace(one, images=swaps[key]) for key, one in own.items()}
    inputs = [args.chains, args.questions, *filter(None, [inference.checkpoint(args.judge)])]
    films = data.image_files(root, map(vars, questions))
    if not stage.open_folder(args, inputs, inference.FREE, films):
        return
    answered_by = inference.identity(args.judge)  # its folder may be trained anew
    letters = [(own[row["id"]], len(row["response"])) for row in chains]
    bill.announce([judge.cost(letters * 2, args)], args.images_may_leave)
    engine = open_engine(args.judge, inference.setup_of(args))
    said, true = [], []
    for asked in (own, other):
        verdicts = judge.judge_chains(engine, chains, asked, args)
        said.append([row["criteria"] for row in verdicts])
        true.append(truths(chains, asked, root))
    figures = measure(said[0], true[0], said[1], true[1])
    unread = sum(one is None for one in said[0])
    found = {"judge": args.judge, "chains": len(chains), "unreadable": unread, "criteria": figures}
    data.write_json(Path(args.out) / "judge.json", found)
    print(f"{args.judge}: {len(chains)} chains, {unread} verdicts unreadable\n{table(figures)}")
    outputs = [Path(args.out) / "judge.json"]
    stage.finish(args, outputs, started, {}, {args.judge: answered_by})


def judges(args: argparse.Namespace) -> None:
    """`judges`: two judges on the same chains, stage by stage and criterion by criterion."""
    if len(args.first) != len(args.second):
        raise data.RowError("--first and --second: name as many folders, stage by stage")
    head = ["stage", "criterion", "chains", "Yes of the first", "of the second", "gap"]
    rows = [[*head, "agreement", "kappa"]]
    for folders in zip(args.first, args.second):
        first, second = (
            {(row["id"], row["response_sha"]): row["criteria"] for _, row in data.read_jsonl(path)}
            for path in (Path(folder) / "verdicts.jsonl" for folder in folders)
        )
        keys = [key for key in first if first[key] and second.get(key)]
        if not keys:
            raise data.RowError(f"{' and '.join(folders)}: no chain that both judges read")
        for name in (*CRITERIA, "all"):
            wanted = CRITERIA if name == "all" else (name,)
            one, two = (
                np.array([all(side[key][criterion] for criterion in wanted) for key in keys])
                for side in (first, second)
            )
            yes = one.mean(), two.mean(), one.mean() - two.mean()
            found = [*yes, (one == two).mean(), agreement.kappa(one, two)]
            cells = (cell(None if x is None else float(x)) for x in found)
            rows.append([Path(folders[0]).name, name, str(len(keys)), *cells])
    print(tables.markdown(rows))
