"""The benchmarks' own prompts and rules: texts by hand, known failures as they are, and every set
the readers know."""

import pytest

import answers
import benchmarks
import data
from benchmarks import official

# --------------------------------------------------------------------------------------------------
# Prompts


def laid_out(question: data.Question) -> str:
    """The user turn as one text, an image as its place in the list of images that are sent"""
    (*_, user), images = official.messages(question)
    numbers = iter(range(len(images)))
    return "".join(
        part["text"] if part["type"] == "text" else f"[{images[next(numbers)]}]"
        for part in user["content"]
    )


def test_medxpertqas_prompt_has_its_images_after_the_text_and_a_second_turn():
    question = data.Question(
        "What is seen?", {"A": "x", "B": "y"}, "A", ["p.png", "q.png"], "medxpertqa-mm"
    )
    assert official.messages(question)[0][0] == {
        "role": "system",
        "content": "You are a helpful medical assistant.",
    }
    assert laid_out(question) == (
        "Q: What is seen?\nAnswer Choices: (A) x (B) y\nA: Let's think step by step.[p.png][q.png]"
    )
    assert official.second_turn(question, "Well ...") == [
        {"role": "assistant", "content": "Well ..."},
        {"role": "user", "content": "Therefore, among A through B, the answer is"},
    ]


def test_mmmus_prompts_place_images_at_their_marks_and_the_others_in_front():
    question = data.Question(
        "What {is} <image 2>, <image 3> and again <image 2>?",
        {"A": "x", "B": "<image 1>"},
        "A",
        ["a.png", "b.png", "c.png"],
        "mmmu",
        {"image_marks": [2, 1]},
    )
    # the third image has no mark in the row's record: it stands in front
    text = "[c.png]What {is} [b.png], <image 3> and again <image 2>?"
    assert laid_out(question) == text + (
        "\n\n(A) x\n(B) [a.png]\n\n\n"
        "Answer with the option's letter from the given choices directly."
    )
    question.source = "mmmu-pro"
    assert laid_out(question).startswith(
        text + "\nA. x\nB. [a.png]\nAnswer the preceding multiple choice question."
    )
    short = data.Question("Name <image 1>", {}, "C", ["a.png"], "mmmu", {"image_marks": [1]})
    assert laid_out(short) == "Name [a.png]\n\nAnswer the question using a single word or phrase."
    assert official.second_turn(short, "C") is None


def test_two_images_of_equal_content_are_both_shown():
    question = data.Question(
        "<image 1> or <image 2>?",
        {"A": "x", "B": "y"},
        "A",
        ["a.png", "a.png"],
        "mmmu",
        {"image_marks": [1, 2]},
    )
    assert official.messages(question)[1] == ["a.png", "a.png"]


def test_the_vision_config_asks_with_the_image_alone():
    question = data.Question(
        benchmarks.VISION_STEM, {"A": "a b", "B": "c"}, "B", ["q.png"], "mmmu-pro-vision"
    )
    assert laid_out(question).startswith(
        "Write out the multiple-choice question in the image and then solve it."
    )
    assert laid_out(question).endswith("[q.png]") and "a b" not in laid_out(question)


@pytest.mark.parametrize("name", ["questions", "huatuo", "sharegpt", ""])
def test_a_bank_has_no_prompt_and_no_rule(name):
    question = data.Question("Q", {"A": "x", "B": "y"}, "A", source=name)
    assert not official.has_rule(question)
    for request in (
        official.messages,
        lambda q: official.choice("A", q),
        lambda q: official.second_turn(q, "A"),
    ):
        with pytest.raises(data.RowError, match="of its own"):
            request(question)


def test_every_benchmark_that_the_paper_used_has_a_prompt_and_a_rule():
    assert (
        {name for name, reader in benchmarks.READERS.items() if reader.paper}
        <= set(official.PROMPTS)
        <= set(benchmarks.READERS)
    )


# --------------------------------------------------------------------------------------------------
# official ways to read an answer

FIVE = {
    "A": "Aortic stenosis",
    "B": "Borreliosis",
    "C": "Cushing disease",
    "D": "Diabetes mellitus",
    "E": "Endocarditis",
}
TEN = {letter: f"Finding number {n}" for n, letter in enumerate(data.LETTERS)}


def asked(source: str, options: dict[str, str] = FIVE) -> data.Question:
    return data.Question("Q", options, "A" if options else "C", source=source)


@pytest.mark.parametrize(
    ("source", "options", "response", "read_as"),
    [
        ("medxpertqa-mm", FIVE, "A 45-year-old man has polyuria, so D", "A"),
        ("medxpertqa-mm", FIVE, "the answer is not A but C", "A"),
        (
            "medxpertqa-mm",
            FIVE,
            "<think> Option A is odd. The answer is B? No. </think> <answer> C </answer>",
            "B",
        ),
        ("mmmu-pro", FIVE, "<answer>B</answer>", None),  # there a random letter
        ("mmmu-pro", FIVE, "Answer: Diabetes mellitus", "D"),
        ("mmmu-pro", FIVE, "(D) is right. Unlike (B)", "B"),
        ("mmmu-pro", TEN, "After a look at it I think that none fits", "I"),
    ],
)
def test_the_official_rules_fail_as_they_are_known_to(source, options, response, read_as):
    assert official.choice(response, asked(source, options)) == read_as


