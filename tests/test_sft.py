"""Stage I: the loss against Hugging Face's own, packing against rows apart, and the command from
demos.jsonl to a merged model."""

import copy
import json
import re
from dataclasses import replace
from datetime import timedelta

import pytest
import torch
from ranks_worker import demo, draw_images, gradients, in_numbers, plain_inputs
from safetensors.torch import load_file
from test_model import llama_folder
from transformers import AutoModelForImageTextToText, AutoTokenizer

import attention
import data
import gate
import hub
import lora
import model
import rollout
import sft
import train
from command import schema
from command.stage import fingerprint

PLAIN = dict.fromkeys(data.SPAN_NAMES, 1.0)
ROWS = {
    "one text row": [None],
    "one row with an image": ["film0.png"],
    "three rows, text and images": [None, "film1.png", "film2.png"],
}


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    folder = tmp_path_factory.mktemp("films")
    draw_images(folder)
    return folder


def encode(processor, films, images=(None,)) -> list[model.Row]:
    return [
        sft.encode_demo(demo(index, image), processor, films) for index, image in enumerate(images)
    ]


def assert_close(found: dict, wanted: dict, limit: float = 1e-5) -> None:
    assert found.keys() == wanted.keys() and any(tensor.any() for tensor in wanted.values())
    worst = max(((found[name] - wanted[name]).abs().max().item(), name) for name in wanted)
    assert worst[0] <= limit, worst


# --------------------------------------------------------------------------------------------------
# The loss


@pytest.mark.parametrize("kind", ROWS)
def test_loss_and_every_gradient_equal_hugging_faces_own(folder, policy, processor, films, kind):
    """Several rows too: a mean over all their tokens, whatever row a token stands in."""
    rows = encode(processor, films, ROWS[kind])
    assert len(rows) == 1 or len({len(row[1].ids) for row in rows}) > 1
    batch = model.collate(rows, processor)
    loss, count, _ = in_numbers(*sft.sft_loss(policy(batch), batch, PLAIN))
    (loss / count).backward()
    plain = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    inputs = plain_inputs(
        [prompt.ids + response.ids for prompt, response in rows],
        [image for row in rows for image in row[0].images],
        processor,
    )
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    for row, (prompt, _) in zip(labels, rows):
        row[: len(prompt.ids)] = -100
    wanted = plain(**inputs, labels=labels).loss
    wanted.backward()
    assert count == (labels != -100).sum().item()
    assert (loss / count).item() == pytest.approx(wanted.item(), abs=1e-5)
    assert_close(gradients(policy.model), gradients(plain))


T, A, G = data.THINK, data.ANSWER, data.TAG
# labels, -log p, weights of the rows, weights of think / answer / tag -> sum, count, the mean that
# is descended
FIGURES = [
    # 0.5 + 0.25 + 2.0 + 0.125 = 2.875 over 4 tokens
    ([[0, 0, T, T, A, G]], [[0, 0, 0.5, 0.25, 2.0, 0.125]], [1], (1, 1, 1), 2.875, 4, 0.71875),
    # 1.0 + 3.0 + 0.5 and 0.25 + 0.25: 5.0 over 5 tokens; a mean of the rows' means, 1.5 and 0.25,
    # would be 0.875
    (
        [[0, T, A, G], [0, A, G, 0]],
        [[0, 1.0, 3.0, 0.5], [0, 0.25, 0.25, 0]],
        [1, 1],
        (1, 1, 1),
        5.0,
        5,
        1.0,
    ),
    # think at a half, answer at two, tags at none, the second row not counted:
    # (0.5 * (1.0 + 2.0) + 2 * 0.75) / (0.5 * 2 + 2 * 1)
    (
        [[0, T, T, A, G], [0, T, A, G, 0]],
        [[0, 1.0, 2.0, 0.75, 9.0], [0, 7.0, 7.0, 7.0, 0]],
        [1, 0],
        (0.5, 2, 0),
        3.0,
        3,
        1.0,
    ),
]


