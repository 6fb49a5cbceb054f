"""The memory plan of a training: the sizes that :mod:`budget.memory_plan` needs, from settings, documents and model."""

from __future__ import annotations

from collections.abc import Sequence

from budget.free_memory import device_free, host_free
from budget.memory_plan import DoesNotFit, Plan, Sizes, make_plan
from cas.data.collection import Collection
from cas.errors import BudgetError
from cas.model.decoding import most_positions
from cas.model.frozen import FrozenModel
from cas.model.positions import cartridge_size
from cas.options import TrainConfig, memory
from cas.selfstudy.planners import History, NoQuestions, Planner, fit_window, make_planner
from cas.selfstudy.prompt_styles import prompt_style, token_limits
from cas.selfstudy.recorded import reconstructs
from cas.selfstudy.seed_prompts import BRIEF
from cas.selfstudy.subjects import told_apart
from cas.selfstudy.synthesize import ROWS
from cas.training.initialization import LONGEST, PADDED_TOKENS, SCORES_AT_ONCE
from cas.training.loss import rows_at_once
from cas.training.micro_batches import kept_bytes, kept_per_token, most_kept
from cas.training.ranks import ranks_here
from cas.training.schedule import guest_count

EXTRA_TOKENS = 16  # of a conversation, besides question, answer and the template's parts
BESIDE_TOKENS = 1024  # bytes of a conversation, twice on disk: its words, its document's id, and what a file adds


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

    Raises: BudgetError with the figures if the budget, or what this machine has free, cannot hold it; ConfigError when
    the model reads too little.
    """
    tokens = [model.count_tokens(d.text) for d in documents.documents]
    sizes = [cartridge_size(n, config.tokens, None if config.tokens else ratio, config.span) for n in tokens]
    on_cpu, host = model.device.type == "cpu", host_free()
    host = None if host is None else host // ranks_here()
    try:
        return make_plan(
            _sizes(config, model, documents, tokens, sizes, frozen),
            pool=None if pool is None else min(pool, len(sizes)),
            guests=min(guest_count(config, len(frozen)), len(sizes) + len(frozen)),
            frozen=len(frozen),
            budget=None if config.budget is None else memory(config.budget, "--budget"),
            host_budget=memory(config.host_memory, "--host-memory"),
            on_cpu=on_cpu,
            device_free=host if on_cpu else device_free(model.device),
            host_free=host,
        )
    except DoesNotFit as error:
        raise BudgetError(str(error)) from error


def _sizes(
    config: TrainConfig,
    model: FrozenModel,
    documents: Collection,
    tokens: Sequence[int],
    sizes: Sequence[int],
    frozen: Sequence[int],
) -> Sizes:
    """``tokens`` of every document, ``sizes``: positions of its cartridge."""
    g, template = model.geometry, model.template
    question, answer = token_limits(model, config)
    longest = question + answer + len(template.footer_ids) + len(template.suffix_ids) + EXTRA_TOKENS
    targets = min(config.targets, len(sizes))
    rows = targets * config.per_target
    largest, alone = max(*sizes, *frozen, 0), model.layout_header + max(sizes)
    others = min(len(sizes) + len(frozen) - 1, 0 if config.isolation >= 1 else config.max_distractors)
    # Twice the expected number of conversations with distractors, each with the most of them.
    mixed = min(rows, int(2 * (1 - config.isolation) * rows) + 1) if others else 0
    most = [alone + others * largest] * mixed + [alone] * (rows - mixed)
    one = kept_bytes(model, [longest], [max(most)])
    logit_rows = rows * answer
    return Sizes(
        weights=model.weight_bytes,
        element=model.dtype.itemsize,
        largest=g.elements(largest),
        total=g.elements(sum(sizes)),
        documents=len(sizes),
        tokens=sum(tokens),
        kept=max(one, min(most_kept(model), kept_bytes(model, [longest] * rows, most))),
        per_token=kept_per_token(model),
        seen=targets + others * mixed,
        logit_rows=logit_rows if model.head is None else min(logit_rows, rows_at_once(model.head)),
        layers=g.layers,
        hidden=g.hidden,
        intermediate=getattr(model.config, "intermediate_size", 4 * g.hidden),
        vocabulary=g.vocabulary,
        query_heads=g.query_heads,
        kv_heads=g.kv_heads,
        head_dim=g.head_dim,
        longest=longest,
        matched=min(max(tokens), LONGEST) if config.initialization == "matched" else 0,
        matched_on=PADDED_TOKENS,
        scores_at_once=SCORES_AT_ONCE,
        whole_logits=model.head is None,
        **_self_study(config, model, documents, question, answer),
    )


def _self_study(
    config: TrainConfig, model: FrozenModel, documents: Collection, question: int, answer: int
) -> dict[str, int]:
    """``decoded``, ``decoded_rows`` and ``chunks`` of :class:`Sizes`: of questions or answers, whichever take more; and
    ``conversations``.

    Args: question, answer: the most tokens of each.
    """
    style = prompt_style(model, config)
    documents = told_apart(documents)
    study, sources = fit_window(model, style, config, documents)
    per_call, per_unit = style.sizes(study)
    title = max(model.count_tokens(d.title) for d in documents.documents)
    sentence = max((max(s.lengths) for s in sources), default=0)
    # A chunk may have a few tokens more than its sentences by themselves, and begins with the title.
    chunk = title + max((min(study.chunk_tokens, sum(s.lengths)) for s in sources), default=0) * 17 // 16
    request = max(style.request_length(model, kind, study, question) for kind in study.kinds) + title + sentence
    asked = per_call
    if style.every_sentence:
        asked = min(per_call, max((len(s.sentences) for s in sources), default=1)) * config.wordings
    # (rows, own positions of each, chunks), asking and answering
    asking = (per_unit, request, per_unit) if style.lists else (asked, request + question, 1)
    answering = (asked * per_unit, len(model.question_tokens(BRIEF)) + question + answer, per_unit)
    wanted = []
    for rows, own, calls in (asking, answering):
        shared = calls * (chunk + request)
        held = min(min(ROWS, rows) * own, max(own, most_positions(model) - shared))
        # Where not all fit, others join the batch when half of it has ended, and both are there meanwhile.
        joined = held < rows * own
        wanted.append({"decoded": held * (1 + joined), "decoded_rows": min(ROWS, rows), "chunks": shared})
    most = max(wanted, key=lambda w: w["decoded"] + 4 * w["chunks"])
    planner: Planner = NoQuestions() if config.writer == "none" else make_planner(sources, style, study)
    # Of those wanted, the last unit brings more, and a document about which nothing is kept is retried.
    written = planner.most_questions(History())
    if not planner.every_sentence:
        written = min(written, planner.progress(History())[1] + per_call * per_unit + len(sources))
    sentences, text = sum(len(s.lengths) for s in sources), sum(sum(s.lengths) for s in sources)
    rebuilt = reconstructs(model, config, {})
    # Passages say the text once, and the ends of sentences at most three quarters of it again.
    messages, tokens = written + rebuilt * 2 * sentences, written * answer + rebuilt * (2 * text + 2 * sentences)
    each = question * 4 + BESIDE_TOKENS
    return most | {"conversations": 2 * (messages * each + tokens * (4 + 8 * config.top_k))}
