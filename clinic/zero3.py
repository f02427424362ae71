"""Fully sharded data parallelism (ZeRO-3) by hand, for a reader who wants to see it.

Training P weights with AdamW in fp32 takes 16 P bytes: 4 for a weight, 4 for its gradient, 8 for
its two moments. Each of N ranks holds one Nth of each, its shard; only one block is ever whole,
while it is needed. A step has four phases, here of one block on two ranks:

               rank 0                     rank 1
    at rest    w0 g0 m0 v0                w1 g1 m1 v1              flat, padded to a multiple of N
    1 GATHER   w0 w1                      w0 w1                    all-gather: the whole weights
    2 COMPUTE  a0 a1                      b0 b1                    gradient, of a rank's own rows
    3 SCATTER  g0 = (a0 + b0) / count     g1 = (a1 + b1) / count   reduce-scatter: sum, then shards
    4 STEP     w0 m0 v0 <- AdamW(g0)      w1 m1 v1 <- AdamW(g1)    nothing is sent

A step gathers and computes block by block forwards; then it gathers, computes and scatters block
by block backwards; then it steps. `count` is the number of outputs of all ranks' rows: sum locally,
divide once.

    held by a rank            (4 + 4 + 8) P / N, and of one block its whole weights and gradient
    sent by a rank, per step  3 * 4 P (N - 1) / N: gather, gather again, scatter (beside them, loss
                              and count: one all-reduce of 8 bytes)

    torchrun --nproc_per_node 2 -m clinic.zero3      or alone: python -m clinic.zero3

Where we depart from the paper, or it is silent: the paper trains with DeepSpeed ZeRO-3; train.py
uses PyTorch's own FSDP2. This file is for reading only; no other script imports it.
"""

import os

import torch
import torch.distributed as dist
from torch import nn
from torch.func import functional_call

DEPTH, WIDTH, OUTPUTS, ROWS, STEPS, LR = 4, 32, 3, 3, 5, 1e-3  # 3 rows: uneven on 2 ranks


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        up, down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.LayerNorm(WIDTH), up, nn.GELU(), down)

    def forward(self, x):
        return x + self.mlp(x)


def build(index: int) -> nn.Module:
    """Block `index` of the model, the same on every rank; the last one is the head."""
    torch.manual_seed(index)
    return Block() if index < DEPTH else nn.Linear(WIDTH, OUTPUTS)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(0))
    return x, torch.sin(3 * x[:, :OUTPUTS])


class Ring:
    """Each rank sends to the next and receives from the one before. torch.distributed has both
    collectives ready; written out, what is sent can be counted (gloo's own reduce-scatter is an
    all-reduce, which sends twice the bytes)."""

    def __init__(self):
        self.rank, self.world_size, self.sent = dist.get_rank(), dist.get_world_size(), 0

    def pass_on(self, piece: torch.Tensor) -> torch.Tensor:
        received = torch.empty_like(piece)
        sending = dist.isend(piece, (self.rank + 1) % self.world_size)
        dist.recv(received, (self.rank - 1) % self.world_size)
        sending.wait()
        self.sent += piece.nbytes
        return received

    def all_gather(self, shard: torch.Tensor) -> torch.Tensor:
        """All ranks' shards, in rank order. What a rank received last, it passes on next."""
        shards = shard.new_empty(self.world_size, len(shard))
        shards[self.rank] = shard
        for r in range(self.rank, self.rank - self.world_size + 1, -1):
            shards[(r - 1) % self.world_size] = self.pass_on(shards[r % self.world_size])
        return shards.flatten()

    def reduce_scatter(self, whole: torch.Tensor) -> torch.Tensor:
        """This rank's shard of the sum over ranks. The sum of shard r sets out from rank r + 1,
        grows by each rank's own part on its way, and ends at rank r. Overwrites `whole`."""
        parts = whole.view(self.world_size, -1)
        for r in range(self.rank - 1, self.rank - self.world_size, -1):
            parts[(r - 1) % self.world_size] += self.pass_on(parts[r % self.world_size])
        return parts[self.rank].clone()  # a view would keep the whole alive


def flatten(tensors: list[torch.Tensor], multiple: int) -> torch.Tensor:
    padding = -sum(tensor.numel() for tensor in tensors) % multiple
    return torch.cat([*(tensor.flatten() for tensor in tensors), tensors[0].new_zeros(padding)])