@pytest.mark.parametrize("labels, surprise, rows, weights, total, count, mean", FIGURES)
def test_the_loss_has_the_figures_worked_out_by_hand(
    processor, films, labels, surprise, rows, weights, total, count, mean
):
    batch = model.collate(encode(processor, films), processor)
    batch = replace(
        batch, labels=torch.tensor(labels), row_weights=torch.tensor(rows, dtype=torch.float)
    )
    found, over, _ = sft.sft_loss(-torch.tensor(surprise), batch, dict(zip((T, A, G), weights)))
    assert (found.item(), over, found.item() / over) == (total, count, mean)


def hand_made(processor, films) -> tuple[torch.Tensor, model.Batch, dict[int, list[float]]]:
    """Two rows with log-probabilities -0.01, -0.02, ... and, by loops, which of them stand in which
    span."""
    rows = encode(processor, films, [None, None])
    batch = model.collate(rows, processor)
    logp = torch.zeros(batch.ids.shape)
    spans: dict[int, list[float]] = {label: [] for label in data.SPAN_NAMES}
    for b, (prompt, response) in enumerate(rows):
        for t, label in enumerate(response.labels):
            value = (len(spans[1]) + len(spans[2]) + len(spans[3]) + 1) / 100
            logp[b, len(prompt.ids) + t] = -value
            spans[label].append(value)
    assert all(spans.values())
    return logp, batch, spans


def test_the_losses_of_think_answer_and_tag_are_means_over_their_own_tokens(processor, films):
    logp, batch, spans = hand_made(processor, films)
    _, count, figures = in_numbers(*sft.sft_loss(logp, batch, PLAIN))
    assert list(figures) == ["think", "answer", "tag"] and count == sum(map(len, spans.values()))
    for label, name in data.SPAN_NAMES.items():
        total, tokens = figures[name]
        assert tokens == len(spans[label]) and total / tokens == pytest.approx(
            sum(spans[label]) / len(spans[label]), rel=1e-5
        )


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.5, 2.0, 0.25), (0.0, 1.0, 0.0)])
def test_span_weights_weigh_the_sum_and_the_count(processor, films, weights):
    logp, batch, spans = hand_made(processor, films)
    loss, count, _ = sft.sft_loss(
        logp, batch, dict(zip((data.THINK, data.ANSWER, data.TAG), weights))
    )
    assert loss.item() == pytest.approx(
        sum(w * sum(spans[label]) for label, w in zip((1, 2, 3), weights)), rel=1e-5
    )
    assert count == pytest.approx(
        sum(w * len(spans[label]) for label, w in zip((1, 2, 3), weights))
    )


def test_the_end_of_the_turn_is_learnt_and_the_prompt_is_not(processor, films):
    (prompt, response), *_ = encode(processor, films, ["film0.png"])
    assert set(prompt.labels) == {data.PROMPT} and data.PROMPT not in response.labels
    assert (
        response.ids[-1] == processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
        and response.labels[-1] == data.TAG
    )


def test_a_row_of_weight_zero_adds_nothing(policy, processor, films):
    rows = encode(processor, films, [None, None])
    found = []
    for part, weights in ((rows, [1.0, 0.0]), (rows[:1], [1.0])):
        policy.zero_grad()
        batch = model.collate(part, processor, weights)
        loss, count, figures = in_numbers(*sft.sft_loss(policy(batch), batch, PLAIN))
        loss.backward()
        found.append((loss.item(), count, figures, gradients(policy)))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6) and found[0][1] == found[1][1]
    assert {name: count for name, (_, count) in found[0][2].items()} == {
        name: count for name, (_, count) in found[1][2].items()
    }
    assert_close(found[0][3], found[1][3])


# --------------------------------------------------------------------------------------------------
# Packing


