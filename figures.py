"""Every table and picture of an evaluation (paper §4): Tables 1 and 2 beside the paper's rows, Figures 4 to 6, the report.

    table          one column a result, one row a figure: Markdown that is also aligned for a terminal
    paper_tables   table1.md, table2.md and .csv: our rows, with n and interval, under the paper's
    plot_paper     figure4: accuracy by stage and model size     figure5: what Stage I is trained on
                   figure6: MV@n and pass@n                      modalities: accuracy by kind of image
    plot_report    accuracy, criteria, training curves and votes on one sheet       plot_films: preference pairs

All is made from results.json as evaluate.py writes it, whose figures are score.summarise's; nothing is asked or scored
here. Which result is which size and stage is what its name says, SIZE/STAGE: "7B/base", "7B/Stage-I", "32B/Stage-II", and for
Figure 5 "7B/multimodal" and "7B/both" beside "7B/Stage-I", which is the text-only one. A size of SIZES stands beside the
paper's values. Another name is no error: such a result is in every table and picture that needs no stage. What a table or
picture has no use for is never just absent: paper_tables and plot_paper return (files written, lines that say who was left
out of what, and why).

Where we depart from the paper, or it is silent: it gives no intervals, ours are 95 %, and no numbers behind Figures 5 and 6.
Its tables are printed as they are, misprints included, with a note wherever a value cannot be k of n questions. A Δ of ours
compares the same questions or is not given: some of the paper's compare 288 with 286 (note c).
"""

import csv
import math
import re
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path

import data
import score
from judge import CRITERIA

STAGES = ("base", "Stage-I", "Stage-II")
STRATEGIES = {"Stage-I": "text-only", "multimodal": "multimodal", "both": "text and multimodal"}  # paper Fig. 5
SIZES = {"7B": "QwenVL2.5-7B", "8B": "InternVL3.0-8B", "32B": "QwenVL2.5-32B", "72B": "QwenVL2.5-72B"}  # the paper's models, by the size in a name
TITLES = {
    "medxpertqa-mm": "MedXpertQA-MM", "medxpertqa-text": "MedXpertQA-Text", "mmmu": "MMMU-Health", "mmmu-pro": "MMMU-Pro-Health",
    "mmmu-pro-vision": "MMMU-Pro-Health, vision", "medqa": "MedQA", "medbullets-op4": "Medbullets, 4 options", "medbullets-op5": "Medbullets, 5 options",
}  # fmt: skip
FIGURE5 = ("medxpertqa-mm", "mmmu", "medqa", "medbullets-op4", "medbullets-op5")  # paper 4.3; which Medbullets it does not say


# ---------------------------------------------------------------------------------------------------------------
# One column a result


def markdown(rows: list[list[str]]) -> str:
    """Rows of cells, the header first."""
    rows = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def spread(triple: list[float]) -> str:
    return "{:.3f} ({:.2f} … {:.2f})".format(*triple)


def last(curve: dict[str, list[float]]) -> str:
    n = max(curve, key=int)
    return f"{spread(curve[n])}, n = {n}"


ROWS = (  # label, the key of the figures without which there is no cell, the cell
    ("questions × samples", "questions", lambda f: f"{f['questions']} × {f['samples']}"),
    ("accuracy", "accuracy", lambda f: spread(f["accuracy"])),
    ("accuracy, the benchmark's own rule", "official", lambda f: spread(f["official"])),
    ("… which cannot read", "official_unparsed", lambda f: f"{f['official_unparsed']:.3f}"),
    ("majority vote", "majority", lambda f: last(f["majority"])),
    ("any right (pass@n)", "pass", lambda f: last(f["pass"])),
    ("chains that meet all four criteria", "all_criteria", lambda f: spread(f["all_criteria"])),
    *((f"… {name.replace('_', ' ')}", "criteria", lambda f, name=name: f"{f['criteria'][name]:.3f}") for name in CRITERIA),
    ("hallucinate, of those that look", "hallucinated", lambda f: f"{f['hallucinated']:.3f} of {f['judged_looking']}"),
    ("chains that speak of the image", "looking", lambda f: f"{f['looking']:.3f}"),
    ("… first after this share of their words", "first_look", lambda f: f"{f['first_look']:.2f}"),
    ("words a chain", "words", lambda f: f"{f['words']:.0f}"),
    ("answers that cannot be read", "unparsed", lambda f: f"{f['unparsed']:.3f}"),
    ("answers cut off", "cut_off", lambda f: f"{f['cut_off']:.3f}"),
    ("prompts over long", "over_long", lambda f: f"{f['over_long']:.3f}"),
    ("unanswered", "unanswered", lambda f: f"{f['unanswered']:.3f}"),
)


