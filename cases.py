"""One case at a time: a question, its images and each run's chain side by side, as one page (paper 4.4, Figures 7, 8, 9).

A figure says how often, a case says how. The page holds the cases on which runs fare as asked; the paper's Figure 9 shows
a question that Stage I gets wrong and Stage II right:

    python evaluate.py cases runs/stage1 runs/stage2 --only stage1-wrong,stage2-right -n 20 --questions test.jsonl --images . --out cases.html

All conditions must hold; none at all takes every question. Each is NAME-OUTCOME with the name of a run (which may hold
dashes and blanks, no comma), and speaks of the first sample, whose chain lies open:

    right, wrong                      every answer is one of the two: what cannot be read or was cut off is wrong
    unreadable, cut, unanswered       wrong for this reason: no choice can be read, the token limit, there is no answer
    right-majority, wrong-majority    the majority of all samples, by score.vote

Only questions put to every run count, in the order of the questions. Each answer names what its row in predictions.jsonl
is found by. The page stands alone: images lie in it, it loads and runs nothing, and what a model wrote stands there as text.

reads RUN/results.json (name, entries as score.py defines them), RUN/predictions.jsonl and, if judged, RUN/verdicts.jsonl

Where we depart from the paper, or it is silent: it marks hallucinations by hand (Figure 9, in blue). Ours shows the judge's
verdict beside each chain, the whole chain, and the first cases that meet the conditions instead of picked ones.
"""

import base64
import html
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import data
import score
import stage
from asking import image_paths

FILES = ("results.json", "predictions.jsonl", "verdicts.jsonl")  # of a run, that are read here
LONGEST, SMALL = 900, 256  # ours: pixels of an image's longer side: at most, and up to which it is kept exactly and enlarged
# ours: what became of an answer, as a reader is told it
OUTCOMES = {"right": "✓ right", "wrong": "✗ wrong", "unreadable": "? unreadable (wrong)", "cut": "✂ cut off (wrong)", "unanswered": "– no answer (wrong)"}
CONDITION = re.compile(rf"(.+)-(?:(right|wrong)-majority|({'|'.join(OUTCOMES)}))", re.S)


@dataclass
class Run:
    """One evaluation. entries: by question id, as score.entry makes them."""

    name: str
    folder: Path
    entries: dict[str, dict]
    open_ended: bool = False  # asked without options


def read_run(folder: str | Path) -> Run:
    """A run's results. Raises RowError if they are not there, or are without entries."""
    results = score.read_results(folder, {"name": str, "entries": list})
    return Run(results["name"], Path(folder), {entry["id"]: entry for entry in results["entries"]}, bool(results.get("open_ended")))


def where_is(path: Path, key: tuple[str, int]) -> str:
    """The file and line of a sample."""
    return next(w for w, row in data.read_jsonl(path) if (row["id"], row["sample"]) == key)


def read_samples(run: Run, wanted: dict[str, data.Question]) -> dict[str, list[tuple[dict, dict | None]]]:
    """(prediction, verdict or None) of each sample of the wanted questions, in the order of the samples. Raises RowError where
    results, predictions and verdicts do not speak of the same answers."""
    verdicts, rows, path = {}, {id: [] for id in wanted}, run.folder / "predictions.jsonl"
    if (judged := run.folder / "verdicts.jsonl").exists():
        verdicts = {(row["id"], row["sample"]): row for row in data.read_rows(judged, "verdicts")}
    for row in data.checked_rows(path, "rollouts"):  # not all at once: token ids are gigabytes
        if isinstance(row, data.RowError):
            raise row
        if row["id"] in wanted:
            row.pop("token_ids", None)  # most of a row, and not shown
            key, verdict = (row["id"], row["sample"]), verdicts.get((row["id"], row["sample"]))
            if lacking := [name for name in ("engine", "seed", "correct") if name not in row]:
                said = f"missing '{lacking[0]}'; evaluate this run again"
                raise data.RowError(f"{where_is(path, key)}: {said}")
            if verdict and verdict["response_sha"] != row["response_sha"]:
                said = f"the verdict on sample {row['sample']} of question {row['id']}"
                raise data.RowError(
                    f"{where_is(path, key)}: {said} is on another text; judge this run again"
                )
            rows[row["id"]].append(row)
    for id, question in wanted.items():
        rows[id].sort(key=lambda row: row["sample"])
        entry = run.entries[id]
        if [row["correct"] for row in rows[id]] != entry["right"]:
            raise data.RowError(f"{path}: question {id}: not the answers that results.json counts; evaluate this run again")
        if entry["answer"] != question.answer or (question.options and not set(entry["choices"]) <= {None, *question.options}):
            raise data.RowError(f"{path}: question {id}: was put with another reference or other options; give the --questions that the run was evaluated on")
    return {id: [(row, verdicts.get((id, row["sample"]))) for row in found] for id, found in rows.items()}


