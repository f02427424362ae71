"""What a real GPU says of this code: which kernels run, what a pair costs, what agrees.

    python bench/gpu.py                     one GPU of 80 GB, a few minutes, no network
    python bench/gpu.py --only block pair
    python bench/gpu.py --cpu               the same code at tiny shapes in fp32: a dry run

The models are Qwen2.5-VL of the 7B's shapes with random weights and few blocks, made as the stages
make them (train.shard: FSDP2 in a group of one, bf16 compute, fp32 master weights, AdamW). A block
costs the difference between two depths; what is told of 28 blocks is extrapolated from it, and
leaves the optimizer's step out. `repeat` and `padded` alone have all 28 blocks, forward only.
`step` and `stages` are about the mechanics, so their models are small.

A line is a verdict, a check, the seconds that it took, and its figures with the limit. PASS and
FAIL are against a limit, info has none. On a CPU times and memory are info. A check that raises is
a FAIL, and the next goes on; any FAIL makes the exit code 1.
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
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import attention  # noqa: E402
import clinic.school  # noqa: E402
import data  # noqa: E402
import dpo  # noqa: E402
import hub  # noqa: E402
import lora  # noqa: E402
import model  # noqa: E402
import reference  # noqa: E402
import train  # noqa: E402
import trees  # noqa: E402
from command import schema  # noqa: E402
from report import memory  # noqa: E402

PEAK_SPEED = 989e12  # dense bf16 of an H100 or H200 SXM, by NVIDIA's data sheet
LEARNING_RATE = 1e-4  # ours: high enough for three steps to show, low enough for random weights
GIB = 2**30
PAIR = ((0, 1),)  # one edge: chain 0 is preferred to chain 1
NINE = tuple((chosen, rejected) for chosen in range(3) for rejected in range(3, 6))


@dataclass(frozen=True)
class Work:
    """What is measured: a model's shapes, and tokens of prompts and chains."""

    size: memory.Size
    depths: tuple[int, int]  # blocks of the two models whose difference is the blocks' cost
    planned: int  # blocks of the model whose memory is compared with the plan
    prompt: int
    chain: int
    grid: int  # merged patches on an image's side: 27 are 756 of its 768 pixels
    long: int  # tokens of the row whose memory is measured
    questions: tuple[tuple[int, int], ...]  # tokens of the prompt and of each of six chains


SEVEN = memory.SHAPES["qwen2.5-vl-7b"]
TINY = memory.Size("qwen2_5_vl", 64, 2, 4, 2, 128, 512, (2, 32, 2, 64), (112, (1,)))
SMALL = Work(TINY, (1, 2), 2, 24, 16, 4, 96, ((16, 12), (24, 16)))
REAL = Work(SEVEN, (2, 6), 4, 1024, 1536, 27, 8192, ((512, 384), (1024, 1536)))


@dataclass(frozen=True)
class Bench:
    device: torch.device
    work: Work

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.cuda else torch.float32

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def on_gpu(self, holds: bool) -> bool | None:
        """A verdict that only a GPU can give; None is info."""
        return holds if self.cuda else None

    def free(self) -> None:
        """Gives the memory of what is no longer used back, and forgets the peak."""
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak(self) -> float:
        """GiB that torch's tensors held at most since `free`; 0 on a CPU, where it is not known."""
        return torch.cuda.max_memory_allocated() / GIB if self.cuda else 0.0


Verdict = tuple[bool | None, str]  # None: info

# --------------------------------------------------------------------------------------------------
# Models, rows, batches


def image_token(work: Work) -> int:
    return work.size.vocabulary - 1  # ours: a token that random ids never are


def config_of(work: Work, blocks: int):
    config = memory.config_of(replace(work.size, layers=blocks))
    config.image_token_id = image_token(work)
    return config


def plain_policy(bench: Bench, work: Work, blocks: int, seed: int = 0) -> model.Policy:
    """Random weights in fp32 on the device, vision frozen, not sharded."""
    from transformers import AutoModelForImageTextToText

    torch.manual_seed(seed)
    config = config_of(work, blocks)
    with bench.device:
        network = AutoModelForImageTextToText.from_config(config, attn_implementation="sdpa")
    policy = model.Policy(network)
    policy.freeze_vision()
    return policy


