"""The embedded reader's questions: the likeliest about every sentence, none twice, few about what tells nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers_writer import plain

from cas.data.collection import Collection
from cas.data.worlds import Record, Shape, make_records, single
from cas.errors import ConfigError
from cas.evaluation.metrics import exact_match
from cas.model.decoding import Prompt, generate
from cas.model.frozen import FrozenModel
from cas.model.positions import Layout
from cas.selfstudy import likeliest as module
from cas.selfstudy import prompt_styles
from cas.selfstudy.conversations import recorded_settings
from cas.selfstudy.likeliest import Silent, likeliest
from cas.selfstudy.planners import History, make_planner, split_documents
from cas.selfstudy.prompt_styles import READER, READER_SAMPLING
from cas.selfstudy.synthesize import SelfStudy, Teacher, synthesize
from cas.store.store import Store

SMALL = Shape(people=(1, 1), facts=(4, 4), place_facts=(3, 3), event_facts=(0, 0), filler=0.5, indirect=0.5)


@pytest.fixture(scope="module")
def model() -> FrozenModel:
    return FrozenModel.from_pretrained("reader", dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def records() -> list[Record]:
    return list(make_records("likeliest", 0, SMALL))


@pytest.fixture(scope="module")
def small(records: list[Record]) -> Collection:
    return Collection("two", tuple(record.document for record in records))


def test_other_replies_are_the_likeliest_that_differ(
    tiny: Callable[..., FrozenModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against every beginning that leaves the greedy reply, by the model's own probabilities."""
    monkeypatch.setattr(module, "LEAST_PROBABILITY", 0.02)
    model, most, longest = tiny("llama"), 4, 5
    layout = Layout("fixed", model.layout_header, 0)
    prompts = [Prompt(tuple(model.encode(text))) for text in ("Which valve?", "The pump is red.", "Who?")]
    limits: dict[str, Any] = {"also_stop": frozenset(), "max_new_tokens": longest, "batch_rows": 8}
    replies = likeliest(model, prompts, {}, layout, most, **limits)
    assert [i for i, _ in replies[:3]] == [0, 1, 2]
    assert [r.ids for _, r in replies[:3]] == [r.ids for r in generate(model, prompts, {}, layout, **limits)]
    some = 0
    for number, prompt in enumerate(prompts):
        greedy, *others = (reply.ids for i, reply in replies if i == number)
        ids = torch.tensor([[*model.template.header_ids, *prompt.tokens, *greedy]])
        with torch.no_grad():
            logprobs = model.hf(input_ids=ids).logits[0, -len(greedy) - 1 :].log_softmax(-1)
        expected = list[tuple[float, list[int]]]()
        for place, token in enumerate(greedy):
            before = sum(float(logprobs[t, greedy[t]]) for t in range(place))
            for other, logprob in enumerate(logprobs[place].tolist()):
                if other != token and other not in model.template.stop_ids and before + logprob >= math.log(0.02):
                    expected.append((before + logprob, [*greedy[:place], other]))
        starts = [start for _, start in sorted(expected, key=lambda e: -e[0])[: most - 1]]
        assert [ids[: len(start)] for ids, start in zip(others, starts, strict=True)] == starts
        for reply in others:  # greedy behind the token that differs
            place = next(t for t, (a, b) in enumerate(zip(reply, greedy, strict=False)) if a != b)
            more = Prompt((*prompt.tokens, *reply[: place + 1]))
            assert generate(model, [more], {}, layout, **limits)[0].ids == reply[place + 1 :]
        some += len(others)
    assert some > 2


def test_a_sentence_without_a_question_is_not_asked_in_the_next_kind(model: FrozenModel, small: Collection) -> None:
    planner = make_planner(split_documents(model, small), READER, SelfStudy())
    first, second, *_ = planner.plan(0, History())
    assert first.pairs == second.pairs and first.seed_prompt != second.seed_prompt
    silent, last = Silent(), len(first.pairs) - 1
    silent.add(
        first, [("Nothing." if i == last else "Who is it?", True) for i in range(last + 1)] + [("Nothing.", True)]
    )
    assert silent.without(second).pairs == second.pairs[:-1]
    other = replace(second, source=split_documents(model, small)[first.document.id == small.documents[0].id])
    assert silent.without(other).pairs == other.pairs
    sampled = replace(second, likeliest=0)
    assert silent.without(sampled) is sampled


def test_most_rows_are_kept_and_nearly_all_facts_are_asked(
    model: FrozenModel, small: Collection, records: list[Record], new_store: Callable[..., Store]
) -> None:
    """Less waste than by sampling, and facts covered no worse; stopped after every unit, to the same conversations."""
    written: dict[str, int] = {}
    covered: dict[str, int] = {}
    for name, style in (("sampled", READER_SAMPLING), ("likeliest", READER)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(prompt_styles, "READER", style)
            found = synthesize(model, small, new_store(name))
        written[name] = len(found) + sum(found.dropped.values())
        answers = [(c, model.answer_text(c.answer.tolist())) for items in found.by_document.values() for c in items]
        covered[name] = sum(
            any(
                c.document == r.document.id and a.subject in c.question and exact_match(t, (a.answer,))
                for c, t in answers
            )
            for r in records
            for a in single(r)
        )
    facts = sum(len(list(single(r))) for r in records)
    assert len(found) >= 0.6 * written["likeliest"] and written["likeliest"] < written["sampled"] / 2
    assert covered["likeliest"] >= covered["sampled"] >= 0.7 * facts

    stopped, stops = new_store("stopped"), 0

    def stop(done: int, wanted: int) -> None:
        if len(list((stopped.folder / "conversations").glob("unit-*.parquet"))) > stops:
            raise KeyboardInterrupt

    while True:
        try:
            again = synthesize(model, small, stopped, progress=stop)
            break
        except KeyboardInterrupt:
            stops += 1
    assert stops == 2 and plain(again) == plain(found) and again.dropped == found.dropped
    assert recorded_settings(stopped.conversations)["writer"] == "likeliest"


def test_a_store_that_was_begun_with_samples_goes_on_with_them(
    model: FrozenModel, small: Collection, new_store: Callable[..., Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Units of both plans are never mixed: what an earlier version recorded decides."""
    options: dict[str, Any] = {"questions_per_call": 8, "calls_per_unit": 2, "kinds": ("question", "creative")}
    old, begun = new_store("old"), new_store("begun")

    def stop(*_: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(prompt_styles, "READER", READER_SAMPLING)
        whole = synthesize(model, small, old, **options)
        with pytest.raises(KeyboardInterrupt):
            synthesize(model, small, begun, progress=stop, **options)
    assert "writer" not in recorded_settings(old.conversations)
    assert len(list(begun.conversations.glob("unit-*"))) < len(list(old.conversations.glob("unit-*")))
    assert plain(synthesize(model, small, begun, **options)) == plain(whole)
    with monkeypatch.context() as patch:
        patch.setattr(Teacher, "converse", None)  # a finished one writes nothing
        assert plain(synthesize(model, small, old, **options)) == plain(whole)
    fresh = new_store("fresh")
    synthesize(model, small, fresh, **options)
    (begun.conversations / "unit-000000.parquet").write_bytes(
        (fresh.conversations / "unit-000000.parquet").read_bytes()
    )
    with pytest.raises(ConfigError, match="was made with another"):
        synthesize(model, small, begun, **options)
