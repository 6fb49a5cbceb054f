"""Documents and questions out of JSON: lines, arrays, and BEIR folders, with the field names that others use."""

from __future__ import annotations

import gzip
import json
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from cas.data.documents import Document, Question, checked_id, one_line
from cas.data.folder import LeftOut
from cas.errors import CollectionError

# Names of a field, in the order in which they are looked for.
IDS = ("id", "_id", "doc_id", "docid", "document_id", "docno", "pid", "passage_id", "uuid", "url", "source")
TEXTS = ("text", "contents", "content", "page_content", "body", "passage", "passage_text", "document")
TITLES = ("title", "headline", "heading", "name")
_ARRAYS = ("documents", "docs", "corpus", "passages", "data", "rows", "items")  # in a JSON object


def read_document(row: Mapping[str, Any], number: int) -> Document:
    """A document of one row. Raises ValueError that names the fields found."""
    more = row.get("metadata")
    both = {**(more if isinstance(more, dict) else {}), **{k: v for k, v in row.items() if v is not None}}
    key, text = _first(both, IDS, "id"), _first(row, TEXTS, "text")
    title = next((k for k in TITLES if isinstance(both.get(k), str)), None)
    id = _id(both, key)
    # Others' ids are addresses, too: a leading "/" would be refused.
    return Document(
        checked_id(id.lstrip("/") if key in ("url", "source") else id),
        _string(both if title else row, title or "title", ""),
        _string(row, text),
    )


def _first(row: Mapping[str, Any], names: tuple[str, ...], wanted: str) -> str:
    key = next((k for k in names if row.get(k) is not None), None)
    if key is None:
        raise ValueError(f"{wanted!r} is missing{_found(row)}; it may be called {', '.join(names[1:])}")
    return key


def _found(row: Mapping[str, Any]) -> str:
    keys = [one_line(str(key))[:30] for key in row]
    return f" (fields found: {', '.join(keys[:12])}{', …' if len(keys) > 12 else ''})" if keys else ""


def read_question(row: Mapping[str, Any], number: int) -> Question:
    """A question of one row; one without an id is called ``q<line>``. Raises ValueError that names the fields found."""
    id = checked_id(f"q{number}" if row.get("id") is None else _id(row, "id"))
    names = row.get("document_ids")
    if isinstance(names, list):
        row = {**row, "document_ids": [str(name) if type(name) is int else name for name in names]}
    document_ids = _strings(row, "document_ids")
    question, answers = _string(row, "question"), _strings(row, "answers")
    if not question.strip():
        raise ValueError("'question' is empty")
    choices = None if row.get("choices") is None else _strings(row, "choices")
    return Question(id, document_ids, question, answers, choices, _string(row, "kind", "question"))


def read_rows(path: Path, parse: Callable[[dict[str, Any], int], Any], left_out: list[LeftOut]) -> dict[str, Any]:
    """{"file line 3": what ``parse(object, line number)`` makes of that line}; its ValueErrors get file and line.

    An id names one thing: a row that repeats an earlier one exactly is left out, one with an id that is taken is refused.
    """
    found: dict[str, Any] = {}
    taken: dict[str, tuple[int, str]] = {}
    unit, rows = _rows(path)
    for number, line in rows:
        try:
            row = json.loads(line.decode()) if isinstance(line, bytes) else line
            if not isinstance(row, dict):
                raise ValueError("expected a JSON object")
            item = parse(row, number)
            if item is None:
                continue
            where = f"{path.name} {unit} {number}"
            first, at = taken.setdefault(item.id, (number, where))
            if first != number and found[at] == item:
                left_out.append(LeftOut(where, "repeated", f"repeats {unit} {first}", item.id))
                continue
            if first != number:
                raise ValueError(f"id {item.id!r} is taken by {unit} {first}")
        except (ValueError, RecursionError) as error:
            reason = f"not JSON, {error.msg}" if isinstance(error, json.JSONDecodeError) else one_line(str(error))
            raise CollectionError(f"{path} {unit} {number}: {reason}") from error
        found[where] = item
    return found


