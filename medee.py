"""MedE² in order: each stage is a command, printed, run and resumed (paper §3, Fig. 2).

    python medee.py demo                         the whole method on a laptop: a miniature clinic
    python medee.py run qwen2.5-vl-7b ...        the same stages at the paper's size
    python medee.py status --out runs/demo       which stages of a run are done
    python medee.py adopt sft --out runs/7b      takes over a stage that was finished by hand
    python medee.py plan --gpus 1                which rows fit, for every recipe
    python medee.py plan qwen2.5-vl-7b --gpus 8  memory of a GPU in both stages, term by term
    python medee.py claims                       demo and ablations, three seeds, with intervals

METHOD below is the method. {name} is a path, the run's input, or the recipe's flags for that stage;
--out {run}/NAME is added to each. The miniature and the 7B differ in their recipes, never in the
code. Engines' completions are kept in replies/, beside a stage's folder; RUN/run.json lists the
stages.
command/pipeline.py decides what is done and what must be made anew.

Where we depart from the paper, or it is silent: see each script. The recipes say which numbers are
the paper's.
"""

import argparse
import math
import os
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import curate
import data
import distill
import evaluate
import judge
import looking
import rollout
from clinic import ablations
from command import flags, pipeline, stage
from command.pipeline import Stage, words_of
from engines import bill
from report import score, tables

METHOD = """
curate       python curate.py --questions {bank} --against {against} --baselines {baselines} \
               --experts {experts} --classifier {classifier} --editor {editor} {images} {curate} \
               --seed {seed}
distill      python distill.py run --questions {run}/curate/text.jsonl --teachers {teachers} \
               {distill} --seed {seed}
sft          torchrun sft.py --model {base} --demos {run}/distill/demos.jsonl {images} {sft} \
               --seed {seed}
rollout      python rollout.py --engine {engine}:{run}/sft/merged \
               --questions {run}/curate/image.jsonl {images} {rollout} --seed {seed}
verdicts     python judge.py verdicts --judge {judge} --rollouts {run}/rollout/rollouts.jsonl \
               --questions {run}/curate/image.jsonl {images} --seed {seed}
pairs        python judge.py pairs --verdicts {run}/verdicts/verdicts.jsonl \
               --rollouts {run}/rollout/rollouts.jsonl --questions {run}/curate/image.jsonl \
               {pairs} --seed {seed}
dpo          torchrun dpo.py --model {run}/sft/merged --pairs {run}/pairs/pairs.jsonl {images} \
               {dpo} --seed {seed}
eval-base    python evaluate.py --engine {engine}:{base} --name {label}/base \
               --questions {test} {images} {evaluate} --judge {eval_judge} --seed {seed}
eval-stage1  python evaluate.py --engine {engine}:{run}/sft/merged --name {label}/Stage-I \
               --questions {test} {images} {evaluate} --judge {eval_judge} --seed {seed}
eval-stage2  python evaluate.py --engine {engine}:{run}/dpo/merged --name {label}/Stage-II \
               --questions {test} {images} {evaluate} --judge {eval_judge} --seed {seed}
look-base    python looking.py --engine {engine}:{base} --name {label}/base \
               --questions {test} {images} {look} --judge {eval_judge} --seed {seed}
look-stage1  python looking.py --engine {engine}:{run}/sft/merged --name {label}/Stage-I \
               --questions {test} {images} {look} --judge {eval_judge} --seed {seed}
look-stage2  python looking.py --engine {engine}:{run}/dpo/merged --name {label}/Stage-II \
               --questions {test} {images} {look} --judge {eval_judge} --seed {seed}
looks        python -m report looking --results {run}/look-base {run}/look-stage1 {run}/look-stage2
report       python -m report page --results {run}/eval-base {run}/eval-stage1 {run}/eval-stage2 \
               --sft {run}/sft --dpo {run}/dpo --pairs {run}/pairs --images {root}
"""
TABLES = """
tables       python -m report table --results {run}/eval-base {run}/eval-stage1 {run}/eval-stage2 \
               {results}
figures      python -m report plot --results {run}/eval-base {run}/eval-stage1 {run}/eval-stage2 \
               {results}
"""  # after METHOD, but not in the demo: beside the paper's Tables 1 and 2 and Figures 4 to 6
CLINIC = """
world        python -m clinic world {world} --seed {seed}
base         python -m clinic teach {teach} --seed {seed}
"""  # before METHOD in the demo: the miniature's questions and its base model