def table(results: list[dict]) -> str:
    """One column a result, as Markdown. A row that no result can fill is left out; a cell that its result cannot fill is "–".
    Where there are several benchmarks, each has rows of its own: accuracy, and by its own rule where it has one."""
    groups = [("image questions", ROWS, [result["groups"].get("image", {}) for result in results])]
    groups.append(("text questions", [row for row in ROWS if row[1] != "looking"], [result["groups"].get("text", {}) for result in results]))
    benchmarks = list(dict.fromkeys(source for result in results for source in result["benchmarks"]))
    for source in benchmarks if len(benchmarks) > 1 else ():
        groups.append((source, ROWS[:4], [result["benchmarks"].get(source, {}).get("figures", {}) for result in results]))
    lines = [["", *(result["name"] for result in results)]]
    for group, rows, figures in groups:
        for label, key, cell in rows:
            if any(found.get(key) is not None for found in figures):
                lines.append([f"{group}: {label}", *(cell(found) if found.get(key) is not None else "–" for found in figures)])
    return markdown(lines)


# ---------------------------------------------------------------------------------------------------------------
# The paper's tables, as it prints them, and ours under them

MM, PRO = "medxpertqa-mm", "mmmu-pro"
# benchmark, subset ("" is all of it, "delta" its gain over the base model), questions (by the denominators that its values fit)
COLUMNS1 = (
    (MM, "question_type=Reasoning", 1446), (MM, "question_type=Understanding", 554), (MM, "", 2000), (MM, "delta", 2000),
    ("mmmu", "", 150), ("mmmu", "delta", 150), (PRO, "", 286), (PRO, "delta", 286),
)  # fmt: skip
COLUMNS2 = ((MM, "medical_task=Treatment", 448), (MM, "medical_task=Basic Science", 353), (MM, "medical_task=Diagnosis", 1199), *COLUMNS1[:4])
# a cell: as printed, then its notes, then its questions where they are not the column's
TABLE1 = """
GPT-4o                    40.73      48.19     42.80       –       59.33   –       40.91        –
QvQ-Max                   35.20      38.99     36.25       –       70.67   –       52.10        –
OpenAI-o1                 52.78a/144 65.45a/55 56.28a/199  –       60.00   –       41.96        –
Gemini-2.5-Pro            61.69      69.13     63.75       –       80.67   –       66.08        –
QwenVL2.5-32B             26.00f     30.86f    27.35f      –       63.33   –       48.25        –
QwenVL2.5-72B             27.10      31.58     28.35       –       70.00   –       50.35        –
InternVL3.0-38B           26.90      29.24     27.55       –       68.00   –       45.10        –
InternVL3.0-78B           28.80b     35.92     30.20       –       71.33   –       51.40        –
QwenVL2.5-7B              19.99      22.56     20.70       –       55.33   –       28.47c/288   –
InternVL3.0-8B            21.09      23.83     21.85       –       61.33   –       36.71        –
GMAI-VL-R1 SFT            –          –         23.55       +2.85   56.00   +0.67   32.99c/288   +4.52
GMAI-VL-R1 RLT            –          –         23.80       +3.10   57.33   +2.00   34.03cd/288  +5.56
QwenVL2.5-7B +Stage-I     24.48      26.90     25.15       +4.45   62.00   +6.67   36.36        +7.89c
QwenVL2.5-7B +Stage-II    25.80      28.52     26.55       +5.85   66.00   +10.67  38.81        +10.34c
Chiron-o1                 23.30e     25.10e    24.20e      +2.34e  54.60e  -6.72e  33.90e       -2.80e
InternVL3.0-8B +Stage-I   26.14      28.52     26.80       +4.95   69.33   +8.00   43.36        +6.65
InternVL3.0-8B +Stage-II  25.93      31.05     27.35       +5.50   70.00   +8.67   48.95        +12.24
"""
TABLE2 = """
QwenVL2.5-32B             28.13      25.78     27.61       26.07f  30.87f  27.40f  +0.00
QwenVL2.5-32B +Stage-I    33.03      30.31     32.19       31.60   33.21   32.05   +4.65
QwenVL2.5-32B +Stage-II   35.93      32.57     32.86       33.54   33.39   33.50   +6.10
QwenVL2.5-72B             30.36      24.08     28.86       27.11   31.59   28.35   +0.00
QwenVL2.5-72B +Stage-I    40.40      41.93     38.62       39.21   40.61   39.60   +11.25
QwenVL2.5-72B +Stage-II   41.52      42.49     39.45       39.63   42.60   40.45   +12.10
"""
TABLES = {1: (COLUMNS1, TABLE1), 2: (COLUMNS2, TABLE2)}
NOTES = {
    "a": "of MedXpertQA's sampled subset: 76 of 144, 36 of 55, 112 of 199",
    "b": "cannot be: 604 of 2000 less 199 of 554 leaves 405 of 1446, 28.01",
    "c": "82, 95 and 98 of 288 questions, all other rows are of 286; the Δ of Stage-I and Stage-II mixes the two",
    "d": "the paper's text says 33.45",
    "e": "to one decimal and mostly no k of n: 337 of 1446 and 139 of 554 would be 23.80 overall; each Δ is .01 off",
    "f": "two runs: 547 of 2000 in Table 1, 548 in Table 2",
    "n": "not the paper's number of questions: not to be compared with its rows",
}
FIELDS = ("by", "method", "benchmark", "subset", "percent", "low", "high", "questions", "samples", "notes")  # of the CSV, one line a value


