"""Ranks, sharding, the training step, exact resume.

    gradient = (1 / count) * sum over the global batch of grad loss
    theta <- AdamW(theta, clip(gradient)), learning rate: warm-up, then a cosine (paper App. C)

Sum locally, count globally, divide once. Every loss returns (sum, count); SFT counts supervised
tokens (by their weight), DPO counts pairs. Counts are added over micro-batches and ranks before the
division. So one rank with two rows, two ranks with one row each, and one rank that accumulates
twice take the same step. (A mean of means would weigh a token by the length of its micro-batch.)

The same command runs as one process on a CPU, on 8 GPUs (torchrun --nproc_per_node 8 sft.py ...)
and on several nodes. A *collective* is a function that every rank must call, or the others wait
for ever.

With several ranks, none holds the whole language model: it is built on the `meta` device and
sharded there, each rank reads the rows of its own shards from the files, and saving gathers one
tensor at a time.

Resume is exact: the plan of all steps is a pure function of the seed, and weights, optimizer and
step are saved together in OUT/state. A run that was killed ends with the weights of a run that was
not; with other ranks or --micro-tokens up to rounding. The last step has a state too: the result is
saved, then stage.json, and only then is the state removed, so that a kill while saving costs no
step.

Where we depart from the paper, or it is silent:
  1. FSDP2 instead of DeepSpeed ZeRO-3: the same sharding of weights, gradients and optimizer.
  2. The frozen vision tower is not sharded: every rank holds it whole, so a rank whose rows have no
     image need not join an exchange for it.
  3. --replicas N keeps N copies, each sharded over its part of the ranks (HSDP).
  4. States are safetensors, one file a shard: torch.distributed.checkpoint's index is a pickle.
  5. Batch 64, warm-up 10 %, weight decay 0, clip 1.0 are LLaMA-Factory's; the paper gives learning
     rates and "cosine".
"""

import argparse
import math
import os
import random
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

import data
import hub
import lora
import memory
import model
from command import flags, stage

# ours: paper silent (LLaMA-Factory's and transformers' defaults)
BETAS, EPS, WEIGHT_DECAY = (0.9, 0.999), 1e-8, 0.0
CLIP = 1.0  # ours: paper silent (transformers' max_grad_norm)
WARMUP = 0.1  # ours: paper silent (LLaMA-Factory's examples); share of the steps
MAX_LENGTH = 8192  # ours: paper silent; tokens of a row, responses included
AHEAD = 2  # ours: micro-batches that are made while another is computed
FILLED = 0.9  # ours: least share of a micro-batch's tokens that is not padding
# ours: the ranks wait while the first hashes or writes a large checkpoint; torch waits 10 minutes
PATIENCE = timedelta(hours=1)
SIGHT = 10  # ours: seconds in which a network disk must show a file that another node wrote
# flags that change speed, memory or what is kept, and results only by rounding
FREE = ("save_every", "print_every", "micro_tokens", "checkpointing", "replicas")


class Refused(flags.UserError):
    """A run that cannot go on."""


# --------------------------------------------------------------------------------------------------
# Ranks


def init_ranks() -> torch.device:
    """This rank's device. Joins the process group of torchrun; without torchrun a GPU makes a group
    of one, and a CPU has none."""
    cuda, device = torch.cuda.is_available(), torch.device("cpu")
    if cuda:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew for every new length
    if dist.is_initialized():
        return device
    if "RANK" in os.environ:
        backend = "nccl" if cuda else "gloo"
        dist.init_process_group(backend, timeout=PATIENCE, device_id=device if cuda else None)
    elif cuda:  # a group of one, for FSDP's mixed precision
        alone = {"store": dist.HashStore(), "rank": 0, "world_size": 1, "device_id": device}
        dist.init_process_group("nccl", **alone)
    return device


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def print0(*words) -> None:
    """Prints on the first rank only."""
    if rank() == 0:
        print(*words, flush=True)


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def leave_group() -> None:
    """Leaves the process group, all ranks together: a rank that leaves while another still
    communicates may abort it. A collective."""
    barrier()
    if dist.is_initialized():
        dist.destroy_process_group()


def refuse(error: Exception | None) -> NoReturn:
    """Ends all ranks with exit code 1; only the first raises the error, so it is printed once. A
    collective."""
    first = rank() == 0
    leave_group()
    raise error if first else SystemExit(1)


