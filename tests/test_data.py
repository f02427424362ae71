"""The vocabulary of the method: prompts, responses, supervised spans, answers read by rule, and
files that survive a kill."""

import ast
import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import answers
import data
from benchmarks import modalities
from command import schema
from report.__main__ import main as report_main

FOUR = {"A": "CT", "B": "MRI", "C": "Diabetes", "D": "Ultrasound"}
TEN = {letter: f"text number {index}" for index, letter in enumerate("ABCDEFGHIJ")}
PLAIN = st.text(max_size=60).filter(lambda text: not re.search("</?(think|answer)>", text))


def question_row(**changes) -> dict:
    row = {
        "id": "q1",
        "question": "Which one?",
        "options": dict(FOUR),
        "answer": "B",
        "images": [],
        "source": "s",
        "meta": {},
    }
    return {**row, **changes}


def write(path: Path, *rows) -> Path:
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows),
        encoding="utf-8",
    )
    return path


# --------------------------------------------------------------------------------------------------
# Prompts


def test_system_prompt_is_the_papers_word_for_word():
    # copied from Appendix A, in one line as printed there
    paper = (
        "You are a helpful assistant. A conversation between User and Assistant. The user asks a "
        "question, and the Assistant solves it. The assistant first thinks about the reasoning "
        "process in the mind and then provides the user with the answer. The reasoning process and "
        "answer are enclosed within <think> </think> and <answer> </answer> tags, respectively, "
        "i.e., <think> reasoning process here </think> <answer> answer here </answer>."
    )
    assert data.SYSTEM_PROMPT == paper


def test_prompt_is_system_then_user_with_the_answer_choices_listed():
    system, user = data.prompt_messages(data.Question("A man coughs. What is it?", FOUR, "B"))
    assert system == {"role": "system", "content": data.SYSTEM_PROMPT}
    assert user == {
        "role": "user",
        "content": (
            "A man coughs. What is it?\n"
            "Answer Choices:\n(A) CT\n(B) MRI\n(C) Diabetes\n(D) Ultrasound"
        ),
    }


def test_open_ended_prompt_is_the_stem_alone():
    assert (
        data.prompt_messages(data.Question("What is it?", {}, "asthma"))[1]["content"]
        == "What is it?"
    )


def test_prompt_never_tells_the_answer():
    right, wrong = data.Question("Which one?", FOUR, "B"), data.Question("Which one?", FOUR, "C")
    assert data.prompt_messages(right) == data.prompt_messages(wrong)


# --------------------------------------------------------------------------------------------------
# Responses


def test_response_has_the_very_form_that_the_system_prompt_shows():
    assert data.join_response("reasoning process here", "answer here") in data.SYSTEM_PROMPT


@given(PLAIN, PLAIN)
@settings(max_examples=60, deadline=None)
def test_what_is_joined_splits_into_the_same_parts(thinking, answer):
    assert data.split_response(data.join_response(thinking, answer)) == (
        thinking.strip(),
        answer.strip(),
    )


@pytest.mark.parametrize("tag", ["<think>", "</think>", "<answer>", "</answer>"])
@pytest.mark.parametrize("place", [0, 1])
def test_join_refuses_a_part_that_holds_a_tag(tag, place):
    parts = ["some thought", "B"]
    parts[place] += tag
    with pytest.raises(ValueError, match=re.escape(tag)):
        data.join_response(*parts)


@pytest.mark.parametrize(
    "response",
    [
        "",
        "B",
        "<think> a </think>",
        "<answer> B </answer>",
        "<think> a </think> <answer> B",  # cut off
        "<think> a <answer> B </answer> </think>",
        "<answer> B </answer> <think> a </think>",
        "<think> a </think> so <answer> B </answer>",  # text between the blocks
        "<think> a </think> <answer> B </answer> done",
        "<think> a </think> <answer> A </answer> <answer> B </answer>",
        "<think> a </think> <think> b </think> <answer> B </answer>",
        "<think> a <think> b </think> <answer> B </answer>",
    ],
)
def test_split_refuses_whatever_is_not_one_think_and_one_answer_block(response):
    assert data.split_response(response) is None


def test_split_allows_white_space_around_and_between_the_blocks():
    assert data.split_response("\n<think>a\nb</think>\n\n<answer>B</answer>\n") == ("a\nb", "B")


# --------------------------------------------------------------------------------------------------
# Spans. A response is written as pieces with the label each character must get; every character is
# then one token.

T, A, X = data.THINK, data.ANSWER, data.TAG
SPANS = {
    "whole": [
        ("<think>", X),
        (" why so ", T),
        ("</think> <answer>", X),
        (" B ", A),
        ("</answer>", X),
    ],
    "no space": [("<think>", X), ("why", T), ("</think><answer>", X), ("B", A), ("</answer>", X)],
    "cut off while thinking": [("<think>", X), (" why", T)],
    "cut off in the closing tag": [("<think>", X), (" why </thi", T)],
    "cut off in the answer": [
        ("<think>", X),
        (" why ", T),
        ("</think> <answer>", X),
        (" B. te", A),
    ],
    "no tags": [("B, because I say so", X)],
    "text outside": [
        ("Well: <think>", X),
        (" a ", T),
        ("</think> so <answer>", X),
        (" B ", A),
        ("</answer> bye", X),
    ],
    "two answer blocks": [
        ("<think>", X),
        (" a ", T),
        ("</think> <answer>", X),
        (" A ", A),
        ("</answer> <answer>", X),
        (" B ", A),
        ("</answer>", X),
    ],
    "two think blocks": [
        ("<think>", X),
        ("a", T),
        ("</think><think>", X),
        ("b", T),
        ("</think>", X),
    ],
    "answer inside the thinking": [
        ("<think>", X),
        (" a <answer> B </answer> b ", T),
        ("</think>", X),
    ],
    "only a closing tag": [("a </think> <answer>", X), ("B", A), ("</answer>", X)],
    "empty": [],
    "empty blocks": [("<think></think><answer></answer>", X)],
}


@pytest.mark.parametrize("name", SPANS)
def test_each_character_gets_the_label_of_its_block(name):
    response = "".join(text for text, _ in SPANS[name])
    expected = [label for text, label in SPANS[name] for _ in text]
    assert data.label_spans(response, range(len(response))) == expected


