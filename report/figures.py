"""Pictures of an evaluation (paper §4): its Figures 4 to 6, and the report of one run.

    plot_paper     figure4: accuracy by stage and model size     figure5: what Stage I is trained on
                   figure6: MV@n and pass@n
    plot_report    accuracy, criteria, training curves and votes on one sheet
    plot_films     a sheet of preference pairs

reads results of score.read_results, named SIZE/STAGE as in tables.py; for Figure 5 "7B/multimodal"
and "7B/both" stand beside the text-only "7B/Stage-I". Every picture can be read in grey.

Where we depart from the paper, or it is silent: it gives no intervals, ours are 95 %, and no
numbers behind Figures 5 and 6.
"""

import math
import re
import textwrap
from collections import namedtuple
from collections.abc import Iterable
from pathlib import Path

import numpy as np

import data
from judge import CRITERIA
from report.tables import MM, PAPER_SIZES, STAGES, TITLES, absent, distinct, paper_overall, stage_of

# paper Fig. 5
STRATEGIES = {"Stage-I": "text-only", "multimodal": "multimodal", "both": "text and multimodal"}
# paper 4.3; it does not say which Medbullets
FIGURE5 = ("medxpertqa-mm", "mmmu", "medqa", "medbullets-op4", "medbullets-op5")
FIGURE4_SIZES = ("7B", "32B", "72B")  # paper Fig. 4

Look = namedtuple("Look", "shade hatch marker line")
LOOKS = (  # ours: one a result, told apart in grey too
    Look("#b0b0b0", "", "o", "-"),
    Look("#5b8db8", "///", "s", "--"),
    Look("#c0504d", "...", "^", "-."),
    Look("#4f9d69", "xxx", "D", ":"),
    Look("#8064a2", "\\\\\\", "v", (0, (6, 1, 1, 1, 1, 1))),
)
STYLE = {  # SVG: text stays text, and the same results give the same file
    "axes.titlesize": 10, "legend.frameon": False, "legend.fontsize": 8, "hatch.linewidth": 0.6,
    "errorbar.capsize": 3, "svg.fonttype": "none", "svg.hashsalt": "medee",
}  # fmt: skip
SIDE = 60_000  # pixels of a picture's side: matplotlib draws at most 65,536


# --------------------------------------------------------------------------------------------------
# Parts of all pictures


