"""Self-study: the frozen model writes questions about each document, answers them with the text before it, and the
probabilities of its answers are stored (2506.06266, section 4).

One *call* shows the model a chunk and one of five kinds of seed prompt, and asks for several questions at once: rows
that share the chunk's KV, each pointed at one sentence and started with one of the kind's openings. Small models must
be pointed at one sentence, large ones work as well with it, and it covers the whole document. Answers are decoded
greedily with the chunk in context, so the teacher's probabilities come with them and need no second pass.

A *unit* of work is a fixed number of calls and one Parquet file, which gets its name when it is complete. Everything in
it follows from the seed and the units before it, so an interrupted synthesis continues with the same conversations.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from itertools import groupby
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch

from budget.manager import trim_host_memory
from cas.data.collection import Collection
from cas.errors import ConfigError
from cas.model.decoding import Generation, Prompt, generate
from cas.model.frozen import FrozenModel
from cas.model.positions import Layout
from cas.options import SelfStudy
from cas.selfstudy.conversations import Conversation, Conversations, read_unit, write_unit
from cas.selfstudy.planners import Call, History, make_planner, split_documents
from cas.selfstudy.prompt_styles import PromptStyle, prompt_style
from cas.selfstudy.seed_prompts import bad_answer, bad_question, loops, normal
from cas.store.store import Store

ROWS = 128  # questions or answers about a chunk that are decoded side by side

AskedQuestion = tuple[Call, str]


def synthesize(
    model: FrozenModel,
    documents: Collection,
    store: Store,
    settings: SelfStudy | None = None,
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> Conversations:
    """Write the training conversations of a collection beside its store; continues where an earlier call stopped.

    Also records new documents in the store (:meth:`Store.add_documents`). Documents about which no conversation is
    kept, even after retries of their own, are missing from the result.

    Args: settings, or its fields as ``options``; progress: called after every unit with (kept, wanted) conversations,
    or with (asked, all) sentences where every sentence is asked about.
    Raises: StoreMismatch for another model; ConfigError when finished units were made with other settings; RunError when
    too little survives the filters.
    """
    store.check_model(model)
    settings = settings or SelfStudy(**options)
    folder, style = store.conversations, prompt_style(model)
    planner = make_planner(split_documents(model, documents), style, settings)
    made_with = _made_with(model, documents, store, settings, planner.every_sentence)
    first = folder / "unit-000000.parquet"
    if first.exists():
        _read(first, made_with)  # before anything is written
    elif store.run_state() is not None:
        raise ConfigError(
            f"{store.folder} was trained on conversations that are no longer in {folder}; give another --store"
        )
    store.add_documents(documents, model.count_tokens)
    folder.mkdir(exist_ok=True)
    teacher, history, unit = Teacher(model, style, settings), History(), 0
    with store.training():  # one writer of units at a time
        while calls := planner.plan(unit, history):
            file = folder / f"unit-{unit:06d}.parquet"
            if file.exists():
                conversations, dropped = _read(file, made_with)
            elif store.run_state() is not None:
                raise ConfigError(
                    f"{store.folder} is trained on {history.kept} conversations; "
                    "ask for no more, or give another --store"
                )
            else:
                started = time.monotonic()
                conversations, dropped = teacher.converse(calls, history.questions)
                trim_host_memory()
                write_unit(file, conversations, dropped, made_with)
                store.log_duration("self-study", time.monotonic() - started)
            history.add(calls, conversations, dropped)
            unit += 1
            if progress is not None:
                progress(*planner.progress(history))
        return Conversations.load(folder, unit)


def _made_with(
    model: FrozenModel, documents: Collection, store: Store, settings: SelfStudy, every_sentence: bool
) -> str:
    """JSON of everything that must be the same for finished units to be used again."""
    # The collection's own hash leaves ids out, but conversations are filed by id.
    texts = hashlib.sha256("\n".join(f"{d.id}\t{d.hash}" for d in documents.documents).encode()).hexdigest()
    fields = {name: value for name, value in vars(settings).items() if name != "conversations"}
    return json.dumps(
        {
            "model": store.meta["model"]["fingerprint"],
            "system": model.system,
            "documents": texts,
            "once": every_sentence,
            **fields,
        },
        sort_keys=True,
    )


def _read(file: Path, made_with: str) -> tuple[list[Conversation], Counter[str]]:
    """Conversations and drop counts of a finished unit."""
    conversations, dropped, unit_made_with = read_unit(file)
    if unit_made_with != made_with:
        raise ConfigError(
            f"{file.parent} was made with other settings, documents or model; use the same ones or give another --store"
        )
    return conversations, dropped


class Teacher:
    """The frozen model, which asks and answers with a chunk in its cache. It has no state of its own."""

    def __init__(self, model: FrozenModel, style: PromptStyle, settings: SelfStudy) -> None:
        self.model, self.style, self.settings = model, style, settings
        self.newline = frozenset(i for i in range(model.geometry.vocabulary) if "\n" in model.tokenizer.decode([i]))
        self.layout = Layout("offset", model.layout_header, 0)

    def converse(
        self, calls: Sequence[Call], known: Mapping[str, AbstractSet[str]]
    ) -> tuple[list[Conversation], Counter[str]]:
        """The conversations of one unit, and how many questions and answers were dropped for which reason.

        Args: known: normalized questions kept so far, by document id.
        """
        seen = {call.document.id: set(known.get(call.document.id, ())) for call in calls}
        questions, chunks, dropped = list[AskedQuestion](), dict[str, torch.Tensor](), Counter[str]()
        for call in calls:
            written, chunks[call.chunk] = self.ask(call)
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
        pairs = call.text_pairs
        shared, requests = self.style.request_tokens(self.model, call.seed_prompt, call.document.title, pairs)
        prefix = self.chunk_kv(call.chunk, shared)
        prompts = [Prompt(tokens, ("call",)) for tokens in requests]
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
                batch_rows=ROWS,
                max_new_tokens=self.settings.question_tokens,
                also_stop=self.newline,
                temperature=[temperature for temperature in batch for _ in prompts],
                seed=Random(f"{self.settings.seed}/write/{call.number}").getrandbits(32),
            )
        written = [
            ((opening + self.model.continuation(self.model.encode(opening), reply.ids)).strip(), reply.finished)
            for (_, opening), reply in zip(pairs * len(call.temperatures), replies, strict=True)
        ]
        return written, prefix[:, :, :, : len(self.model.encode(call.chunk))]

    def filter(
        self, call: Call, written: Sequence[tuple[str, bool]], seen: set[str], dropped: Counter[str]
    ) -> list[str]:
        """Questions that are worth an answer: added to ``seen``, normalized; others are counted in ``dropped``."""
        questions = []
        for question, finished in written:
            reason: str | None = "unfinished question"
            if finished:
                reason = bad_question(question, call.document.title, call.chunk, self.style.check_topic)
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
            max_new_tokens=self.settings.answer_tokens,
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
        if loops(answer.ids):
            return "loop"
        return bad_answer(self.model.answer_text(answer.ids), question, call.chunk)

    def _conversation(self, call: Call, question: str, user: Sequence[int], answer: Generation) -> Conversation:
        """The record of a question and its answer, ended by the likeliest token that ends a turn."""
        stop_ids = self.model.template.stop_ids
        end = next((token for token in answer.top_ids[-1].tolist() if token in stop_ids), min(stop_ids))
        return Conversation(
            call.document.id,
            call.seed_prompt.kind,
            question,
            np.array(user, np.int32),
            np.array([*answer.ids, end], np.int32),
            torch.stack(answer.top_ids).numpy(),
            torch.stack(answer.top_logprobs).numpy(),
        )