def test_a_token_across_a_border_is_labelled_by_its_first_character():
    response = "<think> why </think> <answer> B </answer>"
    at = response.index
    offsets = [
        (0, 6),  # "<think"
        (6, 9),  # "> w": begins in the tag
        (8, 13),  # "why <": begins in the thinking
        (12, 14),  # "</"
        (at("</think>") + 7, at("<answer>")),  # "> " closes the tag
        (at(" B "), at("</answer>") + 2),  # " B </": begins in the answer
        (at("</answer>"), len(response)),
        (len(response), len(response)),  # the end-of-turn token lies behind the text
    ]
    assert data.label_spans(response, [start for start, _ in offsets]) == [X, X, T, X, X, A, X, X]


def test_no_supervised_character_is_labelled_as_prompt():
    response = data.join_response("why", "B")
    labels = data.label_spans(response, range(len(response)))
    assert data.PROMPT not in labels and set(labels) == set(data.SPAN_NAMES)


# --------------------------------------------------------------------------------------------------
# Answers, read by rule

IN_BLOCK = [
    # a letter that stands alone, however it is dressed
    ("B", "B"),
    ("(B)", "B"),
    ("B.", "B"),
    ("B)", "B"),
    ("[B]", "B"),
    ("**B**", "B"),
    ("$C", "C"),
    ("\n D \n", "D"),
    ("Ｂ", "B"),  # full width
    ("（Ｃ）", "C"),
    # a letter with its own option's text
    ("B. MRI", "B"),
    ("(B) MRI", "B"),
    ("B: MRI", "B"),
    ("B MRI", "B"),
    ("B\nMRI", "B"),
    ("b. mri", None),  # lower case letters are words ("a"), never options
    ("b", None),
    # an option's text alone
    ("MRI", "B"),
    ("mri.", "B"),
    ("  Diabetes ", "C"),  # the text of C that begins with a D
    ("diabetes", "C"),
    # words that begin with, or are, an option's letter
    ("Diabetes mellitus", None),  # no option's whole text, and not D
    ("Dialysis", None),
    ("CT scan", None),  # neither C nor the whole text of A
    ("A fracture of the hip", None),  # the article
    ("A CT", "A"),  # this one goes on as option A does
    ("A", "A"),
    ("I think it is MRI", None),
    # contradictions and answers that are none
    ("not A but C", None),
    ("both A and C", None),
    ("(B) CT", None),
    ("A. MRI", None),
    ("B - CT", None),
    ("B or C", None),
    ("A and B", None),
    ("E", None),  # no such option
    ("J. something", None),
    ("?", None),
    ("", None),
]


@pytest.mark.parametrize(("block", "letter"), IN_BLOCK)
def test_answer_block_is_read_by_rule_and_never_guessed(block, letter):
    # the thinking names another option, which must never leak into the answer
    response = (
        f"<think> Option D seems good. The answer is (D). </think> <answer> {block} </answer>"
    )
    assert answers.extract_choice(response, FOUR) == letter


@pytest.mark.parametrize("block", ["(B) or (C)", "A/B", "B, C", "(A) CT or (B) MRI", "A & D"])
def test_two_letters_are_no_choice(block):
    assert answers.extract_choice(f"<think> x </think> <answer> {block} </answer>", FOUR) is None


@pytest.mark.parametrize(
    "block",
    ["B-cell lymphoma of the stomach", "C-reactive protein level", "A-line placement", "D-dimer"],
)
def test_letter_that_begins_a_hyphenated_term_is_no_choice(block):
    assert answers.extract_choice(f"<think> x </think> <answer> {block} </answer>", FOUR) is None


ARROWS = {"A": "↑ TSH, ↓ T4", "B": "↓ TSH, ↑ T4", "C": "↓ TSH, ↓ T4", "D": "normal"}
SIGNED = {"A": "+2 D", "B": "-2 D", "C": "<5 mm", "D": ">5 mm"}


@pytest.mark.parametrize(
    "options", [FOUR, TEN, ARROWS, SIGNED], ids=["words", "ten", "arrows", "signs"]
)
def test_letter_with_its_own_text_is_always_read(options):
    # the very form in which demonstrations answer
    for letter, text in options.items():
        assert (
            answers.extract_choice(
                f"<think> x </think> <answer> {letter}. {text} </answer>", options
            )
            == letter
        )


@pytest.mark.parametrize(
    ("options", "letter", "other"),
    [(ARROWS, "A", "B"), (ARROWS, "C", "A"), (SIGNED, "A", "B"), (SIGNED, "D", "C")],
)
def test_texts_that_differ_in_a_symbol_only_are_different_answers(options, letter, other):
    assert answers.extract_choice(f"<answer> {options[letter]} </answer>", options) == letter
    assert answers.extract_choice(f"<answer> {letter}. {options[other]} </answer>", options) is None
    without = {**options, letter: "none of these"}
    assert answers.extract_choice(f"<answer> {options[letter]} </answer>", without) is None


def test_letter_alone_means_the_option_even_where_another_options_text_is_that_letter():
    vitamins = {"A": "K", "B": "C", "C": "D", "D": "E"}
    assert answers.extract_choice("<think> x </think> <answer> C </answer>", vitamins) == "C"


def test_pronoun_i_is_not_the_ninth_option():
    assert answers.extract_choice("<think> x </think> <answer> I think so </answer>", TEN) is None
    assert (
        answers.extract_choice(
            "<think> x </think> <answer> I am sure of text number 3 </answer>", TEN
        )
        is None
    )
    assert answers.extract_choice("<think> x </think> the answer is I think", TEN) is None
    assert answers.extract_choice("<think> x </think> <answer> I </answer>", TEN) == "I"
    assert (
        answers.extract_choice("<think> x </think> <answer> J. text number 9 </answer>", TEN) == "J"
    )