def canvas(rows: int, columns: int, width: float, height: float, widths=None, heights=None):
    """(figure, axes (rows, columns)) of width x height inches. widths, heights: of the columns and
    rows, in proportion."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams.update(STYLE)
    figure = Figure(figsize=(width, height), layout="constrained")
    ratios = {"width_ratios": widths, "height_ratios": heights}
    return figure, figure.subplots(rows, columns, squeeze=False, **ratios)


def save(figure, *paths: Path) -> list[Path]:
    dpi = min(110, SIDE / max(figure.get_size_inches()))
    for path in paths:
        figure.savefig(path, dpi=dpi, metadata={"Date": None} if path.suffix == ".svg" else None)
    return list(paths)


def figures_of(result: dict, benchmark: str) -> dict | None:
    return result["benchmarks"].get(benchmark, {}).get("figures")


def accuracies(figures: Iterable[dict], times: float = 1):
    """`intervals` of the accuracies, times 100 for per cent."""
    return intervals([found["accuracy"] for found in figures], times)


def intervals(found: list[list[float]], times: float = 1):
    """(values (N), error bars (2, N) down and up) of N times [value, low, high]."""
    values, lows, highs = times * np.array(found).T
    return values, np.maximum(0, [values - lows, highs - values])


def offset(i: int, count: int, width: float) -> float:
    """From the middle of `count` places side by side to place i."""
    return (i - (count - 1) / 2) * width


def counts(key: str, figures: Iterable[dict]) -> str:
    """How many "questions" or "samples" these figures have: "2000", or "2000 / 400" where they
    differ."""
    return " / ".join(dict.fromkeys(str(found[key]) for found in figures))


def legend_below(figure, axes, columns: int) -> None:
    """One legend for all the panels, each label once, under them."""
    entries = {}
    for ax in axes:
        handles, labels = ax.get_legend_handles_labels()
        entries |= dict(zip(labels, handles))
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=columns)


def curve(ax, figures: dict, key: str, look: Look, label: str) -> None:
    """MV@n or pass@n over n, as key says, with its band."""
    n, (means, lows, highs) = list(map(int, figures[key])), zip(*figures[key].values())
    ax.fill_between(n, lows, highs, color=look.shade, alpha=0.15, lw=0)
    ax.plot(n, means, color=look.shade, ls=look.line, marker=look.marker, ms=5, label=label)
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter("{x:.0f}")


# --------------------------------------------------------------------------------------------------
# The paper's figures


def plot_paper(results: list[dict], out: Path) -> tuple[list[Path], list[str]]:
    """Draws figure4, and for each size figure5 and figure6, as .png and .svg, from the results that
    have what it takes. Returns (files, lines that say what was left out and why).
    Raises RowError for two results of one name."""
    distinct([result["name"] for result in results])
    stages, left_out, by_size = [], [], {}
    for result in results:
        size, stage = stage_of(result)
        by_size.setdefault(size, []).append(result)
        if size and stage in STRATEGIES and stage not in STAGES:
            left_out.append(f"Figures 4, 6: {result['name']} is an ablation, for Figure 5 only")
        else:
            stages.append(result)
    drawn = {"figure4": stages_by_size(stages, left_out)}
    for size, members in by_size.items():
        suffix = re.sub(r"[^\w.]+", "-", f"-{size}") if size else ""
        drawn["figure5" + suffix] = strategies(size, members, left_out)
        plain = [result for result in stages if stage_of(result)[0] == size]
        if len(plain) > len(LOOKS):
            many = f"Figure 6: {len(plain)} results of one size {size!r}"
            left_out.append(f"{many}, and only {len(LOOKS)} can be told apart; give fewer")
        else:
            drawn["figure6" + suffix] = curves(plain, left_out)
    paths = []
    for name, figure in drawn.items():
        paths += save(figure, out / f"{name}.png", out / f"{name}.svg") if figure else []
    return paths, left_out


def stages_by_size(results: list[dict], left_out: list[str]):
    """Figure 4: a panel a size; the paper's values hollow, ours filled, with intervals."""
    ours: dict[str, dict[str, dict]] = {}
    for result in results:
        size, stage = stage_of(result)
        if not size or stage not in STAGES:
            wanted = f"not named SIZE/STAGE with a stage of {', '.join(STAGES)}"
            left_out.append(f"Figure 4: {result['name']} is {wanted}")
        elif found := figures_of(result, MM):
            ours.setdefault(size, {})[stage] = found
        else:
            left_out.append(f"Figure 4: {result['name']} has no {MM}")
    if not ours:
        return None
    sizes = list(dict.fromkeys([*FIGURE4_SIZES, *ours]))
    if missing := absent(sizes, results):
        left_out.append(f"Figure 4: no result is called {', '.join(missing)}")
    figure, axes = canvas(1, len(sizes), 3.2 * len(sizes) + 0.6, 4.2)
    highs = [100 * found["accuracy"][2] for stages in ours.values() for found in stages.values()]
    for ax, size in zip(axes[0], sizes):
        size_panel(ax, size, ours.get(size, {}))
        ax.set(title=size, xlim=(-0.5, 2.5), ylim=(0, 1.25 * max(45, *highs)), xlabel="stage")
        ax.legend(loc="upper left")
    axes[0, 0].set_ylabel("accuracy in % (bars: 95 % interval)")
    figure.suptitle("MedXpertQA-MM, by model size and stage", fontsize=10)
    return figure


