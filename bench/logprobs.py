"""Log-probabilities in chunks against the whole logits: time and peak memory, forward and backward.

    python bench/logprobs.py            V 151,936, 2,048 positions, width 1,024, fp32 on the CPU;
                                        5 GB of memory, minutes

Both compute log softmax(h W^T)[target]: attention.ChunkedLogProbs, and the usual one line without
it. They alternate in one process, so that a busy machine slows both. Times are the medians of the
rounds. Peaks come from the allocator's own record: they include temporaries inside an operator, and
leave out the gradient of the head, which both must return.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import attention


def peak_bytes(work: Callable[[], object]) -> int:
    """The most bytes of CPU memory allocated at one time during `work`, above those before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        work()
    return peak_of(record)


def peak_of(record: profile) -> int:
    """The same for a profile that was made with profile_memory."""
    sizes, events = [], list(record.profiler.kineto_results.experimental_event_tree())
    while events:
        event = events.pop()
        events += event.children
        if event.name == "[memory]":
            # negative where memory is freed
            sizes.append((event.start_time_ns, event.extra_fields.alloc_size))
    now = most = 0
    for _, size in sorted(sizes, key=lambda entry: entry[0]):
        now += size
        most = max(most, now)
    return most


def whole(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """hidden (N, D), weight (V, D), targets (N,) -> (N,), by way of (N, V)"""
    return (hidden @ weight.T).log_softmax(-1).gather(1, targets[:, None])[:, 0]


def chunked(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return attention.ChunkedLogProbs.apply(hidden, weight, targets, attention.LOGIT_CHUNK["cpu"])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Chunked log-probabilities against the whole logits."
    )
    parser.add_argument("--vocabulary", type=int, default=151_936)  # Qwen2.5's
    parser.add_argument("--positions", type=int, default=2048)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args(argv)
    generator = torch.Generator().manual_seed(0)
    hidden, outer = (
        torch.randn(args.positions, args.width, generator=generator, requires_grad=True),
        torch.randn(args.positions, generator=generator),
    )
    weight, targets = (
        torch.randn(args.vocabulary, args.width, generator=generator) / args.width**0.5,
        torch.randint(args.vocabulary, (args.positions,), generator=generator),
    )
    print(
        f"V {args.vocabulary:,}, {args.positions:,} positions, width {args.width:,}, fp32, "
        f"{torch.get_num_threads()} threads, chunks of {attention.LOGIT_CHUNK['cpu']}"
    )

    def work(function: Callable) -> list[Tensor]:
        """Forward and backward: the log-probabilities and the gradients"""
        logp = function(hidden, weight, targets)
        (logp * outer).sum().backward()
        made = [
            tensor for tensor in (logp.detach(), hidden.grad, weight.grad) if tensor is not None
        ]
        hidden.grad = weight.grad = None
        return made

    for head, limit in (("trained", 1.6), ("frozen", 1.0)):
        weight.requires_grad_(head == "trained")
        worst = max(
            (a - b).abs().max().item() for a, b in zip(work(whole), work(chunked), strict=True)
        )
        own = weight.nbytes if head == "trained" else 0
        peaks = {
            function: peak_bytes(lambda: work(function)) - own for function in (whole, chunked)
        }
        seconds: dict[Callable, list[float]] = {whole: [], chunked: []}
        for _ in range(args.rounds):
            for function in seconds:
                begin = time.perf_counter()
                work(function)
                seconds[function].append(time.perf_counter() - begin)
        middle = {function: statistics.median(times) for function, times in seconds.items()}
        print(f"head {head}")
        print(f"  worst difference of log-probabilities and gradients {worst:.1e}   (target 1e-5)")
        print(
            f"  peak memory {peaks[chunked] / 1e6:,.0f} MB of {peaks[whole] / 1e6:,.0f} MB: "
            f"{peaks[chunked] / peaks[whole]:.3f}   (target 0.125)"
        )
        print(
            f"  time {middle[chunked]:.2f} s of {middle[whole]:.2f} s: "
            f"{middle[chunked] / middle[whole]:.2f}   "
            f"(target {'about ' if head == 'frozen' else ''}{limit})"
        )


if __name__ == "__main__":
    main()
