"""The runs that test_ranks.py compares. Each is a function that works alone and under torchrun, so
that the same code makes both.

    torchrun --nproc_per_node 2 tests/ranks_worker.py SPEC.json

It also holds the small demonstrations and pairs that the tests of both stages train on.
"""

import json
import os
import shutil
import signal
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data  # noqa: E402
import dpo  # noqa: E402
import hub  # noqa: E402
import lora  # noqa: E402
import model  # noqa: E402
import reference  # noqa: E402
import sft  # noqa: E402
import train  # noqa: E402
import trees  # noqa: E402
from command import schema, stage  # noqa: E402

WORDS = (
    "the film shows a nodule in the left upper lobe with fever and cough so the next step is a scan"
).split()
SYSTEM = "You are a helpful assistant."


class Stop(Exception):
    """Thrown in the middle of a run, as a kill would end it."""


# --------------------------------------------------------------------------------------------------
# Rows: lengths all differ, some have an image


def draw_images(folder: Path, count: int = 4) -> list[str]:
    """Small films of noise; no two are alike."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        pixels = np.random.default_rng(index).integers(0, 255, (56, 56, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"film{index}.png")
    return [f"film{index}.png" for index in range(count)]


def said(index: int, length: int) -> str:
    return " ".join(WORDS[(index * 5 + at) % len(WORDS)] for at in range(length))


def demo(index: int, image: str | None = None) -> dict:
    turns = [("system", SYSTEM), ("user", f"Case {index}: {said(index, 3 + index % 4)}?")]
    turns.append(
        (
            "assistant",
            data.join_response(
                said(index, 2 + 3 * (index % 5)),
                f"{'ABCD'[index % 4]}. {said(index + 1, 1 + index % 3)}",
            ),
        )
    )
    return {
        "id": f"d{index}",
        "messages": [{"role": role, "content": text} for role, text in turns],
        "images": [image] if image else [],
    }


def pair(index: int, image: str | None = None, processor: model.Processor | None = None) -> dict:
    """With a processor the row has token ids, as a rollout would give them."""
    prompt = [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": f"Case {index}: {said(index, 3 + index % 4)}?"},
    ]
    row = {
        "id": f"p{index}",
        "prompt": prompt,
        "images": [image] if image else [],
        "failed": ["visual"],
    }
    for side, start in (("chosen", index), ("rejected", index + 7)):
        row[side] = data.join_response(said(start, 3 + 2 * (start % 4)), "A. " + said(start, 2))
        row[f"{side}_token_ids"] = processor.encode_response(row[side]).ids if processor else None
    return row


def encode_pair(row: dict, processor: model.Processor, root: Path) -> model.Row:
    """prompt -> chosen, prompt -> rejected: the tree of a single pair"""
    chains = tuple(trees.chain_of(row, side, processor) for side in trees.SIDES)
    tree = trees.Tree(row["id"], row["prompt"], row["images"], list(chains))
    return trees.encode_tree(tree, (0, 1), processor, root)


def collate_pairs(rows: list, weights: list[float], processor: model.Processor) -> model.Batch:
    """(row, reference values) of single pairs"""
    return trees.collate_trees(
        [(row, values, ((0, 1),)) for row, values in rows], weights, processor
    )


@dataclass
class EncodedForest(trees.Forest):
    """A forest of rows that are encoded already."""

    rows: list[model.Row] = field(default_factory=list)

    def encode(self, one: trees.Subtree) -> model.Row:
        prompt, *chains = self.rows[one.tree]
        return [prompt, *(chains[chain] for chain in one.chains)]


def forest_of(
    rows: list[model.Row], processor: model.Processor, checkpoint: str = "one", edges: list = ()
) -> tuple[trees.Forest, list[trees.Subtree]]:
    """Encoded rows as a forest, and each row whole. A row counts one token, so that budgets are in
    rows. edges: of each row; that of a single pair if not given."""
    edges = edges or [((0, 1),)] * len(rows)
    whole = [
        trees.Subtree(i, tuple(range(len(row) - 1)), edges[i], 1) for i, row in enumerate(rows)
    ]
    forest = EncodedForest(
        [SimpleNamespace(id=f"q{index}") for index in range(len(rows))],
        [[len(segment.ids) for segment in row] for row in rows],
        [trees.chain_keys(row, checkpoint) for row in rows],
        processor,
        Path("."),
        rows=rows,
    )
    return forest, whole


def in_numbers(loss: torch.Tensor, count: torch.Tensor, figures: dict) -> tuple:
    """What a stage's loss returns, with its counts and figures read from their tensors."""
    read = {name: (float(total), float(over)) for name, (total, over) in figures.items()}
    return loss, float(count), read