def build(bench: Bench, blocks: int, checkpointing: bool = True) -> model.Policy:
    """As the stages train it."""
    return train.shard(plain_policy(bench, bench.work, blocks), bench.device, checkpointing)


def draw(work: Work, prompt: int, chains: list[int], seed: int, image: bool = False) -> model.Row:
    """prompt -> each of the chains, of random tokens; the prompt may begin with an image."""
    generator, images = torch.Generator().manual_seed(seed), []

    def tokens(count: int) -> list[int]:
        return torch.randint(image_token(work), (count,), generator=generator).tolist()

    ids = tokens(prompt)
    if image:
        features = work.grid**2
        ids[:features] = [image_token(work)] * features
        pixels = torch.randn(4 * features, 1176, generator=generator)
        images.append(model.ImageInput(pixels, (1, work.grid, work.grid), features))
    row = [model.Segment(ids, [data.PROMPT] * prompt, images=images)]
    for answer, count in enumerate(chains, 1):
        row.append(model.Segment(tokens(count), [data.TAG] * count, 0, answer))
    return row


def batch_of(bench: Bench, work: Work, rows: list[trees.Encoded]) -> model.Batch:
    family = model.FAMILIES[work.size.family]
    processor = SimpleNamespace(image_id=image_token(work), family=family)
    return trees.collate_trees(rows, [1.0] * len(rows), processor).to(bench.device)


def pair_batch(bench: Bench, prompt: int, chains: list[int], image: bool = False) -> model.Batch:
    """One pair, with 0 as its reference."""
    row = draw(bench.work, prompt, chains, prompt, image)
    return batch_of(bench, bench.work, [(row, [0.0, 0.0], PAIR)])


def micro_batch(policy: model.Policy, batch: model.Batch) -> float:
    """A micro-batch of Stage II, forward and backward, as dpo.main has it. Returns the loss."""
    loss, _, _ = dpo.pair_loss(policy(batch), batch, dpo.BETA)
    loss.backward()
    return loss.item()


def milliseconds(bench: Bench, work: Callable[[], object], runs: int = 5) -> float:
    """The median of some runs, after two that are not timed."""
    taken = []
    for _ in range(2 + runs):
        bench.wait()
        begun = time.perf_counter()
        work()
        bench.wait()
        taken.append(1e3 * (time.perf_counter() - begun))
    return statistics.median(taken[2:])


def micro_milliseconds(
    bench: Bench, policy: model.Policy, batches: list[model.Batch], runs: int = 5
) -> float:
    """Of all batches, one after another."""

    def work() -> None:
        for batch in batches:
            micro_batch(policy, batch)
        policy.zero_grad(set_to_none=True)

    return milliseconds(bench, work, runs)


def of_all_blocks(work: Work, few: float, more: float) -> tuple[float, float, float]:
    """(a block's, what is beside the blocks, all blocks and that) from the two depths' figures."""
    block = (more - few) / (work.depths[1] - work.depths[0])
    rest = few - work.depths[0] * block
    return block, rest, rest + SEVEN.layers * block


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


def kernel(bench: Bench) -> Verdict:
    _, inputs = attend(bench, bench.work.chain)
    chosen = torch._fused_sdp_choice(*inputs, is_causal=True, enable_gqa=True)
    names = {0: "math", 1: "flash", 2: "efficient", 3: "cuDNN"}
    return bench.on_gpu(chosen == 1), f"{names.get(chosen, chosen)} attention (limit: flash)"


def extra(bench: Bench, first: int) -> tuple[float, float]:
    """Milliseconds, forward and backward, by which a length's first call is slower than its
    second: medians of eight lengths."""
    apart: tuple[list[float], list[float]] = ([], [])
    for length in range(first, first + 10):
        times = []
        for _ in range(2):
            bench.wait()
            begun = time.perf_counter()
            out, inputs = attend(bench, length)
            bench.wait()
            middle = time.perf_counter()
            torch.autograd.grad(out, inputs, torch.ones_like(out))
            bench.wait()
            times.append((middle - begun, time.perf_counter() - middle))
        for part, (seen, again) in zip(apart, zip(*times)):
            part.append(1e3 * (seen - again))
    return statistics.median(apart[0][2:]), statistics.median(apart[1][2:])