# ---------------------------------------------------------------------------------------------------------------
# Which cases


def outcome(entry: dict, k: int) -> str:
    """What became of sample k: a key of OUTCOMES."""
    if entry["right"][k]:
        return "right"
    if entry["ended"][k] != "stop":
        return "cut" if entry["ended"][k] == "length" else "unanswered"
    return "unreadable" if entry["choices"][k] is None else "wrong"


def tally(entries: list[dict], samples: Iterable[int]) -> str:
    """How these samples of these questions came out, in words."""
    counts = Counter(outcome(entry, k) for entry in entries for k in samples)
    return ", ".join(f"{counts[key]} {words}" for key, words in OUTCOMES.items() if counts[key])


def parse_only(only: str, runs: list[Run]) -> list[tuple[str, str, bool]]:
    """(run's name, outcome, whether the majority's) of each condition. Raises RowError for what is no condition on these runs."""
    found, names = [], [run.name for run in runs]
    for text in filter(None, map(str.strip, only.split(","))):
        match = CONDITION.fullmatch(text)
        if not match or match[1] not in names:
            outcomes = [*OUTCOMES, "right-majority", "wrong-majority"]
            raise data.RowError(f"--only: {text!r} is not NAME-OUTCOME with a name of {names} and an outcome of {outcomes}")
        found.append((match[1], match[2] or match[3], bool(match[2])))
    return found


def meets(entry: dict, wanted: str, by_majority: bool) -> bool:
    if by_majority:
        return score.vote(entry["choices"], entry["right"]) == (wanted == "right")
    found = outcome(entry, 0)
    return found == wanted or (wanted == "wrong" and found != "right")


# ---------------------------------------------------------------------------------------------------------------
# The page. Every text that is not ours passes html.escape.


def chain_html(response: str) -> str:
    """A response with its spans marked, every character kept: think, answer, the tags, and what lies outside any block."""
    edges = sorted({0, len(response), *(edge for tag in data.TAGS.finditer(response) for edge in tag.span())})
    parts, pieces = list(zip(edges, edges[1:])), []
    for (start, end), label in zip(parts, data.label_spans(response, parts)):
        text = response[start:end]
        kind = data.SPAN_NAMES[label]
        if kind == "tag" and not data.TAGS.fullmatch(text):
            kind = "outside" if text.strip() else "tag"
        pieces.append(f'<span class="{kind}">{html.escape(text)}</span>')
    return f'<div class="chain" dir="auto">{"".join(pieces) or "<em>(empty)</em>"}</div>'


def image_html(path: Path, name: str, alt: str) -> str:
    """One image inside the page, as small as it may be. Raises RowError naming the file if it cannot be read."""
    from images import load_image

    image, buffer = load_image(path), BytesIO()
    image.thumbnail((LONGEST, LONGEST))
    times = SMALL // max(image.size)  # 0: not small
    kind = "PNG" if times else "JPEG"
    image.save(buffer, kind, quality=85)  # ours
    shown = f'width="{image.width * max(1, times)}" height="{image.height * max(1, times)}" alt="{html.escape(alt)}"'
    source = f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return f'<figure><img class="{kind.lower()}" {shown} src="{source}"><figcaption>{html.escape(name)}</figcaption></figure>'


def verdict_html(verdict: dict | None) -> str:
    if verdict is None:
        return ""
    if verdict["criteria"] is None:
        return f'<p class="facts">no verdict: {html.escape(str(verdict["error"]))}</p>'
    given = [(name.replace("_", " "), verdict["criteria"][name]) for name in score.CRITERIA]
    items = "".join(f'<li class="{"right" if met else "wrong"}">{"✓" if met else "✗"} {name}: {"yes" if met else "no"}</li>' for name, met in given)
    return f'<ul class="criteria" aria-label="the judge\'s four criteria">{items}</ul>'


def sample_html(entry: dict, k: int, row: dict, verdict: dict | None, options: dict[str, str]) -> str:
    """One answer: outcome, what was read, chain, the judge's criteria, and where the row is."""
    found, choice, rule = outcome(entry, k), entry["choices"][k], entry["official"]
    read = "nothing" if choice is None else f"({choice}) {options[choice]}" if options else choice
    official = f"; by the benchmark's own rule {rule['choices'][k] or 'nothing'}, {'right' if rule['right'][k] else 'wrong'}" if rule else ""
    facts = f"sample {row['sample']} · seed {row['seed']} · ended: {row['finish_reason']} · response {row['response_sha']} · {row['engine']}"
    return (
        f'<p class="outcome"><strong class="{found}">{OUTCOMES[found]}</strong>, read: {html.escape(read + official)}</p>'
        f'{chain_html(row["response"])}{verdict_html(verdict)}<p class="facts">{html.escape(facts)}</p>'
    )


