"""The subject of a question: what tells the documents of a collection apart."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace

import regex

from cas.data.collection import Collection
from cas.data.documents import Document
from cas.selfstudy.seed_prompts import content_units, spaceless, units

MOST_DOCUMENTS = 10  # that a word may occur in and still tell them apart
TITLE_LETTERS = 80  # of a title that is put before a question
# Names from code: --option, snake_case, camelCase, module.name, a path, letters with digits.
_CODE_NAME = regex.compile(
    r"(?<![\p{L}\p{N}])(?:--?\p{L}[\w-]*|\w+(?:(?:\.|::|/)\w+)+|\w*\p{L}_\w+|\p{Ll}\w*\p{Lu}\w*|\p{L}+\p{N}\w*|\p{N}+\p{L}\w*)"
)


def told_apart(documents: Collection, others: Mapping[str, str] | None = None) -> Collection:
    """The documents as self-study calls them: one that shares its title is called by its id, with the title behind it.

    Args: others: titles of further documents that answer beside them, by id.
    """
    titles = {**(others or {}), **{d.id: d.title for d in documents.documents}}
    shared = Counter(titles.values())
    named = tuple(replace(d, title=f"{d.id} ({d.title})") if shared[d.title] > 1 else d for d in documents.documents)
    return replace(documents, documents=named)


class Subjects:
    """Finds the subject of a question, which must identify it among several loaded cartridges.

    A subject is a word of the text that at most a tenth of the documents contain and no more than ten (with a single
    document, any word of it but stop words), a word of the title that at most half of them contain, or a name from code.
    In scripts without spaces, two rare pairs of characters count as one word.
    """

    def __init__(self, documents: Iterable[Document]) -> None:
        self.documents, self.frequency = 0, Counter[str]()  # unit: number of documents
        for document in documents:
            self.documents += 1
            self.frequency.update({*units(document.title), *units(document.text)})

    def complete(self, question: str, title: str, text: str) -> str:
        """The question, or "title: question" if it names no subject of the titled text: a form that every language has."""
        return question if self.names(question, title, text) else f"{_short(title)}: {question}"

    def names(self, question: str, title: str, text: str) -> bool:
        """Whether a question names a subject of the titled text that it is about."""
        if any(name in text or name in title for name in _CODE_NAME.findall(question)):
            return True
        asked = set(content_units(question))
        if any(self.frequency[unit] <= max(1, self.documents / 2) for unit in asked & set(content_units(title))):
            return True
        most = max(1, min(self.documents // 10, MOST_DOCUMENTS))
        rare = [unit for unit in asked & set(units(text)) if 0 < self.frequency[unit] <= most]
        return sum(1 if spaceless(unit) else 2 for unit in rare) >= 2


def _short(title: str) -> str:
    """A title, or the words at its beginning if it is long."""
    if len(title) <= TITLE_LETTERS:
        return title
    cut = title[: TITLE_LETTERS - 1]
    return (cut.rpartition(" ")[0] or cut).rstrip() + "…"
