"""Documents and questions out of a folder as it is, or out of a file of JSON."""

from __future__ import annotations

import json
import os
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cas.data import convert
from cas.data.documents import Document, Question, checked_id, one_line
from cas.data.folder import CLASSIC, Entry, LeftOut, list_files, names, summary
from cas.data.rows import read_beir_questions, read_document, read_question, read_rows
from cas.data.text import (
    FRONT_MATTER,
    MARKDOWN,
    binary_kind,
    decode,
    is_drawing,
    may_guess,
    split_front_matter,
    title_in,
    without_data_uris,
)
from cas.errors import CollectionError

_JSON = re.compile(r"\.jsonl?(\.gz)?$")
_JSON_LINES = re.compile(r"\.jsonl(\.gz)?$")
_HEAD = 1 << 16  # bytes that show whether a large file is binary
_PAGES = (*CLASSIC, *MARKDOWN, ".rst", ".adoc", ".asciidoc", ".org", ".tex", *convert.FORMATS)  # written to be read


@dataclass
class Reading:
    """What was read.

    Attributes:
        documents: in the order of reading. left_out: everything else. encodings: {codec: files that were read in it}.
        outside: files that were read through links out of the folder.
    """

    documents: list[Document] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    encodings: defaultdict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    outside: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """What the user is told: one line of all that was not read, and one each of encodings and links, if any."""
        text = summary(self.left_out, convert.INSTALL)
        lines = [f"{text}; cas.train --dry-run lists them"] if text else []
        if self.encodings:
            as_what = (f"{codec}: {len(found)} ({names(found)})" for codec, found in sorted(self.encodings.items()))
            lines.append(f"read as {'; '.join(as_what)}")
        if self.outside:
            lines.append(f"read through links out of the folder: {len(self.outside)} ({names(self.outside)})")
        return lines


@dataclass(frozen=True)
class Source:
    """The files of a collection. ``packed``: JSON with all documents, else they are the files of the folder ``path``."""

    path: Path
    packed: Path | None
    questions: Path | None
    beir: bool = False


def _either(folder: Path, stem: str) -> Path | None:
    """``stem.jsonl``, else ``stem.jsonl.gz``, else None."""
    return next((path for path in (folder / f"{stem}.jsonl", folder / f"{stem}.jsonl.gz") if path.is_file()), None)


def find_source(path: Path) -> Source | None:
    """The files that belong to a folder, or to a ``.jsonl[.gz]`` or ``.json`` file; None if it is neither.

    A folder without ``documents.jsonl[.gz]`` has no file of documents: its files are the documents. One with a corpus and
    queries or judgments as BEIR has them (``corpus.jsonl``, ``queries.jsonl``, ``qrels/``) is read as that.
    """
    if path.is_dir():
        packed, corpus, queries = (_either(path, stem) for stem in ("documents", "corpus", "queries"))
        if packed is None and corpus is not None and (queries is not None or (path / "qrels").is_dir()):
            own = _either(path, "questions")
            return Source(path, corpus, own or queries, beir=own is None and queries is not None)
        return Source(path, packed, _either(path, "questions"))
    if path.is_file() and _JSON.search(path.name):
        return Source(
            path, path, _either(path.parent, f"{name_of(path)}.questions") or _either(path.parent, "questions")
        )
    return None


def name_of(path: Path) -> str:
    """A collection's name: that of its folder or file, without the ending."""
    return _JSON.sub("", os.path.basename(os.path.abspath(path)))


