"""Self-study: the frozen model writes questions about each document, answers them with the text before it, and the
probabilities of its answers are stored (2506.06266, section 4).

One *call* shows the model a chunk and one of five kinds of seed prompt, and asks for several questions at once: rows
that share the chunk's KV, each pointed at one sentence and started with one of the kind's openings. Small models must
be pointed at one sentence; larger ones, and endpoints, write one list for a call (:mod:`cas.selfstudy.list_style`). Answers are decoded
greedily with the chunk in context, so the teacher's probabilities come with them and need no second pass.

A *unit* of work is a fixed number of calls and one Parquet file, which gets its name when it is complete. Everything in
it follows from the seed and the units before it, so an interrupted synthesis continues with the same conversations. The
first units need no writer: their answers are the text itself (:mod:`cas.selfstudy.reconstruction`).
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch

from budget.manager import trim_host_memory
from cas.data.collection import Collection
from cas.errors import ConfigError, RunError
from cas.model.decoding import Generation, Prompt, generate
from cas.model.frozen import FrozenModel
from cas.model.positions import Layout
from cas.options import SelfStudy
from cas.selfstudy.conversations import Asked, Conversation, Conversations, read_outlines, recorded_settings, write_unit
from cas.selfstudy.endpoint import EndpointWriter, list_writer
from cas.selfstudy.likeliest import Silent, likeliest
from cas.selfstudy.list_style import instruction, read_list
from cas.selfstudy.list_writers import ListWriter
from cas.selfstudy.planners import Call, History, NoQuestions, Planner, fit_window, make_planner
from cas.selfstudy.prompt_styles import PromptStyle, prompt_style, token_limits, with_limits
from cas.selfstudy.reconstruction import PASSAGES_PER_UNIT, end_of_turn, passages, reconstruct
from cas.selfstudy.recorded import made_with, reconstructs, record_without
from cas.selfstudy.seed_prompts import (
    bad_answer,
    bad_question,
    bad_reader_answer,
    bad_reader_question,
    loops,
    normal,
    units,
)
from cas.selfstudy.share import KeptShare, reasons
from cas.selfstudy.subjects import Subjects, told_apart
from cas.store.store import Store

_ALWAYS = ", or go on without a writer: --writer none (from reconstruction alone, fewer questions are answered)"
ROWS = 128  # questions or answers about a chunk that are decoded side by side

AskedQuestion = tuple[Call, str]


def synthesize(
    model: FrozenModel,
    documents: Collection,
    store: Store,
    settings: SelfStudy | None = None,
    progress: Callable[[int, int], None] | None = None,
    say: Callable[[str], None] | None = None,
    whole: tuple[Collection, Subjects] | None = None,
    **options: Any,
) -> Conversations:
    """Write the training conversations of a collection beside its store; continues where an earlier call stopped.

    Also records new documents in the store (:meth:`Store.add_documents`). Documents without any conversation are missing
    from the result and listed in ``without_conversations.json``; with reconstruction only those without a token are.

    Args: settings, or its fields as ``options``; progress: called after every unit with (kept, wanted) conversations,
    or with (asked, all) sentences where every sentence is asked about; say: gets a line after the first hundred questions;
    whole: where these documents are a part of a collection, all of it as self-study calls it, and its subjects.
    Raises: StoreMismatch for another model; ConfigError when finished units were made with other settings, or the model
    reads too little; RunError when less than a quarter of the first questions is kept, or nothing at all in a new store
    (in a later round the result is empty).
    """
    store.check_model(model)
    folder = store.conversations
    first, recorded = folder / "unit-000000.parquet", recorded_settings(folder)
    settings = with_limits(model, settings or SelfStudy(**options), folder)
    style = prompt_style(model, settings, recorded.get("writer", "sentence") if recorded else None)
    alone, rebuild = settings.writer == "none", reconstructs(model, settings, recorded)
    if alone and not rebuild:
        raise ConfigError(f"--writer none: {folder} was begun without reconstruction; give a new --store")
    writer = None if alone else list_writer(model, style, settings, recorded.get("writer_model"))
    planner: Planner = NoQuestions()
    called = told_apart(documents, {i: row.title for i, row in store.answering().items()})
    if whole is not None:
        ids = {d.id for d in documents.documents}
        called = replace(documents, documents=tuple(d for d in whole[0].documents if d.id in ids))
    if not alone:
        fitting, sources = fit_window(model, style, settings, called)
        planner = make_planner(sources, style, fitting)
    writer_model = writer.endpoint.model if isinstance(writer, EndpointWriter) else None
    writer_model = recorded.get("writer_model") if alone else writer_model
    made = made_with(model, documents, store, settings, style, planner.every_sentence, rebuild, writer_model)
    if first.exists():
        _read(first, made)  # before anything is written
    elif store.run_state() is not None:
        raise ConfigError(
            f"{store.folder} was trained on conversations that are no longer in {folder}; give another --store"
        )
    asked = passages(model, called, settings) if rebuild else []
    parts = [asked[i : i + PASSAGES_PER_UNIT] for i in range(0, len(asked), PASSAGES_PER_UNIT)]
    store.add_documents(documents, model.count_tokens)
    folder.mkdir(exist_ok=True)
    history, unit, rebuilt, teacher, retried = History(), 0, 0, None, False
    advice = style.advice + ("" if model.reader else _ALWAYS if rebuild else f"{_ALWAYS} in a new --store")
    share = KeptShare(say, advice, settings.keep_going or style.capital_names)
    with store.training():  # one writer of units at a time
        while True:
            file, part = folder / f"unit-{unit:06d}.parquet", parts[unit] if unit < len(parts) else ()
            calls = [] if part else planner.plan(unit - len(parts), history)
            done, wanted = planner.progress(history)
            written = file.exists() and (alone or settings.conversations is None)
            if not (part or calls or written):
                break
            conversations: Sequence[Asked]
            if file.exists():
                conversations, dropped = _read(file, made)
            elif store.run_state() is not None:
                if not part and (done >= wanted or settings.conversations is None):  # trained on what there is
                    break
                raise ConfigError(
                    f"{store.folder} is trained on {history.kept + rebuilt} conversations; "
                    "ask for no more, or give another --store"
                )
            else:
                started = time.monotonic()
                if part:
                    written_now, dropped = reconstruct(model, part, settings.top_k), Counter[str]()
                else:
                    share.check(wanted - done, planner.most_questions(history))
                    if any(call.is_retry for call in calls) and not retried and say is not None:
                        retried = True
                        say("asking again about documents of which nothing was kept")
                    if teacher is None:
                        subjects = Subjects(called.documents) if whole is None else whole[1]
                        teacher = Teacher(model, style, settings, subjects, writer)
                    written_now, dropped = teacher.converse(calls, history.questions)
                trim_host_memory()
                write_unit(file, written_now, dropped, made)
                conversations = written_now
                store.log_duration("self-study", time.monotonic() - started)
                if not part:
                    share.add(len(conversations), dropped)
            unit, rebuilt = unit + 1, rebuilt + len(part)
            if not part:
                history.add(calls, conversations, dropped)
            if progress is not None:
                done, wanted = planner.progress(history)
                progress(rebuilt + done, len(asked) + wanted)
        without = record_without(store, documents, {*history.questions, *(passage.document for passage in asked)})
        if len(without) == len(documents.documents):
            problem = f"self-study kept none of {history.dropped.total()} questions about {len(without)} documents"
            if not store.round:
                raise RunError(
                    f"{problem}; dropped: {reasons(history.dropped)}; {advice}, or give documents with more text"
                )
            if say is not None:
                say(f"{problem}: their cartridges stay as initialized")
        return Conversations.load(folder, unit)


def _read(file: Path, made_with: str) -> tuple[Sequence[Asked], Counter[str]]:
    """What was asked in a finished unit, and drop counts. All else is read, and checked, when all units are joined."""
    conversations, dropped, unit_made_with = read_outlines(file)
    if unit_made_with != made_with:
        then, now = json.loads(unit_made_with), json.loads(made_with)
        changed = ["conversations" if n == "once" else n for n in {**then, **now} if then.get(n) != now.get(n)]
        raise ConfigError(
            f"{file.parent} was made with another {', '.join(changed)}; use the same one or give another --store"
        )
    return conversations, dropped


class Teacher:
    """The frozen model, which asks and answers with a chunk in its cache. It has no state of its own."""

    def __init__(
        self,
        model: FrozenModel,
        style: PromptStyle,
        settings: SelfStudy,
        subjects: Subjects | None = None,
        writer: ListWriter | None = None,
    ) -> None:
        """``subjects``: of the collection; without them every question gets a title that has no word of it. ``writer``:
        needed for a style that asks for lists."""
        self.model, self.style, self.settings, self.writer = model, style, settings, writer
        self.question_tokens, self.answer_tokens = token_limits(model, settings)
        self.subjects = subjects or Subjects(())
        tokens = model.tokenizer.batch_decode([[i] for i in range(model.geometry.vocabulary)])
        self.newline = frozenset(i for i, text in enumerate(tokens) if "\n" in text)
        self.layout = Layout("offset", model.layout_header, 0)

    def converse(
        self, calls: Sequence[Call], known: Mapping[str, AbstractSet[str]]
    ) -> tuple[list[Conversation], Counter[str]]:
        """The conversations of one unit, and how many questions and answers were dropped for which reason.

        Args: known: normalized questions kept so far, by document id.
        """
        seen = {call.document.id: set(known.get(call.document.id, ())) for call in calls}
        questions, chunks, dropped = list[AskedQuestion](), dict[str, torch.Tensor](), Counter[str]()
        lists = self.ask_for_lists(calls, chunks, dropped) if self.style.lists else None
        silent = Silent()
        for number, call in enumerate(calls):
            if lists is not None:
                written = lists[number]
            else:
                call = silent.without(call)
                written, chunks[call.chunk] = self.ask(call)
                silent.add(call, written)
            questions += [(call, q) for q in self.filter(call, written, seen[call.document.id], dropped)]
        user_tokens = [self.model.encode(question + call.seed_prompt.answer_suffix) for call, question in questions]
        answers = self.answer(questions, user_tokens, chunks)
        conversations = []
        for (call, question), user, answer in zip(questions, user_tokens, answers, strict=True):
            if reason := self._bad_answer(call, question, answer):
                dropped[reason] += 1
            else:
                conversations.append(self._conversation(call, question, user, answer))
        return conversations, dropped

    def ask(self, call: Call) -> tuple[list[tuple[str, bool]], torch.Tensor]:
        """Let the model write the questions of a call.

        Returns: every question with whether it was finished; the KV of the call's chunk [L, 2, H, T, D].
        """
        assert self.style.request_tokens is not None
        pairs = call.text_pairs
        shared, requests = self.style.request_tokens(self.model, call.seed_prompt, call.document.title, pairs)
        prefix = self.chunk_kv(call.chunk, shared)
        prompts = [Prompt(tokens, ("call",)) for tokens in requests]
        text_kv = prefix[:, :, :, : len(self.model.encode(call.chunk))]
        limits: dict[str, Any] = {"batch_rows": ROWS, "max_new_tokens": self.question_tokens, "also_stop": self.newline}
        if call.likeliest:
            replied = likeliest(self.model, prompts, {"call": prefix}, self.layout, call.likeliest, **limits)
            return [(self._question(pairs[i][1], reply), reply.finished) for i, reply in replied], text_kv
        # One batch for all wordings where they fit, so that the prompts are read once; else one for each temperature.
        temperatures = sorted(call.temperatures)
        batches = [temperatures]
        if len(prompts) * len(temperatures) > ROWS:
            batches = [list(equal) for _, equal in groupby(temperatures)]
        replies: list[Generation] = []
        for batch in batches:
            replies += generate(
                self.model,
                prompts * len(batch),
                {"call": prefix},
                self.layout,
                **limits,
                temperature=[temperature for temperature in batch for _ in prompts],
                seed=Random(f"{self.settings.seed}/write/{call.number}").getrandbits(32),
            )
        times = len(call.temperatures)
        written = [
            (self._question(opening, reply), reply.finished)
            for (_, opening), reply in zip(pairs * times, replies, strict=True)
        ]
        return written, text_kv

    def _question(self, opening: str, reply: Generation) -> str:
        """Opening and reply up to the first line break, which may stand inside the token that ended the reply."""
        ids = [*reply.ids, reply.stop] if reply.stop is not None and reply.stop in self.newline else reply.ids
        return self._text([*self.model.encode(opening), *ids]).partition("\n")[0].strip()

    def _text(self, ids: Sequence[int]) -> str:
        return self.model.decode(self.model.text.without_special(ids))

    def ask_for_lists(
        self, calls: Sequence[Call], chunks: dict[str, torch.Tensor], dropped: Counter[str]
    ) -> list[list[tuple[str, bool]]]:
        """The questions of every call's list, all finished. Puts the KV of the calls' chunks into ``chunks``, and counts
        lines that are no question in ``dropped``."""
        assert self.writer is not None
        lists = []
        for call in calls:
            if call.chunk not in chunks:
                chunks[call.chunk] = self.chunk_kv(call.chunk)
        for call, (reply, finished) in zip(calls, self.writer.write(calls, chunks), strict=True):
            asked = instruction(call.seed_prompt, call.document.title, call.listed)
            questions, counts = read_list(reply, finished, call.listed, asked)
            short = [(q, True) for q in questions if len(self.model.encode(q)) <= self.question_tokens]
            counts["question too long"] = len(questions) - len(short)
            dropped += counts
            lists.append(short)
        return lists

    def filter(
        self, call: Call, written: Sequence[tuple[str, bool]], seen: set[str], dropped: Counter[str]
    ) -> list[str]:
        """Questions that are worth an answer, each with a subject: added to ``seen``, normalized; others are counted in
        ``dropped``."""
        questions, title, text = [], call.document.title, call.chunk
        for question, finished in written:
            reason: str | None = "unfinished question"
            if finished and self.style.capital_names:
                reason = bad_reader_question(question, title, text)
            elif finished:
                reason = bad_question(question, title, text, self.style.check_topic)
                question = self.subjects.complete(question, title, text)
            if reason is None and normal(question) in seen:
                reason = "duplicate"
            if reason:
                dropped[reason] += 1
                continue
            seen.add(normal(question))
            questions.append(question)
        return questions

    def answer(
        self,
        questions: Sequence[AskedQuestion],
        user_tokens: Sequence[Sequence[int]],
        chunks: Mapping[str, torch.Tensor],
    ) -> list[Generation]:
        """Answer each question greedily with its chunk in context, and keep the ``top_k`` likeliest tokens.

        Args: user_tokens: of each question, with what is appended to it; chunks: KV by the chunk's text.
        """
        template = self.model.template
        prompts = [
            Prompt((*template.footer_ids, *user, *template.suffix_ids), (call.chunk,))
            for (call, _), user in zip(questions, user_tokens, strict=True)
        ]
        return generate(
            self.model,
            prompts,
            chunks,
            self.layout,
            max_new_tokens=self.answer_tokens,
            keep_top=min(self.settings.top_k, self.model.geometry.vocabulary),
            batch_rows=ROWS,
        )

    def chunk_kv(self, chunk: str, more: Sequence[int] = ()) -> torch.Tensor:
        """The exact KV of a chunk and more tokens after the header, which rows share as if it were a cartridge.

        Returns: [L, 2, H, T, D] without the header.
        """
        header = self.model.template.header_ids
        return self.model.prefill([*header, *self.model.encode(chunk), *more])[:, :, :, len(header) :]

    def _bad_answer(self, call: Call, question: str, answer: Generation) -> str | None:
        """Why an answer is dropped, or None."""
        if not answer.finished:
            return "answer too long"
        text = self._text(answer.ids).strip()
        # Where a character takes several tokens, equal ones are no loop.
        if loops(answer.ids if text.isascii() or self.style.capital_names else units(text)):
            return "loop"
        bad = bad_reader_answer if self.style.capital_names else bad_answer
        return bad(text, question, call.chunk)

    def _conversation(self, call: Call, question: str, user: Sequence[int], answer: Generation) -> Conversation:
        """The record of a question and its answer, ended by the likeliest token that ends a turn."""
        end = end_of_turn(self.model, answer.top_ids[-1].tolist())
        return Conversation(
            call.document.id,
            call.seed_prompt.kind,
            question,
            np.array(user, np.int32),
            np.array([*answer.ids, end], np.int32),
            torch.stack(answer.top_ids).numpy(),
            torch.stack(answer.top_logprobs).numpy(),
        )