@pytest.mark.parametrize("shared", [True, False])
def test_packed_rows_have_the_loss_and_gradients_of_rows_apart(policy, processor, films, shared):
    rows = encode(processor, films, [None, "film0.png", None, "film3.png"])
    if not shared:  # one other system turn, and nothing can be shared
        other = demo(2)
        other["messages"][0]["content"] = "Another turn."
        rows[2] = sft.encode_demo(other, processor, films)
    packed = sft.pack(copy.deepcopy(rows), processor.stop_id)
    apart = sum(len(segment.ids) for row in rows for segment in row)
    system = rows[0][0].ids.index(processor.stop_id) + 1
    assert sum(len(segment.ids) for segment in packed) == apart - (3 * system if shared else 0)
    found = []
    for batches in ([[packed]], [[row] for row in rows]):
        policy.zero_grad()
        total, tokens = 0.0, 0.0
        for part in batches:
            batch = model.collate(part, processor)
            loss, count, _ = in_numbers(*sft.sft_loss(policy(batch), batch, PLAIN))
            (loss / 50).backward()
            total, tokens = total + loss.item(), tokens + count
        found.append((total, tokens, gradients(policy)))
    assert found[0][:2] == pytest.approx(found[1][:2], rel=1e-5)
    assert_close(found[0][2], found[1][2])


def test_one_row_is_not_packed(processor, films):
    (row,) = encode(processor, films, ["film0.png"])
    assert [segment.ids for segment in sft.pack([row], processor.stop_id)] == [
        row[0].ids,
        row[1].ids,
    ]


@pytest.mark.parametrize("limit", [0, 30, 100])
def test_a_plan_keeps_to_the_limit_and_loses_no_row(limit):
    lengths = [7, 30, 12, 3, 25, 18, 9, 41, 5, 30]  # 41 is over 30: alone, it is not lost
    plan = sft.pack_plan(lengths, limit, 5)
    assert sorted(index for row in plan for index in row) == list(range(len(lengths)))
    assert all(len(row) == 1 or sum(lengths[index] for index in row) <= limit for row in plan)
    assert len(plan) == 10 if limit == 0 else len(plan) < 10
    assert plan == sft.pack_plan(lengths, limit, 5) != sft.pack_plan(lengths, limit, 6)


# --------------------------------------------------------------------------------------------------
# Files and gates


@pytest.mark.parametrize(
    "spoil, said",
    [
        (
            lambda row: row["messages"].pop(0),
            "messages: expected three turns of system, user, assistant",
        ),
        (lambda row: row.pop("images"), "missing 'images'"),
        (
            lambda row: row["messages"][2].update(content="<answer> A </answer>"),
            "messages: the assistant turn",
        ),
        (lambda row: row.update(id=7), "id: expected a text"),
    ],
)
def test_a_bad_demonstration_is_named_by_file_line_and_key(tmp_path, spoil, said):
    rows = [demo(0), demo(1)]
    spoil(rows[1])
    data.write_jsonl(tmp_path / "demos.jsonl", rows)
    with pytest.raises(data.RowError, match=f"demos.jsonl:2: {said}"):
        schema.read_rows(tmp_path / "demos.jsonl", "demos")


def test_a_file_without_demonstrations_is_refused(tmp_path):
    (tmp_path / "demos.jsonl").write_text("")
    with pytest.raises(data.RowError, match="no row in it.*demos"):
        schema.read_rows(tmp_path / "demos.jsonl", "demos")


GATE = [
    "all 2 demonstrations are valid",
    "supervised tokens decode to the responses",
    "a row's image tokens equal its image features",
    # seven in each of three layers
    "LoRA trains the 21 linear maps of the language model and nothing else",
    "the shortest row, N tokens, goes forward and backward",
    "the last response has the plain row's log-probability",
]


def gate_lines(said: str) -> list[str]:
    """The gate's claims that hold, N for the length of a row."""
    lines = [line.removeprefix("  gate: ok  ") for line in said.splitlines() if "gate:" in line]
    return [re.sub(r"row, \d+ tokens", "row, N tokens", line) for line in lines]


def test_a_run_prints_the_gate_line_by_line(folder, films, tmp_path, capsys):
    run(folder, films, tmp_path, [demo(0), demo(1, "film0.png")], "--epochs", "1")
    assert gate_lines(capsys.readouterr().out) == GATE


def refused(claim: str, otherwise: str, folder, films, tmp_path, capsys, rows: list[dict]) -> None:
    """The run stops at one line of the gate, says why, and trains nothing."""
    with pytest.raises(
        train.Refused, match=re.escape(f"gate: {claim}: false; ") + ".*" + otherwise
    ):
        run(folder, films, tmp_path, rows)
    assert [line for line in capsys.readouterr().out.splitlines() if "gate:" in line][
        -1
    ] == f"  gate: NOT {claim}"
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