def all_reduce(values: Tensor) -> Tensor:
    """Sums a tensor over all ranks. A collective."""
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def all_gather(rows: list) -> list:
    """Every rank's list, joined in rank order, on every rank. A collective."""
    if world_size() == 1:
        return rows
    parts: list = [None] * world_size()
    dist.all_gather_object(parts, rows)
    return [row for part in parts for row in part]


def from_first(make: Callable):
    """What the first rank makes, on every rank. If it raises, all ranks stop. A collective."""
    made, error = None, None
    if rank() == 0:
        try:
            made = make()
        except Exception as raised:  # the others wait below: they are told before it is raised
            error = raised
    ((made, failed),) = all_gather([(made, error is not None)] if rank() == 0 else [])
    if failed:
        refuse(error)
    return made


@contextmanager
def forward_only(policy: nn.Module) -> Iterator[None]:
    """For a forward that no backward follows. In training FSDP keeps the whole weights of the root
    (embedding and head) from forward to backward, so that they are gathered once; here they are
    given back, or the optimizer would get them in place of this rank's shards."""
    with torch.no_grad():
        yield
    if hasattr(policy, "reshard"):
        policy.reshard()


def ahead(items: Iterable, make: Callable) -> Iterator:
    """make(item) of each item in order. A thread makes the next ones while the caller works."""
    thread, made = ThreadPoolExecutor(1), deque()
    try:
        for item in items:
            made.append(thread.submit(make, item))
            if len(made) > AHEAD:
                yield made.popleft().result()
        for one in made:
            yield one.result()
    finally:
        # without waiting: where a run is given up, the garbage collector comes here, and it may
        # do so in a thread that holds the lock which waiting needs
        thread.shutdown(wait=False, cancel_futures=True)


# --------------------------------------------------------------------------------------------------
# Sharding


def build(
    args: argparse.Namespace,
    device: torch.device,
    plan: Sequence[Sequence[int]],
    lengths: Sequence[int],
    images: int,
) -> model.Policy:
    """The policy of a stage: its vision frozen, LoRA injected with --method lora, sharded. plan:
    the rows of every step; lengths: of each row in tokens; images: the most that a row has. A
    collective."""
    policy = hub.meta_policy(args.model)
    policy.freeze_vision()
    if args.method == "lora":
        lora.inject(policy.model, policy.language_model, args.rank, args.alpha, args.seed)
    count = sum(p.numel() for p in trained_parameters(policy).values())
    every = sum(p.numel() for p in policy.parameters())
    print0(f"training {count:,} of {every:,} parameters ({args.method})")
    ranks = world_size()
    used, rows, length = micro_batch_shape(plan, args.micro_tokens, ranks, lengths)
    message = f"batching efficiency on {ranks} ranks {used:.2f}; "
    print0(f"{message}the largest micro-batch has {rows} x {length:,} tokens")
    blocks = len(policy.language_model.layers)
    again = blocks if args.checkpointing == "all" else 0
    if args.checkpointing == "auto" and device.type == "cuda":
        image_bytes = images * memory.image_bytes(policy, args.pixels, args.tiles)
        gpus = max(1, ranks // args.replicas)
        room = memory.USABLE * torch.cuda.get_device_properties(device).total_memory
        load = memory.Load(rows, length, length, image_bytes)  # every token supervised: the most
        fewest = memory.blocks_to_recompute(policy, load, gpus, room)
        again = blocks if fewest is None else fewest
        if fewest is None:
            print0("warning: this may not fit into memory; lower --micro-tokens, or more GPUs")
    print0(f"checkpointing {again} of {blocks} blocks")
    return shard(policy, device, again, args.replicas)


def shard(
    policy: nn.Module, device: torch.device, recomputed: int = 0, replicas: int = 1
) -> nn.Module:
    """Puts a policy on its device and, in a process group, shards it block by block (FSDP2). The
    model is changed from outside: it knows nothing of ranks.

    recomputed   how many blocks compute their activations again in backward
    replicas     copies of the model (HSDP), a divisor of the number of ranks
    On a GPU: bf16 compute, fp32 master weights and gradient sums; on a CPU everything is fp32. A
    collective.
    """
    if world_size() % replicas:
        message = f"--replicas {replicas} does not divide the number of ranks, {world_size()}"
        refuse(Refused(f"{message}; one replica a node is usual"))
    recompute_blocks(policy, recomputed)
    if dist.is_initialized():
        fully_shard_blocks(policy, device, replicas)
    load_weights(policy, device)
    return policy.to(device)  # buffers, and parameters that were not on `meta`


def recompute_blocks(policy: nn.Module, count: int) -> None:
    """The first `count` blocks keep no activations for backward, which computes them again."""
    for layer in policy.language_model.layers[:count]:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)


