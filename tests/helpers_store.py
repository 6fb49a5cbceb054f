"""Conversations, stores and short trainings over tiny models; as a program, trainings that are killed at chosen points."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from conftest import tiny_model

from cas.data.collection import Collection, Document
from cas.model.frozen import FrozenModel
from cas.selfstudy.conversations import Conversation, Conversations
from cas.store.records import Records, Row, hashed
from cas.store.store import Store
from cas.training.initialization import initialize_cartridges
from cas.training.trainer import Trainer

WORDS = (
    "amber",
    "birch",
    "cellar",
    "drum",
    "ember",
    "flint",
    "gravel",
    "hinge",
    "ivory",
    "jetty",
    "kettle",
    "lantern",
    "mortar",
    "nettle",
)


def many_documents(count: int, words: int = 12) -> Collection:
    """``count`` documents of different lengths, ``words`` to twice as many, of random words."""
    documents = []
    for n in range(count):
        random = Random(f"document {n}")
        text = " ".join(random.choices(WORDS, k=words + n * words // count)).capitalize() + "."
        documents.append(Document(f"doc-{n:02d}", f"Box {n}", text))
    return Collection("many", tuple(documents))


def converse(
    model: FrozenModel, documents: Collection, per_document: int = 6, top_k: int = 20, seed: int = 0
) -> Conversations:
    """Random questions and answers about every document, with what the model itself expects of every answer token when
    header and document stand before the question: a plain teacher-forced pass of the Hugging Face model."""
    template, items = model.template, []
    for document in documents.documents:
        for n in range(per_document):
            random = Random(f"{seed}/{document.id}/{n}")
            prompt = [random.randrange(3, 300) for _ in range(random.randint(3, 7))]
            answer = [*(random.randrange(3, 300) for _ in range(random.randint(1, 5))), template.end_ids[0]]
            before = [
                *template.header_ids,
                *model.encode(document.text),
                *template.footer_ids,
                *prompt,
                *template.suffix_ids,
            ]
            with torch.no_grad():
                logits = model.hf(input_ids=torch.tensor([[*before, *answer[:-1]]]), use_cache=False).logits[
                    0, -len(answer) :
                ]
            top = logits.float().log_softmax(-1).topk(top_k, dim=-1)
            items.append(
                Conversation(
                    document.id, "question", f"question {n}", np.array(prompt, np.int32), np.array(answer, np.int32),
                    top.indices.to(torch.int32).numpy(), top.values.numpy(),
                )
            )  # fmt: skip
    return Conversations(items, {})


def make_store(folder: Path, model: FrozenModel, documents: Collection, **settings: Any) -> Store:
    """A store with the documents' initial cartridges, 16 positions each unless told otherwise."""
    store = Store.create(folder, model, **({"tokens": 16, "initialisation": "first"} | settings))
    store.add_documents(documents, model.count_tokens)
    initialize_cartridges(model, store)
    return store


def stored_keys(store: Store) -> set[str]:
    """Every key in the environment."""
    with store.records.environment.begin() as txn:
        return {bytes(key).decode() for key in txn.cursor().iternext(values=False)}


def contents(store: Store) -> dict[str, tuple[Row, dict[str, bytes]]]:
    """Each document's record (but for the version number, which counts writes) and the exact bytes of all its tensors.

    Also makes sure that nothing else is stored."""
    found, named = {}, {"meta"}
    for name, row in store.rows().items():
        tensors = store.read_tensors(name)
        found[name] = (
            dataclasses.replace(row, version=0),
            {k: t.numpy().tobytes() for k, t in sorted(tensors.items())},
        )
        kinds = ("kv", "state") if row.state_hash is not None else ("kv",)
        named |= {
            f"row/{hashed(name)}",
            f"text/{hashed(name)}",
            *(f"{kind}/{hashed(name)}/{row.version}" for kind in kinds),
        }
    assert stored_keys(store) - {"run"} == named, stored_keys(store) ^ named
    return found


