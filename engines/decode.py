"""Sampling from a policy by hand: y_1 ... y_n ~ M(. | q, I) with a KV cache, n answers of a
question as one tree row.

    u_t ~ U[0, 1) from the sample's own seed
    y_t = the token at which the cumulative distribution passes u_t

The prompt and its images are computed once, and their keys and values held once. Then every step
feeds one token of each of the n branches, and a branch sees the prompt and itself (the rule of
model.py's tree rows). A question's answers are yielded when its last branch ends. vLLM samples the
same distribution much faster; this file shows how in a few pages, and runs where vLLM does not.

Each token comes with its log-probability, log softmax(logits)[y_t] in fp32 at temperature 1, over
the whole vocabulary, before a ban, temperature or top-p. The trainer computes the same quantity
(drift.py compares the two).

Where we depart from the paper, or it is silent:
  1. It samples with vLLM. rollout.py and evaluate.py explain temperature and top-p.
  2. Special tokens other than the end of the turn are never sampled: a sampled image token would
     break training later.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

import attention
import model
from model import Policy, Processor, Segment

LIKELIEST = 256  # ours: measured; top-p sorts so many tokens first, enough for most rows
COMPACT = 0.75  # ours: the cache is copied without ended rows when at most this share goes on; the
# copy costs about a step


def uniforms(seed: int, count: int) -> Tensor:
    """The random numbers of one sample, one a token, in [0, 1): from its seed alone, on the CPU."""
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def choose(logits: Tensor, draw: Tensor, temperature: float, top_p: float) -> Tensor:
    """One token of each row by inverting the cumulative distribution.

    logits (..., V), draw (...) in [0, 1) -> (...). top_p keeps the likeliest tokens whose mass
    before them is below top_p; the draw is scaled to what is kept.
    """
    if temperature == 0:
        return logits.argmax(-1)
    mass = torch.softmax(logits.float() / temperature, -1)
    if top_p == 1:  # any order of the tokens is right
        kept = torch.full_like(draw[..., None], mass.shape[-1], dtype=torch.long)
        return place_of(mass.double().cumsum(-1), draw, kept)
    return choose_likely(mass, draw, top_p, LIKELIEST)


def choose_likely(mass: Tensor, draw: Tensor, top_p: float, count: int) -> Tensor:
    """`choose` with top-p from mass (..., V). Sorting the vocabulary would cost more than the rest
    of a step, so only the `count` likeliest tokens are sorted, or more where these are too few."""
    count = min(count, mass.shape[-1])
    some, tokens = mass.topk(count)
    tokens, order = tokens.sort(
        -1
    )  # equally likely tokens stay in order, here and in the next line
    some, order = some.gather(-1, order).double().sort(dim=-1, descending=True, stable=True)
    total = some.cumsum(-1)
    kept = ((total - some) < top_p).sum(-1, keepdim=True)
    place = place_of(total, draw, kept)[..., None]
    chosen = tokens.gather(-1, order.gather(-1, place))[..., 0]
    # the rest matters only if the last sorted token is kept, or equals the last kept one
    short = some.gather(-1, kept - 1)[..., 0] <= some[..., -1]
    if count < mass.shape[-1] and short.any():
        chosen[short] = choose_likely(mass[short], draw[short], top_p, 16 * count)
    return chosen


def place_of(total: Tensor, draw: Tensor, kept: Tensor) -> Tensor:
    """The first place below `kept` at which the cumulative mass exceeds draw times the mass that is
    kept. total (..., K), draw (...), kept (..., 1) -> (...)"""
    ceiling = total.gather(-1, kept - 1)
    place = torch.searchsorted(total, draw[..., None] * ceiling, right=True)
    return place.clamp_max(kept - 1)[..., 0]


class TreeCache:
    """The KV cache: one buffer of keys and one of values for each layer, filled from the left and
    doubled when full, up to `limit` tokens a row. transformers' attention calls `update`."""

    def __init__(self, limit: int):
        self.limit, self.used = limit, 0
        self.layers: dict[int, list[Tensor]] = {}

    def update(self, key: Tensor, value: Tensor, layer: int, *_unused) -> tuple[Tensor, Tensor]:
        """key, value (rows, heads, new, d) -> all so far (rows, heads, used + new, d)"""
        buffers = self.layers.setdefault(layer, [key[:, :, :0], value[:, :, :0]])
        stop = self.used + key.shape[2]
        for index, new in enumerate((key, value)):
            if buffers[index].shape[2] < stop:
                more = min(2 * stop, self.limit) - buffers[index].shape[2]
                buffers[index] = F.pad(buffers[index], (0, 0, 0, more))
            buffers[index][:, :, self.used : stop] = new
        return buffers[0][:, :, :stop], buffers[1][:, :, :stop]

    def keep(self, rows: Tensor) -> None:
        """Drops the other rows, and the unused room."""
        for buffers in self.layers.values():
            buffers[:] = [buffer[:, :, : self.used][rows] for buffer in buffers]


def token_bytes(policy: Policy) -> int:
    """Bytes of one token in the cache: a key and a value of each layer's key-value heads."""
    config, weight = policy.language_model.config, policy.language_model.embed_tokens.weight
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = config.num_hidden_layers * config.num_key_value_heads
    return 2 * heads * head * weight.element_size()


