"""``python -m cas.train --collection FOLDER``: documents in, a collection of trained cartridges out."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cas import console
from cas.config import DEFAULT_MODEL, FICTIONAL, READER, SelfStudy, TrainConfig, Training, memory, parse, store_folder
from cas.errors import BudgetError, ConfigError, StoreMismatch

if TYPE_CHECKING:
    from budget.planner import Plan
    from cas.data.collection import Collection
    from cas.model.frozen import FrozenModel
    from cas.selfstudy.conversations import Conversations
    from cas.store.store import Store
    from cas.training.trainer import Report


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, plan, synthesize, train, index. Returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    again = shlex.join(["python", "-m", "cas.train", *arguments])
    return console.run(lambda: train(parse(TrainConfig, "python -m cas.train", arguments), again))


def train(config: TrainConfig, again: str) -> int:
    """The whole way of the data for one configuration. Prints the plan and the end on stdout, progress on stderr.

    ``again``: the command that goes on, to print when interrupted.
    """
    if config.collection is None:
        raise ConfigError("give --collection: a folder of .txt or .md files, a .jsonl file, or a named collection")
    if config.collection_seed and not any(name in config.collection for name in ("million_tokens", "niah")):
        raise ConfigError("--collection-seed is for a collection that is made from it: million_tokens or niah")
    training, study = config.part(Training), config.part(SelfStudy)  # nonsense is refused before anything is loaded
    if config.tokens is not None and config.ratio is not None:
        raise ConfigError("give the cartridge size either as --tokens or as --ratio")
    from cas.answering.answerer import load_embedder, open_index
    from cas.data.collection import Collection, split_long
    from cas.model.frozen import FrozenModel
    from cas.training.rounds import refuse_changes, update

    folder = store_folder(config.store, config.collection)
    documents = Collection.load(config.collection, seed=config.collection_seed)
    for line in documents.skipped:
        print(line, file=sys.stderr)
    if config.documents is not None:
        documents = documents.select(config.documents)
    if config.merge:
        documents = documents.merged()
    fictional = config.collection in FICTIONAL
    name = _recorded(folder, config, READER if fictional else DEFAULT_MODEL)
    model = FrozenModel.from_pretrained(
        name, revision=config.revision, dtype=config.dtype, device=config.device, system=config.system
    )
    if model.reader and not fictional:
        print(
            "warning: the embedded reader can read --collection million_tokens alone; give another --model",
            file=sys.stderr,
        )
    ratio = 16.0 if config.ratio is None and config.tokens is None else config.ratio
    if config.span is not None and ratio is not None:
        documents = split_long(documents, int(config.span * ratio), lambda text: len(model.encode(text)))
    round = _round(folder, config, documents)
    plan = make_plan(config, model, round.learners, ratio, round.pool, round.frozen) if round.learners else None
    load_embedder(config.embedder)  # fails now rather than after hours of training
    dtype = str(model.dtype).removeprefix("torch.")
    print(f"model       {model.source.name} ({model.source.kind}, {dtype}, {model.device})")
    print("\n".join([*round.lines(), *(plan.lines() if plan else ())]), flush=True)
    if config.dry_run:
        return 0
    store = _open_or_create(folder, model, config, ratio)
    with console.Interrupt().listening() as interrupt:
        if not round.later and update(store, documents):
            _save_config(folder, config)
        if plan is not None:
            training = replace(training, pool=plan.pool)
            refuse_changes(store, asdict(training))
            conversations = _self_study(study, model, round.learners, store, interrupt)
            if conversations is not None:
                finished = _joint_training(config, model, store, conversations, training, plan, interrupt)
            if conversations is None or not finished:
                print(f"interrupted, saved; go on with:\n  {again}", file=sys.stderr)
                return interrupt.exit_status
    open_index(store, load_embedder(config.embedder))
    if round.later:
        print(f"collection  {round.later}; train that with the same command")
    print(f'store       {folder}; ask it: python -m cas.query --store {shlex.quote(str(folder))} --retrieve-k 4 "..."')
    store.close()
    return 0


class _Stopped(Exception):
    """Somebody asked the synthesis to stop between two units."""


def _self_study(
    study: SelfStudy, model: FrozenModel, documents: Collection, store: Store, interrupt: console.Interrupt
) -> Conversations | None:
    """The collection's conversations, or None when interrupted."""
    from cas.selfstudy.synthesize import synthesize

    with console.Display("self-study") as display:

        def progress(kept: int, wanted: int) -> None:
            display.show(kept, wanted)
            if interrupt():
                raise _Stopped

        try:
            conversations = synthesize(model, documents, store, study, progress=progress)
        except _Stopped:
            return None
    dropped = ", ".join(f"{n} {reason}" for reason, n in sorted(conversations.dropped.items())) or "none"
    print(f"self-study  {len(conversations)} conversations kept; dropped: {dropped}", flush=True)
    return conversations