def paper_records(number: int) -> Iterator[dict]:
    """The paper's Table 1 or 2, one record a value; percent is the text as printed."""
    columns, text = TABLES[number]
    for line in text.strip().splitlines():
        method, *cells = line.rsplit(None, len(columns))
        for (benchmark, subset, questions), cell in zip(columns, cells):
            if printed := re.fullmatch(r"([-+]?\d+\.\d\d)([a-z]*)/?(\d*)", cell):
                percent, notes, other = printed.groups()
                yield dict(zip(FIELDS, ("paper", method.strip(), benchmark, subset, percent, "", "", int(other or questions), "", notes)))


def gain(result: dict, results: list[dict], benchmark: str) -> list[float] | None:
    """[difference, low, high] to SIZE/base, or None without that result or where it was asked other questions."""
    bases = [other for other in results if stage_of(other) == (stage_of(result)[0], "base") and "/" in other["name"]]
    try:
        first, second = ([found for found in one["entries"] if found["source"] == benchmark] for one in (*bases, result))
        return score.compare(first, second)["difference"]
    except ValueError:  # no base to unpack, or not the same questions
        return None


def our_records(number: int, results: list[dict], left_out: list[str]) -> Iterator[dict]:
    """Our rows of Table 1 or 2 as such records. What a result has no figures for goes to left_out."""
    for result in results:
        lacking = []
        for benchmark, subset, expected in TABLES[number][0]:
            part = result["benchmarks"].get(benchmark, {"figures": None, "subsets": {}})
            delta = subset == "delta"
            figures = part["figures"] if delta or not subset else part["subsets"].get(subset)
            if delta and (not figures or stage_of(result)[1] == "base"):
                continue
            if values := gain(result, results, benchmark) if delta else figures and figures["accuracy"]:
                percents, n = [f"{100 * value:{'+' if delta else ''}.2f}" for value in values], figures["questions"]
                yield dict(zip(FIELDS, ("ours", result["name"], benchmark, subset, *percents, n, figures["samples"], "n" if n != expected else "")))
            else:
                lacking.append(f"Δ on {benchmark} (no SIZE/base on the same questions)" if delta else f"{benchmark} {subset}".strip())
        if lacking:
            left_out.append(f"Table {number}: {result['name']} lacks {', '.join(lacking)}")