def size_panel(ax, size: str, ours: dict[str, dict]) -> None:
    """Accuracy by stage of one size. ours: figures by stage."""
    paper, own = ["–"] * 3, ["–"] * 3  # as printed under the axis
    if size in PAPER_SIZES:
        values = [paper_overall(PAPER_SIZES[size], stage) for stage in STAGES]
        label = f"paper, {PAPER_SIZES[size]}"
        ax.plot(np.arange(3) - 0.1, values, "--o", color="black", mfc="white", label=label)
        paper = [f"{value:.2f}" for value in values]
    if ours:
        places = [x for x, stage in enumerate(STAGES) if stage in ours]
        figures = [ours[STAGES[x]] for x in places]
        means, bars = accuracies(figures, 100)
        questions, samples = counts("questions", figures), counts("samples", figures)
        label = f"ours, {questions} questions × {samples} samples"
        ax.errorbar(np.array(places) + 0.1, means, bars, fmt="-s", color="#c0504d", label=label)
        for x, mean in zip(places, means):
            own[x] = f"{mean:.2f}"
    ticks = [f"{stage}\npaper {a}\nours {b}" for stage, a, b in zip(STAGES, paper, own)]
    ax.set_xticks(range(3), ticks, fontsize=9)


def strategies(size: str, results: list[dict], left_out: list[str]):
    """Figure 5: the model before Stage I, and after it on text, on images, on both."""
    by_stage = {stage_of(result)[1]: result for result in results if size}
    members = {stage: by_stage[stage] for stage in ("base", *STRATEGIES) if stage in by_stage}
    found: dict[str, list[dict]] = {}  # by benchmark, the figures of those members that have it
    for benchmark in FIGURE5:
        has = [figures_of(member, benchmark) for member in members.values()]
        found |= {benchmark: list(filter(None, has))} if any(has) else {}
    if len(members.keys() - {"base"}) < 2 or not found:
        wanted = f"two of SIZE/{', SIZE/'.join(STRATEGIES)} on one of {', '.join(FIGURE5)}"
        have = ", ".join(result["name"] for result in results)
        left_out.append(f"Figure 5: needs {wanted}; {have} do not make it")
        return None
    figure, axes = canvas(1, 1, 3 + 1.7 * len(found), 4.6)
    ax, width = axes[0, 0], 0.8 / len(members)
    for i, ((stage, result), look) in enumerate(zip(members.items(), LOOKS)):
        own = {x: figures_of(result, benchmark) for x, benchmark in enumerate(found)}
        lacking = [benchmark for x, benchmark in enumerate(found) if not own[x]]
        left_out += [f"Figure 5: {result['name']} has no {benchmark}" for benchmark in lacking]
        here = {x + offset(i, len(members), width): part for x, part in own.items() if part}
        means, bars = accuracies(here.values(), 100)
        name = STRATEGIES.get(stage, "before Stage I")
        label = f"{name} ({counts('samples', here.values())} samples)"
        style = {"color": look.shade, "hatch": look.hatch, "edgecolor": "black", "lw": 0.5}
        drawn = ax.bar(list(here), means, 0.92 * width, yerr=bars, label=label, **style)
        ax.bar_label(drawn, fmt="%.1f", fontsize=7, padding=1)
    labels = [f"{TITLES[key]}\nn = {counts('questions', has)}" for key, has in found.items()]
    ax.set(xticks=range(len(found)), xticklabels=labels, ylim=(0, 105))
    ax.set(title=f"{size}: what Stage I is trained on", xlabel="benchmark, n questions")
    ax.set(ylabel="accuracy in % (bars: 95 % interval)")
    legend_below(figure, [ax], len(members))
    return figure


