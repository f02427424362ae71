"""The only file that knows about ranks: sharding from outside, one training loop for both stages, exact resume.

    theta <- theta - AdamW( (1 / count) * sum over the global batch of grad loss )          cosine schedule (paper App. C)

Sum locally, count globally, divide once. Every loss returns (sum, count); SFT counts supervised tokens, DPO counts pairs.
Counts are added over micro-batches and ranks before the division, so that one rank with two rows, two ranks with one
row, and one rank that accumulates twice all take the same step. (A mean of means would weigh a token by the company it
keeps.) FSDP averages gradients over ranks, so the local sum is multiplied by their number.

The same command runs as one process on a CPU, on 8 GPUs, and on several nodes: torchrun is the only launcher.

    torchrun --nproc_per_node 8 sft.py ...            bf16 compute, fp32 master weights, sharded by FSDP2 (ZeRO-3)

Where there are several ranks, none ever holds the whole model: it is built on the `meta` device and sharded there, each
rank reads the rows of its own shards from the files, and saving gathers one tensor at a time.

Resume is exact: the order of rows is a pure function of (seed, epoch), and weights, optimizer and step are saved together,
so a run that was killed goes on to the very weights of a run that was not.

A run begins with `begin` and ends with `end`. While it works, OUT holds metrics.jsonl and, in
OUT/state, the newest state. The last step has a state too, so a kill while the result is written
costs no step: the result is saved first, then stage.json, and only then is the state removed. OUT
must lie on a disk that all nodes share; `begin` finds out. All ranks refuse together (`refuse`).

Where we depart from the paper, or it is silent:
  1. FSDP2 instead of DeepSpeed ZeRO-3: the same sharding of weights, gradients and optimizer, in plain PyTorch.
  2. The frozen vision tower is not sharded: every rank holds it whole, so a rank whose rows have no image need not join
     any exchange for it.
  3. --replicas N keeps N copies, each sharded over the ranks of one node or of a few (HSDP): the large exchanges then stay
     inside a node. The default, one copy over all ranks, needs the least memory.
  4. A step's state is stored as safetensors, one file a shard, rather than torch.distributed.checkpoint's format, whose
     index is a pickle.
  5. Batch 64, warm-up 10 %, weight decay 0, clip 1.0 are LLaMA-Factory's; the paper gives learning rates and "cosine".
"""

import argparse
import math
import os
import random
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext, suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from tqdm import tqdm

import data
import flags
import lora
import model
import stage

BETAS, EPS, WEIGHT_DECAY = (0.9, 0.999), 1e-8, 0.0  # ours: paper silent (LLaMA-Factory / transformers defaults)
WARMUP = 0.1  # ours: paper silent (LLaMA-Factory's examples); share of the steps
CLIP = 1.0  # ours: paper silent (transformers' max_grad_norm)
PATIENCE = timedelta(hours=1)  # ours: the other ranks wait while the first hashes or writes a large checkpoint (torch's default is 10 minutes)
MAX_LENGTH = 8192  # ours: paper silent; tokens of a row, responses included
LOG_EVERY = 60.0  # ours: seconds between two states of a progress bar in a log file
SIGHT = 10.0  # ours: seconds in which a network disk must show a file that another node wrote


class Refused(SystemExit, RuntimeError):
    """What cannot go on, and what to do. Uncaught, it ends a script as data.RowError does."""


class Diverged(SystemExit, FloatingPointError):
    """A loss or a gradient that is not finite. Uncaught, it ends a script as data.RowError does."""


# ---------------------------------------------------------------------------------------------------------------
# Ranks


def init_ranks() -> torch.device:
    """Joins the process group if torchrun started this process, or alone on a GPU. Returns this rank's device."""
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew for every new length
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo", timeout=PATIENCE)
    elif cuda and not dist.is_initialized():  # alone on one GPU: a group of one, so that bf16 compute works the same way
        dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    return torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def print0(*words) -> None:
    """Prints on the first rank only."""
    if rank() == 0:
        print(*words, flush=True)