class Sharded:
    """A block of which this rank holds only its shard."""

    def __init__(self, module: nn.Module, ring: Ring):
        whole = flatten([p.detach() for p in module.parameters()], ring.world_size)
        self.shard = nn.Parameter(whole.chunk(ring.world_size)[ring.rank].clone())
        self.module = module.to("meta")  # names and shapes remain, the whole weights are freed
        self.ring = ring

    def gather(self) -> dict[str, torch.Tensor]:
        """The block's whole weights by name: views of one tensor, which lives as long as they."""
        whole, at, weights = self.ring.all_gather(self.shard.detach()), 0, {}
        for name, p in self.module.named_parameters():
            weights[name] = whole[at : at + p.numel()].view(p.shape).requires_grad_()
            at += p.numel()
        return weights


@torch.no_grad()
def take_step(blocks: list[Sharded], optimizer, ring: Ring, x, y) -> torch.Tensor:
    """One step on this rank's rows; the mean loss over all ranks' rows."""
    inputs = [x]  # of each block, for backward; what lies inside a block is computed again there
    for block in blocks:
        whole = block.gather()  # 1 GATHER
        inputs.append(functional_call(block.module, whole, (inputs[-1],)))  # 2 COMPUTE
        del whole  # freed, before the next block is gathered
    error = inputs.pop() - y
    totals = torch.tensor([error.square().sum(), error.numel()])
    dist.all_reduce(totals)
    loss, count = totals
    upstream = 2 * error  # the gradient of a sum of squares; it is divided after it is summed
    for block in reversed(blocks):
        whole, inside = block.gather(), inputs.pop().detach().requires_grad_()  # 1 GATHER, again
        with torch.enable_grad():  # 2 COMPUTE
            out = functional_call(block.module, whole, (inside,))
        upstream, *gradients = torch.autograd.grad(out, [inside, *whole.values()], upstream)
        del whole, out  # freed, before the gradients are copied into one tensor
        gradient = flatten(gradients, ring.world_size)
        del gradients
        block.shard.grad = ring.reduce_scatter(gradient).div_(count)  # 3 SCATTER
        del gradient
    optimizer.step()  # 4 STEP: AdamW knows of shards alone
    return loss / count


def train(ring: Ring, steps: int) -> tuple[list[Sharded], torch.optim.Optimizer]:
    blocks = [Sharded(build(index), ring) for index in range(DEPTH + 1)]  # one whole at a time
    optimizer = torch.optim.AdamW([block.shard for block in blocks], lr=LR)
    x, y = (rows[ring.rank :: ring.world_size] for rows in batch())  # a rank may have no rows
    for step in range(steps):
        loss = take_step(blocks, optimizer, ring, x, y)
        if ring.rank == 0:
            print(f"step {step}: loss {loss:.6f}")
    return blocks, optimizer


def report(ring: Ring, blocks: list[Sharded], optimizer: torch.optim.Optimizer, steps: int):
    """What is counted on rank 0, beside the formulas. P includes the padding."""
    shards, n = [block.shard for block in blocks], ring.world_size
    kinds = [shards, [shard.grad for shard in shards]]
    kinds += [[optimizer.state[s][name] for s in shards] for name in ("exp_avg", "exp_avg_sq")]
    w, g, m, v = (sum(tensor.nbytes for tensor in kind) for kind in kinds)
    p = n * sum(shard.numel() for shard in shards)
    if ring.rank == 0:
        print(f"P = {p} weights with padding, N = {n}; bytes on each rank:")
        print(f"held  {w} weights + {g} gradients + {m + v} moments = {w + g + m + v}")
        print(f"      by formula: (4 + 4 + 8) P / N = {16 * p // n}")
        print(f"sent  {ring.sent // steps} per step")
        print(f"      by formula: 3 * 4 P (N - 1) / N = {12 * p * (n - 1) // n}")


def begin() -> Ring:
    alone = {} if "RANK" in os.environ else dict(store=dist.HashStore(), rank=0, world_size=1)
    dist.init_process_group("gloo", **alone)
    return Ring()


if __name__ == "__main__":
    ring = begin()
    report(ring, *train(ring, STEPS), STEPS)
    dist.barrier()  # no rank leaves while another still receives
    dist.destroy_process_group()