# --------------------------------------------------------------------------------------------------
# Recipes: the flags of each stage for one base model. "image" holds for all stages with images.

FULL = {
    "engine": "vllm", "curate": {}, "distill": {},
    # paper App. C: lr; the rest ours
    "sft": {"max-length": 8192, "lr": 1e-4, "epochs": 3, "batch": 64, "rank": 8, "alpha": 16},
    # paper 3.3: n; the rest ours
    "rollout": {"n": 8, "temperature": 0.95, "top-p": 0.95, "max-tokens": 8192},
    "pairs": {"rule": "all"},  # ours
    # paper App. C: method, lr; the rest ours. max-length: a prompt of up to 8K tokens and two
    # responses of a rollout's maximum, so no pair is dropped
    "dpo": {"max-length": 8192 + 2 * 8192, "method": "full", "lr": 1e-6, "beta": 0.1, "epochs": 1,
            "batch": 64},
    "evaluate": {"n": 32, "temperature": 0.5, "max-tokens": 8192},  # paper 4.3
    "look": {"n": 4, "max-tokens": 8192, "limit": 500},  # ours: the judge is paid for 2,000 chains
}  # fmt: skip
MINI = {  # ours, chosen on development questions: so small a model learns at other rates than a 7B
    "engine": "hf",
    # questions and films come from templates and are alike by construction
    "curate": {"exact-leaks": True, "max-tokens": 24},
    "distill": {"answer-form": "text", "words": [5, 120]},  # no option look-up for so small a model
    "sft": {"lr": 5e-3, "epochs": 4, "batch": 2, "rank": 16, "alpha": 32, "pack": 900,
            "save-every": 25},
    "rollout": {"n": 8, "temperature": 0.7, "top-p": 1.0, "max-tokens": 96},
    "pairs": {"rule": "all", "cap": 2},
    "dpo": {"method": "full", "lr": 3e-5, "beta": 0.5, "epochs": 1, "batch": 16, "save-every": 25},
    "evaluate": {"n": [16, 2], "temperature": 0.5, "max-tokens": 96, "judge-samples": 0},
    "look": {"n": 2, "max-tokens": 96, "limit": 60},
}  # fmt: skip


def override(recipe: dict, changes: dict[str, dict]) -> dict:
    """A recipe with other flags for some of its stages."""
    return recipe | {name: recipe[name] | more for name, more in changes.items()}


DPO_LORA = {"method": "lora", "lr": 5e-6}  # paper App. C: method, for 32B and 72B; lr ours


def large(gpus: int) -> dict:
    """FULL for a model that needs so many GPUs for each vLLM: LoRA in Stage II too."""
    parallel = {"tensor-parallel": gpus}
    changes = dict.fromkeys(("rollout", "evaluate", "look"), parallel)
    return override(FULL, {**changes, "dpo": DPO_LORA})


SMALL = override(FULL, {"dpo": DPO_LORA})  # ours: fits a GPU of 24 GB
QWEN, INTERNVL = {"image": {"pixels": 768 * 768}}, {"image": {"tiles": 1}}  # ours
RECIPES = {
    "qwen2.5-vl-3b": SMALL | QWEN | {"base": "models/Qwen2.5-VL-3B-Instruct"},
    "internvl3-1b": SMALL | INTERNVL | {"base": "models/InternVL3-1B-hf"},
    "internvl3-2b": SMALL | INTERNVL | {"base": "models/InternVL3-2B-hf"},
    "qwen2.5-vl-7b": FULL | QWEN | {"base": "models/Qwen2.5-VL-7B-Instruct"},
    "internvl3-8b": FULL | INTERNVL | {"base": "models/InternVL3-8B-hf"},
    "qwen2.5-vl-32b": large(2) | QWEN | {"base": "models/Qwen2.5-VL-32B-Instruct"},
    "qwen2.5-vl-72b": large(4) | QWEN | {"base": "models/Qwen2.5-VL-72B-Instruct"},
    "mini-qwen": MINI | {"image": {"pixels": 56 * 56}},
    "mini-internvl": MINI | INTERNVL,
}
PUBLISHED = [name for name in RECIPES if not name.startswith("mini")]
WORLDS = {  # the miniature's questions, the schooling of its base model, and the recipe's changes
    "normal": {
        "world": {"text": 800, "image": 1000, "dev-image": 200, "dev-text": 50, "test-image": 300,
                  "test-text": 150},
        "teach": {"films": 6000, "eye-epochs": 3, "steps": 240, "batch": 24},
        "recipe": {},
    },
    "fast": {
        "world": {"text": 160, "image": 100, "dev-image": 10, "dev-text": 10, "test-image": 20,
                  "test-text": 10, "modalities": 1},
        "teach": {"films": 1200, "eye-epochs": 4, "steps": 150, "batch": 8, "print-every": 20,
                  "modalities": 1},
        "recipe": {"sft": {"batch": 1}, "evaluate": {"n": [2, 1]}},
    },
}  # fmt: skip


