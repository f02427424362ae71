"""model.py against Hugging Face itself: its chat template, its image processors' arithmetic, its
position index, its forward."""

import copy
import json
import os
import re
import shutil
import unicodedata
from dataclasses import replace
from itertools import accumulate
from operator import itemgetter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from test_engines import tilt
from torch.profiler import ProfilerActivity, profile
from transformers.core_model_loading import revert_weight_conversion

import attention
import data
import hub
import memory
import model
import report.__main__
from engines import decode

# the published checkpoints' own templates; the test folders carry templates written by this project
PUBLISHED_TEMPLATE = {
    "qwen": (
        "{% set image_count = namespace(value=0) %}{% for message in messages %}"
        "{% if loop.first and message['role'] != 'system' %}"
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
        "<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}"
        "{{ message['content'] }}<|im_end|>\n{% else %}"
        "{% for content in message['content'] %}"
        "{% if content['type'] == 'image' or 'image' in content %}"
        "{% set image_count.value = image_count.value + 1 %}"
        "{% if add_vision_id %}Picture {{ image_count.value }}: {% endif %}"
        "<|vision_start|><|image_pad|><|vision_end|>{% elif 'text' in content %}"
        "{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "internvl": (
        "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n'}}"
        "{% if message['content'] is string %}{{ message['content'] }}"
        "{% else %}{% for content in message['content'] %}"
        "{% if content['type'] == 'image' %}{{ '<IMG_CONTEXT>\n' }}"
        "{% elif content['type'] == 'text' %}{{ content['text'] }}{% endif %}{% endfor %}"
        "{% endif %}{{'<|im_end|>\n'}}{% endfor %}"
        "{% if add_generation_prompt %}{{'<|im_start|>assistant\n' }}{% endif %}"
    ),
}
SYSTEM = "You are a helpful assistant."
SIZES = [(56, 56), (140, 84), (84, 196)]  # width, height: for Qwen 4, 15 and 21 image tokens
GOOD = "<think> The film shows two marks. So A. </think> <answer> (A) rest </answer>"
POOR = "<think> I guess. </think> <answer> B </answer>"


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(
        np.random.default_rng([seed, width, height]).integers(
            0, 256, (height, width, 3), dtype=np.uint8
        )
    )


def turns(text: str, system: str | None = SYSTEM) -> list[dict]:
    return ([{"role": "system", "content": system}] if system is not None else []) + [
        {"role": "user", "content": text}
    ]


def prompt_of(processor, text: str, pictures: list[Image.Image]) -> model.Segment:
    return processor.encode_prompt(
        turns(text), [processor.encode_image(image) for image in pictures]
    )


@pytest.fixture
def roomy(folder) -> model.Processor:
    """Images of several sizes: room for 200 x 200 pixels (Qwen), one tile (InternVL)"""
    return model.Processor(folder, max_pixels=200 * 200, tiles=1)


def fresh(folder):
    """The checkpoint as transformers loads it, untouched by this project"""
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="sdpa").eval()


def extras(processor, ids: torch.Tensor, pictures: list[Image.Image]) -> dict:
    """What Hugging Face's forward wants besides token ids, from its own image processor"""
    prepared = dict(processor.images(images=pictures, return_tensors="pt")) if pictures else {}
    prepared.pop("num_patches", None)
    if processor.family.grid_positions:
        prepared["mm_token_type_ids"] = (ids == processor.image_id).int()
    return prepared | {"attention_mask": torch.ones_like(ids)}


def plain_logits(network, processor, ids: list[int], pictures: list[Image.Image]) -> torch.Tensor:
    """Hugging Face's full forward of one unpadded sequence. (T, V)"""
    ids = torch.tensor([ids])
    with torch.no_grad():
        return network(input_ids=ids, **extras(processor, ids, pictures)).logits[0]


def chains(row: model.Row) -> list[tuple[list[int], model.Row]]:
    """Each leaf's path from its root: the indices in the tree, and the same path as a row of its
    own."""
    parents = {segment.parent for segment in row}
    found = []
    for leaf in (s for s in range(len(row)) if s not in parents):
        path = [leaf]
        while row[path[0]].parent is not None:
            path.insert(0, row[path[0]].parent)
        found.append(
            (path, [replace(row[s], parent=i - 1 if i else None) for i, s in enumerate(path)])
        )
    return found


def spans(row: model.Row) -> list[slice]:
    """Where each segment lies in its row"""
    ends = np.cumsum([len(segment.ids) for segment in row]).tolist()
    return [slice(end - len(segment.ids), end) for end, segment in zip(ends, row)]


def gradients(policy) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}
    policy.zero_grad(set_to_none=True)
    return found


def assert_same_gradients(one: dict, other: dict, atol: float = 1e-5) -> None:
    assert one.keys() == other.keys() and one
    for name in one:
        torch.testing.assert_close(
            one[name],
            other[name],
            atol=atol,
            rtol=1e-4,
            msg=lambda said, name=name: f"{name}: {said}",
        )


# --- text to tokens