def new_length(bench: Bench) -> Verdict:
    torch.empty(GIB if bench.cuda else 1, device=bench.device)  # room: cudaMalloc is not the point
    own = extra(bench, bench.work.chain + 1)
    with ThreadPoolExecutor(1) as thread:
        fresh = thread.submit(extra, bench, bench.work.chain + 21).result()
    said = "new length costs {:.2f} + {:.2f} ms, on a fresh thread {:.2f} + {:.2f} (limit 2)"
    said = said.format(*own, *fresh)
    return bench.on_gpu(max(*own, *fresh) < 2), said


def cudnn(bench: Bench) -> Verdict:
    """What train.init_ranks spares us. It is the last check: these kernels have crashed before."""
    torch.backends.cuda.enable_cudnn_sdp(True)
    try:
        forward, backward = extra(bench, bench.work.chain + 41)
    finally:
        torch.backends.cuda.enable_cudnn_sdp(False)
    return None, f"with cuDNN's attention a new length costs {forward:.1f} + {backward:.1f} ms"


def text_batches(bench: Bench, first: int, count: int) -> list[model.Batch]:
    """Pairs, each of other lengths, from the longest on."""
    work = bench.work
    shorter = [first + 2 * index for index in range(count)]
    return [pair_batch(bench, work.prompt, [work.chain - n, work.chain - n - 1]) for n in shorter]


def outside(bench: Bench) -> Verdict:
    policy = build(bench, bench.work.depths[0])

    def foreign() -> float:
        free, total = torch.cuda.mem_get_info()
        return (total - free - torch.cuda.memory_reserved()) / 2**20

    many = 20 if bench.cuda else 3
    batches = text_batches(bench, 0, many + 2)
    for batch in batches[:2]:
        micro_batch(policy, batch)
    before = foreign() if bench.cuda else 0.0
    for batch in batches[2:]:
        micro_batch(policy, batch)
    grown = (foreign() if bench.cuda else 0.0) - before
    said = f"{grown:.0f} MiB outside torch's allocator after {many} new lengths (limit 100)"
    return bench.on_gpu(grown < 100), f"{said}, {before:.0f} before"


