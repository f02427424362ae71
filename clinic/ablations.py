"""Ablations of the miniature: what else each stage could learn from, and how it then does.

An ablation is the demo with other demonstrations or other preference pairs; base model, settings
and test questions are the demo's. `medee.py claims` runs them in RUN/ablations/NAME, and
`python -m report claims` compares them.

Stage I, from the base model:
    no-hasty     without the teacher that always writes one sign on the left
    text         demonstrations on 240 text questions,
    image-0 ...  on image questions, whose teachers write a wrong reading of 0, 20 or 40 % of the
                 films (rule and answer stay right: a wrong answer would be rejected),
    mixed-0 ...  or half of each. Their films are neither Stage II's nor the test's.
    withheld     base model and demonstrations lack a third of the rules (world.WITHHELD)
Stage II, from the demo's Stage I and at most 400 pairs, drawn by the seed:
    four         the demo's own: all four criteria; four-10: at ten times the learning rate
    swap-20 ...  20, 35 or 50 % of the pairs are the wrong way round; 50 are random labels
    logic, image, truth, reflection  pairs by one criterion alone; no-logic ...: by the other three
    lenient      pairs of a judge that lets half of what fails pass (roles.ERRING); those of
                 judge-blind are no-truth's, and those of judge-style are reflection's
    right-wrong  right answers above wrong ones, whoever reasons well
    length       each chosen chain with the rejected one of the nearest length
    questions    the demo's pairs, a question's in one step
    chosen       no preference: SFT on the chosen chains, at Stage II's batch and learning rate, on
                 all of them (of pairs, 5 % are held out); chosen-10: at ten times that rate
captions: what the three models say if asked for the film alone, as they were taught to be asked.

This command makes the pairs, at most -n of them, drawn by the seed:

    python -m clinic.ablations --pairs pairs.jsonl --out OUT [--swap 20] [--chosen]
    python -m clinic.ablations --rollouts rollouts.jsonl --questions q.jsonl --out OUT

reads pairs.jsonl, or rollouts.jsonl; writes OUT/pairs.jsonl, with --chosen OUT/demos.jsonl

All numbers are ours: the paper has no miniature.
"""

import argparse
import random
import time
from pathlib import Path

import answers
import data
import judge
from clinic.roles import MISREADING, TEACHERS
from command import flags, schema, stage
from command.pipeline import Stage, stages_from
from rollout import read_rollouts

APART = 1000  # added to the seed for the worlds of Stage I's ablations
WORLDS = {"text": (240, 0), "image": (0, 240), "mixed": (120, 120)}  # text, image questions
PAIRS = 400  # as many as most ablations have
SWAPS = (20, 35, 50)  # per cent of pairs the wrong way round
JUDGES = {"blind": "no-truth", "lenient": "lenient", "style": "reflection"}  # ablation of each
ALONE = dict(zip(("logic", "image", "truth", "reflection"), judge.CRITERIA))
PREFERRED = "--rollouts {run}/rollout/rollouts.jsonl --questions {run}/curate/image.jsonl"
SEED = "--seed {seed}"
RATES = {"": 3e-5, "-10": 3e-4}  # medee.py's MINI["dpo"], and ten times that
CAP = 2  # most pairs of a question, medee.py's MINI["pairs"]


# --------------------------------------------------------------------------------------------------
# The stages, in the form of medee.py's METHOD


def test(name: str, model: str, called: str = "eval") -> str:
    return (
        f"ablations/{name}/{called} python evaluate.py --engine hf:{model} --name {name} "
        f"--questions {{test}} {{images}} {{evaluate}} --judge clinic:judge {SEED}"
    )


def stage1(
    name: str, questions: str, teachers: list[str], root: str = "{root}", base: str = "{base}"
) -> list[str]:
    """Stage I from the chains of `teachers`."""
    folder, asked = f"ablations/{name}", " ".join(f"clinic:{teacher}" for teacher in teachers)
    return [
        f"{folder}/distill python distill.py run --questions {questions} --images {root} "
        f"--teachers {asked} {{distill}} {SEED}",
        f"{folder}/sft python sft.py --model {base} --images {root} {{image}} "
        f"--demos {{run}}/{folder}/distill/demos.jsonl {{sft}} {SEED}",
        test(name, f"{{run}}/{folder}/sft/merged"),
    ]