def test_the_gate_refuses_rows_that_cannot_be_encoded_and_names_them(
    folder, films, tmp_path, capsys
):
    rows = [demo(0), demo(1, "film0.png"), demo(2, "no such film.png"), demo(3)]
    rows[3]["messages"][2]["content"] = "<think> <|im_end|> </think> <answer> A </answer>"
    said = "demos.jsonl: 2 demonstrations: d2: .*no such film.png.*; d3: the response contains the "
    said += "special token"
    refused("all 4 demonstrations are valid", said, folder, films, tmp_path, capsys, rows)


def test_the_gate_refuses_supervised_tokens_that_are_not_the_response(
    folder, films, tmp_path, capsys, monkeypatch
):
    encode_response = model.Processor.encode_response
    monkeypatch.setattr(
        model.Processor,
        "encode_response",
        lambda self, text, *place: encode_response(self, text.replace("nodule", "mass"), *place),
    )
    with_nodule = [index for index in range(4) if "nodule" in demo(index)["messages"][2]["content"]]
    assert 0 < len(with_nodule) < 4
    said = f"demos.jsonl: {len(with_nodule)} responses: d{with_nodule[0]}: .*mass.* instead of "
    said += ".*nodule"
    refused(
        "supervised tokens decode to the responses",
        said,
        folder,
        films,
        tmp_path,
        capsys,
        [demo(index) for index in range(4)],
    )


def test_the_gate_takes_decomposed_letters_for_what_the_tokenizer_makes_of_them(processor, films):
    row = demo(0)
    row["messages"][2]["content"] = "<think> cafe\u0301 </think> <answer> A </answer>"
    assert "\u00e9" in processor.decode(sft.encode_demo(row, processor, films)[1].ids)
    gate.gate_rows(
        "demos.jsonl",
        "demonstrations",
        [("x", row, [row["messages"][2]["content"]])],
        lambda row: sft.encode_demo(row, processor, films),
        len,
        processor,
    )


def test_the_gate_refuses_image_tokens_that_are_not_the_towers_features(
    folder, films, tmp_path, capsys, monkeypatch
):
    encode_image = model.Processor.encode_image

    def twice(self, image):  # as two tiles or films would be, where the prompt was written for one
        made = encode_image(self, image)
        return replace(
            made,
            pixels=torch.cat([made.pixels, made.pixels]),
            grid=(2 * made.grid[0], *made.grid[1:]),
        )

    monkeypatch.setattr(model.Processor, "encode_image", twice)
    refused(
        "a row's image tokens equal its image features",
        "4 tokens, 8 features",
        folder,
        films,
        tmp_path,
        capsys,
        [demo(0), demo(1, "film0.png")],
    )


@pytest.mark.parametrize(
    "fault", ["a map left out", "the vision tower trained along", "the head trained along"]
)
def test_the_gate_refuses_lora_on_other_than_the_language_models_linears(
    folder, family, films, tmp_path, capsys, monkeypatch, fault
):
    inject = lora.inject

    def faulty(network, language_model, *settings):
        if fault == "a map left out":
            monkeypatch.setattr(lora, "TARGETS", lora.TARGETS[:-1])
        inject(network, language_model, *settings)
        if fault == "the vision tower trained along":
            next(
                network.get_submodule(model.FAMILIES[network.config.model_type].vision).parameters()
            ).requires_grad_(True)
        if fault == "the head trained along":
            network.lm_head.weight.requires_grad_(True)

    monkeypatch.setattr(lora, "inject", faulty)
    said = {
        "a map left out": "layers.0.mlp.down_proj",
        "the vision tower trained along": "embed",
        "the head trained along": "embed_tokens",
    }[fault]
    refused(GATE[3], said, folder, films, tmp_path, capsys, [demo(0), demo(1)])


