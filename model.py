"""The policy: Qwen2.5-VL and InternVL3, and a function from a batch to log-probabilities.

    log pi(y | x) = sum over t of log p(y_t | x, y_<t)      all that SFT (paper 3.2) and DPO need

    plain_log_probs   the equation, as plainly as it can be written: the oracle of all that follows
    Family            what differs between the two base models: image tokens, positions, names
    Processor         messages and images -> token ids; a response -> token ids and span labels
    Segment, Row      a row is a *tree* of segments: prompt -> response (SFT), prompt -> the chains
                      that a question's pairs compare (DPO), system turn -> prompts -> responses
                      (SFT with --pack)
    collate           rows -> Batch. Token i sees token j iff j <= i and j's segment is i's own or
                      an ancestor of it
    Policy            Batch -> (B, T) log-probabilities

What makes it fast is in attention.py; folders of weights are in hub.py.

Letters in shapes: B rows, T tokens of the longest row, D width, V vocabulary, N supervised tokens;
in DPO K responses of a row and E pairs.

Where we depart from the paper, or it is silent:
  1. At most 768 x 768 pixels for Qwen, one 448 tile for InternVL (LLaMA-Factory's settings; the
     paper names none), the same in rollouts, training and evaluation.
  2. Chat templates are written out here and tested against the tokenizer's own.
  3. Nothing is ever truncated. A row that is too long is dropped by its stage, and counted.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import data
from attention import (
    LOGIT_CHUNK,
    SEGMENT_ATTENTION,
    TREE_ATTENTION,
    ChunkedLogProbs,
    segment_attention,
    segment_layout,
    tree_attention,
)
from command.images import load_image

MAX_PIXELS = 768 * 768  # ours: paper silent (LLaMA-Factory's image_max_pixels)
TILES = 1  # ours: paper silent (LLaMA-Factory trains InternVL on one tile an image)


def plain_log_probs(hidden: Tensor, weight: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    """log p(y_t | x, y_<t) of causal rows. hidden (B, T, D), the head's weight (V, D), ids and
    labels (B, T) -> (B, T), 0 where a token is not supervised. Trees and chunked log-probs
    (attention.py) equal this, without the (B, T, V) logits."""
    wide = torch.promote_types(hidden.dtype, torch.float32)  # bf16 logits are not enough
    logits = hidden.to(wide) @ weight.to(wide).T
    logp = logits.log_softmax(-1)[:, :-1]  # position t - 1 predicts token t
    logp = logp.gather(-1, ids[:, 1:, None])[..., 0]
    return F.pad(logp, (1, 0)) * (labels > 0)


@dataclass(frozen=True)
class Family:
    """What a base model's architecture fixes. Names of modules are the Hugging Face model's."""

    image_token: str  # repeated once for each feature of an image
    before_image: str
    after_image: str
    # the vision tower and, below, the map into the language model's width: frozen in both stages
    vision: str
    projector: str
    # Qwen: images of any size in patches, whose positions are (time, row, column). InternVL: tiles
    # of one size, whose positions count like text
    grid_positions: bool
    texts: tuple[str, ...]  # the model_types its language model may have


FAMILIES = {
    "qwen2_5_vl": Family(
        "<|image_pad|>", "<|vision_start|>", "<|vision_end|>",
        "model.visual", "model.visual.merger", True, ("qwen2_5_vl_text",),
    ),
    # the -hf form's template puts a newline after each image; the 9B's language model is a Llama
    "internvl": Family(
        "<IMG_CONTEXT>", "<img>", "</img>\n",
        "model.vision_tower", "model.multi_modal_projector", False, ("qwen2", "llama"),
    ),
}  # fmt: skip
TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"  # both families: Qwen2.5's chat format


@contextmanager
def reading(what: str | Path) -> Iterator[None]:
    """An error while a file of a model's folder is read becomes a RowError that names the file."""
    try:
        yield
    except Exception as error:  # json, tokenizers, safetensors and others have their own
        message = f"{what}: cannot be read ({error}); copy or download it again"
        raise data.RowError(message) from None