def assert_prompt_ids_are_the_templates(
    processor: model.Processor, images: list[model.ImageInput], system: str | None
) -> None:
    """`encode_prompt` against the chat template of the processor's own tokenizer, token for
    token."""
    qwen, text = (
        processor.family.grid_positions,
        "First line.\n\nWhat is it?\nAnswer Choices:\n(A) yes\n(B) caf\u00e9 \u2264 5",
    )
    ours = processor.encode_prompt(turns(text, system), images)
    content = [{"type": "image"}] * len(images) + [{"type": "text", "text": text}]
    # Qwen's template slips in a default system turn when there is none: there, no system turn is
    # not a prompt it can render
    told = SYSTEM if qwen and system is None else system
    messages = turns("", told)[:-1] + [{"role": "user", "content": content}]
    rendered = processor.tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    if qwen and system is None:
        rendered = rendered.removeprefix(f"<|im_start|>system\n{SYSTEM}<|im_end|>\n")
    tokens = iter([image.tokens for image in images])
    if qwen:
        rendered = re.sub(r"<\|image_pad\|>", lambda match: match[0] * next(tokens), rendered)
    else:  # the combined processor writes the brackets around the tokens
        rendered = re.sub(
            "<IMG_CONTEXT>", lambda match: "<img>" + match[0] * next(tokens) + "</img>", rendered
        )
    assert ours.ids == processor.tokenizer(rendered, add_special_tokens=False)["input_ids"]
    assert set(ours.labels) == {data.PROMPT} and ours.parent is None
    assert ours.ids.count(processor.special["<|im_start|>"]) == len(messages) + 1 - (
        qwen and system is None
    )


@pytest.mark.parametrize("template", ["folder", "published"])
@pytest.mark.parametrize("count", [0, 1, 6])
@pytest.mark.parametrize("system", [SYSTEM, "Two lines\nof \u201csystem\u201d.", None])
def test_prompt_ids_are_those_of_the_chat_template(processor, family, template, count, system):
    if template == "published":
        processor.tokenizer.chat_template = PUBLISHED_TEMPLATE[family]
    assert_prompt_ids_are_the_templates(
        processor, [processor.encode_image(picture(56, 56, seed)) for seed in range(count)], system
    )


REAL_MODELS = sorted(
    path.parent
    for path in Path(os.environ.get("MEDEE_REAL_MODELS", "/nowhere")).glob("*/config.json")
)


# the first is half the bytes that the published index counts, the second the sum of the sizes by
# hand of test_folders.hub_weights
PUBLISHED_PARAMETERS = {"qwen2.5-vl-7b": 8_292_166_656, "internvl3-8b": 7_944_373_760}


@pytest.mark.skipif(
    not REAL_MODELS,
    reason="MEDEE_REAL_MODELS names no folder with published checkpoints; the templates above are "
    "written from memory",
)
@pytest.mark.parametrize("folder", REAL_MODELS, ids=[path.name for path in REAL_MODELS])
def test_a_published_folder_has_the_template_the_ids_and_the_shapes_taken_for_granted_here(folder):
    # no weight is read: config, tokenizer, image processor and, where they are, the files' headers
    processor = model.Processor(folder)
    for count in (0, 1, 6):
        images = [
            processor.encode_image(picture(300 + 28 * seed, 200, seed)) for seed in range(count)
        ]
        for system in (SYSTEM, "Two lines\nof \u201csystem\u201d.", None):
            assert_prompt_ids_are_the_templates(processor, images, system)
    assert (
        processor.image_id == processor.config.image_token_id
        and processor.tokenizer.decode([processor.stop_id]) == "<|im_end|>"
    )
    for response in (GOOD, "\n" + GOOD, " " + GOOD, "caf\u00e9 \u2265 3 \u4e2d\U0001f600"):
        assert processor.decode(processor.encode_response(response).ids) == response
    name = folder.name.lower().removesuffix("-hf").removesuffix("-instruct")
    if name in memory.SHAPES:
        network = memory.policy_of(model.load_config(folder), "full").model
        planned = memory.policy_of(memory.config_of(memory.SHAPES[name]), "full").model
        found, wanted = (
            {n: p.shape for n, p in net.named_parameters()} for net in (network, planned)
        )
        assert found == wanted
        assert sum(p.numel() for p in network.parameters()) == PUBLISHED_PARAMETERS[name]
        index = folder / "model.safetensors.index.json"
        if index.exists():
            published = json.loads(index.read_text())
            stored = revert_weight_conversion(network, dict(network.named_parameters()))
            assert stored.keys() == published["weight_map"].keys()
            size = 2 * PUBLISHED_PARAMETERS[name]  # bf16
            assert published["metadata"]["total_size"] == size
    if any(folder.glob("*.safetensors")):
        hub.meta_policy(folder)  # raises unless every name and shape has its place


def test_images_inside_a_turn_stand_where_its_parts_have_them(processor, family):
    images = [processor.encode_image(picture(56, 56, seed)) for seed in range(2)]
    parts = [
        {"type": "text", "text": "See"},
        {"type": "image"},
        {"type": "text", "text": " and\n"},
        {"type": "image"},
        {"type": "text", "text": "?"},
    ]
    rendered = processor.tokenizer.apply_chat_template(
        [*turns("")[:1], {"role": "user", "content": parts}],
        tokenize=False,
        add_generation_prompt=True,
    )
    one, wide = (
        ("<|image_pad|>", "<|image_pad|>" * 4)
        if family == "qwen"
        else ("<IMG_CONTEXT>", "<img>" + "<IMG_CONTEXT>" * 4 + "</img>")
    )
    ours = processor.encode_prompt([*turns("")[:1], {"role": "user", "content": parts}], images)
    assert (
        ours.ids
        == processor.tokenizer(rendered.replace(one, wide), add_special_tokens=False)["input_ids"]
    )
    with pytest.raises(data.RowError, match="special token"):
        processor.encode_prompt(
            [{"role": "user", "content": [*parts[:4], {"type": "text", "text": "<|im_end|>"}]}],
            images,
        )


