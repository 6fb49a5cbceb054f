"""The decoding engine: against a slow loop that recomputes everything, against plain transformers, and one by one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from conftest import KINDS, TEXTS, WINDOW, tiny_cartridges, tiny_hf, tiny_tokenizer
from torch import Tensor

from cas.model.attention import Batch, Reference, packed_positions
from cas.model.decoding import Decoding, Prompt, Waiting, generate, log_likelihood
from cas.model.frozen import FrozenModel, Source
from cas.model.positions import Layout, Positions

POLICIES: tuple[Positions, ...] = ("fixed", "offset", "sequential")
SIZES = {"a": 16, "b": 48, "c": 32}
SPAN = 48


def prompt(model: FrozenModel, question: str, *cartridges: str) -> Prompt:
    template = model.template
    return Prompt((*template.footer_ids, *model.encode(question), *template.suffix_ids), cartridges)


def prompts(model: FrozenModel) -> list[Prompt]:
    """Mixed lengths and mixed prefixes, none among them."""
    return [
        prompt(model, "Which valve is red?", "a"),
        prompt(model, "When does the ferry leave, and how many cars does she carry?", "b", "a"),
        prompt(model, "Why?"),
        prompt(model, "Where does the tide table hang?", "c", "a", "b"),
        prompt(model, "How much?", "a"),
        prompt(model, TEXTS["lamp"] + " What colour is the lamp?"),
        prompt(model, "And now?", "c"),
    ]


@torch.no_grad()
def reference_logits(
    model: FrozenModel, tokens: Sequence[int], seen: tuple[str, ...], cartridges: Mapping[str, Tensor], layout: Layout
) -> Tensor:
    """Logits [T, vocabulary] of one prompt, everything computed anew."""
    batch = Batch((len(tokens),), (seen,))
    context = Reference(batch, model.header_kv, cartridges, layout, model.rope)
    positions = packed_positions(batch, {name: kv.shape[3] for name, kv in cartridges.items()}, layout)
    return model.forward(torch.tensor([list(tokens)]), positions, context)[0].float()


def slow_greedy(
    model: FrozenModel, item: Prompt, cartridges: Mapping[str, Tensor], layout: Layout, max_new_tokens: int
) -> list[int]:
    ids: list[int] = []
    for _ in range(max_new_tokens):
        token = int(reference_logits(model, [*item.tokens, *ids], item.cartridges, cartridges, layout)[-1].argmax())
        if token in model.template.stop_ids:
            break
        ids.append(token)
    return ids


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("policy", POLICIES)
def test_greedy_decoding_equals_recomputing_everything(
    kind: str, policy: Any, tiny: Callable[..., FrozenModel]
) -> None:
    """In one batch of mixed prefixes and lengths; the windows of sliding layers are shorter than any prefix."""
    model = tiny(kind)
    assert all(window is None or window == WINDOW < SPAN for window in model.geometry.windows)
    cartridges, layout = tiny_cartridges(model, SIZES), Layout(policy, model.layout_header, SPAN)
    items = prompts(model)
    results = generate(model, items, cartridges, layout, max_new_tokens=30)
    truth = [slow_greedy(model, item, cartridges, layout, 30) for item in items]
    assert [result.ids for result in results] == truth
    assert [result.finished for result in results] == [len(ids) < 30 for ids in truth]
    assert len({tuple(ids) for ids in truth}) == len(items)  # the prompts differ, and so do the answers


@pytest.mark.parametrize("kind", KINDS)
def test_batches_equal_one_by_one(kind: str, tiny: Callable[..., FrozenModel]) -> None:
    model = tiny(kind)
    cartridges, layout = tiny_cartridges(model, SIZES), Layout("sequential", model.layout_header, SPAN)
    items = prompts(model) * 3
    together = [result.ids for result in generate(model, items, cartridges, layout, max_new_tokens=12)]
    alone = [generate(model, [item], cartridges, layout, max_new_tokens=12)[0].ids for item in items[:7]]
    assert together == alone * 3
    # However the prompts are dealt out to batches.
    settings: list[dict[str, Any]] = [{"batch_rows": 2}, {"batch_positions": 300}, {"batch_positions": 1}]
    for limits in settings:
        dealt = generate(model, items, cartridges, layout, max_new_tokens=12, **limits)
        assert [result.ids for result in dealt] == together
    assert generate(model, [], cartridges, layout, max_new_tokens=12) == []


def test_a_prefix_that_a_batch_shares_is_counted_once() -> None:
    def counts(prompts: list[Prompt], positions: int) -> list[int]:
        waiting, counts = Waiting(prompts, {"a": 1000, "b": 1000}, 10, positions, rows=64), []
        while waiting:
            counts.append(len(waiting.take()))
        return counts

    assert counts([Prompt((1,) * 10, ("a",))] * 50, 1400) == [20, 20, 10]
    mixed = [Prompt((1,) * 10, (name,)) for name in "ab"]
    assert counts(mixed, 2039) == [1, 1]
    assert counts(mixed, 2040) == [2]


def test_rows_stop_early_and_leave_the_batch(tiny: Callable[..., FrozenModel]) -> None:
    model = tiny("llama")
    cartridges, layout = tiny_cartridges(model, SIZES), Layout("fixed", model.layout_header, SPAN)
    items = prompts(model)
    free = [result.ids for result in generate(model, items, cartridges, layout, max_new_tokens=16)]
    long = [ids for ids in free if len(ids) > 9]
    stops = frozenset({long[0][3], long[1][8]})  # made to stop where these two answers are
    seen: dict[int, list[int]] = {}
    results = generate(
        model, items, cartridges, layout, max_new_tokens=16, also_stop=stops, keep_top=2,
        on_token=lambda i, token: seen.setdefault(i, []).append(token),
    )  # fmt: skip
    for i, (result, ids) in enumerate(zip(results, free, strict=True)):
        cut = next((n for n, token in enumerate(ids) if token in stops), None)
        assert result.ids == ids[:cut] == seen.get(i, [])
        assert result.finished == (cut is not None or len(ids) < 16)
        # What ended the turn has its probabilities, too.
        assert len(result.top_ids) == len(result.top_logprobs) == len(result.ids) + result.finished
    assert len({len(result.ids) for result in results}) > 2


def test_the_most_likely_tokens_are_kept(tiny: Callable[..., FrozenModel]) -> None:
    model = tiny("gemma3")
    cartridges, layout = tiny_cartridges(model, SIZES), Layout("offset", model.layout_header, SPAN)
    items = prompts(model)
    for item, result in zip(
        items, generate(model, items, cartridges, layout, max_new_tokens=6, keep_top=5), strict=True
    ):
        logits = reference_logits(model, [*item.tokens, *result.ids], item.cartridges, cartridges, layout)
        rows = logits[len(item.tokens) - 1 :].log_softmax(-1)[: len(result.top_ids)]
        kept_ids, kept = torch.stack(result.top_ids), torch.stack(result.top_logprobs)
        assert kept_ids.dtype == torch.int32 and kept_ids.shape == kept.shape == (len(rows), 5)
        torch.testing.assert_close(kept, rows.topk(5, dim=-1).values, atol=1e-4, rtol=0)
        torch.testing.assert_close(kept, rows.gather(1, kept_ids.long()), atol=1e-4, rtol=0)
        assert [int(ids[0]) for ids in result.top_ids][: len(result.ids)] == result.ids


def test_sampling_is_reproducible_by_seed(tiny: Callable[..., FrozenModel]) -> None:
    model = tiny("llama")
    cartridges, layout = tiny_cartridges(model, SIZES), Layout("fixed", model.layout_header, SPAN)
    items = prompts(model)

    def sample(seed: int, temperature: float = 1.0) -> list[list[int]]:
        torch.manual_seed(int(torch.randint(1 << 30, (1,))))  # the global generator plays no part
        results = generate(model, items, cartridges, layout, max_new_tokens=10, temperature=temperature, seed=seed)
        return [result.ids for result in results]

    greedy = [result.ids for result in generate(model, items, cartridges, layout, max_new_tokens=10)]
    assert sample(1) == sample(1)
    assert sample(1) != sample(2) and sample(1) != greedy
    assert sample(1, temperature=1e-4) == greedy
    # Greedy rows in the same batch change no random number of the sampled ones.
    mixed = generate(
        model,
        items * 2,
        cartridges,
        layout,
        max_new_tokens=10,
        temperature=[0.0] * len(items) + [1.0] * len(items),
        seed=1,
    )
    assert [result.ids for result in mixed] == greedy + sample(1)


def test_sampling_follows_the_temperature(tiny: Callable[..., FrozenModel]) -> None:
    """First tokens of many equal prompts are distributed as softmax(logits / temperature)."""
    model = tiny("llama")
    cartridges, layout = tiny_cartridges(model, {"a": 16}), Layout("fixed", model.layout_header, 16)
    item = prompt(model, "Which?", "a")
    many: dict[str, Any] = {"temperature": 0.5, "batch_rows": 2000, "batch_positions": 10**6}
    results = generate(model, [item] * 2000, cartridges, layout, max_new_tokens=1, **many)
    logits = reference_logits(model, item.tokens, item.cartridges, cartridges, layout)[-1]
    expected = (logits / 0.5).softmax(-1)
    drawn = torch.zeros(384)
    for result in results:
        drawn[result.ids[0] if result.ids else 2] += 1 / 2000
    assert (drawn - expected).abs().sum() / 2 < 0.15  # total variation; at temperature 1 it is far from that
    assert (drawn - logits.softmax(-1)).abs().sum() / 2 > 0.2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("policy", POLICIES)
def test_log_likelihood_equals_log_softmax(kind: str, policy: Any, tiny: Callable[..., FrozenModel]) -> None:
    model = tiny(kind)
    cartridges, layout = tiny_cartridges(model, SIZES), Layout(policy, model.layout_header, SPAN)
    items = prompts(model)
    texts = ["nine tonnes", "at seven in the morning, with forty cars", "x", "green", "the red valve", "in May", "no"]
    answers = [[*model.encode(text), *model.template.end_ids] for text in texts]
    answers[2] = answers[2][:1]  # a single token: only the prompt is read
    values = log_likelihood(model, items, answers, cartridges, layout)
    expected = []
    for item, answer in zip(items, answers, strict=True):
        logits = reference_logits(model, [*item.tokens, *answer], item.cartridges, cartridges, layout).log_softmax(-1)
        scores = [float(logits[len(item.tokens) - 1 + n, token]) for n, token in enumerate(answer)]
        expected.append(sum(scores) / len(scores))
    assert values == pytest.approx(expected, abs=1e-4)
    assert log_likelihood(model, items, answers, cartridges, layout, batch_rows=2) == pytest.approx(expected, abs=1e-4)


class Eager:
    """Attention as in the Reference, which also keeps the weights of the last token on every key of one conversation."""

    def __init__(self, reference: Reference) -> None:
        self.reference = reference
        self.weights: list[Tensor] = []

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
        r = self.reference
        keys, positions = [r.header[layer, 0]], [torch.arange(r.layout.header)]
        sizes = [r.cartridges[name].shape[3] for name in r.batch.visible[0]]
        for name, shift in zip(r.batch.visible[0], r.layout.shifts(sizes), strict=True):
            kv = r.cartridges[name][layer, 0]
            keys.append(r.rope.shift(kv, torch.full((kv.shape[1],), shift), layer))
            positions.append(torch.arange(kv.shape[1]) + r.layout.header + shift)
        own = torch.arange(query.shape[2]) + r.layout.token_start(sizes)
        k = torch.cat([*keys, key[0]], dim=1).repeat_interleave(query.shape[1] // key.shape[1], 0)
        distance = own[-1] - torch.cat([*positions, own])
        hidden = (distance < 0) | (distance >= (window or 10**9))
        scores = (query[0, :, -1:] @ k.transpose(1, 2))[:, 0] * scale  # [Q, S + T]
        self.weights.append(scores.masked_fill(hidden, -torch.inf).softmax(-1).mean(0))
        return r.attend(layer, query, key, value, scale, window)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("policy", POLICIES)
@torch.no_grad()
def test_attention_shares_equal_an_eager_computation(kind: str, policy: Any, tiny: Callable[..., FrozenModel]) -> None:
    model = tiny(kind)
    cartridges, layout = tiny_cartridges(model, SIZES), Layout(policy, model.layout_header, SPAN)
    items = prompts(model)
    results = generate(model, items, cartridges, layout, max_new_tokens=6, watch=True)
    for item, result in zip(items, results, strict=True):
        steps = []
        # The tokens that were read in decoding steps: all but the last, or all where a stop token followed.
        for n in range(1, len(result.ids) + result.finished):
            tokens = [*item.tokens, *result.ids[:n]]
            batch = Batch((len(tokens),), (item.cartridges,))
            eager = Eager(Reference(batch, model.header_kv, cartridges, layout, model.rope))
            model.forward(torch.tensor([tokens]), packed_positions(batch, SIZES, layout), eager)
            steps.append(torch.stack(eager.weights).mean(0))
        assert steps, "an answer of one token says nothing here"
        mean, at = torch.stack(steps_equal_width(steps)).mean(0), model.layout_header
        assert 0 <= sum(result.attention.values()) <= 1 + 1e-5
        for name in item.cartridges:
            assert result.attention[name] == pytest.approx(float(mean[at : at + SIZES[name]].sum()), abs=1e-4)
            at += SIZES[name]
        # Cartridges that only other rows of the batch see.
        assert all(share == 0 for name, share in result.attention.items() if name not in item.cartridges)
    # The same when rows join others that are under way.
    for result, refilled in zip(
        results, generate(model, items, cartridges, layout, max_new_tokens=6, watch=True, batch_rows=3), strict=True
    ):
        assert refilled.ids == result.ids and refilled.attention == pytest.approx(result.attention, abs=1e-5)
    unwatched = generate(model, items, cartridges, layout, max_new_tokens=3)
    assert all(result.attention == {} and result.top_ids == [] for result in unwatched)


def steps_equal_width(steps: list[Tensor]) -> list[Tensor]:
    """The weights on the prefix, which all steps share."""
    return [step[: min(map(len, steps))] for step in steps]


def test_a_prompt_without_cartridges_is_an_ordinary_prompt(tiny: Callable[..., FrozenModel]) -> None:
    """The text arms: header and tokens as plain text through plain transformers, whatever the policy."""
    model = tiny("llama")
    item = prompt(model, TEXTS["crane"])
    whole = torch.tensor([[*model.template.header_ids, *item.tokens]])
    output = model.hf.generate(whole, attention_mask=torch.ones_like(whole), do_sample=False, max_new_tokens=12)
    truth = output[0, whole.shape[1] :].tolist()
    for policy in POLICIES:
        result = generate(model, [item], {}, Layout(policy, model.layout_header, SPAN), max_new_tokens=12)[0]
        assert truth[: len(result.ids)] == result.ids and len(truth) == len(result.ids) + result.finished


def test_bfloat16_decoding_is_near_float32() -> None:
    hf, half = tiny_hf("llama", initializer_range=0.1), tiny_hf("llama", initializer_range=0.1).to(torch.bfloat16)
    full, rough = (FrozenModel(m, tiny_tokenizer(), Source("folder", "tiny")) for m in (hf, half))
    cartridges, layout = tiny_cartridges(full, SIZES), Layout("sequential", full.layout_header, SPAN)
    answers = [model_answer.ids for model_answer in generate(full, prompts(full), cartridges, layout, max_new_tokens=8)]
    answers = [ids or [5] for ids in answers]
    expected = log_likelihood(full, prompts(full), answers, cartridges, layout)
    assert log_likelihood(rough, prompts(rough), answers, cartridges, layout) == pytest.approx(expected, abs=0.05)
    assert len(generate(rough, prompts(rough), cartridges, layout, max_new_tokens=8)) == len(answers)


def test_decoding_reads_one_shared_prefix_in_place(tiny: Callable[..., FrozenModel]) -> None:
    """Rows with the same prefix hold it once, whatever other rows are in the batch."""
    model = tiny("llama")
    cartridges, layout = tiny_cartridges(model, SIZES), Layout("fixed", model.layout_header, SPAN)
    same = [prompt(model, text, "a", "b") for text in ("Which?", "Why is that so?", "Who?")]
    assert Decoding(model, dict(enumerate(same)), cartridges, layout, room=4).prefix.layers[0][0].shape[0] == 1
    mixed = [*same, *(prompt(model, text, "c") for text in ("When?", "How?", "Where?"))]
    assert Decoding(model, dict(enumerate(mixed)), cartridges, layout, room=4).prefix.layers[0][0].shape[0] == 2
