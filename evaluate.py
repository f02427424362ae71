"""Numbers that survive review (paper §4): accuracy, criteria, majority vote, pass@n, and the tables and figures.

    accuracy   mean over questions of the share of right samples; its standard error is over questions
    MV@n       the answer most of n samples agree on; unreadable ones abstain; ties go to the earliest sampled
    pass@n     1 - C(N - c, n) / C(N, n): unbiased, from N samples of which c are right           (paper §4.3, Fig. 6)

An answer that cannot be read, or that was cut off, is wrong and stays in the denominator; how many is printed beside.

    python evaluate.py run --engine hf:out/dpo/merged --questions test.jsonl --images . -n 32 --judge clinic:judge --out out/eval-stage2
    python evaluate.py report --results out/eval-base out/eval-stage1 out/eval-stage2 --out out/report ...

run reads questions.jsonl; writes OUT/predictions.jsonl, OUT/verdicts.jsonl (with --judge), OUT/results.json, OUT/stage.json
report reads results and, for the plots, the stages' own files; writes table.md, report.png, films.png

Where we depart from the paper, or it is silent:
  1. T = 0.5 is the paper's for majority vote and pass@n; its main tables name no decoding. Ours: the same samples serve
     all figures, so MV@1 = pass@1 = accuracy.
  2. For n below N, MV@n is a mean over seeded subsets (the paper may have used the first n).
  3. With --judge every chain on an image question is judged, right or wrong, so that a stage cannot look better by
     answering less.
"""

import argparse
import json
import math
import random
import statistics
import sys
import time
from collections import Counter
from pathlib import Path

import data
from asking import Sampling, add_flags, ask_all, question_asks, reply_row, setup_of
from engines import checkpoint, open_engine
from judge import CRITERIA, judge_all, print_report

SUBSETS = 100  # ours: seeded subsets behind MV@n


# ---------------------------------------------------------------------------------------------------------------
# Statistics


def pass_at(n: int, samples: int, right: int) -> float:
    """Chance that a random n of the samples hold a right one. Raises ValueError for n > samples."""
    if n > samples:
        raise ValueError(f"pass@{n} needs at least {n} samples, there are {samples}")
    return 1.0 - math.comb(samples - right, n) / math.comb(samples, n)


def majority(choices: list[str | None]) -> str | None:
    """The commonest readable choice; of tied ones the earliest sampled; None if all abstain."""
    counts = Counter(choice for choice in choices if choice is not None)  # keeps the order of first appearance
    return counts.most_common(1)[0][0] if counts else None


def majority_at(n: int, choices: list[str | None], answer: str, seed: int) -> float:
    """Share of random n-subsets of the samples, in their order, whose majority is right."""
    if n == len(choices):
        return float(majority(choices) == answer)
    if n == 1:
        return sum(choice == answer for choice in choices) / len(choices)
    rng = random.Random(seed)
    subsets = (sorted(rng.sample(range(len(choices)), n)) for _ in range(SUBSETS))
    return sum(majority([choices[i] for i in subset]) == answer for subset in subsets) / SUBSETS


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean over questions and its standard error."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return statistics.fmean(values), error


def powers_of_two(most: int) -> list[int]:
    return [1 << k for k in range(most.bit_length()) if 1 << k <= most]


# ---------------------------------------------------------------------------------------------------------------
# run