def mixed_rows(stage: str, processor: model.Processor | None = None, count: int = 7) -> list[dict]:
    """Seven rows, which two ranks cannot share equally. In both stages some have an image and some
    have none. Every third pair is of the question before it, and prefers what was rejected
    there."""
    images = [f"film{index % 4}.png" if index % 3 == 0 else None for index in range(count)]
    if stage == "sft":
        return [demo(index, image) for index, image in enumerate(images)]
    rows = [pair(index, image, processor) for index, image in enumerate(images)]
    for index in range(1, count, 3):
        first = rows[index - 1]
        rows[index] |= {key: first[key] for key in ("id", "prompt", "images")}
        rows[index] |= {
            key.replace("rejected", "chosen"): first[key] for key in first if "rejected" in key
        }
    return rows


def apart(item: model.Row | trees.Encoded) -> list:
    """A tree as its pairs one by one; a demonstration as it is."""
    if isinstance(item, list):
        return [item]
    (prompt, *chains), values, edges = item
    return [
        (
            [prompt, replace(chains[w], branch=1), replace(chains[l], branch=2)],
            [values[w], values[l]],
            ((0, 1),),
        )
        for w, l in edges
    ]


def plain_inputs(
    sequences: list[list[int]], images: list, processor: model.Processor
) -> dict[str, torch.Tensor]:
    """What Hugging Face's own forward takes: one sequence a row, padded on the right. images: those
    of all rows, in order."""
    length = max(len(ids) for ids in sequences)
    ids = torch.tensor([row + [0] * (length - len(row)) for row in sequences])
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.tensor(
            [[1] * len(row) + [0] * (length - len(row)) for row in sequences]
        ),
    }
    if processor.family.grid_positions:
        inputs["mm_token_type_ids"] = (ids == processor.image_id).int()
    if images:
        inputs["pixel_values"] = torch.cat([image.pixels for image in images])
        if (
            processor.family.grid_positions
        ):  # there the grid counts patches before merging two by two
            inputs["image_grid_thw"] = torch.tensor(
                [
                    [t, 2 * rows, 2 * columns]
                    for t, rows, columns in (image.grid for image in images)
                ]
            )
    return inputs


def gradients(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """By name, nothing counted as zero."""
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in module.named_parameters()
    }


# --------------------------------------------------------------------------------------------------
# Cases: stage, family, method, micro-batch, recomputation in backward, replicas

CASES = {
    "sft-full-qwen": ("sft", "qwen", "full", 1, 0, 1),
    "sft-lora-qwen": ("sft", "qwen", "lora", 1, 0, 1),
    "dpo-full-qwen": ("dpo", "qwen", "full", 1, 0, 1),
    "dpo-lora-qwen": ("dpo", "qwen", "lora", 1, 0, 1),
    "sft-full-internvl": ("sft", "internvl", "full", 1, 0, 1),
    "dpo-full-internvl": ("dpo", "internvl", "full", 1, 0, 1),
    "sft-full-qwen-micro2-recomputed": ("sft", "qwen", "full", 2, 2, 1),
    "dpo-full-internvl-replicas": ("dpo", "internvl", "full", 1, 0, 2),
    "sft-lora-qwen-replicas": ("sft", "qwen", "lora", 1, 0, 2),
}
BATCH, PEAK = 5, 1e-3  # seven rows in batches of five: a full batch and a smaller one