def values_of(recipe: dict, given: dict, run: Path) -> dict:
    """What METHOD's {name}s stand for. given: "base", "root" of images, "seed", and what answers or
    is read; a list where there may be several."""
    chosen = {name: words_of(value) for name, value in recipe.items() if isinstance(value, dict)}
    images = ["--images", given["root"], *chosen["image"]]
    return chosen | given | {"run": run, "engine": recipe["engine"], "images": images}


def method(recipe: dict, given: dict, run: Path, ranks: int = 0) -> list[Stage]:
    """The stages of METHOD. ranks: of torchrun, or 0."""
    return pipeline.stages_from(METHOD, values_of(recipe, given, run), ranks)


def demo_stages(
    run: Path, family: str, size: str, world: str, seed: int, ablate: bool = False
) -> list[Stage]:
    """The stages of the miniature: the clinic makes its world and base model, then METHOD; after
    it, the ablations."""
    sizes, made = WORLDS[world], f"{run}/world"
    recipe = override(RECIPES[f"mini-{family}"], sizes["recipe"])
    model = ["--family", family, "--size", size]
    clinic = {"run": run, "seed": seed, "world": words_of(sizes["world"])}
    clinic["teach"] = [*model, *words_of(sizes["teach"])]
    given = {
        "base": f"{run}/base", "root": made, "bank": [f"{made}/bank.jsonl"],
        "against": [f"{made}/dev.jsonl", f"{made}/test.jsonl"], "test": [f"{made}/test.jsonl"],
        "baselines": [f"hf:{run}/base"], "experts": ["clinic:expert-a", "clinic:expert-b"],
        "classifier": "clinic:classifier", "editor": "clinic:editor", "judge": "clinic:judge",
        "eval_judge": "clinic:judge",
        "teachers": ["clinic:thorough", "clinic:hasty", "clinic:bookish"], "seed": seed,
        "label": "demo",  # demo/base, as 7B/base at the paper's size
    }  # fmt: skip
    stages = pipeline.stages_from(CLINIC, clinic) + method(recipe, given, run)
    if ablate:
        recipe = override(recipe, {"evaluate": {"n": [4, 2]}})
        stages += ablations.stages(values_of(recipe, given | clinic, run))
    return stages


# --------------------------------------------------------------------------------------------------
# Commands


EVALS = ("eval-base", "eval-stage1", "eval-stage2")
LOOKS = ("look-base", "look-stage1", "look-stage2")
ASKING = ("curate", "distill", "rollout", "verdicts", *EVALS, *LOOKS)
RESULTS = {  # what a run prints at its end
    "report/report.png": "accuracy, criteria, training curves, MV@n and pass@n",
    "looks/looking.png": "does each stage look at the image?",
    "report/films.png": "preference pairs: film, question, chosen beside rejected",
    "report/table.md": "accuracy and criteria of the three stages, side by side",
    "tables/table1.md": "ours under the paper's Table 1, with the difference to base",
    "tables/table2.md": "the same under its Table 2",
    "figures": "the paper's Figures 4 to 6, drawn from the results that are there",
    "curate/funnel.json": "questions left after each filter",
    "curate/rejected.jsonl": "every rejected question, with its reason and the evidence",
    "pairs/pairs.jsonl": "what Stage II learnt from",
    "dpo/merged": "the final model, a Hugging Face folder",
}