def run_html(run: Run, question: data.Question, samples: list[tuple[dict, dict | None]]) -> str:
    """A run's answers to one question: the first open, the others folded."""
    entry = run.entries[question.id]
    first, *others = (sample_html(entry, k, row, verdict, question.options) for k, (row, verdict) in enumerate(samples))
    majority = "right" if score.vote(entry["choices"], entry["right"]) else "wrong"
    told = f"all {len(samples)} samples: {tally([entry], range(len(samples)))}; majority {majority}"
    folded = f"<details><summary>{told}</summary>{'<hr>'.join(others)}</details>" if others else ""
    return f"<section><h3>{html.escape(run.name)}</h3>{first}{folded}</section>"


def case_html(number: int, question: data.Question, image_root: Path, runs: list[Run], samples: list[dict]) -> str:
    """One case: what was asked, what the runs answered. samples: of each run, by id."""
    paths = image_paths(question, image_root)
    images = "".join(image_html(path, name, f"image {i} of {len(paths)} of case {number}") for i, (path, name) in enumerate(zip(paths, question.images), 1))
    items = ""
    for choice, text in (question.options or {question.answer: ""}).items():
        chosen = ", ".join(run.name for run in runs if run.entries[question.id]["choices"][0] == choice)
        marks = " · ".join(["✓ reference answer"] * (choice == question.answer) + [f"chosen by {chosen}"] * bool(chosen))
        kind = "option reference" if choice == question.answer else "option"
        items += f'<li class="{kind}">{html.escape(f"({choice}) {text}" if text else choice)} <small>{html.escape(marks)}</small></li>'
    about = " · ".join(filter(None, [f"id {question.id}", question.source, *(f"{key}: {value}" for key, value in question.meta.items())]))
    return (
        f'<article id="case-{number}"><h2>Case {number}</h2><p class="facts">{html.escape(about)}</p>'
        f'<div class="asked"><div class="images">{images}</div>'
        f'<div class="question"><p class="stem" dir="auto">{html.escape(question.question)}</p><ul>{items}</ul></div></div>'
        f'<div class="runs">{"".join(run_html(run, question, found[question.id]) for run, found in zip(runs, samples))}</div></article>'
    )


def header_html(runs: list[Run], common: list[data.Question], found: int, shown: int, asked: str) -> str:
    """What was selected from what, how each run fares on all of it, and how to read a chain."""
    fares = [f"{run.name}: {tally([run.entries[question.id] for question in common], [0])} · {run.folder}" for run in runs]
    listed = "".join(f"<li>{html.escape(told)}</li>" for told in fares)
    links = " ".join(f'<a href="#case-{number}">{number}</a>' for number in range(1, shown + 1))
    return (
        f"<h1>Cases</h1><p><strong>{html.escape(asked)}</strong>: {found} of the {len(common)} questions put to every run. "
        f"{'All' if shown == found else f'The first {shown}'} of them, in the order of the questions:</p><nav aria-label=\"cases\">{links}</nav>"
        f"<p>First samples of the runs, on all {len(common)} questions:</p><ul>{listed}</ul>"
        f"<p>How a chain is shown:</p>{chain_html('Something outside. <think> The reasoning. </think> <answer> The answer. </answer>')}"
        '<p class="facts">The other samples are folded below the first, and print only where opened.</p>'
    )


