"""RAG against CAS on one store: accuracy, tokens, memory, latency and training cost, on the same questions.

    python -m experiments.rag_vs_cas --store runs/manuals --output runs/manuals_report

Every arm answers with the same model, header, question, embedder and decoding; they differ only in what stands where the
document goes. A budget counts the tokens there: text with its titles, or positions of cartridges. Writes ``results.json``,
``predictions.jsonl``, ``report.md`` and ``report.html`` (one file, nothing loaded from anywhere).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, Literal

from cas import console
from cas.config import parse
from cas.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from cas.cartridge import Layout
    from cas.collection import Collection, Question
    from cas.decoding import Prompt
    from cas.model import FrozenModel
    from cas.store import Store
    from experiments.rag import Rag, Setting
    from experiments.results import Prediction

    Group = tuple[list[Question], list[Prompt], Mapping[str, Tensor], Layout]

AT_ONCE = 64  # questions whose cartridges are in memory together


@dataclass(frozen=True)
class Config:
    """RAG against CAS on one store."""

    store: str = ""
    """The store, trained by cas.train."""
    output: str = "runs/rag_vs_cas"
    """Folder of the report and results."""
    collection: str | None = None
    """The documents with questions; default what the store was trained on."""
    collection_seed: int | None = None
    """Seed of a generated collection; default as the store was trained."""
    name: str | None = None
    """Name of the report; default that of the collection."""
    ks: tuple[int, ...] = (1, 2, 4, 8)
    """Cartridges to retrieve."""
    budgets: tuple[int, ...] = (128, 256, 512, 1024, 2048, 4096, 8192)
    """Tokens of retrieved text, as far as the model's window goes; as many as each of --ks has are added."""
    tune_up_to: int = 1024
    """RAG is tuned at each budget up to this one; larger ones take its setting."""
    questions: int | None = None
    """Ask so many test questions; default all."""
    validation: int = 128
    """Questions to tune RAG on, at most a quarter of all; they are not asked again."""
    metric: Literal["exact_match", "contains", "f1", "rouge_l", "chrf"] | None = None
    """What decides; default exact_match for the embedded reader, else contains."""
    isolated: str | None = None
    """A store of the same documents trained with --isolation 1, to compare."""
    monolithic: str | None = None
    """A store of the same documents trained with --merge, to compare."""
    with_chunk_k: int = 4
    """Cartridges of the arm that has one chunk of text as well."""
    timed: int = 16
    """Questions that are timed, one at a time."""
    max_new_tokens: int = 32
    """Longest answer."""
    embedder: str = "sentence-transformers/all-MiniLM-L6-v2"
    """Hub name or folder of the embedding model, for both sides."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ..."""
    no_text: bool = False
    """Keep answers and question texts out of what is written: figures and question ids only."""
    seed: int = 0
    """Seed of the split into validation and test questions."""


def main() -> int:
    """Run the comparison. Returns the exit status."""
    return console.run(lambda: compare(parse(Config, "python -m experiments.rag_vs_cas", sys.argv[1:])))


def compare(config: Config) -> int:
    """Tune, ask, time, write the report."""
    from cas.model import FrozenModel
    from cas.store import Store
    from experiments.arms import Remembering
    from experiments.costs import cost_of, timed
    from experiments.parts import begun_with, kept
    from experiments.rag import Rag
    from retrieval import SentenceEmbedder

    if not config.store:
        raise ConfigError("give --store: the folder that cas.train wrote")
    unread = Store.open(config.store)
    recorded = unread.meta["model"]
    unread.close()
    output = Path(config.output)
    begun_with(output, {k: v for k, v in asdict(config).items() if k not in ("output", "no_text", "name")})
    source = recorded["source"]
    model = FrozenModel.from_pretrained(
        source["name"], revision=source["revision"], device=config.device, system=recorded["system"]
    )
    store = Store.open(config.store, model)
    collection = collection_of(config, model, store)
    checked, asked = split(collection, config)
    metric = config.metric or ("exact_match" if model.reader else "contains")
    print(f"questions   {len(asked)} to test, {len(checked)} to tune on; {metric} decides", flush=True)
    embedder = Remembering(SentenceEmbedder(config.embedder))
    rag = Rag(model, store.texts(), embedder)
    arms = Arms(config, model, store, collection, rag)
    parts = output / "parts"
    settings = arms.tuned(parts, checked, metric)
    main_arm = kept(parts / "k.json", partial(arms.best_k, checked, metric)) if checked else f"cas{arms.ks()[-1]}"
    predictions: list[Prediction] = []
    measured: dict[str, dict[str, float]] = {}
    for arm in arms.names():
        done = kept(parts / f"{arm}.json", partial(arms.ask, arm, asked))
        predictions += done["predictions"]
        measured |= done["measured"]
        print(f"measured    {arm}", flush=True)
    sample = Random(config.seed).sample(asked, min(config.timed, len(asked)))
    measured |= kept(parts / "timed.json", partial(timed, arms, SentenceEmbedder(config.embedder), sample))
    measured |= kept(parts / "retrieval.json", partial(arms.retrieval, asked))
    cost = cost_of(store)
    return write(
        config, model, store, collection, asked, predictions, measured, settings, cost, metric, main_arm, arms.notes
    )