def paper_tables(results: list[dict], out: Path) -> tuple[list[Path], list[str]]:
    """Writes table1.md, table1.csv, table2.md, table2.csv. Returns (files, lines that say what results lack).
    Raises RowError for two results of one name."""
    distinct(results)
    paths, left_out = [], []
    for number, (columns, _) in TABLES.items():
        records = [*paper_records(number), *our_records(number, results, left_out)]
        rows: dict[str, dict] = {}
        for record in records:
            name = record["method"] if record["by"] == "paper" else f"{record['method']} (ours, {record['samples']} samples a question)"
            text = record["percent"] + (f" ({float(record['low']):.1f} … {float(record['high']):.1f})" if record["low"] else "")
            text += "".join(f" [n = {record['questions']}]" if note == "n" else f" [{note}]" for note in record["notes"])
            rows.setdefault(name, {})[record["benchmark"], record["subset"]] = text
        titles = ["Δ" if subset == "delta" else f"{TITLES[benchmark]} {subset.split('=')[-1] or 'Overall'} (n = {n})" for benchmark, subset, n in columns]
        cells = [["accuracy in %", *titles], *([name, *(row.get(column[:2], "–") for column in columns)] for name, row in rows.items())]
        seen = {note for record in records for note in record["notes"]}
        notes = [f"* [{'n = …' if note == 'n' else note}] {text}" for note, text in NOTES.items() if note in seen]
        notes.append("* Ours: in brackets the 95 % interval, over questions. The paper gives none; some of its values are rounded, others cut off.")
        paths += [out / f"table{number}.md", out / f"table{number}.csv"]
        paths[-2].write_text("\n".join([markdown(cells), "", *notes, ""]))
        with open(paths[-1], "w", newline="") as file:
            writer = csv.DictWriter(file, FIELDS)
            writer.writeheader()
            writer.writerows(records)
    return paths, left_out


# ---------------------------------------------------------------------------------------------------------------
# Pictures

LOOKS = (  # one a result, told apart in grey too: shade, hatch, marker, line
    ("#b0b0b0", "", "o", "-"), ("#5b8db8", "///", "s", "--"), ("#c0504d", "...", "^", "-."), ("#4f9d69", "xxx", "D", ":"),
    ("#8064a2", "\\\\\\", "v", (0, (6, 1, 1, 1, 1, 1))),
)  # fmt: skip


def stage_of(result: dict) -> tuple[str, str]:
    """(size, stage) from a name SIZE/STAGE; ("", name) of any other."""
    size, _, stage = result["name"].rpartition("/")
    return size, stage


def distinct(results: list[dict]) -> None:
    names = [result["name"] for result in results]
    if twice := [name for name in names if names.count(name) > 1]:
        raise data.RowError(f"results.json: name: two results are called {twice[0]!r}; a picture could not tell them apart; evaluate with --name")