def curves(results: list[dict], left_out: list[str]):
    """Figure 6: a row a benchmark, MV@n on the left and pass@n on the right, with scales of their
    own."""
    many: dict[str, list[tuple]] = {}
    for result, look in zip(results, LOOKS):
        for benchmark, part in result["benchmarks"].items():
            if part["figures"]["samples"] > 1:
                label = f"{result['name']} ({part['figures']['samples']} samples)"
                many.setdefault(benchmark, []).append((label, look, part["figures"]))
            else:
                why = f"has one sample a question of {benchmark}; evaluate with -n 32"
                left_out.append(f"Figure 6: {result['name']} {why}")
    if not many:
        return None
    figure, axes = canvas(len(many), 2, 10, 0.6 + 3.2 * len(many))
    panels = (("majority", "majority vote, MV@n"), ("pass", "any of n right, pass@n"))
    for (benchmark, drawn), row in zip(many.items(), axes):
        asked = f"{counts('questions', [found for _, _, found in drawn])} questions"
        for ax, (key, title) in zip(row, panels):
            for label, look, found in drawn:
                curve(ax, found, key, look, label)
            ax.set(xlabel="n samples", ylabel="share right (band: 95 % interval)")
            ax.set_title(f"{TITLES.get(benchmark, benchmark)} ({asked}): {title}")
    legend_below(figure, axes.flat, min(3, len(results)))
    return figure


# --------------------------------------------------------------------------------------------------
# The report of one run

SPAN_COLOURS = {"think": "#4f9d69", "answer": "#31a0b5", "tag": "#c9a227"}
DPO_CURVES = (  # key of metrics.jsonl, label, colour
    ("loss", "loss", "#c0504d"),
    ("margin", "reward margin", "#5b8db8"),
    ("accuracy", "pairs in the right order", "#8a8a8a"),
)


def plot_report(results: list[dict], sft: list[dict], dpo: list[dict], path: Path) -> None:
    """Accuracy and criteria by stage, training curves, majority vote and pass@n, from the results
    with image questions. sft, dpo: the rows of the stages' metrics.jsonl."""
    figure, axes = canvas(2, 3, 15, 8.5)
    (right, criteria, invented), (losses, preferences, votes) = axes
    drawn = [pair for pair in zip(results, LOOKS * len(results)) if "image" in pair[0]["groups"]]
    width = 0.81 / max(1, len(drawn))
    for x, (result, look) in enumerate(drawn):
        image, name = result["groups"]["image"], result["name"]
        for place, kind, hatch in ((x - 0.2, "image", ""), (x + 0.2, "text", "//")):
            if kind in result["groups"]:
                mean, bars = accuracies([result["groups"][kind]])
                style = {"color": look.shade, "hatch": hatch, "edgecolor": "white"}
                bar = right.bar(place, mean, 0.38, yerr=bars, **style)
                right.bar_label(bar, fmt="%.2f", fontsize=9, padding=1)
        if "criteria" in image:
            values = [*(image["criteria"][name] for name in CRITERIA), image["all_criteria"][0]]
            places = np.arange(len(values)) + offset(x, len(drawn), width)
            criteria.bar(places, values, 0.93 * width, color=look.shade, label=name)
        if (share := image.get("hallucinated")) is not None:
            text = f"{share:.2f}\n{image['judged_looking']} chains"
            bar = invented.bar(x, share, 0.5, color=look.shade)
            invented.bar_label(bar, [text], fontsize=9, padding=1)
        curve(votes, image, "majority", look._replace(marker="o", line="-"), name)
        curve(votes, image, "pass", look._replace(marker="^", line="--"), "")
    training_curves(losses, preferences, sft, dpo)
    names = [result["name"] for result, _ in drawn]
    for ax in (right, invented):
        ax.set_xticks(range(len(names)), names, fontsize=10 if len(names) < 4 else 7)
    ticks = [name.replace("_", "\n") for name in (*CRITERIA, "all four")]
    criteria.set_xticks(range(len(ticks)), ticks, fontsize=8)
    for ax, title, top in (
        (right, "accuracy (plain: image, hatched: text; bars 95 %; dotted: 1 in 4)", 1.08),
        (criteria, "share of chains meeting each criterion (image questions)", 1.15),
        (invented, "hallucination among chains that look at the image", 1.05),
        (votes, "MV@n (solid), pass@n (dashed), image questions (95 %)", 1.02),
    ):
        ax.set(title=title, ylim=(0, top))
    right.axhline(0.25, color="black", lw=0.8, ls=":")
    votes.set_xlabel("n")
    criteria.legend(loc="upper center", ncols=3)
    votes.legend(loc="lower right", ncols=3)
    save(figure, path)


