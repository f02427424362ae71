"""MedE² in order: every stage as the very command a user would type, printed, run, and resumed (paper §3, Fig. 2).

    curate -> distill -> sft -> rollout -> judge -> pairs -> dpo -> evaluate (base, Stage I, Stage II) -> report

    python medee.py demo                         the whole method on a laptop: a miniature clinic, a tiny model, a report
    python medee.py demo --fast                  the same chain in a smaller world
    python medee.py run qwen2.5-vl-7b ...        the same stages at the paper's size; --dry prints the commands
    python medee.py status                       which stages of a run are done
    python medee.py adopt sft --out runs/7b      takes over a stage that was finished by hand
    python medee.py plan qwen2.5-vl-7b --gpus 8  will it fit? memory of a GPU in both stages, term by term
    python medee.py claims                       the demo over several seeds, and what it shows with intervals

A stage is done when its folder has a stage.json and the command and input hashes are those asked for now. A stage that was
killed goes on from its last row or step. One whose settings or inputs changed is set aside whole, as NAME.1, and made anew,
and so is all that depends on it; nothing is ever deleted. Replies of engines are paid for: they lie in RUN/replies, and
what is still valid is not asked again. A folder that this run did not begin is left alone, or taken over by adopt. A
change of the code is said, and undoes nothing. Nothing here computes: the miniature differs from the 7B in its recipe, never
in its code path.

Where we depart from the paper, or it is silent: see each script; the recipes below say which number is whose.
"""

import argparse
import os
import re
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import bill
import data
import flags
import stage

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Recipe:
    """The settings of one base model, as the flags of each script."""

    base: str
    sft: dict = field(default_factory=dict)
    rollout: dict = field(default_factory=dict)
    pairs: dict = field(default_factory=dict)
    dpo: dict = field(default_factory=dict)
    evaluate: dict = field(default_factory=dict)
    distill: dict = field(default_factory=dict)
    curate: dict = field(default_factory=dict)
    images: dict = field(default_factory=dict)  # one picture of an image: the same flags for every stage that has images
    engine: str = "vllm"


FULL = dict(
    sft={"lr": 1e-4, "epochs": 3, "batch": 64, "rank": 8, "alpha": 16, "checkpointing": True},  # paper App. C: lr; the rest ours
    rollout={"n": 8, "temperature": 0.95, "top-p": 0.95, "max-tokens": 8192},  # paper 3.3: n; the rest ours
    pairs={"rule": "all"},  # ours
    evaluate={"n": 32, "temperature": 0.5, "max-tokens": 8192},  # paper 4.3
)
# a question's prompt with its images, up to 8K tokens, and two answers as long as the rollouts' may be
LONGEST = {"max-length": 8192 + 2 * 8192}  # ours: no pair that the rollouts can make is dropped
DPO_FULL = {**LONGEST, "method": "full", "lr": 1e-6, "beta": 0.1, "epochs": 1, "batch": 64, "checkpointing": True}  # paper App. C: method, lr; the rest ours
DPO_LORA = {**LONGEST, "method": "lora", "lr": 5e-6, "beta": 0.1, "epochs": 1, "batch": 64, "checkpointing": True}  # paper App. C: method; the rest ours
MINI = dict(  # ours, chosen on development questions: a model this small learns at other rates than a pretrained 7B
    curate={"limits": [0, 0, 0], "max-tokens": 24},  # made from templates, questions and films are alike by construction
    distill={"answer-form": "text", "words": [5, 120]},  # no option look-up for so small a model
    sft={"lr": 5e-3, "epochs": 4, "batch": 2, "rank": 16, "alpha": 32, "pack": 900, "save-every": 25},
    rollout={"n": 8, "temperature": 0.7, "top-p": 1.0, "max-tokens": 96},
    pairs={"rule": "all"},
    dpo={"method": "full", "lr": 3e-5, "beta": 0.5, "epochs": 1, "batch": 16, "save-every": 25},
    evaluate={"n": [16, 2], "temperature": 0.5, "max-tokens": 96, "judge-samples": 0},
    images={"pixels": 56 * 56},
    engine="hf",
)


