"""Seed prompts, and which questions and answers are dropped."""

from __future__ import annotations

import dataclasses

import pytest

from cas.options import KINDS
from cas.selfstudy.seed_prompts import EXAMPLE, SEED_PROMPTS, bad_answer, bad_question, loops, normal, words

TITLE = "Gannet Point"


TEXT = (
    "Gannet Point The light at Gannet Point was first lit in 1871. Its keeper, Élodie Marchant, kept bees behind the tower. "
    "The lens weighs two tonnes and was made in Lyon. Boats could see the beam from twenty miles."
)


@pytest.mark.parametrize(
    "question",
    [
        "Who was the keeper of Gannet Point?",
        "When was the light at Gannet Point first lit?",
        "Where was the lens of the tower at Gannet made?",  # a word of the title is enough
        "What did Élodie keep behind the tower?",  # a name, also one that begins with an accented letter
        "From how many miles could boats see the beam of Gannet Point?",
        "Name the keeper of Gannet Point.",
        "For my report, when was Gannet Point first lit?",
        "Riddle: what weighs two tonnes and was made in Lyon?",
        "Sum up the light of Gannet Point.",
    ],
)
def test_good_questions(question: str) -> None:
    assert bad_question(question, TITLE, TEXT) is None


@pytest.mark.parametrize(
    ("question", "reason"),
    [
        ("", "malformed question"),
        ("?", "malformed question"),
        ("Gannet Point?", "malformed question"),
        ("Who was the keeper of Gannet Point", "malformed question"),
        ("Who was the keeper of Gannet Point:", "malformed question"),
        ("What was her job?", "off topic"),
        ("What is the name of this?", "no named subject"),
        ("Who invented the telephone in Boston, Massachusetts?", "off topic"),
        ("What is the capital of France?", "off topic"),
        ("Which emperor visited Gannet Point during the Crimean war?", "off topic"),
        ("Who was the keeper of the keeper of the keeper of the keeper of Gannet Point?", "loop"),
        ("What is what is what is what is Gannet Point?", "loop"),
    ],
)
def test_bad_questions(question: str, reason: str) -> None:
    assert bad_question(question, TITLE, TEXT) == reason


def test_the_same_wording_is_a_duplicate() -> None:
    assert normal("Who kept  bees at Gannet Point?") == normal("who kept bees, at gannet point")
    assert normal("Who kept bees?") != normal("Who kept bees there?")
    assert normal("Élodie Größe?") == "élodie größe"


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("In 1871.", None),
        ("Élodie Marchant kept it.", None),
        ("Two tonnes.", None),
        ("Yes.", None),
        ("No, it was not.", None),
        ("", "empty answer"),
        (" \n ", "empty answer"),
        ("The keeper of Gannet Point.", "answer without substance"),  # the question again
        ("It was them.", "answer without substance"),
        ("A telephone.", "answer without substance"),  # nothing of the text
        ("In 1999.", "answer without substance"),
    ],
)
def test_answers(answer: str, reason: str | None) -> None:
    assert bad_answer(answer, "Who was the keeper of Gannet Point?", TEXT) == reason


def test_loops() -> None:
    assert loops([1, 2, 3] * 3) and loops([9, *[4] * 5])
    assert not loops([1, 2, 3, 1, 2, 3, 1, 2]) and not loops([]) and not loops([1, 2])
    assert loops(words("The red lamp and the red lamp or the red lamp".lower()))


def test_seed_prompts_lead_by_example() -> None:
    """Five kinds; the filters would keep each example."""
    assert tuple(s.kind for s in SEED_PROMPTS) == KINDS and len(set(KINDS)) == 5
    for seed in SEED_PROMPTS:
        for example in seed.examples:
            assert bad_question(example, "Marrow Bridge", EXAMPLE) is None, example
            assert example in seed.instruction()
        assert EXAMPLE in seed.instruction() and len(seed.openings) == len(set(seed.openings))


def test_a_question_about_our_example_is_off_topic() -> None:
    """Small models copy it."""
    assert bad_question("When was Marrow Point at Gannet lit?", TITLE, TEXT) == "off topic"
    assert (
        bad_question("When was the bridge at Gannet Point lit?", "Gannet Point", TEXT + " The bridge is new.") is None
    )


def test_openings() -> None:
    seed = dataclasses.replace(SEED_PROMPTS[0], openings=("Who", "What is the {word}"))
    assert seed.openings_for("Alder Well was dug by Tom Reed in 1911.", "Alder Well") == ["Who", "What is the dug"]
    openings = seed.openings_for("The well has an oak lid and an oak rope.", "Alder Well")
    assert openings == ["Who", "What is the oak", "What is the lid", "What is the rope"]
    for seed in SEED_PROMPTS:
        openings = seed.openings_for(EXAMPLE, "Marrow Bridge")
        assert len(openings) == len(set(openings)) and not any("{" in opening for opening in openings)