def fresh_lengths(bench: Bench) -> Verdict:
    policy, many = build(bench, bench.work.depths[0]), 12 if bench.cuda else 3
    longest, *batches = text_batches(bench, bench.work.chain // 2, many + 1)
    for _ in range(3):
        micro_batch(policy, longest)
    passes = []
    for _ in range(2):
        bench.wait()
        begun = time.perf_counter()
        for batch in batches:
            micro_batch(policy, batch)
        bench.wait()
        passes.append(time.perf_counter() - begun)
    ratio = passes[0] / passes[1]
    said = f"{ratio:.3f} of the time of lengths seen (limit 1.1)"
    return bench.on_gpu(ratio < 1.1), f"{said}, at {bench.work.depths[0]} blocks"


# --------------------------------------------------------------------------------------------------
# Speed


def operations(work: Work, blocks: int, prompt: int, chains: list[int]) -> tuple[float, float]:
    """Floating-point operations that training needs on a row, without the recompute and the
    frozen tower: of all blocks, and of the head."""
    size, tokens = work.size, prompt + sum(chains)
    narrow = size.width * size.kv_heads // size.heads
    weights = size.width * (2 * size.width + 2 * narrow + 3 * size.feed_forward)
    seen = prompt**2 / 2 + sum(chain * prompt + chain**2 / 2 for chain in chains)
    inside = blocks * (6 * weights * tokens + 12 * size.width * seen)
    return inside, 6.0 * size.width * size.vocabulary * sum(chains)


def product_speed(bench: Bench) -> float:
    """Floating-point operations a second of a large matrix product."""
    side = 8192 if bench.cuda else 256
    a, b = (torch.randn(side, side, device=bench.device, dtype=bench.dtype) for _ in range(2))
    return 2e3 * side**3 / milliseconds(bench, lambda: a @ b)


def at_depth(bench: Bench, blocks: int, batch: model.Batch) -> tuple[float, float]:
    """Milliseconds of a micro-batch, and of its images in the tower."""
    bench.free()
    policy = build(bench, blocks)
    whole = micro_milliseconds(bench, policy, [batch])
    return whole, milliseconds(bench, lambda: policy.image_features(batch.pixels, batch.grids))


@cache
def measured_pair(bench: Bench) -> tuple[float, float, float, float]:
    """Milliseconds: the image pair at the two depths, its tower, and its collate on the CPU."""
    work = bench.work
    row = draw(work, work.prompt, [work.chain] * 2, 0, image=True)
    encoded = (row, [0.0, 0.0], PAIR)
    collate = milliseconds(bench, lambda: batch_of(bench, work, [encoded]))
    batch = batch_of(bench, work, [encoded])
    (few, _), (more, tower) = (at_depth(bench, blocks, batch) for blocks in work.depths)
    return few, more, tower, collate


def block(bench: Bench) -> Verdict:
    work, (few, more, _, _) = bench.work, measured_pair(bench)
    each, _, _ = of_all_blocks(work, few, more)
    speed = product_speed(bench)
    done = operations(work, 1, work.prompt, [work.chain] * 2)[0] * 4 / 3  # forward twice
    share = done / (each / 1e3) / speed
    tokens = f"{work.prompt + 2 * work.chain:,} tokens"
    said = f"{each:.2f} ms forward, recompute and backward of {tokens} (limit 22)"
    said += f", {share:.0%} of this card's {speed / 1e12:.3g} TFLOP/s"
    return bench.on_gpu(each < 22), said


def rest(bench: Bench) -> Verdict:
    few, more, tower, collate = measured_pair(bench)
    _, beside, _ = of_all_blocks(bench.work, few, more)
    said = f"{beside - tower:.1f} ms head and all beside blocks and tower (wanted 100)"
    return None, f"{said}; collating a row on the CPU {collate:.0f} ms"


def tower(bench: Bench) -> Verdict:
    side = 28 * bench.work.grid
    return None, f"{measured_pair(bench)[2]:.1f} ms an image of {side} x {side} (wanted 50)"


def pair(bench: Bench) -> Verdict:
    work, (few, more, _, _) = bench.work, measured_pair(bench)
    _, _, whole = of_all_blocks(work, few, more)
    needed = sum(operations(work, SEVEN.layers, work.prompt, [work.chain] * 2))
    used = needed / (whole / 1e3) / PEAK_SPEED
    said = f"{whole:.0f} ms a pair of {work.prompt:,} + 2 x {work.chain:,} tokens, one image"
    said += f", extrapolated to {SEVEN.layers} blocks: MFU {used:.1%} (limit 24 %)"
    return bench.on_gpu(used >= 0.24), f"{said}, {1e3 / whole:.2f} pairs/s/GPU"


def syncs(bench: Bench) -> Verdict:
    if not bench.cuda:
        return None, "not counted on a CPU (wanted 10)"
    policy = build(bench, bench.work.depths[0])
    batch = pair_batch(bench, bench.work.prompt, [bench.work.chain] * 2, True)
    micro_batch(policy, batch)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            micro_batch(policy, batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    found = [one for one in seen if "called a synchronizing" in str(one.message)]
    places = Counter(f"{Path(one.filename).name}:{one.lineno}" for one in found)
    told = ", ".join(f"{place} {count}" for place, count in places.most_common(6))
    return None, f"{len(found)} synchronising calls a micro-batch (wanted 10): {told}"


# --------------------------------------------------------------------------------------------------
# Log-probabilities


@cache
@torch.no_grad()
def beside_another(bench: Bench) -> tuple[bool, Tensor, Tensor]:
    """All blocks, forward only: whether a pair has the same log-probabilities twice; how far they
    are, a token and a response, from those that it has in a batch with a longer pair."""
    work, blocks = bench.work, SEVEN.layers if bench.cuda else 2
    policy = build(bench, blocks)
    short, long = (
        (draw(work, work.prompt, [count] * 2, count), [0.0, 0.0], PAIR)
        for count in (work.chain, work.chain * 4 // 3)
    )
    alone, both = (batch_of(bench, work, rows) for rows in ([short], [short, long]))
    first, again, padded = policy(alone), policy(alone), policy(both)
    tokens = (padded[0, : first.shape[1]] - first[0])[alone.labels[0] > 0]
    sums = [
        reference.response_sums(logp, batch)[0] for logp, batch in ((first, alone), (padded, both))
    ]
    return torch.equal(first, again), tokens, sums[1] - sums[0]


def repeat(bench: Bench) -> Verdict:
    equal, _, _ = beside_another(bench)
    return equal, f"the same row twice: {'equal' if equal else 'not equal'} bit for bit"


def padded(bench: Bench) -> Verdict:
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
def rounding(bench: Bench) -> Verdict:
    hidden, weight = head_inputs(bench, 256)
    exact = (hidden.double() @ weight.double().T).log_softmax(-1)
    targets = exact.exp().multinomial(1)[:, 0]  # drawn as a response is
    wanted = exact.gather(1, targets[:, None])[:, 0]

    def error(found: Tensor) -> float:
        return (found.double() - wanted).square().mean().sqrt().item()

    chunked = attention.ChunkedLogProbs.apply(hidden, weight, targets, attention.LOGIT_CHUNK)
    rounded = (hidden @ weight.T).float().log_softmax(-1).gather(1, targets[:, None])[:, 0]
    said = f"rms error of log p a token {error(chunked):.1e}, with logits rounded to the weights'"
    return None, f"{said} dtype {error(rounded):.1e}"


def chunk(bench: Bench) -> Verdict:
    count, told = 2 * bench.work.chain, []
    hidden, weight = (x.requires_grad_() for x in head_inputs(bench, count))
    targets = torch.arange(count, device=bench.device)

    def work() -> None:
        attention.ChunkedLogProbs.apply(hidden, weight, targets, size).sum().backward()
        hidden.grad = weight.grad = None

    for size in (256, 1024, 2048):
        bench.free()
        taken = milliseconds(bench, work)
        told.append(f"{size}: {taken:.0f} ms {bench.peak():.1f} GiB")
    return None, f"{count:,} tokens, trained head, chunks of {', '.join(told)}"


# --------------------------------------------------------------------------------------------------
# Memory, trees, steps


def loop(
    bench: Bench,
    policy: model.Policy,
    batch: model.Batch,
    out: Path,
    plan: list[list[int]],
    stop: int | None = None,
) -> None:
    """The loop of dpo.main, every row the same batch. With `stop` it is left in that step, and the
    states that it wrote stay."""
    run = train.Run(
        policy,
        plan,
        out=out,
        device=bench.device,
        peak=LEARNING_RATE,
        budget=1,
        save_every=0 if stop is None else 1,
    )
    for step in run:
        if step == stop:
            return
        for _ in run.micro_batches():
            run.backward(*dpo.pair_loss(policy(batch), batch, dpo.BETA))
        run.update()


def found_and_planned(bench: Bench, method: str, checkpointing: bool) -> tuple[float, float]:
    """GiB at the peak of two steps of two micro-batches, each of one long row."""
    work = bench.work
    bench.free()
    before = torch.cuda.memory_allocated() / GIB if bench.cuda else 0.0
    policy = plain_policy(bench, work, work.planned)
    if method == "lora":
        lora.inject(policy.model, policy.language_model)
    train.shard(policy, bench.device, checkpointing)
    prompt, chain = work.long // 4, work.long * 3 // 8
    batch = pair_batch(bench, prompt, [chain] * 2)
    bench.free()
    with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(io.StringIO()):
        loop(bench, policy, batch, Path(out), [[0, 1]] * 2)
    load = memory.Load(1, work.long, 2 * chain, True, 0, checkpointing)
    shapes = memory.shapes(config_of(work, work.planned), method)
    moments = memory.memory(shapes, load, 1, mixed=bench.cuda)
    return bench.peak() - before, memory.peak(moments) / GIB


def planned(bench: Bench) -> Verdict:
    work, told, holds = bench.work, [], True
    for method, again in (("full", True), ("full", False), ("lora", True)):
        found, wanted = found_and_planned(bench, method, again)
        off = found / wanted - 1
        holds = holds and abs(off) <= 0.1
        name = f"{method}{', checkpointing' if again else ''}"
        seen = f"{found:.2f} ({off:+.1%})" if bench.cuda else "unknown"
        told.append(f"{name} {seen} of {wanted:.3g}")
    said = f"{work.planned} blocks, {work.long:,} tokens, GiB found of planned (limit 10 %): "
    return bench.on_gpu(holds), said + "; ".join(told)


def question(
    bench: Bench, prompt: int, chain: int, values: list[float]
) -> tuple[model.Batch, list[model.Batch]]:
    """A question of 3 + 3 chains as one tree, and as its nine pairs. values: of the reference."""
    root, *chains = draw(bench.work, prompt, [chain] * 6, prompt)
    whole = batch_of(bench, bench.work, [([root, *chains], values, NINE)])
    pairs = []
    for w, l in NINE:
        row = [root, replace(chains[w], answer=1), replace(chains[l], answer=2)]
        pairs.append(batch_of(bench, bench.work, [(row, [values[w], values[l]], PAIR)]))
    return whole, pairs


def gradients(policy: model.Policy, batches: list[model.Batch]) -> list[Tensor]:
    policy.zero_grad(set_to_none=True)
    for batch in batches:
        micro_batch(policy, batch)
    found = [train.local_tensor(p.grad).clone() for p in train.trained_parameters(policy).values()]
    policy.zero_grad(set_to_none=True)
    return found


def distance(found: list[Tensor], wanted: list[Tensor]) -> float:
    """|found - wanted| / |wanted|, as one vector each."""
    apart = sum((a - b).double().square().sum().item() for a, b in zip(found, wanted, strict=True))
    return math.sqrt(apart / sum(b.double().square().sum().item() for b in wanted))


def tree_gradient(bench: Bench) -> Verdict:
    """The same weights twice: in fp32, not sharded; then as the stages compute."""
    work = bench.work
    policy = plain_policy(bench, work, work.depths[0])
    whole, _ = question(bench, *work.questions[0], [0.0] * 6)
    with torch.no_grad():
        own = reference.response_sums(policy(whole), whole)[0].tolist()
    # ours: some nats off the policy's own, so that no two pairs pull equally
    values = [value + apart for value, apart in zip(own, (0, 3, -3, 1, -2, 2))]
    whole, pairs = question(bench, *work.questions[0], values)
    exact = gradients(policy, pairs)
    train.shard(policy, bench.device, checkpointing=True)
    by_tree, by_pair = gradients(policy, [whole]), gradients(policy, pairs)
    off, other = distance(by_tree, exact), distance(by_pair, exact)
    said = (
        f"relative distance from fp32: the tree's gradient {off:.1e}, its nine pairs' {other:.1e}"
    )
    said += f" (limit 1.5 times that); from each other {distance(by_tree, by_pair):.1e}"
    return off <= max(1.5 * other, 1e-4) and off < 0.1, said


@cache
def tree_costs(bench: Bench, blocks: int) -> list[tuple[float, float]]:
    """(milliseconds, GiB) of each question as a tree and as nine pairs, one after another."""
    policy, found = build(bench, blocks), []
    for prompt, chain in bench.work.questions:
        whole, pairs = question(bench, prompt, chain, [0.0] * 6)
        for batches in ([whole], pairs):
            bench.free()
            found.append((micro_milliseconds(bench, policy, batches, 2), bench.peak()))
    return found


def tree_speed(bench: Bench) -> Verdict:
    work, told, holds = bench.work, [], True
    few, more = (tree_costs(bench, blocks) for blocks in work.depths)
    whole = [of_all_blocks(work, a, b)[2] for (a, _), (b, _) in zip(few, more)]
    for number, (prompt, chain) in enumerate(work.questions):
        at = slice(2 * number, 2 * number + 2)
        (tree, pairs), (held, others) = whole[at], (gib for _, gib in more[at])
        holds = holds and pairs / tree >= 2
        text = f"{prompt:,} + 6 x {chain:,}: {tree:.0f} ms, nine pairs {pairs:.0f}"
        text += f", {pairs / tree:.2f} x faster; {held:.1f} and {others:.1f} GiB"
        told.append(f"{text} at {work.depths[1]} blocks")
    return bench.on_gpu(holds), "; ".join(told) + " (limit 2 x, extrapolated)"


def weights(policy: model.Policy) -> list[Tensor]:
    return [
        train.local_tensor(p).detach().clone() for p in train.trained_parameters(policy).values()
    ]


def step(bench: Bench) -> Verdict:
    """Three steps of a small model; the same, left in the third step and resumed by a model of
    other weights. Some kernels add up in no fixed order on a GPU: there the two may differ."""
    small, plan, said = Bench(bench.device, SMALL), [[0, 1]] * 3, io.StringIO()
    whole, cut, other = (
        train.shard(plain_policy(small, SMALL, 2, seed), bench.device, True) for seed in (0, 0, 1)
    )
    batch = pair_batch(small, SMALL.prompt, [SMALL.chain] * 2)
    with torch.no_grad():
        batch.reference = reference.response_sums(whole(batch), batch)
    begun = weights(whole)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(said):
        one, two = Path(folder) / "one", Path(folder) / "two"
        loop(small, whole, batch, one, plan)
        loop(small, cut, batch, two, plan, stop=2)
        loop(small, other, batch, two, plan)
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
    """Six demonstrations and six pairs; every third has an image."""
    demos, pairs = [], []
    for index in range(6):
        images = [] if index % 3 else [f"film{index}.png"]
        for name in images:
            pixels = np.random.default_rng(index).integers(0, 255, (56, 56, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name)
        turns = [
            {"role": "system", "content": data.SYSTEM_PROMPT},
            {"role": "user", "content": f"Case {index}: what does the film show?"},
        ]
        good, bad = (
            data.join_response(f"Film {index} shows {what}.", what)
            for what in ("a nodule in the left upper lobe", "nothing")
        )
        answer = {"role": "assistant", "content": good}
        demos.append({"id": f"d{index}", "messages": [*turns, answer], "images": images})
        pair = {"id": f"p{index}", "prompt": turns, "images": images, "failed": ["visual"]}
        sides = {"chosen": good, "rejected": bad}
        pairs.append(pair | sides)
    data.write_jsonl(folder / "demos.jsonl", demos)
    data.write_jsonl(folder / "pairs.jsonl", pairs)


def command(bench: Bench, words: list[str]) -> str:
    """Runs a stage's script, and returns what it printed. Raises RuntimeError where it fails."""
    hidden = {} if bench.cuda else {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *words],
        cwd=ROOT,
        env=os.environ | hidden,
        capture_output=True,
        text=True,
        timeout=120,
    )
    if done.returncode:
        raise RuntimeError(f"{words[0]}: exit code {done.returncode}: {done.stderr[-600:]}")
    return done.stdout


def stages(bench: Bench) -> Verdict:
    """sft.py, then dpo.py on what it saved, with a model of the miniature's size."""
    gates = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer = clinic.school.make_tokenizer("qwen", 0)
        network, images = clinic.school.build("qwen", "tiny", tokenizer, 0)
        network.save_pretrained(folder / "base")
        clinic.school.save_processors(folder / "base", "qwen", tokenizer, images)
        write_rows(folder)
        start, settings = folder / "base", ["--images", name, "--pixels", "3136", "--batch", "4"]
        for stage, kind, rows in (("sft", "demos", "demos.jsonl"), ("dpo", "pairs", "pairs.jsonl")):
            given = ["--model", str(start), f"--{kind}", str(folder / rows), *settings]
            given += ["--epochs", "1", "--out", str(folder / stage)]
            printed = command(bench, [f"{stage}.py", *given])
            gates += printed.count("gate: ok")
            start = folder / stage / "merged"
            hub.load_policy(start)
            losses = [entry["loss"] for entry in schema.read_metrics(folder / stage)]
    return True, f"sft.py and dpo.py ended well, {gates} gates held, dpo's losses {losses}"


# --------------------------------------------------------------------------------------------------

CHECKS: dict[str, Callable[[Bench], Verdict]] = {
    "kernel": kernel,
    "new-length": new_length,
    "outside": outside,
    "block": block,
    "rest": rest,
    "tower": tower,
    "pair": pair,
    "fresh-lengths": fresh_lengths,
    "syncs": syncs,
    "repeat": repeat,
    "padded": padded,
    "rounding": rounding,
    "chunk": chunk,
    "memory": planned,
    "tree-gradient": tree_gradient,
    "tree-speed": tree_speed,
    "step": step,
    "stages": stages,
    "cudnn": cudnn,
}


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
    verdict = "info" if holds is None else "PASS" if holds else "FAIL"
    print(f"{verdict} {name:<14} {time.perf_counter() - begun:5.1f} s  {said}", flush=True)
    return holds is not False


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