def canvas(rows: int, columns: int, width: float, height: float, widths: list[float] | None = None, heights: list[float] | None = None):
    """(figure, axes (rows, columns)) in the one style of all pictures. width, height: inches; widths, heights: of the columns and rows, in proportion."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"axes.titlesize": 10, "legend.frameon": False, "legend.fontsize": 8, "hatch.linewidth": 0.6})
    plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "medee"})  # text as text, and the same file from the same results
    return plt.subplots(rows, columns, figsize=(width, height), constrained_layout=True, squeeze=False, width_ratios=widths, height_ratios=heights)


def save(figure, path: Path, *suffixes: str) -> list[Path]:
    """Writes and closes it, once a suffix."""
    import matplotlib.pyplot as plt

    paths = [path.with_name(path.name + suffix) for suffix in suffixes]
    for file in paths:  # matplotlib draws at most 65,536 pixels a side
        figure.savefig(file, dpi=min(110, 60_000 / max(figure.get_size_inches())), metadata={"Date": None} if file.suffix == ".svg" else None)
    plt.close(figure)
    return paths


def arms(triples: list[list[float]]) -> list[list[float]]:
    """Error bars (2, N), down and up, of [mean, low, high] each."""
    return [[max(0.0, mean - low) for mean, low, _ in triples], [max(0.0, high - mean) for mean, _, high in triples]]


def counts(key: str, figures: Iterable[dict]) -> str:
    """How many "questions" or "samples" these figures have: "2000", or "2000 / 400" where they differ."""
    return " / ".join(dict.fromkeys(str(found[key]) for found in figures))


def below(figure, axes, columns: int) -> None:
    """One legend for all the panels, each label once, under them."""
    entries = {label: handle for ax in axes for handle, label in zip(*ax.get_legend_handles_labels())}
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=columns)


def curve(ax, figures: dict, key: str, shade: str, line, marker: str, label: str) -> None:
    """MV@n or pass@n over n, as key says, with its band."""
    n, triples = [int(count) for count in figures[key]], list(figures[key].values())
    ax.fill_between(n, [low for _, low, _ in triples], [high for _, _, high in triples], color=shade, alpha=0.15, lw=0)
    ax.plot(n, [mean for mean, _, _ in triples], color=shade, ls=line, marker=marker, ms=5, mec="black", mew=0.5, label=label)
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter("{x:.0f}")


def plot_paper(results: list[dict], out: Path) -> tuple[list[Path], list[str]]:
    """Draws figure4, and for each size figure5, figure6 and modalities, as .png and .svg, from the results that have what it
    takes. Returns (files, lines that say what was left out and why). Raises RowError for two results of one name."""
    distinct(results)
    stages, left_out, by_size = [], [], {}
    for result in results:
        size, stage = stage_of(result)
        by_size.setdefault(size, []).append(result)
        if size and stage in STRATEGIES and stage not in STAGES:
            left_out.append(f"Figures 4, 6, modalities: {result['name']} is an ablation, for Figure 5 only")
        else:
            stages.append(result)
    drawn = {"figure4": stages_by_size(stages, left_out)}
    for size, members in by_size.items():
        suffix, plain = re.sub(r"[^\w.]+", "-", f"-{size}") if size else "", [result for result in stages if stage_of(result)[0] == size]
        drawn["figure5" + suffix] = strategies(size, members, left_out)
        if len(plain) > len(LOOKS):
            left_out.append(f"Figure 6, modalities: {len(plain)} results of one size {size!r}, and only {len(LOOKS)} can be told apart; give fewer")
        else:
            drawn |= {"figure6" + suffix: curves(plain, left_out), "modalities" + suffix: modalities(plain, left_out)}
    return [path for name, figure in drawn.items() if figure for path in save(figure, out / name, ".png", ".svg")], left_out


def paper_overall(model: str, stage: str) -> float | None:
    """The paper's accuracy on MedXpertQA-MM in per cent, from Table 2 where it has the model, or None."""
    wanted = (model if stage == "base" else f"{model} +{stage}", MM, "")
    return next((float(row["percent"]) for number in (2, 1) for row in paper_records(number) if (row["method"], row["benchmark"], row["subset"]) == wanted), None)


def stages_by_size(results: list[dict], left_out: list[str]):
    """Figure 4: a panel a size; the paper's values hollow, ours filled, with intervals."""
    ours: dict[str, dict[str, dict]] = {}
    for result in results:
        size, stage = stage_of(result)
        if not size or stage not in STAGES:
            left_out.append(f"Figure 4: {result['name']} is not named SIZE/STAGE with a stage of {', '.join(STAGES)}")
        elif MM not in result["benchmarks"]:
            left_out.append(f"Figure 4: {result['name']} has no {MM}")
        else:
            ours.setdefault(size, {})[stage] = result["benchmarks"][MM]["figures"]
    if not ours:
        return None
    sizes = list(dict.fromkeys(["7B", "32B", "72B", *ours]))  # paper Fig. 4
    figure, axes = canvas(1, len(sizes), 3.2 * len(sizes) + 0.6, 4.2)
    top = max(45, *(100 * figures["accuracy"][2] for stages in ours.values() for figures in stages.values()))
    for ax, size in zip(axes[0], sizes):
        paper = {x: value for x, stage in enumerate(STAGES) if (value := paper_overall(SIZES.get(size, ""), stage)) is not None}
        mine = {x: ours[size][stage] for x, stage in enumerate(STAGES) if stage in ours.get(size, {})}
        if paper:
            ax.plot([x - 0.1 for x in paper], list(paper.values()), "--o", color="black", mfc="white", lw=1, ms=7, label=f"paper, {SIZES[size]}")
        if mine:
            triples = [[100 * value for value in figures["accuracy"]] for figures in mine.values()]
            label = f"ours, {counts('questions', mine.values())} questions × {counts('samples', mine.values())} samples"
            ax.errorbar([x + 0.1 for x in mine], [t[0] for t in triples], arms(triples), fmt="-s", color="#c0504d", ms=6, capsize=3, label=label)
        values = [(stage, paper.get(x, math.nan), 100 * mine[x]["accuracy"][0] if x in mine else math.nan) for x, stage in enumerate(STAGES)]
        ax.set(title=size, xlim=(-0.5, 2.5), ylim=(0, 1.25 * top), xlabel="stage")
        ax.set_xticks(range(3), [f"{stage}\npaper {theirs:.2f}\nours {own:.2f}".replace("nan", "–") for stage, theirs, own in values], fontsize=9)
        ax.legend(loc="upper left")
    axes[0, 0].set_ylabel("accuracy in % (bars: 95 % interval)")
    figure.suptitle("MedXpertQA-MM, by model size and stage", fontsize=10)
    return figure


