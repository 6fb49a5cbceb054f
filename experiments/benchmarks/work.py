"""The work that benchmarks time: a model, a store of random documents, random conversations; and the baselines of a training step."""

from __future__ import annotations

import copy
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cas.data.collection import Collection, Document
from cas.data.worlds import world
from cas.model.attention import Batch
from cas.model.attention_cpu import similar_lengths
from cas.model.attention_gpu import GpuAttention
from cas.model.frozen import FrozenModel
from cas.model.loading import Source
from cas.model.positions import Layout
from cas.options import DEFAULT_MODEL, READER
from cas.selfstudy.conversations import Conversation, Conversations, write_unit
from cas.store.store import Store
from cas.training.initialization import initialize_cartridges
from cas.training.loss import distillation_loss, distillation_mean
from cas.training.schedule import Step
from cas.training.trainer import Report, StepResult, Trainer

TOP_K = 20
# Tokens of a question and of its answer: what self-study of each model writes.
LENGTHS = {"reader": ((6, 12), (2, 8)), "smollm2": ((10, 25), (15, 50)), "qwen3-8b": ((10, 25), (15, 50))}


@dataclass(frozen=True)
class Work:
    """A model and what is asked of it."""

    name: str
    model: FrozenModel
    p: int  # positions of a cartridge in the benchmarks of training

    @property
    def on_gpu(self) -> bool:
        return self.model.device.type == "cuda"

    @classmethod
    def load(cls, name: str, p: int) -> Work:
        """By name: ``reader``, ``smollm2``, or ``qwen3-8b``, which has that model's shape and random weights."""
        if name == "qwen3-8b":
            return cls(name, _random_qwen3_8b(), p)
        source = {"reader": READER, "smollm2": DEFAULT_MODEL}[name]
        return cls(name, FrozenModel.from_pretrained(source), p)

    @contextmanager
    def store(self, documents: int, p: int | None = None, policy: str = "fixed") -> Iterator[Store]:
        """A store with so many initial cartridges of ``p`` positions each, in a folder that goes away."""
        with tempfile.TemporaryDirectory() as folder:
            store = Store.create(Path(folder) / "store", self.model, tokens=p or self.p, positions=policy)
            store.add_documents(fictional(documents), self.model.count_tokens)
            initialize_cartridges(self.model, store)
            yield store
            store.close()

    def conversations(self, store: Store, each: int = 32, seed: int = 0) -> Conversations:
        """Random ones about every document of the store: their tokens mean nothing, their lengths do. They lie on the disk,
        as those of self-study do."""
        numbers, random = np.random.default_rng(seed), Random(seed)
        vocabulary, end = self.model.geometry.vocabulary, min(self.model.template.stop_ids)
        logprobs = np.log(np.full(TOP_K, 0.9 / TOP_K, np.float32))
        asked, answered = LENGTHS[self.name]

        def one(document: str) -> Conversation:
            prompt, answer = random.randint(*asked), random.randint(*answered)
            first = numbers.integers(0, vocabulary, (answer, 1))
            top = ((first + 97 * np.arange(TOP_K)) % vocabulary).astype(np.int32)  # distinct
            ids = np.append(top[:-1, 0], end).astype(np.int32)
            words = numbers.integers(0, vocabulary, prompt).astype(np.int32)
            return Conversation(document, "question", "", words, ids, top, np.tile(logprobs, (answer, 1)))

        folder = store.folder / "conversations"
        folder.mkdir(exist_ok=True)
        items = [one(document) for document in store.rows() for _ in range(each)]
        random.shuffle(items)
        for unit, start in enumerate(range(0, len(items), 64)):
            write_unit(folder / f"unit-{unit:06d}.parquet", items[start : start + 64], Counter(), "benchmark")
        return Conversations.load(folder)

    def trainer(self, store: Store, each: int, steps: int, **options: Any) -> Trainer:
        """A trainer over ``each`` conversations a document, without checkpoints, and by default without rotation."""
        settings: dict[str, Any] = {"rotate_every": 10**6, "checkpoint_every": 10**6, **options}
        trainer = Trainer(self.model, store, self.conversations(store, each), steps=steps, **settings)
        train_step = trainer.train_step

        def finished(step: int, work: Step) -> StepResult:
            result = train_step(step, work)
            wait(self.model.device)
            return result

        trainer.train_step = finished  # type: ignore[method-assign]
        return trainer

    def products(self, examples: Sequence[Conversation]) -> float:
        """Floating-point operations of the matrix products of a training step over these, each seeing one cartridge: forward,
        and backward to what learns (the weights do not)."""
        g, hf = self.model.geometry, self.model.hf
        embedded = {id(hf.get_input_embeddings().weight), id(hf.get_output_embeddings().weight)}
        weights = sum(w.numel() for w in hf.parameters() if w.dim() == 2 and id(w) not in embedded)
        tokens = sum(len(c.tokens(self.model)) for c in examples)
        rows = sum(len(c.answer) for c in examples)
        keys = sum(
            len(c.tokens(self.model)) * (self.p + self.model.layout_header + len(c.tokens(self.model)) / 2)
            for c in examples
        )
        attention = 12 * keys * g.layers * g.query_heads * g.head_dim
        return 4 * (tokens * weights + rows * g.hidden * g.vocabulary) + attention