def load_weights(policy: nn.Module, device: torch.device) -> None:
    """Reads parameters on `meta` from the weight files, each rank the rows of its own shards."""

    def read(name: str, parameter: nn.Parameter) -> Tensor:
        rows = policy.checkpoint.read(lora.plain_name(name), shard_rows(parameter))
        tensor = torch.empty_like(parameter, device=device, requires_grad=False)
        local_tensor(tensor).copy_(rows)
        return tensor

    hub.materialize(policy, read)


def fully_shard_blocks(policy: nn.Module, device: torch.device, replicas: int) -> None:
    """FSDP2 around every block of the language model, and around the whole."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    # torchrun numbers ranks node by node: with a replica a node, the last dimension stays inside it
    shape, names = (world_size(),), None
    if replicas > 1:
        shape, names = (replicas, world_size() // replicas), ("replica", "shard")
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
    cuda = device.type == "cuda"
    precision = MixedPrecisionPolicy()
    if cuda:
        precision = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    # frozen weights (the vision tower and, with LoRA, the base) are stored in bf16, in which they
    # are computed. Buffers, the rotary frequencies, stay in fp32.
    frozen = {parameter for parameter in policy.parameters() if not parameter.requires_grad}
    for parameter in frozen if cuda else ():
        parameter.data = parameter.data.to(torch.bfloat16)
    # ignored by FSDP: every rank holds the frozen tower whole
    towers = frozen & {*policy.vision.parameters(), *policy.projector.parameters()}
    for layer in policy.language_model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=precision)
    root = {"reshard_after_forward": False, "ignored_params": towers}  # see forward_only
    fully_shard(policy, mesh=mesh, mp_policy=precision, **root)


def shard_index(tensor: Tensor) -> tuple[int, int]:
    """(which shard of a tensor this rank holds, how many there are); (0, 1) for a whole tensor."""
    if not isinstance(tensor, DTensor):
        return 0, 1
    mesh = tensor.device_mesh  # (shards,) or (replicas, shards)
    return mesh.get_local_rank(mesh.ndim - 1), mesh.size(mesh.ndim - 1)


def shard_rows(tensor: Tensor) -> slice:
    """The rows of the whole tensor that this rank holds. FSDP cuts the first dimension as
    torch.chunk does: into equal parts, of which the last ones may be smaller or empty."""
    index, count = shard_index(tensor)
    length = math.ceil(len(tensor) / count)
    return slice(min(index * length, len(tensor)), min((index + 1) * length, len(tensor)))


def local_tensor(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def trained_parameters(policy: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in policy.named_parameters() if p.requires_grad}


def gather(parameter: Tensor) -> Tensor:
    """The whole tensor, on the CPU of the first rank; `meta` on the others. A collective."""
    whole = parameter.detach()
    if isinstance(whole, DTensor):
        whole = whole.full_tensor()
    return whole.to("cpu" if rank() == 0 else "meta")


def gather_full(policy: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, whole tensor), one at a time, by Hugging Face module names; a tied weight once. What
    was trained is gathered; what was not, the first rank alone reads from the checkpoint. A
    collective: every rank must iterate to the end."""
    for name, parameter in policy.model.named_parameters():
        if parameter.requires_grad or policy.checkpoint is None:
            yield name, gather(parameter)
        elif rank() == 0:
            yield name, policy.checkpoint.read(lora.plain_name(name)).float()


# --------------------------------------------------------------------------------------------------
# Order and schedule: pure functions


def order(rows: int, seed: int, epoch: int) -> list[int]:
    """The order of rows in an epoch. It depends on nothing else, so a resumed run has it too."""
    indices = list(range(rows))
    random.Random(data.sample_seed(seed, "order", epoch)).shuffle(indices)
    return indices


def shuffled(rows: int, batch: int, epochs: float, seed: int) -> list[list[int]]:
    """The rows of every step. Each epoch has every row once, in an order of its own; its last batch
    may be smaller. The last epoch may be a part of one."""
    per_epoch = math.ceil(rows / batch)
    places = [divmod(step, per_epoch) for step in range(math.ceil(round(epochs * per_epoch, 6)))]
    orders = [order(rows, seed, epoch) for epoch in range(math.ceil(epochs))]
    return [orders[epoch][at * batch : (at + 1) * batch] for epoch, at in places]


