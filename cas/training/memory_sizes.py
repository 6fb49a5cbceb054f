"""The memory plan of a training: the sizes that :mod:`budget.memory_plan` needs, from settings, documents and model."""

from __future__ import annotations

from collections.abc import Sequence

from budget.memory_plan import DoesNotFit, Plan, Sizes, make_plan
from cas.data.collection import Collection
from cas.errors import BudgetError
from cas.model.decoding import most_positions
from cas.model.frozen import FrozenModel
from cas.model.positions import cartridge_size
from cas.options import TrainConfig, memory
from cas.selfstudy.prompt_styles import token_limits
from cas.training.initialization import LONGEST, TOKENS
from cas.training.loss import rows_at_once
from cas.training.schedule import guest_count

EXTRA_TOKENS = 16  # of a conversation, besides question, answer and the template's parts


def plan_memory(
    config: TrainConfig,
    model: FrozenModel,
    documents: Collection,
    ratio: float | None,
    pool: int | None = None,
    frozen: Sequence[int] = (),
) -> Plan:
    """Bytes of a training of these documents, before anything starts.

    Args:
        ratio: document tokens per position, where ``config.tokens`` does not give the size of cartridges.
        pool: cartridges in training at a time; by default as many as the budget holds.
        frozen: positions of each cartridge of earlier rounds, which only distract.

    Raises: BudgetError with the figures if the budget cannot hold it.
    """
    tokens = [model.count_tokens(d.text) for d in documents.documents]
    sizes = [cartridge_size(n, config.tokens, None if config.tokens else ratio, config.span) for n in tokens]
    try:
        return make_plan(
            _sizes(config, model, tokens, sizes, frozen),
            pool=None if pool is None else min(pool, len(sizes)),
            guests=min(guest_count(config, len(frozen)), len(sizes) + len(frozen)),
            frozen=len(frozen),
            budget=None if config.budget is None else memory(config.budget, "--budget"),
            host_budget=memory(config.host_memory, "--host-memory"),
            on_cpu=model.device.type == "cpu",
            merged=model.device.type == "cpu" or config.positions == "sequential",
        )
    except DoesNotFit as error:
        raise BudgetError(str(error)) from error


def _sizes(
    config: TrainConfig, model: FrozenModel, tokens: Sequence[int], sizes: Sequence[int], frozen: Sequence[int]
) -> Sizes:
    """``tokens`` of every document, ``sizes``: positions of its cartridge."""
    g = model.geometry
    template_tokens = len(model.template.footer_ids) + len(model.template.suffix_ids)
    question, answer = token_limits(model, config)
    longest = question + answer + template_tokens + EXTRA_TOKENS
    rows = min(config.targets, len(sizes)) * config.per_target
    logit_rows = rows * answer
    largest = max(*sizes, *frozen, 0)
    visible = min(len(sizes) + len(frozen), 1 + (0 if config.isolation >= 1 else config.max_distractors))
    # Twice the expected number of conversations with distractors, each with the most of them.
    mixed = min(rows, 2 * (1 - config.isolation) * rows + 1)
    return Sizes(
        weights=model.weight_bytes,
        element=model.dtype.itemsize,
        largest=g.elements(largest),
        total=g.elements(sum(sizes)),
        documents=len(sizes),
        tokens=sum(tokens),
        step_tokens=rows * longest,
        logit_rows=logit_rows if model.head is None else min(logit_rows, rows_at_once(model.head)),
        prefix=int(rows * (model.layout_header + max(sizes)) + mixed * (visible - 1) * largest),
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
