"""From documents to a store that answers questions: plan, self-study, initialize, train, index."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from budget.manager import trim_host_memory
from budget.memory_plan import Plan
from cas.data.collection import Collection, split_long
from cas.errors import ConfigError, StoreMismatch
from cas.model.frozen import FrozenModel
from cas.model.loading import recorded_source
from cas.model.positions import Layout, cartridge_size, unseen_layers
from cas.options import DEFAULT_MODEL, FICTIONAL, READER, SelfStudy, TrainConfig, Training, memory, store_folder
from cas.selfstudy.conversations import Conversations
from cas.selfstudy.endpoint import open_endpoint
from cas.selfstudy.prompt_styles import prompt_style, with_limits
from cas.selfstudy.synthesize import synthesize
from cas.store.index import load_embedder, open_index
from cas.store.store import Store
from cas.training.cost import Cost, estimate
from cas.training.initialization import initialize_cartridges
from cas.training.memory_sizes import plan_memory
from cas.training.metrics_log import Report
from cas.training.recorded_options import nothing_to_train, records_collection, refuse_other_collection, save_config
from cas.training.rounds import (
    Round,
    begin_round,
    end_untrained,
    ended_untrained,
    finished,
    learning_documents,
    plan_round,
    split_as_stored,
)
from cas.training.state import refuse_other_settings
from cas.training.trainer import Trainer
from retrieval import WordIndex

DEFAULT_RATIO = 16.0

Stop = Callable[[], bool]


class Progress(Protocol):
    """A progress bar."""

    def show(self, done: int, total: int, note: str = "") -> None: ...

    def say(self, line: str) -> None: ...


class View(Protocol):
    """Where a run shows what it does, and who can stop it."""

    def line(self, text: str) -> None:
        """A result."""

    def warn(self, text: str) -> None:
        """A remark that is not a result."""

    def progress(self, title: str) -> AbstractContextManager[Progress]:
        """A bar for one step."""

    def waiting(self, title: str) -> AbstractContextManager[Progress]:
        """A bar that leaves nothing behind, for what comes before the plan."""

    def listening(self) -> AbstractContextManager[Stop]:
        """Something that tells whether to stop at the next safe place."""


class Stopped(Exception):
    """A run was stopped at a safe place and everything is saved; the same call goes on from there."""


def run(config: TrainConfig, view: View) -> None:
    """Train a collection, or what has changed in it since it was trained. With ``config.dry_run`` nothing is written.

    Raises: Stopped when ``view`` stopped it; CasError, before anything is written, for what the user has to change.
    """
    check(config)
    folder = store_folder(config.store, config.collection)
    with ExitStack() as stack:
        store = None
        if Store.exists(folder):
            store = stack.enter_context(Store.open(folder, write=not config.dry_run))
        documents = load_documents(config, view)
        with view.waiting("model"):
            model = load_model(config, store, view)
        while True:
            with view.waiting("planning"):
                setup = plan(config, folder, store, view, documents, model)
            if store is not None:
                refuse(setup, store)
            for text in setup.lines():
                view.line(text)
            if config.dry_run:
                return
            if store is None:
                store = stack.enter_context(create_store(setup))
            begin(setup, store)
            if setup.memory is not None and not ended_untrained(store):
                with view.listening() as stop:
                    conversations = self_study(setup, store, view, stop)
                    initialize(setup, store, conversations, view, stop)
                    if conversations.by_document.keys() & {*setup.round.learners}:
                        train(setup, store, conversations, view, stop)
                    else:
                        end_untrained(store)
            elif setup.memory is None and finished(store):
                view.line(trained_line(store, f"{(store.run_state() or {})['settings']['total_steps']} steps"))
            index(setup, store, view)
            if not setup.round.postponed:
                return


# -- plan --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setup:
    """What a run works with. ``documents``: those that it trains; ``memory``: None if there is nothing to train."""

    config: TrainConfig
    folder: Path
    model: FrozenModel
    ratio: float | None
    documents: Collection
    round: Round
    memory: Plan | None
    cost: Cost | None = None

    def lines(self) -> list[str]:
        """For the user, before anything starts."""
        source, dtype = self.model.source, str(self.model.dtype).removeprefix("torch.")
        name = source.name.removeprefix("package:")
        first = f"model       {name} ({source.kind}, {dtype}, {self.model.device})"
        memory, time = self.memory.lines() if self.memory else (), [self.cost.line()] if self.cost else ()
        return [first, *self._writer(), *self.round.lines(), *memory, *time]

    def _writer(self) -> list[str]:
        """Who writes the questions, if not the model."""
        config = self.config
        if config.writer_url is None:
            return []
        return [
            f"questions   by {config.writer_model or 'the model'} at {config.writer_url}, which gets the text of documents"
        ]


def plan(
    config: TrainConfig, folder: Path, store: Store | None, view: View, documents: Collection, model: FrozenModel
) -> Setup:
    """Compute what is to be trained and what memory that takes. Writes nothing."""
    study = config.part(SelfStudy)
    prompt_style(model, study)  # refuses a writer that this model cannot have
    if study.writer_url and store is None and not config.dry_run:
        open_endpoint(study).check()
    ratio = DEFAULT_RATIO if config.ratio is None and config.tokens is None else config.ratio
    documents = _split(config, documents, store, ratio, model, view)
    round, pool, frozen = plan_round(store, documents, config.prune), config.pool, list[int]()
    if store is not None:
        refuse_other_collection(config, store, documents, round)
        rows = store.old_rows() | store.rows()
        rows |= {new: rows[old] for old, new in round.renamed.items()}
        frozen = [rows[i].p for i in round.frozen]
        if not round.new:  # the pool that this training was begun with
            pool = pool or (store.run_state() or {}).get("settings", {}).get("pool")
    if store is not None and nothing_to_train(config, store, round):
        return Setup(config, folder, model, ratio, documents, round, None)
    learning = learning_documents(round, store, documents)
    if round.learners:
        _warn_of_windows(config, model, learning, ratio, store, view)
    limited = with_limits(model, config, folder / "conversations")
    needed = plan_memory(limited, model, learning, ratio, pool, frozen) if round.learners else None
    load_embedder(config.embedder)  # refused now, not after hours of training
    going_on = None if round.new else store
    cost = estimate(limited, model, learning, max(_sizes(config, model, learning, ratio)), going_on) if needed else None
    return Setup(config, folder, model, ratio, learning, round, needed, cost)


def _split(
    config: TrainConfig,
    documents: Collection,
    store: Store | None,
    ratio: float | None,
    model: FrozenModel,
    view: View,
) -> Collection:
    """The documents, those in parts that are too long for the largest cartridge (as they are: those that are stored so)."""
    span = store.meta["span"] if store is not None else config.span
    if span is None or ratio is None:
        return documents
    if store is None:
        return split_long(documents, int(span * ratio), model.count_tokens)
    split = split_as_stored(documents, store, model.count_tokens)
    if more := len(split) - len(documents):
        view.warn(
            f"cartridges of {store.folder} have {span} positions at most: {more} more, for parts of long documents"
        )
    return split


def _sizes(config: TrainConfig, model: FrozenModel, documents: Collection, ratio: float | None) -> list[int]:
    """Positions of every document's cartridge."""
    tokens = [model.count_tokens(d.text) for d in documents.documents]
    return [cartridge_size(n, config.tokens, None if config.tokens else ratio, config.span) for n in tokens]