def sampled_on(gpus: int) -> dict:
    """FULL with so many GPUs for each vLLM: weights in bf16 and room for keys and values."""
    return {**FULL, **{stage: {**FULL[stage], "tensor-parallel": gpus} for stage in ("rollout", "evaluate")}}


RECIPES = {
    "qwen2.5-vl-7b": Recipe("models/Qwen2.5-VL-7B-Instruct", **FULL, dpo=DPO_FULL, images={"pixels": 768 * 768}),
    "internvl3-8b": Recipe("models/InternVL3-8B-hf", **FULL, dpo=DPO_FULL, images={"tiles": 1}),
    "qwen2.5-vl-32b": Recipe("models/Qwen2.5-VL-32B-Instruct", **sampled_on(2), dpo=DPO_LORA, images={"pixels": 768 * 768}),
    "qwen2.5-vl-72b": Recipe("models/Qwen2.5-VL-72B-Instruct", **sampled_on(4), dpo=DPO_LORA, images={"pixels": 768 * 768}),
    "mini-qwen": Recipe("taught by clinic.py", **MINI),
    "mini-internvl": Recipe("taught by clinic.py", **{**MINI, "images": {"tiles": 1}}),
}
WORLDS = {  # questions of the clinic's bank and tests, the base model's schooling, and what the small world changes in the recipe
    "normal": {
        "world": {"text": 800, "image": 1000, "dev-image": 200, "dev-text": 50, "test-image": 300, "test-text": 150},
        "teach": {"films": 6000, "eye-epochs": 3, "steps": 240, "batch": 24},
        "recipe": {},
    },
    "fast": {  # one modality
        "world": {"text": 160, "image": 100, "dev-image": 10, "dev-text": 10, "test-image": 20, "test-text": 10, "modalities": 1},
        "teach": {"films": 1200, "eye-epochs": 4, "steps": 150, "batch": 8, "print-every": 20, "modalities": 1},
        "recipe": {"sft": {"batch": 1}, "evaluate": {"n": [2, 1]}},
    },
}


# ---------------------------------------------------------------------------------------------------------------
# Stages

FILES = (  # flags that name files, models or results; images are recorded by the scripts
    "questions", "against", "reviewed", "review", "baselines", "experts", "classifier", "editor", "teachers", "expand", "checker",
    "model", "demos", "engine", "rollouts", "judge", "verdicts", "pairs", "open-ended", "results", "sft", "dpo",
)  # fmt: skip


def named_files(words: tuple[str, ...]) -> dict[str, str]:
    """{path: fingerprint} of every file and model folder that the flags of a command name."""
    found, flag = {}, ""
    for word in words:
        if re.match(r"--?[a-z]", word):
            flag = word.lstrip("-")
            continue
        path = re.sub(r"^(?:(?:text|image)=)?(?:hf|vllm):", "", word)
        if flag in FILES and path and Path(path).exists():
            found[path] = stage.fingerprint(path)
    return found


def size_of(folder: Path) -> str:
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


