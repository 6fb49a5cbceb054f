"""The pipeline for ranks: as :mod:`cas.training.pipeline`, with the documents split over the processes.

1. The first rank records all documents in the store, which fixes the span.
2. Every rank goes over its parts of the collection: self-study, first values, embedding.
3. Documents are dealt out to shards. Every rank trains its shard until the next deal, as one process would.
4. The first rank copies the cartridges into the store, joins the index, and removes what ranks needed on the way.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from cas.data.collection import Collection
from cas.errors import ConfigError
from cas.model.frozen import FrozenModel
from cas.options import SelfStudy, TrainConfig, store_folder
from cas.selfstudy.conversations import Conversation, Conversations
from cas.selfstudy.subjects import Subjects, told_apart
from cas.selfstudy.synthesize import synthesize
from cas.store.files import write_atomically
from cas.store.index import load_embedder, open_index
from cas.store.merge import copy_documents, copy_logs, create_like, join_indexes
from cas.store.store import Store
from cas.training import pipeline
from cas.training.initialization import initialize_cartridges
from cas.training.pipeline import Setup, Stop, Stopped, View
from cas.training.ranks import FOLDER
from cas.training.ranks.deals import (
    Deal,
    alone,
    begin_deal,
    clean,
    count_parts,
    cut,
    deals_every,
    dealt,
    distractors,
    make_shard,
    next_deal,
    part_folders,
    refuse_world,
    steps_of_a_rank,
)
from cas.training.ranks.world import Quiet, World, join
from cas.training.rounds import begun, end_untrained, ended_untrained, finished


def run(config: TrainConfig, view: View) -> None:
    """As :func:`cas.training.pipeline.run`, on every rank. Raises: the same on the first one; SystemExit on the others,
    which have nothing to say."""
    with join(config.zero > 0) as world:
        _run(config, view if world.first else Quiet(view), world)
        if not world.first:
            raise SystemExit(0)


def _run(config: TrainConfig, view: View, world: World) -> None:
    folder = store_folder(config.store, config.collection)
    documents, model = world.together(_load, config, folder, view)
    if config.zero:
        from cas.training.ranks.zero import Lockstep, partition

        model = partition(model, world.device)
        world.before_waiting = Lockstep(model).join_in
    while True:
        setup = world.together(_plan, config, folder, view, documents, model, world)
        for text in setup.lines():
            view.line(text)
        if world.size > 1 and setup.memory is not None:
            view.line(
                f"ranks       {world.size}, each with {len(setup.round.learners) // world.size} documents or one more"
            )
        if config.dry_run:
            return
        with contextlib.ExitStack() as stack:
            world.at_first(_begin, setup, world, stack)
            if setup.memory is not None and not _ended_untrained(folder):
                with view.listening() as stop:
                    _Run(setup, world, view, stop).to_the_end()
            world.at_first(_finish, setup, view)
        if not setup.round.postponed:
            return


def _load(config: TrainConfig, folder: Path, view: View) -> tuple[Collection, FrozenModel]:
    pipeline.check(config)
    place = replace(config, device="cpu") if config.zero else config  # from there it goes to the GPUs in parts
    with _reading(folder) as store:
        documents = pipeline.load_documents(config, view)
        with view.waiting("model"):
            return documents, pipeline.load_model(place, store, view)


@contextlib.contextmanager
def _reading(folder: Path) -> Iterator[Store | None]:
    """The store, if there is one."""
    with Store.open(folder) if Store.exists(folder) else contextlib.nullcontext() as store:
        yield store


def _plan(
    config: TrainConfig, folder: Path, view: View, documents: Collection, model: FrozenModel, world: World
) -> Setup:
    """What is to be trained; raises what contradicts the store or the ranks."""
    with _reading(folder) as store, view.waiting("planning"):
        setup = pipeline.plan(config, folder, store, view, documents, model)
        if store is not None:
            pipeline.refuse(setup, store)
            if Deal.load(folder) is None:
                if begun(store) and not finished(store):
                    raise ConfigError(
                        f"{folder} is in training by one process; let that one go on: python -m cas.train …"
                    )
            elif not finished(store) and setup.round.change:
                raise ConfigError(
                    f"{folder} is in training by ranks and its collection has changed ({setup.round.differences}); finish "
                    "the training with the collection as it was, or give a new --store"
                )
    if setup.memory is not None:
        refuse_world(len(setup.round.learners), world.size)
    if cost := setup.cost:
        setup = replace(
            setup, cost=replace(cost, self_study=cost.self_study / world.size, training=cost.training / world.size)
        )
    return setup


def _begin(setup: Setup, world: World, stack: contextlib.ExitStack) -> None:
    """Bring the store to the collection, with all its documents, and the state of a training that has begun."""
    exists = Store.exists(setup.folder)
    with Store.open(setup.folder, write=True) if exists else pipeline.create_store(setup) as store:
        stack.enter_context(alone(setup.folder))
        pipeline.begin(setup, store)
        if setup.memory is None or ended_untrained(store):
            return
        store.add_documents(setup.documents, setup.model.count_tokens)
        if Deal.load(setup.folder) is None:
            Deal(count_parts(len(setup.round.learners), world.size)).save(setup.folder)
        if store.run_state() is None:
            settings = asdict(pipeline.training_of(setup))
            del settings["checkpoint_every"]
            store.commit({}, {"step": 0, "pool": (), "guests": (), "settings": settings})


def _ended_untrained(folder: Path) -> bool:
    with Store.open(folder) as store:
        return ended_untrained(store)


@dataclass
class _Run:
    """Self-study and training of one round, on one rank."""

    setup: Setup
    world: World
    view: View
    stop: Stop

    def to_the_end(self) -> None:
        """Everything until the shards are trained. Raises: Stopped."""
        self.folder, self.training = self.setup.folder, pipeline.training_of(self.setup)
        deal = Deal.load(self.folder)
        assert deal is not None
        with Store.open(self.folder) as store:
            rows = store.rows()
            self.frozen = [i for i, row in rows.items() if row.round != store.round]
            self.parts = cut({i: row.tokens for i, row in rows.items() if row.round == store.round}, deal.parts)
        self.part_folders = part_folders(self.folder, deal.parts)
        if deal.number == 0:
            self.world.together(self._study)
        self.conversations = self.world.together(self._read_conversations)
        self.ids = sorted(self.conversations)
        if not self.ids:
            return
        count = sum(map(len, self.conversations.values()))
        self.view.line(f"self-study  {count} conversations about {len(self.ids)} documents")
        refuse_world(len(self.ids), self.world.size)
        steps = steps_of_a_rank(self.training, count, len(self.ids), self.world.size)
        if deal.number == 0 or (deal.world != self.world.size and not deal.finished):
            deal = self._deal_out(deal, steps)
        with self.view.progress("training") as bar:
            self.show = pipeline.show_steps(bar)
            while not deal.finished:
                until = self._until(deal)
                self.world.together(self._train, deal, until)
                if until < deal.steps:
                    deal = self._deal_out(replace(deal, step=until), steps)
                else:
                    deal = replace(deal, step=until)
                    self.world.at_first(deal.save, self.folder)

    def _until(self, deal: Deal) -> int:
        given = self.setup.config.exchange_every
        every = deals_every(given, len(self.ids), deal.steps, self.world.size)
        return next_deal(deal.step, deal.steps, every, self.training.rotate_every)

    # -- self-study ---------------------------------------------------------------------------------------------------

    def _study(self) -> None:
        """Self-study, first values and index of this rank's parts. Raises: Stopped."""
        documents = self.setup.documents
        by_id = {d.id: d for d in documents.documents}
        embedder = load_embedder(self.setup.config.embedder)
        with Store.open(self.folder) as store:
            called = told_apart(documents, {i: row.title for i, row in store.answering().items()})
        whole = called, Subjects(called.documents)
        for n in range(self.world.rank, len(self.parts), self.world.size):
            part = replace(documents, documents=tuple(by_id[i] for i in self.parts[n]), questions=())
            with self._open_part(self.part_folders[n]) as store:
                self._study_part(store, part, whole)
                with self.view.progress("index") as bar:
                    open_index(store, embedder, progress=bar.show, rebuild=True, must_save=True)

    def _open_part(self, folder: Path) -> Store:
        if Store.exists(folder):
            return Store.open(folder, write=True)
        with Store.open(self.folder) as store:
            return create_like(store, folder)

    def _study_part(self, store: Store, part: Collection, whole: tuple[Collection, Subjects]) -> None:
        study = self.setup.config.part(SelfStudy)
        if study.conversations is not None:  # of all documents
            share = study.conversations * len(part) / sum(map(len, self.parts))
            study = replace(study, conversations=math.ceil(share))
        with self.view.progress("self-study") as bar:

            def progress(done: int, total: int) -> None:
                bar.show(done, total)
                if self.stop():
                    raise Stopped

            conversations = synthesize(self.setup.model, part, store, study, progress, bar.say, whole)
        with self.view.progress("initialize") as bar:
            if not initialize_cartridges(self.setup.model, store, conversations, self.stop, bar.show):
                raise Stopped

    def _read_conversations(self) -> Mapping[str, Sequence[Conversation]]:
        """Those of all parts, by document; each part is verified by one rank."""
        found = dict[str, Sequence[Conversation]]()
        for n, folder in enumerate(self.part_folders):
            with Store.open(folder) as store:
                units = store.conversations
            own = n % self.world.size == self.world.rank
            found |= Conversations.load(units, verify=own).by_document
        return found

    # -- training -----------------------------------------------------------------------------------------------------

    def _train(self, deal: Deal, until: int) -> None:
        """Train this rank's shard up to a step. Raises: Stopped."""
        mine = Conversations((), {})
        names = self._names(deal)
        mine.by_document |= {i: self.conversations[i] for i in names}
        with Store.open(deal.shards(self.folder)[self.world.rank], write=True) as shard:
            trainer = pipeline.make_trainer(self.setup, shard, mine, replace(self.training, steps=deal.steps))
            trainer.on_step = self.show
            trainer.run(stop=self.stop, until=until)
        if trainer.state.step < until:
            raise Stopped

    def _names(self, deal: Deal) -> list[str]:
        return dealt(self.ids, self.training.seed, deal.number, deal.world)[self.world.rank]

    def _deal_out(self, before: Deal, steps: int) -> Deal:
        """Give every rank a new shard. Returns: the deal that counts from now on."""
        done, skipped, restored = self.world.exchange(_progress(self.folder, before) if self.world.first else None)[0]
        deal = begin_deal(
            before, self.training, steps, self.world.size, done,
            skipped=before.skipped + skipped, restored=before.restored + restored,
        )  # fmt: skip
        sources = before.shards(self.folder) if before.number else self.part_folders
        frozen = distractors(self.frozen, self.training, self._until(deal) - deal.step, deal)[self.world.rank]

        def make() -> None:
            with Store.open(self.folder) as store:
                make_shard(deal.shards(self.folder)[self.world.rank], store, sources, self._names(deal), frozen, deal)

        self.world.together(make)

        def agree() -> None:
            deal.save(self.folder)
            clean(self.folder, deal)

        self.world.at_first(agree)
        return deal


