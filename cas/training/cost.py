"""What a training will take in time: from a probe of some seconds, before self-study begins."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import pyarrow.parquet
import torch

from budget.manager import trim_host_memory
from cas.console import duration
from cas.data.collection import Collection
from cas.model.attention import Batch, packed_positions
from cas.model.attention_cpu import CpuAttention
from cas.model.decoding import Prompt, generate
from cas.model.frozen import FrozenModel
from cas.model.positions import Layout
from cas.options import TrainConfig
from cas.selfstudy.planners import History, NoQuestions, Planner, fit_window, make_planner
from cas.selfstudy.prompt_styles import prompt_style, token_limits
from cas.selfstudy.reconstruction import FIRST_WORDS, SHORTEST
from cas.selfstudy.reconstruction import KIND as RECONSTRUCTION
from cas.selfstudy.recorded import reconstructs
from cas.store.store import Store
from cas.training.initialization import TOKENS
from cas.training.loss import distillation_mean
from cas.training.micro_batches import kept_bytes, most_kept

PROBE_SECONDS = 1.5  # of each of the three measurements; the first, of a few tokens, decides how many it may take
SHARE_KEPT = 0.5  # of the questions
SHARE_USED = 0.35, 0.2  # of the longest question and answer, that they have on average: all of them, and those kept
MATCHING = 5.0  # what attention matching takes, in readings of a document and of conversations about it
RANGE = 0.7, 1.5  # of the estimate


@dataclass(frozen=True)
class Speed:
    """Seconds that a token takes: read in a prompt, decoded beside others, trained on (forward and backward); and a
    decoding step, whatever its rows."""

    read: float
    decoded: float
    trained: float
    step: float


@dataclass(frozen=True)
class Cost:
    """Seconds of self-study, and of initialization and training; ``share``: of the questions that are assumed to be kept."""

    self_study: float
    training: float
    share: float | None

    def line(self) -> str:
        """The estimate in words, as ranges."""
        condition = " if half of the questions are kept" if self.share else ""
        study = f"{_range(self.self_study)} of self-study{condition} and " if self.self_study else ""
        return (
            f"time        {study}{_range(self.training)} of initialization and training on this machine (from a probe)"
        )


def estimate(config: TrainConfig, model: FrozenModel, texts: Collection, size: int, store: Store | None) -> Cost | None:
    """The time of self-study and training; None where the training has begun, which tells it better.

    Args: config: with its limits of questions and answers; size: positions of a cartridge; store: what it has is taken off.
    """
    if store is not None and store.run_state() is not None:
        return None
    style, limits = prompt_style(model, config), token_limits(model, config)
    settings, sources = fit_window(model, style, config, texts)
    planner: Planner = NoQuestions() if config.writer == "none" else make_planner(sources, style, settings)
    question, answer = (max(1, int(SHARE_USED[0] * limit)) for limit in limits)
    written = sorted(store.conversations.glob("unit-*.parquet")) if store is not None else []
    kinds = [pyarrow.parquet.read_table(file, columns=["kind"])["kind"].to_pylist() for file in written]
    kept = sum(kind != RECONSTRUCTION for unit in kinds for kind in unit)
    begun = any(RECONSTRUCTION in unit for unit in kinds)
    per_call, per_unit = style.sizes(settings)
    if planner.every_sentence:
        asked = planner.most_questions(History())
        wanted, done = SHARE_KEPT * asked, min(1.0, kept / max(1, SHARE_KEPT * asked))
    else:
        wanted = planner.progress(History())[1]
        asked, done = round(wanted / SHARE_KEPT), min(1.0, kept / max(1, wanted))
    speed = measure(model, size, min(64, per_call * per_unit))
    template = len(model.template.footer_ids) + len(model.template.suffix_ids)
    request = max(style.request_length(model, kind, settings, limits[0]) for kind in settings.kinds)
    sentence = sum(map(sum, (s.lengths for s in sources))) / max(1, sum(len(s.lengths) for s in sources))
    chunk = min(settings.chunk_tokens, max((sum(s.lengths) for s in sources), default=0))
    calls = asked / (per_call * (config.wordings if planner.every_sentence else 1))
    read = calls * (chunk + request) + asked * (sentence + 2 * template + question)
    own = config.writer_url is None  # an endpoint writes its questions elsewhere
    tokens, steps = asked * (own * question + answer), calls * (own * limits[0] + limits[1] / per_unit)
    writing = read * speed.read + max(tokens * speed.decoded, steps * speed.step)
    # Reconstruction reads the text and its passages, half of it once more as ends of sentences, and decodes nothing.
    lengths = [length for s in sources for length in s.lengths] if reconstructs(model, config, {}) else []
    rebuilt = 1.5 * sum(lengths) + sum(length >= SHORTEST for length in lengths) * (template + FIRST_WORDS)
    rereading = 0 if begun else (sum(lengths) + rebuilt) * speed.read
    rows = min(config.targets, len(sources)) * config.per_target
    once = wanted * (template + SHARE_USED[1] * sum(limits)) + rebuilt  # tokens of all conversations
    learned = once * config.epochs
    if config.steps is not None:
        learned = config.steps * rows * (template + SHARE_USED[1] * sum(limits))
    starts = 0.0
    if config.initialization == "matched":
        of_documents = sum(sum(source.lengths) for source in sources)
        starts = MATCHING * (of_documents + min(once, TOKENS * len(sources))) * speed.read
    share = SHARE_KEPT if asked and not planner.every_sentence else None
    return Cost(writing * (1 - done) + rereading, starts + learned * speed.trained, share)


def measure(model: FrozenModel, size: int, rows: int) -> Speed:
    """The speed of this machine, measured with the code that self-study and training use.

    Args: size: positions of a cartridge; rows: questions that are decoded side by side.
    """
    ids = [i % model.geometry.vocabulary for i in range(5, 5 + 512)]
    per_read, length = _timed(lambda n: model.prefill(ids[:n]), 32, 512)
    text, layout = {"chunk": model.prefill(ids[: max(32, length // 2)])}, Layout("offset", model.layout_header, 0)
    prompts = [Prompt((ids[0],), ("chunk",))] * max(1, rows)

    def decode(steps: int) -> object:
        return generate(model, prompts, text, layout, max_new_tokens=steps, batch_rows=len(prompts), temperature=1.0)

    decode(1)
    per_step, _ = _timed(decode, 2, 8)
    kept = kept_bytes(model, [32] * 16, [model.layout_header + size] * 16)
    most = max(32, min(512, 512 * most_kept(model) // kept))  # within the memory of a micro-batch
    per_trained, _ = _timed(lambda n: _train(model, size, n), 32, most)
    trim_host_memory()
    # On a CPU a step takes as long as its rows; on a GPU nearly as long for one.
    return Speed(per_read, per_step / len(prompts), per_trained, per_step if model.device.type == "cuda" else 0.0)


def _timed(work: Callable[[int], object], least: int, most: int) -> tuple[float, int]:
    """Seconds per unit of ``work(n)``, and the n that was timed: as many as fit the time that a probe may take."""
    n = least
    while True:
        started = time.perf_counter()
        work(n)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        if n == most or seconds * 2 > PROBE_SECONDS:
            return seconds / n, n
        n = min(most, max(n + 1, int(n * min(4.0, PROBE_SECONDS / 2 / max(seconds, 1e-6)))))


def _train(model: FrozenModel, size: int, tokens: int) -> None:
    """Forward and backward over conversations of 32 tokens, half of them answers."""
    g, count = model.geometry, max(1, tokens // 32)
    layout, batch = Layout("fixed", model.layout_header, size), Batch((32,) * count, (("a",),) * count)
    kv = torch.zeros(g.layers, 2, g.kv_heads, size, g.head_dim, device=model.device, requires_grad=True)
    context = CpuAttention(batch, model.header_kv, {"a": kv}, layout, model.rope, model.dtype)
    order, positions = torch.arange(32 * count), packed_positions(batch, {"a": size}, layout)
    ids, rows = order[None] % g.vocabulary, order[order % 32 >= 16]
    if model.head is None:
        model.forward(ids, positions, context, rows=rows).float().square().mean().backward()
        return
    top = torch.arange(20, device=model.device).expand(len(rows), 20).contiguous()
    states = model.hidden(ids, positions, context, rows=rows)[0]
    distillation_mean(states, model.head, top, torch.full_like(top, -4, dtype=torch.float32)).backward()


def _range(seconds: float) -> str:
    low, high = (duration(factor * seconds) for factor in RANGE)
    if low == high:
        return f"about {low}"
    number, _, unit = low.partition(" ")
    return f"{number} to {high}" if high.endswith(unit) else f"{low} to {high}"
