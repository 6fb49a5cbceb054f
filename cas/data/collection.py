"""Documents and questions: read from a folder, from JSON, or by the name of a known collection.

A JSON line is ``{"id", "title", "text"}`` for a document (the title may be missing; `cas.data.rows` has other names that
are understood) and ``{"id", "document_ids", "question", "answers", "choices", "kind"}`` for a question (the first and the
last two may be missing).
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
from bisect import bisect
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path

from cas.data.convert import INSTALL
from cas.data.documents import Document, Question, one_line
from cas.data.folder import LeftOut, summary
from cas.data.reading import Source, find_source, name_of, read_documents, read_questions
from cas.errors import CollectionError


@dataclass(frozen=True)
class Collection:
    """Documents, kept sorted by id, and their questions.

    Equality ignores ``skipped``, the lines for the user about what was not read or read in an unusual way, and
    ``left_out``, every file, folder and row that is no document.
    """

    name: str = field(compare=False)
    documents: tuple[Document, ...]
    questions: tuple[Question, ...] = ()
    skipped: tuple[str, ...] = field(default=(), compare=False)
    left_out: tuple[LeftOut, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "documents", tuple(sorted(self.documents, key=lambda document: document.id)))
        if len(self._by_id) < len(self.documents):
            raise CollectionError(f"{self.name}: two documents share an id; rename one")

    @cached_property
    def hash(self) -> str:
        """SHA-256 (hex) over the sorted document hashes; ids and questions do not enter."""
        return hashlib.sha256("\n".join(sorted(document.hash for document in self.documents)).encode()).hexdigest()

    @cached_property
    def _by_id(self) -> dict[str, Document]:
        return {document.id: document for document in self.documents}

    def __len__(self) -> int:
        return len(self.documents)

    def __iter__(self) -> Iterator[Document]:
        return iter(self.documents)

    def __getitem__(self, id: str) -> Document:
        """Raises CollectionError for an unknown id, with near ones."""
        if id not in self._by_id:
            near, said = difflib.get_close_matches(str(id), self._by_id, n=3), "near"
            if not near:
                near, said = list(self._by_id)[:3], "it has"
            raise CollectionError(f"no document {id!r} in {self.name}; {said}: {', '.join(near)}")
        return self._by_id[id]

    @staticmethod
    def load(
        source: str | Path,
        questions: str | Path | None = None,
        seed: int = 0,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> Collection:
        """Read a collection; CollectionError for an unknown source, no usable document, or a malformed line.

        Args:
            source: a known name (see `known_names`; several joined by "+"; a path of the same name is ``./name``), a
                ``.jsonl[.gz]`` or ``.json`` file, a folder with ``documents.jsonl[.gz]`` or in BEIR's layout, or else a
                folder whose files are read recursively: text in any encoding, and what `cas.data.convert` converts.
            questions: a file to read in place of the one beside the documents, which is ``questions.jsonl[.gz]`` or,
                for a single file of documents, first ``<stem>.questions.jsonl[.gz]``. Those about documents that are
                not there are counted and left out.
            seed: of a generated collection, ``million_tokens`` or ``niah``; ``niah:8000`` has at least so many words a document.
            include, exclude: globs of a folder's files to read, or not to read.
            progress: called with (files read, files) of a folder.
        """
        names = source.split("+") if isinstance(source, str) else []
        include, exclude = ((globs,) if isinstance(globs, str) else globs for globs in (include, exclude))
        try:
            known = names and {name.partition(":")[0] for name in names} <= set(known_names())
            if known and (include or exclude):
                raise CollectionError(
                    f"{source}: --include and --exclude choose files of a folder, not of a known name"
                )
            collection = _load_named(names, seed) if known else _read(_path(source), include, exclude, progress)
            if questions is not None:
                collection = collection.with_questions(Path(questions))
        except OSError as error:
            raise CollectionError(f"{one_line(str(error.filename or source))}: {error.strerror or error}") from error
        return collection

    def with_questions(self, file: Path) -> Collection:
        """The same documents with the questions of a file, those left out that are about documents that are not here."""
        return self._with_questions(Source(file.parent, None, file))

    def _with_questions(self, source: Source) -> Collection:
        left_out: list[LeftOut] = []
        questions = read_questions(source, self._by_id.__contains__, left_out)
        text = summary(left_out, INSTALL)
        skipped, left = (*self.skipped, *([text] if text else [])), (*self.left_out, *left_out)
        return replace(self, questions=questions, skipped=skipped, left_out=left)

    def select(self, ids: Iterable[str] | int) -> Collection:
        """The given documents, or the first n by id, with the questions that need no other document."""
        if isinstance(ids, int):
            ids = list(self._by_id)[:ids] if 0 < ids <= len(self) else []
        chosen = {id: self[id] for id in ids}
        if not chosen:
            raise CollectionError(f"{self.name}: select between 1 and {len(self)} documents")
        return replace(self, documents=tuple(chosen.values()), questions=self.questions_for(chosen))

    def questions_for(self, ids: Iterable[str]) -> tuple[Question, ...]:
        """The questions all of whose documents are among ``ids``."""
        chosen = set(ids)
        return tuple(question for question in self.questions if chosen.issuperset(question.document_ids))

    def merged(self) -> Collection:
        """One document, ``"collection"``, with every document under its title, for arms with a single cartridge."""
        text = "\n\n".join(f"{document.title}\n\n{document.text}" for document in self.documents)
        questions = _repoint(self.questions, dict.fromkeys(self._by_id, ("collection",)))
        return replace(self, documents=(Document("collection", "collection", text),), questions=questions)


def split_long(collection: Collection, max_tokens: int, count_tokens: Callable[[str], int]) -> Collection:
    """Cut every document of more than ``max_tokens`` into parts of about equal size that have at most that many.

    Parts are called ``id#1``, ``id#2`` … (``id#01`` … from ten on, so that they sort) and "title (part 1 of 3)"; the
    questions point to all parts. Raises CollectionError where a single character has more tokens than that.
    """
    documents: list[Document] = []
    parts: dict[str, tuple[str, ...]] = {}
    for document in collection.documents:
        texts = _cut(document, max_tokens, count_tokens)
        n, ids, titles = len(texts), [document.id], [document.title]
        if n > 1:
            ids = [f"{document.id}#{i:0{len(str(n))}}" for i in range(1, n + 1)]
            titles = [f"{document.title} (part {i} of {n})" for i in range(1, n + 1)]
        documents += map(Document, ids, titles, texts)
        parts[document.id] = tuple(ids)
    return replace(collection, documents=tuple(documents), questions=_repoint(collection.questions, parts))


def _cut(document: Document, max_tokens: int, count_tokens: Callable[[str], int]) -> list[str]:
    """The text in parts of at most ``max_tokens``, cut at paragraphs, else sentences, else words, else anywhere."""
    text, least = document.text, -(-count_tokens(document.text) // max(max_tokens, 1))
    if least <= 1:
        return [text]
    some, any_number = least + 1 + least // 4, len(text)  # of parts: a good border may cost a quarter more of them
    for border, most in ((r"\n\s*\n", some), (r"(?<=[.!?])\s+|\n", some), (r"\s+", any_number), ("", any_number)):
        borders, n = [0, *(match.end() for match in re.finditer(border, text)), len(text)], least
        while n <= most:
            cuts = {0, len(text)}
            for ideal in (len(text) * i // n for i in range(1, n)):
                i = bisect(borders, ideal)  # the first border behind
                cuts.add(borders[i] if borders[i] - ideal < ideal - borders[i - 1] else borders[i - 1])
            texts = [part for start, end in pairwise(sorted(cuts)) if (part := text[start:end].strip())]
            even = most == any_number or 2 * n * min(map(len, texts)) >= len(text)  # no heading on its own
            if even and all(count_tokens(part) <= max_tokens for part in texts):
                return texts
            n += 1 + n // 8
    raise CollectionError(f"{document.id}: cannot be cut into parts of {max_tokens} tokens; allow more")


def _repoint(questions: Iterable[Question], new: Mapping[str, tuple[str, ...]]) -> tuple[Question, ...]:
    """The same questions where document ``id`` has become the documents ``new[id]``."""
    moved = [dict.fromkeys(name for id in question.document_ids for name in new[id]) for question in questions]
    return tuple(replace(question, document_ids=tuple(ids)) for question, ids in zip(questions, moved))


def save_jsonl(collection: Collection, folder: str | Path) -> None:
    """Write documents.jsonl and questions.jsonl, from which `Collection.load` makes an equal collection."""
    (folder := Path(folder)).mkdir(parents=True, exist_ok=True)
    for stem, items in (("documents", collection.documents), ("questions", collection.questions)):
        path, temporary = folder / f"{stem}.jsonl", folder / f".{stem}.tmp"
        with temporary.open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(json.dumps(asdict(item), ensure_ascii=False) + "\n" for item in items)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)


GENERATORS: dict[str, Callable[[str, int], Collection]] = {}
"""Generated collections by name, made from (size, seed); :mod:`cas.data` registers them."""
EXAMPLES = Path(__file__).parents[2] / "examples/harbour"


def known_names() -> list[str]:
    """Names that `Collection.load` knows: ours and the folders under ``$CAS_DATA``."""
    data = os.environ.get("CAS_DATA")
    folders = Path(data).iterdir() if data and Path(data).is_dir() else ()
    return sorted(
        {*GENERATORS, "examples", *(path.name for path in folders if path.is_dir() and not path.name.startswith("."))}
    )


def _named(name: str, seed: int) -> Collection:
    plain, _, size = name.partition(":")
    if plain in GENERATORS:
        return GENERATORS[plain](size, seed)
    return _read(EXAMPLES if name == "examples" else Path(os.environ.get("CAS_DATA", "")) / name)


def _load_named(names: Iterable[str], seed: int) -> Collection:
    """Known collections side by side; ids that collide, and only those, get the prefix ``name/``."""
    parts = {name: _named(name, seed) for name in names}
    used = Counter(item.id for part in parts.values() for item in part.documents)
    asked = Counter(item.id for part in parts.values() for item in part.questions)
    documents: list[Document] = []
    questions: list[Question] = []
    for name, part in parts.items():
        new = {id: (f"{name}/{id}" if used[id] > 1 else id,) for id in part._by_id}
        documents += [replace(item, id=new[item.id][0]) for item in part.documents]
        for item in _repoint(part.questions, new):
            questions.append(replace(item, id=f"{name}/{item.id}") if asked[item.id] > 1 else item)
    skipped = [line for part in parts.values() for line in part.skipped]
    skipped += [
        f"{name} is the known collection; write ./{name} for the folder here" for name in parts if _hides_folder(name)
    ]
    left_out = tuple(item for part in parts.values() for item in part.left_out)
    return Collection("+".join(parts), tuple(documents), tuple(questions), tuple(skipped), left_out)


def _hides_folder(name: str) -> bool:
    """Whether a folder of the user is called like a known collection and is something else."""
    mine, known = Path(name), Path(os.environ.get("CAS_DATA", "")) / name
    if name == "examples":
        known = EXAMPLES.parent
    return mine.is_dir() and (name in GENERATORS or not known.is_dir() or not mine.samefile(known))


def _path(source: str | Path) -> Path:
    """A source as a path; ``~`` is the home folder, where no shell has expanded it."""
    try:
        return Path(source).expanduser()
    except RuntimeError:  # ~nobody
        return Path(source)


def resolve_source(source: str) -> str:
    """One spelling for a source, to record and compare: known names as they are, paths absolute with links resolved."""
    if {name.partition(":")[0] for name in source.split("+")} <= set(known_names()):
        return source
    return os.path.realpath(_path(source))


def same_source(recorded: str, source: str) -> bool:
    """Whether two spellings mean the same collection. A relative one, as older stores record them, may have been given
    in another working directory: it means any path that ends like it."""
    if resolve_source(recorded) == resolve_source(source):
        return True
    old, new = Path(os.path.normpath(recorded)), resolve_source(source)
    elsewhere = not old.is_absolute() and not old.exists() and os.path.isabs(new)
    return elsewhere and Path(new).parts[-len(old.parts) :] == old.parts


def _read(
    path: Path,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Collection:
    """The collection in a folder or a file of JSON."""
    source = find_source(path)
    if source is None:
        known = f"known are {', '.join(known_names())} (examples: in a source checkout only); a path works too"
        if near := difflib.get_close_matches(str(path), known_names(), n=1):
            known = f"did you mean {near[0]}? {known}"
        if path.is_file():
            raise CollectionError(
                f"{one_line(str(path))}: a single file is no collection; give its folder, or --include {path.name}"
            )
        raise CollectionError(f"{one_line(str(path))}: no folder, .jsonl[.gz], .json or known name; {known}")
    reading = read_documents(source, include, exclude, progress)
    collection = Collection(
        name_of(path), tuple(reading.documents), (), tuple(reading.lines()), tuple(reading.left_out)
    )
    return collection._with_questions(source) if source.questions else collection