def prepare(
    case: str, models: str, images: str, device: torch.device | None = None, out: Path | None = None
):
    """(policy, loss, encode, collate, rows) of a case, as the stage's own main puts them together,
    but in float64.

    Without a device nothing is sharded and DPO has no reference yet: the pieces for a computation
    by hand.
    """
    stage, family, method, micro, recomputed, replicas = CASES[case]
    folder, root = Path(models) / family, Path(images)
    processor = model.Processor(folder, 56 * 56, 1)
    policy = hub.meta_policy(folder) if device else hub.load_policy(folder)
    policy.freeze_vision()
    if method == "lora":
        lora.inject(policy.model, policy.language_model, 4, 8.0, 0)
    policy.double()
    rows = mixed_rows(stage, processor, 7 if stage == "sft" else 10)
    if device:
        train.shard(policy, device, recomputed, replicas if train.world_size() > 1 else 1)
    if stage == "sft":
        ones = {label: 1.0 for label in data.SPAN_NAMES}
        encode = lambda i: sft.encode_demo(rows[i], processor, root)  # noqa: E731
        return (
            policy,
            lambda logp, b: sft.sft_loss(logp, b, ones),
            encode,
            lambda r, w: model.collate(r, processor, w),
            rows,
        )

    rows, places = trees.group(rows, processor, root)  # seven, of one or two pairs
    edges = trees.edges_of(places, len(rows))
    encoded = [trees.encode_tree(row, range(len(row.chains)), processor, root) for row in rows]
    forest, whole = forest_of(encoded, processor, edges=edges)
    rounds = reference.waves_of([1] * len(rows), micro if device else 1)
    if device:
        path = out / "reference.jsonl"
        logp = reference.compute(path, policy, forest, whole, rounds, device)
        forest.reference = logp
        batches = dpo.pair_batches(forest, whole[: dpo.FIRST * train.world_size()], micro, device)
        dpo.gate_reference(policy, batches, dpo.BETA, device)
    else:
        logp, cpu = {}, torch.device("cpu")
        for done in reference.log_probs(policy, forest, whole, rounds, cpu, ""):
            for index, values in done:
                logp |= zip(forest.keys[index], values)
    return (
        policy,
        lambda logp, b: dpo.pair_loss(logp, b, dpo.BETA),
        lambda i: (encoded[i], [logp[key] for key in forest.keys[i]], edges[i]),
        lambda r, w: trees.collate_trees(r, w, processor),
        rows,
    )


def fit(
    policy, loss_of, encode, collate, plan, *, out: Path, device, watch=None, **settings
) -> list[dict]:
    """A stage's loop: all steps of a run. Returns the figures of each, on the first rank. watch: is
    called before each step."""

    def make_batch(rows: list[int], weights: list[float]):
        return collate([encode(index) for index in rows], weights).to(device)

    run = train.Run(policy, plan, make_batch, out=out, device=device, **settings)
    for _ in run:
        if watch:
            watch()
        for batch in run.micro_batches():
            run.backward(*loss_of(policy(batch), batch))
        run.update()
    return schema.read_metrics(out) if train.rank() == 0 else []


def run_case(
    case: str, models: str, images: str, out: Path, stop: int | None = None
) -> dict[str, torch.Tensor]:
    """Whole weights after three steps. The state of step 1 is kept as OUT/first; the state of step
    3 is the last one, and stays in OUT/state. With `stop`, the run dies in that step. A
    collective."""
    device, micro = torch.device("cpu"), CASES[case][3]
    out.mkdir(parents=True, exist_ok=True)
    policy, loss_of, encode, collate, rows = prepare(case, models, images, device, out)

    def watch() -> None:
        if train.rank() == 0 and (out / "state" / "step_000001").exists():
            shutil.copytree(out / "state" / "step_000001", out / "first", dirs_exist_ok=True)
        # no rank goes on before it does
        if stop is not None and (out / "state" / f"step_{stop:06d}").exists():
            raise Stop

    fit(
        policy,
        loss_of,
        encode,
        collate,
        train.shuffled(len(rows), BATCH, 1.5, 0),
        out=out,
        device=device,
        peak=PEAK,
        budget=micro,
        warmup=0.1,
        save_every=1,
        print_every=100,
        watch=watch,
    )
    return dict(train.gather_full(policy))