def load_config(folder: str | Path):
    """The config of a Hugging Face folder. Raises RowError for no model, or none of a known family.

    Whether the output head is tied to the embedding is read from config.json as it stands, and set
    in both places where a reader may look. transformers' own default would tie the head of
    InternVL, whose published folders hold one of its own.
    """
    from transformers import AutoConfig

    path = Path(folder) / "config.json"
    if path.with_name("adapter_config.json").exists():
        raise data.RowError(f"{folder} is a LoRA adapter; give the merged checkpoint beside it")
    if not path.exists():
        message = "it has no config.json; nothing is downloaded here, see docs/running.md"
        raise data.RowError(f"{folder} is not a model's folder: {message}")
    with reading(path):
        stored = dict(json.loads(path.read_text(encoding="utf-8")))
    if (kind := str(stored.get("model_type"))) not in FAMILIES:
        message = f"{path}: model_type {stored.get('model_type')!r} is not supported; "
        message += f"give a model of {sorted(FAMILIES)} (InternVL in its -hf form)"
        if kind == "internvl_chat":  # InternVL as first published, with code of its own
            message += (
                f"; or, only to ask it, `vllm serve {folder} --trust-remote-code` on a machine "
            )
            message += f"of its own and http://HOST:8000/v1#{folder}; docs/models.md says more"
        raise data.RowError(message)
    with reading(path):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        text = stored.get("text_config") or {}
        # untied where neither says it: if that is wrong, Checkpoint names the head as missing
        tied = stored.get("tie_word_embeddings", text.get("tie_word_embeddings", False))
        config.tie_word_embeddings = config.text_config.tie_word_embeddings = tied
    check_text(config, path)
    return config


def check_text(config, path: Path) -> None:
    """Raises RowError for a language model that would be computed wrong, or not at all."""
    kind, known = config.text_config.model_type, FAMILIES[config.model_type].texts
    if kind not in known:
        raise data.RowError(
            f"{path}: text_config: model_type {kind!r} is not supported; "
            f"give a model whose language model is one of {sorted(known)}"
        )
    kinds = set(getattr(config.text_config, "layer_types", None) or ()) - {"full_attention"}
    if kinds:  # every layer gets the same mask here
        raise data.RowError(
            f"{path}: text_config: layers with {sorted(kinds)[0]} are not supported; "
            "give a model whose layers all see the whole text (use_sliding_window false)"
        )


# --------------------------------------------------------------------------------------------------
# Encoding: text and images to segments


@dataclass
class ImageInput:
    """One preprocessed image. pixels: (patches, 1176) for Qwen, (tiles, 3, 448, 448) for InternVL.
    grid: (time, rows, columns) of the features; tokens: their number."""

    pixels: Tensor
    grid: tuple[int, int, int]
    tokens: int


@dataclass
class Segment:
    """Tokens with one label each (0 = not supervised). parent: index of the earlier segment of the
    row that it continues, None for a root. branch: in DPO the number of its response, from 1."""

    ids: list[int]
    labels: list[int]
    parent: int | None = None
    branch: int = 0
    images: list[ImageInput] = field(default_factory=list)


Row = list[Segment]


def image_processor(folder: str | Path, grid_positions: bool, max_pixels: int, tiles: int):
    """Hugging Face's image processor (PIL): images of at most so many pixels (Qwen) or tiles."""
    from transformers.models.got_ocr2 import image_processing_pil_got_ocr2 as internvl
    from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl as qwen

    kind = qwen.Qwen2VLImageProcessorPil if grid_positions else internvl.GotOcr2ImageProcessorPil
    with reading(Path(folder) / "preprocessor_config.json"):
        images = kind.from_pretrained(folder)
    if grid_positions:
        shortest = min(images.size["shortest_edge"], max_pixels)  # both "edges" count pixels
        images.size = {"shortest_edge": shortest, "longest_edge": max_pixels}
    else:
        images.crop_to_patches, images.min_patches, images.max_patches = tiles > 1, 1, tiles
    return images


