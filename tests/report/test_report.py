"""RAG against CAS: budgets are kept, settings are chosen on other questions, tests agree with known ones, and the
report stands alone."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from conftest import TEXTS
from torch import Tensor

import retrieval
from cas.data.collection import Collection, Question
from cas.errors import ConfigError
from cas.evaluation import check
from cas.evaluation.metrics import holm, sign_flip
from cas.evaluation.recording import read_run
from cas.model.frozen import FrozenModel
from cas.report import kv_pruning
from cas.report.compare import compare
from cas.report.config import Config
from cas.report.pages import write_pages
from cas.report.questions import load_questions, split
from cas.report.rag_baseline import CHOICES, SETTINGS_TRIED, Rag, Setting, tune
from cas.report.view import View
from cas.store.store import Store
from cas.training.initialization import initialize_cartridges
from retrieval import HashEmbedder


def test_sign_flips_agree_with_scipy() -> None:
    """Every document one question: the paired permutation test, whose exact p-value scipy finds by all flips."""
    random = np.random.default_rng(0)
    a, b = random.normal(0.4, 1, 12), random.normal(0, 1, 12)
    exact = scipy.stats.permutation_test(
        (a - b,), np.sum, permutation_type="samples", n_resamples=np.inf, alternative="two-sided"
    ).pvalue
    found = sign_flip(a, b, [str(i) for i in range(12)], flips=40_000)
    assert found == pytest.approx(exact, abs=0.01)
    assert sign_flip(a, a, ["x"] * 12) == 1.0
    # Questions about one document flip together: two documents have four signs, so half of all flips are as extreme.
    assert sign_flip([1, 1, 1, 1], [0, 0, 0, 0], ["x", "x", "y", "y"]) == pytest.approx(0.5, abs=0.03)


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


@pytest.fixture
def rag(tiny: Callable[..., FrozenModel], collection: Collection) -> Rag:
    return Rag(tiny("llama"), [(d.id, d.title, d.text) for d in collection.documents], HashEmbedder())


@pytest.mark.parametrize("ranking", ["vectors", "words", "both"])
def test_chunks_fill_their_budget_and_no_more(rag: Rag, collection: Collection, ranking: Any) -> None:
    questions = [q.question for q in collection.questions]
    for budget in (5, 20, 60, 400):
        for titles in (True, False):
            for found in rag.chunks(questions, Setting(words=10, ranking=ranking, titles=titles, overlap=0), budget):
                assert found and len(rag.model.encode("\n\n".join(found))) <= budget
                assert budget < 60 or len(found) > 1
                assert titles == any(found[0].startswith(name.title()) for name in TEXTS) or budget < 20
    best = rag.chunks(["Which red valve is opened?"], Setting(words=40, ranking="words"), 100)[0][0]
    assert best.startswith("Pump\n\n")


def test_tuning_keeps_the_best_of_each_choice() -> None:
    asked = []

    def score(setting: Setting) -> float:
        asked.append(setting)
        return (setting.words == 40) + (setting.ranking == "words") + (setting.overlap == 3) - (not setting.titles)

    best, tried = tune(score)
    assert best == Setting(words=40, ranking="words", titles=True, overlap=3)
    assert len(asked) == len(set(asked)) == len(tried) == 1 + sum(len(values) - 1 for _, values in CHOICES)


def test_no_question_is_tuned_on_and_tested(collection: Collection) -> None:
    many = replace(
        collection,
        questions=tuple(Question(f"q{i}", ("pump",), f"Question {i}?", ("red",)) for i in range(40)),
    )
    checked, asked = split(many, Config(validation=128))
    assert len(checked) == 10 and len(asked) == 30
    assert not {q.id for q in checked} & {q.id for q in asked}
    assert split(many, Config(validation=128)) == (checked, asked) != split(many, Config(validation=128, seed=1))


class _Page(HTMLParser):
    """Tags that are open, words that are shown, and everything that points anywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "br", "path", "use", "link", "img"):
            self.open.append(tag)
        self.links += [v or "" for k, v in attrs if k in ("src", "href", "xlink:href")]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [v or "" for k, v in attrs if k in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag: str) -> None:
        if tag in self.open:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@pytest.fixture