def run_stages(
    stages: list[Stage], run: Path, title: str, args: argparse.Namespace | None = None
) -> None:
    """Runs in order what is not done. args: the limits on what engines are asked."""
    started = time.time()
    with pipeline.begin(run, stages):
        for number, one in enumerate(stages, 1):
            print(f"\n[{number}/{len(stages)}, {time.time() - started:.0f} s]", end="", flush=True)
            one.run(limits(one, run, args) if args else [])
    if paid := bill.paid(run / "replies"):
        print("\npaid so far: " + ", ".join(f"{paid[name]:,} {name}" for name in bill.COUNTED))
    print(f"\n{title} took {time.time() - started:.0f} s. In {run}:")
    for name, about in RESULTS.items():
        if (run / name).exists():
            print(f"  {name:<24} {about}")


def limits(one: Stage, run: Path, args: argparse.Namespace) -> list[str]:
    """The limits of a stage that asks engines, as flags; --max-requests is what is left of the
    whole run's. Raises UserError if nothing is left."""
    if one.name not in ASKING:
        return []
    more = {"concurrency": args.concurrency}
    more |= {"images-may-leave": True} if args.images_may_leave else {}
    if args.max_requests:
        left = args.max_requests - bill.paid(run / "replies")["requests"]
        if left <= 0 and one.state() != "done":
            made = f"{args.max_requests} requests were made (--max-requests)"
            raise flags.UserError(f"{made}; give more to go on")
        more["max-requests"] = max(
            left, 1
        )  # 0 would be no limit; a stage that is done asks nothing
    return words_of(more)


def announce(stages: list[Stage], may_leave: bool) -> None:
    """Prints what a run may cost at most, by stage: as if curation dropped no question and every
    chain had the maximum length. Raises RowError if images would leave without permission."""
    typed = {one.name: one.words for one in stages}
    settings = curate.parse(typed["curate"])
    bank = curate.bank_of(settings)
    costs = {"curate": curate.costs(bank, settings)}
    text = [question for question in bank if not question.images]
    costs["distill"] = distill.costs(text, distill.parse(typed["distill"]))
    sampled = rollout.parse(typed["rollout"])
    longest = bill.CHARACTERS * sampled.max_tokens
    chains = [(question, longest) for question in bank if question.images] * sampled.n
    costs["verdicts"] = [judge.cost(chains, judge.parse(typed["verdicts"]))]
    for name in EVALS:
        settings = evaluate.parse(typed[name])
        by_id = evaluate.questions_of(settings)
        requests = evaluate.requests_of(by_id, settings).values()
        costs[name] = evaluate.costs(by_id, requests, settings)
    for name in LOOKS:
        settings = looking.parse(typed[name])
        costs[name] = looking.costs(looking.questions_of(settings), settings)
    rows = [(name, one) for name, several in costs.items() for one in several]
    bill.announce([replace(one, role=f"{name}: {one.role}") for name, one in rows], may_leave)
    print("  and as if curation dropped nothing; the paper keeps 5,000 of 54,000")  # paper 3.1


def demo(args: argparse.Namespace) -> None:
    folder, world = Path(args.out), "fast" if args.fast else "normal"
    stages = demo_stages(folder, args.family, args.size, world, args.seed, args.ablate)
    run_stages(stages, folder, "the demo")
    print()
    curate.print_funnel(data.read_json(folder / "curate" / "funnel.json"))


def check_results(folders: list[str], label: str) -> None:
    """Raises RowError, before a long run, for --results that its tables could not take."""
    own = [f"{label}/{title}" for title in tables.STAGES]
    tables.distinct([*own, *(score.read_results(folder)["name"] for folder in folders)])


