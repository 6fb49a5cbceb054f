"""A store of many documents: how long it takes to start, to answer a first question and to be listed, and what memory.

python -m experiments.benchmarks.many_documents --documents 10000 --output DIR

The store is made by the pipeline as it is, but for what would take hours: the model is tiny and random, conversations
are made up in place of self-study, and training ends after one step. Then every measurement is a process of its own:

- ``start``: the same training once more, which finds nothing to do; ``replay``: once more with the last step still to be
  done, for which all of self-study is gone over again, as after any interruption;
- ``query``: the first question; ``ls``: the list of cartridges.

Seconds and CPU seconds are without the model, the embedder and the imports that these need. Memory is the growth of its
peak over what it was when these had been loaded: anonymous memory (sampled), and the whole resident set, which has the
pages of mapped files that the system can take back at any time. The same is done for a tenth of the documents.
``results.json`` in the output folder is that of a recorded run, whose arms are ``<step>_<documents>``.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, Literal
from unittest.mock import patch

from cas import console
from cas.evaluation.machine import PeakMemory
from cas.options import parse
from experiments.benchmarks.child import run_child

if TYPE_CHECKING:
    from cas.model.frozen import FrozenModel
    from cas.selfstudy.conversations import Conversation
    from cas.selfstudy.planners import Call
    from cas.selfstudy.reconstruction import Passage

EMBEDDERS = ("minilm", "hash")
STEPS = ("start", "replay", "query", "ls")
TARGETS = {"start": 20.0, "query": 3.0}  # seconds, for 10,000 documents
FIGURES = ("seconds", "cpu_seconds", "anonymous_mib", "resident_mib")
OPTIONS = ("--tokens", "16", "--initialization", "random", "--effort", "quick", "--steps", "1", "--pool", "4")
_PLACES = ["harbor", "mill", "quarry", "ferry", "chapel", "orchard", "foundry", "bakery", "library", "tannery"]
_DEEDS = (
    "was built in {} by {}", "employs {} people, and {} keeps its books", "stands {} paces from the house of {}",
    "burned in {} and was raised again by {}", "owns {} carts, the oldest of which belonged to {}",
)  # fmt: skip


@dataclass(frozen=True)
class Config:
    """Make a store of many documents, and measure it."""

    documents: int = 10_000
    """Documents of the store; a tenth of them are measured as well."""
    output: str | None = None
    """Folder of the collections, stores and results; default one that goes away. Stores that it has are not made again."""
    embedder: Literal["minilm", "hash"] = "minilm"
    """hash: hashed words in as many dimensions, where embedding all documents would take too long."""
    repeats: int = 3
    """How often each step is measured; replay once."""


# -- the collection and its store ----------------------------------------------------------------------------------------


def write_documents(folder: Path, count: int) -> None:
    """Text files of four invented sentences each, no two alike."""
    folder.mkdir(parents=True)
    for number in range(count):
        random = Random(number)
        name = f"{_name(random)} {random.choice(_PLACES).title()}"
        deeds = random.sample(_DEEDS, 4)
        sentences = (f"{name} {deed.format(random.randint(1100, 1950), _name(random))}." for deed in deeds)
        (folder / f"{number:06d}.txt").write_text(f"{name} {number}\n\n{' '.join(sentences)}\n")


def _name(random: Random) -> str:
    return "".join(random.choice("bdfgklmnprstv") + random.choice("aeiou") for _ in range(3)).title()


def write_model(folder: Path) -> None:
    """A random model of a few thousand parameters beside its embeddings, with the embedded reader's tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from cas.model.frozen import FrozenModel
    from cas.options import READER

    tokenizer = FrozenModel.from_pretrained(READER).tokenizer
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=2048, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def invented(
    model: FrozenModel, document: str, kind: str, question: str, answer: str, top_k: int, number: int
) -> Conversation:
    """A conversation of these words. The likeliest tokens are no model's, but there are as many of them."""
    import numpy as np

    from cas.selfstudy.conversations import Conversation

    ids = np.array([*model.encode(answer), min(model.template.stop_ids)], np.int32)
    top = (ids[:, None] + 7 * np.arange(top_k, dtype=np.int32)) % model.geometry.vocabulary
    logprobs = np.log(np.full(top.shape, 0.9 / top_k, np.float32))
    return Conversation(document, kind, question, np.array(model.encode(question), np.int32), ids, top, logprobs)


