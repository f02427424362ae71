"""Does the model look at the image? Each question is asked with other images, and its answers are
compared.

    real       its own image
    again      its own image, other samples: what chance alone changes
    swapped    the image of another question of the same benchmark, modality and number of images
    grey       images of its size in one grey, 127; mean: in the mean colour of its own image
    NAME       images that the question brings in meta.shown: {NAME: {"images": [...], "answer":
               ...}}. The miniature has `counterfactual`: a film of another sign of the modality, by
               which another option is right; and `normal`: a film without signs

    changes     share of answers that differ, real against swapped, less real against again
    sight       accuracy, real less swapped
    follows     counterfactual: answers by the film that is shown, less answers by its own
    ungrounded  of the chains that read a swapped image, by the judge: share with the answer that
                the real image was given. At most so many answer from the text: the swapped image
                may call for the same answer
    invented    of the chains that read a normal image, by the judge: share that hallucinate

Shares are over all pairs of a sample of one image and a sample of the other. grey measures what
breaks, not what is looked at: no model has met an empty image, and most answers to one cannot be
read. So its accuracy stands beside its unparsed share, and beside what a reader could reach who
knows all rules and sees no image (meta.blind, else chance).

    python looking.py --engine vllm:out/dpo/merged --questions mmmu.jsonl --images . --out out/look
    python -m report looking --results out/look-base out/look-stage1 out/look-stage2 --out out/looks

reads questions.jsonl; writes OUT/looking.json, OUT/flat (the grey images), OUT/verdicts.jsonl (with
--judge), OUT/stage.json.

Where we depart from the paper, or it is silent: it does not ask. All of this is ours.
"""

import argparse
import os
import random
import statistics
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

from PIL import Image

import data
import judge
from benchmarks import modalities
from command import flags, stage
from command.images import image_size, load_image
from engines import bill, inference, open_engine
from engines.inference import Request
from evaluate import add_flags, make_request, read_all, sampling_of
from report import looking as measured
from report import score

GREY = (127, 127, 127)  # ours: half of an image's range
OTHERS = ("swapped", "grey", "mean")  # what every question is asked with beside its own image
WHOLE_IMAGE = "mmmu-pro-vision"  # its question is in the image: another image is no question


def swap(questions: list[data.Question], root: Path, seed: int) -> dict[str, list[str]]:
    """{id: the images of another question}: one of the same benchmark, modality and number of
    images, none of whose files is its own; they may still show the same. A question without such a
    partner is left out."""
    groups: dict[tuple, list[data.Question]] = {}
    for one in questions:
        modality = modalities.modality(str(one.meta.get("modality", "")))
        groups.setdefault((one.source, modality, len(one.images)), []).append(one)
    found = {}
    for group, members in groups.items():
        random.Random(f"{seed}/{group}").shuffle(members)
        contents = [[data.file_hash(root / image) for image in one.images] for one in members]
        for at, one in enumerate(members):
            # the next ones in a shuffled ring
            ring = [*range(at + 1, len(members)), *range(at)]
            other = next((i for i in ring if not {*contents[i]} & {*contents[at]}), None)
            if other is not None:
                found[one.id] = members[other].images
    return found


def flat(path: Path, folder: Path, name: str) -> Path:
    """An image of the size of that at `path`, in one colour."""
    made = folder / f"{data.file_hash(path)[:16]}-{name}.png"
    if not made.exists():
        image = load_image(path)
        mean = image.resize((1, 1), Image.Resampling.BOX).getpixel((0, 0))
        colour = GREY if name == "grey" else mean
        made.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", image.size, colour).save(data.unfinished(made), "PNG")
        os.replace(data.unfinished(made), made)  # a kill leaves no part of an image
    return made


