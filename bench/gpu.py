"""What a real GPU says of this code: which kernels run, what a pair costs, what agrees.

    python bench/gpu.py                     one GPU of 80 GB, a few minutes, no network
    python bench/gpu.py --only block pair
    python bench/gpu.py --cpu               the same code at tiny shapes in fp32: a dry run

The models are Qwen2.5-VL of the 7B's shapes with random weights and few blocks, made as the stages
make them (train.shard: FSDP2 in a group of one, bf16 compute, fp32 master weights, AdamW). A block
costs the difference between two depths; what is told of 28 blocks is extrapolated from it, and
leaves the optimizer's step out. The host launches kernels hardly faster than the GPU runs them (150
ms of launches to 199 ms of kernels at six blocks): on a host that is busy with other things a block
took 23 ms instead of 17. `repeat` and `padded` alone have all 28 blocks, forward only.
`step` and `stages` are about the mechanics, so their models are small.

A line is PASS, FAIL or info, a check, the seconds that it took, and its figures with the limit.
PASS and FAIL are against a limit, info has none. On a CPU times and memory are info. A check that
raises is a FAIL, and the next goes on; any FAIL makes the exit code 1.
"""

import argparse
import contextlib
import gc
import io
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import attention  # noqa: E402
import data  # noqa: E402
import dpo  # noqa: E402
import hub  # noqa: E402
import memory as plan  # noqa: E402
import model  # noqa: E402
import reference  # noqa: E402
import train  # noqa: E402
import trees  # noqa: E402
from clinic import roles, school, world  # noqa: E402
from command import schema  # noqa: E402

PEAK_SPEED = 989e12  # dense bf16 of an H100 or H200 SXM, by NVIDIA's data sheet
LEARNING_RATE = 1e-4  # ours: high enough for three steps to show, low enough for random weights
GIB = 2**30
Result = tuple[bool | None, str]  # (whether the limit holds, or None for info; the figures)


@dataclass(frozen=True)
class Work:
    """What is measured: a model's shapes, and tokens of prompts and chains."""

    size: plan.Size
    depths: tuple[int, int]  # blocks of the two models whose difference is the blocks' cost
    planned: int  # blocks of the model whose memory is compared with the plan
    prompt: int
    chain: int
    grid: int  # merged patches on an image's side: 27 are 756 of its 768 pixels
    long: int  # tokens of the row whose memory is measured
    questions: tuple[tuple[int, int], ...]  # tokens of the prompt and of each of six chains


SEVEN = plan.SHAPES["qwen2.5-vl-7b"]
TINY = plan.Size("qwen2_5_vl", 64, 2, 4, 2, 128, 512, (2, 32, 2, 64), (112, (1,)))
SMALL = Work(TINY, (1, 2), 2, 24, 16, 4, 96, ((16, 12), (24, 16)))
REAL = Work(SEVEN, (2, 6), 4, 1024, 1536, 27, 8192, ((512, 384), (1024, 1536)))