def bar(items: Sequence, what: str, unit: str) -> tqdm:
    """A progress bar around items, on the first rank. A file keeps every state that a terminal
    overwrites, so it gets one a minute."""
    every = 0.1 if sys.stderr.isatty() else LOG_EVERY  # ours: tqdm's own default, in a terminal
    pace = {"mininterval": every, "maxinterval": max(10.0, every)}
    return tqdm(items, desc=what, unit=unit, disable=rank() > 0, **pace)


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def leave() -> None:
    """Leaves the process group, all ranks together: a rank that ends inside one, or leaves while another still talks, may
    abort. A collective."""
    barrier()
    if dist.is_initialized():
        dist.destroy_process_group()


def refuse(error: Exception | None) -> NoReturn:
    """Ends all ranks with exit code 1; the first says why, so the text is printed once. Every rank
    must call it, after a collective that told all of them the same: none is left waiting."""
    first = rank() == 0
    leave()
    raise error if first else SystemExit(1)


def total(values: list[float], device: torch.device) -> list[float]:
    """Sums numbers over all ranks, in float64."""
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    if world() > 1:
        dist.all_reduce(tensor)
    return tensor.tolist()


def gather_rows(rows: list) -> list:
    """Every rank's list, joined in rank order, on every rank."""
    if world() == 1:
        return rows
    parts: list = [None] * world()
    dist.all_gather_object(parts, rows)
    return [row for part in parts for row in part]