def shown_images(
    questions: list[data.Question], swaps: dict[str, list[str]], root: Path, out: Path
) -> dict[str, dict[str, list[Path]]]:
    """{arm: {id: images}} of all arms but `real` and `again`. Raises RowError for an image that is
    not there."""
    found: dict[str, dict[str, list[Path]]] = {name: {} for name in OTHERS}
    for one in questions:
        own = inference.image_paths(one, root)
        if one.id in swaps:
            found["swapped"][one.id] = [root / image for image in swaps[one.id]]
        for name in ("grey", "mean"):
            found[name][one.id] = [flat(path, out / "flat", name) for path in own]
        for name, arm in one.meta.get("shown", {}).items():
            brought = replace(one, images=arm["images"])
            found.setdefault(name, {})[one.id] = inference.image_paths(brought, root)
    return found


def requests_of(
    questions: list[data.Question],
    shown: dict[str, dict[str, list[Path]]],
    args: argparse.Namespace,
) -> list[Request]:
    """Of each question: 2 n samples with its own image, of which the second half is `again`, and n
    with each other image."""
    made = []
    for one in questions:
        own = make_request(one, args.prompt, Path(args.images), 2 * args.n)
        made.append(own)
        for name, images in shown.items():
            if one.id in images:
                other = replace(own, id=f"{one.id}/{name}", images=images[one.id])
                made.append(replace(other, samples=own.samples[: args.n]))
    return made


def judge_others(
    rows: dict[tuple[str, int], dict],
    questions: list[data.Question],
    swaps: dict[str, list[str]],
    args: argparse.Namespace,
) -> dict[tuple[str, int], dict | None]:
    """{(id, sample): criteria} of the chains about a swapped or a normal image; the judge sees that
    image."""
    asked = {}
    for one in questions:
        arms = {name: arm["images"] for name, arm in one.meta.get("shown", {}).items()}
        for name, images in {**arms, "swapped": swaps.get(one.id)}.items():
            if images and name in measured.JUDGED:
                asked[f"{one.id}/{name}"] = replace(one, images=images)
    chains = [row for (key, _), row in rows.items() if key in asked and row["response"].strip()]
    engine = open_engine(args.judge, inference.setup_of(args))
    verdicts = judge.judge_chains(engine, chains, asked, args)
    data.write_jsonl(Path(args.out) / "verdicts.jsonl", verdicts)
    return {(row["id"], row["sample"]): row["criteria"] for row in verdicts}


def entry_of(
    question: data.Question,
    rows: dict[tuple[str, int], dict],
    arms: list[str],
    criteria: dict[tuple[str, int], dict | None],
    n: int,
) -> dict:
    """What the measures need of one question: its choices by arm, and the verdicts on the chains
    about another image."""

    def choices(key: str, samples: range) -> list[str | None]:
        return [score.choice_of(rows[key, k], question) for k in samples]

    key, found = question.id, {}
    found["real"], found["again"] = choices(key, range(n)), choices(key, range(n, 2 * n))
    for arm in arms:
        if (f"{key}/{arm}", 0) in rows:
            found[arm] = choices(f"{key}/{arm}", range(n))
    brought = question.meta.get("shown", {})
    blind = question.meta.get("blind", 1 / len(question.options) if question.options else 0.0)
    return {
        "id": key,
        "source": question.source,
        "answer": question.answer,
        "blind": blind,
        "follows": {name: arm["answer"] for name, arm in brought.items() if arm.get("answer")},
        "choices": found,
        "criteria": {
            arm: [criteria.get((f"{key}/{arm}", k)) for k in range(n)]
            for arm in measured.JUDGED
            if arm in found
        },
    }