@pytest.mark.parametrize(
    "response",
    [
        GOOD,
        "\n" + GOOD,
        " " + GOOD,
        "\n\n  x",
        "> y",
        "no tags, caf\u00e9 \u2265 3 \u4e2d\U0001f600",
        "",
    ],
)
def test_response_is_tokenised_apart_from_the_prompt_and_decodes_to_itself(processor, response):
    prompt = prompt_of(processor, "Why?", [])
    said = processor.encode_response(response)
    batch = model.collate([[prompt, said]], processor)
    whole = (
        processor.tokenize(processor.render(turns("Why?"), []))
        + processor.tokenize(response)
        + [processor.stop_id]
    )
    assert (
        batch.ids[0].tolist() == whole
    )  # what generation would have seen, and what it would have said
    assert processor.decode(said.ids) == response
    supervised = batch.ids[0][batch.labels[0] > 0].tolist()
    assert processor.tokenizer.decode(supervised) == response + "<|im_end|>"
    assert supervised[-1] == processor.stop_id and supervised.count(processor.stop_id) == 1
    assert batch.predecessor.tolist() == list(range(len(prompt.ids) - 1, len(whole) - 1))


def test_decomposed_letters_are_composed_and_their_labels_stay_in_place(processor):
    # the published tokenizers fold text to NFC before they cut it, while the offsets count the
    # characters of the original
    decomposed = "<think> Ka\u0308se, cafe\u0301. </think> <answer> re\u0301sume\u0301 </answer>"
    one, other = (
        processor.encode_response(decomposed),
        processor.encode_response(unicodedata.normalize("NFC", decomposed)),
    )
    assert one.ids == other.ids and one.labels == other.labels
    assert processor.decode(one.ids) == unicodedata.normalize("NFC", decomposed)


def test_labels_lie_on_their_spans(processor):
    said = processor.encode_response(GOOD)
    regions = [(data.THINK, "<think>", "</think>"), (data.ANSWER, "<answer>", "</answer>")]
    at = 0
    for index, label in zip(said.ids[:-1], said.labels):
        inside = [
            name
            for name, start, stop in regions
            if GOOD.index(start) + len(start) <= at < GOOD.index(stop)
        ]
        assert label == (inside[0] if inside else data.TAG), (at, GOOD[at:])
        at += len(processor.tokenizer.decode([index]))  # ASCII: a token is its characters
    assert at == len(GOOD) and said.labels[-1] == data.TAG


def test_special_tokens_in_a_text_are_refused(processor):
    for token in processor.special:
        for messages in (turns(f"What {token} now?"), turns("What now?", system=f"Be {token}")):
            with pytest.raises(data.RowError, match=re.escape(token)):
                processor.encode_prompt(messages, [])


def test_special_tokens_in_a_response_are_refused(processor):
    # read as structure, "<|im_end|>" would be a second end of turn, and an image token would want
    # features of its own
    for token in processor.special:
        with pytest.raises(data.RowError, match=re.escape(token)):
            processor.encode_response(f"<think> {token} </think> <answer> A </answer>")


def test_images_that_no_turn_shows_are_refused(processor):
    with pytest.raises(data.RowError, match="0 image tokens for 4 features"):
        processor.encode_prompt(turns("x")[:1], [processor.encode_image(picture(56, 56))])


def test_tokens_from_a_rollout_are_trained_as_they_are(processor):
    ids = processor.tokenize("a b") + [processor.stop_id]
    segment = processor.encode_tokens(ids, branch=1)
    assert (
        segment.ids == ids
        and all(segment.labels)
        and len(segment.labels) == len(ids)
        and (segment.parent, segment.branch) == (0, 1)
    )
    assert processor.decode(ids) == "a b" == processor.decode(ids[:-1])


# --- images