def run(args: argparse.Namespace) -> None:
    folder, recipe = Path(args.out), RECIPES[args.recipe]
    limit = {"limit": args.limit or None}
    changes = {
        "curate": limit | {"reviewed": args.reviewed},
        "distill": {"expand": args.expand, "checker": args.checker},
        "evaluate": limit | {"judge-samples": args.judge_samples},
        "look": {"limit": min(args.limit or math.inf, recipe["look"]["limit"])},
    }
    given = {
        "base": args.base or recipe["base"], "root": args.images, "bank": args.questions,
        "against": args.test, "test": args.test, "baselines": args.baselines,
        "experts": args.experts, "classifier": args.classifier, "editor": args.editor,
        "judge": args.judge[0], "eval_judge": args.judge[-1],
        "teachers": args.teachers, "seed": args.seed,
        "label": args.recipe.rpartition("-")[2].upper(), "results": args.results, "run": folder,
    }  # fmt: skip
    stages = method(override(recipe, changes), given, folder, args.gpus)
    stages += pipeline.stages_from(TABLES, given)
    check_results(args.results, given["label"])
    if args.dry:
        for one in stages:
            print(shlex.join(one.command()))
    announce(stages, args.images_may_leave or args.dry)
    if not args.dry:
        run_stages(stages, folder, args.recipe, args)


def plan(args: argparse.Namespace) -> None:
    import memory

    if args.base and not args.recipe:
        near = "name the recipe nearest in size, whose batch, rows and method are then counted"
        raise flags.UserError(f"--base {args.base}: {near}: {', '.join(PUBLISHED)}")
    if args.recipe:
        memory.plan_recipe(RECIPES[args.recipe], args)
    else:
        memory.plan_table({name: RECIPES[name] for name in PUBLISHED}, args.gpus)


def claims(args: argparse.Namespace) -> None:
    """Runs a demo with ablations for each seed, --at-once side by side, and compares them."""
    from report import __main__ as report

    folders = [Path(args.out) / f"seed-{seed}" for seed in args.seeds]
    threads = max(1, (os.cpu_count() or 1) // args.at_once)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    model = ["--family", args.family, "--size", args.size]

    def run_seed(seed: int, folder: Path) -> None:
        log = folder.with_suffix(".log")
        log.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, __file__, "demo", "--ablate", "--seed", str(seed), *model]
        print(f"seed {seed}: {log} tells how far it is", flush=True)
        with open(log, "a", encoding="utf-8") as told:
            ran = subprocess.run(
                [*command, "--out", str(folder)], stdout=told, stderr=told, env=environment
            )
        if ran.returncode:
            raise flags.UserError(f"seed {seed} stopped; {log} says why; the same command goes on")
        print(f"seed {seed}: finished", flush=True)

    with ThreadPoolExecutor(args.at_once) as pool:
        list(pool.map(run_seed, args.seeds, folders))
    out = Path(args.out) / "claims.md"
    report.main(["claims", "--runs", *map(str, folders), "--out", str(out)])


def status(args: argparse.Namespace) -> None:
    for one in pipeline.stages_of(Path(args.out)):
        state, more = one.state(), ""
        if state == "done":
            record = stage.read_record(one.folder / "stage.json")
            shown = {k: v for k, v in record["figures"].items() if not isinstance(v, dict)}
            figures = ", ".join(f"{name} {value}" for name, value in shown.items())
            more = f"{record['seconds']:>7.1f} s   {figures}"
            if edited := one.edited():
                more += f"   ({', '.join(edited)} changed since)"
        print(f"{one.name:<12} {state:<12} {more}")


def adopt(args: argparse.Namespace) -> None:
    stages = {one.name: one for one in pipeline.stages_of(Path(args.out))}
    for name in args.stages:
        if name not in stages:
            known = ", ".join(stages)
            raise flags.UserError(f"{name} is not a stage of this run; its stages are {known}")
        stages[name].adopt()
        print(f"{name}: {stages[name].folder} is this run's now")


# --------------------------------------------------------------------------------------------------
# Flags


