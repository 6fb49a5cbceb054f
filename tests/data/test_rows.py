"""JSON as others write it: field names, arrays, BEIR folders, repeated ids."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from cas.data.collection import Collection, Question
from cas.errors import CollectionError


def lines(*rows: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"_id": "d1", "title": "Pump", "text": "It pumps."}, ("d1", "Pump", "It pumps.")),
        ({"id": 7, "text": "x"}, ("7", "7", "x")),
        ({"_id": 7, "text": "x", "metadata": {}}, ("7", "7", "x")),
        ({"id": "a", "contents": "x"}, ("a", "a", "x")),
        ({"doc_id": "a", "content": "x", "headline": "H"}, ("a", "H", "x")),
        ({"docid": "a", "passage": "x"}, ("a", "a", "x")),
        ({"docno": "a", "body": "x", "url": "http://u"}, ("a", "a", "x")),
        ({"url": "https://x.org/a", "body": "x", "title": None}, ("https://x.org/a", "https://x.org/a", "x")),
        ({"id": None, "page_content": "x", "metadata": {"source": "/m/a.pdf", "title": "A"}}, ("m/a.pdf", "A", "x")),
        ({"page_content": "x", "metadata": {"id": 3}}, ("3", "3", "x")),
        ({"id": "a", "text": "x", "headline": "H", "name": "N"}, ("a", "H", "x")),
        ({"id": "a", "text": "x", "metadata": {"id": 3, "title": "N"}}, ("a", "N", "x")),
        ({"id": "a", "text": "x", "metadata": {"title": ["N"]}}, ("a", "a", "x")),
    ],
)
def test_field_names(tmp_path: Path, row: dict[str, Any], expected: tuple[str, str, str]) -> None:
    (document,) = Collection.load(write(tmp_path / "rows.jsonl", lines(row))).documents
    assert (document.id, document.title, document.text) == expected


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"id": "a", "html": "x", "lang": "en"},
            r"line 1: 'text' is missing \(fields found: id, html, lang\); it may be",
        ),
        (
            {"title": "a", "text": "x"},
            r"line 1: 'id' is missing \(fields found: title, text\); it may be called _id, doc_id",
        ),
        ({"_id": "a", "contents": ["x"]}, "line 1: 'contents' must be a string"),
        ({"id": ["a"], "contents": "x"}, "line 1: 'id' must be a string"),
        ({str(n): n for n in range(30)}, r"fields found: 0, 1, .*11, …\)"),
        ({}, "line 1: 'id' is missing; it may be"),
    ],
)
def test_unknown_fields_are_named(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(CollectionError, match=message) as caught:
        Collection.load(write(tmp_path / "rows.jsonl", lines(row)))
    assert len(str(caught.value).splitlines()) == 1


def test_arrays(tmp_path: Path) -> None:
    rows = [{"id": "a", "text": "x"}, {"id": 2, "text": "y"}]
    for content in (rows, {"version": 1, "data": rows}):
        path = write(tmp_path / "set.json", json.dumps(content, indent=1))
        assert [d.id for d in Collection.load(path).documents] == ["2", "a"]
    assert Collection.load(path).name == "set"
    assert len(Collection.load(write(tmp_path / "lines.json", lines(*rows)))) == 2
    write(tmp_path / "set.questions.jsonl", lines({"document_ids": [2], "question": "?", "answers": ["y"]}))
    assert Collection.load(path).questions == (Question("q1", ("2",), "?", ("y",)),)
    for content, message in (
        ({"a": 1, "b": []}, r"set.json: expected an array of documents \(fields found: a, b\)"),
        (3, "expected an array"),
        ([1], "item 1: expected a JSON object"),
        ([{"id": "a"}], "item 1: 'text' is missing"),
    ):
        with pytest.raises(CollectionError, match=message):
            Collection.load(write(tmp_path / "set.json", json.dumps(content)))
    with pytest.raises(CollectionError, match="not JSON"):
        Collection.load(write(tmp_path / "set.json", "{"))


def test_utf_16_lines(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    for codec in ("utf-16", "utf-8-sig"):
        file.write_bytes('{"id": "a", "text": "Ü"}\r\n'.encode(codec))
        assert Collection.load(file)["a"].text == "Ü"
    file.write_bytes(b"\xff\xfe{")
    with pytest.raises(CollectionError, match="line 1: "):
        Collection.load(file)


def test_an_id_names_one_text(tmp_path: Path) -> None:
    a, other = {"id": "a", "text": "x"}, {"id": "a", "text": "y"}
    collection = Collection.load(write(tmp_path / "rows.jsonl", lines(a, a, {"id": "e", "text": ""})))
    assert [d.id for d in collection.documents] == ["a"]
    assert collection.skipped == (
        "not read: 1 empty (rows.jsonl line 3), 1 repeated (rows.jsonl line 2); cas.train --dry-run lists them",
    )
    with pytest.raises(CollectionError, match="line 2: id 'a' is taken by line 1"):
        Collection.load(write(tmp_path / "rows.jsonl", lines(a, other)))
    with pytest.raises(CollectionError, match="line 2: id '7' is taken by line 1"):
        Collection.load(write(tmp_path / "rows.jsonl", lines({"id": 7, "text": "x"}, {"id": "7", "text": "y"})))


def beir(folder: Path, *queries: dict[str, Any], qrels: str = "query-id\tcorpus-id\tscore\n") -> Path:
    corpus = lines(*({"_id": f"d{n}", "title": f"T{n}", "text": f"text {n}", "metadata": {}} for n in (1, 2, 3)))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "corpus.jsonl.gz").write_bytes(gzip.compress(corpus.encode()))
    write(folder / "queries.jsonl", lines(*queries))
    write(folder / "qrels" / "test.tsv", qrels)
    return folder


def test_beir(tmp_path: Path) -> None:
    folder = beir(
        tmp_path / "scifact",
        {"_id": "1", "text": "Which?", "metadata": {"answers": ["this", "that"]}},
        {"_id": "2", "text": "What?", "answer": "so"},
        {"_id": "3", "text": "No answer?"},
        {"_id": 4, "text": "Not judged?", "answer": "x"},
        {"_id": "5", "text": "About what is not there?", "answer": "x"},
        qrels="query-id\tcorpus-id\tscore\n1\td2\t1\n1\td1\t2\n1\td3\t0\n5\tgone\t1\n",
    )
    write(folder / "qrels" / "train.tsv", "2 0 d3 1\n")
    write(folder / "README.md", "About the set.")
    collection = Collection.load(folder)
    assert [(d.id, d.title, d.text) for d in collection.documents] == [
        (f"d{n}", f"T{n}", f"text {n}") for n in (1, 2, 3)
    ]
    assert collection.questions == (
        Question("1", ("d2", "d1"), "Which?", ("this", "that")),
        Question("2", ("d3",), "What?", ("so",)),
    )
    assert collection.skipped == (
        "not read: 1 question about documents that are not there (5), 1 question without a relevant document, "
        "1 question without answers",
    )
    write(folder / "qrels" / "test.tsv", "query-id\tcorpus-id\tscore\n1\tx\ty\n")
    with pytest.raises(CollectionError, match=r"test.tsv line 2: expected query-id, corpus-id and score"):
        Collection.load(folder)


def test_corpus_and_queries_alone(tmp_path: Path) -> None:
    folder = beir(tmp_path / "a", {"_id": "1", "text": "Which?"})
    (folder / "qrels" / "test.tsv").unlink()
    (folder / "qrels").rmdir()
    assert len(Collection.load(folder)) == 3 and Collection.load(folder).questions == ()
    own = {"document_ids": ["d1"], "question": "?", "answers": ["x"]}
    write(folder / "questions.jsonl", lines(own))
    assert [q.document_ids for q in Collection.load(folder).questions] == [("d1",)]
    (folder / "queries.jsonl").unlink()
    write(folder / "page.md", "a page")  # no BEIR folder any more: its files are the documents
    assert [d.id for d in Collection.load(folder).documents] == ["page"]
    assert "1 JSON lines file (corpus.jsonl.gz)" in Collection.load(folder).skipped[0]


def test_questions_about_what_is_not_there_are_counted(tmp_path: Path) -> None:
    write(tmp_path / "a.md", "text of a")
    write(tmp_path / "b.md", "")
    rows = [
        {"id": f"x{n}", "document_ids": ids, "question": "?", "answers": ["x"]}
        for n, ids in enumerate(("ab", "a", "c"))
    ]
    file = write(
        tmp_path / "questions.jsonl", lines(*({**row, "document_ids": list(row["document_ids"])} for row in rows))
    )
    collection = Collection.load(tmp_path)
    assert [q.id for q in collection.questions] == ["x1"]
    assert collection.skipped[1] == "not read: 2 questions about documents that are not there (x0, x2)"
    assert list(map(str, collection.left_out))[1:] == [
        "x0: question x0 is about b, which is not there",
        "x2: question x2 is about c, which is not there",
    ]
    assert Collection.load(tmp_path, file).questions == collection.questions