def strategies(size: str, results: list[dict], left_out: list[str]):
    """Figure 5: the model before Stage I, and after it on text, on images, on both."""
    by_stage = {stage_of(result)[1]: result for result in results if size}
    members = [by_stage[stage] for stage in ("base", *STRATEGIES) if stage in by_stage]
    sources = [source for source in FIGURE5 if any(source in result["benchmarks"] for result in members)]
    if len(STRATEGIES.keys() & by_stage.keys()) < 2 or not sources:
        have = ", ".join(result["name"] for result in results)
        left_out.append(f"Figure 5: needs two of SIZE/{', SIZE/'.join(STRATEGIES)} on one of {', '.join(FIGURE5)}; {have} do not make it")
        return None
    figure, axes = canvas(1, 1, 3 + 1.7 * len(sources), 4.6)
    ax, width = axes[0, 0], 0.8 / len(members)
    for i, (result, (shade, hatch, _, _)) in enumerate(zip(members, LOOKS)):
        here = {x: result["benchmarks"][source]["figures"] for x, source in enumerate(sources) if source in result["benchmarks"]}
        left_out += [f"Figure 5: {result['name']} has no {source}" for x, source in enumerate(sources) if x not in here]
        triples, places = [[100 * value for value in found["accuracy"]] for found in here.values()], [x + (i - (len(members) - 1) / 2) * width for x in here]
        label = f"{STRATEGIES.get(stage_of(result)[1], 'before Stage I')} ({counts('samples', here.values())} samples)"
        ax.bar(places, [t[0] for t in triples], 0.92 * width, yerr=arms(triples), color=shade, hatch=hatch, edgecolor="black", lw=0.5, capsize=2, label=label)
        for x, (mean, _, high) in zip(places, triples):
            ax.text(x, high + 1, f"{mean:.1f}", ha="center", fontsize=7)
    numbers = [counts("questions", [result["benchmarks"][source]["figures"] for result in members if source in result["benchmarks"]]) for source in sources]
    ax.set(xticks=range(len(sources)), xticklabels=[f"{TITLES[source]}\nn = {number}" for source, number in zip(sources, numbers)], ylim=(0, 105))
    ax.set(title=f"{size}: what Stage I is trained on", xlabel="benchmark, n questions", ylabel="accuracy in % (bars: 95 % interval)")
    below(figure, [ax], len(members))
    return figure


def curves(results: list[dict], left_out: list[str]):
    """Figure 6: a row a benchmark, MV@n on the left and pass@n on the right, which need scales of their own."""
    many: dict[str, list[tuple]] = {}
    for result, look in zip(results, LOOKS):
        for source, part in result["benchmarks"].items():
            if part["figures"]["samples"] > 1:
                many.setdefault(source, []).append((result["name"], look, part["figures"]))
            else:
                left_out.append(f"Figure 6: {result['name']} has one sample a question of {source}; evaluate with -n 32")
    if not many:
        return None
    figure, axes = canvas(len(many), 2, 10, 0.6 + 3.2 * len(many))
    for (source, drawn), row in zip(many.items(), axes):
        for ax, key, title in zip(row, ("majority", "pass"), ("majority vote, MV@n", "any of n right, pass@n")):
            for name, (shade, _, marker, line), found in drawn:
                curve(ax, found, key, shade, line, marker, f"{name} ({found['samples']} samples)")
            ax.set(xlabel="n samples", ylabel="share right (band: 95 % interval)")
            ax.set_title(f"{TITLES.get(source, source)} ({counts('questions', [found for *_, found in drawn])} questions): {title}")
    below(figure, axes.flat, min(3, len(results)))
    return figure