def _progress(folder: Path, deal: Deal) -> tuple[float, int, int]:
    """The share of a training that is done, and steps skipped and cartridges restored since the deal began."""
    done, skipped, restored = list[float](), 0, 0
    for shard in deal.shards(folder):
        with Store.open(shard) as store:
            state = store.run_state() or {"step": 0}
        done.append(state["step"] / deal.steps)
        skipped += state.get("rescue", {}).get("skipped", 0)
        restored += state.get("rescue", {}).get("back", 0)
    return (sum(done) / len(done) if done else 0.0), skipped, restored


# -- the end -----------------------------------------------------------------------------------------------------------


def _finish(setup: Setup, view: View) -> None:
    """Copy what the shards have learned into the store, join the index, and remove what only ranks needed. Whatever of
    it was done before an interruption is done again with the same result."""
    folder = setup.folder
    deal = Deal.load(folder)
    with Store.open(folder, write=True) as store:
        if deal is not None and not finished(store):
            _merge(store, deal)
        if finished(store) and (state := store.run_state()):
            view.line(pipeline.trained_line(store, f"{state['settings']['total_steps']} steps of every rank"))
            if guard := state.get("rescue", {}).get("skipped"):
                view.line(f"skipped     {guard} steps with a non-finite loss or gradient, or a loss above 2 log V")
        if deal is not None:
            join_indexes(store, part_folders(folder, deal.parts), load_embedder(setup.config.embedder))
        pipeline.index(setup, store, view)
    shutil.rmtree(folder / FOLDER)