@pytest.mark.parametrize("size", SIZES)
def test_image_tokens_equal_the_features_the_model_makes(roomy, policy, folder, family, size):
    image = roomy.encode_image(picture(*size))
    features = policy.image_features(image.pixels, torch.tensor([image.grid]))
    network = fresh(folder)
    with torch.no_grad():
        inputs = dict(roomy.images(images=[picture(*size)], return_tensors="pt"))
        inputs.pop("num_patches", None)
        theirs = network.model.get_image_features(**inputs).pooler_output
    theirs = theirs[0] if family == "qwen" else theirs.flatten(0, 1)
    assert len(features) == image.tokens == image.grid[0] * image.grid[1] * image.grid[2]
    torch.testing.assert_close(features.detach(), theirs, atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def qwen_hub(folders, tmp_path_factory):
    """The tiny folder with the image settings of the published checkpoint; no weights are needed"""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    folder = tmp_path_factory.mktemp("hub") / "qwen"
    shutil.copytree(folders["qwen"], folder)
    Qwen2VLImageProcessorPil(
        size={"shortest_edge": 3136, "longest_edge": 12845056}
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def internvl_hub(folders, tmp_path_factory):
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    folder = tmp_path_factory.mktemp("hub") / "internvl"
    shutil.copytree(folders["internvl"], folder)
    # crop_to_patches is what the published folder says; --tiles decides, not the folder
    GotOcr2ImageProcessorPil(
        size={"height": 448, "width": 448}, crop_to_patches=True
    ).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["image_size"] = [448, 448]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    # 1024 x 768 is scaled by sqrt(768 * 768 / (1024 * 768)) to 886.8 x 665.1, and cut down to
    # 31 x 23 squares of 28
    "width, height, tokens",
    [
        (64, 64, 4),
        (512, 512, 324),
        (1024, 768, 713),
        (2048, 2048, 729),
        (800, 600, 609),
        (300, 200, 77),
        (20, 400, 14),
    ],
)
def test_qwen_image_tokens_by_the_published_arithmetic(qwen_hub, width, height, tokens):
    image = model.Processor(qwen_hub).encode_image(Image.new("RGB", (width, height)))
    assert image.tokens == tokens
    assert image.pixels.shape == (
        4 * tokens,
        1176,
    )  # 2 x 2 patches a token, 3 x 2 x 14 x 14 numbers a patch


@pytest.mark.parametrize(
    "size, tiles",
    [
        ((448, 448), 1),
        ((512, 512), 1),
        ((1024, 768), 13),
        ((800, 600), 13),
        ((300, 200), 7),
        ((1600, 400), 5),
    ],
)
def test_internvl_tiles_are_one_by_default_and_cut_on_request(internvl_hub, size, tiles):
    image = Image.new("RGB", size)
    one = model.Processor(internvl_hub).encode_image(image)
    assert one.tokens == 256 and one.pixels.shape == (1, 3, 448, 448)
    many = model.Processor(internvl_hub, tiles=12).encode_image(image)
    assert many.tokens == 256 * tiles and many.pixels.shape == (tiles, 3, 448, 448)
    assert many.grid[0] * many.grid[1] * many.grid[2] == many.tokens


# --- positions and log-probabilities


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_positions_equal_hugging_faces_rope_index(folders, count):
    processor, network = (
        model.Processor(folders["qwen"], max_pixels=200 * 200),
        fresh(folders["qwen"]),
    )
    pictures = [picture(*size) for size in SIZES[:count]]
    row = [
        prompt_of(processor, "Where\nis it?", pictures),
        processor.encode_response(GOOD),
        processor.encode_response(POOR),
    ]
    batch = model.collate([row], processor)
    for path, alone in chains(row):
        ids = torch.tensor([sum((segment.ids for segment in alone), [])])
        inputs = extras(processor, ids, pictures)
        theirs, _ = network.model.get_rope_index(
            ids, inputs["mm_token_type_ids"], image_grid_thw=inputs.get("image_grid_thw")
        )
        assert torch.equal(model.collate([alone], processor).positions, theirs)
        # in the tree, the rejected answer takes up where the prompt ended, not where the chosen
        # one did
        assert torch.equal(
            torch.cat([batch.positions[:, :, spans(row)[s]] for s in path], -1), theirs
        )


@pytest.mark.parametrize("count", [0, 1, 3])
def test_logprobs_equal_log_softmax_of_hugging_faces_own_forward(roomy, policy, folder, count):
    pictures = [picture(*size) for size in SIZES[:count]]
    row = [prompt_of(roomy, "What is it?", pictures), roomy.encode_response(GOOD)]
    batch = model.collate([row], roomy)
    ours = policy(batch)[0]
    whole = row[0].ids + row[1].ids
    theirs = plain_logits(fresh(folder), roomy, whole, pictures).log_softmax(-1)
    start = len(row[0].ids)
    expected = torch.stack([theirs[t - 1, whole[t]] for t in range(start, len(whole))])
    assert ours.dtype == torch.float32 and (ours[:start] == 0).all()
    torch.testing.assert_close(ours[start:], expected, atol=1e-5, rtol=1e-5)


def test_the_picture_matters(roomy, policy):
    # the tests with images would prove little on a model that does not look
    rows = [
        [prompt_of(roomy, "What is it?", [picture(140, 84, seed)]), roomy.encode_response(GOOD)]
        for seed in range(2)
    ]
    one, other = policy(model.collate(rows, roomy))
    assert (one - other).abs().max() > 1e-3


def test_a_tree_row_equals_its_two_separate_rows_in_logprobs_and_gradients(roomy, policy):
    policy = (
        policy.double()
    )  # so that what is left is the mask's and the positions' doing, not fp32 rounding
    prompt = prompt_of(roomy, "What is it?", [picture(*size) for size in SIZES[:2]])
    tree = [prompt, roomy.encode_response(GOOD), replace(roomy.encode_response(POOR), branch=1)]
    shared = policy(model.collate([tree], roomy))[0]
    weight = {1: 1.0, 2: -0.7}  # unequal, so that a gradient given to the wrong answer shows
    sum(w * shared[spans(tree)[s]].sum() for s, w in weight.items()).backward()
    together, apart = gradients(policy), []
    for path, alone in chains(tree):
        logp = policy(model.collate([alone], roomy))[0]
        torch.testing.assert_close(
            shared[spans(tree)[path[-1]]], logp[spans(alone)[-1]], atol=1e-5, rtol=1e-5
        )
        (weight[path[-1]] * logp.sum()).backward()
        apart.append(gradients(policy))
    assert_same_gradients(together, {name: apart[0][name] + apart[1][name] for name in apart[0]})
    assert any(name.startswith("model." + policy.family.vision) for name in together)


def several_trees(processor) -> model.Row:
    """Two patients packed into one row: a pair on an image, and two questions that share a prefix,
    one with an image of its own."""
    row = [prompt_of(processor, "What is it?", [picture(84, 56)])]
    row += [processor.encode_response(GOOD, 0), replace(processor.encode_response(POOR), branch=1)]
    row += [prompt_of(processor, "And this?", [])]
    second = prompt_of(processor, "Look.", [picture(56, 112)])
    row += [
        replace(second, parent=3),
        replace(processor.encode_response("no", 4), branch=2),
        replace(processor.encode_response(POOR, 3), branch=3),
    ]
    row += [
        prompt_of(processor, "Third.", [picture(56, 56)]),
        replace(processor.encode_response(GOOD, 7), branch=4),
    ]
    return row


def test_packed_and_branching_rows_equal_separate_rows(roomy, policy):
    row = several_trees(roomy)
    packed = policy(model.collate([row], roomy))[0]
    found = chains(row)
    assert len(found) == 5
    for path, alone in found:
        batch = model.collate([alone], roomy)
        assert batch.tree is None  # this is the plain causal computation
        torch.testing.assert_close(
            packed[spans(row)[path[-1]]], policy(batch)[0][spans(alone)[-1]], atol=1e-5, rtol=1e-5
        )


def test_a_token_sees_its_own_segment_and_its_ancestors_only(roomy):
    # the runs of `Batch.tree`, written out as a mask, against the rule applied to every pair of
    # tokens
    row = several_trees(roomy)
    owner = [s for s, segment in enumerate(row) for _ in segment.ids]
    family = [
        next(set(path[: path.index(s) + 1]) for path, _ in chains(row) if s in path)
        for s in range(len(row))
    ]
    rule = torch.tensor(
        [
            [j <= i and owner[j] in family[owner[i]] for j in range(len(owner))]
            for i in range(len(owner))
        ]
    )
    (runs,) = model.collate([row], roomy).tree
    seen = torch.zeros_like(rule)
    for start, stop, before in runs:
        seen[start:stop, start:stop] = torch.ones(stop - start, stop - start).tril().bool()
        for i, j in before:
            seen[start:stop, i:j] = True
    assert torch.equal(seen, rule)
    assert [run[0] for run in runs] == [0] + [stop for _, stop, _ in runs][:-1] and runs[-1][
        1
    ] == len(owner)


@pytest.mark.parametrize("heads", [4, 2])
def test_tree_attention_is_attention_under_the_trees_mask(heads):
    # a padded row and a full one, forward and backward, against the formula with a (T, T) mask
    tree = [[(0, 5, ()), (5, 7, ((0, 3),)), (7, 9, ((0, 3), (5, 6)))], [(0, 4, ()), (4, 11, ())]]
    generator = torch.Generator().manual_seed(heads)
    q, k, v = (
        torch.randn(2, h, 11, 8, dtype=torch.float64, generator=generator, requires_grad=True)
        for h in (4, heads, heads)
    )
    mask = torch.zeros(2, 11, 11, dtype=torch.bool)
    for b, runs in enumerate(tree):
        for start, stop, before in runs:
            for i in range(start, stop):
                mask[
                    b, i, [j for low, high in (*before, (start, i + 1)) for j in range(low, high)]
                ] = True
    outer = (
        torch.randn(2, 11, 4, 8, dtype=torch.float64, generator=generator)
        * mask.any(-1)[:, :, None, None]
    )  # padding is nobody's
    ours, _ = attention.tree_attention(None, q, k, v, None, scaling=0.3, tree=tree)
    (ours * outer).sum().backward()
    found = [t.grad.clone() for t in (q, k, v)]
    q.grad = k.grad = v.grad = None
    wide_k, wide_v = (t.repeat_interleave(4 // heads, 1) for t in (k, v))
    scores = (0.3 * q @ wide_k.transpose(-1, -2)).masked_fill(~mask[:, None], -1e30)
    theirs = (scores.softmax(-1) @ wide_v).transpose(1, 2) * mask.any(-1)[:, :, None, None]
    (theirs * outer).sum().backward()
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)
    for one, other in zip(found, (q.grad, k.grad, v.grad)):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=0)


def test_padding_and_batch_mates_change_nothing(roomy, policy):
    rows = [
        [
            prompt_of(roomy, "What is it? " * 5, [picture(*size) for size in SIZES[1:]]),
            roomy.encode_response(GOOD),
        ],
        [prompt_of(roomy, "Why?", []), roomy.encode_response(POOR)],
        [
            prompt_of(roomy, "This?", [picture(56, 56)]),
            roomy.encode_response(POOR),
            replace(roomy.encode_response("no"), branch=1),
        ],
    ]
    together = policy(model.collate(rows, roomy))
    backwards = policy(model.collate(rows[::-1], roomy)).flip(0)
    chain_mates = policy(
        model.collate(rows[:2], roomy)
    )  # without a tree this is plain causal attention
    for index, row in enumerate(rows):
        alone = policy(model.collate([row], roomy))[0]
        for batch in [together, backwards] + [chain_mates] * (index < 2):
            torch.testing.assert_close(batch[index, : len(alone)], alone, atol=1e-5, rtol=1e-5)
            assert (batch[index, len(alone) :] == 0).all()


def test_the_last_token_predicts_nothing(processor, policy):
    # off by one, the last id would decide an entry: change it, and only its own entry may change
    row = [prompt_of(processor, "Why?", []), processor.encode_response(GOOD)]
    before = policy(model.collate([row], processor))[0]
    row[1].ids[-1] = row[1].ids[0]
    after = policy(model.collate([row], processor))[0]
    torch.testing.assert_close(before[:-1], after[:-1], atol=1e-6, rtol=0)
    assert (before[-1] - after[-1]).abs() > 1e-3


@pytest.mark.parametrize("chunk", [1, 4, 13, 100])
@pytest.mark.parametrize("head", ["trained", "frozen"])
def test_chunked_logprobs_equal_full_log_softmax_forward_and_backward(chunk, head):
    generator = torch.Generator().manual_seed(chunk)
    hidden, weight = (
        torch.randn(13, 8, generator=generator, requires_grad=True),
        torch.randn(37, 8, generator=generator),
    )
    weight.requires_grad_(head == "trained")
    targets, outer = (
        torch.randint(37, (13,), generator=generator),
        torch.randn(13, generator=generator),
    )
    ours = attention.ChunkedLogProbs.apply(hidden, weight, targets, chunk)
    (ours * outer).sum().backward()
    got = hidden.grad.clone(), weight.grad.clone() if head == "trained" else weight.grad
    hidden.grad = weight.grad = None
    full = (hidden @ weight.T).log_softmax(-1)[torch.arange(13), targets]
    (full * outer).sum().backward()
    torch.testing.assert_close(ours, full, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got[0], hidden.grad, atol=1e-5, rtol=1e-5)
    if head == "trained":
        torch.testing.assert_close(got[1], weight.grad, atol=1e-5, rtol=1e-5)
    else:
        assert got[1] is None


def test_chunked_logprobs_of_a_bf16_model_are_summed_in_fp32():
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (
        torch.randn(n, 16, generator=generator, dtype=torch.bfloat16) for n in (50, 300)
    )
    targets = torch.randint(300, (50,), generator=generator)
    logp = attention.ChunkedLogProbs.apply(
        hidden.requires_grad_(), weight.requires_grad_(), targets, 7
    )
    logits = hidden.float() @ weight.float().T
    expected = logits.log_softmax(-1)[torch.arange(50), targets]
    assert logp.dtype == torch.float32
    torch.testing.assert_close(logp, expected, atol=1e-4, rtol=1e-5)
    logp.sum().backward()
    ours, exact = (
        [hidden.grad, weight.grad],
        [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)],
    )
    hidden.grad = weight.grad = None
    for h, w in ((hidden, weight), exact):
        (h @ w.T).double().log_softmax(-1)[torch.arange(50), targets].sum().backward()
    for found, plain, wanted in zip(
        ours, (hidden.grad, weight.grad), (tensor.grad for tensor in exact)
    ):
        assert (
            found.dtype == torch.bfloat16
        )  # and no further from the truth than rounded logits put the plain computation
        assert (found - wanted).norm() < 1.2 * (plain - wanted).norm()