def modalities(results: list[dict], left_out: list[str]):
    """Accuracy by kind of image, over all image questions: a line a modality, a mark a result."""
    found = []
    for result, look in zip(results, LOOKS):
        if parts := {key.split("=", 1)[1]: figures for key, figures in result["subsets"].items() if key.startswith("modality=")}:
            found.append((result["name"], look, parts))
        else:
            left_out.append(f"modalities: {result['name']} has no subsets modality=...; its questions' meta names none")
    if not found:
        return None
    largest = {name: max(one[name]["questions"] for *_, one in found if name in one) for *_, parts in found for name in parts}
    order = sorted(largest, key=lambda name: (largest[name], name))  # from below
    figure, axes = canvas(1, 1, 8, 1.6 + (0.18 + 0.13 * len(found)) * len(order))
    ax, step = axes[0, 0], 0.7 / len(found)
    for i, (name, (shade, _, marker, _), parts) in enumerate(found):
        here = {y - (i - (len(found) - 1) / 2) * step: parts[modality]["accuracy"] for y, modality in enumerate(order) if modality in parts}
        means, label = [mean for mean, _, _ in here.values()], f"{name} ({counts('samples', parts.values())} samples)"
        ax.errorbar(means, list(here), xerr=arms(list(here.values())), fmt=marker, color=shade, ecolor="#606060", elinewidth=0.8, mec="black", ms=5, label=label)
    for y in range(len(order) - 1):
        ax.axhline(y + 0.5, color="#dddddd", lw=0.6)
    labels = [f"{name} (n = {counts('questions', [parts[name] for *_, parts in found if name in parts])})" for name in order]
    ax.set(yticks=range(len(order)), yticklabels=labels, xlim=(0, 1), ylim=(-0.6, len(order) - 0.4), title="accuracy by imaging modality")
    ax.set(xlabel="accuracy (bars: 95 % interval)", ylabel="modality, n image questions")
    below(figure, [ax], min(3, len(found)))
    return figure


