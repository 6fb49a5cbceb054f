"""A document and a question."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Document:
    """One text that gets one cartridge. A title is one line; without one it is the id."""

    id: str
    title: str
    text: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "title", one_line(self.title) or one_line(self.id))

    @cached_property
    def hash(self) -> str:
        """SHA-256 (hex) of title, newline, text: what the document says, whatever its id."""
        return hashlib.sha256(f"{self.title}\n{self.text}".encode()).hexdigest()


@dataclass(frozen=True)
class Question:
    """A question, its gold answers (any one is right) and the documents that hold them."""

    id: str
    document_ids: tuple[str, ...]
    question: str
    answers: tuple[str, ...]
    choices: tuple[str, ...] | None = None
    kind: str = "question"


def one_line(text: str) -> str:
    """Every run of control characters, line breaks among them, becomes one space."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+", " ", text).strip()


def checked_id(id: str) -> str:
    """The id itself. Ids become file names and lines on a terminal, so ValueError refuses what would do harm there."""
    control = any(unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") for character in id)
    if control or not id.strip() or len(id) > 300 or id.startswith("/") or ".." in id.split("/"):
        raise ValueError(f"bad id {id[:40]!a}: 1-300 characters, no control characters, no leading '/', no '..' part")
    return id
