"""Loading and saving at any size: names against the hub's and transformers' own, numbers against
from_pretrained, memory by torch's allocator."""

import copy
import json
import math
import re
import shutil
import struct
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from ranks_worker import measured, plain_inputs
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_model import llama_folder

import data
import hub
import lora
import model
import train


def network_of(folder: Path, tied: bool = True):
    """The folder's model as transformers loads it. Untied: with a head of its own, as the published
    7B and 8B have."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    if tied:
        return AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="sdpa")
    config = AutoConfig.from_pretrained(folder)
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = False
    torch.manual_seed(1)
    return AutoModelForImageTextToText.from_config(config, attn_implementation="sdpa")


def keys_of(folder: Path) -> dict[str, list[int]]:
    """{key: shape} over all weight files of a folder"""
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= {key: file.get_slice(key).get_shape() for key in file.keys()}
    return found


# --------------------------------------------------------------------------------------------------
# Loading


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_parameter_and_buffer_is_that_of_from_pretrained(folder, tmp_path, tied, dtype):
    network_of(folder, tied).save_pretrained(tmp_path, max_shard_size="500KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    theirs = type(network_of(folder)).from_pretrained(
        tmp_path, dtype=dtype, attn_implementation="sdpa"
    )
    empty = hub.meta_policy(tmp_path, dtype)
    assert all(p.is_meta for p in empty.parameters()) and not any(
        b.is_meta for b in empty.buffers()
    )
    ours = hub.load_policy(tmp_path, dtype).model
    for kind in ("named_parameters", "named_buffers"):
        found, wanted = (dict(getattr(network, kind)()) for network in (ours, theirs))
        assert found.keys() == wanted.keys() and wanted
        assert [
            name
            for name in wanted
            if not torch.equal(found[name], wanted[name]) or found[name].dtype != wanted[name].dtype
        ] == []
    assert (ours.lm_head.weight is ours.model.language_model.embed_tokens.weight) == tied
    assert ours.generation_config.to_dict() == theirs.generation_config.to_dict()


def test_a_llama_language_model_is_loaded_adapted_and_saved_under_its_own_names(folders, tmp_path):
    llama = llama_folder(folders["internvl"], tmp_path / "llama")
    policy, processor = hub.load_policy(llama), model.Processor(llama)
    theirs = network_of(llama)
    for kind in ("named_parameters", "named_buffers"):
        found, wanted = (dict(getattr(net, kind)()) for net in (policy.model, theirs))
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    lora.inject(policy.model, policy.language_model, 4, 8.0, 0)
    tensors = lora.merge_state(policy.model.named_parameters(), 2.0)  # B is 0: nothing has moved
    hub.save_policy(tmp_path / "saved", policy, processor, tensors)
    assert keys_of(tmp_path / "saved") == keys_of(llama)
    again = network_of(tmp_path / "saved")
    assert type(again.model.language_model).__name__ == "LlamaModel"
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter, theirs.get_parameter(name)), name


def test_a_loaded_weight_is_no_view_of_its_file(folder, tmp_path):
    """The file is mapped, not read: a weight that stayed a view of it would change with it."""
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    policy = hub.load_policy(tmp_path)
    before = {name: p.detach().clone() for name, p in policy.named_parameters()}
    with open(tmp_path / "model.safetensors", "r+b") as file:
        file.seek(100_000)
        file.write(b"\x00" * 1_000_000)
    assert all(torch.equal(p, before[name]) for name, p in policy.named_parameters())


def spoil(folder: Path, out: Path, change) -> Path:
    network_of(folder).save_pretrained(out)
    weights = load_file(out / "model.safetensors")
    change(weights)
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    return out


@pytest.mark.parametrize(
    "change, said",
    [
        (
            lambda w: [w.pop(key) for key in list(w) if "layers.1.mlp" in key],
            r"3 missing: model\.language_model\.layers\.1\.mlp\.down_proj\.weight",
        ),
        (lambda w: w.update(stranger=torch.ones(2)), "1 unexpected: .*stranger"),
        (
            lambda w: w.update(
                {
                    key: w[key][:-1].clone()
                    for key in w
                    if key.endswith("layers.0.self_attn.k_proj.bias")
                }
            ),
            r"1 of another shape: .*k_proj\.bias",
        ),
    ],
)
def test_weights_that_do_not_fit_are_named(folder, tmp_path, change, said):
    with pytest.raises(ValueError, match=said):
        hub.meta_policy(spoil(folder, tmp_path, change))


def test_a_missing_weight_file_is_named(folder, tmp_path):
    network_of(folder).save_pretrained(tmp_path, max_shard_size="500KB")
    files = sorted(tmp_path.glob("model-*.safetensors"))
    files[1].unlink()
    with pytest.raises(
        ValueError, match=f"1 of {len(files)} weight files are not there .{files[1].name}"
    ):
        hub.load_policy(tmp_path)


def test_a_cut_off_weight_file_is_named(folder, tmp_path):
    network_of(folder).save_pretrained(tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="model.safetensors: cannot be read"):
        hub.load_policy(tmp_path)


def test_a_cut_off_file_of_any_kind_is_refused_by_name(folder, tmp_path):
    names = {path.name for path in folder.glob("*.json")} | {"model.safetensors.index.json"}
    for name in names - {"processor_config.json"}:  # that one is only copied
        torn = tmp_path / name
        shutil.copytree(folder, torn)
        network_of(folder).save_pretrained(torn, max_shard_size="500KB")
        whole = (torn / name).read_bytes()
        (torn / name).write_bytes(whole[: len(whole) // 2])
        said = "tokenizer.json" if name == "tokenizer_config.json" else name
        with pytest.raises(data.RowError, match=f"{said}.*: cannot be read .*; copy or"):
            model.Processor(torn)
            hub.meta_policy(torn)


@pytest.mark.parametrize(
    "config, said",
    [
        (None, "no config.json"),
        ([1], "config.json: cannot be read"),
        ({}, "model_type None is not supported; give a model of"),
        ({"model_type": "internvl_chat"}, "'internvl_chat' is not supported; .*in its -hf form"),
        ({"model_type": "internvl", "text_config": {"hidden_size": "x"}}, "config.json: cannot be"),
        ({"model_type": "qwen2_5_vl", "num_attention_heads": 0}, "config.json: cannot be read"),
        (
            {"model_type": "internvl", "text_config": {"model_type": "gemma2"}},
            r"'gemma2' is not supported; .*one of \['llama', 'qwen2'\]",
        ),
        (
            {
                "model_type": "qwen2_5_vl",
                "text_config": {"use_sliding_window": True, "max_window_layers": 1},
            },
            "layers with sliding_attention are not supported; .*use_sliding_window false",
        ),
    ],
)
def test_a_folder_that_is_no_model_of_a_known_family_is_refused_by_name(tmp_path, config, said):
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    for action in (model.Processor, hub.meta_policy):
        if action is model.Processor and "num_attention_heads" in (config or ()):
            continue  # a config that reads well, but makes no model
        with pytest.raises(data.RowError, match=said) as caught:
            action(tmp_path)
        assert str(tmp_path) in str(caught.value)


def test_a_tokenizer_of_another_family_is_refused(folders, tmp_path):
    shutil.copytree(folders["internvl"], tmp_path / "mixed")
    for path in folders["qwen"].glob("tokenizer*"):
        shutil.copyfile(path, tmp_path / "mixed" / path.name)
    with pytest.raises(data.RowError, match="its tokenizer has no '<IMG_CONTEXT>'"):
        model.Processor(tmp_path / "mixed")


# --------------------------------------------------------------------------------------------------
# The output head: one of its own, or the embedding


def with_ties(folder: Path, top: bool | None, text: bool | None) -> Path:
    """Rewrites config.json as others write it: whether the head is tied, at two places or none."""
    config = json.loads((folder / "config.json").read_text())
    for place, said in ((config, top), (config["text_config"], text)):
        place.pop("tie_word_embeddings", None)
        if said is not None:
            place["tie_word_embeddings"] = said
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def log_probs(network, processor, ids: list[int]) -> torch.Tensor:
    """log p of each token but the first, by Hugging Face's own forward"""
    with torch.no_grad():
        logits = network.eval()(**plain_inputs([ids], [], processor)).logits[0]
    return logits.log_softmax(-1)[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


# InternVL's published folders say nothing at the top, and below only what is not the default
@pytest.mark.parametrize("top, text", [(None, False), (None, None), (False, None), (False, True)])
def test_a_head_of_its_own_is_loaded_and_saved_whatever_config_json_leaves_out(
    folder, processor, tmp_path, top, text
):
    network = network_of(folder, tied=False)
    with torch.no_grad():
        network.lm_head.weight.normal_()  # a head that shows
    network.save_pretrained(tmp_path / "hub")
    with_ties(tmp_path / "hub", top, text)
    theirs = network if text else type(network).from_pretrained(tmp_path / "hub")
    assert theirs.lm_head.weight is not theirs.model.language_model.embed_tokens.weight

    prompt = processor.encode_prompt([{"role": "user", "content": "What is it?"}], [])
    row = [prompt, processor.encode_response("<think> a b </think> <answer> A </answer>")]
    expected = log_probs(theirs, processor, row[0].ids + row[1].ids)[len(row[0].ids) - 1 :]
    batch, count = model.collate([row], processor), sum(p.numel() for p in theirs.parameters())
    ours = hub.load_policy(tmp_path / "hub")
    hub.save_policy(tmp_path / "saved", ours, processor, ours.model.named_parameters())
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert [place["tie_word_embeddings"] for place in (saved, saved["text_config"])] == [False] * 2
    assert keys_of(tmp_path / "saved") == keys_of(tmp_path / "hub")
    for policy in (ours, hub.load_policy(tmp_path / "saved")):
        assert sum(p.numel() for p in policy.parameters()) == count
        found = policy(batch).detach()[0, len(row[0].ids) :]
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        assert torch.equal(policy.model.lm_head.weight, network.lm_head.weight)


def test_a_head_that_config_json_promises_and_the_files_lack_is_missing(folder, tmp_path):
    network_of(folder).save_pretrained(tmp_path)
    with_ties(tmp_path, None, None)
    with pytest.raises(data.RowError, match="1 missing: lm_head.weight"):
        hub.meta_policy(tmp_path)


def head_key(folder: Path) -> str:
    """What the folder's family calls its head in a file"""
    names = {"internvl": "language_model.lm_head.weight", "qwen": "lm_head.weight"}
    return names[folder.name]


@pytest.mark.parametrize("row", [None, 0, -1])
def test_a_stored_head_beside_a_tied_embedding_must_equal_it(folder, tmp_path, row):
    def add_head(weights: dict) -> None:
        (embedding,) = (weights[key] for key in weights if key.endswith("embed_tokens.weight"))
        head = embedding.clone()
        if row is not None:
            head[row, 5] += 1e-6
        weights[head_key(folder)] = head

    spoil(folder, tmp_path, add_head)
    if row is None:
        policy = hub.load_policy(tmp_path)
        assert policy.model.lm_head.weight is policy.language_model.embed_tokens.weight
    else:
        said = rf"model.safetensors: {head_key(folder)} differs from .*embed_tokens.* ties the two"
        with pytest.raises(data.RowError, match=said):
            hub.meta_policy(tmp_path)


def test_two_stored_tensors_for_one_parameter_are_refused(folder, tmp_path):
    def twice(weights: dict) -> None:
        key = next(key for key in weights if key.endswith("layers.1.mlp.up_proj.weight"))
        weights["model.language_model.layers.1.mlp.up_proj.weight"] = weights[key].clone() + 1
        assert len(weights) > len(load_file(folder / "model.safetensors"))

    with pytest.raises(data.RowError, match="up_proj.weight and .* are both .*; remove the"):
        hub.meta_policy(spoil(folder, tmp_path, twice))


# --- the real sizes: (width, layers, heads, heads of keys and values, width of the MLP,
# vocabulary), and the tower's. From memory of the published configs and of the published index
# files' names.

REAL = {
    "qwen2.5-vl-7b": ("qwen", 3584, 28, 28, 4, 18944, 152064, 3420),
    "qwen2.5-vl-32b": ("qwen", 5120, 64, 40, 8, 27648, 152064, 3456),
    "qwen2.5-vl-72b": ("qwen", 8192, 80, 64, 8, 29568, 152064, 3456),
    "internvl3-8b": ("internvl", 3584, 28, 28, 4, 18944, 151674, 4096),
}


def linear(name: str, rows: int, columns: int, bias: bool = True) -> dict[str, list[int]]:
    return {f"{name}.weight": [rows, columns]} | ({f"{name}.bias": [rows]} if bias else {})


def hub_weights(name: str) -> dict[str, list[int]]:
    """{key: shape} of a published checkpoint"""
    family, width, layers, heads, kv, ff, vocab, vision_ff = REAL[name]
    text, head = (
        ("model", "lm_head")
        if family == "qwen"
        else ("language_model.model", "language_model.lm_head")
    )
    found = {
        f"{text}.embed_tokens.weight": [vocab, width],
        f"{text}.norm.weight": [width],
        f"{head}.weight": [vocab, width],
    }
    for at in range(layers):
        layer, few = f"{text}.layers.{at}", kv * width // heads
        found |= {
            f"{layer}.{norm}.weight": [width]
            for norm in ("input_layernorm", "post_attention_layernorm")
        }
        found |= linear(f"{layer}.self_attn.q_proj", width, width) | linear(
            f"{layer}.self_attn.o_proj", width, width, False
        )
        found |= linear(f"{layer}.self_attn.k_proj", few, width) | linear(
            f"{layer}.self_attn.v_proj", few, width
        )
        found |= linear(f"{layer}.mlp.gate_proj", ff, width, False) | linear(
            f"{layer}.mlp.up_proj", ff, width, False
        )
        found |= linear(f"{layer}.mlp.down_proj", width, ff, False)
    if family == "qwen":
        found |= {
            "visual.patch_embed.proj.weight": [1280, 3, 2, 14, 14],
            "visual.merger.ln_q.weight": [1280],
        }
        found |= linear("visual.merger.mlp.0", 5120, 5120) | linear(
            "visual.merger.mlp.2", width, 5120
        )
        for at in range(32):
            block = f"visual.blocks.{at}"
            found |= {f"{block}.norm1.weight": [1280], f"{block}.norm2.weight": [1280]}
            found |= linear(f"{block}.attn.qkv", 3840, 1280) | linear(
                f"{block}.attn.proj", 1280, 1280
            )
            found |= linear(f"{block}.mlp.gate_proj", vision_ff, 1280) | linear(
                f"{block}.mlp.up_proj", vision_ff, 1280
            )
            found |= linear(f"{block}.mlp.down_proj", 1280, vision_ff)
        return found
    found |= {
        "vision_tower.embeddings.cls_token": [1, 1, 1024],
        "vision_tower.embeddings.position_embeddings": [1, 1025, 1024],
    }
    found |= {
        "vision_tower.embeddings.patch_embeddings.projection.weight": [1024, 3, 14, 14],
        "vision_tower.embeddings.patch_embeddings.projection.bias": [1024],
    }
    found |= {f"multi_modal_projector.layer_norm.{leaf}": [4096] for leaf in ("weight", "bias")}
    found |= linear("multi_modal_projector.linear_1", width, 4096) | linear(
        "multi_modal_projector.linear_2", width, width
    )
    for at in range(24):
        layer = f"vision_tower.encoder.layer.{at}"
        found |= {f"{layer}.{scale}": [1024] for scale in ("lambda_1", "lambda_2")}
        found |= {
            f"{layer}.{norm}.{leaf}": [1024]
            for norm in ("layernorm_before", "layernorm_after")
            for leaf in ("weight", "bias")
        }
        for map_ in ("q_proj", "k_proj", "v_proj", "projection_layer"):
            found |= linear(f"{layer}.attention.{map_}", 1024, 1024)
        found |= linear(f"{layer}.mlp.fc1", 4096, 1024) | linear(f"{layer}.mlp.fc2", 1024, 4096)
    return found


def real_config(name: str):
    from transformers import InternVLConfig, Qwen2_5_VLConfig

    family, width, layers, heads, kv, ff, vocab, vision_ff = REAL[name]
    text = dict(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        intermediate_size=ff,
        vocab_size=vocab,
    )
    if family == "qwen":
        text["rope_parameters"] = {
            "rope_type": "default",
            "rope_theta": 1e6,
            "mrope_section": [16, 24, 24],
        }
        vision = dict(
            depth=32,
            hidden_size=1280,
            num_heads=16,
            intermediate_size=vision_ff,
            out_hidden_size=width,
            window_size=112,
            fullatt_block_indexes=[7, 15, 23, 31],
        )
        return Qwen2_5_VLConfig(
            text_config=text,
            vision_config=vision,
            tie_word_embeddings=False,
            architectures=["Qwen2_5_VLForConditionalGeneration"],
        )
    vision = dict(
        num_hidden_layers=24,
        hidden_size=1024,
        num_attention_heads=16,
        intermediate_size=vision_ff,
        image_size=[448, 448],
        patch_size=[14, 14],
        attention_bias=True,
    )
    return InternVLConfig(
        text_config={"model_type": "qwen2", **text},
        vision_config=vision,
        tie_word_embeddings=False,
        architectures=["InternVLForConditionalGeneration"],
    )


def sparse_folder(name: str, folder: Path, limit: int = 5_000_000_000) -> Path:
    """A checkpoint of the real size that takes no room: bf16 files with true headers, and holes
    where the numbers would be."""
    real_config(name).save_pretrained(folder)
    files, size = [{}], 0
    for key, shape in hub_weights(name).items():
        length = 2 * torch.Size(shape).numel()
        if size + length > limit:
            files.append({})
            size = 0
        files[-1][key] = {"dtype": "BF16", "shape": shape, "data_offsets": [size, size + length]}
        size += length
    where = {}
    for at, entries in enumerate(files):
        file = f"model-{at + 1:05d}-of-{len(files):05d}.safetensors"
        header = json.dumps({"__metadata__": {"format": "pt"}} | entries).encode()
        with open(folder / file, "wb") as out:
            out.write(struct.pack("<Q", len(header)) + header)
            out.truncate(out.tell() + max(entry["data_offsets"][1] for entry in entries.values()))
        where |= dict.fromkeys(entries, file)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": where})
    )
    return folder