MicroBatch = list[tuple[int, float]]  # (row index, weight)


def deal_rows(
    indices: list[int], budget: int, ranks: int, lengths: Sequence[int] | None = None
) -> list[list[MicroBatch]]:
    """[rank][number]: every rank's micro-batches of a step.

    Rows are dealt to the ranks in rounds, the longest first, so that the rows of a round are of
    like length (the ranks wait for one another); every other round goes backwards. All ranks get
    equally many: the last round is filled up with the shortest row at weight 0. A micro-batch takes
    the next round if it then has at most `budget` tokens on a rank, padding included, and at least
    FILLED of them are not padding; a row over `budget` is alone. Without lengths the order stays,
    and a row counts 1."""
    size = lengths or dict.fromkeys(indices, 1)
    if lengths:
        indices = sorted(indices, key=lambda index: (-lengths[index], index))
    rows = [(index, 1.0) for index in indices]
    rows += [(index, 0.0) for index in indices[-1:]] * (-len(indices) % ranks)
    rounds = [rows[at : at + ranks] for at in range(0, len(rows), ranks)]
    dealt: list[list[MicroBatch]] = [[] for _ in range(ranks)]
    held: list[int] = []  # the longest row of each round of the micro-batch, the longest first
    for number, part in enumerate(rounds):
        longest = size[part[0][0]]
        padded = (len(held) + 1) * (held or [longest])[0]
        fits = bool(held) and padded <= budget and sum(held) + longest >= FILLED * padded
        held = [*held, longest] if fits else [longest]
        for own, row in zip(dealt, part[::-1] if number % 2 else part):
            own[-1].append(row) if fits else own.append([row])
    return dealt


def micro_batch_shape(
    plan: Sequence[Sequence[int]], budget: int, ranks: int, lengths: Sequence[int]
) -> tuple[float, int, int]:
    """(efficiency, rows of the largest micro-batch, tokens of its longest row). Efficiency: the
    share of the ranks' work that is tokens of rows, neither padding nor waiting for another rank,
    if time is proportional to tokens."""
    shapes = []  # (rows, tokens of the longest) of the micro-batches that run at the same time
    for step in plan:
        for parts in zip(*deal_rows(step, budget, ranks, lengths)):
            longest = max(lengths[index] for part in parts for index, _ in part)
            shapes.append((len(parts[0]), longest))
    tokens = sum(lengths[index] for step in plan for index in step)
    return tokens / (ranks * sum(map(math.prod, shapes))), *max(shapes, key=math.prod)


def learning_rate(step: int, steps: int, peak: float, warmup: float) -> float:
    """Linear warm-up over the first `warmup` share of steps, then half a cosine down to zero."""
    rise = max(1, round(warmup * steps))
    if step < rise:
        return peak * (step + 1) / rise
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


# --------------------------------------------------------------------------------------------------
# The loop