def asked(tmp_path: Path, tiny: Callable[..., FrozenModel], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """A report on a store of a folder's documents, with twelve questions beside them."""
    folder = tmp_path / "manuals"
    folder.mkdir()
    for name, text in TEXTS.items():
        (folder / f"{name}.md").write_text(text)
    names = list(TEXTS)
    with (folder / "questions.jsonl").open("w") as file:
        for i in range(12):
            asked = {
                "id": f"q{i:02d}",
                "document_ids": [names[i % 5]],
                "question": f"<script>{i}</script> Which valve?",
            }
            file.write(json.dumps(asked | {"answers": ["red & green"], "kind": ("easy", "<b>hard")[i % 2]}) + "\n")
    model = tiny("llama")
    store = Store.create(tmp_path / "store", model, tokens=16)
    store.add_documents(Collection.load(folder), model.count_tokens)
    initialize_cartridges(model, store)
    store.close()
    monkeypatch.setattr(FrozenModel, "from_pretrained", lambda *_, **__: model)
    monkeypatch.setattr(retrieval, "SentenceEmbedder", lambda *_: HashEmbedder())
    monkeypatch.chdir(tmp_path)

    def report(**options: Any) -> Path:
        settings = Config(
            store=str(tmp_path / "store"),
            output=str(tmp_path / "report"),
            collection="manuals",
            ks=(1, 2, 4),
            budgets=(16, 64, 4096),
            timed=2,
            max_new_tokens=4,
            with_chunk_k=2,
            **options,
        )
        assert compare(settings) == 0
        return tmp_path / "report"

    return report


def test_a_report_from_a_folder_of_ones_own(asked: Callable[..., Path]) -> None:
    folder = asked()
    results = json.loads((folder / "results.json").read_text())
    assert not [complaint for _, complaint in check.check_run(folder) if complaint]
    arms = [json.loads(line)["arm"] for line in (folder / "predictions.jsonl").read_text().splitlines()]
    assert {"no_context", "cas1", "cas4", "oracle", "all_resident", "cas2_chunk", "rag64", "full_document"} <= {*arms}
    assert arms.count("cas4") == arms.count("rag64") == 9
    assert "rag4096" not in arms and any("4096" in note for note in results["settings"]["notes"])
    assert results["measurements"]["cas4.context_tokens"]["mean"] == 64  # 4 cartridges of 16
    assert results["measurements"]["rag64.context_tokens"]["high"] <= 64
    assert results["settings"]["collection"] == "manuals" and "--store DIR" in results["command"]
    tokens = 16 * int(results["settings"]["main_arm"].removeprefix("cas"))
    rag = {int(b): setting for b, setting in results["settings"]["rag"].items()}
    assert {b for b, setting in rag.items() if len(setting["tried"]) == SETTINGS_TRIED} == {tokens, 3 * tokens} & {*rag}
    assert all(setting["tried"] or setting["best"] == rag[setting["as_at"]]["best"] for setting in rag.values())
    assert "4 cartridges retrieved" in (folder / "report.md").read_text()
    figures = results["measurements"]
    assert figures["cas4.first_token_s_p50"]["mean"] <= figures["cas4.first_token_s_p95"]["mean"]
    assert "retrieval_both.ndcg@10" in figures
    view = View(*read_run(folder), {})
    front = [(view.figure(a, "context_tokens")["mean"], view.figure(a)["mean"]) for a in view.pareto_front()]
    assert front and front == sorted(set(front)) and len({accuracy for _, accuracy in front}) == len(front)
    qrels = [line.split(" ") for line in (folder / "trec" / "qrels.txt").read_text().splitlines()]
    runs = {f.name: [line.split(" ") for line in f.read_text().splitlines()] for f in (folder / "trec").glob("run.*")}
    assert len(qrels) == 9 and {len(line) for line in qrels} == {4} and len(runs) == 3
    for lines in runs.values():
        assert len(lines) == 9 * 5 and {len(line) for line in lines} == {6}
        for question in {line[0] for line in lines}:
            ranked = [line for line in lines if line[0] == question]
            assert [int(line[3]) for line in ranked] == [1, 2, 3, 4, 5]
            scores = [float(line[4]) for line in ranked]
            assert scores == sorted(scores, reverse=True)
    record = json.loads((folder / "ragas" / "cas4.jsonl").read_text().splitlines()[0])
    assert set(record) == {"user_input", "retrieved_contexts", "response", "reference"}
    assert record["reference"] == "red & green" and len(record["retrieved_contexts"]) == 4
    page = _Page()
    page.feed((folder / "report.html").read_text())
    assert not page.open and all(link.startswith("#") for link in page.links)  # whole, and nothing is loaded
    assert "easy" in page.text and "<b>hard" in page.text


def test_the_page_shows_what_only_one_side_answers(asked: Callable[..., Path]) -> None:
    """As if CAS had answered everything and RAG nothing: the questions stand there, as text and not as markup."""
    folder = asked()
    run, predictions = read_run(folder)
    for p in predictions:
        p["scores"] = {**p["scores"], "contains": float("cas" in p["arm"])}
    texts = {p["question_id"]: ("<script>alert(1)</script> Which valve?", "red & green") for p in predictions}
    write_pages(folder, run, predictions, texts)
    html = (folder / "report.html").read_text()
    page = _Page()
    page.feed(html)
    assert "<script" not in html and not re.search(r"url\((?!#)|@import", html)
    assert "<script>alert(1)</script> Which valve?" in page.text and "red & green" in page.text
    view = View(run, predictions, texts)
    assert view.win_rows()[0] == ("all", 0, 9, 0, 0)
    assert len(view.examples("cas")) == 8 and view.examples("rag") == []
    assert all(t["p_holm"] >= t["p"] for t in view.tests)


def _texts_under(folder: Path) -> list[Path]:
    """The files that hold an answer or a part of a question, gold answer or document."""
    parts = [
        'answer": ',
        "Which valve",
        "red &",
        "red &amp;",
        *(line for text in TEXTS.values() for line in text.split(". ")),
    ]
    files = [file for file in folder.rglob("*") if file.is_file()]
    return [file for file in files if any(part in file.read_text() for part in parts)]


def test_without_text_only_figures_and_ids_are_written(asked: Callable[..., Path]) -> None:
    assert _texts_under(asked(no_text=True)) == []


def test_the_text_option_may_change_between_runs(asked: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Removing texts computes nothing again; a report with texts computes the answers that are missing."""
    from cas.report.arms import Comparison

    runs, run = [], Comparison.run

    def counted(self: Comparison, arm: Any, questions: Any, *rest: Any) -> Any:
        runs.append(str(arm))
        return run(self, arm, questions, *rest)

    monkeypatch.setattr(Comparison, "run", counted)
    folder = asked()
    (folder / "parts" / "left.partial").write_text("Which valve")
    assert _texts_under(folder)
    results, first = json.loads((folder / "results.json").read_text()), len(runs)
    asked(no_text=True)
    assert _texts_under(folder) == [] and len(runs) == first
    assert json.loads((folder / "results.json").read_text())["metrics"] == results["metrics"]
    asked()
    assert len(runs) > first and '"answer"' in (folder / "predictions.jsonl").read_text()
    assert json.loads((folder / "results.json").read_text())["metrics"] == results["metrics"]


class _Press:
    """What our code uses of kvpress's presses, where kvpress is not installed; scores are the norms of the values."""

    def __init__(self, compression_ratio: float) -> None:
        self.ratio = compression_ratio

    def score(self, module: Any, hidden: Any, keys: Tensor, values: Tensor, attentions: Any, kwargs: Any) -> Tensor:
        return values.norm(dim=-1)

    @contextmanager
    def __call__(self, model: Any) -> Iterator[None]:
        def prune(module: Any, inputs: Any, kwargs: Any, output: Any) -> None:
            layer = kwargs["past_key_values"].layers[module.layer_idx]
            assert kwargs["cache_position"][-1] + 1 == layer.keys.shape[2]
            scores = self.score(module, None, layer.keys, layer.values, None, kwargs)
            best = scores.topk(int(scores.shape[2] * (1 - self.ratio)), dim=-1).indices[..., None]
            layer.keys, layer.values = (
                x.gather(2, best.expand(*best.shape[:3], x.shape[3])) for x in (layer.keys, layer.values)
            )

        hooks = [layer.self_attn.register_forward_hook(prune, with_kwargs=True) for layer in model.model.layers]
        yield
        for hook in hooks:
            hook.remove()


@pytest.fixture
def kvpress(monkeypatch: pytest.MonkeyPatch) -> None:
    if not kv_pruning.installed():
        monkeypatch.setitem(sys.modules, "kvpress", SimpleNamespace(ExpectedAttentionPress=_Press))
        monkeypatch.setattr(kv_pruning, "installed", lambda: True)


@pytest.mark.usefixtures("kvpress")
def test_a_compressed_cache_is_some_of_the_whole_one(tiny: Callable[..., FrozenModel]) -> None:
    model = tiny("llama")
    ids = model.encode(TEXTS["pump"])
    whole = model.prefill([*model.template.header_ids, *ids])[:, :, :, model.layout_header :].transpose(2, 3)
    for positions in (12, len(ids), len(ids) + 5):
        kept = kv_pruning.compress(model, ids, positions).transpose(2, 3)  # [L, 2, positions, H, D]
        assert kept.shape[2] == min(positions, len(ids))
        for layer in range(kept.shape[0]):
            for head in range(kept.shape[3]):
                far = torch.cdist(kept[layer, 0, :, head].float(), whole[layer, 0, :, head].float())
                nearest = far.argmin(1)
                assert far.min(1).values.max() < 1e-2 and len(set(nearest.tolist())) == kept.shape[2]
                assert torch.allclose(kept[layer, 1, :, head], whole[layer, 1, nearest, head], atol=1e-2)


@pytest.mark.usefixtures("kvpress")
def test_a_report_with_compressed_caches(asked: Callable[..., Path]) -> None:
    folder = asked()
    results = json.loads((folder / "results.json").read_text())
    sizes = {arm: results["measurements"][f"{arm}.context_tokens"]["mean"] for arm in ("compressed", "oracle")}
    assert sizes["compressed"] == sizes["oracle"] == 16 and "compressed.first_token_s" in results["measurements"]
    assert "oracle_minus_compressed.contains" in results["metrics"]


def test_a_report_goes_on_and_refuses_other_settings(asked: Callable[..., Path]) -> None:
    folder = asked()
    before = (folder / "results.json").read_text()
    [part] = (folder / "parts").glob("*/cas1.json")
    part.unlink()
    asked()
    after = json.loads((folder / "results.json").read_text())
    assert after["metrics"] == json.loads(before)["metrics"]
    with pytest.raises(ConfigError, match="begun with another seed"):
        asked(seed=1)


def test_a_report_is_about_what_is_there_now(
    tmp_path: Path, asked: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Changed answers are scored anew; pages edited or deleted since the training are named and read as trained."""
    from cas.report.arms import Comparison

    read: list[str] = []
    init = Comparison.__init__

    def spy(self: Comparison, *args: Any) -> None:
        init(self, *args)
        read[:] = [self.collection[i].text for i in ("pump", "ferry")]

    monkeypatch.setattr(Comparison, "__init__", spy)
    manuals = tmp_path / "manuals"
    before = json.loads((asked() / "results.json").read_text())["metrics"]
    assert before["cas4.contains"]["mean"] == 0
    asked()
    assert "trained" not in capsys.readouterr().err
    trained = list(read)
    (manuals / "pump.md").write_text("Another text about nothing.")
    (manuals / "added.md").write_text("A page that came later.")
    questions = [json.loads(line) for line in (manuals / "questions.jsonl").read_text().splitlines()]
    for question in questions:
        question["answers"] = ["a", "e", "i", "o", "u", "x", "0"]  # the model's noise has some of these
    questions.append({"document_ids": ["added"], "question": "Which page?", "answers": ["this"]})
    (manuals / "questions.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
    folder = asked()
    after = json.loads((folder / "results.json").read_text())["metrics"]
    said = capsys.readouterr().err
    assert "changed since the training: 1 document (pump)" in said
    assert "not in the store: 1 document (added)" in said and "that the store does not hold: 1\n" in said
    assert read == trained and after["cas4.f1"] != before["cas4.f1"]
    assert len(list((folder / "parts").glob("*/cas4.json"))) == 2  # the earlier state is still there to return to


def test_a_store_of_the_first_documents_is_compared_with_these(tmp_path: Path, asked: Callable[..., Path]) -> None:
    """Documents that ``--documents`` kept out of the training are not missing from the store."""
    (tmp_path / "manuals" / "zebra.md").write_text("A page that comes last.")
    model: Any = SimpleNamespace(count_tokens=lambda text: len(text.split()))
    found = []
    with Store.open(tmp_path / "store") as store:
        for line in ("documents: 5", ""):
            (tmp_path / "store" / "config.yaml").write_text(f"collection: manuals\n{line}\n")
            found.append(load_questions(Config(), model, store)[1])
    assert found[0] == [] and found[1][0].startswith("not in the store: 1 document (zebra)")


def test_questions_added_and_removed_and_cartridges_trained_further_are_asked_again(
    tmp_path: Path, asked: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each state of questions and cartridges has answers of its own; a state that comes back is not computed again."""
    from cas.report.arms import Comparison

    ran: list[int] = []
    run = Comparison.run
    monkeypatch.setattr(Comparison, "run", lambda self, arm, q, *rest: ran.append(len(q)) or run(self, arm, q, *rest))

    def report() -> tuple[int, set[str], dict[str, Any]]:
        ran.clear()
        folder = asked()
        results = json.loads((folder / "results.json").read_text())
        lines = (folder / "predictions.jsonl").read_text().splitlines()
        found = {p["question_id"] for p in map(json.loads, lines) if p["arm"] == "cas4"}
        assert results["settings"]["questions"] == len(found)
        return len(ran), found, results["metrics"]

    def trained(value: float) -> None:
        with Store.open(tmp_path / "store", write=True) as store:
            store.write_tensors("pump", {"kv": torch.full(store.cartridge("pump").shape, value)}, version=7)
            store.commit(store.rows(), None)

    file = tmp_path / "manuals" / "questions.jsonl"
    before = file.read_text()
    count, first, metrics = report()
    assert count and report() == (0, first, metrics)
    added = {"id": "new", "document_ids": ["pump"], "question": "Which pump?", "answers": ["the red one"]}
    file.write_text(before + json.dumps(added) + "\n")
    assert report()[:2] != (0, first) and ran
    file.write_text("".join(before.splitlines(keepends=True)[:-2]))
    _, fewer, _ = report()
    assert ran and not fewer & {"q10", "q11"}
    file.write_text(before)
    assert report() == (0, first, metrics)
    trained(0.5)
    assert report()[2] != metrics and ran
    now = report()[2]
    trained(-0.5)  # as if in a new store in the same folder, whose versions count from the beginning
    assert report()[2] != now and ran


def test_prices_are_those_given(asked: Callable[..., Path]) -> None:
    folder = asked(price_hour=3.6, price_tokens=2.0)
    run, predictions = read_run(folder)
    row = next(row for row in View(run, predictions, {}).rows() if str(row["arm"]) == "rag64")
    seconds, tokens = (run["measurements"][f"rag64.{name}"]["mean"] for name in ("answer_s", "prompt_tokens"))
    assert row["price"] == f"{seconds:,.2f} / {tokens * 2e-3:,.2f}"  # 1,000 answers of a second take a thousand seconds
    assert "1,000 questions on this machine / by the token" in (folder / "report.md").read_text()
    asked(price_hour=7.2)  # a price is no reason to compute anything again
    assert "by the token" not in (folder / "report.md").read_text()


def test_missing_packages_are_named_before_anything_is_done(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("cas.report.compare.find_spec", lambda name: None if name in ("jinja2", "matplotlib") else name)
    with pytest.raises(ConfigError, match=r"needs jinja2, matplotlib: pip install 'cas-cartridges\[report\]'"):
        compare(Config(store="none", output=str(tmp_path / "report")))
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize("words", [["-m", "cas", "report"], ["-m", "cas.report"], ["-m", "experiments.rag_vs_cas"]])
def test_every_command_of_the_report_starts(words: list[str], tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    environment = {**os.environ, "CAS_STORE": str(tmp_path / "none")}
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd=root, env=environment)
    assert done.returncode == 2 and done.stderr.startswith(f"cas: {tmp_path}/none") and done.stderr.count("\n") == 1


def test_too_few_questions_say_what_to_write(tmp_path: Path, asked: Callable[..., Path]) -> None:
    file = tmp_path / "manuals" / "questions.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:3]))
    with pytest.raises(ConfigError, match="write at least 8"):
        asked()