def summarise(rows: list[dict], questions: list[data.Question], criteria: dict[tuple, dict | None]) -> dict:
    """All figures of one group of questions with equally many samples. criteria: (id, sample) -> verdict or None."""
    by_id: dict[str, list[dict]] = {}
    for row in rows:
        by_id.setdefault(row["id"], []).append(row)
    accuracy, error = mean_and_error([statistics.fmean(row["correct"] for row in by_id[q.id]) for q in questions])
    samples = len(by_id[questions[0].id])
    figures = {
        "questions": len(questions), "samples": samples, "accuracy": accuracy, "standard_error": error,
        "unparsed": statistics.fmean(row["extracted"] is None for row in rows),
        "cut_off": statistics.fmean(row["finish_reason"] != "stop" for row in rows),
        "words": statistics.fmean(len(row["response"].split()) for row in rows),
        "majority": {}, "pass": {},
    }  # fmt: skip
    for n in powers_of_two(samples):
        votes = [majority_at(n, [row["extracted"] for row in by_id[q.id]], q.answer, data.sample_seed(0, q.id, n)) for q in questions]
        passes = [pass_at(n, samples, sum(row["correct"] for row in by_id[q.id])) for q in questions]
        figures["majority"][str(n)], figures["pass"][str(n)] = mean_and_error(votes), mean_and_error(passes)
    judged = [criteria[row["id"], row["sample"]] for row in rows if criteria.get((row["id"], row["sample"]))]
    if judged:
        figures["judged"] = len(judged)
        figures["criteria"] = {name: statistics.fmean(verdict[name] for verdict in judged) for name in CRITERIA}
        per_question = [statistics.fmean(all(criteria[r["id"], r["sample"]][name] for name in CRITERIA) for r in by_id[q.id] if criteria.get((r["id"], r["sample"]))) for q in questions if any(criteria.get((r["id"], r["sample"])) for r in by_id[q.id])]
        figures["all_criteria"], figures["all_criteria_error"] = mean_and_error(per_question)
        looking = [verdict for verdict in judged if verdict["Image_Analysis_Involvement"]]
        figures["looking"] = len(looking)
        # among chains that look at the image: one that never looks cannot see things that are not there
        figures["hallucinated"] = statistics.fmean(not verdict["No_Hallucination"] for verdict in looking) if looking else None
    return figures


def choice_of(response: str, question: data.Question) -> str | None:
    """What votes are counted by: the letter or, open-ended, the normalised answer (the reference as it is written, where equal)."""
    if question.options:
        return data.extract_choice(response, question.options)
    said = data.normalise(data.answer_block(response) or "")
    return question.answer if said == data.normalise(question.answer) else said or None


def run(args: argparse.Namespace) -> None:
    started, out, image_root = time.time(), Path(args.out), Path(args.images)
    out.mkdir(parents=True, exist_ok=True)
    by_id = {question.id: question for path in args.questions for question in data.read_questions(path)}
    questions = list(by_id.values())
    groups = {"image": [q for q in questions if q.images], "text": [q for q in questions if not q.images]}
    asks = question_asks(groups["image"], image_root, args.n) + question_asks(groups["text"], image_root, args.n_text or args.n)
    sampling = Sampling(args.temperature, args.top_p, args.max_tokens, args.seed)
    path = out / "replies.jsonl"
    data.settle(path, {"engine": args.engine, **vars(sampling), "pixels": args.pixels, "tiles": args.tiles})
    engine = open_engine(args.engine, setup_of(args))
    rows = []
    for kind in ("image", "text"):  # apart, so that a batch has one number of samples a question
        part = [ask for ask in asks if bool(by_id[ask.id].images) == (kind == "image")]
        rows += ask_all(engine, part, sampling, path, lambda reply: reply_row(reply, args.engine), f"{kind} questions")
    for row in rows:
        question, finished = by_id[row["id"]], row["finish_reason"] == "stop"
        row["correct"] = finished and data.is_correct(row["response"], question)
        row["extracted"] = choice_of(row["response"], question) if finished else None
    data.write_jsonl(out / "predictions.jsonl", rows)

    criteria, outputs = {}, [out / "predictions.jsonl", out / "results.json"]
    if args.judge:
        judge = open_engine(args.judge, setup_of(args))
        settings = {"seed": args.seed, "pixels": args.pixels, "tiles": args.tiles}
        verdicts = judge_all(judge, [row for row in rows if by_id[row["id"]].images], by_id, image_root, out / "judge", settings)
        data.write_jsonl(out / "verdicts.jsonl", verdicts)
        criteria = {(row["id"], row["sample"]): row["criteria"] for row in verdicts}
        outputs.append(out / "verdicts.jsonl")
    results: dict = {"name": args.name or out.name, "engine": args.engine, "sampling": vars(sampling), "groups": {}, "subsets": {}}
    for kind, members in groups.items():
        if members:
            ids = {q.id for q in members}
            results["groups"][kind] = summarise([row for row in rows if row["id"] in ids], members, criteria)
    for key in ("modality", "kind"):
        for value in sorted({q.meta[key] for q in groups["image"] if key in q.meta}):
            members = [q for q in groups["image"] if q.meta.get(key) == value]
            ids = {q.id for q in members}
            results["subsets"][f"{key}={value}"] = summarise([row for row in rows if row["id"] in ids], members, criteria)
    data.write_json(out / "results.json", results)
    for kind, figures in results["groups"].items():
        print(f"{results['name']}: {kind} accuracy {figures['accuracy']:.3f} +- {figures['standard_error']:.3f} on {figures['questions']} questions x {figures['samples']}, unparsed {figures['unparsed']:.3f}, cut off {figures['cut_off']:.3f}")
    inputs = [*args.questions, *filter(None, [checkpoint(args.engine)])]
    data.write_stage(out, args, inputs, outputs, started)


