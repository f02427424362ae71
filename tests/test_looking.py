"""Does it look? Measures by hand, swaps that are swaps, and engines of which it is known."""

import json
from collections import Counter

import numpy as np
import pytest
from PIL import Image

import clinic.roles
import data
import looking
import report.__main__
from clinic import world as clinic_world
from command import schema
from engines.inference import Completion, Engine
from report import looking as measured
from report import score


def entry(
    real, again, swapped=None, other=None, criteria=(), follows="B", key="q", normal=()
) -> dict:
    choices = {"real": real, "again": again}
    choices |= {"normal": [None] * len(normal)} if normal else {}
    choices |= {"swapped": swapped} if swapped else {}
    choices |= {"counterfactual": other} if other else {}
    return {
        "id": key,
        "source": "s",
        "answer": "A",
        "blind": 0.25,
        "choices": choices,
        "follows": {"counterfactual": follows} if other else {},
        "criteria": {"swapped": list(criteria), "normal": list(normal)},
    }


READS = {"Image_Analysis_Involvement": True}
INVENTS, SAYS_SO = {**READS, "No_Hallucination": False}, {**READS, "No_Hallucination": True}
UNREAD = {**INVENTS, "Image_Analysis_Involvement": False}
TRUTH = [  # (entry, measure, value by hand)
    (entry(["A", "A"], ["A", "B"]), "changed, again", 0.5),
    (entry(["A", None], ["A", None]), "changed, again", 0.5),
    (entry([None, None], [None, None]), "changed, again", 0.0),
    (entry(["A", "A"], ["A", "B"], ["B", "B"]), "changes", 1 - 0.5),
    (entry(["A", "B"], ["A", "B"], ["B", "A"]), "changes", 0.0),
    (entry(["A", "A"], ["A", "A"], ["A", "B"]), "sight", 0.5),
    (entry(["A", "A"], ["A", "A"], None, ["B", "B"]), "follows, counterfactual", 1.0),
    (entry(["A", "A"], ["A", "A"], None, ["A", "C"]), "follows, counterfactual", -0.5),
    (entry(["A", "C"], ["A", "A"], None, [None, "B"]), "follows, counterfactual", 0.5),
    # two chains read the swapped image; one of them has an answer that half of the real ones have
    (entry(["A", "B"], ["A", "A"], ["A", "C"], None, [READS, READS]), "ungrounded", 0.25),
    # a chain that does not read, and one without a verdict, do not count
    (entry(["A", "A"], ["A", "A"], ["A", "A"], None, [{**READS, "x": 1}, None]), "ungrounded", 1.0),
    (entry(["A"], ["A"], [None], None, [READS]), "ungrounded", 0.0),
    (entry([None, "A"], ["A", "A"]), "unparsed, real", 0.5),
    # about a normal image: one that does not read it, and one without a verdict, do not count
    (entry(["A"], ["A"], normal=[INVENTS, SAYS_SO, UNREAD, None]), "invented", 0.5),
]  # fmt: skip


@pytest.mark.parametrize("found, name, value", TRUTH)
def test_a_measure_is_what_a_hand_counts(found, name, value):
    total, count = measured.measures(found)[name]
    assert total / count == pytest.approx(value)


def test_chains_that_do_not_read_the_image_have_no_ungrounded_share():
    unread = [{"Image_Analysis_Involvement": False}, None]
    found = entry(["A", "A"], ["A", "A"], ["A", "A"], None, unread)
    assert "ungrounded" not in measured.measures(found)


def test_the_interval_of_a_ratio_is_that_of_a_mean_where_every_count_is_one():
    values = np.random.default_rng(0).random(80)
    mean, low, high = score.ratio_interval([[(value, 1.0) for value in values]])
    assert mean == pytest.approx(values.mean())
    assert (low, high) == pytest.approx(score.bootstrap(list(values)), abs=0.01)


def test_the_same_run_twice_differs_by_nothing_in_any_resample():
    run = [
        entry(["A", "B"], ["A", "A"], ["B", "C"], ["B", "A"], [READS, READS], key=k) for k in "ab"
    ]
    run.append(entry(["B", "B"], ["A", "A"], ["C", "C"], ["C", "A"], [READS, None], key="c"))
    found = measured.differences(run, run)
    assert {"changes", "sight", "follows, counterfactual", "ungrounded"} <= found.keys()
    assert all(value == [0.0, 0.0, 0.0] for value in found.values())


# --------------------------------------------------------------------------------------------------
# Swaps


def pictures(folder, contents: dict[str, int]) -> None:
    for name, grey in contents.items():
        Image.new("L", (20 + grey % 3, 30), grey).save(folder / name)


def question(number: int, images: list[str], modality="ct", source="s") -> data.Question:
    options = {"A": "x", "B": "y"}
    return data.Question(f"{number}?", options, "A", images, source, {"modality": modality})


