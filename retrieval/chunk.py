"""Whole-sentence chunks of a document, each with its place in the text.

A *word* is a run of characters without whitespace; a run beyond 40 characters counts as several words, and each Chinese
or Japanese character as one. Sizes can also be limited in the tokens of the model that reads them.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import regex

_CJK = r"\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_CJK}]|[^\s{_CJK}]{{1,40}}")

# Each match is where one sentence stops and the next begins: `match.end()`.
_BREAK = regex.compile(
    r"""(?<![.!?…])(?P<stop>[.!?…]+)["'”’»)\]]*\s+  # closing punctuation, then whitespace
      | (?:[\p{Sentence_Terminal}--[.!?\u2024．]]|．(?!\d))+[\p{Pe}\p{Pf}"']*\s*  # other scripts: 。 ؟ । ։ need none
      | (?<=[\p{Han}\p{Hira}\p{Kana}])[!?]+["'”’]*(?=[\p{Han}\p{Hira}\p{Kana}])  # ASCII marks in Chinese, Japanese
      | \n[^\S\n]*\n\s*                               # a blank line
      | \n(?=\s*(?:[-*+•|\#]|\d+[.)]\s))              # the next line is a list item, a table row or a heading
      | (?<=[\p{Thai}\p{Lao}]{30})\s+(?=[\p{Thai}\p{Lao}])  # no stops in Thai and Lao: a space ends a long phrase
      | (?<=[\p{Thai}\p{Lao}])\s*\n\s*
    """,
    regex.VERBOSE | regex.V1,
)
_TITLES = "mr mrs ms dr prof st jr sr gen gov sen rep inc ltd co corp dept"
_REFERENCES = "no nos fig figs eq eqs sec ch vol ed eds pp cf vs etc al approx ca"
_MONTHS = "jan feb mar apr jun jul aug sep sept oct nov dec"
_ABBREVIATION = regex.compile(
    rf"""(?:^|[\s(\["'“‘])
         (?: [\p{{Lu}}\p{{Ll}}]           # an initial: J. Smith
           | (?:[^\W\d_]\.)+[^\W\d_]      # e.g. U.S.
           | {"|".join(f"{_TITLES} {_REFERENCES} {_MONTHS}".split())} )$
      | (?:^|\n)[^\S\n]*\d{{1,3}}$         # the number of a list item or heading
    """,
    regex.VERBOSE | regex.IGNORECASE,
)


@dataclass(frozen=True)
class Chunk:
    """A piece of a document: ``document_text[start : start + len(text)] == text`` (offsets in characters)."""

    document_id: str
    start: int
    text: str


def split_sentences(text: str, limit: int = 120, count: Callable[[str], int] | None = None) -> list[tuple[int, int]]:
    """Character spans ``(start, end)`` of the sentences, in order, without gaps: together they are the whole text.

    The whitespace after a sentence belongs to it. Sentences end by Unicode's Sentence_Terminal property, at blank
    lines, before list items, and in Thai and Lao at line breaks and at the spaces between long phrases.

    Args:
        limit: the most words of a sentence, or the most tokens if ``count`` is given. A longer sentence is cut between
            words; counted in tokens, between lines if it has several, else between words, else after punctuation, else
            between grapheme clusters.
        count: returns the number of tokens of a text; it gets texts without whitespace at either end. A single
            character of more tokens than the limit stays whole.
    """
    if limit < 1:
        raise ValueError(f"the limit must be at least 1, not {limit}")
    spans: list[tuple[int, int]] = []
    start = 0
    ends = [match.end() for match in _BREAK.finditer(text) if _ends_sentence(text, match)]
    for end in [*ends, len(text)]:
        if end > start:
            cut = _cut_words(text, start, end, limit) if count is None else _cut_tokens(text, start, end, limit, count)
            spans.extend(cut)
        start = end
    return spans


def truncate(text: str, limit: int, count: Callable[[str], int]) -> str:
    """The beginning of a text, at most ``limit`` tokens, cut as a long sentence is."""
    return next((text[start:end].rstrip() for start, end in _cut_tokens(text, 0, len(text), limit, count)), "")


def count_words(text: str) -> int:
    """The number of words, as this module counts them."""
    return sum(1 for _ in _WORD.finditer(text))


def _cut_words(text: str, start: int, end: int, limit: int) -> Iterator[tuple[int, int]]:
    words = list(_WORD.finditer(text, start, end))
    for word in words[limit::limit]:
        yield start, word.start()
        start = word.start()
    yield start, end


# Where a sentence that is too long may be cut, the best place first.
_CUTS = [regex.compile(pattern) for pattern in (r"\n\s*", r"\s+", r"[\p{P}\p{S}]+\s*", r"\X")]


def _cut_tokens(text: str, start: int, end: int, limit: int, count: Callable[[str], int]) -> Iterator[tuple[int, int]]:
    """Spans of at most ``limit`` tokens that make up text[start:end]."""

    def fits(place: int) -> bool:
        return count(text[start:place].strip()) <= limit

    size = 4 * limit  # characters that are likely too many
    while start < end:
        place = min(end, start + size)
        while place < end and fits(place):
            place = min(end, start + 2 * (place - start))
        if place < end or not fits(end):
            place = _last_cut(text, start, place, fits)
            size = 2 * (place - start)
        yield start, place
        start = place


def _last_cut(text: str, start: int, end: int, fits: Callable[[int], bool]) -> int:
    """The last place of the best kind to cut text[start:end] such that the first part fits."""
    first = end - len(text[start:end].lstrip())  # before it there is nothing to count
    for pattern in _CUTS:
        places = [m.end() for m in pattern.finditer(text, start, end) if first < m.end() < end]
        low, high = -1, len(places)  # the place at `low` fits, the one at `high` does not
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(places[middle]) else (low, middle)
        if low >= 0:
            return places[low]
    return min(first + 1, end)


def _ends_sentence(text: str, match: regex.Match[str]) -> bool:
    """False after an abbreviation ("Dr. Who", "e.g. this", "J. Smith") or when the text goes on in lower case."""
    stop = match["stop"]
    if stop is None or match[0].count("\n") > 1 or match.end() == len(text):
        return True
    if text[match.end()].islower():
        return False
    before = text[max(0, match.start() - 24) : match.start()]
    return stop != "." or not _ABBREVIATION.search(before)


def chunk_document(
    document_id: str,
    text: str,
    words: int = 120,
    overlap: int = 1,
    limit: int | None = None,
    count: Callable[[str], int] | None = None,
) -> list[Chunk]:
    """Cut ``text`` into chunks of whole sentences, filled greedily.

    A chunk has at most ``words`` words and, if ``limit`` and ``count`` are given, at most ``limit`` tokens.

    A chunk begins with the last ``overlap`` sentences of the one before it, as far as they leave room for a new one.
    Chunks carry no whitespace at either end; every word of the text is in at least one. Blank text has no chunks.
    """
    if words < 1 or overlap < 0 or (limit is not None and limit < 1):
        raise ValueError(f"a chunk needs words >= 1, overlap >= 0, limit >= 1, not {words=}, {overlap=}, {limit=}")
    spans = split_sentences(text, words)
    sizes = [(count_words(text[start:end]), 0) for start, end in spans]
    if count is not None and limit is not None:
        spans = [piece for span in spans for piece in _cut_tokens(text, *span, limit, count)]
        sizes = [(count_words(text[start:end]), count(text[start:end].strip())) for start, end in spans]

    def fits(first: int, end: int) -> bool:
        several = sizes[first:end]
        return sum(size[0] for size in several) <= words and (
            limit is None or sum(size[1] for size in several) <= limit
        )

    chunks: list[Chunk] = []
    first = 0
    fresh = 0  # the first sentence that no chunk holds yet
    while fresh < len(spans):
        # Give up overlap, oldest first, until the next new sentence fits.
        while first < fresh and not fits(first, fresh + 1):
            first += 1
        end = fresh + 1
        while end < len(spans) and fits(first, end + 1):
            end += 1
        # Tokenizers may count a text a little longer than its sentences.
        piece = text[spans[first][0] : spans[end - 1][1]]
        while count is not None and limit is not None and end - first > 1 and count(piece.strip()) > limit:
            first, end = (first + 1, end) if first < fresh else (first, end - 1)
            piece = text[spans[first][0] : spans[end - 1][1]]
        if body := piece.strip():
            chunks.append(Chunk(document_id, spans[first][0] + len(piece) - len(piece.lstrip()), body))
        first, fresh = max(end - overlap, 0), end
    return chunks


def with_title(title: str, text: str) -> str:
    """What is embedded for a chunk: ``"title\\n\\ntext"``, or the text alone if it already begins with the title."""
    title = title.strip()
    if not title or text.lstrip("# \t\n").startswith(title):
        return text
    return f"{title}\n\n{text}" if text else title


def content_hash(title: str, text: str) -> str:
    """SHA-256 of a document's title and text, in hex."""
    return hashlib.sha256(json.dumps([title, text]).encode()).hexdigest()
