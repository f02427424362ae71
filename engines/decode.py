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
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional as F

import model
from model import Policy, Processor, Segment

LIKELIEST = 256  # ours: measured; top-p sorts so many tokens first, enough for most rows
DROPPED = 0.75  # ours: ended rows are dropped when this share of a batch is left; it costs a step


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
    every = torch.arange(mass.shape[-1], device=mass.device)
    some, tokens = mass, every.expand_as(mass)
    if count < len(every):
        some, tokens = mass.topk(count)
        tokens, order = tokens.sort(-1)  # of equal tokens the first comes first, here and below
        some = some.gather(-1, order)
    some, order = some.double().sort(dim=-1, descending=True, stable=True)
    total = some.cumsum(-1)
    kept = ((total - some) < top_p).sum(-1, keepdim=True)
    place = place_of(total, draw, kept)[..., None]
    chosen = tokens.gather(-1, order.gather(-1, place))[..., 0]
    # the rest matters only if the last sorted token is kept, or equals the last kept one
    short = some.gather(-1, kept - 1)[..., 0] <= some[..., -1]
    if count < len(every) and short.any():
        chosen[short] = choose_likely(mass[short], draw[short], top_p, 16 * count)
    return chosen


def place_of(total: Tensor, draw: Tensor, kept: Tensor) -> Tensor:
    """Where the cumulative mass total (..., K) passes draw (...) times the mass of its first kept
    (..., 1) places. (...)"""
    ceiling = total.gather(-1, kept - 1)
    place = torch.searchsorted(total, draw[..., None] * ceiling, right=True)
    return place.clamp_max(kept - 1)[..., 0]


class TreeCache:
    """One buffer of keys and one of values for each layer, filled from the left and doubled when
    full, up to `limit` tokens a row. transformers' attention calls `update`."""

    def __init__(self, limit: int):
        self.limit, self.used = limit, 0
        self.layers: dict[int, list[Tensor]] = {}

    def update(self, key: Tensor, value: Tensor, layer: int, *_unused) -> tuple[Tensor, Tensor]:
        """key, value (rows, heads, new, d) -> all so far (rows, heads, used + new, d)"""
        buffers = self.layers.setdefault(layer, [key[:, :, :0], value[:, :, :0]])
        stop = self.used + key.shape[2]
        for index, new in enumerate((key, value)):  # the old buffer is freed before the next
            if buffers[index].shape[2] < stop:
                room = min(2 * stop, self.limit)
                larger = new.new_empty(*new.shape[:2], room, new.shape[3])
                larger[:, :, : self.used] = buffers[index][:, :, : self.used]
                buffers[index] = larger
            buffers[index][:, :, self.used : stop] = new
        return buffers[0][:, :, :stop], buffers[1][:, :, :stop]

    def get_seq_length(self, layer: int = 0) -> int:
        return self.used

    def keep(self, rows: Tensor) -> None:
        """Drops the other rows, and the unused room."""
        for buffers in self.layers.values():
            for index in (0, 1):
                buffers[index] = buffers[index][:, :, : self.used][rows]


def token_bytes(policy: Policy) -> int:
    """Bytes of one token in the cache: a key and a value of each layer's key-value heads."""
    config, weight = policy.language_model.config, policy.language_model.embed_tokens.weight
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = config.num_hidden_layers * config.num_key_value_heads
    return 2 * heads * head * weight.element_size()


GROUPED_ATTENTION = "medee_grouped_attention"


def _grouped_attention(module, query, key, value, attention_mask, scaling=None, **_unused):
    """Attention of n new tokens to T in the cache: query (R, heads, n, d), key and value (R, fewer
    heads, T, d), mask (R, 1, n, T) -> (R, n, heads, d).

    With a mask, transformers repeats keys and values for all heads that share them. A CPU kernel
    shares them itself, with a bitwise equal result. CUDA's fast kernels cannot with a mask. (The
    keyword arguments are transformers' interface.)
    """
    if query.device.type == "cpu":
        how = {"scale": scaling, "enable_gqa": True}
        mixed = F.scaled_dot_product_attention(query, key, value, attention_mask, **how)
    else:
        mixed = stacked_attention(query, key, value, attention_mask, scaling)
    return mixed.transpose(1, 2), None


def stacked_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale) -> Tensor:
    """The same for kernels that want one key for each head: heads that share a key are stacked, as
    more queries of one head. (R, heads, n, d)"""
    share = query.shape[1] // key.shape[1]
    stacked = query.unflatten(1, (-1, share)).flatten(2, 3)  # (R, fewer heads, share * n, d)
    mask = mask.repeat(1, 1, share, 1)
    mixed = F.scaled_dot_product_attention(stacked, key, value, mask, scale=scale)
    return mixed.unflatten(2, (share, -1)).flatten(1, 2)


@contextmanager
def grouped_attention(policy: Policy) -> Iterator[None]:
    """Inside it the language model attends as above. No mask is registered, as in model.Policy."""
    from transformers import AttentionInterface

    AttentionInterface.register(GROUPED_ATTENTION, _grouped_attention)
    config = policy.language_model.config
    before, config._attn_implementation = config._attn_implementation, GROUPED_ATTENTION
    try:
        yield
    finally:
        config._attn_implementation = before