class InventedTeacher:
    """In place of :class:`cas.selfstudy.synthesize.Teacher`: every question is kept, and answered by its sentence."""

    def __init__(self, model: FrozenModel, style: Any, settings: Any, *_: Any) -> None:
        self.model, self.settings = model, settings

    def converse(
        self, calls: Sequence[Call], known: Mapping[str, AbstractSet[str]]
    ) -> tuple[list[Conversation], Counter[str]]:
        """A question for every pair of sentence and opening."""
        made = [
            self._one(call, n, sentence, opening)
            for call in calls
            for n, (sentence, opening) in enumerate(call.text_pairs)
        ]
        return made, Counter()

    def _one(self, call: Call, n: int, sentence: str, opening: str) -> Conversation:
        question, answer = f"{opening} {call.document.title}, {call.number}, {n}?", " ".join(sentence.split()[-4:])
        return invented(
            self.model, call.document.id, call.seed_prompt.kind, question, answer, self.settings.top_k, call.number
        )


def invented_reconstruction(model: FrozenModel, asked: Sequence[Passage], top_k: int) -> list[Conversation]:
    """In place of :func:`cas.selfstudy.reconstruction.reconstruct`: without the forward pass."""
    return [invented(model, p.document, "reconstruction", p.message, p.text, top_k, 0) for p in asked]


def options(folder: Path) -> list[str]:
    """Of the training in a folder."""
    words = ("--collection", str(folder / "documents"), "--model", str(folder / "model"), "--store")
    return [*words, str(folder / "store"), *OPTIONS]