def test_the_gate_runs_a_row_forward_and_backward_and_leaves_nothing_behind(
    policy, processor, films, capsys
):
    (row,) = encode(processor, films, ["film0.png"])
    policy.freeze_vision()
    before = {name: p.detach().clone() for name, p in policy.named_parameters()}
    drawn, calls = torch.get_rng_state(), []
    policy.language_model.norm.weight.register_hook(calls.append)
    gate.gate_step(policy, row, processor, torch.device("cpu"))
    length = len(row[0].ids) + len(row[1].ids)
    claims = [f"the shortest row, {length} tokens, goes forward and backward", GATE[-1]]
    assert capsys.readouterr().out.splitlines() == [f"  gate: ok  {claim}" for claim in claims]
    assert len(calls) == 1 and calls[0].any()  # it was learnt from
    assert all(p.grad is None for p in policy.parameters())
    assert torch.equal(torch.get_rng_state(), drawn)
    assert all(torch.equal(p, before[name]) for name, p in policy.named_parameters())


def test_the_gate_refuses_log_probabilities_that_are_not_the_plain_rows(
    policy, processor, films, monkeypatch
):
    (row,) = encode(processor, films, ["film0.png"])
    policy.freeze_vision()

    right = attention.ChunkedLogProbs.residual

    def wrong(hidden, weight, targets):
        logp, slope = right(hidden, weight, targets)
        return logp - 0.01, slope  # a hundredth of a nat a token

    monkeypatch.setattr(attention.ChunkedLogProbs, "residual", wrong)
    with pytest.raises(train.Refused, match=f"{GATE[-1]}: false; it is off by"):
        gate.gate_step(policy, row, processor, torch.device("cpu"))


@pytest.mark.parametrize("way", ["forward", "backward"])
def test_the_gate_refuses_a_row_whose_log_p_or_gradient_is_not_finite(
    policy, processor, films, way
):
    rows = encode(processor, films)
    weight = policy.language_model.layers[0].mlp.up_proj.weight
    if way == "forward":
        weight.data[0, 0] = float("nan")
    else:  # as where a kernel's backward overflows
        weight.register_hook(lambda slope: slope / 0.0)
    said = "its -log p is nan" if way == "forward" else "1 of .* gradients are not finite"
    with pytest.raises(train.Refused, match=f"goes forward and backward: false; .*{said}"):
        gate.gate_step(policy, rows[0], processor, torch.device("cpu"))
    assert all(p.grad is None for p in policy.parameters())


def test_a_run_closes_with_what_it_was_trained_on_and_what_comes_next(
    folder, films, tmp_path, capsys
):
    rows = [demo(index) for index in range(6)][::-1]  # the shortest is not the first
    lengths = [len(encode_text(folder, row["messages"][-1]["content"])) + 1 for row in rows]
    prompts = [model.Processor(folder).encode_prompt(row["messages"][:-1], []).ids for row in rows]
    whole = [len(prompt) + length for prompt, length in zip(prompts, lengths)]
    kept = sorted(length for length, size in zip(lengths, whole) if size < max(whole))
    assert len(kept) == 5
    run(folder, films, tmp_path, rows, "--epochs", "2", "--max-length", str(max(whole) - 1))
    figures = json.loads((tmp_path / "out" / "stage.json").read_text())["figures"]
    metrics = schema.read_metrics(tmp_path / "out")
    assert figures["response_tokens"] == {"median": kept[2], "p99": kept[-1], "longest": kept[-1]}
    assert sum(figures["span_tokens"].values()) == sum(kept)
    said = capsys.readouterr().out
    assert f"gate: ok  the shortest row, {min(whole)} tokens, goes" in said
    lines = said.partition("\nStage I is finished: ")[2].splitlines()
    merged = str(tmp_path / "out" / "merged")
    assert lines[0] == merged and all(len(line) < 300 for line in lines)
    found = {line[:14].strip(): line[14:] for line in lines[1:]}
    assert found["examples"] == "5 trained on, 1 too long"
    spans = figures["span_tokens"]
    told = [f"{name} {spans[name]}" for name in ("think", "answer", "tag")]
    assert found["tokens"] == ", ".join(told)
    for name in ("loss", *spans):
        assert f"{name} {metrics[0][name]:.3f} -> {metrics[-1][name]:.3f}" in found["loss"]
    told = f"median {kept[2]} tokens, 99 % up to {kept[-1]}, longest {kept[-1]}:"
    assert found["responses"].startswith(told)
    spent = sum(row["seconds"] for row in metrics)
    assert found["training"] == f"2 steps in {timedelta(seconds=round(spent))}"
    assert found["next"].startswith(f"python rollout.py --engine hf:{merged} ")