@dataclass(frozen=True)
class Bench:
    """A device, the models and rows that are measured there, and how."""

    device: torch.device
    work: Work

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.cuda else torch.float32

    def on_gpu(self, holds: bool) -> bool | None:
        """The result of a limit that only a GPU can be held to."""
        return holds if self.cuda else None

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def timed(self, call: Callable, *given) -> tuple[float, object]:
        """(milliseconds of one call, what it returned)."""
        self.wait()
        begun = time.perf_counter()
        returned = call(*given)
        self.wait()
        return 1e3 * (time.perf_counter() - begun), returned

    def milliseconds(self, call: Callable, *given, runs: int = 5) -> float:
        """The median of some calls, after two that are not timed."""
        return statistics.median([self.timed(call, *given)[0] for _ in range(2 + runs)][2:])

    def free(self) -> None:
        """Gives the memory of what is no longer used back, and forgets the peak."""
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak(self) -> float:
        """GiB that torch's tensors held at most since `free`; 0 on a CPU, where it is not known."""
        return torch.cuda.max_memory_allocated() / GIB if self.cuda else 0.0

    def foreign(self) -> float:
        """MiB of the GPU that are in use, but not by torch's allocator."""
        if not self.cuda:
            return 0.0
        free, total = torch.cuda.mem_get_info()
        return (total - free - torch.cuda.memory_reserved()) / 2**20

    def config(self, blocks: int):
        config = plan.config_of(replace(self.work.size, layers=blocks))
        config.image_token_id = self.work.size.vocabulary - 1  # ours: random ids never are this one
        return config

    def plain_policy(self, blocks: int, method: str = "full", seed: int = 0) -> model.Policy:
        """Random weights in fp32 on the device, vision frozen, not sharded."""
        torch.manual_seed(seed)
        return plan.policy_of(self.config(blocks), method, device=self.device)

    def policy(self, blocks: int, seed: int = 0) -> model.Policy:
        """As the stages train it, with checkpointing."""
        return train.shard(self.plain_policy(blocks, seed=seed), self.device, blocks)

    def tree(self, prompt: int, *chains: int, image: bool = False) -> trees.Encoded:
        """A tree of random tokens with 0 as reference. Each chain of the first half is preferred to
        each of the second; the prompt may begin with an image."""
        generator, images = torch.Generator().manual_seed(prompt), []
        image_token, side = self.work.size.vocabulary - 1, self.work.grid

        def tokens(count: int) -> list[int]:
            return torch.randint(image_token, (count,), generator=generator).tolist()

        ids = tokens(prompt)
        if image:
            ids[: side**2] = [image_token] * side**2
            pixels = torch.randn(4 * side**2, 1176, generator=generator)
            images.append(model.ImageInput(pixels, (1, side, side), side**2))
        row = [model.Segment(ids, [data.PROMPT] * prompt, images=images)]
        for answer, count in enumerate(chains, 1):
            row.append(model.Segment(tokens(count), [data.TAG] * count, 0, answer))
        half, every = len(chains) // 2, range(len(chains))
        return row, [0.0] * len(chains), list(product(every[:half], every[half:]))

    def batch(self, *rows: trees.Encoded) -> model.Batch:
        size = self.work.size
        processor = SimpleNamespace(
            image_id=size.vocabulary - 1, family=model.FAMILIES[size.family]
        )
        return trees.collate_trees(rows, [1.0] * len(rows), processor).to(self.device)


def micro_batches(policy: model.Policy, batches: list[model.Batch]) -> None:
    """Stage II's forward and backward of each batch, as dpo.main has it; their gradients' sum."""
    policy.zero_grad(set_to_none=True)
    for batch in batches:
        loss, _, _ = dpo.pair_loss(policy(batch), batch, dpo.BETA)
        loss.backward()
        loss.item()  # the stage reads it too


def of_all_blocks(work: Work, few, more) -> tuple:
    """(a block's, what is beside the blocks, all blocks and that) from the two depths' figures, of
    numbers or arrays."""
    block = (more - few) / (work.depths[1] - work.depths[0])
    beside = few - work.depths[0] * block
    return block, beside, beside + SEVEN.layers * block


# --------------------------------------------------------------------------------------------------
# Attention