@dataclass(frozen=True)
class Stage:
    """One command. Its folder is its --out; medee.json in it says with which command and inputs this run began it."""

    name: str
    script: str
    words: tuple[str, ...]
    ranks: int = 0  # above 0: launched by torchrun
    manner: tuple[str, ...] = ()  # flags that change how fast, or whether at all, not what: unrecorded

    @property
    def folder(self) -> Path:
        return Path(self.words[self.words.index("--out") + 1])

    def command(self) -> list[str]:
        launcher = ["torchrun", "--nproc_per_node", str(self.ranks)] if self.ranks else ["python"]
        return [*launcher, self.script, *self.words, *self.manner]

    def record(self) -> dict:
        return {"command": [self.script, *self.words], "inputs": named_files(self.words)}

    def state(self) -> str:
        """done, or why not: "to do", "interrupted", "not begun by this run", or what changed since it was begun."""
        begun, finished = self.folder / "medee.json", self.folder / "stage.json"
        if not begun.exists():
            return "not begun by this run" if self.folder.exists() and any(self.folder.iterdir()) else "to do"
        record, now = stage.read_record(begun), self.record()
        if record["command"] != now["command"]:
            return "its settings changed"
        if changed := sorted(path for path in record["inputs"].keys() | now["inputs"].keys() if record["inputs"].get(path) != now["inputs"].get(path)):
            return f"{changed[0]} changed"
        if not finished.exists():
            return "interrupted"
        if image := stage.changed_image(self.folder):
            return f"{image} changed"
        lost = stage.changed_output(self.folder, stage.read_record(finished))
        return f"its output {lost} changed" if lost else "done"

    def edited(self) -> list[str]:
        """Files of the project that changed since the stage was finished. They do not undo it: a corrected comment must not
        cost a week of training. Whoever knows that the change matters moves the folder away."""
        then = stage.read_record(self.folder / "stage.json")["sources"]
        return sorted(name for name, digest in then.items() if not (HERE / name).exists() or data.file_hash(HERE / name) != digest)

    def set_aside(self, why: str) -> None:
        """Gives the folder another name: nothing is deleted. Raises RowError where that would take an input away, or where
        a command is still writing there."""
        own = Path(os.path.realpath(self.folder))
        if inside := next((path for path in named_files(self.words) if own in Path(os.path.realpath(path)).parents), None):
            raise data.RowError(f"{inside} lies in {self.folder}, which must be made anew ({why}); copy it to another place and name that")
        stage.hold(self.folder / ".lock", str(self.folder)).close()
        aside = next(path for n in range(1, 10**6) if not (path := self.folder.with_name(f"{self.folder.name}.{n}")).exists())
        print(f"   {self.folder} is set aside as {aside.name} ({size_of(self.folder)}): {why}", flush=True)
        self.folder.rename(aside)

    def adopt(self) -> None:
        """Takes a finished folder that was made by hand for this stage's, once. Raises RowError unless it is whole, and this
        stage's."""
        if (self.folder / "medee.json").exists():
            if "adopted" in stage.read_record(self.folder / "medee.json"):
                return
            raise data.RowError(f"adopt {self.name}: {self.folder} was begun by this run")
        if not (self.folder / "stage.json").exists():
            raise data.RowError(f"adopt {self.name}: {self.folder} has no stage.json; only a finished stage can be adopted")
        finished = stage.read_record(self.folder / "stage.json")
        command = [self.script] if self.words[0].startswith("-") else [self.script, self.words[0]]
        if finished["command"][: len(command)] != command:
            raise data.RowError(f"adopt {self.name}: {self.folder} was made by {' '.join(finished['command'][:2])}, not by {' '.join(command)}")
        if lost := stage.changed_output(self.folder, finished):
            raise data.RowError(f"--adopt {self.name}: {self.folder / lost} is not as its stage.json has it")
        data.write_json(self.folder / "medee.json", {**self.record(), "adopted": finished["command"]})

    def run(self) -> None:
        """Runs the command unless it is done, from where it was stopped if nothing changed. Raises SystemExit if it fails."""
        state = self.state()
        print(f"\n== {self.name}: {state}\n   $ {shlex.join(self.command())}", flush=True)
        if state == "not begun by this run":
            raise data.RowError(f"{self.folder} was not begun by this run, and is left alone; if it is this stage, finished by hand: python medee.py adopt {self.name} --out {self.folder.parent}; else give another --out")
        if state == "done":
            if edited := self.edited():
                print(f"   note: {', '.join(edited)} changed since this was made; if that matters here, move {self.folder} away")
            return
        if state not in ("to do", "interrupted"):
            self.set_aside(state)
        data.write_json(self.folder / "medee.json", self.record())
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(self.ranks)] if self.ranks else [sys.executable]
        # a busy neighbour slows spinning threads several-fold; waiting threads give way
        environment = {"OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", **os.environ}
        command = [*launcher, str(HERE / self.script), *self.words, *self.manner]
        code = subprocess.run(command, env=environment).returncode
        if code:
            raise SystemExit(f"{self.name} stopped with exit code {code}; the same command goes on from there")


