"""Pictures of an evaluation: the paper's Figures 4 to 6, accuracy by kind of image, and the report of one run (paper §4).

    plot_paper     figure4: accuracy by stage and model size     figure5: what Stage I is trained on
                   figure6: MV@n and pass@n                      modalities: accuracy by kind of image
    plot_report    accuracy, criteria, training curves and votes on one sheet       plot_films: preference pairs

All is drawn from results.json, named SIZE/STAGE as tables.py has it; for Figure 5 "7B/multimodal" and "7B/both" stand beside
"7B/Stage-I", which is the text-only one. What a picture has no use for is said: plot_paper returns (files written, lines that
say who was left out of what, and why). Every picture can be read in grey.

Where we depart from the paper, or it is silent: it gives no intervals, ours are 95 %, and no numbers behind Figures 5 and 6.
"""

import math
import re
import textwrap
from collections.abc import Iterable
from pathlib import Path

import data
from judge import CRITERIA
from tables import MM, SIZES, STAGES, TITLES, distinct, paper_overall, stage_of

STRATEGIES = {"Stage-I": "text-only", "multimodal": "multimodal", "both": "text and multimodal"}  # paper Fig. 5
FIGURE5 = ("medxpertqa-mm", "mmmu", "medqa", "medbullets-op4", "medbullets-op5")  # paper 4.3; which Medbullets it does not say

LOOKS = (  # one a result, told apart in grey too: shade, hatch, marker, line
    ("#b0b0b0", "", "o", "-"), ("#5b8db8", "///", "s", "--"), ("#c0504d", "...", "^", "-."), ("#4f9d69", "xxx", "D", ":"),
    ("#8064a2", "\\\\\\", "v", (0, (6, 1, 1, 1, 1, 1))),
)  # fmt: skip


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
    found, sources = [], list(dict.fromkeys(TITLES.get(entry["source"], entry["source"]) for result in results for entry in result["entries"] if entry["image"]))
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
    ax.set(yticks=range(len(order)), yticklabels=labels, xlim=(0, 1), ylim=(-0.6, len(order) - 0.4), title=f"accuracy by imaging modality: {', '.join(sources)}")
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
        if seen := [row for row in dpo if f"held_{key}" in row]:  # on the pairs that are held out
            at, values = [row["step"] + 1 for row in seen], [row[f"held_{key}"] for row in seen]
            axes[1, 1].plot(at, values, color=colour, label=f"{label}, held out", marker="o", ls="--", lw=0.8)
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
    from images import load_image

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
        film.imshow(load_image(data.image_file(image_root, row["images"][0])))  # a grey film would be given false colours
        film.set_anchor("N")
        film.axis("off")
        for ax, (title, colour, text) in zip(columns, texts):
            ax.text(0, 1, text.replace("$", r"\$"), va="top", fontsize=9, family="monospace")
            ax.set_title(title, loc="left", fontsize=9, color=colour)
            ax.axis("off")
    save(figure, path.with_suffix(""), path.suffix)