def collection_of(config: Config, model: FrozenModel, store: Store) -> Collection:
    """The store's documents with their questions, as ``cas.train`` saw them."""
    import yaml

    from cas.collection import Collection, split_long

    file = store.folder / "config.yaml"
    trained = yaml.safe_load(file.read_text()) if file.exists() else {}
    name = config.collection or trained.get("collection")
    if not name:
        raise ConfigError(f"{store.folder} does not say what it was trained on; give --collection")
    seed = trained.get("collection_seed", 0) if config.collection_seed is None else config.collection_seed
    found = Collection.load(name, seed=seed)
    if trained.get("span") and trained.get("tokens") is None:
        most = int(trained["span"] * (trained.get("ratio") or 16.0))
        found = split_long(found, most, lambda text: len(model.encode(text)))
    have = {d.id for d in found.documents}
    if missing := [i for i in store.rows() if i not in have]:
        raise ConfigError(
            f"--collection {name} lacks {len(missing)} documents of the store, such as {missing[0]}; give the one it was "
            "trained on"
        )
    found = found.select(list(store.rows()))
    if len(found.questions) < 8:
        raise ConfigError(
            f"{name} has {len(found.questions)} questions about these documents; write at least 8 into questions.jsonl beside "
            'them, a line each: {"id": "q1", "document_ids": ["…"], "question": "…", "answers": ["…"]}'
        )
    return found


