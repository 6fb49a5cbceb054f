"""What a store of many documents costs grows no faster than they do. Calls are counted, not seconds."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cas.evaluation.check import check_run
from cas.evaluation.recording import read_run
from cas.selfstudy import conversations
from cas.store.records import Records
from experiments.benchmarks import many_documents
from retrieval import HashEmbedder, WordIndex

FEW, TIMES = 40, 8


def calls(work: Callable[[], Any]) -> int:
    """How many functions, of Python or C, are called meanwhile; a generator counts each time it goes on."""
    count = 0

    def counted(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(counted)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Finished stores of a few documents and of some times as many."""
    folder = tmp_path_factory.mktemp("many")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("retrieval.SentenceEmbedder", lambda *_, **__: HashEmbedder(32))
        patch.setattr("cas.training.cost.PROBE_SECONDS", 0.0)
        for count in (FEW, FEW * TIMES):
            many_documents.build(folder / str(count), count)
    return [folder / str(FEW), folder / str(FEW * TIMES)]


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often units and texts are read, units joined, and word indexes made."""
    found = Counter[str]()
    monkeypatch.setattr("retrieval.SentenceEmbedder", lambda *_, **__: HashEmbedder(32))
    for owner, name in (
        (conversations, "_read_table"),
        (conversations, "_join"),
        (Records, "text"),
        (Records, "parse_row"),
        (WordIndex, "__init__"),
    ):
        original = getattr(owner, name)

        def watched(*arguments: Any, _name: str = name, _call: Any = original, **named: Any) -> Any:
            found[_name] += 1
            return _call(*arguments, **named)

        monkeypatch.setattr(owner, name, watched)
    return found


def test_a_finished_store_starts_without_reading_texts_or_units(stores: list[Path], counts: Counter[str]) -> None:
    many_documents.train_again(stores[1])
    assert counts["_join"] == counts["text"] == counts["__init__"] == 0
    assert counts["_read_table"] <= 1  # what the first unit says of itself
    # A start that did not read rows once for each state of the store would read them twenty times.
    assert counts["parse_row"] <= 3 * FEW * TIMES


def test_the_first_question_reads_no_text(stores: list[Path], counts: Counter[str]) -> None:
    many_documents.first_question(stores[1])
    assert counts["text"] == counts["_read_table"] == counts["__init__"] == 0
    assert counts["parse_row"] < 2 * FEW * TIMES


def test_an_interrupted_training_reads_every_unit_once(stores: list[Path], counts: Counter[str]) -> None:
    units = len(list((stores[1] / "store" / "conversations").glob("unit-*.parquet")))
    many_documents.replay(stores[1])
    assert units > 50 and counts["_join"] == 0
    assert units <= counts["_read_table"] <= units + 5  # the first one's settings are asked for more often


@pytest.mark.usefixtures("counts")
@pytest.mark.parametrize("measure", [many_documents.train_again, many_documents.first_question, many_documents.replay])
def test_work_grows_no_faster_than_the_documents(stores: list[Path], measure: Callable[[Path], Any]) -> None:
    measure(stores[0])  # imports
    few, many = (calls(lambda folder=store: measure(folder)) for store in stores)  # type: ignore[misc]
    assert few < many < TIMES * few


def test_the_command_measures_stores_it_finds_and_writes_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def child(benchmark: str, embedder: str, step: str, folder: Path, *rest: str) -> str:
        if step == "build":
            (folder / "store" / "index").mkdir(parents=True)
            (folder / "documents").mkdir()
        return '{"seconds": 1.5, "cpu_seconds": 1.25, "bytes": 1048576, "anonymous_bytes": 1048576}\n'

    monkeypatch.setattr(many_documents, "run_child", child)
    assert many_documents.main(["--documents", "20", "--output", str(tmp_path)]) == 0
    assert {"2", "20", "results.json", "predictions.jsonl"} == {path.name for path in tmp_path.iterdir()}
    assert not [complaint for _, complaint in check_run(tmp_path) if complaint]
    results, predictions = read_run(tmp_path)
    counts = Counter(p["arm"] for p in predictions)
    assert counts == {f"{s}_{n}": 1 if s == "replay" else 3 for s in many_documents.STEPS for n in (2, 20)}
    assert results["metrics"]["query_20.anonymous_mib"]["mean"] == 1
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 1 + 2 * len(many_documents.STEPS)
    assert printed[1].split() == ["start_2", "20", "1.50", "1.25", "1.00", "1.00"]