@pytest.mark.parametrize(
    ("response", "letter"),
    [
        # which block counts
        ("<think> x </think> <answer> A </answer> <answer> C </answer>", "C"),
        ("<think> x </think> <answer> A </answer> wait <answer> none </answer>", None),
        ("<think> <answer> A </answer> </think> <answer> B </answer>", "B"),
        ("<think> a </think> <answer> A </answer> <think> b </think> <answer> D </answer>", "D"),
        # the answer must stand behind the thinking
        ("<think> <answer> B </answer> </think>", None),
        ("<answer> B </answer> <think> hm </think>", None),
        ("<think> a </think> <answer> B </answer> no, wait </think>", None),  # it went on thinking
        ("<think> a </think> the answer is (B) <think> b </think>", None),
        ("<think> so the answer is (B) </think>", None),
        ("<think> so the answer is (B)", None),  # cut off while thinking
        ("<think> so <answer> B </answer>", None),  # no </think>
        # no thinking at all: the base model's direct answer
        ("<answer> B </answer>", "B"),
        ("<answer> B", "B"),  # the close is missing
        ("<think> x </think> <answer> B. MRI", "B"),
        # without any block: the last "answer is (X)"
        ("The answer is (B).", "B"),
        ("<think> x </think> The answer is C.", "C"),
        ("<think> x </think> The answer is: (C)", "C"),
        ("The answer is (A). No, the answer is (C).", "C"),
        (
            "The answer is (A). No, the answer is (E).",
            None,
        ),  # the last one is not among the options
        ("The answer is A fracture", None),
        ("The answer is not A but C", None),
        ("Option B seems right", None),
        ("", None),
        # a direct answer, as some prompts ask for: nothing but a letter, its text, or both
        ("B", "B"),
        ("(B)", "B"),
        ("<think> x </think>\nB. MRI", "B"),
        ("MRI", "B"),
        ("B. CT", None),
        ("MRI, I think", None),
        ("B. A long look at it", None),  # that "A" may be a letter
        # the same in another dress
        ("The answer is **B**.", "B"),
        ("**Answer:** B", "B"),
        ("Answer: **B**", "B"),
        ("final answer: B", "B"),
        ("Answer: $B$", "B"),
        ("So \\boxed{\\textbf{B}}", "B"),
        ("the answer is B because MRI shows it", "B"),
        ("The correct answer is option B. Both A and C are wrong.", "B"),
        ("The answer is B. MRI shows it best", "B"),
        ("<answer> The answer is B </answer>", "B"),
        ("<answer> Option B </answer>", "B"),
        ("<answer> Answer: B </answer>", "B"),
        ("<answer> B is correct </answer>", "B"),
        ("<answer> B. MRI, because it shows soft tissue </answer>", "B"),
        # two letters, or a word that begins like one
        ("The answer is (A) or (B)", None),
        ("The answer is A/B", None),
        ("The answer is A, B", None),
        ("The answer is D-dimer elevation", None),
        ("The answer is C. difficile colitis", None),
        ("The answer is B. CT", None),
        ("<answer> (A)(B) </answer>", None),
        ("<answer> A.B </answer>", None),
        ("<answer> A; B </answer>", None),
        ("<answer> A (B) </answer>", None),
        ("<answer> D. coli sepsis </answer>", None),
        ("<answer> B cell lymphoma </answer>", None),
    ],
)
def test_answer_is_taken_from_behind_the_thinking_and_from_the_last_block(response, letter):
    assert answers.extract_choice(response, FOUR) == letter


SAID = [  # thirty answers in other words, and the rule that each shows
    # stated in words: the last statement counts, and a letter that is only spoken of does not
    ("The answer is B. Answer A is wrong because it is coarse.", "B"),
    ("Answer: B. It shows soft tissue. Not answer A.", "B"),
    ("Answer: B\nNo.\nAnswer: C", "C"),
    ("The correct option is B", "B"),
    ("The correct answer, as the findings show, is option **B**:\nMRI", "B"),
    ("This is 14.8, which corresponds to option **D**.", "D"),
    ("The answer is most likely (B)", "B"),
    ("The answer is MRI.", "B"),
    ("I doubt if the answer is A.", None),
    ("I don't think the answer is A.", None),
    ("The answer is B? Actually it is C.", None),
    # a line names an option, and nothing else
    ("So it fits.\n\n**D. Ultrasound**", "D"),
    ("The closest choice is:\n\nC\n\nThere may be rounding.", "C"),
    ("So, B. MRI is the correct answer.", "B"),
    ("A. CT\nB. MRI\nC. Diabetes\nD. Ultrasound", None),  # the options, repeated
    ("A. CT: too coarse.\nC. Diabetes: no disease of bone.", None),
    # letter and text open a longer answer
    ("B. MRI\n\nThis is because CT is coarse, and so is A.", "B"),
    ("(B) MRI. It shows soft tissue, which option D does not.", "B"),
    ("(A) CT (B) MRI", None),
    # the whole answer is an option, however it is dressed
    ("Choice C", "C"),
    ("MRI (B)", "B"),
    ("A: MRI", "B"),  # the "A:" of question and answer
    ("<answer> Option B: MRI </answer>", "B"),
    ("<answer> (A) CT (B) MRI </answer>", None),
    # a letter that is denied, or comes with another option's text
    ("<answer> A is not correct </answer>", None),
    ("<answer> A is incorrect; the answer is B </answer>", "B"),
    ("<answer> answer B is wrong </answer>", None),
    ("<answer> B. MRI is contraindicated </answer>", None),
    ("<answer> B. CT, because it is fast </answer>", None),
    ("<answer> E. coli </answer>", None),
]


@pytest.mark.parametrize(("response", "letter"), SAID)
def test_what_is_stated_named_or_opens_an_answer_is_read_and_what_is_denied_is_not(
    response, letter
):
    assert answers.extract_choice(response, FOUR) == letter