def encode_text(folder, text: str) -> list[int]:
    return AutoTokenizer.from_pretrained(folder)(text, add_special_tokens=False)["input_ids"]


def test_rollouts_with_less_room_than_the_demonstrations_took_are_warned_of(
    folders, films, tmp_path, capsys
):
    run(folders["qwen"], films, tmp_path, [demo(index) for index in range(5)], "--epochs", "1")
    record = json.loads((tmp_path / "out" / "stage.json").read_text())
    longest = record["figures"]["response_tokens"]["longest"]
    question = data.Question("Which one?", {"A": "CT", "B": "MRI"}, "B", id="q")
    data.write_jsonl(tmp_path / "questions.jsonl", [question.to_row()])
    words = ["--engine", f"hf:{tmp_path / 'out' / 'merged'}", "--pixels", str(56 * 56)]
    words += ["--questions", str(tmp_path / "questions.jsonl"), "-n", "2"]
    capsys.readouterr()
    for room in (longest - 1, longest):
        rollout.main([*words, "--max-tokens", str(room), "--out", str(tmp_path / str(room))])
        said = capsys.readouterr().out
        warned = f"--max-tokens {room} is below what" in said and f"up to {longest} tokens" in said
        assert warned == (room < longest)
        rows = schema.read_rows(tmp_path / str(room) / "rollouts.jsonl", "rollouts")
        cut = [row["finish_reason"] for row in rows].count("length")
        assert (f"{cut / 2:.0%} of the answers were cut off" in said) == (cut > 0)


def test_an_internvl_on_a_llama_goes_through_stage_one(folders, films, tmp_path, capsys):
    llama = llama_folder(folders["internvl"], tmp_path / "llama")
    rows = [demo(index, "film0.png" if index % 2 else None) for index in range(4)]
    merged = run(llama, films, tmp_path, rows, "--epochs", "2", "--lr", "1e-3", "--pack", "200")
    base = load_file(llama / "model.safetensors")
    assert gate_lines(capsys.readouterr().out) == [GATE[0].replace("2", "4"), *GATE[1:]]
    assert merged.keys() == base.keys()
    moved = {name for name in base if not torch.equal(merged[name], base[name])}
    assert len(moved) == 21 and all(name.endswith("_proj.weight") for name in moved)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "out" / "merged")
    assert type(again.model.language_model).__name__ == "LlamaModel"


# --------------------------------------------------------------------------------------------------
# The command


def run(folder, films, tmp_path, rows: list[dict], *flags: str) -> dict[str, torch.Tensor]:
    """The merged weights of a run; everything else is in tmp_path/out."""
    data.write_jsonl(tmp_path / "demos.jsonl", rows)
    given = [
        "--model",
        str(folder),
        "--demos",
        str(tmp_path / "demos.jsonl"),
        "--images",
        str(films),
    ]
    sft.main([*given, "--out", str(tmp_path / "out"), "--pixels", str(56 * 56), *flags])
    return load_file(tmp_path / "out" / "merged" / "model.safetensors")


