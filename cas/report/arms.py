"""Every way of answering that :mod:`cas.report.compare` compares, by name: which prompt, which KV caches, what it measures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from cas.answering import prompts as prompting
from cas.answering.answerer import open_index
from cas.data.collection import Collection, Question
from cas.evaluation.arms import answered, overlap_scores
from cas.evaluation.metrics import interval
from cas.evaluation.recording import Prediction
from cas.evaluation.resume import cached_json
from cas.model.decoding import Prompt
from cas.model.frozen import FrozenModel
from cas.model.positions import Layout
from cas.report import kv_pruning as compressed
from cas.report.rag_baseline import RANKINGS, Rag, Setting, tune
from cas.store.store import Store
from retrieval import WordIndex, rank_documents, recall_at_k, reciprocal_rank, with_title

if TYPE_CHECKING:
    from cas.report.compare import Config

Group = tuple[list[Question], list[Prompt], Mapping[str, Tensor], Layout]

AT_ONCE = 64  # questions whose cartridges are in memory together


class Arms:
    """Every way of answering, by name. ``notes``: what was left out, and why."""

    def __init__(self, config: Config, model: FrozenModel, store: Store, collection: Collection, rag: Rag) -> None:
        self.config, self.model, self.store, self.collection, self.rag = config, model, store, collection, rag
        self.sizes = {name: row.p for name, row in store.rows().items()}
        self.index = open_index(store, rag.embedder)
        self.words = WordIndex(self.index, store.texts())
        self.room = model.geometry.max_positions - model.layout_header - 64 - config.max_new_tokens  # 64: a question
        self.settings: dict[int, Setting] = {}
        self.notes: list[str] = []
        self.others = {
            name: Store.open(folder)
            for name, folder in (("isolated", config.isolated), ("monolithic", config.monolithic))
            if folder is not None
        }
        for other in self.others.values():
            other.check_model(model)
        mean = sum(self.sizes.values()) / len(self.sizes)
        equal = {round(k * mean) for k in self.ks()}
        self.budgets = sorted(b for b in {*config.budgets, *equal} if b < self.room)
        if left := [b for b in config.budgets if b >= self.room]:
            self.note(f"RAG at {', '.join(map(str, left))} tokens: beyond the model's window")

    def note(self, text: str) -> None:
        """Say once what was left out."""
        self.notes += [text] if text not in self.notes else []

    def ks(self) -> list[int]:
        """Numbers of cartridges that the store has."""
        return [k for k in self.config.ks if k <= len(self.sizes)]

    def names(self) -> list[str]:
        """All arms, in the order of the report."""
        arms = ["no_context", *(f"cas{k}" for k in self.ks()), "oracle"]
        if sum(self.sizes.values()) < self.room:
            arms.append("all_resident")
        else:
            self.note(
                f"all cartridges resident: their {sum(self.sizes.values()):,} positions are beyond the model's window"
            )
        if self.config.with_chunk_k <= len(self.sizes):
            arms.append(f"cas{self.config.with_chunk_k}_chunk")
        arms += [f"rag{b}" for b in self.budgets]
        arms += ["full_document", "truncated"]
        if compressed.installed():
            arms.append("compressed")
        else:
            self.note("training-free KV compression: kvpress is not installed (experiments/compressed.py says how)")
        if "isolated" in self.others:
            arms += ["isolated_oracle", *(f"isolated_cas{k}" for k in self.ks())]
        return arms + (["monolithic"] if "monolithic" in self.others else [])

    def best_k(self, questions: Sequence[Question], metric: str) -> str:
        """The arm with the number of retrieved cartridges that answers most validation questions, the fewer the better."""

        def score(k: int) -> float:
            return sum(p["scores"][metric] for p in self.ask(f"cas{k}", questions)["predictions"])

        return f"cas{max(self.ks(), key=score)}"

    def tuned(self, parts: Path, questions: Sequence[Question], metric: str) -> dict[int, dict[str, Any]]:
        """The best setting of RAG at every budget, on validation questions; what was tried."""
        found: dict[int, dict[str, Any]] = {}
        best = Setting()

        def search(budget: int, start: Setting) -> dict[str, Any]:
            def score(setting: Setting) -> float:
                prompts = self.texts(questions, setting, budget)
                got = answered(
                    self.model, "rag", questions, prompts, {}, self.store.layout, 0, self.config.max_new_tokens
                )
                scores = [
                    {**p["scores"], **overlap_scores(p["answer"], q.answers)}
                    for p, q in zip(got, questions, strict=True)
                ]
                return sum(s[metric] for s in scores) / len(got)

            chosen, tried = tune(score, start)
            print(f"tuned       RAG at {budget} tokens: {chosen}", flush=True)
            return {"best": asdict(chosen), "tried": tried}

        for budget in self.budgets:
            if budget <= max(self.config.tune_up_to, self.budgets[0]) and questions:
                found[budget] = cached_json(parts / f"tune-{budget}.json", partial(search, budget, best))
                best = Setting(**found[budget]["best"])
            else:
                found[budget] = {"best": asdict(best), "tried": []}
            self.settings[budget] = best
        return found

    # -- prompts ------------------------------------------------------------------------------------------------------

    def texts(self, questions: Sequence[Question], setting: Setting, budget: int) -> list[Prompt]:
        """RAG prompts of a setting at a budget."""
        plain = [q.question for q in questions]
        found = self.rag.chunks(plain, setting, budget)
        return [prompting.text_context(self.model, self.put(q), t) for q, t in zip(plain, found, strict=True)]

    def put(self, question: str) -> str:
        """The question as it is put to the model."""
        return question + prompting.brief(self.model)

    def retrieved(self, questions: Sequence[str], k: int) -> list[list[str]]:
        """Ids of the k best documents of each question, as cas.query retrieves them."""
        return [[r.document_id for r in found] for found in rank_documents(self.index, questions, k, self.words)]

    def prompts(self, arm: str, questions: Sequence[Question]) -> list[Prompt]:
        """The prompts of an arm that reads cartridges, retrieved text or nothing."""
        model, plain = self.model, [q.question for q in questions]
        arm = arm.removeprefix("isolated_")
        if arm == "no_context":
            return [prompting.no_context(model, self.put(q)) for q in plain]
        if arm.startswith("rag"):
            return self.texts(questions, self.settings[int(arm[3:])], int(arm[3:]))
        if arm == "oracle":
            names = [list(q.document_ids) for q in questions]
        elif arm == "all_resident":
            names = [list(self.sizes)] * len(questions)
        elif arm == "monolithic":
            names = [list(self.others["monolithic"].rows())] * len(questions)
        else:
            names = self.retrieved(plain, int(arm.removeprefix("cas").removesuffix("_chunk")))
        prompts = [prompting.cartridges(model, self.put(q), some) for q, some in zip(plain, names, strict=True)]
        if arm.endswith("_chunk"):
            setting = self.settings[self.budgets[0]]
            best = self.rag.chunks(plain, setting, max(256, 4 * setting.words))
            chunks = [model.encode(found[0]) if found else [] for found in best]
            prompts = [Prompt((*c, *p.tokens), p.cartridges) for c, p in zip(chunks, prompts, strict=True)]
        return prompts

    def groups(self, arm: str, questions: Sequence[Question]) -> Iterator[Group]:
        """Questions of an arm, some at a time, with their prompts and what these load."""
        if arm in ("full_document", "truncated", "compressed"):
            header = self.model.layout_header
            for about, prompts, tokens in self.shared_texts(arm, questions):
                if arm == "compressed":  # as small as the cartridges of the same documents
                    kv = compressed.compress(self.model, tokens, sum(self.sizes[i] for i in {*about[0].document_ids}))
                else:
                    kv = self.model.prefill([*self.model.template.header_ids, *tokens])[:, :, :, header:]
                yield about, prompts, {"text": kv}, Layout("fixed", header, len(tokens))
            return
        store = self.others.get(arm.partition("_")[0], self.store)
        for start in range(0, len(questions), AT_ONCE):
            some = list(questions[start : start + AT_ONCE])
            prompts = self.prompts(arm, some)
            names = sorted({name for p in prompts for name in p.cartridges})
            loaded = {name: store.cartridge(name).to(self.model.device, self.model.dtype) for name in names}
            yield some, prompts, loaded, store.layout

    def shared_texts(
        self, arm: str, questions: Sequence[Question]
    ) -> Iterator[tuple[list[Question], list[Prompt], list[int]]]:
        """Texts that many questions share, read once: the gold documents of each, or the collection as far as it fits."""
        sets = [tuple(d.id for d in self.collection.documents)]
        if arm != "truncated":
            sets = list(dict.fromkeys(tuple(sorted(q.document_ids)) for q in questions))
        for ids in sets:
            about = [q for q in questions if arm == "truncated" or tuple(sorted(q.document_ids)) == ids]
            tokens: list[int] = []
            for i in ids:
                if len(tokens) < self.room:
                    d = self.collection[i]
                    tokens += self.model.encode(("\n\n" if tokens else "") + with_title(d.title, d.text))
            if len(tokens) > self.room and arm != "truncated":
                self.note("full_document: documents beyond the model's window are cut there")
            prompts = [Prompt(self.model.question_tokens(self.put(q.question)), ("text",)) for q in about]
            yield about, prompts, tokens[: self.room]

    # -- measuring ----------------------------------------------------------------------------------------------------

    def ask(self, arm: str, questions: Sequence[Question]) -> dict[str, Any]:
        """Answers of an arm, scored, and the tokens and KV bytes that they had before them."""
        predictions: list[Prediction] = []
        tokens: list[tuple[str, int, int]] = []
        for about, prompts, loaded, layout in self.groups(arm, questions):
            predictions += answered(
                self.model, arm, about, prompts, loaded, layout, self.config.seed, self.config.max_new_tokens
            )
            for q, p in zip(about, prompts, strict=True):
                held = sum(loaded[name].shape[3] for name in p.cartridges)
                own = len(p.tokens) - len(self.model.template.suffix_ids) - len(self.model.template.footer_ids)
                own -= len(self.model.encode(self.put(q.question)))
                tokens.append((q.document_ids[0], held + own, held + len(p.tokens)))
        place, gold = {q.id: i for i, q in enumerate(questions)}, {q.id: q.answers for q in questions}
        for one in predictions:
            one["scores"] = {**one["scores"], **overlap_scores(one["answer"], gold[one["question_id"]])}
        documents, context, all_tokens = zip(*tokens, strict=True)
        header = self.model.layout_header
        size = self.model.geometry.elements(1) * self.model.dtype.itemsize
        figures = {
            "context_tokens": context,
            "prompt_tokens": [n + header for n in all_tokens],
            "kv_bytes": [(n + header) * size for n in all_tokens],
        }
        return {
            "predictions": sorted(predictions, key=lambda p: place[p["question_id"]]),
            "measured": {f"{arm}.{name}": asdict(interval(v, documents)) for name, v in figures.items()},
        }

    def retrieval(self, questions: Sequence[Question]) -> dict[str, dict[str, float]]:
        """recall@k and MRR of documents under each ranking, as cas.query chunks them."""
        plain = [q.question for q in questions]
        documents = [q.document_ids[0] for q in questions]
        setting = Setting(words=self.index.words, overlap=self.index.overlap)
        found: dict[str, dict[str, float]] = {}
        for ranking in RANKINGS:
            ranked = [
                [r.document_id for r in row] for row in self.rag.documents_by(ranking, plain, len(self.sizes), setting)
            ]
            pairs = [(ids, q.document_ids) for ids, q in zip(ranked, questions, strict=True)]
            figures = {f"recall@{k}": [recall_at_k(*pair, k) for pair in pairs] for k in self.ks()}
            figures["mrr"] = [reciprocal_rank(*pair) for pair in pairs]
            found |= {f"retrieval_{ranking}.{n}": asdict(interval(v, documents)) for n, v in figures.items()}
        return found