def words(flags: dict) -> list[str]:
    """{"lr": 1e-4, "n": 8, "checkpointing": True} -> ["--lr", "0.0001", "-n", "8", "--checkpointing"]; a list of lists repeats its flag."""
    out = []
    repeated = [(name, one) for name, value in flags.items() for one in (value if isinstance(value, list) and value and isinstance(value[0], list) else [value])]
    for name, value in repeated:
        out.append(("-" if len(name) == 1 else "--") + name)
        if value is not True:
            out += [str(part) for part in value] if isinstance(value, (list, tuple)) else [str(value)]
    return out


def method(recipe: Recipe, base: str, run: Path, bank: list[str], images: str, against: list[str], test: list[str], engines: dict, ranks: int, seed: int) -> list[Stage]:
    """The stages of the paper, from a question bank to a report. engines: {"curate": flags that name engines, "distill": the same, "judge": spec}."""
    at = {name: str(run / name) for name in ("curate", "distill", "sft", "rollout", "verdicts", "pairs", "dpo", "eval-base", "eval-stage1", "eval-stage2", "report")}
    shared = {"images": images, **recipe.images}

    def make(name: str, script: str, command: str, flags: dict, ranks: int = 0) -> Stage:
        return Stage(name, script, (*([command] if command else []), *words({**flags, "out": at[name]})), ranks)

    rollouts = {"rollouts": f"{at['rollout']}/rollouts.jsonl", "questions": f"{at['curate']}/image.jsonl"}
    stages = [
        make("curate", "curate.py", "all", {"questions": bank, "against": against, **engines["curate"], **shared, **recipe.curate, "seed": seed}),
        make("distill", "distill.py", "run", {"questions": f"{at['curate']}/text.jsonl", **engines["distill"], **recipe.distill, "seed": seed}),
        make("sft", "sft.py", "", {"model": base, "demos": f"{at['distill']}/demos.jsonl", **shared, **recipe.sft, "seed": seed}, ranks),
        make("rollout", "rollout.py", "", {"engine": f"{recipe.engine}:{at['sft']}/merged", "questions": f"{at['curate']}/image.jsonl", **shared, **recipe.rollout, "seed": seed}),
        make("verdicts", "judge.py", "verdicts", {"judge": engines["judge"], **rollouts, **shared, "seed": seed}),
        make("pairs", "judge.py", "pairs", {"verdicts": f"{at['verdicts']}/verdicts.jsonl", **rollouts, **recipe.pairs, "seed": seed}),
        make("dpo", "dpo.py", "", {"model": f"{at['sft']}/merged", "pairs": f"{at['pairs']}/pairs.jsonl", **shared, **recipe.dpo, "seed": seed}, ranks),
    ]
    for name, title, folder in (("eval-base", "base", base), ("eval-stage1", "+ Stage I", f"{at['sft']}/merged"), ("eval-stage2", "+ Stage II", f"{at['dpo']}/merged")):
        flags = {"engine": f"{recipe.engine}:{folder}", "name": title, "questions": test, **shared, **recipe.evaluate, "judge": engines["judge"], "seed": seed}
        stages.append(make(name, "evaluate.py", "run", flags))
    results = [at["eval-base"], at["eval-stage1"], at["eval-stage2"]]
    stages.append(make("report", "evaluate.py", "report", {"results": results, "sft": at["sft"], "dpo": at["dpo"], "pairs": at["pairs"], "images": images}))
    return stages