def test_the_merged_model_is_base_plus_adapter_and_loads_in_transformers(
    folder, family, films, tmp_path
):
    rows = [demo(index, "film0.png" if index % 2 else None) for index in range(6)]
    run(
        folder,
        films,
        tmp_path,
        rows,
        "--epochs",
        "2",
        "--batch",
        "4",
        "--lr",
        "1e-3",
        "--rank",
        "4",
        "--alpha",
        "12",
    )
    out = tmp_path / "out"
    base, merged = (
        AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).state_dict()
        for path in (folder, out / "merged")
    )
    adapter = load_file(out / "adapter" / "adapter_model.safetensors")
    wanted = dict(base)
    for key in [key for key in adapter if key.endswith("lora_A.weight")]:
        name = key.removeprefix("base_model.model.").replace(".lora_A.weight", ".weight")
        low, high = adapter[key], adapter[key.replace("lora_A", "lora_B")]
        assert low.shape[0] == 4 and high.any()
        wanted[name] = base[name] + 12 / 4 * high @ low
    assert len(adapter) == 2 * 7 * len({key.split(".layers.")[1].split(".")[0] for key in adapter})
    assert_close(merged, wanted, 1e-6)
    assert (
        sum(not torch.equal(merged[name], base[name]) for name in base) == len(adapter) // 2
    )  # nothing else has moved
    prompts = [
        model.Processor(path, 56 * 56, 1).encode_prompt(rows[0]["messages"][:-1], []).ids
        for path in (folder, out / "merged")
    ]
    assert prompts[0] == prompts[1]
    metrics = schema.read_metrics(out)
    assert [row["step"] for row in metrics] == [0, 1, 2, 3] and {
        "loss",
        "think",
        "answer",
        "tag",
        "lr",
        "grad_norm",
    } <= metrics[0].keys()
    stage = json.loads((out / "stage.json").read_text())
    changed = sum((wanted[n] != base[n]).sum().item() for n in wanted)
    share = changed / sum(wanted[n].numel() for n in wanted if not torch.equal(wanted[n], base[n]))
    assert stage["figures"].pop("weights_changed") == pytest.approx(share, abs=1e-3) and share > 0.5
    assert stage["figures"].pop("rounding_lost") == 0  # an fp32 base is saved in fp32
    assert stage["figures"].pop("response_tokens") and stage["figures"].pop("span_tokens")
    losses = {"first_loss": metrics[0]["loss"], "last_loss": metrics[-1]["loss"]}
    assert stage["figures"] == {"rows": 6, "dropped": 0, "steps": 4, **losses}
    assert stage["settings"]["alpha"] == 12 and stage["inputs"][
        str(tmp_path / "demos.jsonl")
    ] == data.file_hash(tmp_path / "demos.jsonl")
    assert (
        stage["outputs"] == {"merged": fingerprint(out / "merged")} and not (out / "state").exists()
    )


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_bf16_base_is_saved_in_bf16_rounded_once_and_stage_json_says_what_that_cost(
    folder, films, tmp_path, method
):
    network = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.bfloat16)
    network.save_pretrained(tmp_path / "base")
    model.Processor(folder).save(tmp_path / "base")
    rows, saved, figures = [demo(index) for index in range(4)], {}, {}
    for asked in ("auto", "float32"):
        flags = ["--method", method, "--epochs", "1", "--lr", "1e-3", "--save-dtype", asked]
        saved[asked] = run(tmp_path / "base", films, tmp_path / asked, rows, *flags)
        stage = json.loads((tmp_path / asked / "out" / "stage.json").read_text())
        figures[asked] = stage["figures"]
    exact, rounded = saved["float32"], saved["auto"]
    assert {tensor.dtype for tensor in exact.values()} == {torch.float32}
    assert {tensor.dtype for tensor in rounded.values()} == {torch.bfloat16}
    assert all(torch.equal(rounded[name], exact[name].bfloat16()) for name in exact)

    base = load_file(tmp_path / "base" / "model.safetensors")
    trained = [name for name in exact if not torch.equal(exact[name], base[name].float())]
    change = sum((exact[n] - base[n].float()).square().sum() for n in trained).sqrt()
    lost = sum((exact[n] - rounded[n].float()).square().sum() for n in trained).sqrt()
    changed = sum((rounded[n] != base[n]).sum() for n in trained)
    count = sum(base[n].numel() for n in trained)
    wanted = {"weights_changed": (changed / count).item(), "rounding_lost": (lost / change).item()}
    assert {name: figures["auto"][name] for name in wanted} == pytest.approx(wanted, rel=1e-4)
    assert 0 < wanted["rounding_lost"] < 1 and figures["float32"]["rounding_lost"] == 0
    assert figures["float32"]["weights_changed"] > wanted["weights_changed"] > 0