def _rows(path: Path) -> tuple[str, Iterator[tuple[int, Any]]]:
    """What a row of the file is called, and (number, row): lines as bytes, or the items of an array in ``.json``."""
    try:
        data = gzip.decompress(path.read_bytes()) if path.name.endswith(".gz") else path.read_bytes()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise CollectionError(f"{path}: broken gzip file ({one_line(str(error))})") from error
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):  # what Windows' shell writes
        data = data.decode("utf-16", errors="replace").encode(errors="replace")
    data = data.removeprefix(b"\xef\xbb\xbf")
    if not path.name.removesuffix(".gz").endswith(".json"):
        return "line", ((n, line) for n, line in enumerate(data.split(b"\n"), 1) if line.strip())
    try:
        value = json.loads(data.decode())
    except (ValueError, RecursionError) as error:
        if b"\n" in data.strip():  # JSON lines under another ending
            return "line", ((n, line) for n, line in enumerate(data.split(b"\n"), 1) if line.strip())
        raise CollectionError(f"{path}: not JSON ({one_line(str(error))})") from error
    if isinstance(value, dict):
        key = next((k for k in _ARRAYS if isinstance(value.get(k), list)), None)
        if key is None:
            raise CollectionError(f"{path}: expected an array of documents{_found(value)}")
        value = value[key]
    if not isinstance(value, list):
        raise CollectionError(f"{path}: expected an array of documents")
    return "item", iter(enumerate(value, 1))


def _id(row: Mapping[str, Any], key: str) -> str:
    """An id: a string, or an integer as one."""
    return str(row[key]) if type(row.get(key)) is int else _string(row, key)


def _string(row: Mapping[str, Any], key: str, default: str | None = None) -> str:
    value = default if row.get(key) is None else row[key]
    if not isinstance(value, str):
        raise ValueError(f"{key!r} is missing{_found(row)}" if value is None else f"{key!r} must be a string")
    value.encode()  # JSON can spell lone surrogates, which no file takes: UnicodeEncodeError, a ValueError
    return value


def _strings(row: Mapping[str, Any], key: str) -> tuple[str, ...]:
    values = row.get(key)
    if not isinstance(values, list) or not values or not all(isinstance(v, str) and v.strip() for v in values):
        found = _found(row) if values is None else ""
        raise ValueError(f"{key!r} must be a list of one or more strings, none of them empty{found}")
    return tuple(_string({key: value}, key) for value in values)


# -- BEIR --------------------------------------------------------------------------------------------------------------


def read_beir_questions(folder: Path, queries: Path, left_out: list[LeftOut]) -> tuple[Question, ...]:
    """The queries of a BEIR folder that have answers (``answers`` or ``answer``, also in ``metadata``) and judgments.

    ``qrels/*.tsv`` has lines "query-id corpus-id score", or TREC's four columns. A query without answers is left out.
    """
    relevant = _judgments(folder / "qrels")

    def parse(row: dict[str, Any], number: int) -> Question | None:
        id = checked_id(_id(row, _first(row, ("_id", "id"), "_id")))
        more = row.get("metadata")
        both = {**(more if isinstance(more, dict) else {}), **row}
        answers = both.get("answers", both.get("answer"))
        answers = [answers] if isinstance(answers, str) else answers
        if not answers or id not in relevant:
            kind = "questions without answers" if not answers else "questions without a relevant document"
            left_out.append(LeftOut(f"{queries.name} line {number}", kind))
            return None
        question = _string(row, _first(row, ("text", "question", "query"), "text"))
        return Question(id, tuple(relevant[id]), question, _strings({"answers": answers}, "answers"))

    return tuple(read_rows(queries, parse, left_out).values())


def _judgments(folder: Path) -> dict[str, list[str]]:
    """{query id: ids of its relevant documents}, in the order of the files."""
    relevant: defaultdict[str, list[str]] = defaultdict(list)
    for file in sorted(folder.glob("*.tsv")):
        for number, line in enumerate(file.read_text(encoding="utf-8-sig", errors="replace").splitlines(), 1):
            cells = line.split("\t") if "\t" in line else line.split()
            if not cells or (number == 1 and not cells[-1].strip().lstrip("-").isdecimal()):
                continue  # the header
            try:
                query, document, score = cells[0], cells[-2], float(cells[-1])
            except (ValueError, IndexError) as error:
                raise CollectionError(f"{file} line {number}: expected query-id, corpus-id and score") from error
            if score > 0 and document not in relevant[query]:
                relevant[query].append(document)
    return relevant