def plot_report(results: list[dict], sft: list[dict], dpo: list[dict], path: Path) -> None:
    """Accuracy and criteria by stage, training curves, majority vote and pass@n, from the results with image questions.

    sft, dpo: the rows of the stages' metrics.jsonl."""
    drawn = [(result["name"], result["groups"], shade) for result, (shade, *_) in zip(results, LOOKS * len(results)) if "image" in result["groups"]]
    names, labels, width = [name for name, _, _ in drawn], [*CRITERIA, "all four"], 0.81 / max(1, len(drawn))
    figure, axes = canvas(2, 3, 15, 8.5)
    for x, (name, groups, shade) in enumerate(drawn):
        image = groups["image"]
        for offset, kind, hatch in ((-0.2, "image", None), (0.2, "text", "//")):
            if kind in groups:
                mean, _, high = groups[kind]["accuracy"]
                axes[0, 0].bar(x + offset, mean, 0.38, yerr=arms([groups[kind]["accuracy"]]), color=shade, hatch=hatch, edgecolor="white", capsize=3)
                axes[0, 0].text(x + offset, high + 0.012, f"{mean:.2f}", ha="center", fontsize=9)
        if "criteria" in image:
            values = [*(image["criteria"][criterion] for criterion in CRITERIA), image["all_criteria"][0]]
            axes[0, 1].bar([place + (x - (len(drawn) - 1) / 2) * width for place in range(len(labels))], values, 0.93 * width, color=shade, label=name)
        if image.get("hallucinated") is not None:
            axes[0, 2].bar(x, image["hallucinated"], 0.5, color=shade)
            axes[0, 2].text(x, image["hallucinated"] + 0.012, f"{image['hallucinated']:.2f}\n{image['judged_looking']} chains", ha="center", fontsize=9)
        curve(axes[1, 2], image, "majority", shade, "-", "o", name)
        curve(axes[1, 2], image, "pass", shade, "--", "^", "")
    for name, colour in (("think", "#4f9d69"), ("answer", "#31a0b5"), ("tag", "#c9a227")):
        axes[1, 0].plot([row["step"] + 1 for row in sft], [row[name] for row in sft], color=colour, label=name, lw=1.2)
    for key, label, colour in (("loss", "loss", "#c0504d"), ("margin", "reward margin", "#5b8db8"), ("accuracy", "pairs in the right order", "#8a8a8a")):
        axes[1, 1].plot([row["step"] + 1 for row in dpo], [row[key] for row in dpo], color=colour, label=label, lw=1.2)
    axes[0, 0].axhline(0.25, color="black", lw=0.8, ls=":")
    axes[1, 1].axhline(math.log(2), color="black", lw=0.8, ls=":")
    for ax in (axes[0, 0], axes[0, 2]):
        ax.set_xticks(range(len(names)), names, fontsize=10 if len(names) < 4 else 7)
    axes[0, 1].set_xticks(range(len(labels)), [label.replace("_", "\n") for label in labels], fontsize=8)
    axes[0, 0].set(title="accuracy (plain: image, hatched: text; bars 95 %; dotted: 1 in 4)", ylim=(0, 1.08))
    axes[0, 1].set(title="share of chains meeting each criterion (image questions)", ylim=(0, 1.15))
    axes[0, 2].set(title="hallucination among chains that look at the image", ylim=(0, 1.05))
    axes[1, 0].set(title="Stage I: loss per token of each span", xlabel="step", yscale="log")
    axes[1, 1].set(title="Stage II: DPO (dotted: ln 2)", xlabel="step")
    axes[1, 2].set(title="MV@n (solid), pass@n (dashed), image questions (95 %)", xlabel="n", ylim=(0, 1.02))
    for ax, place in ((axes[0, 1], "upper center"), (axes[1, 0], "upper right"), (axes[1, 1], "upper left"), (axes[1, 2], "lower right")):
        ax.legend(loc=place, ncols=3 if ax in (axes[0, 1], axes[1, 2]) else 1)
    save(figure, path.with_suffix(""), path.suffix)


def plot_films(pairs: list[dict], image_root: Path, path: Path) -> None:
    """A sheet of preference pairs: the image, the question, the chosen chain beside the rejected one and why it failed.
    Nothing is written where no pair has an image."""
    from PIL import Image

    shown: dict[str, dict] = {}  # one pair a question: one of each failure first, then whatever there is
    for reason in [*CRITERIA, *[None] * (6 - len(CRITERIA))]:
        rest = (row for row in pairs if row["id"] not in shown and row["images"] and (reason is None or reason in row["failed"]))
        shown |= {row["id"]: row for row in [next(rest, None)] if row}
    if not shown:
        return
    sheet = []
    for row in shown.values():
        failed = "rejected: fails " + ", ".join(row["failed"]).replace("_", " ")
        chosen, rejected = ("chosen: meets all four", "#2e7d4f", row["chosen"], 56), (failed, "#b03a2e", row["rejected"], 56)
        texts = ("question", "black", row["prompt"][-1]["content"], 36), chosen, rejected
        sheet.append([(title, colour, "\n".join(textwrap.fill(line, width) for line in text.split("\n"))) for title, colour, text, width in texts])
    heights = [max(2.1, 0.6 + 0.16 * max(text.count("\n") + 1 for *_, text in texts)) for texts in sheet]  # inches: 0.16 a line
    figure, axes = canvas(len(shown), 4, 16, sum(heights), [1, 2, 3, 3], heights)
    for row, texts, (film, *columns) in zip(shown.values(), sheet, axes):
        film.imshow(Image.open(image_root / row["images"][0]).convert("RGB"))  # a grey film would be given false colours
        film.set_anchor("N")
        film.axis("off")
        for ax, (title, colour, text) in zip(columns, texts):
            ax.text(0, 1, text.replace("$", r"\$"), va="top", fontsize=9, family="monospace")
            ax.set_title(title, loc="left", fontsize=9, color=colour)
            ax.axis("off")
    save(figure, path.with_suffix(""), path.suffix)