def wait(device: torch.device) -> None:
    """Until a GPU has done what it was asked."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def ceiling(device: torch.device, dtype: torch.dtype, size: int = 8192, repeats: int = 20) -> float:
    """Floating-point operations a second of one large matrix product: the most that a step could reach."""
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    best = float("inf")
    for _ in range(repeats):
        wait(device)
        started = time.perf_counter()
        _ = a @ b
        wait(device)
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def _random_qwen3_8b() -> FrozenModel:
    import transformers

    config = transformers.Qwen3Config(
        vocab_size=151936, hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, max_position_embeddings=40960, tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )  # fmt: skip
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        hf = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    tokenizer = FrozenModel.from_pretrained(READER, device="cpu").tokenizer
    return FrozenModel(hf, tokenizer, Source("folder", "random Qwen3-8B"))


def fictional(documents: int) -> Collection:
    """So many documents of a world of two, each told apart by its id and title: only lengths count here."""
    pair = world(0, 2).documents
    return Collection(
        "fictional",
        tuple(Document(f"{i:05d}", f"{pair[i % 2].title} {i}", f"{i}. {pair[i % 2].text}") for i in range(documents)),
    )


@dataclass(frozen=True)
class Timed:
    """Seconds of one training step and of every rival over the same conversations."""

    step: float
    rivals: dict[str, float]
    tokens: int
    products: float  # floating-point operations


def timed_steps(
    work: Work,
    store: Store,
    each: int,
    steps: int,
    rivals: dict[str, Callable[[Sequence[Conversation]], None]],
    **options: Any,
) -> list[Timed]:
    """Steps of a real trainer, each followed by its rivals on the same conversations; the first warms up."""
    found: list[Timed] = []
    trainer = work.trainer(store, each, steps + 1, **options)
    train_step, examples = trainer.train_step, list[Conversation]()

    def watched(step: int, planned: Step) -> StepResult:
        examples[:] = [trainer.conversations.by_document[e.document][e.index] for e in planned.examples]
        return train_step(step, planned)

    def stepped(report: Report) -> None:
        taken = {name: seconds(rival, examples) for name, rival in rivals.items()}
        found.append(Timed(report.tokens / report.tokens_per_s, taken, report.tokens, work.products(examples)))

    trainer.train_step, trainer.on_step = watched, stepped  # type: ignore[assignment, method-assign]
    trainer.run()
    return found[1:]


def profiled(
    work: Work, store: Store, rival: Callable[[Sequence[Conversation]], None], **options: Any
) -> dict[str, dict[str, float]]:
    """Seconds of one warm training step, and of a rival over its conversations, by what the time goes to: products of the
    model's weights, products of attention, and all else (copies, elementwise work, the optimiser, Python)."""
    from torch.profiler import profile

    trainer = work.trainer(store, 32, 2, **options)
    train_step, found = trainer.train_step, dict[str, dict[str, float]]()

    def by_kind(prof: Any, total: float) -> dict[str, float]:
        spent = {"weights": ("aten::mm", "aten::addmm"), "attention": ("aten::bmm", "aten::baddbmm")}
        taken = dict.fromkeys(spent, 0.0)
        for event in prof.key_averages():
            for kind, names in spent.items():
                taken[kind] += event.self_cpu_time_total / 1e6 if event.key in names else 0.0
        return {**taken, "rest": total - sum(taken.values())}

    def watched(step: int, work: Step) -> StepResult:
        with profile() as ours:
            started = time.perf_counter()
            result = train_step(step, work)
            mine = time.perf_counter() - started
        examples = [trainer.conversations.by_document[e.document][e.index] for e in work.examples]
        with profile() as theirs:
            other = seconds(rival, examples)
        found.update(step=by_kind(ours, mine), frozen=by_kind(theirs, other))
        return result

    trainer.train_step = watched  # type: ignore[method-assign]
    trainer.run()
    return found