def peak_bytes(work) -> int:
    """The most bytes of CPU memory allocated at one time during `work`, above those before it; from
    the allocator's own record."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        work()
    sizes, events = [], list(record.profiler.kineto_results.experimental_event_tree())
    while events:
        event = events.pop()
        events += event.children
        if event.name == "[memory]":  # negative where memory is freed
            sizes.append((event.start_time_ns, event.extra_fields.alloc_size))
    return max(accumulate(size for _, size in sorted(sizes, key=itemgetter(0))))


@pytest.mark.parametrize("head", ["trained", "frozen"])
def test_chunked_logprobs_never_hold_the_logits_of_more_than_a_chunk(head):
    positions, vocabulary, chunk = 64, 20_000, 4
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (
        torch.randn(positions, 8, generator=generator, requires_grad=True),
        torch.randn(vocabulary, 8, generator=generator),
    )
    weight.requires_grad_(head == "trained")
    targets = torch.randint(vocabulary, (positions,), generator=generator)
    logits = 4 * positions * vocabulary  # bytes
    whole = peak_bytes(
        lambda: (
            (hidden @ weight.T).log_softmax(-1)[torch.arange(positions), targets].sum().backward()
        )
    )
    hidden.grad = weight.grad = None
    chunked = peak_bytes(
        lambda: attention.ChunkedLogProbs.apply(hidden, weight, targets, chunk).sum().backward()
    )
    own = weight.nbytes if head == "trained" else 0  # the gradient that both must return
    assert whole - own > 2 * logits and chunked - own < 1.1 * logits * chunk / positions


def test_the_policy_gives_the_same_whatever_its_chunk(processor, policy, monkeypatch):
    batch = model.collate(
        [[prompt_of(processor, "Why?", []), processor.encode_response(GOOD)]], processor
    )
    whole = policy(batch)
    monkeypatch.setitem(model.LOGIT_CHUNK, "cpu", 3)
    torch.testing.assert_close(policy(batch), whole, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("full", [[0, 1], [1], []], ids=["full", "mixed", "windows"])
def test_segment_attention_equals_transformers_loop_over_segments(folders, full):
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    config = Qwen2_5_VLConfig.from_pretrained(folders["qwen"])
    config.vision_config.fullatt_block_indexes = full
    torch.manual_seed(0)
    policy = model.Policy(
        Qwen2_5_VLForConditionalGeneration._from_config(config, attn_implementation="sdpa")
    )
    with (
        torch.no_grad()
    ):  # at its initial 0.02 the tower mixes so little that wrong attention would hardly show
        for parameter in policy.vision.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    processor = model.Processor(folders["qwen"], max_pixels=300 * 300)
    # 112-pixel windows: 4 x 4 tokens, cut to 2, 1, 3 at the edges
    images = [
        processor.encode_image(picture(*size))
        for size in [(168, 140), (56, 56), (252, 196), (168, 140)]
    ]
    pixels, grids = (
        torch.cat([image.pixels for image in images]),
        torch.tensor([image.grid for image in images]),
    )
    found = {}
    for kind in (attention.SEGMENT_ATTENTION, "sdpa"):
        policy.vision.config._attn_implementation = kind
        features = policy.image_features(pixels, grids)
        (
            features * torch.linspace(-1, 1, features.numel()).reshape(features.shape)
        ).sum().backward()
        found[kind] = features.detach(), gradients(policy)
    torch.testing.assert_close(
        found[attention.SEGMENT_ATTENTION][0], found["sdpa"][0], atol=1e-5, rtol=1e-4
    )
    scale = max(g.abs().max() for g in found["sdpa"][1].values())
    assert_same_gradients(
        found[attention.SEGMENT_ATTENTION][1], found["sdpa"][1], atol=1e-6 * float(scale)
    )


def test_features_of_a_trained_tower_after_sampling_have_gradients(folders):
    """What sampling leaves behind under inference mode must be no part of a later backward pass."""
    policy = hub.load_policy(folders["qwen"])
    image = model.Processor(folders["qwen"]).encode_image(picture(56, 56))
    with torch.inference_mode():
        sampled = policy.image_features(image.pixels, [image.grid])
    features = policy.image_features(image.pixels, [image.grid])
    features.sum().backward()
    assert torch.equal(features, sampled) and gradients(policy)


def test_dropout_stays_off_after_train(processor, policy):
    for module in policy.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    batch = model.collate(
        [[prompt_of(processor, "What?", [picture(56, 56)]), processor.encode_response(GOOD)]],
        processor,
    )
    policy.train()
    assert not any(module.training for module in policy.modules())
    assert torch.equal(policy(batch), policy(batch))
    # behind the policy's back, and with transformers' own attention: the dropout was really there
    policy.model.train()
    policy.language_model.config._attn_implementation = "sdpa"
    assert not torch.equal(policy(batch), policy(batch))


# --- folders


@pytest.mark.parametrize("tied", [True, False])
def test_a_saved_policy_loads_in_transformers_with_no_key_missing_and_equal_logits(
    processor, policy, folder, tied, tmp_path
):
    from transformers import AutoModelForImageTextToText

    if not tied:  # as the published 7B and 8B are: the head has weights of its own
        config = copy.deepcopy(policy.model.config)
        config.tie_word_embeddings = config.text_config.tie_word_embeddings = False
        torch.manual_seed(1)
        policy = model.Policy(type(policy.model)._from_config(config, attn_implementation="sdpa"))
        assert policy.model.lm_head.weight is not policy.language_model.embed_tokens.weight
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(
                torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)) * 0.02
            )
    hub.save_policy(tmp_path, policy, processor, policy.model.named_parameters())
    network, report = AutoModelForImageTextToText.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert (
        not report["missing_keys"]
        and not report["unexpected_keys"]
        and not report["mismatched_keys"]
    )
    if tied:  # the names on disk are those that transformers itself writes
        assert (
            load_file(tmp_path / "model.safetensors").keys()
            == load_file(folder / "model.safetensors").keys()
        )
    assert (
        "medee" not in (tmp_path / "config.json").read_text()
    )  # our attention is ours alone: vLLM does not know it

    pictures, again = [picture(56, 56)], model.Processor(tmp_path, max_pixels=56 * 56)
    row = [prompt_of(again, "What?", pictures), again.encode_response(GOOD)]
    assert row[0].ids == prompt_of(processor, "What?", pictures).ids
    theirs = plain_logits(network.eval(), again, row[0].ids + row[1].ids, pictures)
    with torch.no_grad():
        ours = policy.model.lm_head(policy.hidden_states(model.collate([row], processor)))[0]
        reloaded = hub.load_policy(tmp_path)(model.collate([row], again))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        reloaded, policy(model.collate([row], processor)).detach(), atol=1e-6, rtol=1e-6
    )


def test_loading_refuses_an_adapter_a_missing_weight_and_an_unknown_model(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "torn")
    weights = load_file(folder / "model.safetensors")
    weights.pop(next(name for name in weights if name.endswith("layers.1.mlp.up_proj.weight")))
    save_file(weights, tmp_path / "torn" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="up_proj"):
        hub.load_policy(tmp_path / "torn")

    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="LoRA adapter"):
        hub.load_policy(tmp_path / "adapter")

    (tmp_path / "llama").mkdir()
    (tmp_path / "llama" / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="not supported"):
        model.Processor(tmp_path / "llama")


def test_frozen_vision_gets_no_gradient_and_the_rest_does(processor, policy):
    policy.freeze_vision()
    batch = model.collate(
        [[prompt_of(processor, "What?", [picture(56, 56)]), processor.encode_response(GOOD)]],
        processor,
    )
    policy(batch).sum().backward()
    for name, parameter in policy.model.named_parameters():
        frozen = name.startswith((policy.family.vision, policy.family.projector))
        assert parameter.requires_grad != frozen and (parameter.grad is None) == frozen, name


def test_show_prints_the_text_and_the_counts_of_supervised_tokens(
    processor, folder, tmp_path, capsys
):
    demo = {
        "id": "q1",
        "messages": turns("What?", data.SYSTEM_PROMPT) + [{"role": "assistant", "content": GOOD}],
        "images": ["film.png"],
    }
    pair = {
        "id": "q2",
        "prompt": turns("Why?"),
        "images": [],
        "chosen": GOOD,
        "rejected": POOR,
        "failed": [],
    }
    data.write_jsonl(tmp_path / "demos.jsonl", [demo, demo | {"id": "q3"}])
    data.write_jsonl(tmp_path / "pairs.jsonl", [pair])
    report.__main__.main(["show", str(tmp_path / "demos.jsonl"), "--model", str(folder), "-n", "1"])
    report.__main__.main(["show", str(tmp_path / "pairs.jsonl"), "--model", str(folder), "-n", "1"])
    printed = re.sub(r"\033\[\d+m", "", capsys.readouterr().out)
    offsets = processor.tokenizer(GOOD, return_offsets_mapping=True)["offset_mapping"]
    starts = [start for start, _ in offsets]
    think = sum(GOOD.index("<think>") + 7 <= start < GOOD.index("</think>") for start in starts)
    answer = sum(GOOD.index("<answer>") + 8 <= start < GOOD.index("</answer>") for start in starts)
    assert (
        printed.count(
            f"think {think}, answer {answer}, tag {len(starts) + 1 - think - answer} tokens"
        )
        == 2
    )
    assert printed.count(GOOD + "<|im_end|>") == 2 and printed.count(POOR + "<|im_end|>") == 1
    assert "q1: prompt" in printed and "1 images" in printed and "q3" not in printed


def test_show_prints_the_token_ids_that_a_pair_has(processor, folder, tmp_path, capsys):
    response = GOOD.replace("</think>", "é → 髪 </think>")
    ids = []  # one character at a time, as no tokenizer would cut the text
    for character in response:
        ids += processor.tokenizer(character, add_special_tokens=False)["input_ids"]
    ids.append(processor.stop_id)
    pair = {"id": "q", "prompt": turns("Why?"), "images": [], "failed": []}
    pair |= {"chosen": response, "chosen_token_ids": ids, "rejected": POOR}
    data.write_jsonl(tmp_path / "pairs.jsonl", [pair])
    report.__main__.main(["show", str(tmp_path / "pairs.jsonl"), "--model", str(folder)])
    printed = re.sub(r"\033\[\d+m", "", capsys.readouterr().out)
    thinking = response[response.index("<think>") + 7 : response.index("</think>")]
    answer = response[response.index("<answer>") + 8 : response.index("</answer>")]
    count = {}
    for name, text in (("think", thinking), ("answer", answer)):
        pieces = processor.tokenizer(list(text), add_special_tokens=False)["input_ids"]
        count[name] = sum(map(len, pieces))
    tags = len(ids) - sum(count.values())
    assert f"think {count['think']}, answer {count['answer']}, tag {tags} tokens" in printed
    assert printed.count("supervised: ") == 2 and POOR + "<|im_end|>" in printed


def test_a_folder_without_a_model_is_refused_by_name(tmp_path):
    with pytest.raises(data.RowError, match="is not a model's folder: it has no config.json"):
        model.Processor(tmp_path)


# --- InternVL on a Llama, as the 9B is


def llama_folder(internvl: Path, out: Path) -> Path:
    """The tiny InternVL with random weights and a Llama in its language model's place."""
    from transformers import InternVLConfig, InternVLForConditionalGeneration

    shutil.copytree(internvl, out)
    config = json.loads((internvl / "config.json").read_text())
    shared = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    shared += ("num_attention_heads", "num_key_value_heads", "initializer_range", "pad_token_id")
    shared += ("bos_token_id", "eos_token_id", "max_position_embeddings")
    text = {name: config["text_config"][name] for name in shared}
    text["rope_parameters"] = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    text |= {"model_type": "llama", "tie_word_embeddings": True}
    torch.manual_seed(2)
    config = InternVLConfig.from_dict(config | {"text_config": text})
    InternVLForConditionalGeneration(config).save_pretrained(out)
    return out