# response, ours, MedXpertQA's, MMMU's
ADVERSARIAL = [
    ("<think> x </think> <answer> C </answer>", "C", "C", "C"),
    ("<think> A man aged 50. </think> <answer> D </answer>", "D", "A", "D"),  # the article
    (
        "<think> Option A fits, no. </think> <answer> A fracture of the hip </answer>",
        None,
        "A",
        "A",
    ),
    ("<think> It is I who err. </think> <answer> E </answer>", "E", "E", "E"),
    ("<think> x </think> <answer> Diabetes mellitus </answer>", "D", None, "D"),
    ("Answer: Diabetes mellitus", "D", None, "D"),
    ("<think> x </think> So \\boxed{\\text{C}}.", "C", "C", None),
    ("<think> x </think> <answer> $\\boxed{\\text{B. Borreliosis}}$ </answer>", "B", "B", "B"),
    ("Answer: Diabetes and a Cough", None, None, None),  # D and C
    ("<think> x </think> <answer> not A but C </answer>", None, "A", "C"),
    ("The answer is not A but C", None, "A", "C"),
    ("<think> x </think> <answer> B </answer> <answer> D </answer>", "D", "B", "D"),
    ("<think> I lean to B. The answer is B", None, "B", "B"),  # cut off: no </think>
    ("<think> x </think> <answer> b </answer>", None, None, None),
    ("<think> x </think> <answer> b. borreliosis </answer>", None, None, "B"),
    ("<think> x </think> \\boxed{B}", "B", "B", None),
    ("<think> x </think> <answer> \\boxed{B} </answer>", "B", "B", None),
    ("<think> x </think> <answer> Ｂ </answer>", "B", None, None),  # full-width
    ("<think> x </think> <answer> （Ｂ） </answer>", "B", None, None),
    ("<think> Cushing disease is unlikely, then. </think> <answer> B </answer>", "B", "B", "B"),
    (
        "<think> Cushing disease is unlikely, then. </think> <answer>B</answer>",
        "B",
        "B",
        "C",
    ),  # the text in the thinking wins
    ("<think> x </think> <answer> (B) CT </answer>", "B", "B", "B"),
    ("<think> x </think> <answer> B or C </answer>", None, "B", "C"),
    ("<think> x </think> <answer> **C** </answer>", "C", "C", None),
    ("<think> x </think> <answer> $C </answer>", "C", "C", "C"),
    ("<think> x </think> Therefore, the answer is (E).", "E", "E", "E"),
    ("Therefore, among A through E, the answer is C.", "C", "C", "C"),
    ("Answer: D", "D", "D", "D"),
    ("First the answer is B, now the answer is C", "C", "B", "C"),
    ("Answer: A\nNo.\nAnswer: B", "B", "A", "B"),
    ("", None, None, None),
]


@pytest.mark.parametrize(("response", "ours", "medxpertqa", "mmmu"), ADVERSARIAL)
def test_each_rule_on_adversarial_responses(response, ours, medxpertqa, mmmu):
    found = (
        answers.extract_choice(response, FIVE),
        official.choice(response, asked("medxpertqa-mm")),
        official.choice(response, asked("mmmu")),
    )
    assert found == (ours, medxpertqa, mmmu)


@pytest.mark.parametrize("name", ["medqa", "medbullets-op4", "medbullets-op5", "medxpertqa-text"])
def test_text_sets_take_medxpertqas_rule(name):
    assert official.choice("A man. So the answer is C", asked(name)) == "C"


def test_the_rule_of_mmmu_is_never_random():
    assert {official.choice("no idea at all", asked("mmmu-pro", TEN)) for _ in range(50)} == {None}


@pytest.mark.parametrize(
    ("answer", "response", "right"),
    [
        ("C", "The arrow is C.", True),
        ("C", "C", True),
        ("C", "calcium", False),
        ("Transformation", "This is called transformation of bacteria", True),
        ("2", "So the result is 2.0", True),
        ("2", "It is 20", False),
        (["24/7", "3.429"], "Therefore x = 3.4291", True),
        (["24/7", "3.429"], "I do not know", False),
        ("1,249", "The cost is 1249 dollars", True),
    ],
)
def test_short_answers_are_right_by_key_phrase_or_number(answer, response, right):
    meta = {"answers": answer} if isinstance(answer, list) else {}
    question = data.Question("Q", {}, answer[0] if meta else answer, source="mmmu", meta=meta)
    assert (official.choice(response, question) == question.answer) is right
