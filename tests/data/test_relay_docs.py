"""The technical pages in ``examples/relay_docs`` and their questions are sound (what a model answers is measured)."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from cas.data.collection import Collection
from cas.evaluation.metrics import contains, normalize_answer

EXAMPLES = Path(__file__).parents[2] / "examples"
# The word or words by which a question names the subject of a page.
SUBJECTS = {
    "configuration": "configuration",
    "control_socket": "control socket",
    "error_codes": "error code",
    "installation": "install",
    "mesh": "mesh",
    "outlets": "outlet",
    "releases": "release",
    "sieves": "sieve",
    "spool": "spool",
    "taps": "tap",
}


@pytest.fixture(scope="module")
def pages() -> Collection:
    return Collection.load(EXAMPLES / "relay_docs", EXAMPLES / "relay_docs_questions.jsonl")


def test_ten_pages_with_ten_questions_each(pages: Collection) -> None:
    assert pages.skipped == () and {d.id for d in pages.documents} == set(SUBJECTS)
    assert Counter(q.document_ids for q in pages.questions) == {(d.id,): 10 for d in pages.documents}
    for question in pages.questions:
        assert re.fullmatch(rf"{question.document_ids[0]}/q\d+", question.id) and question.kind == "lookup"
    wordings = {normalize_answer(question.question) for question in pages.questions}
    assert len(wordings) == len({question.id for question in pages.questions}) == 100


def test_sizes(pages: Collection) -> None:
    """About 700 to 1,100 tokens of SmolLM2's tokenizer; words are counted because it is not always installed."""
    for document in pages.documents:
        assert 400 <= len(document.text.split()) <= 650, document.id
        assert document.title.lower().startswith(SUBJECTS[document.id])


def test_pages_look_like_technical_documentation(pages: Collection) -> None:
    texts = [
        (EXAMPLES / "relay_docs" / f"{document.id}.md").read_text(encoding="utf-8") for document in pages.documents
    ]
    for text in texts:
        assert len(re.findall(r"^## ", text, flags=re.M)) >= 3 and "```" in text and "](" in text
    for pattern in (r"^\|.*\|$", r"^> \*\*\w+:\*\*", r"^  - ", r"^1\. ", r"`[a-z]+\.[a-z_]+`"):
        assert sum(bool(re.search(pattern, text, flags=re.M)) for text in texts) >= 4, pattern
    assert sum(text.startswith("---\n") for text in texts) == 1
    ids = {document.id for document in pages.documents}
    for text in texts:  # a cross-reference leads to a page
        assert set(re.findall(r"\]\((\w+)\.md\)", text)) <= ids


def test_every_answer_is_in_its_page_and_not_in_the_question(pages: Collection) -> None:
    for question in pages.questions:
        text = " ".join(pages[question.document_ids[0]].text.split())  # lines are broken anywhere
        for answer in question.answers:
            assert normalize_answer(answer), question.id  # else the metrics cannot see it
            assert len(answer.split()) <= 6 and answer in text, (question.id, answer)
            assert not contains(question.question, [answer]), (question.id, answer)


def test_questions_are_no_sentences_of_their_page(pages: Collection) -> None:
    for question in pages.questions:
        page = normalize_answer(pages[question.document_ids[0]].text)
        words = normalize_answer(question.question).split()
        copied = [words[i : i + 6] for i in range(len(words) - 5) if " ".join(words[i : i + 6]) in page]
        assert not copied, (question.id, copied)


def test_a_third_of_the_questions_do_not_name_the_page(pages: Collection) -> None:
    def names(subject: str, question: str) -> bool:
        return re.search(rf"\b{subject}", re.sub(r"[a-z]+wick\w*|\w+\.\w+", "", question.lower())) is not None

    unnamed = [q.id for q in pages.questions if not names(SUBJECTS[q.document_ids[0]], q.question)]
    assert 30 <= len(unnamed) <= 66, len(unnamed)