@pytest.fixture(scope="module")
def llama(folders, tmp_path_factory):
    return llama_folder(folders["internvl"], tmp_path_factory.mktemp("llama") / "model")


def test_a_llamas_tree_rows_have_the_logprobs_and_gradients_of_hugging_faces_own_rows(llama):
    processor = model.Processor(llama, tiles=1)
    policy, network = hub.load_policy(llama), fresh(llama)
    assert type(policy.language_model).__name__ == "LlamaModel"
    pictures = [picture(56, 56, seed) for seed in range(2)]
    prompt = prompt_of(processor, "What is it?", pictures)
    answers = [processor.encode_response(text, 0) for text in (GOOD, POOR, "no")]
    rows = [[prompt, *answers], [prompt_of(processor, "Why?", []), processor.encode_response(POOR)]]
    batch = model.collate(rows, processor)
    ours = policy(batch)
    (-ours.sum()).backward()
    wanted = torch.zeros_like(ours)
    for b, row in enumerate(rows):
        for path, _ in chains(row):
            ids = row[0].ids + row[path[-1]].ids
            inputs = extras(processor, torch.tensor([ids]), pictures if row[0].images else [])
            theirs = network(input_ids=torch.tensor([ids]), **inputs).logits[0].log_softmax(-1)
            said = theirs[:-1].gather(1, torch.tensor(ids[1:])[:, None])[len(row[0].ids) - 1 :, 0]
            (-said.sum()).backward()
            wanted[b, spans(row)[path[-1]]] = said.detach()
    torch.testing.assert_close(ours.detach(), wanted, atol=1e-5, rtol=1e-5)
    found, expected = gradients(policy.model), gradients(network)
    assert any("language_model.layers.0.self_attn.q_proj" in name for name in found)
    assert found.keys() == expected.keys()
    for name in found:
        worst = (found[name] - expected[name]).abs().max()
        assert worst <= 1e-5 * max(1, expected[name].abs().max()), name