TESTS = {"A": "CT", "B": "MRI", "C": "Ultrasound", "D": "Radiograph"}
GERMS = {"A": "E. coli", "B": "C. difficile", "C": "S. aureus", "D": "H. pylori", "E": "Salmonella"}
DOSES = {"A": "15 mg", "B": "12 hours", "C": "5", "D": "55"}
SCANS = {"A": "CT scan with contrast", "B": "CT scan without contrast", "C": "MRI"}
HEPATITIS = {"A": "Hepatitis A", "B": "Hepatitis C", "C": "Hepatitis B", "D": "Hepatitis E"}
BOTH = {"A": "Yes", "B": "No"}
TRAPS = [  # what a reader in a hurry takes for a letter, by the rule that keeps it from being one
    # denied in its own clause
    (TESTS, "B. MRI isn't correct.", None),
    (TESTS, "B. MRI cannot be performed with a pacemaker.", None),
    (TESTS, "A. This is incorrect because CT misses it. B. This is correct.", None),
    (TESTS, "A) No. B) Yes. C) No. D) No.", None),
    (TESTS, "<answer> B. MRI isn't right; A. CT is. </answer>", None),
    # another option in its clause, or a text that goes through the options
    (TESTS, "A. CT shows bone; B. MRI shows the spinal cord best, so B.", None),
    (TESTS, "B (MRI) is tempting, but C (ultrasound) is the first-line test.", None),
    (TESTS, "A is true, B is true, C is false, D is true, so the answer is C.", "C"),
    (TESTS, "A. CT followed by MRI", None),
    (TESTS, "<answer> A: 60%, B: 40% </answer>", None),
    (
        TESTS,
        "Let's evaluate each option:\n\nA. CT: shows bone\nB. MRI: best\n\nTherefore, MRI.",
        None,
    ),
    (TESTS, "Let's consider each option:\nA. CT involves radiation, which", None),
    (TESTS, "The test is MRI.\n\nA. CT\nB. MRI\nC. Ultrasound\nD. Radiograph", None),
    (TESTS, "A. CT is fast and cheap.\nHowever, the cord is only seen on MRI.\nSo MRI.", None),
    # doubted in its sentence, or another's answer
    (TESTS, "You might think the answer is B, but it is C.", None),
    (TESTS, "The incorrect option is B.", None),
    (TESTS, "Best answer: B\nSecond best answer: C", "B"),
    (TESTS, "MRI is more sensitive than CT, which is option A. So MRI.", None),
    (TESTS, "(1) The answer is A. (2) The answer is C.", None),
    (TESTS, "I would not choose:\nA. CT\n\nMRI is right.", None),
    # taken back, or a base model that goes on with a question of its own
    (TESTS, "B. MRI\n\nActually, given the pacemaker, CT is the better choice.", None),
    (TESTS, "The answer is CT. No, MRI.", None),
    (TESTS, "Answer: B\n\nQuestion: What next?\nA. CT\nAnswer: C", "B"),
    # a word, a number or an article that begins like an option
    (GERMS, "E. coli", "A"),
    (GERMS, "The answer is E. Coli.", "A"),
    (TESTS, "I.V. ceftriaxone", None),
    (DOSES, "1.5 mg", None),
    (DOSES, "The answer is 5-5", None),
    (SCANS, "A CT scan", None),
    (HEPATITIS, "Type of hepatitis:\nB", None),
    (BOTH, "No. Wait, yes.", None),
    (BOTH, "❌ A. Yes\n\nIt is not.", None),
]


@pytest.mark.parametrize(("options", "response", "letter"), TRAPS)
def test_no_letter_is_taken_that_the_response_does_not_choose(options, response, letter):
    assert answers.extract_choice(response, options) == letter


def test_a_letter_that_is_also_a_numeral_is_told_from_an_option_that_begins_with_it():
    statements = {"A": "II and III only", "B": "I and II only", "C": "I only", "D": "III only"}
    statements |= {"E": "none", "F": "IV only", "G": "V", "H": "VI", "I": "II and IV only"}
    statements["J"] = "I, II, and IV only"
    assert answers.extract_choice("I. II and IV only", statements) == "I"
    assert answers.extract_choice("I, II, and IV only", statements) == "J"
    assert answers.extract_choice("I only", statements) == "C"


def test_an_option_in_latex_is_the_same_option_in_another_spelling():
    options = {
        "A": "$w_{1}=52.37rad/s$",
        "B": "$w_{1}=92.37\\frac{rad}{s}$",
        "C": "$\\alpha$",
        "D": "$\\beta$",
    }
    assert answers.extract_choice("So:\n\nA. \\( w_{1}=52.37 \\, \\text{rad/s} \\)", options) == "A"
    assert answers.extract_choice("\\( \\alpha \\)", options) == "C"
    assert answers.extract_choice("D. \\(\\alpha\\)", options) is None


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("x-ray", ["X-ray", "chest radiograph", "Plain film", "mammogram", "barium swallow"]),
        (
            "ct",
            [
                "ct",
                "CT scan",
                "computed tomography",
                "Computerised tomography",
                "HRCT of the chest",
            ],
        ),
        ("mri", ["MRI brain", "magnetic resonance imaging (T2)", "fMRI"]),
        ("ultrasound", ["Ultrasonography", "Echocardiography", "doppler", "US"]),
        ("angiography", ["CT angiography", "coronary angiogram", "MR angiogram"]),
        ("nuclear medicine", ["PET/CT", "bone scan", "thyroid scintigraphy"]),
        (
            "ophthalmic imaging",
            ["fundus photography", "OCT", "optical coherence tomography", "slit-lamp"],
        ),
        ("endoscopy", ["colonoscopy", "endoscopic ultrasound", "otoscopy"]),
        ("histopathology", ["Histo-Pathology", "H&E stain", "skin biopsy", "pathology"]),
        ("microscopy", ["peripheral blood smear", "electron microscopy", "photomicrograph"]),
        ("electrical recording", ["ECG", "EKG", "electrocardiogram", "EEG"]),
        ("clinical photograph", ["skin photograph", "Photo", "dermoscopy"]),
        (
            "other",
            [
                "diagram",
                "",
                "none",
                "CT and MRI",
                "Body Scans: MRI, CT scans, and X-rays",
                "doctor",
            ],
        ),
    ],
)
def test_a_modality_told_in_any_words_is_one_of_twelve_or_other(name, told):
    assert {modalities.modality(text) for text in told} == {name}
    assert len(modalities.MODALITIES[0] | modalities.MODALITIES[1]) == 12


REAL = Path(os.environ.get("MEDEE_REAL_DATA", ""))
real = pytest.mark.skipif(
    not os.environ.get("MEDEE_REAL_DATA"), reason="MEDEE_REAL_DATA is not set"
)


def test_a_limit_takes_so_many_of_each_kind_by_their_ids_alone_and_in_their_order():
    bank = [data.Question(f"q{i}", FOUR, "B", ["x.png"] * (i % 3 == 0)) for i in range(30)]
    few = data.draw(bank, 4)
    assert [q for q in bank if q in few] == few
    assert sorted(bool(q.images) for q in few) == [False] * 4 + [True] * 4
    assert data.draw(bank, 0) == bank == data.draw(bank, 99)
    assert {q.id for q in data.draw(bank[::-1], 4)} == {q.id for q in few}