def _joint_training(
    config: TrainConfig,
    model: FrozenModel,
    store: Store,
    conversations: Conversations,
    training: Training,
    plan: Plan,
    interrupt: console.Interrupt,
) -> bool:
    """Train to the end (true) or until interrupted (false)."""
    from cas.training.initialization import initialize_cartridges
    from cas.training.trainer import Trainer

    with console.Display("starts") as display:  # the trainer would do it too, but without progress
        if not initialize_cartridges(model, store, conversations, interrupt, display.show):
            return False
    trainer = Trainer(
        model,
        store,
        conversations,
        training,
        host_bytes=memory(config.host_memory, "--host-memory"),
        device_bytes=plan.trainees + plan.guest_copies,
        recompute=plan.recompute,
    )
    started, done = time.monotonic(), 0
    with console.Display("training") as display:

        def stepped(report: Report) -> None:
            nonlocal done
            done += 1
            rate, pool = f"{report.tokens_per_s:.0f} tok/s", f"pool {len(report.pool)} turned {report.rotations}x"
            skipped = f" skipped {report.skipped}" if report.skipped else ""
            display.show(report.step + 1, report.steps, f"loss {report.loss:.3f} {rate} {pool}{skipped}")
            if done == 10:
                each = (time.monotonic() - started) / done
                minutes = (report.steps - report.step - 1) * each / 60
                to_go = f"{minutes / 60:.1f} hours" if minutes > 90 else f"{max(1, minutes):.0f} minutes"
                display.say(f"time        about {to_go} to go ({each:.2f} s a step)")

        trainer.on_step = stepped
        finished = trainer.run(stop=interrupt)
    if skipped := trainer.rescue.skipped:
        print(
            f"skipped     {skipped} steps whose loss was no number or beyond guessing; {trainer.rescue.back} times a cartridge went "
            "back to its last checkpoint (a lower --lr may help)"
        )
    rows = store.rows().values()
    tokens, trained = sum(row.trained_tokens for row in rows), sum(row.steps > 0 for row in rows)
    print(
        f"trained     {trained} of {len(rows)} cartridges, {tokens:,} tokens of conversation, {trainer.steps} steps planned"
    )
    return finished


@dataclass(frozen=True)
class _Round:
    """What this command trains (:mod:`cas.training.rounds`): ``learners`` beside ``frozen`` cartridges (their positions), in a ``pool`` if
    that is known; what ``changed``; what is for ``later``, since an earlier training has to be finished first."""

    learners: Collection
    frozen: tuple[int, ...] = ()
    pool: int | None = None
    changed: str = ""
    later: str = ""

    def lines(self) -> list[str]:
        """For the user, above the plan."""
        if self.later:
            return [f"collection  {self.later}: first the training that has begun without that"]
        return (
            [f"collection  {self.changed}; the other {len(self.frozen)} cartridges stay as they are"]
            if self.changed
            else []
        )


def _round(folder: Path, config: TrainConfig, documents: Collection) -> _Round:
    """What is to do for these documents. Raises StoreMismatch if another collection would drop or replace the store's documents."""
    import yaml

    from cas.store.store import Store
    from cas.training.rounds import begun, changes, finished, learners, stored

    if not Store.exists(folder):
        return _Round(documents, pool=config.pool)
    with Store.open(folder) as store:
        found, rows = changes(store, documents), store.rows()
        pool = config.pool or (store.run_state() or {}).get("settings", {}).get("pool")
        if found and begun(store) and not finished(store):
            mine, later = learners(store, stored(store)), str(found)
            frozen = tuple(row.p for i, row in rows.items() if row.round != store.round)
            return _Round(mine, frozen, pool, later=later)
        if found.changed or found.gone:
            file = folder / "config.yaml"
            before = yaml.safe_load(file.read_text()) if file.exists() else {}
            same = ("collection", "collection_seed", "documents", "merge")
            if other := [f"--{k.replace('_', '-')}" for k in same if before.get(k) != getattr(config, k)]:
                raise StoreMismatch(
                    f"{folder} was trained with another {', '.join(other)}: it would lose {len(found.gone)} documents and retrain "
                    f"{len(found.changed)}; give what it was trained on, or a new --store"
                )
        mine = learners(store, documents)
        if found and begun(store):  # a new round
            fresh = {*found.added, *found.changed}
            mine = replace(documents, documents=tuple(d for d in documents.documents if d.id in fresh))
            pool = config.pool
        frozen = tuple(rows[d.id].p for d in documents.documents if d.id not in {m.id for m in mine.documents})
        return _Round(mine, frozen, pool, str(found) if found and begun(store) else "")