def never_sampled(policy: Policy, processor: Processor, device: torch.device) -> Tensor:
    """Special tokens except the end of the turn, and the padding rows that published checkpoints
    have in their head beyond the vocabulary. (V,)"""
    banned = torch.zeros(policy.model.lm_head.weight.shape[0], dtype=torch.bool, device=device)
    special = processor.special.values()
    banned[[index for index in special if index != processor.stop_id]] = True
    banned[len(processor.tokenizer) :] = True
    return banned


def advance(
    policy: Policy, cache: TreeCache, embedded: Tensor, positions: Tensor, mask: Tensor | None
) -> Tensor:
    """Feeds new tokens to the language model, which adds their keys and values to the cache: their
    embeddings (R, new, D), positions (3, R, new), and which tokens of the cache each of them sees
    (R, 1, new, T), None for all before it. Returns their last hidden states (R, new, D)."""
    hidden = policy.language_model(
        inputs_embeds=embedded,
        position_ids=positions if policy.family.grid_positions else positions[0],
        attention_mask=mask,
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state
    cache.used += embedded.shape[1]
    return hidden


def responses(tokens: Tensor, logps: Tensor) -> list[tuple[list[int], list[float]]]:
    """tokens (n, steps), -1 after an end, and their log-probabilities (n, steps) -> n pairs"""
    lengths = (tokens >= 0).sum(1).tolist()
    branches = zip(tokens.tolist(), logps.tolist(), lengths)
    return [(ids[:length], values[:length]) for ids, values, length in branches]


@torch.inference_mode()
def decode_trees(
    policy: Policy,
    processor: Processor,
    prompts: list[Segment],
    draws: Tensor,
    temperature: float,
    top_p: float,
) -> Iterator[tuple[int, dict[int, list[tuple[list[int], list[float]]]]]]:
    """n responses of each prompt. draws (R, n, max_tokens). Yields after every step how many tokens
    it sampled, and {row: its n responses} of the rows whose last branch ended: token ids and their
    log-probabilities. A response ends with the stop token unless it is cut off.

    Prompts are padded on the right to length L. Each step feeds one token of each of a row's n
    branches. After the prompt, the cache holds the branches' tokens interleaved: step 0 of branches
    0 ... n-1, step 1 of branches 0 ... n-1, and so on.
    """
    device, (rows, n, steps) = draws.device, draws.shape
    batch = model.collate([[prompt] for prompt in prompts], processor).to(device)
    longest = batch.ids.shape[1]
    cache = TreeCache(longest + n * (steps - 1))  # the last token is not fed
    features = None if batch.pixels is None else policy.image_features(batch.pixels, batch.grids)
    hidden = advance(policy, cache, policy.embed(batch.ids, features), batch.positions, None)

    lengths = torch.tensor([len(prompt.ids) for prompt in prompts], device=device)
    real = torch.arange(longest, device=device) < lengths[:, None]  # (R, L), not padding
    alive = torch.arange(rows, device=device)  # rows still in the batch, by their index in prompts
    hidden = hidden[alive, lengths - 1][:, None].expand(-1, n, -1)  # (R, n, D)
    # a prompt ends in text, so the response goes on from its last position
    after = batch.positions[0, alive, lengths - 1] + 1

    banned = never_sampled(policy, processor, device)
    tokens = torch.full((rows, n, steps), -1, dtype=torch.long, device=device)
    logps = torch.zeros(rows, n, steps, device=device)
    done = torch.zeros(rows, n, dtype=torch.bool, device=device)
    own = torch.eye(n, dtype=torch.bool, device=device)
    for step in range(steps):
        # as in training: logits in fp32, and log sum exp before the ban
        logits = attention.wide_product(hidden.flatten(0, 1), policy.model.lm_head.weight)
        logits = logits.unflatten(0, hidden.shape[:2])  # (R, n, V)
        total = logits.logsumexp(-1)
        logits.masked_fill_(banned, float("-inf"))
        chosen = choose(logits, draws[alive, :, step], temperature, top_p)  # (R, n)
        tokens[alive, :, step] = torch.where(done, -1, chosen)
        found = logits.gather(-1, chosen[..., None])[..., 0]
        logps[alive, :, step] = (found - total).float()
        sampled, before = int((~done).sum()), ~done.all(1)
        done |= (chosen == processor.stop_id) | (step + 1 == steps)
        ended = alive[before & done.all(1)].tolist()
        yield sampled, {row: responses(tokens[row], logps[row]) for row in ended}
        going = ~done.all(1)
        if not going.any():
            return
        if going.sum() <= COMPACT * len(going):
            cache.keep(going)
            alive, done, chosen = alive[going], done[going], chosen[going]
            real, after = real[going], after[going]
        # a branch sees the prompt and its own tokens
        branch = own.repeat(1, step + 1).expand(len(alive), -1, -1)  # (R, n, n * (step + 1))
        mask = torch.cat([real[:, None, :].expand(-1, n, -1), branch], -1)[:, None]
        places = (after + step)[None, :, None].expand(3, -1, n)
        embedded = policy.language_model.embed_tokens(chosen)
        hidden = advance(policy, cache, embedded, places, mask)