def check(config: TrainConfig) -> None:
    """Raise ConfigError for options that contradict each other, before anything is loaded."""
    if config.collection is None:
        raise ConfigError("give --collection: a folder of documents, a .jsonl file, or a named collection")
    if config.collection_seed and not any(name in config.collection for name in ("million_tokens", "niah")):
        raise ConfigError("--collection-seed is for a collection that is made from it: million_tokens or niah")
    if config.tokens is not None and config.ratio is not None:
        raise ConfigError("give the cartridge size either as --tokens or as --ratio")


def load_documents(config: TrainConfig, view: View) -> Collection:
    assert config.collection is not None
    with view.waiting("reading") as bar:
        chosen = config.include, config.exclude
        documents = Collection.load(config.collection, None, config.collection_seed, *chosen, bar.show)
    for text in (*documents.skipped, *(map(str, documents.left_out) if config.dry_run else ())):
        view.warn(text)
    if config.documents is not None:
        documents = documents.select(config.documents)
    return documents.merged() if config.merge else documents


def load_model(config: TrainConfig, store: Store | None, view: View) -> FrozenModel:
    """The model of the options, else of the store, else the default for the collection."""
    fictional = config.collection in FICTIONAL
    source = {"name": config.model or (READER if fictional else DEFAULT_MODEL), "revision": None}
    if store is not None and config.model in (None, store.meta["model"]["source"]["name"]):
        source = store.meta["model"]["source"]
    with recorded_source(source):
        model = FrozenModel.from_pretrained(
            str(source["name"]),
            revision=config.revision or source["revision"],
            dtype=config.dtype,
            device=config.device,
            system=config.system,
        )
    if model.reader and not fictional:
        view.warn("warning: the embedded reader can read --collection million_tokens alone; give another --model")
    return model


def _warn_of_windows(
    config: TrainConfig, model: FrozenModel, documents: Collection, ratio: float | None, store: Store | None, view: View
) -> None:
    """Say which cartridges stand too far from the question for some layers' windows."""
    sizes = _sizes(config, model, documents, ratio)
    span = (store.meta["span"] if store is not None else config.span) or max(sizes)
    if warning := unseen_layers(Layout(config.positions, 0, span), sizes, model.geometry.windows):
        view.warn(f"warning: {warning}")


# -- the store ---------------------------------------------------------------------------------------------------------


def _store_settings(setup: Setup) -> dict[str, Any]:
    config = setup.config
    return {
        "tokens": config.tokens,
        "ratio": setup.ratio,
        "positions": config.positions,
        "initialisation": config.initialization,
        "seed": config.seed,
    }


def create_store(setup: Setup) -> Store:
    store = Store.create(setup.folder, setup.model, span=setup.config.span, **_store_settings(setup))
    save_config(setup.config, store)
    return store


