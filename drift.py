"""Does the trainer compute what the sampler sampled from? The drift of their log-probabilities.

    drift = sum over chains of [log pi_trainer(y | x) - log pi_sampler(y | x)] / sum of their tokens

Stage II trains on token ids that an engine sampled: its reference is the model that sampled only if
both see the same weights, the same pixels and the same positions. They are two programs, so this is
measured: engines tell the log-probability of what they sample (engines.py), rollout.py and judge.py
carry it along, and the reference pass computes it again.

The difference of one token tells little: in bf16 the trainer differs from itself in another batch
shape by tenths of a nat. But rounding has no sign and averages out, while another model or another
picture makes what was sampled less likely: the *signed mean a token* goes below zero. We measured
it in the miniature, nats a token:

    trainer against sampler                 signed mean    mean absolute
    the same, in bf16                          0.0000          .001
    the image at half its resolution          -.0076           .013
    positions in one dimension, not three     -.0084           .017
    sampler told them after T = 0.7            -.011           .021
    Stage II's weights for Stage I's           -.110           .130
    another image                              -.131           .146

Where we depart from the paper, or it is silent: it does not say that it checked.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import data

# ours: nats a token. In bf16 between what is published of vLLM against trainers (-.0015) and the
# smallest fault of the table. In fp32 an honest pair differs by rounding alone: measured, < 2e-6
# with hf: and up to 3.4e-5 with vllm: on a CPU, over 15 chains of 24 tokens.
LIMIT_BF16, LIMIT_FP32 = 0.005, 1e-4


@dataclass(frozen=True)
class Chain:
    """One response, computed twice: log p of all its tokens in nats, and of each where told."""

    sampler: float
    trainer: float
    tokens: int
    sampler_tokens: list[float] | None = None
    trainer_tokens: list[float] | None = None


@dataclass(frozen=True)
class Drift:
    """Nats a token, trainer minus sampler. sd: of the chains' own means, None for a single chain.
    absolute: mean over tokens, None where no chain has them."""

    mean: float
    sd: float | None
    absolute: float | None
    chains: int
    tokens: int


def chains_of(
    pairs: Sequence[dict], values: Sequence[Sequence[float]]
) -> dict[tuple[int, int], Chain]:
    """The chains of rows of pairs.jsonl whose sampler told their log-probabilities, each once, by
    (row, side), chosen 0 and rejected 1. values: of each row, the trainer's log p of the two."""
    found, seen = {}, set()
    for index, (row, trainer) in enumerate(zip(pairs, values, strict=True)):
        for side, name in enumerate(("chosen", "rejected")):
            ids, sampler = row.get(f"{name}_token_ids"), row.get(f"{name}_logp")
            # without ids the trainer has other tokens
            if ids and sampler is not None and (chain := (row["id"], *ids)) not in seen:
                seen.add(chain)
                told = row.get(f"{name}_token_logps")
                found[index, side] = Chain(sampler, trainer[side], len(ids), told)
    return found


def compare(chains: list[Chain]) -> Drift:
    """The drift over one chain or more."""
    tokens = sum(chain.tokens for chain in chains)
    apart = [chain.trainer - chain.sampler for chain in chains]
    means = [difference / chain.tokens for difference, chain in zip(apart, chains)]
    single = [
        abs(trainer - sampler) for chain in chains if chain.sampler_tokens and chain.trainer_tokens
        for sampler, trainer in zip(chain.sampler_tokens, chain.trainer_tokens, strict=True)
    ]  # fmt: skip
    return Drift(
        math.fsum(apart) / tokens, statistics.stdev(means) if len(means) > 1 else None,
        statistics.fmean(single) if single else None, len(chains), tokens,
    )  # fmt: skip


def floor(chains: list[Chain]) -> Drift:
    """The trainer against itself, of chains that it computed token by token as well, in another
    shape of a batch. Less than this no comparison with a sampler can tell."""
    return compare([
        Chain(chain.trainer, sum(chain.trainer_tokens), chain.tokens) for chain in chains
    ])  # fmt: skip


def told(drift: Drift) -> str:
    """A drift in one line."""
    sd = "" if drift.sd is None else f", SD {drift.sd:.1e}"
    absolute = "" if drift.absolute is None else f", mean absolute {drift.absolute:.1e}"
    return f"{drift.mean:+.1e} a token{sd} over {drift.chains} chains{absolute}"


def check(drift: Drift, limit: float, where: str) -> None:
    """Raises RowError, naming `where`, if the drift is beyond the limit or is no number."""
    if abs(drift.mean) <= limit:
        return
    raise data.RowError(
        f"{where}: trainer and sampler do not agree on log p of what was sampled: {told(drift)}, "
        f"and {limit:g} is the limit. They differ in weights, images, --pixels or --tiles, or the "
        "sampler told log-probabilities after temperature and top-p; sample again from the "
        "checkpoint that is trained, with the settings of training. Where only the precision is "
        f"another, bf16 and fp32, --max-drift {LIMIT_BF16} is the limit"
    )