def stage2(name: str, source: str = "--pairs {run}/pairs/pairs.jsonl", more: str = "") -> list[str]:
    """Stage II from the pairs that this command makes of `source`. more: flags of dpo.py."""
    folder = f"ablations/{name}"
    return [
        f"{folder}/matched python -m clinic.ablations {source} {SEED}",
        f"{folder}/dpo python dpo.py --model {{run}}/sft/merged {{images}} {{dpo}} {more} "
        f"--pairs {{run}}/{folder}/matched/pairs.jsonl {SEED}",
        test(name, f"{{run}}/{folder}/dpo/merged"),
    ]


def paired(name: str, choose: str, verdicts: str = "{run}/verdicts") -> list[str]:
    """Stage II from pairs that judge.py chooses in another way."""
    folder = f"ablations/{name}/pairs"
    made = (
        f"{folder} python judge.py pairs --verdicts {verdicts}/verdicts.jsonl {PREFERRED} "
        f"{{pairs}} {choose} {SEED}"
    )
    return [made, *stage2(name, f"--pairs {{run}}/{folder}/pairs.jsonl")]


def of_stage1() -> list[str]:
    honest = [teacher for teacher in TEACHERS if teacher != "hasty"]
    lines = stage1("no-hasty", "{run}/curate/text.jsonl", honest)
    for kind, (text, image) in WORLDS.items():
        # dev: nothing in it that curation must find
        counts = f"--dev-text {text} --dev-image {image} --text 0 --image 0"
        folder, world = f"{kind}-world", f"{{run}}/ablations/{kind}-world"
        counts += " --test-text 0 --test-image 0"
        lines += [f"ablations/{folder} python -m clinic world {counts} --seed {{apart}}"]
        for percent in (0, *MISREADING) if image else (0,):
            name = f"{kind}-{percent}" if image else kind
            misread = [f"{teacher}-{percent}" if percent else teacher for teacher in TEACHERS]
            lines += stage1(name, f"{world}/dev.jsonl", misread, root=world)
    folder = "ablations/withheld"
    base, world = f"{{run}}/{folder}/base", f"{{run}}/{folder}/world"
    counts = "--text 400 --image 0 --dev-text 0 --dev-image 0 --test-text 0 --test-image 0"
    lines += [
        f"{folder}/base python -m clinic teach {{teach}} --withhold {SEED}",
        f"{folder}/world python -m clinic world {counts} --withhold --seed {{apart}}",
        test("withheld", base, "eval-base"),
    ]
    return lines + stage1("withheld", f"{world}/bank.jsonl", [*TEACHERS], base=base)


def of_stage2() -> list[str]:
    lines = stage2("four")
    for percent in SWAPS:
        lines += stage2(f"swap-{percent}", f"--pairs {{run}}/pairs/pairs.jsonl --swap {percent}")
    folder = "ablations/lenient/verdicts"
    asked = f"python judge.py verdicts --judge clinic:judge-lenient {PREFERRED} {{images}}"
    lines += [f"{folder} {asked} {SEED}", *paired("lenient", "", f"{{run}}/{folder}")]
    for name, criterion in ALONE.items():
        others = " ".join(other for other in ALONE.values() if other != criterion)
        lines += paired(name, f"--criteria {criterion}")
        lines += paired(f"no-{name}", f"--criteria {others}")
    lines += stage2("right-wrong", PREFERRED)
    lines += paired("length", "--rule length-matched")
    lines += stage2("questions", more="--order question")
    lines += stage2("four-10", more=f"--lr {RATES['-10']}")
    for which, rate in RATES.items():
        name, chosen = f"chosen{which}", "--pairs {run}/pairs/pairs.jsonl --chosen"
        folder = f"ablations/{name}"
        lines += [
            f"{folder}/matched python -m clinic.ablations {chosen} {SEED}",
            f"{folder}/sft python sft.py --model {{run}}/sft/merged {{images}} --method full "
            f"--lr {rate} --epochs 1 --batch 16 "
            f"--demos {{run}}/{folder}/matched/demos.jsonl {SEED}",
            test(name, f"{{run}}/{folder}/sft/merged"),
        ]
    return lines


