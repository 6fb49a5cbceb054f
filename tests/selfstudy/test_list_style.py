"""The request for a list of questions, and the strict reading of the reply."""

from __future__ import annotations

import pytest

from cas.options import KINDS
from cas.selfstudy.list_style import LIST_SEED_PROMPTS, instruction, read_list
from cas.selfstudy.seed_prompts import SEED_PROMPTS


def read(reply: str, finished: bool = True, number: int = 20) -> tuple[list[str], dict[str, int]]:
    questions, dropped = read_list(reply, finished, number, instruction(LIST_SEED_PROMPTS[0], "Alder Well", number))
    return questions, dict(dropped)


def test_instructions() -> None:
    """One for each kind, about the text, with the number and the title, and without examples of a language."""
    assert tuple(prompt.kind for prompt in LIST_SEED_PROMPTS) == tuple(p.kind for p in SEED_PROMPTS)
    assert {prompt.kind for prompt in LIST_SEED_PROMPTS} == set(KINDS)
    texts = [instruction(prompt, "Alder Well", 20) for prompt in LIST_SEED_PROMPTS]
    assert len(set(texts)) == 5
    for text in texts:
        assert " 20 " in text and '"Alder Well"' in text and "in the language of the text" in text
        assert "Marrow" not in text and "{" not in text and "\n" not in text
    assert '""' not in instruction(LIST_SEED_PROMPTS[0], "", 20)
    assert "{word}" in instruction(LIST_SEED_PROMPTS[0], "{word}", 20)  # a title is no format
    assert [p.answer_suffix for p in LIST_SEED_PROMPTS] == [p.answer_suffix for p in SEED_PROMPTS]


@pytest.mark.parametrize(
    "marker",
    [
        "{}. ",
        "{}.",
        "{}) ",
        "({}) ",
        "{}: ",
        "{} - ",
        "{} – ",
        " {}.  ",
        "{}．",
        "{}、",
        "（{}）",
        "{}。 "[:2] + ". ",
        "**{}.** ",
    ],
)
@pytest.mark.parametrize(
    "question",
    ["Who dug Alder Well in 1911?", "谁在1911年挖了阿尔德井？", "アルダー井戸は誰が掘りましたか？", "من حفر بئر ألدر عام 1911؟",
     "एल्डर कुआँ किसने खोदा?", "ใครเป็นคนขุดบ่ออัลเดอร์", "누가 알더 우물을 팠습니까?", "Кто выкопал колодец Алдер?"],
)  # fmt: skip
def test_numbered_lines(marker: str, question: str) -> None:
    lines = [marker.format(i) + question.replace("1911", str(1910 + i)) + " " * i for i in (1, 2, 13)]
    expected = [question.replace("1911", str(1910 + i)) for i in (1, 2, 13)]
    assert read("\n".join(lines)) == (expected, {})
    assert read("\r\n\r\n".join(lines)) == (expected, {})


@pytest.mark.parametrize("digits", ["１２３", "١٢٣", "۱۲۳", "१२३", "๑๒๓", "①②③", "一二三"])
def test_digits_of_other_scripts(digits: str) -> None:
    stop = {"①": "", "一": "、"}.get(digits[0], ".")
    assert read("\n".join(f"{d}{stop} Who dug well {i}?" for i, d in enumerate(digits))) == (
        [f"Who dug well {i}?" for i in range(3)],
        {},
    )


def test_bullets_count_in_a_reply_without_numbers_alone() -> None:
    bullets = "- Who dug Alder Well?\n* When was Alder Well dug?\n• Why is Alder Well deep?"
    expected = ["Who dug Alder Well?", "When was Alder Well dug?", "Why is Alder Well deep?"]
    assert read(bullets) == (expected, {})
    assert read("1. Who dug Alder Well?\n- Tom Reed.\n2. When was it?") == (
        ["Who dug Alder Well?", "When was it?"],
        {"malformed line": 1},
    )


def test_whatever_is_no_numbered_line_is_malformed() -> None:
    reply = (
        "Here are 20 questions about the text:\n\n1. Who dug Alder Well?\nTom Reed.\n"
        "2. When was Alder Well dug?\n\nI hope this helps!\n3.\n4. ???\n1911. was a good year?\n1.5 bar is the pressure?"
    )
    assert read(reply) == (["Who dug Alder Well?", "When was Alder Well dug?"], {"malformed line": 7})
    for reply in ("", "  \n ", "I cannot help with that.", "Who dug Alder Well?\nWhen?"):
        questions, dropped = read(reply)
        lines = sum(bool(line.strip()) for line in reply.splitlines())
        assert questions == [] and dropped.pop("malformed reply") == 1
        assert dropped.get("malformed line", 0) == lines


def test_a_list_on_one_line_is_one_question_to_the_filters() -> None:
    assert read("1. Who dug it? 2. When?")[0] == ["Who dug it? 2. When?"]


def test_a_cut_list_loses_its_last_line_alone() -> None:
    whole = "1. Who dug Alder Well?\n2. When was Alder Well dug?\n3. How deep is Al"
    assert read(whole, finished=False) == (
        ["Who dug Alder Well?", "When was Alder Well dug?"],
        {"unfinished question": 1},
    )
    assert read(whole)[0][-1] == "How deep is Al"
    ended = "1. Who dug Alder Well?\n2. When was Alder Well dug?\n"
    assert read(ended, finished=False) == (["Who dug Alder Well?", "When was Alder Well dug?"], {})
    assert read("", finished=False) == ([], {"malformed reply": 1})


def test_bold_type_and_quotation_marks_around_a_question_are_left_out() -> None:
    assert read(
        '1. **Who dug Alder Well?**\n**2. "When was Alder Well dug?"**\n3. 「誰が掘りましたか？」\n4. `Who dug it?`'
    )[0] == [
        "Who dug Alder Well?",
        "When was Alder Well dug?",
        "誰が掘りましたか？",
        "Who dug it?",
    ]
    inside = ['"Alder Well" is also called "what"?', "____ dug Alder Well.", "Is C++ older than C*?"]
    assert read("\n".join(f"{i}. {q}" for i, q in enumerate(inside, 1)))[0] == inside


def test_copies_of_the_instruction_and_surplus_questions_are_dropped() -> None:
    reply = (
        "1. Each must be answered by the text.\n2. write in the language of the text\n3. Who dug Alder Well?\n"
        "4. Write 2 questions about facts in the text above.\n5. Who cleaned Alder Well?\n6. Who listed Alder Well?"
    )
    assert read(reply, number=2) == (
        ["Who dug Alder Well?", "Who cleaned Alder Well?"],
        {"copy of the instruction": 3, "more than requested": 1},
    )


def test_thoughts_are_no_list() -> None:
    thought = "<think>\n1. First I read the text?\n2. Then I ask?\n"
    assert read(thought + "</think>\n\n1. Who dug Alder Well?") == (["Who dug Alder Well?"], {})
    questions, dropped = read(thought + "3. And", finished=False)
    assert questions == [] and dropped["malformed reply"] == 1