def read_documents(
    source: Source,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Reading:
    """The documents of a folder or of its file.

    Args:
        include, exclude: globs of files to read or not, for a folder of files.
        progress: called with (files read, files) of a folder.

    Raises: CollectionError if none can be used, or a row is malformed.
    """
    reading = Reading()
    if source.packed is None:
        candidates = _read_files(source, include, exclude, reading, progress)
    else:
        if include or exclude:
            raise CollectionError(
                f"{source.packed}: --include and --exclude choose files of a folder, not rows of a file"
            )
        candidates = read_rows(source.packed, read_document, reading.left_out)
    first: dict[str, str] = {}  # text -> the place where it was read first
    for where, document in candidates.items():
        text = document.text
        if not text.strip():
            kind = "empty" if _suffix(where) not in convert.FORMATS else "without text"
            reading.left_out.append(LeftOut(where, kind, id=document.id))
        elif source.packed is not None and _is_binary(text):
            reading.left_out.append(LeftOut(where, "other binary file", "binary, not text", document.id))
        elif first.setdefault(text, where) != where:
            kind = "with the text of another"
            reading.left_out.append(LeftOut(where, kind, f"same text as {first[text]}", document.id))
        else:
            reading.documents.append(document)
    if not reading.documents:
        found = summary(reading.left_out, convert.INSTALL)
        if any(item.kind == "JSON lines file" for item in reading.left_out):
            found += "; give the JSON lines file itself as --collection"
        raise CollectionError(f"{source.path}: no document to read; {found or 'it needs text files or JSON lines'}")
    return reading


def _is_binary(text: str) -> bool:
    return "\0" in text or 2 * len(re.findall(r"[\x00-\x08\x0b\x0e-\x1f]", text)) > len(text)


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


# -- the files of a folder ---------------------------------------------------------------------------------------------


def _read_files(
    source: Source,
    include: Sequence[str],
    exclude: Sequence[str],
    reading: Reading,
    progress: Callable[[int, int], None],
) -> dict[str, Document]:
    """{path below the folder: document} of the files that are text or can be converted, in the order of reading."""
    found: dict[str, Document] = {}
    taken: dict[str, str] = {}
    entries = list_files(source.path, include, exclude, reading.left_out)
    if source.questions is not None:
        entries = [entry for entry in entries if entry.name != source.questions.name]
    for done, entry in enumerate(entries):
        progress(done, len(entries))
        where = one_line(entry.name)
        try:
            id = checked_id(_free_id(entry, taken))
        except ValueError as error:
            reading.left_out.append(LeftOut(where, "with an unusable name", f"{error}; rename the file"))
            continue
        if where in found or id in taken:  # such as one name in two Unicode forms
            reading.left_out.append(LeftOut(where, "with the name of another", f"same name as {taken.get(id, where)}"))
            continue
        try:
            document = _read_file(entry, id, where, reading)
        except OSError as error:
            reading.left_out.append(LeftOut(where, "unreadable", f"unreadable ({error.strerror or error})", id))
            continue
        if document is not None:
            found[where], taken[id] = document, where
            if entry.outside:
                reading.outside.append(where)
    return found


def _free_id(entry: Entry, taken: dict[str, str]) -> str:
    """The path without .txt or .md; with it, or with a dot in place of an ending, if that id is taken."""
    name = entry.name
    short = name[: -len(entry.suffix)] if entry.suffix in CLASSIC else name
    if short not in taken:
        return short
    return name if name != short else f"{name}."


def _read_file(entry: Entry, id: str, where: str, reading: Reading) -> Document | None:
    """A file as a document; None if it is none, which is recorded."""
    suffix = entry.suffix
    if _JSON_LINES.search(entry.name.lower()):
        if _holds_questions(entry):
            reading.left_out.append(LeftOut(where, "question file", "questions, no document"))
        else:
            why = "JSON lines are a collection of their own; give the file as --collection"
            reading.left_out.append(LeftOut(where, "JSON lines file", why))
        return None
    with open(entry.path, "rb") as file:
        head = file.read(_HEAD)
        if suffix not in CLASSIC and head.startswith(b"%PDF-"):
            suffix = ".pdf"
        converted = suffix in convert.FORMATS
        binary = not converted and (is_drawing(suffix, head) or (len(head) == _HEAD and _looks_binary(head)))
        data = head if binary else head + file.read()  # a film is not read to its end
    if converted:
        return _convert(data, suffix, entry, id, where, reading)
    decoded = None if binary else decode(data, guess=may_guess(suffix, data))
    if decoded is None:
        kind = binary_kind(suffix, head)
        reading.left_out.append(LeftOut(where, kind, f"{kind}, not text", id))
        return None
    text, codec = decoded
    if codec:
        reading.encodings[codec].append(where)
    text, declared = text.replace("\r\n", "\n"), None
    if suffix in FRONT_MATTER:
        declared, text = split_front_matter(text)
    text = without_data_uris(text)
    return Document(id, _title(text, suffix, declared) or _title_of(entry.name), text)


def _looks_binary(head: bytes) -> bool:
    return b"\0" in head and decode(head[: head.rfind(b"\n") + 1] or head) is None


def _convert(data: bytes, suffix: str, entry: Entry, id: str, where: str, reading: Reading) -> Document | None:
    kind = convert.FORMATS[suffix][1]
    if not convert.available():
        reading.left_out.append(LeftOut(where, f"needs {kind}", f"{kind}, which needs: {convert.INSTALL}", id))
        return None
    if not data.strip():
        reading.left_out.append(LeftOut(where, "empty", id=id))
        return None
    if suffix in convert.AS_TEXT:
        decoded = decode(data)
        if decoded is None and suffix in convert.PAGES:  # the library would make text of anything
            reading.left_out.append(LeftOut(where, "other binary file", f"binary, not {kind}", id))
            return None
        if decoded is not None:
            text, codec = decoded
            if codec:
                reading.encodings[codec].append(where)
            data = text.encode(errors="replace")
    try:
        text, declared = convert.to_markdown(data, suffix)
    except convert.NotConverted as error:
        reading.left_out.append(LeftOut(where, "that cannot be converted", f"cannot be converted ({error})", id))
        return None
    text = without_data_uris(text)
    if suffix != ".pdf":  # where "# " begins a comment in a listing
        # Sheets and notes of slides are headings of lower levels, but no titles.
        declared = _title(text, ".md", declared, 1 if suffix in (".xlsx", ".pptx") else 6)
    return Document(id, declared or _title_of(entry.name), text)


def _title(text: str, suffix: str, declared: str | None, lowest: int = 6) -> str | None:
    """A heading of level 1, else the title that the file declares, else a heading of the highest level that it has."""
    title = title_in(text, suffix, 1) or declared
    return title if title or suffix not in MARKDOWN else title_in(text, suffix, lowest)


def _title_of(name: str) -> str:
    """A title from a file's name: in words if it is a page, else its path, since many files of code share a name."""
    stem, suffix = os.path.splitext(name.rpartition("/")[2])
    return re.sub(r"[-_]+", " ", stem) if suffix.lower() in _PAGES else name


def _holds_questions(entry: Entry) -> bool:
    """Whether the first line of a file of JSON lines is a question: such files belong to a collection and are no documents."""
    if re.match(r"(.*\.)?questions\.jsonl", entry.name.rpartition("/")[2].lower()):
        return True
    try:
        with open(entry.path, "rb") as file:
            row = json.loads(file.readline(_HEAD).decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return False
    return isinstance(row, dict) and "question" in row and "document_ids" in row


# -- questions ---------------------------------------------------------------------------------------------------------


def read_questions(source: Source, known: Callable[[str], bool], left_out: list[LeftOut]) -> tuple[Question, ...]:
    """The questions of a file about documents that are there; the others are added to ``left_out``.

    Raises: CollectionError for a malformed row.
    """
    if source.questions is None:
        return ()
    if source.beir:
        questions = read_beir_questions(source.path, source.questions, left_out)
    else:
        questions = tuple(read_rows(source.questions, read_question, left_out).values())
    about: list[Question] = []
    for question in questions:
        absent = [id for id in question.document_ids if not known(id)]
        if absent:
            why = f"question {question.id} is about {absent[0]}, which is not there"
            left_out.append(
                LeftOut(one_line(question.id), "questions about documents that are not there", one_line(why))
            )
        else:
            about.append(question)
    return tuple(about)
