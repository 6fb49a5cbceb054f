"""Reading, checking, joining, splitting and writing collections."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cas.data.collection import Collection, Document, Question, known_names, save_jsonl, split_long
from cas.errors import CollectionError


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def lines(*rows: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def row(id: str, text: str = "", title: str | None = None) -> dict[str, Any]:
    return {"id": id, "text": text or f"text of {id}"} | ({} if title is None else {"title": title})


def ask(*document_ids: str, **more: Any) -> dict[str, Any]:
    return {"document_ids": list(document_ids), "question": "Which?", "answers": ["this"]} | more


def count_words(text: str) -> int:
    return len(text.split())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "pump.md", "Intro.\n\n# The Pump \n\nIt pumps.\n")
    write(tmp_path / "manuals" / "main-valve_2.txt", "It opens.")
    write(tmp_path / "manuals" / "picture.png", b"\x89PNG")
    write(tmp_path / ".hidden.txt", "no")
    write(tmp_path / ".git" / "note.md", "no")
    write(tmp_path / "questions.jsonl", lines(ask("pump", id="a"), ask("pump", "manuals/main-valve_2", kind="both")))
    return tmp_path


def test_folder(folder: Path) -> None:
    collection = Collection.load(folder)
    assert collection.name == folder.name
    assert collection.documents == (
        Document("manuals/main-valve_2", "main valve 2", "It opens."),
        Document("pump", "The Pump", "Intro.\n\n# The Pump \n\nIt pumps.\n"),
    )
    assert collection.questions == (
        Question("a", ("pump",), "Which?", ("this",)),
        Question("q2", ("pump", "manuals/main-valve_2"), "Which?", ("this",), None, "both"),
    )
    assert collection.skipped == ("not read: 2 hidden, 1 image; cas.train --dry-run lists them",)
    assert sorted(map(str, collection.left_out)) == [
        ".git/: hidden",
        ".hidden.txt: hidden",
        "manuals/picture.png: image, not text",
    ]
    assert len(collection) == 2
    assert collection["pump"].title == "The Pump"
    assert Collection.load(str(folder)) == collection


def test_hashes(folder: Path) -> None:
    document = Document("x", "Title", "Grüße")
    assert document.hash == hashlib.sha256("Title\nGrüße".encode()).hexdigest()
    assert dataclasses.replace(document, id="y").hash == document.hash
    collection = Collection.load(folder)
    backwards = Collection("other", collection.documents[::-1])
    assert backwards.documents == collection.documents
    assert backwards.hash == collection.hash
    parts = sorted(document.hash for document in collection.documents)
    assert collection.hash == hashlib.sha256("\n".join(parts).encode()).hexdigest()
    assert collection.select(1).hash != collection.hash


def test_bom_crlf_and_titles(tmp_path: Path) -> None:
    write(tmp_path / "a.md", b"\xef\xbb\xbf# Caf\xc3\xa9\x07\x1bbar\r\n\r\nOpen.\r\n")
    write(tmp_path / "b.md", "#no heading\n## nor this\n")
    a, b = Collection.load(tmp_path).documents
    assert (a.title, a.text) == ("Café bar", "# Café\x07\x1bbar\n\nOpen.\n")
    assert b.title == "nor this"
    assert Document("id", "\x00\n", "t").title == "id"


def test_what_is_left_out(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "kept")
    write(tmp_path / "c.md", " \n")
    write(tmp_path / "d.txt", b"a\x00b")
    write(tmp_path / "e.txt", b"\x01\x02\x03ab")
    write(tmp_path / "f.txt", b"\x01\x02ab\n")
    write(tmp_path / "g.txt", "kept")
    collection = Collection.load(tmp_path)
    assert [document.id for document in collection.documents] == ["a", "f"]
    assert [(item.id, str(item)) for item in sorted(collection.left_out, key=str)] == [
        ("c", "c.md: empty"),
        ("d", "d.txt: other binary file, not text"),
        ("e", "e.txt: other binary file, not text"),
        ("g", "g.txt: same text as a.txt"),
    ]
    assert collection.skipped == (
        "not read: 2 other binary files, 1 empty (c.md), 1 with the text of another (g.txt); cas.train --dry-run lists them",
    )


def test_jsonl_file_and_its_questions(tmp_path: Path) -> None:
    path = write(tmp_path / "wiki.jsonl", "\ufeff" + lines(row("b", title="B\tB"), row("a")).replace("\n", "\r\n\r\n"))
    write(tmp_path / "questions.jsonl", lines(ask("a", id="from the folder")))
    collection = Collection.load(path)
    assert collection.name == "wiki"
    assert [(d.id, d.title, d.text) for d in collection.documents] == [
        ("a", "a", "text of a"),
        ("b", "B B", "text of b"),
    ]
    assert [question.id for question in collection.questions] == ["from the folder"]
    write(tmp_path / "wiki.questions.jsonl.gz", gzip.compress(lines(ask("b", id="own", choices=["x", "y"])).encode()))
    assert Collection.load(path).questions == (Question("own", ("b",), "Which?", ("this",), ("x", "y")),)
    other = write(tmp_path / "elsewhere.jsonl", lines(ask("a", id="given")))
    assert [question.id for question in Collection.load(path, other).questions] == ["given"]


def test_packed_folder(tmp_path: Path) -> None:
    write(tmp_path / "README.md", "not a document here")
    write(tmp_path / "documents.jsonl.gz", gzip.compress(lines(row("a"), row("b", "text of a"), row("c", "")).encode()))
    write(tmp_path / "questions.jsonl.gz", gzip.compress(lines(ask("a")).encode()))
    collection = Collection.load(tmp_path)
    assert [document.id for document in collection.documents] == ["a", "c"]
    assert list(map(str, collection.left_out)) == ["documents.jsonl.gz line 2: same text as documents.jsonl.gz line 1"]
    assert len(collection.questions) == 1


def fails(message: str, act: Callable[[], Any]) -> None:
    with pytest.raises(CollectionError) as caught:
        act()
    assert re.search(message, str(caught.value)), caught.value
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{\n", "line 1: not JSON"),
        (b"\n\xff\n", "line 2: .*can't decode"),
        ("[1]\n", "line 1: expected a JSON object"),
        ("[" * 100_000, "line 1: .*recursion"),
        ('{"id": ' + "1" * 5000 + "}", "line 1: "),
        (lines({"text": "x"}), "line 1: 'id' is missing"),
        (lines(row("a"), {"id": "b"}), "line 2: 'text' is missing"),
        (lines(row("a") | {"id": 7.5}), "line 1: 'id' must be a string"),
        (lines(row("a") | {"id": True}), "line 1: 'id' must be a string"),
        (lines(row("a") | {"title": ["x"]}), "line 1: 'title' must be a string"),
        (lines(row("a"), row("b"), row("a", "other")), "line 3: id 'a' is taken by line 1"),
        (lines(row("a", "\ud800")), "line 1: .*surrogates"),
        (lines(row("a\nb")), "line 1: bad id"),
        (lines(row("a\x85b")), "line 1: bad id"),
        (lines(row("x" * 301)), "line 1: bad id"),
        (lines(row("a/../b")), "line 1: bad id"),
        (lines(row("/etc/passwd")), "line 1: bad id"),
        (lines(row(" ")), "line 1: bad id"),
        ("", "no document to read"),
        (lines({"id": "a", "text": " "}), "no document to read; not read: 1 empty"),
    ],
)
def test_bad_documents(tmp_path: Path, content: str | bytes, message: str) -> None:
    write(tmp_path / "documents.jsonl", content)
    fails(message, lambda: Collection.load(tmp_path))
    fails(message, lambda: Collection.load(tmp_path / "documents.jsonl"))
    fails(re.escape(str(tmp_path)), lambda: Collection.load(tmp_path))


@pytest.mark.parametrize("id", ["x" * 300, "a..b", "a/b/c", "ünï", "a b"])
def test_good_ids(tmp_path: Path, id: str) -> None:
    assert Collection.load(write(tmp_path / "d.jsonl", lines(row(id))))[id].text == f"text of {id}"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (ask(), "'document_ids' must be a list"),
        (ask("pump", document_ids="pump"), "'document_ids' must be a list"),
        (ask("pump", question=" "), "'question' is empty"),
        (ask("pump", question=None), "'question' is missing"),
        (ask("pump", answers=[]), "'answers' must be a list"),
        (ask("pump", answers=["x", ""]), "'answers' must be a list"),
        (ask("pump", answers=[3]), "'answers' must be a list"),
        (ask("pump", choices="ab"), "'choices' must be a list"),
        (ask("pump", kind=1), "'kind' must be a string"),
        (ask("pump", id="q1", answers=["that"]), "id 'q1' is taken by line 1"),
        (ask("pump", id="\x00"), "bad id"),
    ],
)
def test_bad_questions(folder: Path, wrong: dict[str, Any], message: str) -> None:
    write(folder / "questions.jsonl", lines(ask("pump"), wrong))
    fails(r"questions\.jsonl line 2: ", lambda: Collection.load(folder))
    fails(message, lambda: Collection.load(folder))


def test_bad_sources(tmp_path: Path, folder: Path) -> None:
    none = write(tmp_path / "none" / "x.png", b"\x89PNG").parent
    fails("no document to read; not read: 1 image$", lambda: Collection.load(none))
    rows = write(tmp_path / "rows" / "corpus.jsonl", lines(row("a"))).parent
    fails(r"\(corpus.jsonl\); give the JSON lines file itself as --collection$", lambda: Collection.load(rows))
    fails("nowhere: no folder.*known are.* examples.*a path works too", lambda: Collection.load("nowhere"))
    for source in ("", "\0", "x" * 5000, "nowhere+examples"):
        fails("", lambda source=source: Collection.load(source or "a\nb"))
    fails("a single file is no collection; give its folder", lambda: Collection.load(folder / "pump.md"))
    fails("gone.jsonl: No such file", lambda: Collection.load(folder, folder / "gone.jsonl"))
    fails("broken gzip", lambda: Collection.load(write(tmp_path / "broken.jsonl.gz", b"{}")))
    whole = gzip.compress(lines(row("a")).encode())
    fails("broken gzip", lambda: Collection.load(write(tmp_path / "cut.jsonl.gz", whole[:-9])))
    fails(
        "broken gzip", lambda: Collection.load(write(tmp_path / "bad.jsonl.gz", whole[:12] + b"\xff\xff" + whole[14:]))
    )


def test_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "one" / "documents.jsonl", lines(row("a"), row("b")))
    write(tmp_path / "one" / "questions.jsonl", lines(ask("a", "b", id="q"), ask("a", id="p")))
    write(tmp_path / "two" / "documents.jsonl", lines(row("b", "another b"), row("c"), row("d", " ")))
    write(tmp_path / "two" / "questions.jsonl", lines(ask("b", "c", id="q")))
    monkeypatch.setenv("CAS_DATA", str(tmp_path))
    assert known_names() == ["examples", "million_tokens", "niah", "one", "two"]
    assert [document.id for document in Collection.load("one").documents] == ["a", "b"]
    both = Collection.load("one+two")
    assert both.name == "one+two"
    assert [document.id for document in both.documents] == ["a", "c", "one/b", "two/b"]
    assert both["two/b"].text == "another b"
    assert [(question.id, question.document_ids) for question in both.questions] == [
        ("one/q", ("a", "one/b")),
        ("p", ("a",)),
        ("two/q", ("two/b", "c")),
    ]
    assert both.skipped[0] == "not read: 1 empty (documents.jsonl line 3); cas.train --dry-run lists them"
    fails(
        "one\\+three: no folder.*known are examples, million_tokens, niah, one, two",
        lambda: Collection.load("one+three"),
    )
    assert len(Collection.load("niah:300+one")) == 66
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "examples" / "x.txt", "my own folder")
    assert len(Collection.load("./examples")) == 1
    examples = Collection.load("examples")
    assert len(examples) == 8
    assert examples.skipped[1:] == ("examples is the known collection; write ./examples for the folder here",)
    monkeypatch.delenv("CAS_DATA")
    fails("known are examples, million_tokens, niah", lambda: Collection.load("three"))


def test_select_questions_and_merge(folder: Path) -> None:
    collection = Collection.load(folder)
    valve, pump = collection.documents
    assert collection.select(1).documents == (valve,)
    assert collection.select(1).questions == ()
    assert collection.select(2) == collection
    assert collection.select(iter(["pump", "manuals/main-valve_2", "pump"])) == collection
    assert collection.select(["pump"]).questions == collection.questions[:1]
    assert collection.questions_for(["pump"]) == collection.questions[:1]
    assert collection.questions_for(document.id for document in collection.documents) == collection.questions
    assert list(collection) == [valve, pump]
    fails("no document 'ferry' in .*it has: manuals/main-valve_2, pump", lambda: collection["ferry"])
    fails("no document 'pum' in .*near: pump", lambda: collection.select(["pum"]))
    fails("no document 'pum'", lambda: collection["pum"])
    for wrong in (0, -1, 3, []):
        fails("select between 1 and 2", lambda wrong=wrong: collection.select(wrong))
    merged = collection.merged()
    assert [document.id for document in merged.documents] == ["collection"]
    assert merged["collection"].text == f"main valve 2\n\n{valve.text}\n\nThe Pump\n\n{pump.text}"
    assert [question.document_ids for question in merged.questions] == [("collection",)] * 2
    fails("share an id", lambda: Collection("twice", (pump, pump)))


def test_save_and_load(folder: Path, tmp_path: Path) -> None:
    odd = Document("ö#1", "Title\u2028two", "a\r\nb\u2028c\u0085 \U0001f600")
    collection = Collection.load(folder)
    collection = dataclasses.replace(collection, documents=(*collection.documents, odd))
    target = tmp_path / "new" / "copy"
    save_jsonl(collection, target)
    assert Collection.load(target) == collection
    assert Collection.load(target).hash == collection.hash
    save_jsonl(collection.select(["pump"]), target)
    assert Collection.load(target) == collection.select(["pump"])
    assert sorted(path.name for path in target.iterdir()) == ["documents.jsonl", "questions.jsonl"]


def test_split_at_paragraphs() -> None:
    paragraphs = [" ".join([f"p{number}."] * 10) for number in range(9)]
    document = Document("d", "Doc", "\n\n".join(paragraphs))
    short = Document("s", "Short", "just this")
    questions = (Question("q", ("d", "s"), "?", ("!",)),)
    split = split_long(Collection("c", (document, short), questions), 35, count_words)
    assert [part.id for part in split.documents] == ["d#1", "d#2", "d#3", "s"]
    assert [part.title for part in split.documents] == [*(f"Doc (part {i} of 3)" for i in (1, 2, 3)), "Short"]
    assert [part.text for part in split.documents[:3]] == ["\n\n".join(paragraphs[i : i + 3]) for i in (0, 3, 6)]
    assert split.questions[0].document_ids == ("d#1", "d#2", "d#3", "s")
    assert split_long(split, 35, count_words) == split
    # A paragraph border that would leave a mere heading on its own is no good border.
    headed = Document("h", "H", "# Heading\n\n" + " ".join(f"w{number:02}." for number in range(34)))
    assert [count_words(part.text) for part in split_long(Collection("c", (headed,)), 35, count_words).documents] == [
        18,
        18,
    ]


def test_split_at_sentences_then_words_then_characters() -> None:
    def parts(text: str, max_tokens: int, count: Callable[[str], int] = count_words) -> list[str]:
        documents = split_long(Collection("c", (Document("d", "D", text),)), max_tokens, count).documents
        return [document.text for document in documents]

    assert parts("One two three. Four five six! Seven eight nine.", 4) == [
        "One two three.", "Four five six!", "Seven eight nine."
    ]  # fmt: skip
    words = [f"word{number:03d}" for number in range(100)]
    assert parts(" ".join(words), 25) == [" ".join(words[i : i + 25]) for i in range(0, 100, 25)]
    assert parts("abcdefghij", 4, len) == ["abc", "def", "ghij"]
    many = split_long(Collection("c", (Document("d", "D", " ".join(words)),)), 10, count_words)
    assert [document.id for document in many.documents][::9] == ["d#01", "d#10"]
    fails("cannot be cut", lambda: parts("äöü", 1, lambda text: 2 * len(text)))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(5, 60))
def test_split_keeps_every_word_in_order(seed: int, max_tokens: int) -> None:
    draw = random.Random(seed)
    text = "".join(f"w{n}" + draw.choice([" ", " ", " ", ". ", "\n", "\n\n"]) for n in range(draw.randint(1, 400)))
    split = split_long(Collection("c", (Document("d", "D", text),)), max_tokens, count_words)
    sizes = [count_words(document.text) for document in split.documents]
    assert [word for document in split.documents for word in document.text.split()] == text.split()
    assert max(sizes) <= max_tokens
    # Words differ in length and borders are where they are, but there is no useless number of parts.
    assert len(sizes) <= 2 * -(-count_words(text) // max_tokens) + 1


identifiers = st.text(st.characters(exclude_categories=("Cc", "Cs", "Zl", "Zp")), min_size=1, max_size=20).filter(
    lambda id: id.strip() and not id.startswith("/") and ".." not in id.split("/")
)
readable = st.text(st.characters(exclude_categories=("Cc", "Cs")), min_size=1).filter(str.strip)


@settings(max_examples=60, deadline=None)
@example({"0 ": ("", "a title that is an id is one line, too")}, [])
@given(
    st.dictionaries(identifiers, st.tuples(st.text(st.characters(exclude_categories=("Cs",))), readable), min_size=1),
    st.lists(st.tuples(readable, st.lists(readable, min_size=1)), max_size=4),
)
def test_any_collection_survives_a_round_trip(
    texts: dict[str, tuple[str, str]], asked: list[tuple[str, list[str]]]
) -> None:
    unique = {text: Document(id, title, text) for id, (title, text) in texts.items()}
    ids = tuple(document.id for document in unique.values())
    questions = tuple(Question(f"q{n}", ids, question, tuple(answers)) for n, (question, answers) in enumerate(asked))
    collection = Collection("c", tuple(unique.values()), questions)
    with tempfile.TemporaryDirectory() as folder:
        save_jsonl(collection, folder)
        assert Collection.load(folder) == collection


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(["a", "b"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
objects = st.dictionaries(
    st.sampled_from(["id", "title", "text", "document_ids", "question", "answers", "choices", "kind"]), json_values
)
files = st.binary(max_size=200) | st.lists(objects | json_values, max_size=4).map(lambda rows: lines(*rows).encode())


@settings(max_examples=300, deadline=None)
@given(files, files, files, st.booleans())
def test_only_collection_errors_come_out(documents: bytes, questions: bytes, text: bytes, packed: bool) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder / "a.txt", text)
        write(folder / "raw.jsonl.gz", documents)
        write(folder / "documents.jsonl" if packed else folder / "d.jsonl", documents)
        write(folder / "questions.jsonl", questions)
        for source in (folder, folder / "raw.jsonl.gz", folder / ("documents.jsonl" if packed else "d.jsonl")):
            try:
                collection = Collection.load(source)
            except CollectionError as error:
                assert len(str(error).splitlines()) == 1
            else:
                assert len(collection) > 0


def test_importing_needs_no_torch() -> None:
    code = "import sys, cas.data.collection; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False).returncode == 0