def captions() -> list[str]:
    models = {"base": "{base}", "stage1": "{run}/sft/merged", "stage2": "{run}/dpo/merged"}
    asked = "--questions {run}/world/captions.jsonl --prompt bare -n 1 --temperature 0"
    return [
        f"ablations/captions/{name} python evaluate.py --engine hf:{model} {asked} {{images}} "
        f"--max-tokens 96 {SEED}"
        for name, model in models.items()
    ]


# those that are compared with the demo's stages
NAMES = [line.split("/")[1] for line in (*of_stage1(), *of_stage2()) if "/eval " in line]


def stages(values: dict) -> list[Stage]:
    """All of them. values: as medee.py fills METHOD; "seed" is of the demo."""
    lines = [*captions(), *of_stage1(), *of_stage2()]
    return stages_from("\n".join(lines), values | {"apart": values["seed"] + APART})


# --------------------------------------------------------------------------------------------------
# Pairs


def right_above_wrong(
    rollouts: list[dict], questions: judge.Questions, rng: random.Random
) -> list[dict]:
    """Right answers above wrong ones, at most CAP pairs of a question."""
    sides: dict[str, tuple[list, list]] = {}
    for row in rollouts:
        if row["finish_reason"] == "stop":
            wrong = not answers.is_correct(row["response"], questions[row["id"]])
            sides.setdefault(row["id"], ([], []))[wrong].append({**row, "failed": []})
    return [
        judge.pair_row(questions[key], good, bad)
        for key, (right, wrong) in sides.items()
        for good, bad in judge.choose_pairs(right, wrong, "all", CAP, rng)
    ]


def swapped(pair: dict) -> dict:
    """The pair the wrong way round."""
    other = {"chosen": "rejected", "rejected": "chosen"}

    def renamed(key: str) -> str:
        side, _, rest = key.partition("_")
        return key.replace(side, other.get(side, side), 1)

    return {renamed(key): value for key, value in pair.items()}


def demo_of(pair: dict, number: int) -> dict:
    """The chosen chain as a demonstration; a chain may be in several pairs."""
    turn = {"role": "assistant", "content": pair["chosen"]}
    row = {"id": f"{pair['id']}/{number}", "messages": [*pair["prompt"], turn]}
    return row | {"images": pair["images"]}


def run(args: argparse.Namespace) -> None:
    started, out = time.time(), Path(args.out)
    inputs = [args.pairs] if args.pairs else [args.rollouts, args.questions]
    if not stage.open_folder(args, inputs):
        return
    rng = random.Random(args.seed)
    if args.pairs:
        pairs = schema.read_rows(args.pairs, "pairs")
    else:
        questions = {one.id: one for one in schema.read_questions(args.questions)}
        pairs = right_above_wrong(read_rollouts(args.rollouts, questions), questions, rng)
    found = len(pairs)
    pairs = rng.sample(pairs, min(args.n, found))
    wrong = rng.sample(range(len(pairs)), round(len(pairs) * args.swap / 100))
    for index in wrong:
        pairs[index] = swapped(pairs[index])
    path = out / ("demos.jsonl" if args.chosen else "pairs.jsonl")
    rows = [demo_of(pair, at) for at, pair in enumerate(pairs)] if args.chosen else pairs
    data.write_jsonl(path, rows)
    print(f"{len(pairs)} of {found} pairs, {len(wrong)} the wrong way round")
    stage.finish(args, [path], started, {"pairs": len(pairs), "wrong": len(wrong)})


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Pairs for an ablation.")
    add = parser.add_argument
    add("--pairs", default="", help="pairs.jsonl")
    add("--rollouts", default="", help="rollouts.jsonl: right answers above wrong ones")
    add("--questions", default="", help="questions.jsonl of the rollouts")
    add("-n", type=flags.whole(1), default=PAIRS, help="most pairs")
    add("--swap", type=flags.whole(0, 100), default=0, help="per cent the wrong way round")
    add("--chosen", action="store_true", help="write the chosen chains as demonstrations")
    add("--out", required=True, help="folder to write")
    add("--seed", type=flags.SEED, default=0)
    args = parser.parse_args(argv)
    given = [bool(path) for path in (args.pairs, args.rollouts, args.questions)]
    if given not in ([True, False, False], [False, True, True]):
        parser.error("give --pairs, or --rollouts and --questions")
    return args


def main(argv: list[str] | None = None) -> None:
    run(parse(argv))


if __name__ == "__main__":
    flags.run_script(main)