def run_stopped(case: str, models: str, images: str, out: Path) -> None:
    """Dies in step 2 of 3, and leaves the state of step 2."""
    try:
        run_case(case, models, images, out, stop=2)
    except Stop:
        train.barrier()
        return
    raise AssertionError("the run was not stopped")


def measured(action) -> tuple[int, object]:
    """(most bytes that torch's CPU allocator held during an action beyond those held before it,
    what the action returned)"""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        returned = action()
    held, peak = 0, 0
    for event in sorted(
        (e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"),
        key=lambda e: e.start_ns(),
    ):
        held += event.nbytes()
        peak = max(peak, held)
    return peak, returned


def join(store: Path) -> None:
    """A command leaves the group when it ends. The ranks of this launch meet again in a file, for
    the next command."""
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group(
            "gloo",
            init_method=f"file://{store}",
            rank=int(os.environ["RANK"]),
            world_size=int(os.environ["WORLD_SIZE"]),
        )


def run_stages(models: str, images: str, out: Path) -> None:
    """Both stages by their own main: LoRA, then DPO over all parameters on what it merged."""
    base, root = (
        Path(models) / "qwen",
        ["--images", images, "--pixels", str(56 * 56), "--batch", "5"],
    )
    if train.rank() == 0:
        data.write_jsonl(out / "demos.jsonl", mixed_rows("sft"))
        data.write_jsonl(out / "pairs.jsonl", mixed_rows("dpo"))
    train.barrier()
    root += ["--epochs", "2", "--lr", "1e-3"]
    sft.main(
        [
            "--model",
            str(base),
            "--demos",
            str(out / "demos.jsonl"),
            "--out",
            str(out / "sft"),
            *root,
        ]
    )
    join(out / "dpo.store")
    dpo.main(
        [
            "--model",
            str(out / "sft" / "merged"),
            "--pairs",
            str(out / "pairs.jsonl"),
            "--out",
            str(out / "dpo"),
            *root,
        ]
    )


def run_memory(models: str, out: Path) -> None:
    """OUT/memory_RANK.json: the most bytes held beyond what was there while this rank loads its
    shards, and while it saves."""
    folder, limit = Path(models) / "qwen", 400_000
    policy = hub.meta_policy(folder)
    policy.freeze_vision()
    sizes = [p.nbytes for p in policy.model.parameters()]
    load, _ = measured(lambda: train.shard(policy, torch.device("cpu")))
    own = sum(train.local_tensor(p).nbytes for p in policy.parameters())
    tensors = train.gather_full(policy)
    if train.rank() == 0:
        save, _ = measured(
            lambda: hub.save_policy(out / "saved", policy, model.Processor(folder), tensors, limit)
        )
    else:
        save, _ = measured(lambda: [None for _ in tensors])
    frozen = sum(
        p.nbytes for module in (policy.vision, policy.projector) for p in module.parameters()
    )
    figures = {
        "whole": sum(sizes),
        "frozen": frozen,
        "largest": max(sizes),
        "own": own,
        "load": load,
        "limit": limit,
        "save": save,
    }
    (out / f"memory_{train.rank()}.json").write_text(json.dumps(figures))


def run_rounding(models: str, out: Path) -> None:
    """OUT/rounding: a bf16 base whose trained weights all moved by 0.003, as the stages save it.
    OUT/rounding.json: the figures."""
    base = out / "bf16"
    if train.rank() == 0:
        shutil.copytree(Path(models) / "qwen", base)
        file = base / "model.safetensors"
        weights = {key: tensor.bfloat16() for key, tensor in load_file(file).items()}
        save_file(weights, file, {"format": "pt"})
    train.barrier()
    policy = hub.meta_policy(base)
    policy.freeze_vision()
    train.shard(policy, torch.device("cpu"))
    for parameter in train.trained_parameters(policy).values():
        train.local_tensor(parameter).data.add_(0.003)
    args = SimpleNamespace(out=out / "rounding", method="full", save_dtype="auto")
    figures = train.save(args, policy, model.Processor(base))
    if train.rank() == 0:
        (out / "rounding.json").write_text(json.dumps(figures))


def die_at(moment: str) -> None:
    """From now on the process kills itself (-9) at a moment: "finish", all saved but stage.json;
    "dropping", one file of the state removed; "forward N", at the policy's Nth forward; "plan",
    before the plan of the steps; "reference" and "after", after the first round of that pass;
    else, half of a file whose path contains `moment` written."""
    import safetensors.torch

    save_file, rmtree, forward, calls = (
        safetensors.torch.save_file,
        shutil.rmtree,
        model.Policy.forward,
        [],
    )
    log_probs = reference.log_probs

    def die(*given) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def saves(tensors: dict, path: Path, metadata: dict) -> None:
        save_file(tensors, path, metadata)
        if moment in str(path):
            os.truncate(path, os.path.getsize(path) // 2)
            die()

    def drops(path: Path, ignore_errors: bool = False) -> None:
        if moment == "dropping" and Path(path).name == "state":
            next(Path(path).rglob("rank_*")).unlink()
            die()
        rmtree(path, ignore_errors)

    def counts(self, batch: model.Batch, plain: bool = False) -> torch.Tensor:
        calls.append(1)
        if moment == f"forward {len(calls)}":
            die()
        return forward(self, batch, plain)

    def passes(*given):
        for number, done in enumerate(log_probs(*given)):
            if number and moment == given[-1]:
                die()
            yield done

    safetensors.torch.save_file, shutil.rmtree, model.Policy.forward = saves, drops, counts
    reference.log_probs = passes
    if moment == "plan":
        trees.plan = die
    if moment == "finish":
        stage.finish = die


def main(path: str) -> None:
    """SPEC: {"mains": [[stage, its arguments]], "pids": folder, "die": [rank, moment in the last
    main]}, {"resume": {case: folder}}, or all cases."""
    spec = json.loads(Path(path).read_text())
    if "mains" in spec:
        rank = int(os.environ.get("RANK", 0))
        (Path(spec["pids"]) / f"pid_{rank}").write_text(str(os.getpid()))
        for at, (name, *arguments) in enumerate(spec["mains"], 1):
            if at > 1:
                join(Path(f"{path}.{at}.store"))
            if at == len(spec["mains"]) and spec["die"] and spec["die"][0] == rank:
                die_at(spec["die"][1])
            {"sft": sft, "dpo": dpo}[name].main(arguments)
            assert not dist.is_initialized()  # a rank that ends inside the group may abort
        return
    models, images, out = spec["models"], spec["images"], Path(spec["out"])
    train.init_ranks()

    def keep(case: str, name: str, weights: dict[str, torch.Tensor]) -> None:
        if train.rank() == 0:
            save_file(
                {name: tensor.contiguous().clone() for name, tensor in weights.items()},
                out / case / f"{name}.safetensors",
            )

    for case, folder in spec.get("resume", {}).items():
        keep(case, "fewer", run_case(case, models, images, Path(folder)))
    for case in CASES if "resume" not in spec else ():
        keep(case, "weights", run_case(case, models, images, out / case / "whole"))
        if case in spec["stopped"]:
            run_stopped(case, models, images, out / case / "stopped")
            keep(case, "resumed", run_case(case, models, images, Path(spec["stopped"][case])))
    if "resume" not in spec:
        run_memory(models, out)
        run_rounding(models, out)
        run_stages(models, images, out)
    train.leave_group()


if __name__ == "__main__":
    main(sys.argv[1])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # as flags.run_script ends a rank: threads of a group that was left may abort