# ---------------------------------------------------------------------------------------------------------------
# report


def table(results: list[dict]) -> str:
    """Table 1 in miniature, as Markdown that is also aligned for a terminal: one column a stage, one row a figure."""
    columns = [["", *(label for label, _ in ROWS)]]
    for result in results:
        image, text = result["groups"].get("image", {}), result["groups"].get("text", {})
        cells = []
        for _, value in ROWS:
            try:
                cells.append(value(image, text))
            except (KeyError, TypeError):  # the run had no such questions, or no judge
                cells.append("–")
        columns.append([result["name"], *cells])
    widths = [max(map(len, column)) for column in columns]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in zip(*columns)]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


ROWS = (
    ("image questions, accuracy", lambda image, text: f"{image['accuracy']:.3f} ± {image['standard_error']:.3f}"),
    ("… majority vote", lambda image, text: "{1[0]:.3f} (n = {0})".format(*list(image["majority"].items())[-1])),
    ("… any right (pass@n)", lambda image, text: "{1[0]:.3f} (n = {0})".format(*list(image["pass"].items())[-1])),
    ("text questions, accuracy", lambda image, text: f"{text['accuracy']:.3f} ± {text['standard_error']:.3f}"),
    ("chains that meet all four criteria", lambda image, text: f"{image['all_criteria']:.3f} ± {image['all_criteria_error']:.3f}"),
    *((f"… {name.replace('_', ' ')}", lambda image, text, name=name: f"{image['criteria'][name]:.3f}") for name in CRITERIA),
    ("hallucinate, of those that look", lambda image, text: f"{image['hallucinated']:.3f} of {image['looking']}"),
    ("answers that cannot be read", lambda image, text: f"{image['unparsed']:.3f}"),
    ("answers cut off", lambda image, text: f"{image['cut_off']:.3f}"),
)