def split(collection: Collection, config: Config) -> tuple[list[Question], list[Question]]:
    """Questions to tune on, and questions to test with: no question is both."""
    few = min(config.validation, len(collection.questions) // 4)
    mixed = Random(f"validation/{config.seed}").sample(collection.questions, len(collection.questions))
    rest = mixed[few:] if config.questions is None else mixed[few : few + config.questions]
    return mixed[:few], sorted(rest, key=lambda q: q.id)


class Arms:
    """Every way of answering, by name. ``notes``: what was left out, and why."""

    def __init__(self, config: Config, model: FrozenModel, store: Store, collection: Collection, rag: Rag) -> None:
        from cas.answer import open_index
        from cas.store import Store
        from retrieval import WordIndex

        self.config, self.model, self.store, self.collection, self.rag = config, model, store, collection, rag
        self.sizes = {name: row.p for name, row in store.rows().items()}
        self.index = open_index(store, rag.embedder)
        self.words = WordIndex(self.index, store.texts())
        self.room = model.geometry.max_positions - model.layout_header - 64 - config.max_new_tokens  # 64: a question
        self.settings: dict[int, Setting] = {}
        self.notes: list[str] = []
        self.others = {
            name: Store.open(folder, model)
            for name, folder in (("isolated", config.isolated), ("monolithic", config.monolithic))
            if folder is not None
        }
        mean = sum(self.sizes.values()) / len(self.sizes)
        equal = {round(k * mean) for k in self.ks()}
        self.budgets = sorted(b for b in {*config.budgets, *equal} if b < self.room)
        if left := [b for b in config.budgets if b >= self.room]:
            self.notes.append(f"RAG at {', '.join(map(str, left))} tokens: beyond the model's window")

    def ks(self) -> list[int]:
        """Numbers of cartridges that the store has."""
        return [k for k in self.config.ks if k <= len(self.sizes)]

    def names(self) -> list[str]:
        """All arms, in the order of the report."""
        arms = ["no_context", *(f"cas{k}" for k in self.ks()), "oracle"]
        if sum(self.sizes.values()) < self.room:
            arms.append("all_resident")
        else:
            self.notes.append(
                f"all cartridges resident: their {sum(self.sizes.values()):,} positions are beyond the model's window"
            )
        if self.config.with_chunk_k <= len(self.sizes):
            arms.append(f"cas{self.config.with_chunk_k}_chunk")
        arms += [f"rag{b}" for b in self.budgets]
        arms += ["full_document", "truncated"]
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
        from experiments.arms import answered, overlap_scores
        from experiments.parts import kept
        from experiments.rag import Setting, tune

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
                found[budget] = kept(parts / f"tune-{budget}.json", partial(search, budget, best))
                best = Setting(**found[budget]["best"])
            else:
                found[budget] = {"best": asdict(best), "tried": []}
            self.settings[budget] = best
        return found

    # -- prompts ------------------------------------------------------------------------------------------------------

    def texts(self, questions: Sequence[Question], setting: Setting, budget: int) -> list[Prompt]:
        """RAG prompts of a setting at a budget."""
        from cas import prompting

        plain = [q.question for q in questions]
        found = self.rag.chunks(plain, setting, budget)
        return [prompting.text_context(self.model, self.put(q), t) for q, t in zip(plain, found, strict=True)]

    def put(self, question: str) -> str:
        """The question as it is put to the model."""
        from cas import prompting

        return question + prompting.brief(self.model)

    def retrieved(self, questions: Sequence[str], k: int) -> list[list[str]]:
        """Ids of the k best documents of each question, as cas.query retrieves them."""
        from retrieval import rank_documents

        return [[r.document_id for r in found] for found in rank_documents(self.index, questions, k, self.words)]

    def prompts(self, arm: str, questions: Sequence[Question]) -> list[Prompt]:
        """The prompts of an arm that reads cartridges, retrieved text or nothing."""
        from cas import prompting
        from cas.decoding import Prompt

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
        from cas.cartridge import Layout

        if arm in ("full_document", "truncated"):
            behind = Layout("offset", self.model.layout_header, 0)
            for about, prompts, tokens in self.shared_texts(arm, questions):
                prefix = self.model.prefill([*self.model.template.header_ids, *tokens])
                yield about, prompts, {"text": prefix[:, :, :, self.model.layout_header :]}, behind
            return
        store = self.others.get(arm.partition("_")[0], self.store)
        for start in range(0, len(questions), AT_ONCE):
            some = list(questions[start : start + AT_ONCE])
            prompts = self.prompts(arm, some)
            names = sorted({name for p in prompts for name in p.cartridges})
            kv = {name: store.cartridge(name).to(self.model.device, self.model.dtype) for name in names}
            yield some, prompts, kv, store.layout

    def shared_texts(
        self, arm: str, questions: Sequence[Question]
    ) -> Iterator[tuple[list[Question], list[Prompt], list[int]]]:
        """Texts that many questions share, read once: the gold documents of each, or the collection as far as it fits."""
        from cas import prompting
        from cas.decoding import Prompt
        from retrieval import with_title

        sets = [tuple(d.id for d in self.collection.documents)]
        if arm == "full_document":
            sets = list(dict.fromkeys(tuple(sorted(q.document_ids)) for q in questions))
        for ids in sets:
            about = [q for q in questions if arm == "truncated" or tuple(sorted(q.document_ids)) == ids]
            tokens: list[int] = []
            for i in ids:
                if len(tokens) < self.room:
                    d = self.collection[i]
                    tokens += self.model.encode(("\n\n" if tokens else "") + with_title(d.title, d.text))
            if len(tokens) > self.room and arm == "full_document":
                note = "full_document: documents beyond the model's window are cut there"
                self.notes += [note] if note not in self.notes else []
            prompts = [Prompt(prompting.question_tokens(self.model, self.put(q.question)), ("text",)) for q in about]
            yield about, prompts, tokens[: self.room]

    # -- measuring ----------------------------------------------------------------------------------------------------

    def ask(self, arm: str, questions: Sequence[Question]) -> dict[str, Any]:
        """Answers of an arm, scored, and the tokens and KV bytes that they had before them."""
        from cas.evaluate import interval
        from experiments.arms import answered, overlap_scores

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
        from cas.evaluate import interval
        from experiments.rag import RANKINGS, Setting
        from retrieval import recall_at_k, reciprocal_rank

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


def write(
    config: Config,
    model: FrozenModel,
    store: Store,
    collection: Collection,
    questions: Sequence[Question],
    predictions: Sequence[Prediction],
    measured: dict[str, dict[str, float]],
    settings: Mapping[int, Mapping[str, Any]],
    cost: Mapping[str, Any],
    metric: str,
    main_arm: str,
    notes: Sequence[str],
) -> int:
    """Results, tests and the report."""
    from experiments.arms import METRICS
    from experiments.rag import Setting
    from experiments.report import by_kind, compared, make_report
    from experiments.results import flags, relative, write_run

    arms = list(dict.fromkeys(p["arm"] for p in predictions))
    pairs = compared(arms, main_arm, measured)
    measured = measured | by_kind(predictions, {q.id: q.kind or "" for q in questions}, metric)
    said = asdict(config) | {"store": "DIR", "output": "DIR"}
    for name in ("isolated", "monolithic"):
        said[name] = said[name] and "DIR"
    if config.collection is not None and Path(config.collection).exists():
        said["collection"] = relative(config.collection)
    run = write_run(
        Path(config.output),
        name="rag_vs_cas",
        command="python -m experiments.rag_vs_cas " + flags(Config(**said)),
        seeds=[config.seed],
        model="embedded reader" if model.reader else model.source.name,
        collection={"name": config.name or collection.name, "sha256": collection.hash},
        settings=said
        | {
            "metric": metric,
            "main_arm": main_arm,
            "notes": list(notes),
            "cost": dict(cost),
            "kinds": {q.id: q.kind or "" for q in questions},
        }
        | {"rag": {str(b): {**s, "said": str(Setting(**s["best"]))} for b, s in settings.items()}}
        | {"documents": len(collection), "tokens": sum(r.tokens for r in store.rows().values())}
        | {"positions": sum(r.p for r in store.rows().values()), "questions": len(questions)},
        predictions=predictions,
        compare=pairs,
        metric_names=[*METRICS, "rouge_l", "chrf"],
        extra_metrics=measured,
        keep_answers=not config.no_text,
    )
    texts = {} if config.no_text else {q.id: (q.question, q.answers[0]) for q in questions}
    make_report(Path(config.output), run, predictions, texts)
    print(f"written     {config.output}/report.html, report.md, results.json, predictions.jsonl")
    return 0


if __name__ == "__main__":
    sys.exit(main())