@pytest.mark.parametrize("name", REAL)
def test_a_published_checkpoint_of_the_real_size_is_opened_adapted_and_read_by_rows(tmp_path, name):
    from transformers.core_model_loading import revert_weight_conversion

    wanted = hub_weights(name)
    policy = hub.meta_policy(
        sparse_folder(name, tmp_path)
    )  # raises unless every name and shape has its place
    shapes = {key: p for key, p in policy.model.named_parameters()}
    assert len(shapes) == len(wanted) == len(policy.checkpoint.stored)
    stored = revert_weight_conversion(policy.model, dict(shapes))  # as save_policy names them
    assert {key: list(p.shape) for key, p in stored.items()} == wanted
    names = lora.inject(policy.model, policy.language_model)
    assert len(names) == 7 * REAL[name][2]
    for key, parameter in policy.model.named_parameters():
        if parameter.is_meta:
            assert lora.plain_name(key) in policy.checkpoint.stored
    last = f"model.language_model.layers.{REAL[name][2] - 1}.mlp.down_proj.weight"
    assert policy.checkpoint.read(last, slice(7, 9)).shape == (2, REAL[name][5])


# --------------------------------------------------------------------------------------------------
# Saving


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("limit", [400_000, hub.SHARD_BYTES])
def test_saved_names_numbers_and_shards_are_those_of_save_pretrained(
    folder, processor, tmp_path, tied, limit
):
    network = network_of(folder, tied)
    network.save_pretrained(tmp_path / "theirs", max_shard_size=limit)
    policy = hub.load_policy(tmp_path / "theirs")
    with torch.no_grad():
        policy.model.model.language_model.norm.weight.add_(0.5)
    hub.save_policy(tmp_path / "ours", policy, processor, policy.model.named_parameters(), limit)
    assert keys_of(tmp_path / "ours") == keys_of(tmp_path / "theirs")
    again, report = type(network).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values()), report
    for name, parameter in policy.model.named_parameters():
        assert torch.equal(parameter, dict(again.named_parameters())[name])
    files = list((tmp_path / "ours").glob("*.safetensors"))
    largest = max(p.nbytes for p in policy.parameters())
    assert all(
        path.stat().st_size < max(limit, largest) + 100_000 for path in files
    )  # what is beyond is the header
    if limit == hub.SHARD_BYTES:
        assert [path.name for path in files] == ["model.safetensors"]
    else:
        index, wanted = (
            json.loads((tmp_path / who / "model.safetensors.index.json").read_text())
            for who in ("ours", "theirs")
        )
        assert len(files) > 1 and index["weight_map"].keys() == wanted["weight_map"].keys()
        assert index["metadata"]["total_size"] == wanted["metadata"]["total_size"]
    ours, theirs = (
        json.loads((tmp_path / who / "config.json").read_text()) for who in ("ours", "theirs")
    )
    assert ours == theirs


