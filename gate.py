"""What must be true before the first step: data, images, LoRA and gradients, one line a claim.

    gate: ok  all 3,000 demonstrations are valid
    gate: ok  supervised tokens decode to the responses
    gate: ok  a row's image tokens equal its image features
    gate: ok  LoRA trains the 196 linear maps of the language model and nothing else
    gate: ok  the shortest row, 212 tokens, goes forward and backward
    gate: ok  the last response has the plain row's log-probability

A wrong mask or a wrong image raises no error in training; the model is only worse. A claim that
does not hold on one rank ends the run on all. dpo.py adds two: policy equals reference, first loss
ln 2; and reference.gate_drift, where the sampler's log-probabilities are known.

Where we depart from the paper, or it is silent: it has no such check.
"""

import math
import unicodedata
from collections.abc import Callable, Sequence

import torch
from torch import nn
from tqdm import tqdm

import data
import model
import train

SHORT = 100  # ours: a chain of fewer tokens has the tolerance of so many


def check_claim(claim: str, holds: bool, otherwise: str) -> None:
    """One line of the gate: a claim that must hold on every rank, or all of them end
    (train.refuse). A collective."""
    against = train.all_gather([] if holds else [otherwise])
    train.print0(f"  gate: {'NOT' if against else 'ok '} {claim}")
    if against:
        train.refuse(train.Refused(f"gate: {claim}: false; {against[0]}"))


def gate_rows(
    path: str,
    what: str,
    rows: Sequence[tuple[str, object, list[str]]],
    encode: Callable[[object], model.Row],
    keep: Callable[[model.Row], object],
    processor: model.Processor,
) -> list:
    """Encodes every row once, each rank its share of them, and decodes its supervised tokens again.
    what: what the rows are called; rows: (id, row, its responses). Returns keep(encoded row) of
    each. A collective."""
    kept, invalid, different = [], [], []
    own = range(train.rank(), len(rows), train.world_size())
    for index in tqdm(own, f"checking {what}", disable=train.rank() > 0):
        name, row, responses = rows[index]
        try:
            encoded = encode(row)
        except data.RowError as error:
            invalid.append((index, f"{name}: {error}"))
            continue
        kept.append((index, keep(encoded)))
        for segment, text in zip(encoded[1:], responses, strict=True):
            both = (processor.decode(segment.ids), text)
            found, wanted = (unicodedata.normalize("NFC", t) for t in both)  # as the tokenizers do
            if found != wanted:
                different.append((index, f"{name}: {found[:60]!r} instead of {wanted[:60]!r}"))
    claims = {
        f"all {len(rows):,} {what} are valid": (what, invalid),
        "supervised tokens decode to the responses": ("responses", different),
    }
    for claim, (of, faults) in claims.items():
        wrong = sorted(train.all_gather(faults))
        first = "; ".join(text for _, text in wrong[:3])
        check_claim(claim, not wrong, f"{path}: {len(wrong)} {of}: {first}")
    return [one for _, one in sorted(train.all_gather(kept))]


def gate_policy(
    policy: model.Policy,
    pictured: model.Row | None,
    shortest: model.Row,
    processor: model.Processor,
    with_lora: bool,
    device: torch.device,
) -> None:
    """Checks the policy, sharded on its device: the image features of `pictured`, a row with
    images, if there is any; what LoRA trains; and a step on the shortest row. A collective."""
    if pictured:
        images = pictured[0].images
        pixels = torch.cat([image.pixels for image in images]).to(device)
        grids = [image.grid for image in images]
        with torch.no_grad():
            features = len(policy.image_features(pixels, grids))
        tokens = pictured[0].ids.count(policy.image_id)
        message = f"{tokens} tokens, {features} features"
        message += "; use the pixel settings and the processor of this checkpoint"
        check_claim("a row's image tokens equal its image features", tokens == features, message)
    if with_lora:
        text = policy.language_model
        language = next(name for name, module in policy.named_modules() if module is text)
        linears = [name for name, module in text.named_modules() if isinstance(module, nn.Linear)]
        linears = {f"{language}.{name.removesuffix('.base')}" for name in linears}
        learnt = {name.rpartition(".")[0] for name in train.trained_parameters(policy)}
        claim = f"LoRA trains the {len(linears)} linear maps of the language model and nothing else"
        check_claim(claim, learnt == linears, f"these differ: {sorted(learnt ^ linears)[:3]}")
    gate_step(policy, shortest, processor, device)


def gate_step(
    policy: model.Policy, row: model.Row, processor: model.Processor, device: torch.device
) -> None:
    """Every rank runs the same row forward and backward: the loss and all gradients must be finite.
    Then its last response, alone behind the prompt, must have the same log-probability the plain
    way: in Stage II it is a branch beside others, so a tree equals a plain row. Gradients are
    cleared afterwards. A collective."""
    batch = model.collate([row], processor).to(device)
    logp = policy(batch)
    loss = -logp.sum()
    loss.backward()
    loss = loss.item()
    grads = [p.grad for p in train.trained_parameters(policy).values() if p.grad is not None]
    finite = [bool(train.local_tensor(grad).isfinite().all()) for grad in grads]
    policy.zero_grad(set_to_none=True)
    claim = f"the shortest row, {batch.ids.numel()} tokens, goes forward and backward"
    message = (
        f"its -log p is {loss}; {finite.count(False)} of {len(finite)} gradients are not finite"
    )
    check_claim(claim, math.isfinite(loss) and finite != [] and all(finite), message)
    tokens, alone = len(row[-1].ids), [row[0], row[-1]]
    with train.forward_only(policy):
        plain = policy(model.collate([alone], processor).to(device), plain=True).sum()
    off = abs(float(logp[0, -tokens:].detach().sum() - plain))
    claim = "the last response has the plain row's log-probability"
    check_claim(claim, off <= tolerance(tokens, device), f"it is off by {off:.4f}")


def tolerance(tokens: int, device: torch.device) -> float:
    """How far two values of log pi(y|x), computed by the same weights, may differ.

    The rounding errors of the tokens are small and of either sign, so they add up like a random
    walk: with the square root of the length. This holds for any micro-batch: beside other rows a
    token has another rounding error, of the same size. Chains of up to SHORT tokens have the limit
    of SHORT: in a few tokens one large error is not averaged out.
    """
    a_token = 1e-4 if device.type == "cpu" else 2e-2  # ours: rounding in fp32, and in bf16
    return a_token * math.sqrt(max(tokens, SHORT))
