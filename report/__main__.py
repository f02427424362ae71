"""Looks at results: python -m report COMMAND --help

compare   each run against the one before it         table, plot   beside the paper's
cases     single cases side by side                  page          the stages of one run
claims    what several runs of the demo show         show          the loss mask of rows
check     mistakes of JSONL files                    sample, agree the study with raters
"""

import argparse
import time
from pathlib import Path

import data
from command import flags, schema, stage
from engines import inference
from evaluate import read_all
from judge import print_report
from report import agreement, cases, figures, judging, score, tables
from report.claims import claims
from report.compare import compare
from report.looking import looking


def draw(args: argparse.Namespace) -> None:
    """`table` and `plot`: writes what the paper shows, and prints what the results lack."""
    started, results = time.time(), [score.read_results(folder) for folder in args.results]
    if not stage.open_folder(args, [Path(folder) / "results.json" for folder in args.results]):
        return
    make = tables.paper_tables if args.command == "table" else figures.plot_paper
    paths, left_out = make(results, Path(args.out))
    stage.finish(args, paths, started, {})
    for path in paths:
        if path.suffix == ".md":
            print(path.read_text(encoding="utf-8"))
    print("\n".join([*left_out, "written: " + ", ".join(map(str, paths))]))


def page(args: argparse.Namespace) -> None:
    started, out = time.time(), Path(args.out)
    if bool(args.sft) != bool(args.dpo):
        raise data.RowError("--sft and --dpo go together: one picture has the curves of both")
    inputs = [Path(folder) / "results.json" for folder in args.results]
    inputs += [Path(folder) / "metrics.jsonl" for folder in (args.sft, args.dpo) if folder]
    inputs += [Path(args.pairs) / name for name in ("pairs.jsonl", "report.json") if args.pairs]
    results = [score.read_results(folder) for folder in args.results]
    if not stage.open_folder(args, inputs):
        return
    # read everything before writing: after a mistake in a row the folder can still be used
    curves = [schema.read_metrics(folder) for folder in (args.sft, args.dpo) if folder]
    pairs = schema.read_rows(Path(args.pairs) / "pairs.jsonl", "pairs") if args.pairs else []
    text = tables.table(results)
    data.write_text(out / "table.md", text + "\n")
    if curves:
        figures.plot_report(results, *curves, out / "report.png")
    if pairs:
        figures.plot_films(pairs, Path(args.images), out / "films.png")
        print_report(data.read_json(Path(args.pairs) / "report.json"))
    print("\n" + text)
    names = [name for name in ("table.md", "report.png", "films.png") if (out / name).exists()]
    stage.finish(args, [out / name for name in names], started, {})


def show_cases(args: argparse.Namespace) -> None:
    questions = list(read_all(args.questions).values())
    runs = [cases.read_run(folder) for folder in args.results]
    selection = args.images, args.only, args.n
    shown = cases.write_page(runs, questions, *selection, args.out)
    print(f"{args.out}: {shown} cases")


def show(args: argparse.Namespace) -> None:
    """The loss mask. Only this command needs torch."""
    from report import show

    show.show(args)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Look at evaluations and verdicts.")
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, act, about: str, results: str = "", out: str = ""):
        """The `add_argument` of a new command."""
        sub = commands.add_parser(name, help=about)
        sub.set_defaults(act=act)
        if results:
            sub.add_argument("--results", nargs="+", required=True, help=results)
        if out:
            sub.add_argument("--out", required=True, help=out)
        return sub.add_argument

    folders, folder = "folders of evaluate.py", "folder to write"
    about = "each run against the one before it, on the same questions"
    add = command("compare", compare, about, folders)
    add("--shared", action="store_true", help="only the questions that both runs have")
    add("--out", default="", help="Markdown file to write")

    named = f"{folders}, named SIZE/STAGE where a figure is by size and stage"
    about = "our rows and columns beside the paper's Tables 1 and 2"
    command("table", draw, about, named, folder)
    about = "the paper's Figures 4, 5 and 6"
    command("plot", draw, about, named, folder)

    add = command("cases", show_cases, "single cases as one page, chains side by side")
    add("results", nargs="+", help=folders)
    about = "conditions such as stage1-wrong,stage2-right; see report/cases.py"
    add("--only", default="", help=about)
    add("-n", type=flags.whole(1), default=20, help="most cases on the page")
    add("--questions", nargs="+", required=True, help="what the runs were evaluated on")
    add("--images", default=".", help="image root")
    add("--out", default="cases.html", help="page to write")

    about = "the stages of a run of the method: table, curves, pairs"
    add = command("page", page, about, f"{folders}, in the order of the stages", folder)
    add("--sft", default="", help="Stage I folder, for its curves")
    add("--dpo", default="", help="Stage II folder, for its curves")
    add("--pairs", default="", help="folder of judge.py pairs, for the sheet of films")
    add("--images", default=".", help="image root")

    about = "does each stage look at the image? measures of looking.py, and differences"
    command("looking", looking, about, "folders of looking.py, in the order of the stages", folder)

    add = command("claims", claims, "what several runs of the demo show, with intervals")
    add("--runs", nargs="+", required=True, help="run folders")
    add("--out", default="claims.md", help="file to write; its picture is put beside it")

    add = command("show", show, "demos or pairs, every token coloured by its label")
    add("file")
    add("--model", required=True, help="folder whose tokenizer is used")
    add("-n", type=flags.whole(1), default=3, help="how many rows")

    about = "a judge's verdicts on films of the miniature, against the truth"
    add = command("judge", judging.judge_films, about, out=folder)
    add("--judge", required=True, help="engine spec")
    add("--chains", required=True, help="rollouts.jsonl, or predictions.jsonl of evaluate.py")
    add("--questions", required=True, help="questions of the miniature")
    add("--images", default=".", help="image root")
    add("-n", type=flags.whole(1), default=200, help="most chains; each is judged twice")  # ours
    add("--seed", type=flags.SEED, default=0)
    inference.add_flags(commands.choices["judge"])

    add = command("judges", judging.judges, "two judges on the same chains, by stage")
    for number in ("first", "second"):
        add(f"--{number}", nargs="+", required=True, help="folders with its verdicts.jsonl")

    add = command("check", schema.check, "every mistake of JSONL files, by line and key")
    add("files", nargs="+")

    add = command("sample", agreement.sample, "draw the blinded sheet for raters", out=folder)
    add("--verdicts", required=True, help="verdicts.jsonl")
    add("--seed", type=flags.SEED, default=0)
    add("--rollouts", required=True)
    add("--questions", required=True)
    add("--images", default=".", help="image root")
    add("-n", type=flags.whole(1), default=1000, help="cases")  # paper 3.3

    add = command("agree", agreement.agree, "compare filled-in sheets with verdicts", out=folder)
    add("--verdicts", required=True, help="verdicts.jsonl")
    add("--seed", type=flags.SEED, default=0)
    add("--human", nargs="+", required=True, help="filled-in sheets, one a rater")
    add("--key", required=True, help="key.jsonl of the sample")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int | None:
    args = parse(argv)
    return args.act(args)


if __name__ == "__main__":
    flags.run_script(main)
