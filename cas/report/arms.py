"""Every arm that the report compares: its prompts, what these load, its answers and what it measures."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from cas.answering import prompts as prompting
from cas.answering.answerer import open_index
from cas.data.collection import Collection, Question
from cas.evaluation.answers import PromptGroup, answer_prompts, answer_texts
from cas.evaluation.arms import FULL_DOCUMENT, NO_CONTEXT, ORACLE, Arm
from cas.evaluation.metrics import interval, overlap_scores, score_answer
from cas.evaluation.recording import Prediction
from cas.evaluation.resume import cached_json
from cas.model.decoding import Prompt
from cas.model.frozen import FrozenModel
from cas.model.positions import Layout
from cas.report import kv_pruning
from cas.report.config import Config
from cas.report.rag_baseline import RANKINGS, SETTINGS_TRIED, Rag, Setting, tune
from cas.store.store import Store
from retrieval import WordIndex, ndcg_at_k, rank_documents, recall_at_k, reciprocal_rank, with_title

POWERS = tuple(2**n for n in range(7, 14))
BATCH = 64  # questions whose cartridges are in memory together
QUESTION_ROOM = 64  # tokens of the window that a question may take
RANKED = 100  # documents of a question whose ranking is kept
SHARED_TEXT = ("full_document", "truncated", "compressed")  # kinds whose text is read once for many questions


class Comparison:
    """The arms of one report. ``notes``: which arms were left out, and why."""

    def __init__(self, config: Config, model: FrozenModel, store: Store, collection: Collection, rag: Rag) -> None:
        self.config, self.model, self.store, self.collection, self.rag = config, model, store, collection, rag
        self.sizes = {name: row.p for name, row in store.answering().items()}
        self.index = open_index(store, rag.embedder)
        self.words = WordIndex.open(self.index, store.texts, store.folder / "index")
        self.room = model.geometry.max_positions - model.layout_header - QUESTION_ROOM - config.max_new_tokens
        self.settings: dict[int, Setting] = {}  # of RAG, by budget
        self.notes: list[str] = []
        self.other_stores = {
            name: Store.open(folder)
            for name, folder in (("isolated", config.isolated), ("monolithic", config.monolithic))
            if folder is not None
        }
        for other in self.other_stores.values():
            other.check_model(model)
        self.mean_size = sum(self.sizes.values()) / len(self.sizes)
        beside = {round(times * k * self.mean_size) for k in self.ks() for times in (1, 3)}
        whole = sum(row.tokens for row in store.answering().values())
        beyond = [b for b in POWERS if max(beside) < b <= 4 * max(beside)]
        wanted = config.budgets or [b for n, b in enumerate(beyond) if not n or beyond[n - 1] < whole]
        self.budgets = sorted(b for b in {*wanted, *beside} if b < self.room)
        if too_large := [b for b in config.budgets or () if b >= self.room]:
            self.note(f"RAG at {', '.join(map(str, too_large))} tokens: beyond the model's window")

    def note(self, text: str) -> None:
        """Add a note, unless it is there."""
        self.notes += [text] if text not in self.notes else []

    def ks(self) -> list[int]:
        """Numbers of cartridges to retrieve, as far as the store has so many."""
        return [k for k in self.config.ks if k <= len(self.sizes)]

    def arms(self) -> list[Arm]:
        """All arms, in the order of the report."""
        retrieved = [Arm("cas", k) for k in self.ks()]
        arms = [NO_CONTEXT, *retrieved, ORACLE]
        positions = sum(self.sizes.values())
        if positions < self.room:
            arms.append(Arm("all_resident"))
        else:
            self.note(f"all cartridges resident: their {positions:,} positions are beyond the model's window")
        if self.config.with_chunk_k <= len(self.sizes):
            arms.append(Arm("cas", self.config.with_chunk_k, chunk=True))
        arms += [Arm("rag", size=budget) for budget in self.budgets]
        arms += [FULL_DOCUMENT, Arm("truncated")]
        if kv_pruning.installed():
            arms.append(Arm("compressed"))
        else:
            self.note("training-free KV compression: kvpress is not installed (cas/report/kv_pruning.py says how)")
        if "isolated" in self.other_stores:
            arms += [replace(ORACLE, training="isolated"), *(Arm("cas", k, training="isolated") for k in self.ks())]
        return arms + ([Arm("monolithic")] if "monolithic" in self.other_stores else [])

    def store_of(self, arm: Arm) -> Store:
        """The store that an arm loads its cartridges from."""
        name = "monolithic" if arm.kind == "monolithic" else arm.training
        return self.other_stores[name] if name else self.store

    def best_k(self, questions: Sequence[Question], metric: str) -> str:
        """The name of the arm whose number of retrieved cartridges scores best on validation questions; ties go to the
        smaller number."""

        def score(k: int) -> float:
            return sum(p["scores"][metric] for p in self.run(Arm("cas", k), questions)["predictions"])

        return str(Arm("cas", max(self.ks(), key=score)))

    def tune_rag(
        self, parts: Path, questions: Sequence[Question], metric: str, main: Arm, show: Callable[[int, int], None]
    ) -> dict[int, dict[str, Any]]:
        """RAG's setting at every budget, and the settings that were tried. It is searched on validation questions at the
        budgets that the verdict compares ``main`` with; the other budgets take that of the nearest one.

        ``parts``: the folder where the result of each search is written, and read when the command is run again.
        ``show``: gets how many settings were tried, and of how many.
        """
        assert main.k is not None
        beside = {round(times * main.k * self.mean_size) for times in (1, 3)}
        budgets = [b for b in self.budgets if b in beside] or self.budgets[-1:]
        tuned: dict[int, dict[str, Any]] = {}
        best, done = Setting(), 0

        def search(budget: int, start: Setting) -> dict[str, Any]:
            def score(setting: Setting) -> float:
                nonlocal done
                show(done, total := len(budgets) * SETTINGS_TRIED)
                prompts = self.rag_prompts(questions, setting, budget)
                answers = answer_texts(self.model, prompts, {}, self.store.layout, self.config.max_new_tokens)
                show(done := done + 1, total)
                return sum(score_answer(metric, a, q.answers) for a, q in zip(answers, questions)) / len(answers)

            chosen, tried = tune(score, start)
            print(f"tuned       RAG at {budget} tokens: {chosen}", flush=True)
            return {"best": asdict(chosen), "tried": tried}

        for budget in budgets if questions else ():
            tuned[budget] = cached_json(parts / f"tune-{budget}.json", partial(search, budget, best))
            best, done = Setting(**tuned[budget]["best"]), len(tuned) * SETTINGS_TRIED
        results: dict[int, dict[str, Any]] = {}
        for budget in self.budgets:
            nearest = min(tuned, key=lambda b: abs(math.log(b / budget)), default=budget)
            here = tuned.get(nearest, {"best": asdict(best), "tried": []})
            results[budget] = here if nearest == budget else {"best": here["best"], "tried": [], "as_at": nearest}
            self.settings[budget] = Setting(**here["best"])
        return results

    # -- prompts ------------------------------------------------------------------------------------------------------

    def wording(self, question: str) -> str:
        """The question with the request for a short answer."""
        return question + prompting.brief(self.model)

    def rag_prompts(self, questions: Sequence[Question], setting: Setting, budget: int) -> list[Prompt]:
        """RAG prompts of a setting at a budget of tokens."""
        plain = [q.question for q in questions]
        texts = self.rag.chunks(plain, setting, budget)
        return [prompting.text_context(self.model, self.wording(q), t) for q, t in zip(plain, texts, strict=True)]

    def cartridge_ids(self, arm: Arm, questions: Sequence[Question]) -> list[list[str]]:
        """For each question the ids of the cartridges that an arm loads."""
        if arm.kind == "oracle":
            return [list(q.document_ids) for q in questions]
        if arm.kind in ("all_resident", "monolithic"):
            return [list(self.store_of(arm).rows())] * len(questions)
        assert arm.kind == "cas" and arm.k is not None, arm
        rankings = rank_documents(self.index, [q.question for q in questions], arm.k, self.words)  # as in cas.query
        return [[r.document_id for r in ranked] for ranked in rankings]

    def prompts(self, arm: Arm, questions: Sequence[Question]) -> list[Prompt]:
        """The prompts of an arm that reads cartridges, retrieved text or nothing."""
        model, plain = self.model, [q.question for q in questions]
        if arm.kind == "no_context":
            return [prompting.no_context(model, self.wording(q)) for q in plain]
        if arm.kind == "rag":
            assert arm.size is not None
            return self.rag_prompts(questions, self.settings[arm.size], arm.size)
        ids = self.cartridge_ids(arm, questions)
        prompts = [prompting.cartridges(model, self.wording(q), i) for q, i in zip(plain, ids, strict=True)]
        if arm.chunk:
            setting = self.settings[self.budgets[0]]
            chunks = self.rag.chunks(plain, setting, max(256, 4 * setting.words))
            tokens = [model.encode(texts[0]) if texts else [] for texts in chunks]
            prompts = [Prompt((*t, *p.tokens), p.cartridges) for t, p in zip(tokens, prompts, strict=True)]
        return prompts

    def groups(self, arm: Arm, questions: Sequence[Question]) -> Iterator[PromptGroup]:
        """The questions of an arm in groups, with their prompts and what these load."""
        if arm.kind in SHARED_TEXT:
            header = self.model.layout_header
            for group, prompts, tokens in self.shared_texts(arm, questions):
                if arm.kind == "compressed":  # as small as the cartridges of the same documents
                    positions = sum(self.sizes[i] for i in {*group[0].document_ids})
                    kv = kv_pruning.compress(self.model, tokens, positions)
                else:
                    kv = self.model.prefill([*self.model.template.header_ids, *tokens])[:, :, :, header:]
                yield PromptGroup(group, prompts, {"text": kv}, Layout("fixed", header, len(tokens)))
            return
        store = self.store_of(arm)
        for start in range(0, len(questions), BATCH):
            batch = list(questions[start : start + BATCH])
            prompts = self.prompts(arm, batch)
            ids = sorted({i for prompt in prompts for i in prompt.cartridges})
            kv_by_id = {i: store.cartridge(i).to(self.model.device, self.model.dtype) for i in ids}
            yield PromptGroup(batch, prompts, kv_by_id, store.layout)

    def shared_texts(
        self, arm: Arm, questions: Sequence[Question]
    ) -> Iterator[tuple[list[Question], list[Prompt], list[int]]]:
        """Texts that many questions share, as tokens, with these questions and their prompts: the gold documents of
        each question, or the collection as far as it fits into the window."""
        sets = [tuple(d.id for d in self.collection.documents)]
        if arm.kind != "truncated":
            sets = list(dict.fromkeys(tuple(sorted(q.document_ids)) for q in questions))
        for ids in sets:
            group = [q for q in questions if arm.kind == "truncated" or tuple(sorted(q.document_ids)) == ids]
            tokens: list[int] = []
            for i in ids:
                if len(tokens) < self.room:
                    document = self.collection[i]
                    text = with_title(document.title, document.text)
                    tokens += self.model.encode(("\n\n" if tokens else "") + text)
            if len(tokens) > self.room and arm.kind != "truncated":
                self.note("full_document: documents beyond the model's window are cut there")
            wordings = [self.wording(q.question) for q in group]
            prompts = [Prompt(self.model.question_tokens(wording), ("text",)) for wording in wordings]
            yield group, prompts, tokens[: self.room]

    # -- measuring ----------------------------------------------------------------------------------------------------

    def run(
        self, arm: Arm, questions: Sequence[Question], answered: Callable[[int], None] | None = None
    ) -> dict[str, Any]:
        """Answers of an arm with their scores (``predictions``), and what the model read for them (``measured``):
        tokens where the document goes, all prompt tokens, bytes of KV. ``answered`` gets how many answers there are."""
        predictions: list[Prediction] = []
        sizes: list[tuple[str, int, int]] = []  # document, tokens of context, all tokens of the prompt
        template = self.model.template
        for group in self.groups(arm, questions):
            predictions += answer_prompts(self.model, str(arm), *group, self.config.seed, self.config.max_new_tokens)
            if answered is not None:
                answered(len(predictions))
            for q, prompt in zip(group.questions, group.prompts, strict=True):
                positions = sum(group.cartridges[i].shape[3] for i in prompt.cartridges)
                text = len(prompt.tokens) - len(template.suffix_ids) - len(template.footer_ids)
                text -= len(self.model.encode(self.wording(q.question)))
                sizes.append((q.document_ids[0], positions + text, positions + len(prompt.tokens)))
        place, gold = {q.id: i for i, q in enumerate(questions)}, {q.id: q.answers for q in questions}
        for p in predictions:
            p["scores"] = {**p["scores"], **overlap_scores(p["answer"], gold[p["question_id"]])}
        documents, context, all_tokens = zip(*sizes, strict=True)
        header = self.model.layout_header
        position_bytes = self.model.geometry.elements(1) * self.model.dtype.itemsize
        figures = {
            "context_tokens": context,
            "prompt_tokens": [n + header for n in all_tokens],
            "kv_bytes": [(n + header) * position_bytes for n in all_tokens],
        }
        return {
            "predictions": sorted(predictions, key=lambda p: place[p["question_id"]]),
            "measured": {f"{arm}.{name}": asdict(interval(v, documents)) for name, v in figures.items()},
        }

    def retrieval(self, questions: Sequence[Question]) -> dict[str, Any]:
        """With chunks as in cas.query, under each ranking: recall@k, nDCG@10 and MRR of documents (``measured``), and
        the best documents of each question with their scores (``rankings``)."""
        plain = [q.question for q in questions]
        documents = [q.document_ids[0] for q in questions]
        setting = Setting(words=self.index.words, overlap=self.index.overlap)
        measurements: dict[str, dict[str, float]] = {}
        best: dict[str, dict[str, list[tuple[str, float]]]] = {}
        for ranking in RANKINGS:
            rankings = self.rag.documents_by(ranking, plain, len(self.sizes), setting)
            pairs = [([r.document_id for r in row], q.document_ids) for row, q in zip(rankings, questions, strict=True)]
            figures = {f"recall@{k}": [recall_at_k(*pair, k) for pair in pairs] for k in self.ks()}
            figures["ndcg@10"] = [ndcg_at_k(*pair, 10) for pair in pairs]
            figures["mrr"] = [reciprocal_rank(*pair) for pair in pairs]
            measurements |= {f"retrieval_{ranking}.{n}": asdict(interval(v, documents)) for n, v in figures.items()}
            best[ranking] = {
                q.id: [(r.document_id, round(r.score, 6)) for r in row[:RANKED]]
                for row, q in zip(rankings, questions, strict=True)
            }
        return {"measured": measurements, "rankings": best}

    def contexts(self, arm: Arm, questions: Sequence[Question]) -> list[list[str]]:
        """For each question the texts that an arm reads, or whose cartridges it loads."""
        plain = [q.question for q in questions]
        if arm.kind == "no_context":
            return [[]] * len(questions)
        if arm.kind == "rag":
            assert arm.size is not None
            return self.rag.chunks(plain, self.settings[arm.size], arm.size)
        if arm.kind in ("truncated", "monolithic"):
            ids = [[d.id for d in self.collection.documents]] * len(questions)
        elif arm.kind in SHARED_TEXT:
            ids = [list(q.document_ids) for q in questions]
        else:
            ids = self.cartridge_ids(arm, questions)
        return [[self.collection[i].text for i in row] for row in ids]
