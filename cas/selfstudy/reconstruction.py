"""Conversations that need no writer: the document's own text is the answer.

Every passage of a document, a few whole sentences, is asked for by its title and first words, and the beginning of every
longer sentence is a message whose answer is the rest. The answers are not decoded: one forward pass over chunk, message
and answer gives the teacher's probabilities of the text. So any document has conversations, in any language and however
short, and they cost little more than reading it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random

import numpy as np
import torch

from cas.data.collection import Collection, Document
from cas.errors import ConfigError
from cas.model.decoding import Waiting, most_positions
from cas.model.decoding_attention import Prompt
from cas.model.decoding_cache import Decoding
from cas.model.frozen import FrozenModel
from cas.model.positions import Layout
from cas.options import SelfStudy
from cas.selfstudy.conversations import Conversation
from cas.selfstudy.prompt_styles import token_limits
from cas.selfstudy.seed_prompts import is_english
from cas.selfstudy.windows import sentence_windows
from retrieval.chunk import split_sentences, truncate, with_title

KIND = "reconstruction"
PASSAGES_PER_UNIT = 128
FIRST_WORDS = 12  # tokens that say which passage is meant
SHORTEST = 8  # tokens of a sentence that is begun in one message and ended in its answer
ROWS = 128  # passages that one forward pass reads


@dataclass(frozen=True)
class Passage:
    """A piece of a document that a message asks for; ``chunk``: the text that the teacher has before it."""

    document: str
    chunk: str
    message: str
    text: str


def passages(model: FrozenModel, documents: Collection, settings: SelfStudy) -> list[Passage]:
    """All passages of the documents, by document id and place: together the answers cover every token of every text.

    No message has more tokens than a question may have, no text more than an answer, its end included. Raises:
    ConfigError when the model reads too little.
    """
    question, answer = token_limits(model, settings)
    template, positions = model.template, model.geometry.max_positions
    room = (
        positions - sum(map(len, (template.header_ids, template.footer_ids, template.suffix_ids))) - question - answer
    )
    found = list[Passage]()
    for document in sorted(documents.documents, key=lambda d: d.id):
        title = truncate(document.title.strip(), max(1, room // 4), model.count_tokens)
        # A chunk may have a few tokens more than its sentences by themselves.
        most = min(settings.chunk_tokens, (room - model.count_tokens(title)) * 15 // 16)
        if most < 16:
            raise ConfigError(
                f"the model reads {positions} tokens, too few for self-study of answers with {answer}; "
                "give another --model, or lower --answer-tokens"
            )
        found += _Splitter(model, document, title, question, min(most, max(1, answer - 1)), settings.seed).split(most)
    return found


class _Splitter:
    """Cuts one document into passages of at most ``limit`` tokens with messages of at most ``question`` ones."""

    def __init__(
        self, model: FrozenModel, document: Document, title: str, question: int, limit: int, seed: int
    ) -> None:
        self.document, self.title, self.question, self.limit, self.seed = document, title, question, limit, seed
        self.count = model.count_tokens
        self.name = truncate(title, max(1, question // 3), self.count)
        self.lead = f"{self.name}: " if self.name else ""
        self.repeat = f'Repeat the passage of "{self.name}" that begins with: '
        spans = split_sentences(document.text, limit, self.count)
        self.spans = [(start, end) for start, end in spans if document.text[start:end].strip()]
        # The request is in English: about other texts, and where it would be too long, their own words must do.
        self.requests = is_english(document.text) and self.count(self.repeat) <= question - FIRST_WORDS

    def split(self, chunk_tokens: int) -> Iterator[Passage]:
        """The passages, those of a chunk together."""
        lengths = [max(1, self.count(self._text(i, i + 1))) for i in range(len(self.spans))]
        for window, targets in sentence_windows(lengths, chunk_tokens):
            chunk = with_title(self.title, self._text(window.start, window.stop))
            for message, text in self._asked(targets, lengths):
                yield Passage(self.document.id, chunk, message, text)

    def _text(self, first: int, end: int) -> str:
        """The sentences first..end as they stand in the document."""
        return self.document.text[self.spans[first][0] : self.spans[end - 1][1]].strip()

    def _asked(self, targets: range, lengths: Sequence[int]) -> Iterator[tuple[str, str]]:
        """(message, answer) of passages that cover the target sentences, then of every longer sentence."""
        first = targets.start
        while first < targets.stop:
            end = first + 1
            while end < targets.stop and self.count(self._text(first, end + 1)) <= self.limit:
                end += 1
            text = self._text(first, end)
            if self.requests:
                yield self.repeat + self._first_words(self.repeat, text, FIRST_WORDS), text
            else:
                yield self._go_on(first), text
            first = end
        for i in targets:
            if lengths[i] >= SHORTEST:
                share = Random(f"{self.seed}/{KIND}/{self.document.id}/{i}").uniform(0.25, 0.75)
                sentence = self._text(i, i + 1)
                begun = self._first_words(self.lead, sentence, int(share * lengths[i]))
                if rest := sentence[len(begun) :].strip():
                    yield self.lead + begun, rest

    def _go_on(self, first: int) -> str:
        """Title and the words before sentence ``first``, which the answer goes on from."""
        before = self.document.text[: self.spans[first][0]].rstrip()[-2 * FIRST_WORDS :]
        before = before.split(maxsplit=1)[-1] if " " in before.strip() else before
        most = max(1, self.question - self.count(self.lead))
        while before and self.count(before) > most:
            before = before[len(before) // 4 + 1 :]
        return (self.lead + before).strip() or self._first_words("", self._text(first, first + 1), FIRST_WORDS)

    def _first_words(self, lead: str, text: str, most: int) -> str:
        """The beginning of a text, such that there is room for it behind ``lead``."""
        return truncate(text, max(1, min(most, self.question - self.count(lead))), self.count)


@torch.no_grad()
def reconstruct(model: FrozenModel, asked: Sequence[Passage], top_k: int) -> list[Conversation]:
    """The conversations of passages, each with the teacher's ``top_k`` likeliest tokens at every place of the text."""
    template, header = model.template, model.template.header_ids
    chunks = {
        chunk: model.prefill([*header, *model.encode(chunk)])[:, :, :, len(header) :]
        for chunk in dict.fromkeys(passage.chunk for passage in asked)
    }
    messages, texts = [model.encode(p.message) for p in asked], [model.encode(p.text) for p in asked]
    prompts = [
        Prompt((*template.footer_ids, *message, *template.suffix_ids, *text), (passage.chunk,))
        for passage, message, text in zip(asked, messages, texts, strict=True)
    ]
    sizes, k = {chunk: kv.shape[3] for chunk, kv in chunks.items()}, min(top_k, model.geometry.vocabulary)
    waiting = Waiting(prompts, sizes, 0, most_positions(model), ROWS)
    made = dict[int, Conversation]()
    while waiting:
        batch = {i: prompts[i] for i in waiting.take()}
        state = Decoding(model, batch, chunks, Layout("offset", model.layout_header, 0), 0)
        for i, logits in state.read_prompts({i: len(texts[i]) + 1 for i in batch}):  # the end of the turn as well
            top = logits.float().topk(k, dim=-1)
            likely = top.values - logits.float().logsumexp(-1, keepdim=True)
            ids = top.indices.to("cpu", torch.int32)
            end = end_of_turn(model, ids[-1].tolist())
            made[i] = Conversation(
                asked[i].document,
                KIND,
                asked[i].message,
                np.array(messages[i], np.int32),
                np.array([*texts[i], end], np.int32),
                ids.numpy(),
                likely.cpu().numpy(),
            )
    return [made[i] for i in range(len(asked))]


def end_of_turn(model: FrozenModel, likeliest: Sequence[int]) -> int:
    """The token that ends an answer: the first of the likeliest ones that ends a turn."""
    stop_ids = model.template.stop_ids
    return next((token for token in likeliest if token in stop_ids), min(stop_ids))
