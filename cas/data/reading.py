"""Documents and questions out of files: text files in folders, and JSON lines."""

from __future__ import annotations

import gzip
import json
import os
import re
import unicodedata
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cas.data.documents import Document, Question, one_line
from cas.errors import CollectionError


def _checked_id(id: str) -> str:
    """The id itself. Ids become file names and lines on a terminal, so ValueError refuses what would do harm there."""
    control = any(unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") for character in id)
    if control or not id.strip() or len(id) > 300 or id.startswith("/") or ".." in id.split("/"):
        raise ValueError(f"bad id {id[:40]!a}: 1-300 characters, no control characters, no leading '/', no '..' part")
    return id


def _either(folder: Path, stem: str) -> Path | None:
    """``stem.jsonl``, else ``stem.jsonl.gz``, else None."""
    return next((path for path in (folder / f"{stem}.jsonl", folder / f"{stem}.jsonl.gz") if path.is_file()), None)


def find_files(path: Path) -> tuple[Path | None, Path | None] | None:
    """The files of documents and of questions that belong to a folder or a ``.jsonl[.gz]`` file; None if it is neither.

    A folder without ``documents.jsonl[.gz]`` has no file of documents: its text files are the documents.
    """
    if path.is_dir():
        return _either(path, "documents"), _either(path, "questions")
    if path.is_file() and path.name.endswith((".jsonl", ".jsonl.gz")):
        return path, _either(path.parent, f"{name_of(path)}.questions") or _either(path.parent, "questions")
    return None


def name_of(path: Path) -> str:
    """A collection's name: that of its folder or file, without the ending."""
    return re.sub(r"\.jsonl(\.gz)?$", "", os.path.basename(os.path.abspath(path)))


def read_documents(path: Path, packed: Path | None) -> tuple[list[Document], list[str]]:
    """The documents in a folder, or in its ``.jsonl[.gz]`` file, and a line for each that is left out.

    Raises CollectionError if none can be used, or a line is malformed.
    """
    skipped: list[str] = []
    candidates = _read_rows(packed, _document) if packed else _read_texts(path, skipped)
    documents: list[Document] = []
    first: dict[str, str] = {}  # text -> the place where it was read first
    for where, document in candidates.items():
        text = document.text
        if not text.strip():
            skipped.append(f"{where}: empty — skipped")
        elif "\0" in text or 2 * len(re.findall(r"[\x00-\x08\x0b\x0e-\x1f]", text)) > len(text):
            skipped.append(f"{where}: binary, not text — skipped")
        elif first.setdefault(text, where) != where:
            skipped.append(f"{where}: same text as {first[text]} — skipped")
        else:
            documents.append(document)
    if not documents:
        reason = f"{len(skipped)} left out, such as {skipped[0]}" if skipped else "it needs *.txt, *.md or JSON lines"
        raise CollectionError(f"{path}: no document to read; {reason}")
    return documents, skipped


def _document(row: dict[str, Any], number: int) -> Document:
    return Document(_checked_id(_string(row, "id")), _string(row, "title", default=""), _string(row, "text"))


def _read_texts(folder: Path, skipped: list[str]) -> dict[str, Document]:
    """{relative path: document} of the text files in a folder, in the order of their paths."""
    found: dict[str, Document] = {}
    taken: dict[str, str] = {}
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in relative.parts)
        if hidden or path.suffix.lower() not in (".txt", ".md") or not path.is_file():
            continue
        where, data = one_line(relative.as_posix()), path.read_bytes()
        try:
            id = _checked_id(relative.with_suffix("").as_posix())
            if taken.setdefault(id, where) != where:
                raise ValueError(f"{taken[id]} and {where} share the id {id!r}")
            text = data.decode().removeprefix("\ufeff").replace("\r\n", "\n")
        except UnicodeDecodeError as error:
            at = f"not UTF-8 text (byte 0x{data[error.start]:02x} at {error.start}); save it as UTF-8"
            skipped.append(f"{where}: {'binary, not text' if 0 in data else at} — skipped")
            continue
        except ValueError as error:
            raise CollectionError(f"{folder}: {error}; rename the file") from error
        heading = re.search(r"^#[ \t]+(\S.*)", text, flags=re.MULTILINE)
        found[where] = Document(id, heading[1] if heading else re.sub(r"[-_]+", " ", path.stem), text)
    return found


def _read_rows(path: Path, parse: Callable[[dict[str, Any], int], Any]) -> dict[str, Any]:
    """{"file line 3": what ``parse(object, line number)`` makes of that line}; its ValueErrors get file and line."""
    try:
        data = gzip.decompress(path.read_bytes()) if path.name.endswith(".gz") else path.read_bytes()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise CollectionError(f"{path}: broken gzip file ({one_line(str(error))})") from error
    found: dict[str, Any] = {}
    taken: dict[str, int] = {}
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode())
            if not isinstance(row, dict):
                raise ValueError("expected a JSON object")
            item = parse(row, number)
            if taken.setdefault(item.id, number) != number:
                raise ValueError(f"id {item.id!r} is taken by line {taken[item.id]}")
        except (ValueError, RecursionError) as error:
            reason = f"not JSON, {error.msg}" if isinstance(error, json.JSONDecodeError) else one_line(str(error))
            raise CollectionError(f"{path} line {number}: {reason}") from error
        found[f"{path.name} line {number}"] = item
    return found


def _string(row: Mapping[str, Any], key: str, default: str | None = None) -> str:
    value = default if row.get(key) is None else row[key]
    if not isinstance(value, str):
        raise ValueError(f"{key!r} is missing" if value is None else f"{key!r} must be a string")
    value.encode()  # JSON can spell lone surrogates, which no file takes: UnicodeEncodeError, a ValueError
    return value


def _strings(row: Mapping[str, Any], key: str) -> tuple[str, ...]:
    values = row.get(key)
    if not isinstance(values, list) or not values or not all(isinstance(v, str) and v.strip() for v in values):
        raise ValueError(f"{key!r} must be a list of one or more strings, none of them empty")
    return tuple(_string({key: value}, key) for value in values)


def read_questions(path: Path, check: Callable[[str], object]) -> tuple[Question, ...]:
    """Questions of a file; one without an id is called ``q<line>``. ``check``: raises ValueError for an unknown document."""

    def parse(row: dict[str, Any], number: int) -> Question:
        id, document_ids = _checked_id(_string(row, "id", default=f"q{number}")), _strings(row, "document_ids")
        for name in document_ids:
            check(name)
        question, answers = _string(row, "question"), _strings(row, "answers")
        if not question.strip():
            raise ValueError("'question' is empty")
        choices = None if row.get("choices") is None else _strings(row, "choices")
        return Question(id, document_ids, question, answers, choices, _string(row, "kind", default="question"))

    return tuple(_read_rows(path, parse).values())