def build(folder: Path, count: int) -> None:
    """A finished store of so many documents, with its index, in ``folder``; goes on where an earlier call stopped."""
    from cas import train

    if not (folder / "model").exists():
        write_documents(folder / "documents", count)
        write_model(folder / "model")
    with (
        patch("cas.selfstudy.synthesize.Teacher", InventedTeacher),
        patch("cas.selfstudy.synthesize.reconstruct", invented_reconstruction),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        if status := train.main(options(folder)):
            raise RuntimeError(f"the training of {folder} ended with status {status}")


# -- measurements --------------------------------------------------------------------------------------------------------


class Loading:
    """Counts what loading of models takes, so that it can be taken off; ``figures`` of the rest since :meth:`start`."""

    def __init__(self) -> None:
        self.seconds = self.cpu = 0.0

    def __call__(self, load: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, counted."""

        def counted(*arguments: Any, **named: Any) -> Any:
            wall, cpu = time.perf_counter(), time.process_time()
            try:
                return load(*arguments, **named)
            finally:
                self.seconds += time.perf_counter() - wall
                self.cpu += time.process_time() - cpu

        return counted

    def start(self) -> None:
        """From now on."""
        self._before, self._memory = (_high_water(reset=True), PeakMemory.now()), PeakMemory(0.02)
        self._memory.__enter__()
        self.seconds = self.cpu = 0.0
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def figures(self) -> dict[str, float]:
        """Seconds, CPU seconds, and bytes by which the resident set and anonymous memory grew at most."""
        seconds = time.perf_counter() - self._wall - self.seconds
        cpu = time.process_time() - self._cpu - self.cpu
        self._memory.__exit__()
        resident, anonymous = self._before
        return {
            "seconds": seconds,
            "cpu_seconds": cpu,
            "bytes": _high_water() - resident,
            "anonymous_bytes": self._memory.peak - anonymous,
        }


def _high_water(reset: bool = False) -> int:
    """The resident set's high-water mark in bytes; ``reset``: begun anew."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024


def train_again(folder: Path) -> dict[str, float]:
    """What ``cas.train`` takes once more."""
    from cas import train
    from cas.store import index
    from cas.training import pipeline

    loading, model = Loading(), pipeline.FrozenModel.from_pretrained(str(folder / "model"))
    embedder = index.load_embedder()
    loaded = loading(lambda *_, **__: embedder)
    with (
        patch.object(pipeline, "load_model", lambda *_: model),
        patch.object(pipeline, "load_embedder", loaded),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        loading.start()
        status = train.main(options(folder))
        figures = loading.figures()
    if status:
        raise RuntimeError(f"the training of {folder} ended with status {status}")
    return figures


def replay(folder: Path) -> dict[str, float]:
    """The same where the run's record says that the last step is missing."""
    from cas.store.store import Store

    with Store.open(folder / "store", write=True) as store:
        run = store.run_state()
        assert run is not None
        store.commit({}, {**run, "step": run["step"] - 1})
    return train_again(folder)


def first_question(folder: Path) -> dict[str, float]:
    """What the first question of a process takes."""
    from cas.answering.answerer import Answerer
    from cas.model.frozen import FrozenModel
    from cas.store.index import load_embedder
    from cas.store.store import Store

    loading, embedder = Loading(), load_embedder()
    model = FrozenModel.from_pretrained(str(folder / "model"))
    loading.start()
    with Store.open(folder / "store") as store:
        Answerer(model, store, embedder).ask("When was the Harbor built?", k=4, max_new_tokens=1)
        return loading.figures()


def list_cartridges(folder: Path) -> dict[str, float]:
    """What ``cas ls`` takes."""
    from cas.__main__ import main as cas

    loading = Loading()
    loading.start()
    with contextlib.redirect_stdout(io.StringIO()):
        cas(["ls", "--store", str(folder / "store")])
    return loading.figures()


MEASURES = dict(zip(STEPS, (train_again, replay, first_question, list_cartridges), strict=True))


def own_bytes(folder: Path) -> int:
    """Bytes of the texts and of the index: what may grow with the documents."""
    files = [*(folder / "documents").iterdir(), *(folder / "store" / "index").rglob("*")]
    return sum(file.stat().st_size for file in files if file.is_file())


def measured(folder: Path, embedder: str, repeats: int) -> Iterator[tuple[str, dict[str, float]]]:
    """Every step and its figures, each from a process of its own."""
    for step in STEPS:
        for _ in range(1 if step == "replay" else repeats):
            yield step, json.loads(run_child("many_documents", embedder, step, folder).splitlines()[-1])


def child(embedder: str, step: str, folder: Path, *rest: str) -> int:
    """Measure one step, and print the figures as JSON in the last line."""
    from retrieval import HashEmbedder

    hashed = patch("retrieval.SentenceEmbedder", lambda *_, **__: HashEmbedder(384))
    with hashed if embedder == "hash" else contextlib.nullcontext():
        if step == "build":
            build(folder, int(rest[0]))
        else:
            print(json.dumps(MEASURES[step](folder)))
    return 0


# -- the command ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _folder(output: str | None) -> Iterator[Path]:
    if output is not None:
        yield Path(output).resolve()
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def run(config: Config) -> int:
    """Build both stores where they are not there yet, measure, print the table and write the run's two files."""
    from cas.evaluation.recording import Prediction, flags, write_run

    predictions, own = list[Prediction](), dict[str, dict[str, float]]()
    with _folder(config.output) as folder:
        for count in (max(1, config.documents // 10), config.documents):
            place = folder / str(count)
            if not (place / "store" / "index").exists():
                print(f"building a store of {count} documents", file=sys.stderr, flush=True)
                run_child("many_documents", config.embedder, "build", place, str(count))
            own[f"texts_and_index_{count}.mib"] = single(own_bytes(place) / 2**20)
            for number, (step, found) in enumerate(measured(place, config.embedder, config.repeats)):
                scores = {
                    "seconds": found["seconds"],
                    "cpu_seconds": found["cpu_seconds"],
                    "anonymous_mib": found["anonymous_bytes"] / 2**20,
                    "resident_mib": found["bytes"] / 2**20,
                }
                name = f"{number:02d}"
                predictions.append(
                    {"arm": f"{step}_{count}", "seed": 0, "question_id": name, "document_id": name, "scores": scores}
                )
        results = write_run(
            folder,
            name="many_documents",
            command="python -m experiments.benchmarks.many_documents " + flags(config),
            seeds=[0],
            model="a tiny random one",
            collection={"name": "invented sentences", "sha256": sha256(b"invented sentences").hexdigest()},
            settings={k: v for k, v in asdict(config).items() if k != "output"} | {"targets": TARGETS},
            predictions=predictions,
            compare=[],
            metric_names=FIGURES,
            extra_metrics=own | {"load.mean": single(os.getloadavg()[1])},
            keep_answers=False,
        )
        for line in table(results):
            print(line)
    return 0


def single(value: float) -> dict[str, float]:
    """A figure that was measured once."""
    return {"mean": value, "low": value, "high": value, "n": 1}


def table(results: Mapping[str, Any]) -> Iterator[str]:
    """Lines of a run: means, and what was wanted of ten thousand documents, in seconds."""
    yield f"{'step and documents':<20}{'target':>8}" + "".join(f"{name:>15}" for name in FIGURES)
    metrics = results["metrics"]
    for arm in dict.fromkeys(name.partition(".")[0] for name in metrics):
        target = TARGETS.get(arm.partition("_")[0])
        means = "".join(f"{metrics[f'{arm}.{name}']['mean']:15.2f}" for name in FIGURES)
        yield f"{arm:<20}{f'{target:.0f}' if target else '':>8}{means}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure. Returns the exit status."""
    return console.run(lambda: run(parse(Config, "python -m experiments.benchmarks.many_documents", arguments)))


if __name__ == "__main__":
    given = sys.argv[1:]
    sys.exit(child(given[0], given[1], Path(given[2]), *given[3:]) if given and given[0] in EMBEDDERS else main())