def test_full_training_moves_everything_but_the_vision_tower(folder, policy, films, tmp_path):
    rows = [demo(index, "film0.png" if index % 2 else None) for index in range(4)]
    run(
        folder,
        films,
        tmp_path,
        rows,
        "--method",
        "full",
        "--batch",
        "4",
        "--lr",
        "1e-3",
        "--epochs",
        "1",
    )
    assert not (tmp_path / "out" / "adapter").exists()
    trained = hub.load_policy(tmp_path / "out" / "merged")
    frozen = {id(p) for module in (trained.vision, trained.projector) for p in module.parameters()}
    before = dict(policy.named_parameters())
    for name, p in trained.named_parameters():
        assert torch.equal(p, before[name]) == (id(p) in frozen), name
    assert 0 < len(frozen) < len(before)


def test_a_demonstration_that_is_too_long_is_dropped_and_counted_but_never_cut(
    folders, films, tmp_path, capsys
):
    processor = model.Processor(folders["qwen"], 56 * 56, 1)
    rows = [demo(index) for index in range(5)]
    lengths = [
        sum(len(segment.ids) for segment in sft.encode_demo(row, processor, films)) for row in rows
    ]
    assert sorted(lengths)[-2] < max(lengths)
    shorter = [row for row, length in zip(rows, lengths) if length < max(lengths)]
    flags = ["--epochs", "1", "--lr", "1e-3", "--max-length"]
    found = run(folders["qwen"], films, tmp_path / "dropped", rows, *flags, str(max(lengths) - 1))
    assert f"kept 4 of 5 (1 over {max(lengths) - 1} tokens" in capsys.readouterr().out
    assert (
        json.loads((tmp_path / "dropped" / "out" / "stage.json").read_text())["figures"]["dropped"]
        == 1
    )
    wanted = run(
        folders["qwen"], films, tmp_path / "without", shorter, *flags, str(max(lengths) - 1)
    )
    whole = run(folders["qwen"], films, tmp_path / "whole", rows, *flags, str(max(lengths)))
    assert all(
        torch.equal(found[name], wanted[name]) for name in wanted
    )  # as if it had never been there
    assert any(not torch.equal(found[name], whole[name]) for name in whole)
    with pytest.raises(data.RowError, match="every demonstration is over 5 tokens"):
        run(folders["qwen"], films, tmp_path / "none", rows, *flags, "5")


def test_a_packed_run_logs_the_loss_of_a_run_that_is_not_packed(folders, films, tmp_path):
    rows = [demo(index, "film0.png" if index % 3 else None) for index in range(7)]
    losses = []
    for limit in ("0", "300"):
        run(folders["qwen"], films, tmp_path / limit, rows, "--epochs", "1", "--pack", limit)
        losses.append(schema.read_metrics(tmp_path / limit / "out")[0])
    for name in ("loss", "think", "answer", "tag", "grad_norm"):
        assert losses[0][name] == pytest.approx(
            losses[1][name], abs=2e-4 if name == "grad_norm" else 2e-5
        )


def test_text_and_image_demonstrations_of_two_files_train_as_those_of_one(folders, films, tmp_path):
    text, image = (
        [demo(index) for index in range(3)],
        [demo(index, "film0.png") for index in range(3, 5)],
    )
    data.write_jsonl(tmp_path / "image.jsonl", image)
    flags = ["--epochs", "1", "--lr", "1e-3", "--batch", "2"]
    wanted = run(folders["qwen"], films, tmp_path / "one", text + image, *flags)
    data.write_jsonl(tmp_path / "two" / "demos.jsonl", text)
    given = [
        "--model",
        str(folders["qwen"]),
        "--demos",
        str(tmp_path / "two" / "demos.jsonl"),
        str(tmp_path / "image.jsonl"),
        "--images",
        str(films),
    ]
    sft.main([*given, "--out", str(tmp_path / "two" / "out"), "--pixels", str(56 * 56), *flags])
    found = load_file(tmp_path / "two" / "out" / "merged" / "model.safetensors")
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert {str(tmp_path / "two" / "demos.jsonl"), str(tmp_path / "image.jsonl")} < json.loads(
        (tmp_path / "two" / "out" / "stage.json").read_text()
    )["inputs"].keys()