def plot_report(results: list[dict], sft: list[dict], dpo: list[dict], path: Path) -> None:
    """Accuracy and criteria by stage, training curves, majority vote and pass@n."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams["axes.titlesize"] = 10
    results = [result for result in results if "image" in result["groups"]]
    names, shades = [result["name"] for result in results], ["#b0b0b0", "#5b8db8", "#c0504d", "#4f9d69", "#8064a2"] * len(results)
    figure, axes = plt.subplots(2, 3, figsize=(15, 8.5), constrained_layout=True)
    ax = axes[0, 0]
    for offset, kind in ((-0.2, "image"), (0.2, "text")):
        groups = [result["groups"].get(kind) for result in results]
        for x, (group, shade) in enumerate(zip(groups, shades)):
            if group:
                ax.bar(x + offset, group["accuracy"], 0.38, yerr=1.96 * group["standard_error"], color=shade, hatch=None if kind == "image" else "//", edgecolor="white", capsize=3)
                ax.text(x + offset, group["accuracy"] + 1.96 * group["standard_error"] + 0.012, f"{group['accuracy']:.2f}", ha="center", fontsize=9)
    ax.axhline(0.25, color="black", lw=0.8, ls=":")
    ax.set(title="accuracy (plain: image, hatched: text; bars 95 %; dotted: chance)", xticks=range(len(names)), xticklabels=names, ylim=(0, 1.08))
    ax = axes[0, 1]
    labels = [*CRITERIA, "all four"]
    for i, result in enumerate(results):
        image = result["groups"]["image"]
        if "criteria" in image:
            values = [image["criteria"][name] for name in CRITERIA] + [image["all_criteria"]]
            ax.bar([x + (i - 1) * 0.27 for x in range(len(labels))], values, 0.25, color=shades[i], label=result["name"])
    ax.set(title="share of chains meeting each criterion (image questions)", xticks=range(len(labels)), xticklabels=[name.replace("_", "\n") for name in labels], ylim=(0, 1.15))
    ax.tick_params(axis="x", labelsize=8)
    ax.legend(frameon=False, loc="upper center", ncol=3, fontsize=8)
    ax = axes[0, 2]
    looking = [(i, r["groups"]["image"]["hallucinated"], r["groups"]["image"]["looking"]) for i, r in enumerate(results) if r["groups"]["image"].get("hallucinated") is not None]
    for i, value, count in looking:
        ax.bar(i, value, 0.5, color=shades[i])
        ax.text(i, value + 0.012, f"{value:.2f}\n{count} chains", ha="center", fontsize=9)
    ax.set(title="hallucination among chains that look at the image", xticks=range(len(names)), xticklabels=names, ylim=(0, 1.05))
    ax = axes[1, 0]
    for name, colour in (("think", "#4f9d69"), ("answer", "#31a0b5"), ("tag", "#c9a227")):
        ax.plot([row["step"] + 1 for row in sft], [row[name] for row in sft], color=colour, label=name, lw=1.2)
    ax.set(title="Stage I: loss per token of each span", xlabel="step", yscale="log")
    ax.legend(frameon=False)
    ax = axes[1, 1]
    steps = [row["step"] + 1 for row in dpo]
    ax.plot(steps, [row["loss"] for row in dpo], color="#c0504d", label="loss")
    ax.plot(steps, [row["margin"] for row in dpo], color="#5b8db8", label="reward margin")
    ax.plot(steps, [row["accuracy"] for row in dpo], color="#8a8a8a", label="pairs in the right order", lw=1)
    ax.axhline(math.log(2), color="black", lw=0.8, ls=":")
    ax.set(title="Stage II: DPO (dotted: ln 2)", xlabel="step")
    ax.legend(frameon=False)
    ax = axes[1, 2]
    for result, shade in zip(results, shades):
        for key, style in (("majority", "-o"), ("pass", "--^")):
            curve = result["groups"]["image"][key]
            x, y = [int(n) for n in curve], [value for value, _ in curve.values()]
            ax.plot(x, y, style, color=shade, ms=4, label=f"{result['name']}, {'MV@n' if key == 'majority' else 'pass@n'}")
            ax.fill_between(x, [v - 1.96 * e for v, e in curve.values()], [v + 1.96 * e for v, e in curve.values()], color=shade, alpha=0.12)
    ax.set_xscale("log", base=2)
    ax.set(title="majority vote and pass@n, image questions (bands 95 %)", xlabel="n", xticks=x, xticklabels=x, ylim=(0, 1.02))
    ax.legend(frameon=False, fontsize=7, ncol=3, loc="lower right")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_films(pairs: list[dict], image_root: Path, path: Path) -> None:
    """A sheet of preference pairs: the image, the question, the chosen chain beside the rejected one and why it failed."""
    import textwrap

    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from PIL import Image

    shown: dict[str, dict] = {}  # one pair a question: one of each failure first, then whatever there is
    for reason in [*CRITERIA, *[None] * (6 - len(CRITERIA))]:
        rest = (row for row in pairs if row["id"] not in shown and row["images"] and (reason is None or reason in row["failed"]))
        shown |= {row["id"]: row for row in [next(rest, None)] if row}
    if not shown:
        return
    figure, axes = plt.subplots(len(shown), 4, figsize=(16, 2.1 * len(shown)), gridspec_kw={"width_ratios": [1, 2, 3, 3]}, constrained_layout=True, squeeze=False)
    for row, (film, asked, chosen, rejected) in zip(shown.values(), axes):
        film.imshow(Image.open(image_root / row["images"][0]))
        texts = ((asked, row["prompt"][-1]["content"], "question", "black"), (chosen, row["chosen"], "chosen: meets all four", "#2e7d4f"), (rejected, row["rejected"], "rejected: fails " + ", ".join(row["failed"]), "#b03a2e"))
        for ax, text, title, colour in texts:
            width = 36 if ax is asked else 56
            wrapped = "\n".join(textwrap.fill(line, width) for line in text.split("\n"))
            ax.text(0, 1, wrapped.replace("$", r"\$"), va="top", fontsize=9, family="monospace")
            ax.set_title(title.replace("_", " "), loc="left", fontsize=9, color=colour)
        for ax in (film, asked, chosen, rejected):
            ax.axis("off")
    figure.savefig(path, dpi=90)
    plt.close(figure)


def report(args: argparse.Namespace) -> None:
    started, out = time.time(), Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    results = [json.loads((Path(folder) / "results.json").read_text()) for folder in args.results]
    text = table(results)
    (out / "table.md").write_text(text + "\n")
    outputs, inputs = [out / "table.md"], [Path(folder) / "results.json" for folder in args.results]
    if args.sft and args.dpo:
        plot_report(results, data.read_metrics(args.sft), data.read_metrics(args.dpo), out / "report.png")
        outputs.append(out / "report.png")
    if args.pairs:
        plot_films([row for _, row in data.read_jsonl(Path(args.pairs) / "pairs.jsonl")], Path(args.images), out / "films.png")
        outputs += [out / "films.png"] if (out / "films.png").exists() else []
        inputs.append(Path(args.pairs) / "pairs.jsonl")
        print_report(json.loads((Path(args.pairs) / "report.json").read_text()))
    print("\n" + text)
    data.write_stage(out, args, inputs, outputs, started)


# ---------------------------------------------------------------------------------------------------------------
# claims

RESAMPLES = 2000  # ours: bootstrap over questions


def per_question(folder: Path) -> dict[str, dict[str, float]]:
    """{id: figures} of the image questions of one evaluation. Shares are kept as (sum, count) pairs, to be resampled."""
    by_id: dict[str, dict] = {}
    rows = {(row["id"], row["sample"]): row for _, row in data.read_jsonl(folder / "predictions.jsonl")}
    for _, row in data.read_jsonl(folder / "verdicts.jsonl"):
        prediction, criteria = rows[row["id"], row["sample"]], row["criteria"]
        entry = by_id.setdefault(row["id"], {"right": 0, "samples": 0, "judged": 0, "all": 0, "looking": 0, "false": 0, "choices": []})
        entry["samples"] += 1
        entry["right"] += prediction["correct"]
        entry["choices"].append((prediction["extracted"], prediction["correct"]))
        if criteria:
            entry["judged"] += 1
            entry["all"] += all(criteria[name] for name in CRITERIA)
            entry["looking"] += criteria["Image_Analysis_Involvement"]
            entry["false"] += criteria["Image_Analysis_Involvement"] and not criteria["No_Hallucination"]
    for entry in by_id.values():
        vote = majority([choice for choice, _ in entry["choices"]])
        entry["vote"] = float(any(right for choice, right in entry["choices"] if choice == vote and vote is not None))
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
    seen = [{name: per_question(run / name) for name in ("eval-base", "eval-stage1", "eval-stage2")} for run in runs]
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
    Path(args.out).write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Evaluate a model, or report on several evaluations.")
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("run", help="ask an engine and score its answers")
    one.add_argument("--engine", required=True, help="engine spec of the model")
    one.add_argument("--questions", nargs="+", required=True)
    one.add_argument("--images", default=".", help="image root")
    one.add_argument("--out", required=True, help="folder to write")
    one.add_argument("--name", default="", help="how tables call it; default: the folder's name")
    one.add_argument("-n", type=int, default=1, help="samples of a question; the paper's MV@n and pass@n use 32")
    one.add_argument("--n-text", type=int, default=0, help="samples of a question without images; 0: as -n")
    one.add_argument("--temperature", type=float, default=0.5)  # paper 4.3
    one.add_argument("--top-p", type=float, default=1.0)  # ours: paper silent
    one.add_argument("--max-tokens", type=int, default=8192)  # ours: paper silent
    one.add_argument("--judge", default="", help="engine spec; judges every chain on an image question")
    add_flags(one)
    one.add_argument("--seed", type=int, default=0)
    one.set_defaults(run=run)
    many = commands.add_parser("report", help="tables and plots over several results")
    many.add_argument("--results", nargs="+", required=True, help="folders of `run`, in the order of the stages")
    many.add_argument("--sft", default="", help="Stage I folder, for its curves")
    many.add_argument("--dpo", default="", help="Stage II folder, for its curves")
    many.add_argument("--pairs", default="", help="folder of judge.py pairs, for the sheet of films and the report")
    many.add_argument("--images", default=".", help="image root")
    many.add_argument("--out", required=True, help="folder to write")
    many.set_defaults(run=report)
    over = commands.add_parser("claims", help="what several runs of the demo show, with intervals")
    over.add_argument("--runs", nargs="+", required=True, help="run folders")
    over.add_argument("--out", default="CLAIMS.md", help="file to write")
    over.set_defaults(run=claims)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    args.run(args)


if __name__ == "__main__":
    main(sys.argv[1:])