def real_replies() -> list[tuple[dict, dict]]:
    rows = [json.loads(line) for line in open(REAL / "gpt4o_mmmu_pro_direct.jsonl")]
    return [
        (row, dict(zip(data.LETTERS, map(str, ast.literal_eval(row["options"]))))) for row in rows
    ]


@real
def test_of_1444_published_replies_without_tags_eleven_are_unread():
    # two of them name an option that a person would take; the others refuse, or name none or two
    unread = [
        row["id"]
        for row, options in real_replies()
        if answers.extract_choice(row["response"], options) is None
    ]
    assert len(unread) == 11


@real
def test_every_option_of_published_files_is_read_in_the_forms_that_models_write():
    banks = [options for _, options in real_replies() if len(options) > 1]
    for line in open(REAL / "medxpertqa_sampled_mm_input.jsonl"):
        banks.append(
            {option["letter"]: option["content"] for option in json.loads(line)["options"]}
        )
    forms = [
        "<answer> Option {}: {} </answer>",
        "<answer> {}. {} </answer>",
        "({}) {}",
        "{}: {}",
        "The answer is {}. {}",
    ]
    for options in banks:
        for letter, text in options.items():
            assert {
                answers.extract_choice(form.format(letter, text), options) for form in forms
            } == {letter}


@pytest.mark.parametrize(
    ("response", "right"),
    [
        ("two", True),
        ("<answer> 2 </answer>", True),
        ("<think> x </think> two", False),
        ("<answer> three </answer>", False),
        ("", False),
        ("It is two", False),
    ],
)
def test_an_open_answer_has_the_words_of_one_of_the_accepted_answers(response, right):
    # without any tag the whole reply is the answer; with a tag it must stand in its block
    assert (
        answers.is_correct(
            response, data.Question("How many?", {}, "2", meta={"answers": ["2", "two"]})
        )
        is right
    )


def test_letter_outside_the_questions_options_is_not_read():
    two = {"A": "yes", "B": "no"}
    assert [answers.extract_choice(f"<answer> {letter} </answer>", two) for letter in "ABCJ"] == [
        "A",
        "B",
        None,
        None,
    ]


@given(st.text(max_size=80))
@settings(max_examples=60, deadline=None)
def test_extraction_never_raises_and_gives_an_option_or_none(text):
    assert answers.extract_choice(f"<think> x </think> <answer> {text}", FOUR) in (None, *FOUR)


def test_unparsable_answer_counts_as_wrong():
    for letter in FOUR:
        assert not answers.is_correct(
            "<think> x </think> <answer> hard to say </answer>", data.Question("q", FOUR, letter)
        )


@pytest.mark.parametrize("answer", FOUR)
def test_only_the_questions_own_answer_is_right(answer):
    right = [
        letter
        for letter in FOUR
        if answers.is_correct(data.join_response("x", letter), data.Question("q", FOUR, answer))
    ]
    assert right == [answer]


@pytest.mark.parametrize(
    ("block", "right"),
    [
        ("renal ultrasound", True),
        ("Renal  Ultrasound.", True),
        ("ｒｅｎａｌ ultrasound", True),
        ("ultrasound", False),
        ("renal ultrasound and CBC", False),
        ("", False),
    ],
)
def test_open_ended_answer_needs_the_references_very_words(block, right):
    question = data.Question("Which test?", {}, "renal ultrasound")
    assert (
        answers.is_correct(
            f"<think> renal ultrasound </think> <answer> {block} </answer>", question
        )
        is right
    )


def test_open_ended_answer_outside_a_block_or_cut_off_is_wrong():
    question = data.Question("Which test?", {}, "CBC")
    assert not answers.is_correct("<think> x </think> CBC", question)
    assert not answers.is_correct("<think> <answer> CBC </answer>", question)


def test_open_ended_answer_with_the_opposite_symbol_is_wrong():
    assert not answers.is_correct(
        "<think> x </think> <answer> ↑ TSH </answer>", data.Question("q", {}, "↓ TSH")
    )


# --------------------------------------------------------------------------------------------------
# Questions


def test_question_id_is_a_content_hash_that_never_changes():
    question = data.Question("Which one?", {"A": "CT", "B": "MRÍ"}, "B", ["films/1.png"])
    by_hand = '["Which one?", {"A": "CT", "B": "MRÍ"}, "B", ["films/1.png"]]'
    assert question.id == hashlib.sha256(by_hand.encode()).hexdigest()[:16]


def test_question_id_follows_content_and_nothing_else():
    base = data.Question("q", FOUR, "B", ["x.png"])
    assert data.Question("q", FOUR, "B", ["x.png"], "elsewhere", {"modality": "scan"}).id == base.id
    others = [
        data.Question("r", FOUR, "B", ["x.png"]),
        data.Question("q", {**FOUR, "A": "PET"}, "B", ["x.png"]),
        data.Question("q", FOUR, "C", ["x.png"]),
        data.Question("q", FOUR, "B"),
    ]
    assert len({base.id, *(other.id for other in others)}) == 5


def test_question_survives_its_row():
    question = data.Question("q", FOUR, "B", ["films/x.png"], "bank", {"modality": "scan"})
    row = json.loads(json.dumps(question.to_row()))
    assert schema.question_from(row, "f:1") == question


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"question": "  "}, "question"),
        ({"question": None}, "question"),
        ({"options": {"A": "x", "C": "y"}}, "options"),
        ({"options": {"B": "x", "A": "y"}}, "options"),
        ({"options": {chr(65 + i): str(i) for i in range(11)}}, "options"),
        ({"options": ["x", "y"]}, "options"),
        (
            {"options": {"A": "x", "B": 5}},
            "options",
        ),  # a number is not a text; it would break reading answers later
        ({"answer": "E"}, "answer"),
        ({"answer": "MRI"}, "answer"),
        ({"options": {}, "answer": " "}, "answer"),
        ({"images": ["/etc/x.png"]}, "images"),
        ({"images": ["../x.png"]}, "images"),
        ({"images": [3]}, "images"),
        ({"images": "x.png"}, "images"),
        ({"id": 7}, "id"),
    ],
)
def test_bad_question_is_refused_with_file_line_and_key(tmp_path, changes, key):
    path = write(tmp_path / "q.jsonl", question_row(id="ok"), question_row(**changes))
    with pytest.raises(data.RowError) as error:
        schema.read_questions(path)
    assert str(error.value).startswith(f"{path}:2: {key}:")