def add_run(add) -> None:
    several = {"nargs": "+", "required": True}
    add("recipe", choices=PUBLISHED)
    add("--base", default="", help="model folder, if not models/NAME")
    add("--questions", **several, help="the question bank")
    add("--test", **several, help="benchmark questions: evaluated on, and kept out of training")
    add("--images", default=".", help="image root of all of them")
    add("--baselines", **several, help="engines that must not solve a question")
    add("--experts", **several, help="engines that must each solve it once")
    add("--classifier", required=True, help="engine that tells the type of image questions")
    add("--editor", required=True, help="engine that takes image descriptions out of questions")
    add("--teachers", **several, help="engines that write demonstrations")
    about = "a teacher that tells a summary, and the engine that writes it out; may be repeated"
    two = ("TEACHER", "EXPANDER")
    add("--expand", nargs=2, action="append", default=[], metavar=two, help=about)
    add("--checker", default="", help="engine that checks demonstrations")
    about = "engine that judges chains; a second one judges the evaluation instead"
    add("--judge", **several, help=about)
    add("--gpus", type=flags.whole(0), default=8, help="ranks of torchrun; 0: without torchrun")
    add("--out", default="runs/full", help="run folder")
    add("--seed", type=flags.SEED, default=0)
    about = "evaluations of other sizes or models, to stand beside this run's in tables and figures"
    add("--results", nargs="+", default=[], help=about)
    add("--reviewed", default="", help="review.csv of curate, its question column corrected")
    about = "chains of each benchmark question that are judged; 0: all"
    add("--judge-samples", type=flags.whole(0), default=1, help=about)  # ours: paper silent
    about = "rehearse with at most so many text and image questions of bank and benchmarks; 0: all"
    add("--limit", type=flags.whole(0), default=0, help=about)
    about = "requests at once to a remote engine"  # ours: as in engines
    add("--concurrency", type=flags.whole(1, 1000), default=16, help=about)
    about = "stop after so many requests of the whole run; 0: no limit"
    add("--max-requests", type=flags.whole(0), default=0, help=about)
    add("--images-may-leave", action="store_true", help="images may be sent to other machines")
    add("--dry", action="store_true", help="print commands and costs only")


def add_plan(add) -> None:
    add("recipe", nargs="?", choices=PUBLISHED, help="default: a table of all of them")
    add("--gpus", type=flags.whole(1), default=8, help="GPUs that share the weights")
    about = "of a recipe: tokens of the longest row, prompt, images, responses; 0: as it allows"
    add("--len", type=flags.whole(0), default=0, help=about)
    about = "of a recipe: images of a row in Stage II"
    add("--images", type=flags.whole(0), default=1, help=about)
    add("--memory", type=flags.number(above=0), default=80, help="of a recipe: GB of a GPU")
    add("--base", default="", help="of a recipe: local model folder whose config.json is read")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)

    def command(act, about: str):
        added = commands.add_parser(act.__name__, help=about)
        added.set_defaults(act=act)
        return added.add_argument

    add_run(command(run, "the method on your questions, with a recipe of the paper's size"))
    about = "will it fit? memory of a GPU, term by term, and the micro-batch for it"
    add_plan(command(plan, about))
    one = command(demo, "the whole method in the miniature clinic")
    one("--out", default="runs/demo", help="run folder")
    one("--seed", type=flags.SEED, default=0, help="seed of world, base model and every draw")
    one("--fast", action="store_true", help="a smaller world, to see whether all stages run")
    one(
        "--ablate",
        action="store_true",
        help="other demonstrations and pairs too: clinic/ablations.py",
    )
    several = command(claims, "the demo and its ablations over several seeds, and what they show")
    several("--at-once", type=flags.whole(1), default=2, help="seeds side by side")
    several("--out", default="runs/claims", help="folder of the runs")
    # none of them was used to choose a setting
    several("--seeds", type=flags.SEED, nargs="+", default=[21, 22, 23])
    for add in (one, several):
        add("--size", choices=["tiny", "small"], default="tiny", help="of the model")
        add("--family", choices=["qwen", "internvl"], default="qwen")
    add = command(adopt, "take over stages of a run that were finished by hand")
    add("stages", nargs="+", metavar="STAGE")
    add("--out", required=True, help="folder of the run, which was begun")
    add = command(status, "which stages of a run are done")
    add("--out", default="runs/demo", help="run folder")
    args = parser.parse_args(argv)
    if args.command == "run" and len(args.judge) > 2:
        parser.error("argument --judge: expected one engine, or two: of pairs and of evaluation")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    args.act(args)


if __name__ == "__main__":
    flags.run_script(main)