def in_turn(trainers: Mapping[Any, Trainer], steps: int, turns: int) -> Iterator[dict[Any, float]]:
    """Seconds that so many steps take each trainer, one trainer after the other in every turn; the first turn warms up."""
    for turn in range(turns + 1):
        taken = dict.fromkeys(trainers, 0.0)
        for name, trainer in trainers.items():

            def stepped(report: Report, name: Any = name, taken: dict[Any, float] = taken) -> None:
                taken[name] += report.tokens / report.tokens_per_s

            trainer.on_step, done = stepped, (trainer.store.run_state() or {"step": 0})["step"]
            trainer.run(until=done + steps)
        if turn:
            yield taken


def seconds(action: Callable[..., Any], *arguments: Any, **options: Any) -> float:
    """How long a call takes, a GPU's work included."""
    started = time.perf_counter()
    action(*arguments, **options)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


# -- rivals of a training step --------------------------------------------------------------------------------------------


class Alone:
    """Plain causal attention of packed conversations, in groups of similar length: what a model without cartridges pays."""

    def __init__(self, batch: Batch) -> None:
        self.groups = []
        starts = batch.starts()
        for members in similar_lengths(batch.lengths):
            t = max(batch.lengths[i] for i in members)
            rows = torch.tensor([[starts[i] + min(n, batch.lengths[i] - 1) for n in range(t)] for i in members])
            real = torch.tensor([[n < batch.lengths[i] for n in range(t)] for i in members]).flatten()
            self.groups.append((rows, real.nonzero()[:, 0], torch.full((t, t), -torch.inf).triu_(1)))
        order = torch.cat([rows.flatten()[real] for rows, real, _ in self.groups])
        self.back = torch.empty_like(order)
        self.back[order] = torch.arange(len(order))

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
        (heads, d), kv_heads = (query.shape[1], query.shape[3]), key.shape[1]
        outputs = []
        for rows, real, bias in self.groups:
            (b, t), index = rows.shape, rows.flatten()
            q = query[0].index_select(1, index).view(kv_heads, heads // kv_heads, b, t, d).transpose(1, 2)
            k, v = (x[0].index_select(1, index).view(kv_heads * b, t, d) for x in (key, value))
            scores = torch.bmm(q.reshape(kv_heads * b, -1, d) * scale, k.transpose(1, 2))
            scores = (scores.view(kv_heads * b, -1, t, t) + bias).view_as(scores)
            out = torch.bmm(scores.to(query.dtype).softmax(-1), v).view(kv_heads, b, -1, t, d).transpose(1, 2)
            outputs.append(out.reshape(heads, b * t, d).index_select(1, real))
        return torch.cat(outputs, dim=1).index_select(1, self.back).transpose(0, 1)[None]


def alone(batch: Batch, model: FrozenModel) -> Any:
    """The fastest plain attention there is: on a GPU our kernel without a prefix."""
    if model.device.type != "cuda":
        return Alone(batch)
    return GpuAttention(batch, model.header_kv[:, :, :, :0], {}, Layout("offset", 0, 0), model.dtype)


def frozen(model: FrozenModel) -> Callable[[Sequence[Conversation]], None]:
    """Forward and backward of the model alone, over the same tokens, supervised rows and loss, to its input embeddings."""

    def run(examples: Sequence[Conversation]) -> None:
        tokens = [c.tokens(model) for c in examples]
        batch, device = Batch(tuple(map(len, tokens)), ((),) * len(tokens)), model.device
        ids = torch.tensor([[token for row in tokens for token in row]], device=device)
        positions = torch.cat([torch.arange(n) for n in batch.lengths])[None].to(device)
        rows = torch.cat(
            [torch.arange(s + n - len(c.answer), s + n) for s, n, c in zip(batch.starts(), batch.lengths, examples)]
        )
        embedded = model.hf.get_input_embeddings()(ids).detach().requires_grad_()
        before, model.config._attn_implementation = model.config._attn_implementation, "cas"
        states = model.hf.base_model(
            inputs_embeds=embedded, position_ids=positions, use_cache=False, cas=alone(batch, model)
        ).last_hidden_state[0, rows.to(device)]
        model.config._attn_implementation = before
        assert model.head is not None
        distillation_mean(states, model.head, *_teacher(examples, device)).backward()

    return run


def peft(model: FrozenModel, p: int, rows: int = 8) -> Callable[[Sequence[Conversation]], None]:
    """PEFT's CARTRIDGE with a plain loop: batches of conversations sorted by length, logits of the answers alone, cached
    teacher, one Adam step a batch (as many as CAS takes with as many targets)."""
    from peft import CartridgeConfig, TaskType, get_peft_model

    base = copy.deepcopy(model.hf)
    base.set_attn_implementation("sdpa")
    adapted = get_peft_model(
        base, CartridgeConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=p, num_frozen_tokens=1)
    )
    optimizer = torch.optim.Adam([x for x in adapted.parameters() if x.requires_grad], lr=1e-3)
    pad = min(model.template.stop_ids)

    def run(examples: Sequence[Conversation]) -> None:
        tokens = [c.tokens(model) for c in examples]
        order = sorted(range(len(tokens)), key=lambda i: len(tokens[i]))
        for start in range(0, len(order), rows):
            some = order[start : start + rows]
            t, answer = max(len(tokens[i]) for i in some), max(len(examples[i].answer) for i in some)
            ids = torch.tensor([[pad] * (t - len(tokens[i])) + tokens[i] for i in some])
            mask = torch.tensor([[0] * (t - len(tokens[i])) + [1] * len(tokens[i]) for i in some])
            ids, mask = ids.to(model.device), mask.to(model.device)
            logits = adapted(input_ids=ids, attention_mask=mask, logits_to_keep=answer).logits
            kept = torch.cat([logits[b, -len(examples[i].answer) :] for b, i in enumerate(some)])
            distillation_loss(kept, *_teacher([examples[i] for i in some], model.device)).mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    return run


def _teacher(examples: Sequence[Conversation], device: torch.device) -> tuple[Tensor, Tensor]:
    top_ids, top = (np.concatenate([getattr(c, name) for c in examples]) for name in ("top_ids", "top_logprobs"))
    return torch.from_numpy(top_ids).long().to(device), torch.from_numpy(top).to(device)