def series(rows: list[dict], key: str) -> tuple[list[int], list[float]]:
    """(steps, values) of those rows of a metrics.jsonl that have the key."""
    rows = [row for row in rows if key in row]
    return [row["step"] + 1 for row in rows], [row[key] for row in rows]


def training_curves(losses, preferences, sft: list[dict], dpo: list[dict]) -> None:
    """Stage I's loss by span, and Stage II's figures, dashed on the pairs that are held out."""
    for name, colour in SPAN_COLOURS.items():
        losses.plot(*series(sft, name), color=colour, label=name, lw=1.2)
    for key, label, colour in DPO_CURVES:
        preferences.plot(*series(dpo, key), color=colour, label=label, lw=1.2)
        held = series(dpo, f"held_{key}")
        if held[0]:
            look = {"color": colour, "marker": "o", "ls": "--", "lw": 0.8}
            preferences.plot(*held, label=f"{label}, held out", **look)
    losses.set(title="Stage I: loss per token of each span", xlabel="step", yscale="log")
    preferences.axhline(math.log(2), color="black", lw=0.8, ls=":")
    preferences.set(title="Stage II: DPO (dotted: ln 2)", xlabel="step")
    losses.legend(loc="upper right")
    preferences.legend(loc="upper left")


def pair_columns(row: dict) -> list[tuple[str, str, str]]:
    """(title, colour, wrapped text) of a pair's question and chains."""
    failed = "rejected: fails " + ", ".join(row["failed"]).replace("_", " ")

    def wrap(text: str, width: int) -> str:
        return "\n".join(textwrap.fill(line, width) for line in text.split("\n"))

    return [
        ("question", "black", wrap(row["prompt"][-1]["content"], 36)),
        ("chosen: meets all four", "#2e7d4f", wrap(row["chosen"], 56)),
        (failed, "#b03a2e", wrap(row["rejected"], 56)),
    ]


def plot_films(pairs: list[dict], image_root: Path, path: Path) -> None:
    """A sheet of preference pairs: the image, the question, the chosen chain beside the rejected
    one and why it failed. Nothing is written where no pair has an image."""
    from command.images import load_image

    shown: dict[str, dict] = {}  # one pair a question: one of each failure first, then any two
    for reason in (*CRITERIA, None, None):
        for row in pairs:
            fits = row["images"] and (reason is None or reason in row["failed"])
            if fits and row["id"] not in shown:
                shown[row["id"]] = row
                break
    if not shown:
        return
    sheet = [pair_columns(row) for row in shown.values()]
    lines = [max(text.count("\n") + 1 for *_, text in columns) for columns in sheet]
    heights = [max(2.1, 0.6 + 0.16 * count) for count in lines]  # inches
    figure, axes = canvas(len(shown), 4, 16, sum(heights), [1, 2, 3, 3], heights)
    for row, texts, (film, *columns) in zip(shown.values(), sheet, axes):
        # in RGB: a grey film would be given false colours
        film.imshow(load_image(data.image_file(image_root, row["images"][0])))
        film.set_anchor("N")
        film.axis("off")
        for ax, (title, colour, text) in zip(columns, texts):
            ax.text(0, 1, text.replace("$", r"\$"), va="top", fontsize=9, family="monospace")
            ax.set_title(title, loc="left", fontsize=8, color=colour)
            ax.axis("off")
    save(figure, path)