def image_tokens(paths: list[Path], pixels: int) -> int:
    """About how many tokens images have, cut to `pixels`."""
    sizes = [image_size(path) for path in paths]
    return sum(min(width * height, pixels) // bill.PATCH**2 for width, height in sizes)


def report_swaps(
    questions: list[data.Question], swaps: dict[str, list[Path]], args: argparse.Namespace
) -> None:
    """Another image may have another number of tokens, and then more changes than the content."""
    ratios = []
    for one in questions:
        if one.id in swaps:
            own = image_tokens(inference.image_paths(one, Path(args.images)), args.pixels)
            ratios.append(image_tokens(swaps[one.id], args.pixels) / max(1, own))
    message = f"{len(questions)} image questions; {len(questions) - len(swaps)} have no other of "
    message += "their benchmark, modality and number of images, and are not swapped"
    if ratios:
        least, middle, most = min(ratios), statistics.median(ratios), max(ratios)
        message += (
            f"; image tokens, swapped over own: median {middle:.2f}, {least:.2f} to {most:.2f}"
        )
    print(message)


def questions_of(args: argparse.Namespace) -> list[data.Question]:
    """The image questions, without those whose text is in the image."""
    image = [one for one in read_all(args.questions).values() if one.images]
    kept = [one for one in image if one.source != WHOLE_IMAGE]
    if not kept:
        raise data.RowError(
            f"{' '.join(args.questions)}: no question with an image beside its text"
        )
    if len(kept) < len(image):
        left = len(image) - len(kept)
        print(f"left out: {left} of {WHOLE_IMAGE}; with another image they are no questions")
    return data.draw(kept, args.limit)


def run(args: argparse.Namespace) -> None:
    started, out, root = time.time(), Path(args.out), Path(args.images)
    questions = questions_of(args)
    specs = [spec for spec in (args.engine, args.judge) if spec]
    inputs = [*args.questions, *filter(None, map(inference.checkpoint, specs))]
    images = data.image_files(root, map(vars, questions))
    if not stage.open_folder(args, inputs, inference.FREE, images):
        return
    engines = {spec: inference.identity(spec) for spec in specs}
    bill.announce(costs(questions, args), args.images_may_leave)
    swaps = swap(questions, root, args.seed)
    shown = shown_images(questions, swaps, root, out)
    requests = requests_of(questions, shown, args)
    report_swaps(questions, shown["swapped"], args)
    sampling = sampling_of(args)
    to_row = partial(inference.completion_row, spec=args.engine)
    engine = open_engine(args.engine, inference.setup_of(args))
    # the role and the ids of evaluate.py, whose completions serve here too
    rows = inference.complete_all(engine, requests, sampling, "evaluate", to_row, args)
    engine.close()
    criteria = judge_others(rows, questions, swaps, args) if args.judge else {}
    entries = [entry_of(one, rows, list(shown), criteria, args.n) for one in questions]
    found = measured.figures_of(entries)
    results = {"name": args.name or out.name, "engine": args.engine, "prompt": args.prompt}
    results |= {"sampling": vars(sampling), "figures": found, "entries": entries}
    score.write_results(out / "looking.json", results)
    for name, words in measured.MEASURES.items():
        if name in found:
            print(f"{results['name']}: {words} {measured.cell(found[name])}")
    outputs = [out / "looking.json"] + [out / "verdicts.jsonl"] * bool(args.judge)
    stage.finish(args, outputs, started, {}, engines)


def costs(questions: list[data.Question], args: argparse.Namespace) -> list[bill.Cost]:
    """What the engine and the judge may be asked at most."""
    sizes = []
    for one in questions:
        arms = 2 + len(OTHERS) + len(one.meta.get("shown", {}))  # 2: `real` and `again`
        sizes += bill.sizes([make_request(one, args.prompt, Path(args.images), arms * args.n)])
    found = [bill.cost("looking", args.engine, sizes, 1, args.max_tokens, args.pixels)]
    if args.judge:
        arms = [(one, arm) for one in questions for arm in ("swapped", *one.meta.get("shown", {}))]
        judged = [one for one, arm in arms if arm in measured.JUDGED]
        chains = [(one, bill.CHARACTERS * args.max_tokens) for one in judged] * args.n
        found.append(judge.cost(chains, args))
    return found


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Does a model look at the image?")
    add = parser.add_argument
    add_flags(add)
    about = "samples of a question with each image, and twice as many with its own"
    add("-n", type=flags.SAMPLES, default=4, metavar="N", help=about)  # ours
    add("--prompt", choices=["paper", "bare"], default="paper", help="as in evaluate.py")
    add("--judge", default="", help="engine spec; says which chains read another image")
    add("--limit", type=flags.whole(0), default=0, help="so many image questions only; 0: all")
    inference.add_flags(parser)
    add("--seed", type=flags.SEED, default=0)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    run(parse(argv))


if __name__ == "__main__":
    flags.run_script(main)
