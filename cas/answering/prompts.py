"""Prompts of every way of answering: what stands in the place of the document, then the same question.

All arms share the header, the footer and the question's own tokens, and differ only in that place.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from cas.data.collection import Document
from cas.errors import UserError
from cas.model.decoding import Prompt
from cas.model.frozen import FrozenModel
from cas.model.positions import Layout
from cas.selfstudy.seed_prompts import BRIEF
from retrieval.chunk import with_title


def brief(model: FrozenModel) -> str:
    """Request for a short answer, appended to a question; the embedded reader does not need it."""
    return "" if model.reader else BRIEF


def no_context(model: FrozenModel, question: str) -> Prompt:
    """The question alone."""
    return Prompt(model.question_tokens(question))


def text_context(model: FrozenModel, question: str, texts: Sequence[str]) -> Prompt:
    """Texts (retrieved chunks with their titles) where the document stands, joined by blank lines.

    Raises: UserError if that is longer than the model's window.
    """
    tokens = (*model.encode("\n\n".join(texts)), *model.question_tokens(question))
    room = model.geometry.max_positions - model.layout_header
    if len(tokens) >= room:
        raise UserError(
            f"the text takes {len(tokens)} tokens and the model has room for {room}; load cartridges or fewer texts"
        )
    return Prompt(tokens)


def whole_documents(model: FrozenModel, documents: Sequence[Document]) -> Tensor:
    """The exact KV of whole documents with their titles: a prefix that all their questions share.

    Loaded as a cartridge where tokens stand right behind it (``offset``), it is the plain prompt of header, documents
    and question, read once instead of once a question. Returns: [L, 2, H, T, D] in the model's dtype.
    Raises: UserError if the documents leave no room for a question in the model's window.
    """
    tokens = model.encode("\n\n".join(with_title(d.title, d.text) for d in documents))
    room = model.geometry.max_positions - model.layout_header
    if len(tokens) >= room:
        raise UserError(
            f"the documents take {len(tokens)} tokens and the model has room for {room}; load cartridges or fewer texts"
        )
    return model.prefill([*model.template.header_ids, *tokens])[:, :, :, model.layout_header :]


def cartridges(model: FrozenModel, question: str, ids: Sequence[str]) -> Prompt:
    """Loaded cartridges by document id, as in training (under `fixed` and `offset` their order has no effect)."""
    return Prompt(model.question_tokens(question), tuple(sorted(ids)))


def room_for_answer(model: FrozenModel, prompt: Prompt, sizes: Sequence[int], layout: Layout) -> int:
    """Tokens that an answer may have within the model's positions. ``sizes``: positions of each loaded cartridge.

    Raises: UserError if the question does not fit behind the cartridges.
    """
    window, tokens = model.geometry.max_positions, len(prompt.tokens)
    room = window - layout.token_start(sizes)
    if tokens >= room:
        rest = f"the loaded cartridges leave room for {max(0, room)} of the model's {window} positions"
        raise UserError(
            f"the question takes {tokens} tokens and {rest}; ask a shorter one, or load fewer (--retrieve-k)"
        )
    return room - tokens