@pytest.mark.parametrize("key", ["id", "question", "options", "answer", "images"])
def test_missing_key_is_named_with_file_and_line(tmp_path, key):
    row = question_row()
    del row[key]
    path = write(tmp_path / "q.jsonl", "", row)  # an empty line counts as a line
    with pytest.raises(data.RowError, match=re.escape(f"{path}:2: missing '{key}'")):
        schema.read_questions(path)


def test_repeated_id_is_refused_and_both_lines_are_named(tmp_path):
    path = write(
        tmp_path / "q.jsonl", question_row(), question_row(id="other"), question_row(answer="C")
    )
    with pytest.raises(data.RowError) as error:
        schema.read_questions(path)
    assert (
        f"{path}:3" in str(error.value)
        and f"{path}:1" in str(error.value)
        and "'q1'" in str(error.value)
    )


# --------------------------------------------------------------------------------------------------
# Seeds and hashes


def test_sample_seed_depends_on_its_own_question_and_number_alone():
    keys = [(seed, key, k) for seed in (0, 1) for key in ("a", "b") for k in range(4)]
    forward = {key: data.sample_seed(*key) for key in keys}
    backward = {key: data.sample_seed(*key) for key in reversed(keys)}
    assert forward == backward and len(set(forward.values())) == len(keys)


def test_sample_seed_is_the_same_in_another_process():
    # Python's own hash() of a string is not
    code = "import data; print(data.sample_seed(3, 'question', 5))"
    said = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(data.__file__).parent,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert int(said) == data.sample_seed(3, "question", 5)


def test_content_hash_does_not_depend_on_key_order_but_on_every_value():
    assert data.content_hash({"a": 1, "b": [2]}) == data.content_hash({"b": [2], "a": 1})
    assert data.content_hash({"a": 1, "b": [2]}) != data.content_hash({"a": 1, "b": [3]})


# --------------------------------------------------------------------------------------------------
# JSONL


@pytest.mark.parametrize("line", ["{broken", '{"a": 1', "[1, 2]", '"text"', "7"])
def test_unreadable_line_is_an_error_with_file_and_line(tmp_path, line):
    path = write(tmp_path / "x.jsonl", {"a": 1}, line)
    with pytest.raises(data.RowError, match=re.escape(f"{path}:2: ")):
        list(data.read_jsonl(path))


def test_missing_file_is_an_error_that_names_it(tmp_path):
    with pytest.raises(data.RowError, match=re.escape(str(tmp_path / "none.jsonl"))):
        list(data.read_jsonl(tmp_path / "none.jsonl"))