def log(store: Store) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, without what depends on the clock or on how often the run was begun."""
    lines = [json.loads(line) for line in (store.folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("tokens_per_s", "rotations")} for line in lines]


# -- killed trainings ---------------------------------------------------------------------------------------------------

SETTINGS: dict[str, Any] = {
    "steps": 14, "lr": 0.02, "warmup": 3, "pool": 4, "targets": 2, "per_target": 2, "isolation": 0.4, "max_distractors": 4,
    "guests": 2, "rotate_every": 3, "distractor_gradients": True, "checkpoint_every": 4, "seed": 5,
}  # fmt: skip
HOST_BYTES = (
    2 * 12 * 4 * 2 * 3 * 2 * 16 * 12
)  # of kv, moments and a waiting gradient: a few cartridges, so that some spill


@cache
def ingredients() -> tuple[FrozenModel, Collection, Conversations]:
    """Of the scenario; made once, before the forks."""
    model, documents = tiny_model("llama"), many_documents(8)
    return model, documents, converse(model, documents, per_document=4)


def scenario(folder: Path, on_step: Callable[[int], None] | None = None) -> None:
    """What the command line does: create or open the store, add the documents, train to the end."""
    model, documents, conversations = ingredients()
    if Store.exists(folder):
        store = Store.open(folder, write=True)
    else:
        store = Store.create(folder, model, tokens=16)
    store.add_documents(documents, model.count_tokens)
    step = (lambda report: on_step(report.step)) if on_step else None
    trainer = Trainer(model, store, conversations, host_bytes=HOST_BYTES, on_step=step, **SETTINGS)
    assert trainer.run()
    store.close()


def die() -> None:
    """As sudden as it gets."""
    os.kill(os.getpid(), signal.SIGKILL)


def killed_scenario(folder: Path, where: str, number: int) -> None:
    """The scenario, killed at a step, or at the ``number``-th write transaction: before it, when everything is written
    but not committed, or after it; or before or after the ``number``-th checkpoint's commit."""
    writes = commits = 0
    original_write, original_commit = Records.write, Store.commit

    def write(self: Records, action: Callable[[Any], Any]) -> Any:
        nonlocal writes
        writes += 1

        def watched(txn: Any) -> Any:
            done = action(txn)
            if where == "inside" and writes == number:
                die()
            return done

        if where == "before" and writes == number:
            die()
        done = original_write(self, watched)
        if where == "after" and writes == number:
            die()
        return done

    def commit(self: Store, rows: Mapping[str, Row], run_state: Mapping[str, Any] | None) -> None:
        nonlocal commits
        commits += run_state is not None
        if where == "before commit" and commits == number and run_state is not None:
            die()
        original_commit(self, rows, run_state)
        if where == "after commit" and commits == number and run_state is not None:
            die()

    Records.write, Store.commit = write, commit  # type: ignore[method-assign]
    scenario(folder, on_step=lambda step: die() if where == "step" and step == number else None)
    if where == "never":
        (folder.parent / "writes").write_text(str(writes))


def forked(action: Callable[[], None]) -> int:
    """Run in a process of its own; its wait status."""
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            action()
            status = 0
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        finally:
            os._exit(status)
    return os.waitpid(pid, 0)[1]


def main(base: Path) -> None:
    """An uninterrupted run in ``base/whole``, then one run for every kill point, each gone on with to its end."""
    ingredients()
    assert forked(lambda: killed_scenario(base / "whole", "never", 0)) == 0
    writes = int((base / "writes").read_text())
    random, points = Random(11), []
    # The first three write transactions are creation, texts and the first cartridge.
    for where in ("before", "inside", "after"):
        points += [[(where, n)] for n in [random.randint(1, 3), *random.sample(range(4, writes + 1), 3)]]
    points += [[("before commit", 2)], [("after commit", 2)], [("after commit", 4)]]
    points += [[("step", 2), ("inside", 3), ("step", 6), ("before commit", 1), ("step", 12)]]  # again and again
    for i, kills in enumerate(points):
        folder = base / f"killed-{i:02d}"
        for where, number in kills:
            status = forked(lambda w=where, n=number, f=folder: killed_scenario(f, w, n))
            assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (where, number, status)
        assert forked(lambda f=folder: scenario(f)) == 0, kills
        (folder / "killed.json").write_text(json.dumps(kills))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