def shard(policy: nn.Module, device: torch.device, checkpointing: bool = False, replicas: int = 1) -> nn.Module:
    """Puts a policy on its device and, where there are ranks, shards it block by block (FSDP2). The model is mutated from
    outside: it knows nothing of ranks. Parameters on `meta` (model.meta_policy) are read from the checkpoint afterwards,
    each rank its own rows. `checkpointing` recomputes each block's activations in backward; `replicas` is the number of
    copies (HSDP), a divisor of the number of ranks.

    On a GPU compute is bf16 with fp32 master weights and fp32 gradient sums; on a CPU everything is fp32.
    """
    layers = policy.language_model.layers
    if checkpointing:
        for layer in layers:
            layer.forward = partial(torch.utils.checkpoint.checkpoint, layer.forward, use_reentrant=False)
    if world() % replicas:
        said = f"--replicas {replicas} does not divide the number of ranks, {world()}"
        refuse(data.RowError(f"{said}; one replica a node is usual"))
    if dist.is_initialized():
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        # torchrun numbers the ranks node by node: with one replica a node, the sharded (last) dimension stays inside a node
        if replicas == 1:
            mesh = init_device_mesh(device.type, (world(),))
        else:
            mesh = init_device_mesh(device.type, (replicas, world() // replicas), mesh_dim_names=("replica", "shard"))
        precision = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if device.type == "cuda" else MixedPrecisionPolicy()
        # the frozen tower is ignored: every rank holds it whole. Parameters only: its frequencies (buffers) stay in fp32
        frozen = {p for module in (policy.vision, policy.projector) for p in module.parameters() if not p.requires_grad}
        for parameter in frozen if device.type == "cuda" else ():
            parameter.data = parameter.data.to(torch.bfloat16)
        for layer in layers:
            fully_shard(layer, mesh=mesh, mp_policy=precision)
        # the root too gives its whole weights up after a forward: without a backward (DPO's reference) they would stay, and
        # the optimizer would then be handed those copies instead of the shards
        fully_shard(policy, mesh=mesh, mp_policy=precision, reshard_after_forward=True, ignored_params=frozen)

    def read(name: str, parameter: nn.Parameter) -> Tensor:
        rows = policy.checkpoint.read(lora.plain_name(name), own_rows(parameter)).to(device, parameter.dtype, copy=True)
        if not isinstance(parameter, DTensor):
            return rows
        return DTensor.from_local(rows, parameter.device_mesh, parameter.placements, run_check=False, shape=parameter.shape, stride=parameter.stride())

    model.fill(policy, read)
    return policy.to(device)  # what was neither sharded nor read: buffers, and parameters that were real before


def place(tensor: Tensor) -> tuple[int, int]:
    """(which shard of a tensor this rank holds, how many there are); (0, 1) for a tensor that is whole."""
    if not isinstance(tensor, DTensor):
        return 0, 1
    mesh = tensor.device_mesh  # (shards,) or (replicas, shards)
    return mesh.get_local_rank(mesh.ndim - 1), mesh.size(mesh.ndim - 1)


def own_rows(tensor: Tensor) -> slice:
    """The rows of the whole tensor that this rank holds. FSDP cuts the first dimension as torch.chunk does: into equal parts
    but for the last ones, which may be smaller or empty."""
    index, count = place(tensor)
    length = math.ceil(len(tensor) / count)
    return slice(min(index * length, len(tensor)), min((index + 1) * length, len(tensor)))


def whole_tensors(policy: nn.Module, only: Callable[[str], bool] = lambda name: True) -> Iterator[tuple[str, Tensor]]:
    """(name, whole tensor), one at a time, by Hugging Face module names; a tied weight once. A collective: every rank must
    iterate to the end. The first rank gets the tensors, on the CPU; the others empty ones on `meta`."""
    for name, parameter in policy.model.named_parameters():
        if only(name):
            whole = parameter.detach()
            if isinstance(whole, DTensor):
                whole = whole.full_tensor()
            yield name, whole.to("cpu" if rank() == 0 else "meta")


# ---------------------------------------------------------------------------------------------------------------
# Data order and schedule: pure functions


def order(rows: int, seed: int, epoch: int) -> list[int]:
    """The order of rows in an epoch: a pure function, so that a resumed run sees the rows it would have seen."""
    indices = list(range(rows))
    random.Random(data.sample_seed(seed, "order", epoch)).shuffle(indices)
    return indices


def global_batch(rows: int, batch: int, seed: int, step: int) -> list[int]:
    """Row indices of one step. The last batch of an epoch may be smaller: no row is dropped, none is seen twice."""
    per_epoch = math.ceil(rows / batch)
    epoch, at = divmod(step, per_epoch)
    return order(rows, seed, epoch)[at * batch : (at + 1) * batch]


def shuffled(rows: int, batch: int, epochs: float, seed: int) -> list[list[int]]:
    """The rows of every step of a run, epoch after epoch in another order."""
    steps = math.ceil(epochs * math.ceil(rows / batch))
    return [global_batch(rows, batch, seed, step) for step in range(steps)]


MicroBatch = list[tuple[int, float]]  # (row index, weight)
FILLED = 0.9  # ours: least share of a micro-batch's tokens that is not padding


def micro_batches(
    indices: list[int], budget: int, world: int, lengths: Sequence[int] | None = None
) -> list[list[MicroBatch]]:
    """[rank][number]: every rank's micro-batches.

    Rows are dealt in rounds, the longest first, so that the ranks, which wait for one another, have
    rows of like length in each; every other round goes backwards. All ranks get equally many: the
    last round is filled with the shortest row at weight 0. A micro-batch is as many rounds as
    `budget` tokens hold, padding included, if they are of like length; a row that is longer is
    alone. Without lengths the order stays, and a row counts 1."""
    size = lengths or dict.fromkeys(indices, 1)
    if lengths:
        indices = sorted(indices, key=lambda index: (-lengths[index], index))
    rows = [(index, 1.0) for index in indices]
    rows += [(index, 0.0) for index in indices[-1:]] * (-len(indices) % world)
    rounds = [rows[at : at + world] for at in range(0, len(rows), world)]
    dealt: list[list[MicroBatch]] = [[] for _ in range(world)]
    held: list[int] = []  # the longest row of each round of the micro-batch, the longest first
    for number, part in enumerate(rounds):
        longest = size[part[0][0]]
        padded = (len(held) + 1) * (held or [longest])[0]
        room = bool(held) and padded <= budget and sum(held) + longest >= FILLED * padded
        held = [*held, longest] if room else [longest]
        for own, row in zip(dealt, part[::-1] if number % 2 else part):
            own[-1].append(row) if room else own.append([row])
    return dealt


def efficiency(
    plan: Sequence[Sequence[int]], budget: int, world: int, lengths: Sequence[int]
) -> float:
    """The share of what the ranks compute that is rows of their own, and neither padding nor waiting
    for another rank, if time goes by tokens."""
    own = spent = 0
    for step in plan:
        own += sum(lengths[index] for index in step)
        for part in zip(*micro_batches(step, budget, world, lengths)):
            spent += world * len(part[0]) * max(lengths[row] for rows in part for row, _ in rows)
    return own / spent


def learning_rate(step: int, steps: int, peak: float, warmup: float) -> float:
    """Linear warm-up over the first `warmup` share of steps, then half a cosine down to zero (paper App. C: cosine)."""
    rise = max(1, round(warmup * steps))
    if step < rise:
        return peak * (step + 1) / rise
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


# ---------------------------------------------------------------------------------------------------------------
# The state of a run: safetensors, one file a shard


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def trained(policy: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in policy.named_parameters() if p.requires_grad}


def save_state(folder: Path, policy: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Writes the trained weights and AdamW's moments beside the older state, a file for each shard, then makes it the one to
    resume from: a kill at any moment leaves one whole state or the other."""
    from safetensors.torch import save_file

    making = folder / f"step_{step:06d}.tmp"
    if rank() == 0:
        shutil.rmtree(making, ignore_errors=True)
        making.mkdir(parents=True)
    barrier()
    tensors, shards = {}, 1
    for name, parameter in trained(policy).items():
        moments, (_, shards) = optimizer.state[parameter], place(parameter)
        for kind, tensor in (("weight", parameter), ("exp_avg", moments["exp_avg"]), ("exp_avg_sq", moments["exp_avg_sq"])):
            tensors[f"{name}|{kind}"] = local(tensor).detach().cpu().contiguous()
    if rank() < shards:  # the ranks of the first replica; the other replicas hold the same
        save_file(tensors, making / f"rank_{rank():05d}.safetensors", metadata={"step": str(step), "shards": str(shards)})
    barrier()
    if rank() == 0:
        os.replace(making, folder / f"step_{step:06d}")
        for older in folder.glob("step_*"):
            if older.name != f"step_{step:06d}":
                shutil.rmtree(older)
    barrier()


FREE = ("save_every", "print_every", "micro_tokens", "checkpointing", "replicas")  # change nothing but rounding


def add_flags(parser: argparse.ArgumentParser, row: str) -> None:
    """The flags that both stages have. row: what a row of the batch is called."""
    add = parser.add_argument
    add("--rank", type=flags.RANK, default=lora.RANK)
    add("--alpha", type=flags.ALPHA, default=lora.ALPHA)
    # ours: paper silent (LLaMA-Factory example)
    add("--batch", type=flags.whole(1), default=64, help=f"{row} a step, over all ranks")
    said = f"in tokens; longer {row} are dropped and counted"
    add("--max-length", type=flags.whole(1), default=MAX_LENGTH, help=said)
    said = "tokens at once on one rank, padding included; a longer row is alone; 0: --max-length"
    add("--micro-tokens", type=flags.whole(0), default=0, help=said)
    said = "largest image in pixels, Qwen; as in the rollouts"
    add("--pixels", type=flags.PIXELS, default=model.MAX_PIXELS, help=said)
    said = "most tiles of an image, InternVL; as in the rollouts"
    add("--tiles", type=flags.TILES, default=model.TILES, help=said)
    said = "recompute activations in backward: less memory, a third more time"
    add("--checkpointing", action="store_true", help=said)
    said = "copies of the model, each sharded over its part of the ranks: the number of nodes, or 1"
    add("--replicas", type=flags.whole(1), default=1, help=said)
    said = "steps between states to resume from; 0: no states"
    add("--save-every", type=flags.whole(0), default=50, help=said)
    said = "numbers of OUT/merged; auto: as the weight files of --model have them"
    add("--save-dtype", choices=["auto", "float32"], default="auto", help=said)
    add("--seed", type=flags.SEED, default=0)


def begin(args: argparse.Namespace, inputs: list[str | Path], images: Iterable[Path] = ()) -> bool:
    """stage.open_folder, by the first rank for all of them. Where OUT is finished it does what
    `end` does, and returns False. All ranks end where the first one raises, and where one of them
    does not see what the first one wrote. A collective."""
    path, failed, said = Path(args.out) / "begun.json", None, None
    if rank() == 0:
        try:
            todo = stage.open_folder(args, inputs, FREE, images)
            said = (todo, path.read_bytes() if todo else b"")
        except Exception as error:  # the others wait below: they are told before it is raised
            failed = error
    (said,) = gather_rows([said] if rank() == 0 else [])
    if said is None:
        refuse(failed)
    todo, begun = said
    if not todo:
        end(path.parent)
        return False
    blind = gather_rows([] if sees(path, begun) else [str(rank())])
    if blind:
        seen = f"rank {', '.join(blind)} cannot see what rank 0 wrote there"
        wanted = "OUT must lie on a disk that all nodes share"
        refuse(data.RowError(f"--out {args.out}: {seen}; {wanted}"))
    return True


def sees(path: Path, content: bytes) -> bool:
    """Whether a file comes to have this content within SIGHT seconds, as this rank sees it."""
    until = time.monotonic() + SIGHT
    while True:
        with suppress(OSError):  # it is not there yet, or is replaced while it is read
            if path.read_bytes() == content:
                return True
        if time.monotonic() > until:
            return False
        time.sleep(0.1)


def load_state(folder: Path, policy: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Puts the newest whole state back and returns its step, or 0 where there is none. The number of ranks and of replicas
    may have changed: a sharded tensor is the files' parts one after another along its first dimension, and each rank reads
    from them the rows that are now its own."""
    from safetensors import SafetensorError, safe_open

    states = sorted(folder.glob("step_" + "[0-9]" * 6))
    if not states:
        return 0
    try:
        files = [safe_open(path, framework="pt") for path in sorted(states[-1].glob("rank_*.safetensors"))]
        step, shards = int(files[0].metadata()["step"]), int(files[0].metadata()["shards"])
        there = f"{len(files)} of {shards} rank files"
    except (IndexError, SafetensorError) as error:
        files, shards, there = [], 1, f"not a whole state ({error})"
    if len(files) != shards:
        refuse(Refused(f"{states[-1]}: {there}; move the folder away to start again"))
    with torch.no_grad():
        for name, parameter in trained(policy).items():
            moments, rows = optimizer.state[parameter], own_rows(parameter)
            moments["step"] = torch.tensor(float(step), device=parameter.device)  # where the fused kernel looks for it
            for kind in ("weight", "exp_avg", "exp_avg_sq"):
                target = parameter if kind == "weight" else moments.setdefault(kind, torch.zeros_like(parameter))
                at = 0  # the first row of the file's part
                for file in files:
                    part = file.get_slice(f"{name}|{kind}")
                    end = at + part.get_shape()[0]
                    if max(at, rows.start) < min(end, rows.stop):
                        taken = slice(max(at, rows.start), min(end, rows.stop))
                        local(target)[taken.start - rows.start : taken.stop - rows.start].copy_(part[taken.start - at : taken.stop - at])
                    at = end
    return step


# ---------------------------------------------------------------------------------------------------------------
# The loop

Loss = Callable[[Tensor, object], tuple[Tensor, float, dict[str, tuple[float, float]]]]


def steps(
    policy: nn.Module,
    loss_of: Loss,
    encode: Callable[[int], object],
    collate: Callable[[list, list[float]], object],
    plan: Sequence[Sequence[int]],
    *,
    out: Path,
    device: torch.device,
    learning_rate_peak: float,
    budget: int,
    save_every: int,
    lengths: Sequence[int] | None = None,
    told: Sequence[dict[str, float]] = (),
    warmup: float = WARMUP,
    print_every: int = 1,
    betas: tuple[float, float] = BETAS,
    weight_decay: float = WEIGHT_DECAY,
) -> Iterator[dict]:
    """Trains every parameter of `policy` that requires a gradient, and yields the figures of each
    step before they are written: who iterates may add some. A resumed run begins where it stopped.

    encode(i)            row i, ready to collate (called when needed: not all images are in memory)
    collate(rows, w)     a batch with `.to(device)`; w are the rows' weights, 0 for a row that only
                         keeps a rank in step
    loss_of(logps, b)    (sum, count, {name: (sum, count)}): sums over the micro-batch, never means
    plan                 the rows of every step; it fixes the number of steps, and so the cosine
    budget               of a micro-batch: tokens; where `lengths` is not given, rows
    save_every           steps between states; the last step has one too. 0 keeps none.
    lengths              the rows' tokens: they are dealt to the ranks by it, and it is the rate's
    told                 more figures of each step, for its line and row
    Writes out/metrics.jsonl, one row a step, and out/state, which `end` removes. Raises Diverged on
    a loss that is not finite, before it does harm.
    """
    steps = len(plan)
    parameters = list(trained(policy).values())
    fused = device.type == "cuda" or not dist.is_initialized()
    settings = {"betas": betas, "eps": EPS, "weight_decay": weight_decay, "fused": fused}
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate_peak, **settings)
    out.mkdir(parents=True, exist_ok=True)
    begin = load_state(out / "state", policy, optimizer)
    if begin:
        print0(f"resumed at step {begin} of {steps} from {out / 'state'}")
    if rank() == 0:
        keep_metrics(out / "metrics.jsonl", begin)
    begun = time.time()
    log = open(out / "metrics.jsonl", "a", encoding="utf-8") if rank() == 0 else nullcontext()
    with log:
        for step in range(begin, steps):
            started = time.time()
            now = learning_rate(step, steps, learning_rate_peak, warmup)
            for group in optimizer.param_groups:
                group["lr"] = now
            parts = micro_batches(plan[step], budget, world(), lengths)[rank()]
            count, means = accumulate(policy, loss_of, encode, collate, parts, device)
            norm = update(optimizer, parameters, step, count, means["loss"])
            ended = time.time()
            row = {"step": step, **{name: round(value, 6) for name, value in means.items()}}
            row |= told[step] if told else {}
            row |= {"lr": now, "grad_norm": round(norm, 4), "seconds": round(ended - started, 3)}
            yield row
            if rank() == 0:
                data.append_jsonl(log, [row])
            if (step + 1) % print_every == 0 or step + 1 == steps:
                tokens = sum(lengths[index] for index in plan[step]) if lengths else 0
                left = (ended - begun) / (step + 1 - begin) * (steps - step - 1)
                print0(status_line(row, steps, tokens / (ended - started), left, device))
            if save_every and ((step + 1) % save_every == 0 or step + 1 == steps):
                save_state(out / "state", policy, optimizer, step + 1)


def fit(taken: Iterator[dict], out: Path) -> list[dict]:
    """Takes all steps. Returns the figures of every one, earlier runs' too, on the first rank."""
    for _ in taken:
        pass
    return data.read_metrics(out) if rank() == 0 else []


def keep_metrics(path: Path, begin: int) -> None:
    """Drops the figures of the steps from `begin` on, which are taken again. The file is replaced
    whole: a kill here must not lose the others."""
    history = data.resume_jsonl(path)
    for row in history:
        data.check_row(row, str(path), "metrics")
    data.write_jsonl(path, [row for row in history if row["step"] < begin])


def accumulate(
    policy: nn.Module,
    loss_of: Loss,
    encode: Callable[[int], object],
    collate: Callable[[list, list[float]], object],
    parts: list[list[tuple[int, float]]],
    device: torch.device,
) -> tuple[float, dict[str, float]]:
    """Adds up the gradients of this rank's micro-batches, which stay sums. Returns what is to be
    divided by, and the figures' means, over all ranks. A collective."""
    sums: dict[str, list[float]] = {}
    counted = 0.0
    for part in parts:
        rows, weights = [encode(index) for index, _ in part], [weight for _, weight in part]
        b = collate(rows, weights).to(device)
        loss, count, metrics = loss_of(policy(b), b)
        (loss * world()).backward()
        counted += count
        for name, (value, over) in {"loss": (loss.item(), count), **metrics}.items():
            entry = sums.setdefault(name, [0.0, 0.0])
            entry[0] += value
            entry[1] += over
    names = list(sums)  # the same on every rank: a loss names its figures whether or not they occur
    counted, *reduced = total([counted] + [x for name in names for x in sums[name]], device)
    means = {n: x / max(y, 1e-12) for n, x, y in zip(names, reduced[::2], reduced[1::2])}
    return counted, means


def update(
    optimizer: torch.optim.Optimizer,
    parameters: list[nn.Parameter],
    step: int,
    count: float,
    loss: float,
) -> float:
    """The step itself: divides the gradients' sums by the global count, once; clips; moves the
    weights. Returns the gradient's norm. Raises Diverged before it does harm. A collective."""
    untouched = f"the weights of step {step - 1} are untouched"
    if not math.isfinite(loss):
        refuse(Diverged(f"step {step}: the loss is {loss}; {untouched}"))
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad.div_(count)
    norm = torch.nn.utils.clip_grad_norm_(parameters, CLIP)
    norm = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    if not math.isfinite(norm):
        refuse(Diverged(f"step {step}: the gradient's norm is {norm}; {untouched}"))
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def end(out: Path) -> None:
    """Removes the states of a run whose stage.json is written; then every rank leaves the group. A
    collective."""
    barrier()
    if rank() == 0:
        shutil.rmtree(out / "state", ignore_errors=True)
    leave()


def clock(seconds: float) -> str:
    """Hours, minutes and seconds: 3725.4 is 1:02:05."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


def figure(value: float) -> str:
    """Six characters, with three decimals of a small number and none of a large one."""
    return f"{value:6.{3 if abs(value) < 10 else 1 if abs(value) < 1000 else 0}f}"


def status_line(row: dict, steps: int, rate: float, left: float, device: torch.device) -> str:
    """Every figure in its own column, line under line:

        step 0040/0139 | loss  0.612 | ... | lr 9.1e-07 |   3.20 s |  5,120 tokens/s | left 0:05:17

    rate: tokens a second, 0: unknown. left: seconds to the last step's end. On a GPU also the most
    memory that was held."""
    shown = [f"step {row['step'] + 1:04d}/{steps:04d}"]
    for name, value in row.items():
        if name not in ("step", "lr", "seconds", "grad_norm") and not name.startswith("held_"):
            shown.append(f"{name} {figure(value)}")
    clipped = "clipped" if row["grad_norm"] > CLIP else " " * 7
    shown += [f"norm {row['grad_norm']:5.2f} {clipped}", f"lr {row['lr']:.1e}", f"{row['seconds']:6.2f} s"]
    shown += [f"{rate:7,.0f} tokens/s"] if rate else []
    shown.append(f"left {clock(left)}")
    if device.type == "cuda":
        shown.append(f"{torch.cuda.max_memory_allocated() / 2**30:.0f} GB")
    shown += [f"{name} {figure(value)}" for name, value in row.items() if name.startswith("held_")]
    return " | ".join(shown)
