"""Sampling from a policy by hand: y_1 ... y_n ~ M(. | q, I) with a KV cache, n answers of a question as one tree row.

    u_t ~ U[0, 1) from the sample's own seed;   y_t = the token at which the cumulative distribution passes u_t

The prompt and its images are computed once; then every step feeds one token of each of the n branches, and a branch sees
the prompt and itself (the rule of model.py's tree rows). The prompt's keys and values are held once instead of n times.
vLLM samples the same distribution much faster; this is what it does, in a page, and what runs where vLLM does not.

Where we depart from the paper, or it is silent:
  1. It samples with vLLM. Temperature and top-p are explained where they are flags (rollout.py, evaluate.py).
  2. Special tokens other than the end of the turn are never sampled: a sampled image token would break training later.
"""

import torch
from torch import Tensor

import model
from model import Policy, Processor, Segment


def uniforms(seed: int, count: int) -> Tensor:
    """The random numbers of one sample, one a token, in [0, 1): drawn from its seed alone, on the CPU."""
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def choose(logits: Tensor, draw: Tensor, temperature: float, top_p: float) -> Tensor:
    """One token of each row by inverting the cumulative distribution. logits (..., V), draw (...) in [0, 1) -> (...).

    top_p keeps the likeliest tokens whose mass before them is below top_p; the draw is scaled to what is kept.
    """
    if temperature == 0:
        return logits.argmax(-1)
    mass = torch.softmax(logits.float() / temperature, -1).double()
    tokens = None
    if top_p < 1:  # otherwise any order of the tokens will do, and sorting a vocabulary costs more than the rest
        mass, tokens = mass.sort(dim=-1, descending=True, stable=True)
    total = mass.cumsum(-1)  # (..., V)
    kept = ((total - mass) < top_p).sum(-1, keepdim=True) if top_p < 1 else torch.full_like(draw[..., None], logits.shape[-1], dtype=torch.long)
    ceiling = total.gather(-1, kept - 1)
    place = torch.searchsorted(total, draw[..., None] * ceiling, right=True).clamp_max(kept - 1)
    return (place if tokens is None else tokens.gather(-1, place))[..., 0]


class TreeCache:
    """Keys and values of every layer in one buffer each, filled from the left; transformers' attention calls `update`."""

    def __init__(self, room: int):
        self.room, self.used = room, 0
        self.layers: dict[int, list] = {}

    def update(self, key: Tensor, value: Tensor, layer: int, *_unused) -> tuple[Tensor, Tensor]:
        """key, value (rows, heads, new, d) -> all so far (rows, heads, used + new, d)"""
        if layer not in self.layers:
            shape = (*key.shape[:2], self.room, key.shape[3])
            self.layers[layer] = [key.new_empty(shape), value.new_empty(shape)]
        stop = self.used + key.shape[2]
        for buffer, new in zip(self.layers[layer], (key, value)):
            buffer[:, :, self.used : stop] = new
        return tuple(buffer[:, :, :stop] for buffer in self.layers[layer])

    def get_seq_length(self, layer: int = 0) -> int:
        return self.used

    def keep(self, rows: Tensor) -> None:
        """Drops the other rows."""
        self.layers = {layer: [buffer[rows] for buffer in buffers] for layer, buffers in self.layers.items()}


def decode_trees(policy: Policy, processor: Processor, prompts: list[Segment], draws: Tensor, temperature: float, top_p: float) -> list[list[list[int]]]:
    """n responses of each prompt. draws (R, n, max_tokens) -> token ids [R][n], ending with the stop token unless cut off.

    Rows are padded on the left. At step t a row feeds one token of each of its n branches; the cache then holds, after the
    prompt, the branches' tokens interleaved: step 0 of branches 0 ... n-1, step 1 of branches 0 ... n-1, and so on.
    """
    device, (rows, n, steps) = draws.device, draws.shape
    longest = max(len(prompt.ids) for prompt in prompts)
    ids = torch.zeros(rows, longest, dtype=torch.long)
    positions = torch.zeros(3, rows, longest, dtype=torch.long)
    real = torch.zeros(rows, longest, dtype=torch.bool)
    after = torch.zeros(rows, dtype=torch.long)  # the position of the first token sampled
    for r, prompt in enumerate(prompts):
        places, end = model.segment_positions(prompt, 0, processor.image_id, processor.family.grid_positions)
        start = longest - len(prompt.ids)
        ids[r, start:], real[r, start:], after[r] = torch.tensor(prompt.ids), True, end
        positions[:, r, start:] = torch.tensor(places).T
    ids, positions, real, after = (tensor.to(device) for tensor in (ids, positions, real, after))
    images = [image for prompt in prompts for image in prompt.images]
    features = None
    if images:
        grids = torch.tensor([image.grid for image in images], device=device)
        features = policy.image_features(torch.cat([image.pixels for image in images]).to(device), grids)

    banned = torch.zeros(policy.model.lm_head.weight.shape[0], dtype=torch.bool, device=device)
    banned[[index for index in processor.special.values() if index != processor.stop_id]] = True
    banned[len(processor.tokenizer) :] = True  # rows of the head beyond the vocabulary (padding of the real checkpoints)
    cache = TreeCache(longest + n * steps)

    def advance(embedded: Tensor, places: Tensor, mask: Tensor) -> Tensor:
        """New tokens (rows, new, D) through the language model; their logits' hidden states come back."""
        state = policy.language_model(
            inputs_embeds=embedded, position_ids=places if policy.family.grid_positions else places[0],
            attention_mask=mask, past_key_values=cache, use_cache=True,
        ).last_hidden_state  # fmt: skip
        cache.used += embedded.shape[1]
        return state

    # a padded query has nothing to look at, which softmax turns into nan: let it look at itself
    mask = (real[:, None, :] & torch.ones(longest, longest, dtype=torch.bool, device=device).tril()) | torch.eye(longest, dtype=torch.bool, device=device)
    hidden = advance(policy.embed(ids, features), positions, mask[:, None])[:, -1:].expand(-1, n, -1)  # (R, n, D)

    tokens = torch.full((rows, n, steps), -1, dtype=torch.long, device=device)
    alive = torch.arange(rows, device=device)  # rows still being sampled, by their first numbering
    done = torch.zeros(rows, n, dtype=torch.bool, device=device)
    own = torch.eye(n, dtype=torch.bool, device=device)
    for step in range(steps):
        logits = policy.model.lm_head(hidden).masked_fill(banned, float("-inf"))  # (R, n, V)
        chosen = choose(logits, draws[alive, :, step], temperature, top_p)  # (R, n)
        tokens[alive, :, step] = torch.where(done, -1, chosen)
        done |= chosen == processor.stop_id
        going = (~done.all(1)).nonzero()[:, 0]
        if len(going) == 0:
            break
        if len(going) <= 0.75 * len(alive):  # copying the cache costs about a step: do it when it pays
            cache.keep(going)
            alive, done, chosen, real, after = alive[going], done[going], chosen[going], real[going], after[going]
        branch = own.repeat(1, step + 1).expand(len(alive), -1, -1)  # (R, n, n * (step + 1))
        mask = torch.cat([real[:, None, :].expand(-1, n, -1), branch], -1)[:, None]  # (R, 1, n, longest + n * (step + 1))
        places = (after + step)[None, :, None].expand(3, -1, n)
        hidden = advance(policy.language_model.embed_tokens(chosen), places, mask)
    return [[[token for token in branch if token >= 0] for branch in row] for row in tokens.tolist()]