def padded(
    prompts: list[Segment], processor: Processor, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Prompts as rows padded on the left to length L: ids (R, L), positions (3, R, L), which tokens
    are real (R, L), and the position of the first sampled token (R,)."""
    rows, longest = len(prompts), max(len(prompt.ids) for prompt in prompts)
    ids, after = torch.zeros(rows, longest).long(), torch.zeros(rows).long()
    positions = torch.zeros(3, rows, longest).long()
    real = torch.zeros(rows, longest).bool()
    grid = processor.family.grid_positions
    for r, prompt in enumerate(prompts):
        places, end = model.segment_positions(prompt, 0, processor.image_id, grid)
        start = longest - len(prompt.ids)
        ids[r, start:], real[r, start:], after[r] = torch.tensor(prompt.ids), True, end
        positions[:, r, start:] = torch.tensor(places).T
    return ids.to(device), positions.to(device), real.to(device), after.to(device)


def image_features(policy: Policy, prompts: list[Segment], device: torch.device) -> Tensor | None:
    """Features of all prompts' images, in order; None if there is no image."""
    images = [image for prompt in prompts for image in prompt.images]
    if not images:
        return None
    grids = torch.tensor([image.grid for image in images], device=device)
    return policy.image_features(torch.cat([image.pixels for image in images]).to(device), grids)


def never_sampled(policy: Policy, processor: Processor, device: torch.device) -> Tensor:
    """Special tokens except the end of the turn, and the padding rows that published checkpoints
    have in their head beyond the vocabulary. (V,)"""
    banned = torch.zeros(policy.model.lm_head.weight.shape[0], dtype=torch.bool, device=device)
    special = processor.special.values()
    banned[[index for index in special if index != processor.stop_id]] = True
    banned[len(processor.tokenizer) :] = True
    return banned


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

    Rows are padded on the left. At step t a row feeds one token of each of its n branches. After
    the prompt, the cache holds the branches' tokens interleaved: step 0 of branches 0 ... n-1, step
    1 of branches 0 ... n-1, and so on.
    """
    device, (rows, n, steps) = draws.device, draws.shape
    ids, positions, real, after = padded(prompts, processor, device)
    longest = ids.shape[1]
    banned = never_sampled(policy, processor, device)
    cache = TreeCache(longest + n * (steps - 1))  # the last token is not fed

    def advance(embedded: Tensor, places: Tensor, mask: Tensor) -> Tensor:
        """New tokens (rows, new, D) through the language model; their logits' hidden states."""
        with grouped_attention(policy):
            state = policy.language_model(
                inputs_embeds=embedded,
                attention_mask=mask,
                past_key_values=cache,
                use_cache=True,
                position_ids=places if policy.family.grid_positions else places[0],
            ).last_hidden_state
        cache.used += embedded.shape[1]
        return state

    # a padded query sees no key, and softmax would give nan: it sees itself
    itself = torch.eye(longest, dtype=torch.bool, device=device)
    mask = (real[:, None, :] & torch.ones_like(itself).tril()) | itself
    embedded = policy.embed(ids, image_features(policy, prompts, device))
    hidden = advance(embedded, positions, mask[:, None])[:, -1:].expand(-1, n, -1)  # (R, n, D)

    tokens = torch.full((rows, n, steps), -1, dtype=torch.long, device=device)
    logps = torch.zeros(rows, n, steps, device=device)
    alive = torch.arange(rows, device=device)  # rows still in the batch, by their first number
    waited_for = set(range(rows))
    done = torch.zeros(rows, n, dtype=torch.bool, device=device)
    own = torch.eye(n, dtype=torch.bool, device=device)
    for step in range(steps):
        logits = policy.model.lm_head(hidden)  # (R, n, V)
        total = logits.float().logsumexp(-1)  # before the ban, as in training
        chosen = choose(
            logits.masked_fill_(banned, float("-inf")), draws[alive, :, step], temperature, top_p
        )  # (R, n)
        tokens[alive, :, step] = torch.where(done, -1, chosen)
        logps[alive, :, step] = logits.gather(-1, chosen[..., None])[..., 0].float() - total
        sampled = done.numel() - int(done.sum())
        done |= chosen == processor.stop_id
        ended = done.all(1) if step + 1 < steps else torch.ones_like(done[:, 0])
        new = waited_for & set(alive[ended].tolist())
        waited_for -= new
        yield sampled, {row: responses(tokens[row], logps[row]) for row in sorted(new)}
        if not waited_for:
            return
        if len(waited_for) <= DROPPED * len(alive):
            going = (~ended).nonzero()[:, 0]
            cache.keep(going)
            alive, done, chosen = alive[going], done[going], chosen[going]
            real, after = real[going], after[going]
        branch = own.repeat(1, step + 1).expand(len(alive), -1, -1)  # (R, n, n * (step + 1))
        mask = torch.cat([real[:, None, :].expand(-1, n, -1), branch], -1)[:, None]
        places = (after + step)[None, :, None].expand(3, -1, n)
        hidden = advance(policy.language_model.embed_tokens(chosen), places, mask)
