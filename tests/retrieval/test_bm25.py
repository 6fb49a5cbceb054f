"""BM25 beside the vectors, against the formula written out."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from test_retrieval import QUESTIONS, documents

from retrieval import ChunkIndex, HashEmbedder, WordIndex, rank_chunks, rank_documents, with_title
from retrieval.bm25 import fuse, terms

DOCUMENTS = documents()


@pytest.fixture
def index() -> ChunkIndex:
    return ChunkIndex(DOCUMENTS, HashEmbedder(64), words=30)


def test_words_agree_with_bm25_by_hand(index: ChunkIndex) -> None:
    """Lucene's BM25 written out: idf ln(1 + (n - df + 0.5) / (df + 0.5)), k1 1.5, b 0.75."""
    words = WordIndex(index, DOCUMENTS)
    by_id = {i: (title, text) for i, title, text in DOCUMENTS}
    rows = []
    for row in range(len(index)):
        name, start, length = index.span(row)
        rows.append(re.findall(r"\w+", with_title(by_id[name][0], by_id[name][1][start : start + length]).lower()))
    mean, expected = np.mean([len(row) for row in rows]), np.zeros((len(QUESTIONS), len(rows)))
    for q, question in enumerate(QUESTIONS):
        for term in re.findall(r"\w+", question.lower()):
            df = sum(term in row for row in rows)
            for r, row in enumerate(rows):
                tf = row.count(term)
                idf = np.log(1 + (len(rows) - df + 0.5) / (df + 0.5))
                expected[q, r] += idf * tf / (tf + 1.5 * (0.25 + 0.75 * len(row) / mean))
    np.testing.assert_allclose(words.score(QUESTIONS), expected, atol=1e-4)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The pump's VALVE: 1.5 bar at 1,000 rpm.", "the pump s valve 1.5 bar at 1000 rpm"),
        ("max_connections and __init__", "max_connections max connections and init"),
        ("C++ C# HTTP/2 and/or", "c++ c c# c http/2 http 2 and or"),
        ("well-known GPT-4, 1990-1995", "well known gpt-4 gpt 4 1990-1995 1990 1995"),
        ("192.168.1.1, 3/4 inch", "192.168.1.1 3/4 3 4 inch"),
        ("Straße, cafe\u0301", "strasse café"),
        ("١٫٥ ﬁle", "1.5 file"),
        ("वाल्व लाल है।", "वाल्व लाल है"),
        ("لَونُ الصِّمَام؟", "لَونُ الصِّمَام"),
        ("红色阀门，泵5巴", "红色 色阀 阀门 泵 5 巴"),
        ("ﾊﾞﾙﾌﾞは赤", "バル ルブ ブは は赤"),
        ("สีแดง", "สีแ แด ดง"),
        ("빨간색 泵", "빨간 간색 泵"),
        ("\ud800 ?! ", ""),
    ],
)
def test_terms_of_many_scripts(text: str, expected: str) -> None:
    assert terms(text) == expected.split()
    if expected:  # the same beside text that is not ASCII
        assert terms(f"{text} é") == [*expected.split(), "é"]


def test_questions_find_their_documents_in_scripts_without_spaces() -> None:
    documents = [
        ("valve", "", "启动时先打开红色阀门，然后检查压力。"),
        ("pump", "", "停机后关闭主泵的电源，并等待十分钟。"),
        ("hindi", "", "पहले लाल वाल्व खोलें।"),
        ("thai", "", "เปิดวาล์วสีแดงก่อน"),
    ]
    index = ChunkIndex(documents, HashEmbedder())
    words = WordIndex(index, documents)
    asked = ["哪个阀门先打开？", "主泵的电源什么时候关闭？", "कौन सा वाल्व?", "วาล์วสีอะไร"]
    assert [index.document_ids[row.argmax()] for row in words.score(asked)] == [d[0] for d in documents]


def test_bm25s_logs_nothing() -> None:
    program = (
        "import logging; logging.basicConfig(level=logging.DEBUG); from retrieval import *; d = [('a', '', 'valve')]; "
        "WordIndex(ChunkIndex(d, HashEmbedder()), d).score(['valve'])"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "bm25s" not in run.stdout + run.stderr and "%|" not in run.stderr


def test_a_name_that_no_embedder_knows_is_found_by_words() -> None:
    class Blind(HashEmbedder):
        def embed(self, texts: Sequence[str]) -> np.ndarray:
            return super().embed(["the same"] * len(texts))

    documents = [("a", "Ferries", "Ulnos Yaridrake won."), ("b", "Barges", "Loveth Caldegrove won.")]
    index = ChunkIndex(documents, Blind())
    words = WordIndex(index, documents)
    asked = ["Who is Loveth Caldegrove?", "Who is Ulnos Yaridrake?", "?"]
    ranked = rank_documents(index, asked, 1, words)
    assert [best[0].document_id for best in ranked] == ["b", "a", "a"] and ranked[0][0].score == pytest.approx(1)
    assert rank_chunks(index, asked, 1, words)[:, 0].tolist() == [1, 0, 0]
    with pytest.raises(ValueError, match="documents"):
        WordIndex(index, documents[:1])
    assert WordIndex(ChunkIndex([], Blind()), []).score(asked).shape == (3, 0)


def test_fusion_is_a_mean_of_shares() -> None:
    dense, words = np.array([[-0.2, -0.1], [0.5, 0.25]], np.float32), np.array([[0, 3], [0, 0]], np.float32)
    np.testing.assert_allclose(fuse(dense, words), [[0, 0.5], [0.5, 0.25]])


def test_an_embedder_that_remembers_gives_the_same_rows() -> None:
    from cas.evaluation.answers import CachingEmbedder

    plain, asked = HashEmbedder(32), list[str]()

    class Counting(HashEmbedder):
        def embed(self, texts: Sequence[str]) -> np.ndarray:
            asked.extend(texts)
            return super().embed(texts)

    embedder = CachingEmbedder(Counting(32))
    for texts in (["a", "b", "a"], [], ["c", "b"]):
        np.testing.assert_array_equal(embedder.embed(texts), plain.embed(texts))
    assert asked == ["a", "b", "c"] and embedder.name == plain.name


def test_jax_is_not_touched(tmp_path: Path) -> None:
    """bm25s calls jax when it is imported, which takes most of a GPU's memory; jax can still be imported afterwards."""
    (tmp_path / "jax").mkdir()
    (tmp_path / "jax" / "__init__.py").write_text("print('jax!')")
    (tmp_path / "jax" / "lax.py").write_text("def top_k(*_): print('top_k!')")
    program = (
        "from retrieval import ChunkIndex, HashEmbedder, WordIndex; d = [('a', '', 'red valve')]; "
        "print(WordIndex(ChunkIndex(d, HashEmbedder()), d).score(['valve']).shape); import jax"
    )
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])
    found = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.split("\n")[:2] == ["(1, 1)", "jax!"]