def test_a_save_that_is_cut_off_leaves_the_older_checkpoint_and_the_next_one_clears_up(
    folder, processor, tmp_path
):
    policy = hub.load_policy(folder)
    hub.save_policy(tmp_path, policy, processor, policy.model.named_parameters(), 400_000)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def torn():
        for at, (name, parameter) in enumerate(policy.model.named_parameters()):
            if at == 40:
                raise KeyboardInterrupt
            yield name, parameter + 1

    with pytest.raises(KeyboardInterrupt):
        hub.save_policy(tmp_path, policy, processor, torn(), 400_000)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before
    hub.load_policy(tmp_path)
    hub.save_policy(
        tmp_path,
        policy,
        processor,
        ((name, p + 1) for name, p in policy.model.named_parameters()),
        900_000,
    )
    assert not (tmp_path / "saving.tmp").exists()
    files = {path.name for path in tmp_path.glob("*.safetensors")}
    assert files == set(
        json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"].values()
    )
    for name, parameter in hub.load_policy(tmp_path).model.named_parameters():
        assert torch.equal(parameter, dict(policy.model.named_parameters())[name] + 1)


@pytest.mark.parametrize("move", [0, 1, 6, 13, 20, 99])
def test_no_moment_of_the_last_moves_shows_a_checkpoint_that_is_not_whole(
    folder, processor, tmp_path, monkeypatch, move
):
    """The renames at the end, cut off after each of them: what loads is whole."""
    policy, count, real = hub.load_policy(folder), [], hub.os.replace
    changed = copy.deepcopy(policy.model)
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.add_(1)
    hub.save_policy(tmp_path, policy, processor, policy.model.named_parameters(), 900_000)

    def replace(source, target):
        if Path(target).parent == tmp_path:
            if len(count) == move:
                raise KeyboardInterrupt
            count.append(target)
        real(source, target)

    monkeypatch.setattr(hub.os, "replace", replace)
    try:
        hub.save_policy(tmp_path, policy, processor, changed.named_parameters(), 400_000)
    except KeyboardInterrupt:
        with pytest.raises(ValueError, match="not there"):
            hub.load_policy(tmp_path)
    else:
        assert len(count) <= move
        assert all(
            torch.equal(p, dict(changed.named_parameters())[name])
            for name, p in hub.load_policy(tmp_path).model.named_parameters()
        )