def test_a_swapped_image_has_other_content_and_the_same_kind_and_number(tmp_path):
    greys = {f"{i}.png": 10 * (i // 2) for i in range(12)}  # each content twice
    pictures(tmp_path, greys)
    asked = [question(i, [f"{i}.png"]) for i in range(6)]
    asked += [question(10 + i, [f"{2 * i}.png", f"{2 * i + 1}.png"]) for i in range(3)]
    asked += [question(20 + i, [f"{i}.png"], modality="mri") for i in (6, 8)]
    asked += [question(30, ["10.png"], modality="ultrasound"), question(31, ["11.png"], source="t")]
    found = looking.swap(asked, tmp_path, 0)
    assert found == looking.swap(asked, tmp_path, 0)
    by_id = {one.id: one for one in asked}
    kinds = {tuple(one.images): (one.meta["modality"], one.source) for one in asked}
    for key, images in found.items():
        own = by_id[key]
        assert len(images) == len(own.images)
        assert kinds[tuple(images)] == (own.meta["modality"], own.source)
        assert not {greys[name] for name in images} & {greys[name] for name in own.images}
    alone = {one.question for one in asked if one.id not in found}
    assert alone == {"30?", "31?"}  # no other image of their modality, or of their benchmark


def test_questions_whose_images_are_all_the_same_are_not_swapped(tmp_path):
    pictures(tmp_path, {"a.png": 5, "b.png": 5})
    assert looking.swap([question(1, ["a.png"]), question(2, ["b.png"])], tmp_path, 0) == {}


def test_a_flat_image_has_the_size_of_its_own_and_one_colour(tmp_path):
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[:, :30] = (200, 100, 0)
    Image.fromarray(pixels).save(tmp_path / "own.png")
    for name, colour in (("grey", (127, 127, 127)), ("mean", (100, 50, 0))):
        with Image.open(looking.flat(tmp_path / "own.png", tmp_path / "flat", name)) as image:
            assert image.size == (60, 40)
            assert image.getcolors() == [(60 * 40, colour)]


def test_a_flat_image_whose_writing_is_killed_is_made_again(tmp_path, monkeypatch):
    Image.new("RGB", (60, 40)).save(tmp_path / "own.png")

    def killed(image, path, *_):
        path.write_bytes(b"half of a")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Image.Image, "save", killed)
        looking.flat(tmp_path / "own.png", tmp_path / "flat", "grey")
    with Image.open(looking.flat(tmp_path / "own.png", tmp_path / "flat", "grey")) as image:
        assert image.size == (60, 40)


# --------------------------------------------------------------------------------------------------
# The command, with engines of which it is known whether they look


class Looks(Engine):
    """Answers by the film that it is shown, and says so; it cannot read a grey one."""

    def __init__(self, spec, setup):
        self.spec, self.tally = "clinic:thorough", Counter()

    def answer(self, requests, sampling):
        for request in requests:
            yield [
                Completion(request.id, k, self.text(request), None, "stop", 0, "")
                for k in request.samples
            ]

    def text(self, request) -> str:
        try:
            case, kind, options = clinic.roles.understand(
                request.messages[-1]["content"], request.images
            )
        except ValueError:
            return "<think> I see nothing. </think> <answer> I cannot tell </answer>"
        return self.chain(case, kind, options)

    def chain(self, case, kind, options) -> str:
        if not case.number:
            return data.join_response(case.reading(), "none")
        return clinic.roles.chain(case, kind, "thorough")


class DoesNotLook(Looks):
    """Answers by the history, and describes a film all the same."""

    def text(self, request) -> str:
        asked = request.messages[-1]["content"]
        kind = next(kind for kind, words in clinic_world.ASK.items() if words in asked)
        sign = next(iter(clinic_world.MODALITY_OF))
        case = clinic_world.Case(sign, 1, "left", **clinic_world.history_of(asked))
        options = clinic.roles.understand(asked + " " + case.reading(), [])[2]
        text = clinic.roles.chain(case, kind, "hasty").split("<answer>")[0]
        return f"{text}<answer> {options['A']} </answer>"


def look(world, out, engine, monkeypatch, *more: str) -> dict:
    real = looking.open_engine

    def opened(spec, setup):
        return engine(spec, setup) if spec == "clinic:thorough" else real(spec, setup)

    monkeypatch.setattr(looking, "open_engine", opened)
    args = ["--engine", "clinic:thorough", "--questions", str(world / "test.jsonl"), "-n", "2"]
    args += ["--images", str(world), "--judge", "clinic:judge", "--replies", str(out / "replies")]
    looking.main([*args, "--out", str(out), *more])
    return json.loads((out / "looking.json").read_text())


def test_an_engine_that_looks_follows_the_film_and_one_that_does_not_stays(
    world, tmp_path, monkeypatch
):
    seen = look(world, tmp_path / "a", Looks, monkeypatch)["figures"]
    unseen = look(world, tmp_path / "b", DoesNotLook, monkeypatch)["figures"]
    assert seen["follows, counterfactual"] == [1.0, 1.0, 1.0]
    assert seen["changed, again"][0] == 0.0 and seen["changes"][0] > 0.3
    assert seen["accuracy, real"][0] == 1.0 and seen["sight"][0] > 0.3
    assert seen["unparsed, grey"][0] == 1.0
    assert seen["ungrounded"][0] < 1 - seen["changes"][0] + 1e-9
    assert unseen["changes"] == unseen["sight"] == [0.0, 0.0, 0.0]
    assert unseen["ungrounded"] == [1.0, 1.0, 1.0]
    assert unseen["follows, counterfactual"][0] < 0.3
    # the one says that there are no signs, the other names some
    assert (seen["invented"][0], unseen["invented"][0]) == (0.0, 1.0)
    assert seen["blind"][0] == pytest.approx(1 / 3)
    report.__main__.main(
        [
            "looking",
            "--results",
            str(tmp_path / "b"),
            str(tmp_path / "a"),
            "--out",
            str(tmp_path / "looks"),
        ]
    )
    text = (tmp_path / "looks" / "looking.md").read_text()
    assert "follows the image shown" in text and "+1.00" in text or "+0." in text
    assert (tmp_path / "looks" / "looking.png").stat().st_size > 5000


def test_a_counterfactual_film_makes_another_option_right(world):
    asked = [one for one in schema.read_questions(world / "test.jsonl") if one.images]
    for one in asked:
        arm = one.meta["shown"]["counterfactual"]
        own = clinic_world.film_truth(world / one.images[0])
        other = clinic_world.film_truth(world / arm["images"][0])
        assert {**vars(own), "sign": 0} == {**vars(other), "sign": 0}
        assert other.answer(one.meta["kind"]) == one.options[arm["answer"]]
        assert arm["answer"] != one.answer


def test_a_normal_film_is_of_the_same_patient_and_has_no_sign(world):
    asked = [one for one in schema.read_questions(world / "test.jsonl") if one.images]
    for one in asked:
        own, normal = (
            clinic_world.film_truth(world / images[0])
            for images in (one.images, one.meta["shown"]["normal"]["images"])
        )
        assert {**vars(own), "number": 0} == vars(normal)
        assert normal.reading() == f"The {own.modality} shows no signs."
        assert clinic_world.MENTION.fullmatch(normal.reading()).groups() == (
            own.modality, None, None, None,
        )  # fmt: skip


@pytest.mark.parametrize(
    "thinking, false",
    [
        ("The scan shows no signs. The history gives fever.", False),
        ("The scan shows one bar signs on the left.", True),
        ("The scan shows no signs. A bar with fever means {}.", True),  # which bar?
    ],
)
def test_whoever_finds_something_in_a_normal_film_hallucinates(thinking, false):
    case = clinic_world.Case("bar", 0, "left", "fever", "cough", 40, "man")
    response = data.join_response(thinking.format(case.diagnosis), "x")
    met = clinic.roles.verdict(case, "diagnosis", {"A": "x"}, "A", response)
    assert met["Image_Analysis_Involvement"] and met["No_Hallucination"] == (not false)


def test_a_role_judges_the_film_that_is_shown_with_the_history_that_is_told(world):
    one = next(one for one in schema.read_questions(world / "test.jsonl") if one.images)
    other = world / one.meta["shown"]["counterfactual"]["images"][0]
    case, kind, _ = clinic.roles.understand(data.question_text(one), [other])
    assert case.sign == clinic_world.film_truth(other).sign
    assert clinic_world.history_of(one.question)["clue"] == case.clue


def test_questions_that_are_their_image_are_refused(tmp_path):
    pictures(tmp_path, {"a.png": 5})
    data.write_jsonl(
        tmp_path / "q.jsonl", [question(1, ["a.png"], source="mmmu-pro-vision").to_row()]
    )
    args = ["--engine", "clinic:thorough", "--questions", str(tmp_path / "q.jsonl")]
    with pytest.raises(data.RowError, match="no question with an image beside its text"):
        looking.main([*args, "--images", str(tmp_path), "--out", str(tmp_path / "out")])


@pytest.mark.parametrize(
    "shown", [[], {"x": []}, {"x": {}}, {"x": {"images": "a.png"}}, {"x": {"images": ["../a.png"]}}]
)
def test_what_a_question_brings_is_checked_when_it_is_read(tmp_path, shown):
    row = question(1, ["a.png"]).to_row()
    row["meta"]["shown"] = shown
    data.write_jsonl(tmp_path / "q.jsonl", [row])
    with pytest.raises(data.RowError, match="'shown' has for each name"):
        schema.read_questions(tmp_path / "q.jsonl")