def test_a_llama_without_branches_gets_no_mask(llama, monkeypatch):
    """transformers would make one from the positions of a padded batch: (B, 1, T, T)."""
    processor, seen, attend = model.Processor(llama, tiles=1), [], attention.tree_attention

    def watched(module, query, key, value, attention_mask, **given):
        seen.append(attention_mask)
        return attend(module, query, key, value, attention_mask, **given)

    monkeypatch.setattr(model, "tree_attention", watched)
    policy = hub.load_policy(llama)
    prompts = [prompt_of(processor, text, []) for text in ("Why?", "A b c d?")]
    rows = [[prompt, processor.encode_response(GOOD)] for prompt in prompts]
    policy(model.collate(rows, processor))
    assert len(seen) == len(policy.language_model.layers) and all(mask is None for mask in seen)


def test_a_llamas_greedy_branches_are_what_hugging_face_generates(llama, tmp_path):
    folder = tilt(llama, tmp_path / "talking", {})
    processor, policy = model.Processor(folder, tiles=1), hub.load_policy(folder)
    network = fresh(folder)
    shown = [[picture(56, 56, seed) for seed in range(count)] for count in (0, 1, 2)]
    prompts = [prompt_of(processor, "What now? " * (1 + len(films)), films) for films in shown]
    draws = torch.zeros(len(prompts), 2, 16, dtype=torch.float64)
    ended = [rows for _, rows in decode.decode_trees(policy, processor, prompts, draws, 0.0, 1.0)]
    found = [branches for _, branches in sorted(pair for rows in ended for pair in rows.items())]
    found = [[ids for ids, _ in branches] for branches in found]
    banned = sorted(index for index in processor.special.values() if index != processor.stop_id)
    for prompt, films, branches in zip(prompts, shown, found):
        ids = torch.tensor([prompt.ids])
        out = network.generate(
            input_ids=ids,
            **extras(processor, ids, films),
            do_sample=False,
            max_new_tokens=16,
            eos_token_id=processor.stop_id,
            pad_token_id=processor.stop_id,
            suppress_tokens=banned,
        )
        assert branches == [out[0, len(prompt.ids) :].tolist()] * 2
    assert len({tuple(branches[0]) for branches in found}) == len(prompts)
