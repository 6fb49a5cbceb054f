"""Whole-sentence chunks of a document, each with its place in the text.

A *word* is a run of characters without whitespace; a run beyond 40 characters counts as several words, and each Chinese
or Japanese character as one, so that text without spaces is cut to size too.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass

_CJK = r"\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_CJK}]|[^\s{_CJK}]{{1,40}}")

# Each match is where one sentence stops and the next begins: `match.end()`.
_BREAK = re.compile(
    r"""(?<![.!?…])(?P<stop>[.!?…]+)["'”’»)\]]*\s+  # closing punctuation, then whitespace
      | [。！？]+[」』”）]*\s*                           # full-width stops need no whitespace
      | \n[^\S\n]*\n\s*                               # a blank line
      | \n(?=\s*(?:[-*+•|\#]|\d+[.)]\s))              # the next line is a list item, a table row or a heading
    """,
    re.VERBOSE,
)
_TITLES = "mr mrs ms dr prof st jr sr gen gov sen rep inc ltd co corp dept"
_REFERENCES = "no nos fig figs eq eqs sec ch vol ed eds pp cf vs etc al approx ca"
_MONTHS = "jan feb mar apr jun jul aug sep sept oct nov dec"
_ABBREVIATION = re.compile(
    rf"""(?:^|[\s(\["'“‘])
         (?: [^\W\d_]                     # an initial: J. Smith
           | (?:[^\W\d_]\.)+[^\W\d_]      # e.g. U.S.
           | {"|".join(f"{_TITLES} {_REFERENCES} {_MONTHS}".split())} )$
      | (?:^|\n)[^\S\n]*\d{{1,3}}$         # the number of a list item or heading
    """,
    re.VERBOSE | re.IGNORECASE,
)


@dataclass(frozen=True)
class Chunk:
    """A piece of a document: ``document_text[start : start + len(text)] == text`` (offsets in characters)."""

    document_id: str
    start: int
    text: str


def split_sentences(text: str, max_words: int = 120) -> list[tuple[int, int]]:
    """Character spans ``(start, end)`` of the sentences, in order, without gaps: together they are the whole text.

    The whitespace after a sentence belongs to it. A sentence of more than ``max_words`` words is cut between words.
    """
    if max_words < 1:
        raise ValueError(f"max_words must be at least 1, not {max_words}")
    spans: list[tuple[int, int]] = []
    start = 0
    ends = [match.end() for match in _BREAK.finditer(text) if _ends_sentence(text, match)]
    for end in [*ends, len(text)]:
        words = list(_WORD.finditer(text, start, end))
        for word in words[max_words::max_words]:
            spans.append((start, word.start()))
            start = word.start()
        if end > start:
            spans.append((start, end))
        start = end
    return spans


def _ends_sentence(text: str, match: re.Match[str]) -> bool:
    """False after an abbreviation ("Dr. Who", "e.g. this", "J. Smith") or when the text goes on in lower case."""
    stop = match["stop"]
    if stop is None or match[0].count("\n") > 1 or match.end() == len(text):
        return True
    if text[match.end()].islower():
        return False
    before = text[max(0, match.start() - 24) : match.start()]
    return stop != "." or not _ABBREVIATION.search(before)


def chunk_document(document_id: str, text: str, words: int = 120, overlap: int = 1) -> list[Chunk]:
    """Cut ``text`` into chunks of whole sentences, each at most ``words`` words, filled greedily.

    A chunk begins with the last ``overlap`` sentences of the one before it, as far as they leave room for a new one.
    Chunks carry no whitespace at either end; every word of the text is in at least one. Blank text has no chunks.
    """
    if words < 1 or overlap < 0:
        raise ValueError(f"a chunk needs words >= 1 and overlap >= 0, not words={words}, overlap={overlap}")
    spans = split_sentences(text, words)
    counts = [sum(1 for _ in _WORD.finditer(text, start, end)) for start, end in spans]
    chunks: list[Chunk] = []
    first = 0
    fresh = 0  # the first sentence that no chunk holds yet
    while fresh < len(spans):
        # Give up overlap, oldest first, until the next new sentence fits.
        while first < fresh and sum(counts[first : fresh + 1]) > words:
            first += 1
        end, total = fresh + 1, sum(counts[first : fresh + 1])
        while end < len(spans) and total + counts[end] <= words:
            total += counts[end]
            end += 1
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