class Run:
    """The steps of a training run, whose loop stands in the stage:

        for step in run:                        # a resumed run begins where it stopped
            for batch in run.micro_batches():   # this rank's part of the step
                run.backward(*loss_of(policy(batch), batch))
            run.update()

    After the loop's body the step is written: a row of out/metrics.jsonl (whose "step" counts from
    0, the printed one from 1), a line every `print_every` steps, and every `save_every` a state in
    out/state. The loop may add to `run.figures` after `update`. The iteration, `backward` and
    `update` are collectives.

    plan          the rows of every step; it fixes the number of steps, and so the cosine
    make_batch    (rows, their weights) -> a batch on the device; it runs in a thread, a few
                  micro-batches ahead. A row of weight 0 only keeps its rank in step with the others
    peak, warmup  of learning_rate
    budget        of a micro-batch, in tokens; in rows if `lengths` is not given
    save_every    steps between states; the last step has one too. 0 keeps none.
    lengths       the rows' tokens: rows are dealt to the ranks by them; they give the tokens/s
    """

    def __init__(
        self,
        policy: nn.Module,
        plan: Sequence[Sequence[int]],
        make_batch: Callable[[list[int], list[float]], object],
        *,
        out: Path,
        device: torch.device,
        peak: float,
        budget: int,
        save_every: int,
        lengths: Sequence[int] | None = None,
        warmup: float = WARMUP,
        print_every: int = 1,
        betas: tuple[float, float] = BETAS,
        weight_decay: float = WEIGHT_DECAY,
    ):
        self.policy, self.plan, self.make_batch = policy, plan, make_batch
        self.out, self.device, self.peak, self.warmup = out, device, peak, warmup
        self.lengths, self.save_every, self.print_every = lengths, save_every, print_every
        self.dealt = [deal_rows(step, budget, world_size(), lengths)[rank()] for step in plan]
        self.parameters = list(trained_parameters(policy).values())
        settings = {"betas": betas, "eps": EPS, "weight_decay": weight_decay, "fused": True}
        self.optimizer = torch.optim.AdamW(self.parameters, lr=peak, **settings)
        out.mkdir(parents=True, exist_ok=True)
        self.begin = load_state(out / "state", policy, self.optimizer)
        if self.begin:
            print0(f"resumed at step {self.begin} of {len(plan)} from {out / 'state'}")
        self.log = out / "metrics.jsonl"
        if rank() == 0:  # the steps from `begin` on are taken again
            history = [row for row in data.resume_jsonl(self.log) if row["step"] < self.begin]
            data.write_jsonl(self.log, history)

    def __iter__(self) -> Iterator[int]:
        begun = time.time()
        parts = (part for step in self.dealt[self.begin :] for part in step)
        self.batches = ahead(parts, lambda part: self.make_batch(*map(list, zip(*part))))
        with open(self.log, "a", encoding="utf-8") if rank() == 0 else nullcontext() as log:
            for step in range(self.begin, len(self.plan)):
                self.step, self.started = step, time.time()
                self.sums: dict[str, Tensor] = {}
                yield step
                if rank() == 0:
                    data.append_jsonl(log, [self.figures])
                done = step + 1
                if done % self.print_every == 0 or done == len(self.plan):
                    pace = (self.ended - begun) / (done - self.begin)
                    print0(self.status_line(pace * (len(self.plan) - done)))
                if self.save_every and (done % self.save_every == 0 or done == len(self.plan)):
                    save_state(self.out / "state", self.policy, self.optimizer, done)

    def micro_batches(self) -> Iterator:
        """This rank's batches of the step."""
        for _ in self.dealt[self.step]:
            yield next(self.batches)

    def backward(self, loss: Tensor, count: Tensor, figures: dict[str, tuple]) -> None:
        """Adds a micro-batch's gradient to the step's. loss: a sum over `count` tokens or pairs,
        never a mean; figures: {name: (sum, count)}. Nothing is read from the device here."""
        (loss * world_size()).backward()  # FSDP averages gradients over the ranks
        for name, pair in {"loss": (loss.detach(), count), **figures}.items():
            pair = [torch.as_tensor(x, dtype=torch.float64, device=self.device) for x in pair]
            self.sums[name] = self.sums.get(name, 0.0) + torch.stack(pair)

    def update(self) -> None:
        """The step itself: divides the gradients' sums by the global count, once; clips; moves the
        weights. The device is read once. If loss or norm are not finite, the run ends before the
        weights move. A collective."""
        sums = all_reduce(torch.stack([*self.sums.values()]))  # (figures, 2), the loss first
        for parameter in self.parameters:
            if parameter.grad is not None:
                local_tensor(parameter.grad).div_(sums[0, 1])
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, CLIP)
        norm = (norm.full_tensor() if isinstance(norm, DTensor) else norm).double()
        *read, norm = torch.cat([sums.flatten(), norm[None]]).tolist()
        means = [x / max(y, 1e-12) for x, y in zip(read[::2], read[1::2])]
        if not (math.isfinite(means[0]) and math.isfinite(norm)):
            message = f"step {self.step + 1}: the loss is {means[0]}, the gradient's norm {norm}"
            refuse(Refused(f"{message}; the weights are still those after {self.step} steps"))
        now = learning_rate(self.step, len(self.plan), self.peak, self.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = now
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.ended = time.time()
        seconds = round(self.ended - self.started, 3)
        self.figures = {"step": self.step}
        self.figures |= {name: round(mean, 6) for name, mean in zip(self.sums, means)}
        self.figures |= {"lr": now, "grad_norm": round(norm, 4), "seconds": seconds}

    def status_line(self, left: float) -> str:
        """Every figure of the step in its own column, line under line. left: seconds to the end.

        step 0040/0139 | left 0:05:17 |   5,120 tokens/s | loss    0.6124 | ... | seconds     3.201
        """
        shown = [f"step {self.step + 1:04d}/{len(self.plan):04d}"]
        shown.append(f"left {timedelta(seconds=round(left))}")
        if self.lengths:
            tokens = sum(self.lengths[index] for index in self.plan[self.step])
            shown.append(f"{tokens / max(self.figures['seconds'], 1e-3):7,.0f} tokens/s")
        if self.device.type == "cuda":
            shown.append(f"{torch.cuda.max_memory_allocated() / 2**30:.0f} GB")
        figures = [f"{name} {x:9.4g}" for name, x in self.figures.items() if name != "step"]
        return " | ".join(shown + figures)


# --------------------------------------------------------------------------------------------------
# The state of a run: safetensors, one file a shard

MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's, by torch's names


def save_state(
    folder: Path, policy: nn.Module, optimizer: torch.optim.Optimizer, step: int
) -> None:
    """Writes the trained weights and AdamW's moments beside the older state, then makes it the one
    to resume from: a kill at any moment leaves one whole state or the other. A collective."""
    from safetensors.torch import save_file

    making = folder / f"step_{step:06d}.tmp"
    if rank() == 0:
        shutil.rmtree(making, ignore_errors=True)
        making.mkdir(parents=True)
    barrier()
    tensors, shards = {}, 1
    for name, parameter in trained_parameters(policy).items():
        _, shards = shard_index(parameter)
        moments = {kind: optimizer.state[parameter][kind] for kind in MOMENTS}
        for kind, tensor in {"weight": parameter, **moments}.items():
            tensors[f"{name}|{kind}"] = local_tensor(tensor).detach().cpu().contiguous()
    if rank() < shards:  # the ranks of the first replica; the other replicas hold the same
        about = {"step": str(step), "shards": str(shards)}
        save_file(tensors, making / f"rank_{rank():05d}.safetensors", metadata=about)
    barrier()
    if rank() == 0:
        os.replace(making, folder / f"step_{step:06d}")
        for older in folder.glob("step_*"):
            if older.name != f"step_{step:06d}":
                shutil.rmtree(older)
    barrier()


def load_state(folder: Path, policy: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Puts the newest whole state back and returns its step, or 0 if there is none. The number of
    ranks and of replicas may have changed: a sharded tensor is the files' parts one after another,
    and each rank reads from them the rows that are now its own."""
    from safetensors import safe_open

    states = sorted(folder.glob("step_" + "[0-9]" * 6))
    if not states:
        return 0
    files = []
    for path in sorted(states[-1].glob("rank_*.safetensors")):
        with model.reading(path):
            files.append(safe_open(path, framework="pt"))
    shards = int(files[0].metadata()["shards"]) if files else 1
    if len(files) != shards:
        there = f"{len(files)} of {shards} rank files"
        refuse(Refused(f"{states[-1]}: {there}; move the folder away to start again"))
    step = int(files[0].metadata()["step"])
    for name, parameter in trained_parameters(policy).items():
        moments = {kind: torch.zeros_like(parameter) for kind in MOMENTS}
        for kind, tensor in {"weight": parameter, **moments}.items():
            parts = [file.get_slice(f"{name}|{kind}") for file in files]
            copy_rows(parts, local_tensor(tensor.detach()), shard_rows(parameter))
        # a tensor on the device, where the fused kernel reads it
        moments["step"] = torch.tensor(float(step), device=parameter.device)
        optimizer.state[parameter] = moments
    return step


def copy_rows(parts: list, target: Tensor, rows: slice) -> None:
    """Copies those rows of the tensor that `parts`, one after another, make up."""
    at = 0  # the first row of the part
    for part in parts:
        end = at + part.get_shape()[0]
        first, last = max(at, rows.start), min(end, rows.stop)
        if first < last:
            target[first - rows.start : last - rows.start].copy_(part[first - at : last - at])
        at = end


# --------------------------------------------------------------------------------------------------
# How a stage begins and ends


def add_flags(parser: argparse.ArgumentParser, row: str) -> None:
    """The flags that both stages have. row: what a row of the batch is called."""
    add = parser.add_argument
    add("--rank", type=flags.RANK, default=lora.RANK)
    add("--alpha", type=flags.ALPHA, default=lora.ALPHA)
    # ours: paper silent (LLaMA-Factory example)
    add("--batch", type=flags.whole(1), default=64, help=f"{row} a step, over all ranks")
    about = f"in tokens; longer {row} are dropped and counted"
    add("--max-length", type=flags.whole(1), default=MAX_LENGTH, help=about)
    about = "tokens at once on one rank, padding included; a longer row is alone; 0: --max-length"
    add("--micro-tokens", type=flags.whole(0), default=0, help=about)
    add("--pixels", type=flags.PIXELS, default=model.MAX_PIXELS, help="most of an image, Qwen")
    add("--tiles", type=flags.TILES, default=model.TILES, help="most of an image, InternVL")
    about = "blocks recomputed in backward: less memory, more time; auto: as few as memory allows"
    add("--checkpointing", choices=["auto", "all", "none"], default="auto", help=about)
    about = (
        "copies of the model, each sharded over its part of the ranks: the number of nodes, or 1"
    )
    add("--replicas", type=flags.whole(1), default=1, help=about)
    add("--save-every", type=flags.whole(0), default=50, help="steps between states; 0: no states")
    about = "numbers of OUT/merged; auto: as the weight files of --model have them"
    add("--save-dtype", choices=["auto", "float32"], default="auto", help=about)
    add("--seed", type=flags.SEED, default=0)


def begin(args: argparse.Namespace, inputs: list[str | Path], images: Iterable[Path] = ()) -> bool:
    """stage.open_folder, by the first rank for all of them. If OUT is finished it does what `end`
    does, and returns False. All ranks stop if the first one raises, or if one of them does not see
    what the first one wrote. A collective."""
    path = Path(args.out) / "begun.json"
    if not from_first(lambda: stage.open_folder(args, inputs, FREE, images)):
        end(path.parent)
        return False
    begun = from_first(path.read_bytes)
    blind = all_gather([] if sees(path, begun) else [str(rank())])
    if blind:
        seen = f"rank {', '.join(blind)} cannot see what rank 0 wrote there"
        wanted = "OUT must lie on a disk that all nodes share"
        refuse(Refused(f"--out {args.out}: {seen}; {wanted}"))
    return True


def sees(path: Path, content: bytes) -> bool:
    """Whether this rank sees a file with this content within SIGHT seconds."""
    for _ in range(10 * SIGHT):
        with suppress(OSError):  # it is not there yet, or is replaced while it is read
            if path.read_bytes() == content:
                return True
        time.sleep(0.1)
    return False


def save(args: argparse.Namespace, policy: model.Policy, processor: model.Processor) -> dict:
    """OUT/merged, and OUT/adapter with LoRA. Tensors are gathered, merged and written one by one:
    no rank holds the whole model. Returns hub.Rounding's figures on rank 0. A collective."""
    out, tensors, matrices = Path(args.out), gather_full(policy), {}
    if args.method == "lora":  # all that was trained: A and B of each linear map
        trained = trained_parameters(policy.model).items()
        matrices = {name: gather(parameter) for name, parameter in trained}
    if rank() > 0:
        for _ in tensors:  # the other ranks give their shards
            pass
        return {}
    if matrices:
        lora.save_adapter(out / "adapter", matrices, args.rank, args.alpha, args.model)
        tensors = lora.merge_state(tensors, args.alpha / args.rank)
    dtype = policy.checkpoint.dtype if args.save_dtype == "auto" else torch.float32
    figures = hub.save_policy(out / "merged", policy, processor, tensors, dtype=dtype)
    message = f"{figures['weights_changed']:.2%} of the trained weights differ from the start's"
    print0(
        f"saved in {dtype}: {message}; rounding lost {figures['rounding_lost']:.2%} of the change"
    )
    return figures


def end(out: Path) -> None:
    """Removes the states of a finished run; then every rank leaves the group. A collective."""
    barrier()
    if rank() == 0:
        shutil.rmtree(out / "state", ignore_errors=True)
    leave_group()


def summary(title: str, history: list[dict], names: Sequence[str], lines: dict[str, str]) -> None:
    """What a stage prints at its end. names: the figures whose first and last value it shows."""
    first, last = history[0], history[-1]
    spent = timedelta(seconds=round(sum(row["seconds"] for row in history)))
    moved = ", ".join(f"{name} {first[name]:.3f} -> {last[name]:.3f}" for name in names)
    print0(f"\n{title}")
    lines = {"training": f"{len(history):,} steps in {spent}", "loss": moved} | lines
    for name, text in lines.items():
        print0(f"  {name:<12}{text}")