class Processor:
    """Tokenizer, image processor and chat format of one checkpoint: all token ids are made here."""

    def __init__(self, folder: str | Path, max_pixels: int = MAX_PIXELS, tiles: int = TILES):
        from transformers import AutoTokenizer

        self.folder = str(folder)
        self.config = load_config(folder)
        self.family = FAMILIES[self.config.model_type]
        with reading(f"{folder}: its tokenizer (tokenizer.json and others)"):
            self.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            vocabulary = self.tokenizer.get_vocab()
        self.images = image_processor(folder, self.family.grid_positions, max_pixels, tiles)
        added = self.tokenizer.added_tokens_decoder.items()
        self.special = {token.content: index for index, token in added if token.special}
        for token in (TURN_START, TURN_END, self.family.image_token):
            if token not in vocabulary:
                message = f"its tokenizer has no {token!r}, as {self.config.model_type} has"
                raise data.RowError(f"{folder}: {message}; copy the model's own tokenizer")
            self.special[token] = vocabulary[token]
        self.stop_id = self.special[TURN_END]
        self.image_id = self.special[self.family.image_token]

    def encode_image(self, image: Image.Image) -> ImageInput:
        """Resizes and cuts into patches with Hugging Face's processor, and counts the features."""
        prepared = self.images(images=[image], return_tensors="pt")
        if self.family.grid_positions:
            merge = self.config.vision_config.spatial_merge_size
            time, height, width = prepared["image_grid_thw"][0].tolist()
            grid = (time, height // merge, width // merge)
            return ImageInput(prepared["pixel_values"], grid, grid[0] * grid[1] * grid[2])
        pixels = prepared["pixel_values"]  # (tiles, 3, side, side)
        vision = self.config.vision_config
        side = int(pixels.shape[-1] // vision.patch_size[0] * self.config.downsample_ratio)
        return ImageInput(pixels, (1, len(pixels) * side, side), len(pixels) * side * side)

    def encode_file(self, path: str | Path) -> ImageInput:
        """`load_image` and `encode_image`. Raises RowError naming the file."""
        image = load_image(path)
        try:
            return self.encode_image(image)
        except ValueError as error:  # Qwen refuses pictures over 200 times as long as wide
            message = f"cannot be cut into patches ({error}); crop or remove it"
            raise data.RowError(f"{path}: {message}") from None

    def refuse_special(self, text: str, where: str) -> None:
        """Raises RowError for a text with a special token, which would be read as structure."""
        planted = [token for token in self.special if token in text]
        if planted:
            raise data.RowError(f"the {where} contains the special token {planted[0]!r}; remove it")

    def tokenize(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def render(self, messages: list[dict], image_tokens: list[int]) -> str:
        """The prompt as one string, up to the response. Images stand where the user turn's parts
        have them, or in front of its text."""
        family, text, waiting = self.family, "", list(image_tokens)
        for message in messages:
            text += f"{TURN_START}{message['role']}\n"
            for part in data.parts_of(message, len(waiting)):
                if part["type"] == "image":
                    tokens = family.image_token * waiting.pop(0)
                    text += family.before_image + tokens + family.after_image
                else:
                    self.refuse_special(part["text"], f"{message['role']} text")
                    text += part["text"]
            text += f"{TURN_END}\n"
        return text + f"{TURN_START}assistant\n"

    def encode_prompt(self, messages: list[dict], images: list[ImageInput]) -> Segment:
        """The unsupervised root of a row, tokenised on its own: no token spans prompt and
        response."""
        ids = self.tokenize(self.render(messages, [image.tokens for image in images]))
        tokens, features = ids.count(self.image_id), sum(image.tokens for image in images)
        if tokens != features:
            raise data.RowError(f"{tokens} image tokens for {features} features")
        return Segment(ids, [data.PROMPT] * len(ids), images=images)

    def encode_response(self, response: str, parent: int = 0) -> Segment:
        """A supervised segment: the response's tokens, each labelled by its span, and the end of
        the turn. The response is tokenised as a whole. A model may sample the same text as other
        tokens: rollouts keep their ids."""
        self.refuse_special(response, "response")
        encoded = self.tokenizer(response, add_special_tokens=False, return_offsets_mapping=True)
        labels = data.label_spans(response, [start for start, _ in encoded["offset_mapping"]])
        return Segment(encoded["input_ids"] + [self.stop_id], labels + [data.TAG], parent)

    def encode_tokens(self, ids: list[int], branch: int = 0) -> Segment:
        """A supervised segment of a chain's token ids, which no loss needs the spans of."""
        return Segment(list(ids), [data.TAG] * len(ids), 0, branch)

    def decode(self, ids: list[int]) -> str:
        """The text of a response, without the end-of-turn token."""
        kept = ids[:-1] if ids and ids[-1] == self.stop_id else ids
        whole = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
        return self.tokenizer.decode(kept, **whole)

    def save(self, folder: str | Path) -> None:
        self.tokenizer.save_pretrained(folder)
        self.images.save_pretrained(folder)
        more = ("processor_config.json", "video_preprocessor_config.json", "chat_template.json")
        for name in more:  # other programs may want them
            if (Path(self.folder) / name).exists():
                shutil.copyfile(Path(self.folder) / name, Path(folder) / name)


# --------------------------------------------------------------------------------------------------
# Batches of tree rows


# (start, stop, seen): a run of segments, each the parent of the next; seen has the (start, stop) of
# the ancestors before it. A pair is two: prompt and first chain, which sees nothing else, and
# second chain, which sees the prompt
Stretch = tuple[int, int, tuple[tuple[int, int], ...]]


@dataclass
class Batch:
    """Rows padded on the right to one length. tree: each row as stretches of tokens, or None if
    every row is one stretch: then causal attention is enough, since padding comes last.

    All that a step must know as a number is worked out here, on the CPU: a number that is read from
    the GPU makes the CPU wait for it."""

    ids: Tensor  # (B, T) long
    labels: Tensor  # (B, T) long, 0 = not supervised
    supervised: Tensor  # (2, N) long, row and column of each supervised token
    predecessor: Tensor  # (N,) long, the column whose hidden state predicts that token
    branch: Tensor  # (B, T) long, the response that a token belongs to, from 1; 0: prompts, SFT
    positions: Tensor  # (3, B, T) long, time / row / column; all three equal for text
    tree: list[list[Stretch]] | None
    pixels: Tensor | None  # the images of all rows, in order
    grids: list[tuple[int, int, int]]  # of each image, merged patches
    row_weights: Tensor  # (B,) float, 1, or 0 for a row that only keeps this rank in step
    branches: int  # in DPO the most responses of a row, else 0
    # DPO: (B, K) float, log pi_ref of each response, 0 where a row has fewer
    reference: Tensor | None = None
    # DPO: (3, E) long, of each pair its row, and the chosen and rejected response, from 0
    edges: Tensor | None = None

    def to(self, device: torch.device) -> "Batch":
        moved = {
            f.name: value.to(device, non_blocking=True)
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), Tensor)
        }
        return replace(self, **moved)


def segment_positions(
    segment: Segment, start: int, image_id: int, grid_positions: bool
) -> tuple[list[tuple[int, int, int]], int]:
    """(time, row, column) of each token, and the position that the next segment starts at.

    Text advances by one. With grid positions (M-RoPE) an image's tokens share one time and spread
    over rows and columns, and the text goes on from the larger side. Without, image tokens count
    like text."""
    positions, grids, index, now = [], iter(segment.images), 0, start
    while index < len(segment.ids):
        if grid_positions and segment.ids[index] == image_id:
            image = next(grids)
            _, rows, columns = image.grid
            cells = ((row, column) for row in range(rows) for column in range(columns))
            positions += [(now, now + row, now + column) for row, column in cells]
            index += image.tokens
            now += max(rows, columns)
        else:
            positions.append((now, now, now))
            index += 1
            now += 1
    return positions, now


def collate(rows: list[Row], processor: Processor, weights: list[float] | None = None) -> Batch:
    """Rows (trees) to one batch. In a row a parent comes before its children, and the first token
    of a root is not supervised, since nothing predicts it."""
    shape = len(rows), max(sum(len(segment.ids) for segment in row) for row in rows)
    ids, labels, branch, predecessor = (torch.zeros(shape, dtype=torch.long) for _ in range(4))
    positions = torch.zeros(3, *shape, dtype=torch.long)
    grid_positions, tree = processor.family.grid_positions, []
    for b, row in enumerate(rows):
        stretches: list[Stretch] = []
        # of each segment: the position after it, and where it and its ancestors lie
        nexts, paths, at = [], [], 0
        for s, segment in enumerate(row):
            parent, stop = segment.parent, at + len(segment.ids)
            begin, path = (0, ()) if parent is None else (nexts[parent], paths[parent])
            ids[b, at:stop] = torch.tensor(segment.ids)
            labels[b, at:stop] = torch.tensor(segment.labels)
            branch[b, at:stop] = segment.branch
            predecessor[b, at:stop] = torch.arange(at - 1, stop - 1)
            predecessor[b, at] = path[-1][1] - 1 if path else at
            places, end = segment_positions(segment, begin, processor.image_id, grid_positions)
            positions[:, b, at:stop] = torch.tensor(places).T
            nexts.append(end)
            paths.append((*path, (at, stop)))
            if s and parent == s - 1:  # it goes on where its parent ends: one stretch
                start, _, seen = stretches.pop()
                stretches.append((start, stop, seen))
            else:
                stretches.append((at, stop, path))
            at = stop
        tree.append(stretches)
    images = [image for row in rows for segment in row for image in segment.images]
    supervised = (labels > 0).nonzero().T
    return Batch(
        ids,
        labels,
        supervised,
        predecessor[*supervised],
        branch,
        positions,
        tree=tree if any(len(stretches) > 1 for stretches in tree) else None,
        pixels=torch.cat([image.pixels for image in images]) if images else None,
        grids=[image.grid for image in images],
        row_weights=torch.tensor(weights if weights is not None else [1.0] * len(rows)),
        branches=int(branch.max()),
    )


# --------------------------------------------------------------------------------------------------
# The policy


class Policy(nn.Module):
    """A Hugging Face model as a function Batch -> (B, T) float32: log p of each supervised token, 0
    elsewhere. Always in eval mode: dropout would make policy and reference differ."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.family = FAMILIES[model.config.model_type]
        self.image_id = model.config.image_token_id
        self.checkpoint = None  # hub.Checkpoint: the files with the values of what is on `meta`
        from transformers import AttentionInterface

        # transformers makes no mask for an attention function that it does not know
        AttentionInterface.register(TREE_ATTENTION, tree_attention)
        self.language_model.config._attn_implementation = TREE_ATTENTION
        if self.family.grid_positions:
            AttentionInterface.register(SEGMENT_ATTENTION, segment_attention)
            self.vision.config._attn_implementation = SEGMENT_ATTENTION
        super().train(False)

    def train(self, mode: bool = True) -> "Policy":
        """Keeps eval mode: gradients do not need training mode, and dropout must stay off."""
        return super().train(False)

    @property
    def vision(self) -> nn.Module:
        return self.model.get_submodule(self.family.vision)

    @property
    def projector(self) -> nn.Module:
        return self.model.get_submodule(self.family.projector)

    @property
    def language_model(self) -> nn.Module:
        return self.model.model.language_model

    def freeze_vision(self) -> None:
        """As in both stages (LLaMA-Factory's default; paper silent)."""
        self.vision.requires_grad_(False)
        self.projector.requires_grad_(False)

    def image_features(self, pixels: Tensor, grids: list[tuple[int, int, int]]) -> Tensor:
        """Features of all images in order, (image tokens, D). A frozen tower keeps no gradient."""
        towers = [*self.vision.parameters(), *self.projector.parameters()]
        trained = any(parameter.requires_grad for parameter in towers)
        with torch.set_grad_enabled(torch.is_grad_enabled() and trained):
            pixels = pixels.to(towers[0].dtype)
            if self.family.grid_positions:
                layout = segment_layout(self.vision.config, grids, pixels.device)
                return self.vision(pixels, **layout).pooler_output
            return self.model.model.get_image_features(pixels).pooler_output.flatten(0, 1)

    def embed(self, ids: Tensor, features: Tensor | None) -> Tensor:
        """Token embeddings with image features in the image tokens' places. (B, T, D)"""
        embedded = self.language_model.embed_tokens(ids)
        if features is None:
            return embedded
        places = (ids == self.image_id)[..., None]
        return embedded.masked_scatter(places, features.to(embedded.dtype))

    def hidden_states(self, batch: Batch) -> Tensor:
        """The language model's last hidden states. (B, T, D)"""
        features = None if batch.pixels is None else self.image_features(batch.pixels, batch.grids)
        return self.language_model(
            inputs_embeds=self.embed(batch.ids, features),
            position_ids=batch.positions if self.family.grid_positions else batch.positions[0],
            attention_mask=None,  # what a token sees is in the tree
            use_cache=False,
            tree=batch.tree,
        ).last_hidden_state

    def forward(self, batch: Batch, plain: bool = False) -> Tensor:
        """plain: rows of one response, by plain_log_probs."""
        hidden, weight = self.hidden_states(batch), self.model.lm_head.weight
        if plain:
            return plain_log_probs(hidden, weight, batch.ids, batch.labels)
        rows, columns = batch.supervised  # N supervised tokens
        before, chunk = hidden[rows, batch.predecessor], LOGIT_CHUNK[hidden.device.type]  # (N, D)
        logp = ChunkedLogProbs.apply(before, weight, batch.ids[rows, columns], chunk)
        out = torch.zeros(batch.ids.shape, dtype=logp.dtype, device=logp.device)
        return out.index_put((rows, columns), logp)  # (B, T)