def refuse(setup: Setup, store: Store) -> None:
    """Raise StoreMismatch or ConfigError for what contradicts the store. Writes nothing."""
    store.check_model(setup.model)
    settings = _store_settings(setup)
    if setup.config.span is not None:
        settings["span"] = setup.config.span
    if changed := [f"{k} {store.meta[k]} (now {v})" for k, v in settings.items() if store.meta[k] != v]:
        raise StoreMismatch(
            f"{setup.folder} was made with {', '.join(changed)}; use the same settings or give a new --store"
        )
    if setup.memory is not None and not setup.round.new:
        refuse_other_settings(store, asdict(training_of(setup)))


def begin(setup: Setup, store: Store) -> None:
    """Bring the store to the collection as it is now, before self-study."""
    begin_round(store, setup.round)
    if (setup.round.differs and not setup.round.postponed) or not records_collection(setup.config, store):
        save_config(setup.config, store)


def training_of(setup: Setup) -> Training:
    """The settings of the trainer, with the pool of the plan."""
    assert setup.memory is not None
    return replace(setup.config.part(Training), pool=setup.memory.pool)


# -- self-study, initialize, train, index ------------------------------------------------------------------------------


def self_study(setup: Setup, store: Store, view: View, stop: Stop) -> Conversations:
    """The documents' conversations; writes those that the store does not have yet."""
    with view.progress("self-study") as bar:

        def progress(done: int, total: int) -> None:
            bar.show(done, total)
            if stop():
                raise Stopped

        study = setup.config.part(SelfStudy)
        conversations = synthesize(setup.model, setup.documents, store, study, progress=progress, say=bar.say)
    dropped = ", ".join(f"{n} {reason}" for reason, n in sorted(conversations.dropped.items())) or "none"
    view.line(f"self-study  {len(conversations)} conversations kept; dropped: {dropped}")
    return conversations


def initialize(setup: Setup, store: Store, conversations: Conversations, view: View, stop: Stop) -> None:
    """Give every new cartridge its first values."""
    with view.progress("initialize") as bar:
        if not initialize_cartridges(setup.model, store, conversations, stop, bar.show):
            raise Stopped


def train(setup: Setup, store: Store, conversations: Conversations, view: View, stop: Stop) -> None:
    """Joint training, from the last checkpoint on."""
    trainer = make_trainer(setup, store, conversations, training_of(setup))
    with view.progress("training") as bar:
        trainer.on_step = show_steps(bar)
        done = trainer.run(stop=stop)
    trim_host_memory()  # the index is made beside what the allocator has not given back
    guard = trainer.state.loss_guard
    if guard.skipped:
        view.line(
            f"skipped     {guard.skipped} steps with a non-finite loss or gradient, or a loss above 2 log V; "
            f"{guard.back} times a cartridge was restored from its last checkpoint (a lower --lr may help)"
        )
    view.line(trained_line(store, f"{'' if done else f'{trainer.state.step} of '}{trainer.steps} steps"))
    if not done:
        raise Stopped


def make_trainer(setup: Setup, store: Store, conversations: Conversations, training: Training) -> Trainer:
    """The trainer of a store, with the memory of the plan."""
    plan, host = setup.memory, memory(setup.config.host_memory, "--host-memory")
    assert plan is not None
    device = plan.trainees + plan.guest_copies
    return Trainer(
        setup.model, store, conversations, training, host_bytes=host, device_bytes=device, recompute=plan.recompute
    )


def trained_line(store: Store, steps: str) -> str:
    """What the store's training has done so far, in so many steps."""
    rows = store.rows().values()
    tokens, trained = sum(row.trained_tokens for row in rows), sum(row.steps > 0 for row in rows)
    return f"trained     {trained} of {len(rows)} cartridges, {tokens:,} tokens of conversation, {steps}"


def show_steps(bar: Progress) -> Callable[[Report], None]:
    """What to do with every step's report: show it, and say once how long the training will take."""
    started, done = time.monotonic(), 0

    def show(report: Report) -> None:
        nonlocal done
        done += 1
        note = (
            f"loss {report.loss:.3f} {report.tokens_per_s:.0f} tok/s pool {len(report.pool)} turned {report.rotations}x"
        )
        bar.show(report.step + 1, report.steps, note + (f" skipped {report.skipped}" if report.skipped else ""))
        if done == 10:
            each = (time.monotonic() - started) / done
            minutes = (report.steps - report.step - 1) * each / 60
            remaining = f"{minutes / 60:.1f} hours" if minutes > 90 else f"{max(1, minutes):.0f} minutes"
            bar.say(f"time        about {remaining} to go ({each:.2f} s a step)")

    return show


def index(setup: Setup, store: Store, view: View) -> None:
    """Bring the retrieval index up to date with the store's documents."""
    with view.progress("index") as bar:
        embedder = load_embedder(setup.config.embedder)
        found = open_index(store, embedder, progress=bar.show, rebuild=True, must_save=True)
    WordIndex.open(found, store.texts, store.folder / "index")  # made now, not by the first question