def bf16_base(folder: Path, out: Path) -> Path:
    """The folder's model stored in bf16, a matrix of each block with ones in its first row"""
    network = network_of(folder, tied=False).to(torch.bfloat16)
    with torch.no_grad():
        for layer in network.model.language_model.layers:
            layer.self_attn.q_proj.weight[0] = 1.0
    network.save_pretrained(out)
    return out


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_change_below_half_a_spacing_is_rounded_away_and_both_figures_say_so(
    folder, processor, tmp_path, capsys, method
):
    # by hand: bf16 has 8 bits of mantissa, so the number after 1 is 1 + 1/128; 0.003 is less than
    # half of that and is lost, 0.005 is more and becomes 1/128
    policy = hub.load_policy(bf16_base(folder, tmp_path / "base"))
    policy.freeze_vision()
    moved = policy.language_model.layers[0].self_attn
    count = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    if method == "lora":
        names = lora.inject(policy.model, policy.language_model, 2, 4.0)
        count = sum(policy.language_model.get_submodule(n).base.weight.numel() for n in names)
    with torch.no_grad():
        if method == "lora":
            # alpha / rank is 2
            moved.q_proj.lora_A.zero_()[0, :2] = torch.tensor([0.003, 0.005]) / 2
            moved.q_proj.lora_B[0, 0] = 1.0
        else:
            moved.q_proj.weight[0, :2] += torch.tensor([0.003, 0.005])
    args = SimpleNamespace(
        out=tmp_path, method=method, rank=2, alpha=4.0, model="base", save_dtype="auto"
    )
    figures = train.save(args, policy, processor)
    lost = math.hypot(0.003, 1 / 128 - 0.005) / math.hypot(0.003, 0.005)
    assert figures == pytest.approx({"weights_changed": 1 / count, "rounding_lost": lost}, rel=1e-4)
    said = f"saved in torch.bfloat16: {1 / count:.2%} of .*; rounding lost {lost:.2%} of the change"
    assert re.search(said, capsys.readouterr().out)
    before, after = (load_file(tmp_path / at / "model.safetensors") for at in ("base", "merged"))
    ((key, first),) = ((k, t) for k, t in before.items() if not torch.equal(t, after[k]))
    assert key.endswith("layers.0.self_attn.q_proj.weight") and before.keys() == after.keys()
    assert (after[key] - first).nonzero().tolist() == [[0, 1]] and after[key][0, 1] == 1 + 1 / 128


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("asked", ["auto", "float32"])
def test_what_is_saved_has_one_dtype_and_config_json_says_so(
    folder, processor, tmp_path, stored, asked
):
    network_of(folder).to(stored).save_pretrained(tmp_path / "base")
    weights = load_file(tmp_path / "base" / "model.safetensors")
    # a file may mix dtypes: that of most numbers counts, here of the larger third of the tensors
    small = sorted(weights, key=lambda key: weights[key].numel())[: 2 * len(weights) // 3]
    weights |= {key: weights[key].float() for key in small}
    save_file(weights, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    policy = hub.load_policy(tmp_path / "base")
    for module in (policy.vision, policy.projector):  # as train.shard leaves them on a GPU
        module.to(torch.bfloat16)
    policy.freeze_vision()
    args = SimpleNamespace(out=tmp_path, method="full", save_dtype=asked)
    train.save(args, policy, processor)
    wanted = stored if asked == "auto" else torch.float32
    saved = load_file(tmp_path / "merged" / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {wanted}
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    parts = (config, config["text_config"], config["vision_config"])
    assert {part["dtype"] for part in parts} == {str(wanted).removeprefix("torch.")}
    theirs = type(policy.model).from_pretrained(tmp_path / "merged", dtype="auto")
    assert {p.dtype for p in theirs.parameters()} == {wanted}


# --------------------------------------------------------------------------------------------------
# Memory: bytes that torch's allocator holds. Mapped files are no allocations; the process's own
# size would say little.


def test_one_process_loads_and_saves_with_little_beside_the_model(folder, processor, tmp_path):
    network_of(folder).to(torch.bfloat16).save_pretrained(tmp_path / "base", max_shard_size="300KB")
    policy = hub.meta_policy(tmp_path / "base")
    whole = sum(4 * p.numel() for p in policy.parameters())
    largest = max(4 * p.numel() for p in policy.parameters())
    assert whole > 4 * largest
    peak, _ = measured(lambda: train.shard(policy, torch.device("cpu")))
    assert whole <= peak <= whole + largest, (peak, whole, largest)
    limit = 400_000
    lora.inject(policy.model, policy.language_model, 4, 8.0)
    tensors = lora.merge_state(train.gather_full(policy), 2.0)
    peak, _ = measured(
        lambda: hub.save_policy(tmp_path / "saved", policy, processor, tensors, limit)
    )
    assert peak <= limit + 3 * largest < whole, (
        peak,
        limit,
        largest,
        whole,
    )  # a file, and a merge on its way


def test_weights_that_are_not_trained_are_written_from_the_files(folder, processor, tmp_path):
    """On a GPU they are held in bf16, while the files may have more."""
    policy = hub.load_policy(folder)
    lora.inject(policy.model, policy.language_model, 4, 8.0)
    for name, parameter in policy.named_parameters():
        if name.endswith(".lora_B"):
            torch.nn.init.normal_(parameter, std=0.02)
        if not parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    wanted = {
        name: tensor.clone() for name, tensor in hub.load_policy(folder).model.named_parameters()
    }
    for name, module in policy.model.named_modules():
        if isinstance(module, lora.LoRALinear):
            wanted[f"{name}.weight"] += 2.0 * (module.lora_B @ module.lora_A)
    tensors = lora.merge_state(train.gather_full(policy), 2.0)
    hub.save_policy(tmp_path / "saved", policy, processor, tensors)
    found = hub.load_policy(tmp_path / "saved").model.named_parameters()
    for name, tensor in found:
        torch.testing.assert_close(tensor, wanted[name], atol=1e-7, rtol=0)