def attend(bench: Bench, length: int) -> tuple[Tensor, list[Tensor]]:
    """(output of a plain chain, its query, key and value)."""
    size = bench.work.size
    settings = {"device": bench.device, "dtype": bench.dtype, "requires_grad": True}
    inputs = [
        torch.randn(1, heads, length, size.width // size.heads, **settings)
        for heads in (size.heads, size.kv_heads, size.kv_heads)
    ]
    return attention.tree_attention(None, *inputs, None, tree=[[(0, length, ())]])[0], inputs


def kernel(bench: Bench) -> Result:
    _, inputs = attend(bench, bench.work.chain)
    chosen = torch._fused_sdp_choice(*inputs, is_causal=True, enable_gqa=True)
    names = {0: "math", 1: "flash", 2: "efficient", 3: "cuDNN"}
    return bench.on_gpu(chosen == 1), f"{names.get(chosen, chosen)} attention (limit: flash)"


def extra(bench: Bench, first: int) -> tuple[float, float]:
    """Milliseconds, forward and backward, by which a length's first call is slower than its
    second: medians of eight lengths, after two that are not counted."""
    apart = []
    for length in range(first, first + 10):
        calls = []
        for _ in range(2):
            forward, (out, inputs) = bench.timed(attend, bench, length)
            backward, _ = bench.timed(torch.autograd.grad, out, inputs, torch.ones_like(out))
            calls.append((forward, backward))
        apart.append(np.subtract(*calls))
    forward, backward = np.median(apart[2:], axis=0)
    return forward, backward


def new_length(bench: Bench) -> Result:
    torch.empty(GIB if bench.cuda else 1, device=bench.device)  # room: cudaMalloc is not the point
    own = extra(bench, bench.work.chain + 1)
    with ThreadPoolExecutor(1) as thread:
        fresh = thread.submit(extra, bench, bench.work.chain + 21).result()
    said = "new length costs {:.2f} + {:.2f} ms, on a fresh thread {:.2f} + {:.2f} (limit 2)"
    return bench.on_gpu(max(*own, *fresh) < 2), said.format(*own, *fresh)


def cudnn(bench: Bench) -> Result:
    """What train.init_ranks spares us. It is the last check: these kernels have crashed before."""
    torch.backends.cuda.enable_cudnn_sdp(True)
    try:
        forward, backward = extra(bench, bench.work.chain + 41)
    finally:
        torch.backends.cuda.enable_cudnn_sdp(False)
    return None, f"with cuDNN's attention a new length costs {forward:.1f} + {backward:.1f} ms"


def text_batches(bench: Bench, first: int, count: int) -> list[model.Batch]:
    """Pairs, each of other lengths, from the longest on."""
    longest, prompt = bench.work.chain - first, bench.work.prompt
    chosen = range(longest, longest - 2 * count, -2)
    return [bench.batch(bench.tree(prompt, length, length - 1)) for length in chosen]


def outside(bench: Bench) -> Result:
    policy, many = bench.policy(bench.work.depths[0]), 20 if bench.cuda else 3
    batches = text_batches(bench, 0, many + 2)
    micro_batches(policy, batches[:2])
    before = bench.foreign()
    micro_batches(policy, batches[2:])
    grown = bench.foreign() - before
    said = f"{grown:.0f} MiB outside torch's allocator after {many} new lengths (limit 100)"
    return bench.on_gpu(grown < 100), f"{said}, {before:.0f} before"


def fresh_lengths(bench: Bench) -> Result:
    policy, many = bench.policy(bench.work.depths[0]), 12 if bench.cuda else 3
    longest, *batches = text_batches(bench, bench.work.chain // 2, many + 1)
    micro_batches(policy, [longest] * 3)
    fresh, seen = (bench.timed(micro_batches, policy, batches)[0] for _ in range(2))
    said = f"{fresh / seen:.3f} of the time of lengths seen (limit 1.1)"
    return bench.on_gpu(fresh / seen < 1.1), f"{said}, at {bench.work.depths[0]} blocks"


# --------------------------------------------------------------------------------------------------
# Speed


def operations(size: plan.Size, prompt: int, *chains: int) -> tuple[float, float]:
    """Floating-point operations that training needs on a tree, forward and backward, without the
    recompute and the frozen tower: of all blocks, and of the head."""
    narrow = size.width * size.kv_heads // size.heads
    weights = size.width * (2 * size.width + 2 * narrow + 3 * size.feed_forward)
    seen = prompt**2 / 2 + sum(chain * prompt + chain**2 / 2 for chain in chains)
    inside = size.layers * (6 * weights * (prompt + sum(chains)) + 12 * size.width * seen)
    return inside, 6.0 * size.width * size.vocabulary * sum(chains)


def product_speed(bench: Bench) -> float:
    """Floating-point operations a second of a large matrix product."""
    side = 8192 if bench.cuda else 256
    a, b = (torch.randn(side, side, device=bench.device, dtype=bench.dtype) for _ in range(2))
    return 2e3 * side**3 / bench.milliseconds(torch.mm, a, b)


@cache
def measured_pair(bench: Bench) -> dict[str, float]:
    """Milliseconds of a pair with an image: a block, what is beside the blocks, the whole; and of
    its image in the tower and its collate on the CPU."""
    work, times = bench.work, []
    encoded = bench.tree(work.prompt, work.chain, work.chain, image=True)
    collate = bench.milliseconds(bench.batch, encoded)
    batch = bench.batch(encoded)
    for blocks in work.depths:
        policy = None  # the shallower model goes before the deeper one comes
        bench.free()
        policy = bench.policy(blocks)
        times.append(bench.milliseconds(micro_batches, policy, [batch]))
    tower = bench.milliseconds(policy.image_features, batch.pixels, batch.grids)
    block, beside, whole = of_all_blocks(work, *times)
    return {"block": block, "beside": beside, "all": whole, "tower": tower, "collate": collate}


def block(bench: Bench) -> Result:
    work, each, speed = bench.work, measured_pair(bench)["block"], product_speed(bench)
    done, _ = operations(replace(work.size, layers=1), work.prompt, work.chain, work.chain)
    share = done * 4 / 3 / (each / 1e3) / speed  # forward twice
    said = f"{each:.2f} ms forward, recompute and backward of {work.prompt + 2 * work.chain:,}"
    said += f" tokens (limit 22), {share:.0%} of this card's {speed / 1e12:.3g} TFLOP/s"
    return bench.on_gpu(each < 22), said


def rest(bench: Bench) -> Result:
    found = measured_pair(bench)
    said = f"{found['beside'] - found['tower']:.1f} ms head and all beside blocks and tower"
    return None, f"{said} (wanted 100); collating a row on the CPU {found['collate']:.0f} ms"


def tower(bench: Bench) -> Result:
    side = 28 * bench.work.grid
    return None, f"{measured_pair(bench)['tower']:.1f} ms an image of {side} x {side} (wanted 50)"


def pair(bench: Bench) -> Result:
    work, whole = bench.work, measured_pair(bench)["all"]
    size = replace(work.size, layers=SEVEN.layers)
    needed = sum(operations(size, work.prompt, work.chain, work.chain))
    used = needed / (whole / 1e3) / PEAK_SPEED
    said = f"{whole:.0f} ms a pair of {work.prompt:,} + 2 x {work.chain:,} tokens, one image"
    said += f", extrapolated to {SEVEN.layers} blocks: MFU {used:.1%} (limit 24 %)"
    return bench.on_gpu(used >= 0.24), f"{said}, {1e3 / whole:.2f} pairs/s/GPU"


def syncs(bench: Bench) -> Result:
    if not bench.cuda:
        return None, "not counted on a CPU (wanted 10)"
    work, policy = bench.work, bench.policy(bench.work.depths[0])
    batch = bench.batch(bench.tree(work.prompt, work.chain, work.chain, image=True))
    micro_batches(policy, [batch])
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            micro_batches(policy, [batch])
        finally:
            torch.cuda.set_sync_debug_mode("default")
    found = [one for one in seen if "called a synchronizing" in str(one.message)]
    places = Counter(f"{Path(one.filename).name}:{one.lineno}" for one in found)
    counts = ", ".join(f"{place} {count}" for place, count in places.most_common(6))
    return None, f"{len(found)} synchronising calls a micro-batch (wanted 10): {counts}"


# --------------------------------------------------------------------------------------------------
# Log-probabilities


@cache
@torch.no_grad()
def beside_another(bench: Bench) -> tuple[bool, Tensor, Tensor]:
    """All blocks, forward only: whether a pair has the same log-probabilities twice; how far they
    are, a token and a response, from those that it has in a batch with a longer pair."""
    work = bench.work
    policy = bench.policy(SEVEN.layers if bench.cuda else 2)
    short, long = (
        bench.tree(work.prompt, chain, chain) for chain in (work.chain, work.chain * 4 // 3)
    )
    alone, both = bench.batch(short), bench.batch(short, long)
    first, again, padded = policy(alone), policy(alone), policy(both)
    tokens = (padded[0, : first.shape[1]] - first[0])[alone.labels[0] > 0]
    responses = reference.response_sums(padded, both)[0] - reference.response_sums(first, alone)[0]
    return torch.equal(first, again), tokens, responses


def repeat(bench: Bench) -> Result:
    equal, _, _ = beside_another(bench)
    return equal, f"the same row twice: {'equal' if equal else 'not equal'} bit for bit"


def padded(bench: Bench) -> Result:
    _, tokens, responses = beside_another(bench)
    off, rms = responses.abs().max().item(), tokens.square().mean().sqrt().item()
    said = f"{off:.4f} nats a response, alone against padded beside a longer row (limit 0.2)"
    said += f"; a token {rms:.1e} rms, {tokens.abs().max().item():.1e} at most"
    return off < 0.2, said


def head_inputs(bench: Bench, count: int) -> tuple[Tensor, Tensor]:
    """Hidden states and a head whose logits have a standard deviation of 5: the largest of 152k
    are 20 to 25, as in trained models."""
    width, words = bench.work.size.width, bench.work.size.vocabulary
    torch.manual_seed(0)
    hidden = torch.randn(count, width, device=bench.device)
    weight = torch.randn(words, width, device=bench.device) * 5 / width**0.5
    return hidden.bfloat16(), weight.bfloat16()


@torch.no_grad()
def rounding(bench: Bench) -> Result:
    hidden, weight = head_inputs(bench, 256)
    exact = (hidden.double() @ weight.double().T).log_softmax(-1)
    targets = exact.exp().multinomial(1)  # drawn as a response is
    wanted = exact.gather(1, targets)[:, 0]
    chunked = attention.ChunkedLogProbs.apply(hidden, weight, targets[:, 0], 256)
    rounded = (hidden @ weight.T).float().log_softmax(-1).gather(1, targets)[:, 0]
    ours, other = ((found.double() - wanted).square().mean().sqrt() for found in (chunked, rounded))
    said = f"rms error of log p a token {ours:.1e}, with logits rounded to the weights'"
    return None, f"{said} dtype {other:.1e}"


def chunk(bench: Bench) -> Result:
    count, figures = 2 * bench.work.chain, []
    hidden, weight = (x.requires_grad_() for x in head_inputs(bench, count))
    targets = torch.arange(count, device=bench.device)

    def work(size: int) -> None:
        attention.ChunkedLogProbs.apply(hidden, weight, targets, size).sum().backward()
        hidden.grad = weight.grad = None

    for size in (256, 1024, 2048):
        bench.free()
        figures.append(f"{size}: {bench.milliseconds(work, size):.0f} ms {bench.peak():.1f} GiB")
    return None, f"{count:,} tokens, trained head, chunks of {', '.join(figures)}"


# --------------------------------------------------------------------------------------------------
# Memory, trees, steps


def loop(
    bench: Bench, policy: model.Policy, batch: model.Batch, steps: int, out: Path, stop: int = 0
) -> None:
    """The loop of dpo.main: two micro-batches a step, each of the same batch. With `stop` it is
    left in that step, and the states that it wrote stay."""
    settings = {"peak": LEARNING_RATE, "budget": 1, "save_every": 1 if stop else 0}
    run = train.Run(
        policy, [[0, 1]] * steps, lambda *_: batch, out=out, device=bench.device, **settings
    )
    for step in run:
        if stop and step == stop:
            return
        for one in run.micro_batches():
            run.backward(*dpo.pair_loss(policy(one), one, dpo.BETA))
        run.update()


def found_and_planned(bench: Bench, method: str, recomputed: int) -> tuple[float, float]:
    """GiB at the peak of two steps of two micro-batches, each of one long row."""
    work = bench.work
    bench.free()
    before = bench.peak()
    policy = bench.plain_policy(work.planned, method)
    train.shard(policy, bench.device, recomputed)
    prompt, chain = work.long // 4, work.long * 3 // 8
    batch = bench.batch(bench.tree(prompt, chain, chain))
    bench.free()
    with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(io.StringIO()):
        loop(bench, policy, batch, 2, Path(out))
    load = plan.Load(1, work.long, 2 * chain, 0, recomputed)
    shapes = plan.policy_of(bench.config(work.planned), method)
    moments = plan.memory(shapes, load, 1, mixed=bench.cuda)
    return bench.peak() - before, plan.peak(moments) / GIB


def memory(bench: Bench) -> Result:
    work, figures, holds = bench.work, [], True
    for method, again in (("full", work.planned), ("full", 1), ("full", 0), ("lora", work.planned)):
        found, wanted = found_and_planned(bench, method, again)
        off = found / wanted - 1
        holds = holds and abs(off) <= 0.1
        name = f"{method}, {again} recomputed"
        seen = f"{found:.2f} ({off:+.1%})" if bench.cuda else "unknown"
        figures.append(f"{name} {seen} of {wanted:.3g}")
    said = f"{work.planned} blocks, {work.long:,} tokens, GiB found of planned (limit 10 %): "
    return bench.on_gpu(holds), said + "; ".join(figures)


def question(
    bench: Bench, prompt: int, chain: int, values: Sequence[float] = (0.0,) * 6
) -> tuple[model.Batch, list[model.Batch]]:
    """A question of 3 + 3 chains as one tree, and as its nine pairs. values: of the reference."""
    row, _, edges = bench.tree(prompt, *[chain] * 6)
    root, *chains = row
    pairs = []
    for w, l in edges:
        both = [root, replace(chains[w], branch=1), replace(chains[l], branch=2)]
        pairs.append(bench.batch((both, [values[w], values[l]], [(0, 1)])))
    return bench.batch((row, values, edges)), pairs


def flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([train.local_tensor(tensor).detach().flatten() for tensor in tensors])


def weights(policy: model.Policy) -> Tensor:
    return flat(train.trained_parameters(policy).values())


def gradient(policy: model.Policy, batches: list[model.Batch]) -> Tensor:
    micro_batches(policy, batches)
    found = flat(p.grad for p in train.trained_parameters(policy).values())
    policy.zero_grad(set_to_none=True)
    return found


def distance(found: Tensor, wanted: Tensor) -> float:
    """|found - wanted| / |wanted|"""
    apart, length = (
        torch.linalg.vector_norm(x, dtype=torch.float64) for x in (found - wanted, wanted)
    )
    return (apart / length).item()


def tree_gradient(bench: Bench) -> Result:
    """The same weights twice: in fp32, not sharded; then as the stages compute."""
    policy, lengths = bench.plain_policy(bench.work.depths[0]), bench.work.questions[0]
    whole, _ = question(bench, *lengths)
    with train.forward_only(policy):
        own = reference.response_sums(policy(whole), whole)[0].tolist()
    # ours: some nats off the policy's own, so that no two pairs pull equally
    values = [value + apart for value, apart in zip(own, (0, 3, -3, 1, -2, 2))]
    whole, pairs = question(bench, *lengths, values)
    exact = gradient(policy, pairs)
    train.shard(policy, bench.device, bench.work.depths[0])
    by_tree, by_pair = gradient(policy, [whole]), gradient(policy, pairs)
    off, other = distance(by_tree, exact), distance(by_pair, exact)
    said = f"relative distance from fp32: the tree's gradient {off:.1e}, its nine pairs'"
    said += f" {other:.1e} (limit 1.5 times that); from each other"
    return off <= max(1.5 * other, 1e-4) and off < 0.1, f"{said} {distance(by_tree, by_pair):.1e}"


def tree_costs(bench: Bench, blocks: int) -> list[list[tuple[float, float]]]:
    """Of each question, as a tree and as nine pairs one after another: (milliseconds, GiB)."""
    policy, found = bench.policy(blocks), []
    for prompt, chain in bench.work.questions:
        whole, pairs = question(bench, prompt, chain)
        costs = []
        for batches in ([whole], pairs):
            bench.free()
            taken = bench.milliseconds(micro_batches, policy, batches, runs=2)
            costs.append((taken, bench.peak()))
        found.append(costs)
    return found


def tree_speed(bench: Bench) -> Result:
    work, figures, holds = bench.work, [], True
    few, more = (np.array(tree_costs(bench, blocks)) for blocks in work.depths)
    _, _, times = of_all_blocks(work, few[..., 0], more[..., 0])
    for lengths, (tree, pairs), (held, others) in zip(work.questions, times, more[..., 1]):
        holds = holds and pairs / tree >= 2
        text = "{:,} + 6 x {:,}".format(*lengths) + f": {tree:.0f} ms, nine pairs {pairs:.0f}"
        text += f", {pairs / tree:.2f} x faster; {held:.1f} and {others:.1f} GiB"
        figures.append(f"{text} at {work.depths[1]} blocks")
    return bench.on_gpu(holds), "; ".join(figures) + " (limit 2 x, extrapolated)"


def step(bench: Bench) -> Result:
    """Three steps of a small model; the same, left in the third step and resumed by a model of
    other weights. Some kernels add up in no fixed order on a GPU: there the two may differ."""
    small, said = Bench(bench.device, SMALL), io.StringIO()
    whole, cut, other = (small.policy(2, seed) for seed in (0, 0, 1))
    batch = small.batch(small.tree(SMALL.prompt, SMALL.chain, SMALL.chain))
    with train.forward_only(whole):
        batch.reference = reference.response_sums(whole(batch), batch)
    begun = weights(whole)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(said):
        one, two = Path(folder) / "one", Path(folder) / "two"
        loop(small, whole, batch, 3, one)
        loop(small, cut, batch, 3, two, stop=2)
        loop(small, other, batch, 3, two)
        losses = [entry["loss"] for entry in schema.read_metrics(one)]
    moved, apart = distance(weights(whole), begun), distance(weights(whole), weights(other))
    first = abs(losses[0] - math.log(2))
    shown = "step 0003/0003" in said.getvalue() and "resumed at step 2" in said.getvalue()
    same = apart <= 0.05 * moved if bench.cuda else apart == 0
    text = f"losses {losses}, the first off ln 2 by {first:.0e} (limit 1e-4)"
    text += f"; weights moved by {moved:.1e}, after resume off by {apart:.1e}"
    text += f" (limit {'5 % of that' if bench.cuda else '0'}); both lines shown: {shown}"
    return first < 1e-4 and losses[2] < losses[0] and shown and same, text


# --------------------------------------------------------------------------------------------------
# The stages' own commands


def write_rows(folder: Path) -> None:
    """Six demonstrations and six pairs of the miniature; two of each have a film."""
    demos, pairs = [], []
    asked = world.make_questions(2, 0, "films", True, folder)
    asked += world.make_questions(4, 0, "texts", False, folder)
    for question in asked:
        turns = data.prompt_messages(question)
        films = [folder / image for image in question.images]
        case, kind, _ = roles.understand(turns[-1]["content"], films)
        good, bad = (roles.chain(case, kind, style) for style in ("thorough", "hasty"))
        row = {"id": question.id, "images": question.images}
        demos.append(row | {"messages": [*turns, {"role": "assistant", "content": good}]})
        sides = {"chosen": good, "rejected": bad}
        pairs.append(row | {"prompt": turns, "failed": ["visual"]} | sides)
    data.write_jsonl(folder / "demos.jsonl", demos)
    data.write_jsonl(folder / "pairs.jsonl", pairs)


def command(bench: Bench, words: list[str]) -> str:
    """Runs a stage's script, and returns what it printed. Raises RuntimeError where it fails."""
    env = os.environ | ({} if bench.cuda else {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"})
    settings = {"cwd": ROOT, "env": env, "capture_output": True, "text": True, "timeout": 120}
    done = subprocess.run([sys.executable, *words], **settings)
    if done.returncode:
        raise RuntimeError(f"{words[0]}: exit code {done.returncode}: {done.stderr[-600:]}")
    return done.stdout


def stages(bench: Bench) -> Result:
    """sft.py, then dpo.py on what it saved, with a model of the miniature's size."""
    gates = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer = school.make_tokenizer("qwen", 0)
        network, images = school.build("qwen", "tiny", tokenizer, 0)
        network.save_pretrained(folder / "base")
        school.save_processors(folder / "base", "qwen", tokenizer, images)
        write_rows(folder)
        start, settings = folder / "base", ["--images", name, "--pixels", "3136", "--batch", "4"]
        for stage, kind in (("sft", "demos"), ("dpo", "pairs")):
            given = ["--model", str(start), f"--{kind}", str(folder / f"{kind}.jsonl"), *settings]
            given += ["--epochs", "1", "--out", str(folder / stage)]
            gates += command(bench, [f"{stage}.py", *given]).count("gate: ok")
            start = folder / stage / "merged"
            hub.load_policy(start)
            losses = [entry["loss"] for entry in schema.read_metrics(folder / stage)]
    return True, f"sft.py and dpo.py ended well, {gates} gates held, dpo's losses {losses}"


# --------------------------------------------------------------------------------------------------

CHECKS = {  # a function's name with hyphens, in the order in which they run
    check.__name__.replace("_", "-"): check
    for check in (
        kernel, new_length, outside, block, rest, tower, pair, fresh_lengths, syncs, repeat, padded,
        rounding, chunk, memory, tree_gradient, tree_speed, step, stages, cudnn,
    )
}  # fmt: skip


def run_check(bench: Bench, name: str) -> bool:
    """Prints a check's line. Returns whether it did not fail."""
    begun = time.perf_counter()
    try:
        bench.free()
        if bench.cuda:
            train.init_ranks()  # again, where a check before this one ended the group
        holds, said = CHECKS[name](bench)
    except (Exception, SystemExit) as error:  # the next check goes on
        last = traceback.format_exc().strip().splitlines()[-6:]
        holds, said = False, "\n    ".join([f"{type(error).__name__}: {error}", *last])
    word = "info" if holds is None else "PASS" if holds else "FAIL"
    print(f"{word} {name:<14} {time.perf_counter() - begun:5.1f} s  {said}", flush=True)
    return word != "FAIL"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="What a real GPU says of this code.")
    parser.add_argument("--cpu", action="store_true", help="a dry run at tiny shapes on the CPU")
    parser.add_argument("--only", nargs="+", choices=list(CHECKS), default=list(CHECKS))
    args = parser.parse_args(argv)
    if not args.cpu and not torch.cuda.is_available():
        parser.error("there is no GPU here; --cpu is a dry run")
    bench = Bench(torch.device("cpu"), SMALL) if args.cpu else Bench(train.init_ranks(), REAL)
    if args.cpu:
        torch.set_num_threads(1)  # more are of no use to tiny shapes
    card = torch.cuda.get_device_name() if bench.cuda else "CPU, tiny shapes, fp32"
    print(f"{card}, torch {torch.__version__}", flush=True)
    begun = time.perf_counter()
    held = [run_check(bench, name) for name in args.only]
    print(f"{sum(held)} of {len(held)} did not fail, {time.perf_counter() - begun:.0f} s")
    train.leave_group()
    return 0 if all(held) else 1


if __name__ == "__main__":
    sys.exit(main())