def demo_stages(run: Path, family: str, size: str, world: str, seed: int) -> list[Stage]:
    """The miniature: the clinic makes the world and teaches the base model, then the method is the method."""
    sizes, recipe = WORLDS[world], RECIPES[f"mini-{family}"]
    recipe = replace(recipe, **{stage: {**getattr(recipe, stage), **flags} for stage, flags in sizes["recipe"].items()})
    made, base = str(run / "world"), str(run / "base")
    before = [
        Stage("world", "clinic.py", ("world", *words({**sizes["world"], "out": made, "seed": seed}))),
        Stage("base", "clinic.py", ("teach", *words({"family": family, "size": size, **sizes["teach"], "out": base, "seed": seed}))),
    ]
    return before + method(
        recipe, base, run, [f"{made}/bank.jsonl"], made, [f"{made}/dev.jsonl", f"{made}/test.jsonl"], [f"{made}/test.jsonl"],
        {
            "curate": {"baselines": [f"hf:{base}"], "experts": ["clinic:expert-a", "clinic:expert-b"], "classifier": "clinic:classifier", "editor": "clinic:editor"},
            "distill": {"teachers": ["clinic:thorough", "clinic:hasty", "clinic:bookish"]}, "judge": "clinic:judge",
        },
        0, seed,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------
# Commands


def announce(stages: list[Stage], may_leave: bool) -> None:
    from curate import PAPER

    bill.announce(costs(stages), may_leave)
    kept = ", ".join(f"{after:,} of {bank:,}" for bank, after in zip(PAPER["bank"], PAPER["solvable"]))
    print(f"  and as if curation dropped nothing; the paper's keeps {kept} text and image questions")


ASKING = ("curate", "distill", "rollout", "verdicts", "eval-base", "eval-stage1", "eval-stage2")


def with_manner(one: Stage, run: Path, args: argparse.Namespace) -> Stage:
    """A stage with --concurrency and the like, if it asks engines, and what --max-requests of the
    whole run leaves it. Raises RowError where that is nothing."""
    if one.name not in ASKING:
        return one
    manner = ["--concurrency", str(args.concurrency)]
    if args.images_may_leave:
        manner.append("--images-may-leave")
    if args.max_requests:
        left = args.max_requests - bill.paid(run / "replies")["requests"]
        if left <= 0 and one.state() != "done":
            raise data.RowError(f"{args.max_requests} requests were made (--max-requests); give more to go on")
        manner += ["--max-requests", str(max(left, 1))]
    return replace(one, manner=tuple(manner))


def costs(stages: list[Stage]) -> list[bill.Cost]:
    """What a run may cost at most, stage by stage: as if curation dropped nothing, and every chain
    were as long as it may be."""
    import curate
    import distill
    import evaluate
    import judge

    at, found = {one.name: one for one in stages}, []
    settings = curate.parse(list(at["curate"].words))
    bank = curate.bank_of(settings)
    shown = [question for question in bank if question.images]
    found += [replace(one, role=f"curate: {one.role}") for one in curate.costs(bank, settings)]
    settings = distill.parse(list(at["distill"].words))
    text = [question for question in bank if not question.images]
    found += [replace(one, role=f"distill: {one.role}") for one in distill.costs(text, settings)]
    sampled = dict(zip(at["rollout"].words, at["rollout"].words[1:]))
    longest = bill.LETTERS * int(sampled["--max-tokens"])
    chains = [(question, longest) for question in shown for _ in range(int(sampled["-n"]))]
    judging = judge.cost(chains, judge.parse(list(at["verdicts"].words)))
    found.append(replace(judging, role="verdicts: judge"))
    for name in ("eval-base", "eval-stage1", "eval-stage2"):
        settings = evaluate.parse(list(at[name].words))
        by_id = evaluate.questions_of(settings)
        asked = evaluate.costs(by_id, evaluate.asks_of(by_id, settings), settings)
        found += [replace(one, role=f"{name}: {one.role}") for one in asked]
    return found


def run_stages(stages: list[Stage], run: Path, what: str, args: argparse.Namespace | None = None) -> None:
    """Runs what is not done, and remembers the list for `status`."""
    started = time.time()
    if run == Path():
        raise data.RowError("--out: a folder of the run's own is wanted")
    flags.working_in(run)
    if (run / "run.json").exists():
        read_run(run)  # or it is somebody else's
    lock = stage.hold(run / ".lock", f"--out {run}")
    stage.remember(run)
    data.write_json(run / "run.json", {"started_in": os.getcwd(), "stages": [[one.name, one.script, list(one.words), one.ranks] for one in stages]})
    for number, one in enumerate(stages, 1):
        print(f"\n[{number}/{len(stages)}, {time.time() - started:.0f} s]", end="", flush=True)
        (with_manner(one, run, args) if args else one).run()
    lock.close()
    if spent := bill.paid(run / "replies"):
        print("\npaid so far: " + ", ".join(f"{spent[name]:,} {name}" for name in bill.COUNTED))
    print(f"\n{what} took {time.time() - started:.0f} s. In {run}:")
    for name, about in (
        ("report/report.png", "accuracy, criteria, training curves, MV@n and pass@n"),
        ("report/films.png", "preference pairs: film, question, chosen beside rejected"),
        ("report/table.md", "the table above"),
        ("curate/funnel.png", "questions left after each filter, with the paper's beside"),
        ("curate/rejected.jsonl", "every rejected question, with its reason and the evidence"),
        ("pairs/pairs.jsonl", "what Stage II learnt from"),
        ("dpo/merged", "the final model, a Hugging Face folder"),
    ):
        if (run / name).exists():
            print(f"  {name:<24} {about}")


def read_run(run: Path) -> dict:
    """run.json. Raises RowError where it is somebody else's."""
    record = data.read_json(run / "run.json")
    data.need({"record": record}, str(run / "run.json"), record=dict)
    data.need(record, str(run / "run.json"), started_in=str, stages=list)
    return record


def print_summary(run: Path) -> None:
    from curate import print_funnel

    print()
    print_funnel(data.read_json(run / "curate" / "funnel.json"))


def demo(args: argparse.Namespace) -> None:
    run = Path(args.out)
    stages = demo_stages(run, args.family, args.size, "fast" if args.fast else "normal", args.seed)
    run_stages(stages, run, "the demo")
    print_summary(run)


def run(args: argparse.Namespace) -> None:
    folder = Path(args.out)
    recipe = RECIPES[args.recipe]
    engines = {
        "curate": {"baselines": args.baselines, "experts": args.experts, "classifier": args.classifier, "editor": args.editor} | ({"reviewed": args.reviewed} if args.reviewed else {}),
        "distill": {"teachers": args.teachers} | ({"expand": args.expand} if args.expand else {}) | ({"checker": args.checker} if args.checker else {}),
        "judge": args.judge,
    }
    if args.limit:
        recipe = replace(recipe, curate={**recipe.curate, "limit": args.limit}, evaluate={**recipe.evaluate, "limit": args.limit})
    recipe = replace(recipe, evaluate={**recipe.evaluate, "judge-samples": args.judge_samples})
    stages = method(recipe, args.base or recipe.base, folder, args.questions, args.images, args.test, args.test, engines, args.gpus, args.seed)
    if args.dry:
        for one in stages:
            print(shlex.join(with_manner(one, folder, args).command()))
        if missing := [path for path in (*args.questions, *args.test) if not Path(path).exists()]:
            print(f"\nno table of costs: {missing[0]} is not there")
        else:
            announce(stages, may_leave=True)
        return
    announce(stages, args.images_may_leave)
    run_stages(stages, folder, args.recipe, args)


def plan(args: argparse.Namespace) -> None:
    from lora import RANK
    from model import load_config
    from train import MAX_LENGTH
    from plan import ROOM, SIZES, config_of, image_bytes, report, shapes

    recipe = RECIPES[args.recipe]
    config = load_config(args.base) if args.base else config_of(SIZES[args.recipe])
    print(f"{args.recipe} on {args.gpus} GPUs of {args.memory:.0f} GB; shapes of {args.base or 'the published config, from memory (--base FOLDER reads yours)'}")
    for name in [args.stage] if args.stage else ["sft", "dpo"]:
        flags = getattr(recipe, name)
        method, count = ("lora", 0) if name == "sft" else (flags["method"], args.images)
        policy = shapes(config, method, flags.get("rank", RANK))
        images = count * image_bytes(policy, recipe.images.get("pixels", 0), recipe.images.get("tiles", 1))
        longest = args.len or flags.get("max-length", MAX_LENGTH)
        title = f"\n{'Stage I, sft.py' if name == 'sft' else 'Stage II, dpo.py'} ({method}; rows of {longest} tokens; images a row: {count})"
        print(report(title, policy, args.gpus, longest, name == "dpo", images, ROOM * args.memory, max(1, flags["batch"] // args.gpus)))


def claims(args: argparse.Namespace) -> None:
    folder = Path(args.out)
    for seed in args.seeds:
        stages = demo_stages(folder / f"seed-{seed}", args.family, args.size, "normal", seed)
        run_stages(stages, folder / f"seed-{seed}", f"seed {seed}")
    words = ["evaluate.py", "claims", "--runs", *[str(folder / f"seed-{seed}") for seed in args.seeds], "--out", args.write or str(folder / "CLAIMS.md")]
    print("\n   $ " + shlex.join(["python", *words]), flush=True)
    subprocess.run([sys.executable, str(HERE / words[0]), *words[1:]], check=True)


def begun(folder: Path) -> list[Stage]:
    """The stages of a run that was begun, with their commands' folder as the working one. Raises
    RowError for a run that was copied or moved."""
    if not (folder / "run.json").exists():
        raise SystemExit(f"{folder} holds no run; start one with: python medee.py demo --out {folder}")
    record, there = read_run(folder), Path(os.path.realpath(folder))
    stage.remember(there)
    os.chdir(record["started_in"])  # the commands' paths are relative to it
    stages = [Stage(name, script, tuple(said), ranks) for name, script, said, ranks in record["stages"]]
    for one in stages:
        if (held := Path(os.path.realpath(one.folder)).parent) != there:
            moved = "a run that was copied or moved has no status"
            raise data.RowError(f"{there / 'run.json'} is of a run in {held}; {moved}")
    return stages


def status(args: argparse.Namespace) -> None:
    for one in begun(Path(args.out)):
        state, extra = one.state(), ""
        if state == "done":
            record = stage.read_record(one.folder / "stage.json")
            figures = [f"{key} {value}" for key, value in record["figures"].items() if not isinstance(value, dict)]
            extra = f"{record['seconds']:>7.1f} s   {', '.join(figures)}"
            extra += f"   ({', '.join(edited)} changed since)" if (edited := one.edited()) else ""
        print(f"{one.name:<12} {state:<12} {extra}")


def adopt(args: argparse.Namespace) -> None:
    stages = {one.name: one for one in begun(Path(args.out))}
    if strange := [name for name in args.stages if name not in stages]:
        raise data.RowError(f"{strange[0]}: is no stage of this run; they are {', '.join(stages)}")
    for name in args.stages:
        stages[name].adopt()
        print(f"{name}: {stages[name].folder} is this run's now")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="MedE²: elicit and enhance multimodal medical reasoning.")
    commands = parser.add_subparsers(dest="command", required=True)
    small = commands.add_parser("demo", help="the whole method in the miniature clinic")
    small.add_argument("--out", default="runs/demo", help="run folder")
    small.add_argument(
        "--seed", type=flags.SEED, default=0, help="of the world, the base model and every draw"
    )
    small.add_argument("--size", choices=["tiny", "small"], default="tiny", help="of the model")
    small.add_argument("--family", choices=["qwen", "internvl"], default="qwen")
    small.add_argument("--fast", action="store_true", help="a smaller world: whether the chain is whole, not what it shows")
    small.set_defaults(act=demo)
    real = commands.add_parser("run", help="the method on your questions, with a recipe of the paper's size")
    real.add_argument("recipe", choices=[name for name in RECIPES if not name.startswith("mini")])
    real.add_argument("--base", default="", help="model folder, if not models/NAME")
    real.add_argument("--questions", nargs="+", required=True, help="the question bank")
    real.add_argument("--test", nargs="+", required=True, help="benchmark questions: evaluated on, and kept out of training")
    real.add_argument("--images", default=".", help="image root of all of them")
    real.add_argument("--baselines", nargs="+", required=True, help="engines that must not solve a question")
    real.add_argument("--experts", nargs="+", required=True, help="engines that must each solve it once")
    real.add_argument("--classifier", required=True, help="engine that tells the type of image questions")
    real.add_argument("--editor", required=True, help="engine that takes image descriptions out of questions")
    real.add_argument("--teachers", nargs="+", required=True, help="engines that write demonstrations")
    real.add_argument("--expand", nargs=2, action="append", default=[], metavar=("TEACHER", "EXPANDER"), help="a teacher that tells a summary, and the engine that writes it out; may be repeated")
    real.add_argument("--checker", default="", help="engine that checks demonstrations for structure and plausibility")
    real.add_argument("--judge", required=True, help="engine that judges chains")
    real.add_argument(
        "--gpus", type=flags.whole(0), default=8,
        help="ranks of torchrun; 0: one process without it",
    )  # fmt: skip
    real.add_argument("--out", default="runs/full", help="run folder")
    real.add_argument("--seed", type=flags.SEED, default=0)
    real.add_argument("--reviewed", default="", help="review.csv of curate with its question column corrected, as curate.py takes it")
    real.add_argument(
        "--judge-samples", type=flags.whole(0), default=1,  # ours: paper silent
        help="chains of each benchmark question that are judged; 0: all",
    )  # fmt: skip
    real.add_argument(
        "--limit", type=flags.whole(0), default=0,
        help="rehearse: so many text and so many image questions of the bank, and of the benchmarks",
    )  # fmt: skip
    real.add_argument(
        "--concurrency", type=flags.whole(1, 1000), default=16,  # ours: as in asking.py
        help="requests at once to a remote engine",
    )  # fmt: skip
    real.add_argument(
        "--max-requests", type=flags.whole(0), default=0,
        help="stop after so many requests of the whole run; 0: no limit",
    )  # fmt: skip
    real.add_argument(
        "--images-may-leave", action="store_true",
        help="let images be sent to engines on other machines",
    )  # fmt: skip
    real.add_argument("--dry", action="store_true", help="print commands and costs only")
    real.set_defaults(act=run)
    several = commands.add_parser("claims", help="the demo over several seeds, and what it shows")
    several.add_argument("--out", default="runs/claims", help="folder of the runs")
    several.add_argument(
        "--seeds", type=flags.SEED, nargs="+", default=[21, 22, 23],
        help="none of them was used to choose a setting",
    )  # fmt: skip
    several.add_argument("--size", choices=["tiny", "small"], default="tiny")
    several.add_argument("--family", choices=["qwen", "internvl"], default="qwen")
    several.add_argument("--write", default="", help="file for the table; default: CLAIMS.md in --out")
    several.set_defaults(act=claims)
    fits = commands.add_parser("plan", help="will it fit? memory of a GPU, term by term, and the micro-batch for it")
    fits.add_argument("recipe", choices=[name for name in RECIPES if not name.startswith("mini")])
    fits.add_argument("--gpus", type=flags.whole(1), default=8, help="that share the weights")
    fits.add_argument(
        "--len", type=flags.whole(0), default=0,
        help="tokens of the longest row: prompt, images, responses; 0: as long as the recipe allows",
    )  # fmt: skip
    fits.add_argument("--stage", choices=["sft", "dpo"], default="", help="default: both")
    fits.add_argument(
        "--images", type=flags.whole(0), default=1, help="images of a row in Stage II"
    )
    fits.add_argument(
        "--memory", type=flags.number(above=0), default=80, help="GB of a GPU"
    )
    fits.add_argument("--base", default="", help="local model folder whose config.json is read, instead of the published shapes")
    fits.set_defaults(act=plan)
    taken = commands.add_parser("adopt", help="take over stages of a run that were finished by hand")
    taken.add_argument("stages", nargs="+", metavar="STAGE")
    taken.add_argument("--out", required=True, help="folder of the run, which was begun")
    taken.set_defaults(act=adopt)
    state = commands.add_parser("status", help="which stages of a run are done")
    state.add_argument("--out", default="runs/demo", help="run folder")
    state.set_defaults(act=status)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    args.act(args)


if __name__ == "__main__":
    flags.run_script(main)