def make_plan(
    config: TrainConfig,
    model: FrozenModel,
    documents: Collection,
    ratio: float | None,
    pool: int | None = None,
    frozen: Sequence[int] = (),
) -> Plan:
    """Bytes of everything before anything starts. ``frozen``: positions of cartridges that only distract. Raises BudgetError with the
    figures if the budget cannot hold it."""
    from budget.planner import DoesNotFit, Sizes, make_plan
    from cas.model.decoding import most_positions
    from cas.model.positions import cartridge_size
    from cas.training.initialization import LONGEST, TOKENS
    from cas.training.loss import rows_at_once
    from cas.training.rounds import guests_among

    tokens = [len(model.encode(d.text)) for d in documents.documents]
    sizes = [cartridge_size(n, config.tokens, None if config.tokens else ratio, config.span) for n in tokens]
    g = model.geometry
    around = len(model.template.footer_ids) + len(model.template.suffix_ids)
    longest = config.question_tokens + config.answer_tokens + around + 16
    rows = min(config.targets, len(sizes)) * config.per_target
    together, largest = len(sizes) + len(frozen), max(*sizes, *frozen, 0)
    loaded = min(together, 1 + (0 if config.isolation >= 1 else config.max_distractors))
    mixed = 1 - config.isolation
    # Twice the expected number of mixed conversations, each with the most distractors.
    prefix = int(rows * (model.layout_header + max(sizes)) + min(rows, 2 * mixed * rows + 1) * (loaded - 1) * largest)
    needed = Sizes(
        weights=model.weight_bytes,
        element=model.dtype.itemsize,
        largest=g.elements(largest),
        total=g.elements(sum(sizes)),
        documents=len(sizes),
        tokens=sum(tokens),
        step_tokens=rows * longest,
        logit_rows=rows * config.answer_tokens
        if model.head is None
        else min(rows * config.answer_tokens, rows_at_once(model.head)),
        prefix=prefix,
        layers=g.layers,
        hidden=g.hidden,
        intermediate=getattr(model.config, "intermediate_size", 4 * g.hidden),
        vocabulary=g.vocabulary,
        query_heads=g.query_heads,
        kv_heads=g.kv_heads,
        head_dim=g.head_dim,
        longest=longest,
        rows=rows,
        decoded=most_positions(model),
        matched=min(max(tokens), LONGEST) if config.initialization == "matched" else 0,
        matched_on=TOKENS,
    )
    try:
        return make_plan(
            needed,
            pool=None if pool is None else min(pool, len(sizes)),
            guests=min(guests_among(config, len(frozen)), together),
            frozen=len(frozen),
            budget=None if config.budget is None else memory(config.budget, "--budget"),
            host_budget=memory(config.host_memory, "--host-memory"),
            on_cpu=model.device.type == "cpu",
            merged=model.device.type == "cpu" or config.positions == "sequential",
        )
    except DoesNotFit as error:
        raise BudgetError(str(error)) from error


def _recorded(folder: Path, config: TrainConfig, model: str) -> str:
    """The model: what the command says, else what an existing store was begun with, else ``model``."""
    from cas.store.store import Store

    if config.model or not Store.exists(folder):
        return config.model or model
    with Store.open(folder) as store:
        return str(store.meta["model"]["source"]["name"])


def _open_or_create(folder: Path, model: FrozenModel, config: TrainConfig, ratio: float | None) -> Store:
    from cas.store.store import Store

    tokens, ratio = config.tokens, None if config.tokens else ratio
    wanted: dict[str, Any] = {
        "tokens": tokens,
        "ratio": ratio,
        "positions": config.positions,
        "initialisation": config.initialization,
        "seed": config.seed,
    }
    if not Store.exists(folder):
        store = Store.create(folder, model, span=config.span, **wanted)
        _save_config(folder, config)
        return store
    store = Store.open(folder, write=True)
    store.check_model(model)
    if config.span is not None:
        wanted["span"] = config.span
    changed = [f"{k} {store.meta[k]} (now {v})" for k, v in wanted.items() if store.meta[k] != v]
    if changed:
        store.close()
        raise StoreMismatch(f"{folder} was made with {', '.join(changed)}; use the same settings or give a new --store")
    return store


def _save_config(folder: Path, config: TrainConfig) -> None:
    import yaml

    values = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(replace(config, config=None)).items()}
    partial = folder / "config.yaml.partial"
    partial.write_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True))
    partial.replace(folder / "config.yaml")


if __name__ == "__main__":
    sys.exit(main())