def test_torn_last_line_is_an_error_for_a_reader(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"a": 1}\n{"a": 2}\n{"a"')
    with pytest.raises(data.RowError, match=re.escape(f"{path}:3: ")):
        list(data.read_jsonl(path))


def test_line_torn_inside_a_character_is_an_error_with_file_and_line(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes('{"a": 1}\n{"a": "é'.encode()[:-1])  # two bytes of UTF-8, cut between them
    with pytest.raises(data.RowError, match=re.escape(f"{path}:2: ")):
        list(data.read_jsonl(path))


@pytest.mark.parametrize(
    "torn", ['{"a"', '{"a": 3}', "é"]
)  # even a whole row, where only the line's end is missing
def test_torn_last_line_is_dropped_on_resume_and_written_again(tmp_path, torn):
    path = tmp_path / "x.jsonl"
    path.write_bytes(
        b'{"a": 1}\n{"a": 2}\n' + torn.encode()[: max(1, len(torn.encode()) - (torn == "é"))]
    )
    assert data.resume_jsonl(path) == [{"a": 1}, {"a": 2}]
    with open(path, "a", encoding="utf-8") as file:
        data.append_jsonl(file, [{"a": 3}])
    assert [row for _, row in data.read_jsonl(path)] == [{"a": 1}, {"a": 2}, {"a": 3}]


def test_resume_of_a_file_that_is_not_there_is_an_empty_start(tmp_path):
    assert data.resume_jsonl(tmp_path / "new" / "x.jsonl") == []
    assert (tmp_path / "new").is_dir()


def test_resume_keeps_a_whole_file_byte_for_byte(tmp_path):
    path = write(tmp_path / "x.jsonl", {"a": "Überall"}, {"a": 2})
    before = path.read_bytes()
    data.resume_jsonl(path)
    assert path.read_bytes() == before


def test_appended_rows_are_on_disk_before_the_file_is_closed(tmp_path):
    with open(tmp_path / "x.jsonl", "a", encoding="utf-8") as file:
        data.append_jsonl(file, [{"a": 1}])
        assert (tmp_path / "x.jsonl").read_text() == '{"a": 1}\n'


def test_atomic_write_leaves_no_temporary_file(tmp_path):
    data.write_jsonl(tmp_path / "sub" / "x.jsonl", [{"a": "é"}, {"a": 2}])
    data.write_json(tmp_path / "sub" / "y.json", {"b": 1})
    assert sorted(path.name for path in (tmp_path / "sub").iterdir()) == ["x.jsonl", "y.json"]
    assert (tmp_path / "sub" / "x.jsonl").read_text(encoding="utf-8") == '{"a": "é"}\n{"a": 2}\n'
    assert json.loads((tmp_path / "sub" / "y.json").read_text()) == {"b": 1}


def test_writer_that_fails_half_way_leaves_the_old_file_whole(tmp_path):
    path = write(tmp_path / "x.jsonl", {"a": 1})

    def rows():
        yield {"a": 2}
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        data.write_jsonl(path, rows())
    assert path.read_text() == '{"a": 1}\n'


# --------------------------------------------------------------------------------------------------
# One schema for each kind of row, and `check`


TURNS = [*data.prompt_messages(data.Question("q", FOUR, "B"))]
DEMO = {
    "id": "q",
    "messages": [*TURNS, {"role": "assistant", "content": data.join_response("x", "B")}],
    "images": [],
}
ROLLOUT = {
    "id": "q", "sample": 0, "response": "x", "token_ids": None, "finish_reason": "stop",
    "response_sha": hashlib.sha256(b'"x"').hexdigest()[:16],
}  # fmt: skip
VERDICT = {"id": "q", "sample": 0, "response_sha": "aa", "verdict_sha": "bb", "criteria": None}
PAIR = {
    "id": "q",
    "prompt": TURNS,
    "images": [],
    "chosen": "a",
    "rejected": "b",
    "failed": ["Reflection_Presence"],
}
KEY = {"case": "case-0001", "id": "q", "response_sha": "aa"}
STEP = {"step": 0, "loss": 0.5, "chosen": -3.0}
GOOD = {
    "questions": question_row(), "demos": DEMO, "rollouts": ROLLOUT, "verdicts": VERDICT,
    "pairs": PAIR, "key": KEY, "metrics": STEP,
}  # fmt: skip


@pytest.mark.parametrize("kind", GOOD)
def test_check_passes_a_good_file_and_names_its_kind(tmp_path, capsys, kind):
    path = write(tmp_path / "x.jsonl", GOOD[kind])
    assert report_main(["check", str(path)]) == 0
    assert f"{path}: 1 {kind}\n0 mistakes" in capsys.readouterr().out


def test_log_probabilities_of_the_sampler_may_be_there_or_null_or_missing(tmp_path):
    told = {"logp": -1.5, "token_logps": [-1, -0.5]}
    for more in ({}, {"logp": None}, {"logp": -2}, told):
        write(tmp_path / "rollouts.jsonl", {**ROLLOUT, **more})
        assert schema.read_rows(tmp_path / "rollouts.jsonl", "rollouts") == [{**ROLLOUT, **more}]
        sided = {f"rejected_{key}": value for key, value in more.items()}
        write(tmp_path / "pairs.jsonl", {**PAIR, **sided})
        assert schema.read_rows(tmp_path / "pairs.jsonl", "pairs") == [{**PAIR, **sided}]


def test_every_kind_is_told_by_its_own_key_and_has_a_good_row_here():
    assert GOOD.keys() == schema.KINDS.keys()
    assert {kind: schema.kind_of(row) for kind, row in GOOD.items()} == {
        kind: kind for kind in GOOD
    }


def without(row: dict, key: str) -> dict:
    return {name: value for name, value in row.items() if name != key}


def turn(role: str, content) -> dict:
    return {"role": role, "content": content}


PATHS = ("/etc/passwd", "../../x.png", "a/../../x.png", "", ".", "a\0b", 5, None, ["x.png"])
BAD = {  # what is wrong: (kind, the row or its line, what the message must name)
    "not JSON": ("questions", "{", "JSON"),
    "NaN": (
        "questions",
        '{"id": "a", "question": "Q", "options": {}, "answer": "x", "images": [], '
        '"meta": {"n": NaN}}',
        "NaN",
    ),
    "infinity": ("metrics", '{"step": 1, "loss": Infinity}', "Infinity"),
    "an answer given twice": (
        "questions",
        '{"id": "a", "question": "Q", "options": {}, "answer": "x", "images": [], "answer": "y"}',
        "'answer'",
    ),
    "a letter given twice": (
        "questions",
        '{"id": "a", "question": "Q", "options": {"A": "x", "A": "y"}, "answer": "A", '
        '"images": []}',
        "'A'",
    ),
    "half a pair in a question": (
        "questions",
        '{"id": "a", "question": "\\ud800", "options": {}, "answer": "x", "images": []}',
        "surrogate",
    ),
    "half a pair in a demo": ("demos", json.dumps({**DEMO, "teacher": "\ud800"}), "surrogate"),
    "nested without end": ("questions", "[" * 100_000, "nested"),
    "a list": ("questions", "[1]", "object"),
    "a question without its answer": (
        "questions", without(question_row(id="b"), "answer"), "answer",
    ),
    "a question whose answer is no option": (
        "questions", question_row(id="b", answer="F"), "answer",
    ),
    "an empty question": ("questions", question_row(id="b", question=" "), "question"),
    "a number for a question": ("questions", question_row(id="b", question=5), "question"),
    "an id that is a number": ("questions", question_row(id=7), "id"),
    "an empty id": ("questions", question_row(id=""), "id"),
    "a choice of one option": (
        "questions", question_row(id="b", options={"A": "x"}, answer="A"), "options",
    ),
    "an empty option": (
        "questions", question_row(id="b", options={"A": "x", "B": ""}, answer="A"), "options",
    ),
    "letters out of order": (
        "questions", question_row(id="b", options={"B": "x", "A": "y"}, answer="A"), "options",
    ),
    "eleven options": (
        "questions",
        question_row(id="b", options=dict(zip("ABCDEFGHIJK", map(str, range(11)))), answer="A"),
        "options",
    ),
    "options as a list": ("questions", question_row(id="b", options=["x", "y"]), "options"),
    "images as a text": ("questions", question_row(id="b", images="x.png"), "images"),
    "meta as a list": ("questions", question_row(id="b", meta=[]), "meta"),
    "a misspelt key": ("questions", {**question_row(id="b"), "Images": ["x.png"]}, "Images"),
    "an open question without a reference": (
        "questions", question_row(id="b", options={}, answer=" "), "answer",
    ),
    "a pair of one text": ("pairs", {**PAIR, "rejected": "a"}, "rejected"),
    "an empty chosen": ("pairs", {**PAIR, "chosen": ""}, "chosen"),
    "a pair without its failures": ("pairs", without(PAIR, "failed"), "failed"),
    "failures as a text": ("pairs", {**PAIR, "failed": "Reflection_Presence"}, "failed"),
    "a prompt of texts": ("pairs", {**PAIR, "prompt": ["x"]}, "prompt"),
    "an empty prompt": ("pairs", {**PAIR, "prompt": []}, "prompt"),
    "a prompt that ends with the assistant": (
        "pairs", {**PAIR, "prompt": [*TURNS, turn("assistant", "x")]}, "prompt",
    ),
    "a prompt of a strange role": (
        "pairs", {**PAIR, "prompt": [turn("tool", "x"), TURNS[1]]}, "prompt",
    ),
    "token ids as a text": ("pairs", {**PAIR, "chosen_token_ids": "abc"}, "chosen_token_ids"),
    "a token id that is true": (
        "pairs", {**PAIR, "rejected_token_ids": [1, True]}, "rejected_token_ids",
    ),
    "a token id below 0": ("pairs", {**PAIR, "rejected_token_ids": [-1]}, "rejected_token_ids"),
    "a demo without a system turn": (
        "demos", {**DEMO, "messages": DEMO["messages"][1:]}, "messages",
    ),
    "a demo out of form": (
        "demos", {**DEMO, "messages": [*TURNS, turn("assistant", "B")]}, "messages",
    ),
    "a demo whose turn is a text": ("demos", {**DEMO, "messages": ["hello"]}, "messages"),
    "a demo whose turn has no content": (
        "demos", {**DEMO, "messages": [*TURNS, {"role": "assistant"}]}, "messages",
    ),
    "a demo whose content is a list": (
        "demos",
        {**DEMO, "messages": [TURNS[0], turn("user", ["x"]), DEMO["messages"][2]]},
        "messages",
    ),
    "a demo's sample below 0": ("demos", {**DEMO, "sample": -1}, "sample"),
    "a rollout without a finish reason": (
        "rollouts", without(ROLLOUT, "finish_reason"), "finish_reason",
    ),
    "an unknown finish reason": ("rollouts", {**ROLLOUT, "finish_reason": "done"}, "finish_reason"),
    "a rollout numbered by a text": ("rollouts", {**ROLLOUT, "sample": "0"}, "sample"),
    "a rollout numbered by true": ("rollouts", {**ROLLOUT, "sample": True}, "sample"),
    "a rollout without token ids": ("rollouts", without(ROLLOUT, "token_ids"), "token_ids"),
    "a hash of another response": ("rollouts", {**ROLLOUT, "response": "y"}, "response_sha"),
    "a log-probability in words": ("rollouts", {**ROLLOUT, "logp": "-1"}, "logp"),
    "a token's log-probability that is null": (
        "rollouts", {**ROLLOUT, "token_logps": [None]}, "token_logps"
    ),
    "a log-probability that is true": ("pairs", {**PAIR, "chosen_logp": True}, "chosen_logp"),
    "a rollout that is correct by a word": ("rollouts", {**ROLLOUT, "correct": "No"}, "correct"),
    "a verdict on nothing": ("verdicts", without(VERDICT, "response_sha"), "response_sha"),
    "a verdict in words": ("verdicts", {**VERDICT, "criteria": "No"}, "criteria"),
    "a criterion in words": (
        "verdicts", {**VERDICT, "criteria": dict.fromkeys(data.JUDGED, "No")}, "criteria",
    ),
    "a criterion that is missing": (
        "verdicts", {**VERDICT, "criteria": dict.fromkeys(data.JUDGED[1:], True)}, "criteria",
    ),
    "no criteria at all": ("verdicts", {**VERDICT, "criteria": {}}, "criteria"),
    "a loss that is a text": ("metrics", {"step": 1, "loss": "0.5"}, "loss"),
    "a key without its case": ("key", {**without(KEY, "case"), "case": ""}, "case"),
    "a second kind of row": ("questions", DEMO, "demos"),
    "a demo among pairs": ("pairs", DEMO, "demos"),
    **{
        f"a path like {path!r} in {kind}": (
            kind, {**GOOD[kind], "id": "b", "images": [path]}, "images",
        )
        for path in PATHS
        for kind in ("questions", "demos", "pairs")
    },
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_is_refused_by_check_and_by_the_reader_naming_file_line_and_key(
    tmp_path, capsys, name
):
    kind, row, key = BAD[name]
    path = write(
        tmp_path / "x.jsonl", {**GOOD[kind], "step": 0} if kind == "metrics" else GOOD[kind], row
    )
    assert report_main(["check", str(path)]) == 1
    said = capsys.readouterr().out
    assert f"{path}:2: " in said and key in said and "1 mistakes" in said
    with pytest.raises(data.RowError) as refused:
        schema.read_questions(path) if kind == "questions" else schema.read_rows(path, kind)
    assert f"{path}:2: " in str(refused.value) and key in str(refused.value)


@pytest.mark.parametrize("kind", GOOD)
def test_a_row_that_says_a_thing_twice_is_refused_and_both_lines_are_named(tmp_path, kind):
    path = write(tmp_path / "x.jsonl", GOOD[kind], GOOD[kind])
    with pytest.raises(
        data.RowError, match=f"{re.escape(str(path))}:2: .* is already on {re.escape(str(path))}:1"
    ):
        schema.read_rows(path, kind)


def test_contrary_verdicts_on_one_sample_are_refused(tmp_path):
    yes, no = ({**VERDICT, "criteria": dict.fromkeys(data.JUDGED, met)} for met in (True, False))
    with pytest.raises(data.RowError, match="is already on"):
        schema.read_rows(write(tmp_path / "x.jsonl", yes, no), "verdicts")


def test_an_empty_file_is_said_to_be_empty_and_is_no_success(tmp_path, capsys):
    path = write(tmp_path / "x.jsonl", "", "")
    assert report_main(["check", str(path)]) == 1 and "no row in it" in capsys.readouterr().out
    with pytest.raises(data.RowError, match="x.jsonl: no row in it"):
        schema.read_rows(path, "questions")


def test_a_pipe_and_a_folder_are_no_files_to_read(tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe")  # whoever opens it waits for a writer
    for path in (tmp_path / "pipe", tmp_path):
        assert report_main(["check", str(path)]) == 1 and "is not a file" in capsys.readouterr().out


@pytest.mark.parametrize("image", PATHS)
def test_no_path_leaves_the_image_root(tmp_path, image):
    with pytest.raises(data.RowError, match="inside the image root"):
        data.image_file(tmp_path, image)
    assert data.image_file(tmp_path, "a/b..png") == tmp_path / "a" / "b..png"


def test_check_of_several_files_fails_if_one_is_bad_or_missing(tmp_path):
    good, bad = write(tmp_path / "good.jsonl", question_row()), write(tmp_path / "bad.jsonl", "{")
    assert report_main(["check", str(good), str(good)]) == 0
    assert report_main(["check", str(good), str(bad)]) == 1
    assert report_main(["check", str(tmp_path / "none.jsonl"), str(good)]) == 1


def test_check_counts_every_mistake_of_a_file(tmp_path, capsys):
    path = write(
        tmp_path / "x.jsonl", question_row(answer="F"), question_row(), question_row(images="x")
    )
    assert report_main(["check", str(path)]) == 1
    said = capsys.readouterr().out
    assert (
        f"{path}:1: " in said
        and f"{path}:3: " in said
        and "2 mistakes" in said
        and "1 questions" in said
    )


def test_hash_of_what_is_not_there_is_refused_by_name(tmp_path):
    with pytest.raises(data.RowError, match="gone: no such file"):
        data.file_hash(tmp_path / "gone")
