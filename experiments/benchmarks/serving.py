"""What making and using cartridges costs: the store, self-study, the first token, many users at once."""

from __future__ import annotations

import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import torch

from cas.answering.answerer import Answerer
from cas.data.worlds import world
from cas.model.decoding import Prompt, generate
from cas.model.positions import Layout
from cas.options import SelfStudy
from cas.selfstudy.planners import Call, History, make_planner, split_documents
from cas.selfstudy.prompt_styles import prompt_style
from cas.selfstudy.synthesize import Teacher
from experiments.benchmarks.training import Sample
from experiments.benchmarks.work import Work, seconds


def store_speed(work: Work, cartridges: int, repeats: int) -> Iterator[Sample]:
    """All cartridges written and committed, then read, against files of the same bytes, each synced: speed to speed."""
    with work.store(cartridges, p=48) as store:
        kv = {name: store.cartridge(name) for name in store.rows()}
        size = sum(t.numel() * 4 for t in kv.values())
        names = list(kv)
        blobs = {name: kv[name].numpy().tobytes() for name in names}
        for _ in range(repeats):

            def write() -> None:
                for name in names:
                    store.write_tensors(name, {"kv": kv[name]})
                store.commit(store.rows(), None)

            with tempfile.TemporaryDirectory(dir=store.folder) as folder:

                def copy(folder: str = folder) -> None:
                    for name in names:
                        with open(Path(folder, name), "wb") as file:
                            file.write(blobs[name])
                            file.flush()
                            os.fsync(file.fileno())

                ours, theirs = seconds(write), seconds(copy)
                yield "store_write_vs_copy", "ratio", theirs / ours
                yield "store_write_vs_copy", "megabytes_per_second", size / ours / 1e6
                order = Random(0).sample(names, len(names))
                ours = seconds(_all, store.cartridge, order)
                theirs = seconds(_all, Path.read_bytes, [Path(folder, name) for name in order])
                yield "store_read_vs_copy", "ratio", theirs / ours
                yield "store_read_vs_copy", "megabytes_per_second", size / ours / 1e6


def first_token(work: Work, questions: int, ratio: int = 16) -> Iterator[Sample]:
    """From question to first token over four cartridges, read from the store (cold) or kept in memory (warm), against the
    prefill of their whole documents, and of a prompt of chunks of them with three times the cartridges' tokens."""
    model = work.model
    texts = world(0, 64).documents
    encoded = [model.encode(document.text) for document in texts]
    p = max(16, min(map(len, encoded)) // ratio // 16 * 16)
    layout = Layout("offset", model.layout_header, 0)
    with work.store(64, p=p) as store:
        question = "Which animal lives there?"
        tail = model.encode(question)
        for number in range(questions + 1):
            some = Random(number).sample(range(64), 4)
            names = [f"{i:05d}" for i in some]
            cold, answerer = Answerer(model, store), Answerer(model, store)
            answerer.ask(question, documents=names, max_new_tokens=1)
            full = [token for i in some for token in encoded[i]]
            rag = full[: 3 * 4 * p]
            taken = {
                "cold": seconds(cold.ask, question, documents=names, max_new_tokens=1),
                "warm": seconds(answerer.ask, question, documents=names, max_new_tokens=1),
            }
            for name, text in (("full", full), ("rag", rag)):
                prompt = Prompt((*text, *model.template.footer_ids, *tail, *model.template.suffix_ids))
                taken[name] = seconds(generate, model, [prompt], {}, layout, max_new_tokens=1)
            if number:  # the first warms up
                for name in ("full", "rag"):
                    for state in ("cold", "warm"):
                        yield f"first_token_vs_{name}_{state}", "ratio", taken[state] / taken[name]
                yield "first_token_vs_full_cold", "seconds", taken["cold"]


def decode_many(
    work: Work, repeats: int, users: int = 2, k: int = 4, ratio: int = 16, tokens: int = 32
) -> Iterator[Sample]:
    """Tokens a second of as many users as fit the memory of ``users`` with full context, against these: every user has k
    documents of his own, as text or as cartridges of a sixteenth."""
    model = work.model
    length = min(len(model.encode(d.text)) for d in world(0, 16).documents)
    full = min(k * length, model.geometry.max_positions - 128)
    small = max(16, full // ratio // 16 * 16)
    header, question = model.layout_header, tuple(model.encode("Which animal lives there?"))
    room = header + len(question) + tokens
    many = users * (full + room) // (small + room)
    kv = torch.randn(model.geometry.layers, 2, model.geometry.kv_heads, full, model.geometry.head_dim) * 0.1

    def decode(count: int, size: int) -> float:
        cartridges = {f"{i}": kv[:, :, :, :size].to(model.device, model.dtype) for i in range(count)}
        prompts = [Prompt(question, (f"{i}",)) for i in range(count)]
        layout, positions = Layout("offset", header, 0), count * (size + room)
        started = time.perf_counter()
        generate(model, prompts, cartridges, layout, max_new_tokens=tokens, batch_positions=positions, batch_rows=count)
        return count * tokens / (time.perf_counter() - started)

    endless = model.template
    model.template = replace(endless, stop_ids=frozenset())  # every user decodes all tokens
    try:
        for _ in range(repeats):
            alone, together = decode(users, full), decode(many, small)
            yield "decode_many", "ratio", together / alone
            yield "decode_many", "tokens_per_second", together
            yield "decode_many", "users", many / users
    finally:
        model.template = endless


def synthesis(work: Work, units: int) -> Iterator[Sample]:
    """Conversations a second of self-study against one question written and answered at a time over the same chunks."""
    model, settings, style = work.model, SelfStudy(), prompt_style(work.model)
    planner = make_planner(split_documents(model, world(0, 8)), style, settings)
    teacher = Teacher(model, style, settings)
    for unit in range(units + 1):
        calls = planner.plan(unit, History())
        started = time.perf_counter()
        kept = teacher.converse(calls, {})[0]
        ours = time.perf_counter() - started
        theirs, count = _one_at_a_time(teacher, calls)
        if unit and kept and count:
            yield "synthesis_vs_sequential", "ratio", (len(kept) / ours) / (count / theirs)
            yield "synthesis_vs_sequential", "conversations_per_second", len(kept) / ours


def _one_at_a_time(teacher: Teacher, calls: Sequence[Call], sample: int = 8) -> tuple[float, int]:
    """Seconds of a few of a unit's requests, and how many conversations come of them: every request reads its chunk by
    itself, twice."""
    model, s = teacher.model, teacher.settings
    started, kept = time.perf_counter(), 0
    for call in calls:
        for pair in call.pairs[:sample]:
            single = replace(call, pairs=(pair,))
            for question in teacher.filter(single, teacher.ask(single)[0], set(), Counter()):
                user = model.encode(question + call.seed_prompt.answer_suffix)
                prompt = Prompt((*model.template.footer_ids, *user, *model.template.suffix_ids), ("chunk",))
                kv = {"chunk": teacher.chunk_kv(call.chunk)}
                answer = generate(
                    model, [prompt], kv, teacher.layout, max_new_tokens=teacher.answer_tokens, keep_top=s.top_k
                )[0]
                kept += answer.finished
    return time.perf_counter() - started, kept


def _all(action: Callable[[Any], Any], names: Sequence[Any]) -> None:
    for name in names:
        action(name)