def write_page(
    runs: list[Run], questions: list[data.Question], image_root: str | Path, only: str, count: int,
    out: str | Path, read: Iterable[str] = (),
) -> int:  # fmt: skip
    """Writes the page of the first `count` cases that meet `only`; returns how many there are on it.

    Raises RowError for an unknown condition, runs of one name or without a common question, no case
    at all, a missing image; and where `out` is a file of the runs, an image or what else was
    `read`, or holds another page."""
    conditions, by_name = parse_only(only, runs), {run.name: run for run in runs}
    if len(by_name) < len(runs):
        raise data.RowError(f"runs of one name: {[run.name for run in runs]}; evaluate one of them under another --name")
    if len({run.open_ended for run in runs}) > 1:
        raise data.RowError("--results: some runs were asked with options and some without; show them on pages of their own")
    if runs[0].open_ended:
        questions = [question.opened() for question in questions]
    common = [question for question in questions if all(question.id in run.entries for run in runs)]
    if not common:
        held = ", ".join(f"{run.name} has {len(run.entries)}" for run in runs)
        raise data.RowError(f"none of the {len(questions)} questions was put to every run ({held}); give the --questions that the runs were evaluated on")
    met = [[meets(by_name[name].entries[question.id], *wanted) for question in common] for name, *wanted in conditions]
    chosen = [question for i, question in enumerate(common) if all(flags[i] for flags in met)]
    named = [f"{name}-{wanted}{'-majority' * by_majority}" for name, wanted, by_majority in conditions]
    if not chosen:
        alone = ", ".join(f"{text} {sum(flags)}" for text, flags in zip(named, met))
        raise data.RowError(f"--only: no question meets all conditions; of {len(common)} questions, each alone: {alone}")
    shown = chosen[:count]
    samples = [read_samples(run, {question.id: question for question in shown}) for run in runs]
    articles = [case_html(number, question, Path(image_root), runs, samples) for number, question in enumerate(shown, 1)]
    asked = " and ".join(named) or "every question"
    header = header_html(runs, common, len(chosen), len(shown), asked)
    page = PAGE.format(title=html.escape(asked), style=STYLE, header=header, cases="\n".join(articles))
    # half a surrogate pair, as of a folder's name, is no reason to stop; browsers drop a raw "\r"
    page = page.encode("utf-8", "xmlcharrefreplace").decode().replace("\r", "&#13;")
    files = [run.folder / name for run in runs for name in FILES]
    images = [path for question in shown for path in image_paths(question, Path(image_root))]
    stage.new_file(out, page, [*read, *files, *images])
    return len(shown)


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>Cases: {title}</title><style>{style}</style></head>
<body><header>{header}</header><main>
{cases}
</main></body></html>
"""

STYLE = """
:root { --paper: #fbfaf7; --card: #fff; --ink: #23262b; --dim: #63676e; --line: #dedad0;
  --right: #1c6a3a; --wrong: #a3281d; --think: #4f9d69; --answer: #2493a8; --outside: #8a5a00; }
@media screen and (prefers-color-scheme: dark) { :root { --paper: #15171a; --card: #1c1f23; --ink: #e4e2dc; --dim: #a1a5ac; --line: #363a40;
  --right: #7fcf9a; --wrong: #f2968b; --think: #5f9f76; --answer: #52acbe; --outside: #d9ab4e; color-scheme: dark; } }
body { margin: 0 auto; padding: 1.5rem; max-width: 100rem; overflow-wrap: anywhere; background: var(--paper); color: var(--ink);
  font: 1rem/1.55 system-ui, sans-serif; }
h1, h2, h3 { line-height: 1.25; margin: 0 0 .5rem; } p, ul { margin: .5rem 0; padding: 0; list-style: none; }
hr { border: 0; border-top: 1px solid var(--line); margin: 1.25rem 0; } a { color: inherit; padding: .1rem .4rem; } summary { cursor: pointer; }
article { margin-top: 2.5rem; padding-top: 1.5rem; border-top: 2px solid var(--line); } .facts, small, figcaption { color: var(--dim); font-size: .85rem; }
.asked, .images { display: flex; flex-wrap: wrap; gap: 1rem 1.5rem; max-width: 100%; } .question { flex: 1 1 24rem; min-width: 0; }
.images:empty { display: none; } figure { margin: 0; max-width: 28rem; } img { max-width: 100%; height: auto; } .png { image-rendering: pixelated; }
.stem, .chain, .option { white-space: pre-wrap; max-width: 52rem; } .stem { font-size: 1.1rem; margin-top: 0; }
.option { padding: .2rem .6rem; border-left: 3px solid transparent; } .reference { border-color: var(--right); font-weight: 600; }
.runs { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1rem; margin-top: 1rem; align-items: start; }
section { min-width: 0; padding: 1rem; background: var(--card); border: 1px solid var(--line); border-radius: 8px; }
.right { color: var(--right); } .wrong, .unreadable, .cut, .unanswered { color: var(--wrong); }
.criteria { display: flex; flex-wrap: wrap; gap: .2rem 1rem; font-size: .9rem; } .tag { color: var(--dim); font: .8rem ui-monospace, monospace; }
.think, .answer, .outside { display: block; margin: .15rem 0; padding: .1rem .8rem; border-left: 3px solid var(--think); }
.answer { border-left: 6px double var(--answer); font-weight: 600; } .outside { border-left: 3px dotted var(--outside); color: var(--outside); }
.outside::before { content: "outside any block"; display: block; font-size: .75rem; }
@media print { body { padding: 0; font-size: 10pt; } nav { display: none; } .runs { display: block; } section { margin-top: .5rem; }
  figure, ul { break-inside: avoid; } h2, h3, .outcome { break-after: avoid; } }
"""