def _merge(store: Store, deal: Deal) -> None:
    """Cartridges, conversations and logs of shards and parts. Optimizer state is left out: the round is over."""
    rows = store.rows()
    learners = {i for i, row in rows.items() if row.round == store.round}
    settings, left = {}, set(learners)
    store.conversations.mkdir(exist_ok=True)
    units, without, parts = 0, dict[str, str](), part_folders(store.folder, deal.parts)
    for shard in deal.shards(store.folder) if deal.number else ():
        with Store.open(shard) as trained:
            names = left & trained.rows().keys()
            copy_documents(trained, names, store, state=False)
            settings = (trained.run_state() or {})["settings"]
            left -= names
    for part in parts:
        with Store.open(part) as studied:
            copy_documents(studied, left & studied.rows().keys(), store)  # those without conversations
            for unit in sorted(studied.conversations.glob("unit-*.parquet")):
                _link(unit, store.conversations / f"unit-{units:06d}.parquet")
                units += 1
        if (file := part / "without_conversations.json").exists():
            without |= json.loads(file.read_text(encoding="utf-8"))
    if without:
        file = store.folder / "without_conversations.json"
        before = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        text = json.dumps(before | without, ensure_ascii=False, sort_keys=True, indent=1)
        write_atomically(file, text.encode())
    if not deal.number:
        end_untrained(store)
        return
    logs = sorted((store.folder / FOLDER / "logs").glob("*.jsonl"))
    logs += [log for shard in deal.shards(store.folder) for log in sorted(shard.glob("metrics*.jsonl"))]
    write_atomically(store.metrics, b"".join(log.read_bytes() for log in logs))
    for part in parts:
        copy_logs(part, store.folder)
    _, skipped, restored = _progress(store.folder, deal)
    guard = {"skipped": deal.skipped + skipped, "back": deal.restored + restored}
    run = {"step": deal.steps, "pool": (), "guests": (), "settings": settings, "rescue": guard}
    with store.training():
        store.commit({}, run)


def _link(file: Path, target: Path) -> None:
    """The same file under another name, on file systems that can; else a copy."""
    target.unlink(missing_ok=True)
    try:
        os.link(file, target)
    except OSError:
        shutil.copyfile(file, target)
