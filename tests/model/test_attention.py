"""Attention with cartridges: equal to plain prefill, independent of order, and every fast path equal to the slow one."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import KINDS, TEXTS, WINDOW, tiny_cartridges, tiny_hf, tiny_tokenizer
from torch import Tensor

from cas.model.attention import Batch, Reference, causal_mask, packed_positions
from cas.model.attention_cpu import CpuAttention
from cas.model.attention_gpu import GpuAttention
from cas.model.decoding import Decoding, Prompt
from cas.model.frozen import FrozenModel, Source
from cas.model.positions import Layout, Positions

POLICIES: tuple[Positions, ...] = ("fixed", "offset", "sequential")
QUESTION = "Which valve is red, and when is it opened?"


def packed(
    path: str, model: FrozenModel, batch: Batch, ids: Tensor, cartridges: Mapping[str, Tensor], layout: Layout
) -> Tensor:
    """Logits [sum T, vocabulary] of a packed batch by one of the paths."""
    header = model.header_kv
    context: Any
    if path == "reference":
        context = Reference(batch, header, cartridges, layout, model.rope)
    elif path == "flex":
        context = GpuAttention(batch, header, cartridges, layout, model.dtype, block=16)
    else:
        context = CpuAttention(batch, header, cartridges, layout, model.rope, model.dtype)
    positions = packed_positions(batch, {name: kv.shape[3] for name, kv in cartridges.items()}, layout)
    return model.forward(ids, positions, context)[0].float()


def decoded(model: FrozenModel, prompts: list[Prompt], cartridges: Mapping[str, Tensor], layout: Layout) -> Tensor:
    """Next-token logits [B, vocabulary] by the decoding engine."""
    return Decoding(model, dict(enumerate(prompts)), cartridges, layout, room=1).prefill().float()


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> bool:
    """Whether two tensors agree to a share of the largest number in them."""
    return bool((a - b).abs().max() <= tolerance * b.abs().max())


def conversations(seed: int = 0) -> tuple[Batch, Tensor]:
    """Six conversations of mixed length, each with its own visible cartridges of ``SIZES``; ids [1, sum T]."""
    visible = (("a",), ("c", "a"), ("b",), ("a", "b", "c", "d"), ("d", "b"), ("c",))
    batch = Batch((9, 4, 31, 1, 17, 26), visible)
    ids = torch.randint(3, 384, (1, sum(batch.lengths)), generator=torch.Generator().manual_seed(seed))
    return batch, ids


@pytest.fixture(autouse=True)
def flex_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlexAttention has no kernel for gradients on a CPU and refuses; its plain formula, which it keeps for debugging, has them."""
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *_: None)
    monkeypatch.setattr("torch.nn.attention.flex_attention._warn_once", lambda *_, **__: None)


SIZES = {"a": 16, "b": 48, "c": 32, "d": 7, "unseen": 16}
SPAN = 48


def paths(policy: str) -> tuple[str, ...]:
    return ("merged",) if policy == "sequential" else ("merged", "flex")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("policy", POLICIES)
def test_a_whole_document_as_cartridge_equals_its_prefill(
    kind: str, policy: Any, tiny: Callable[..., FrozenModel]
) -> None:
    model = tiny(kind)
    header, document = list(model.template.header_ids), model.encode(TEXTS["pump"])
    question = [*model.template.footer_ids, *model.encode(QUESTION), *model.template.suffix_ids]
    kv = model.prefill(header + document)[:, :, :, len(header) :]
    # `fixed` places tokens behind the span, so it equals plain text where the cartridge fills it.
    layout = Layout(policy, len(header), span=len(document))
    with torch.no_grad():
        truth = model.hf(input_ids=torch.tensor([header + document + question])).logits[0, -len(question) :]
        batch = Batch((len(question),), (("pump",),))
        for path in ("reference", *paths(policy)):
            logits = packed(path, model, batch, torch.tensor([question]), {"pump": kv}, layout)
            torch.testing.assert_close(logits, truth, atol=1e-4, rtol=0)
        logits = decoded(model, [Prompt(tuple(question), ("pump",))], {"pump": kv}, layout)
        torch.testing.assert_close(logits[0], truth[-1], atol=1e-4, rtol=0)
        # The test could fail: the same question without the document gives other logits.
        without = decoded(model, [Prompt(tuple(question))], {}, layout)
        assert (without[0] - truth[-1]).abs().max() > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_a_prefill_cut_in_two_composes_to_the_whole(kind: str, tiny: Callable[..., FrozenModel]) -> None:
    model = tiny(kind)
    header, document = list(model.template.header_ids), model.encode(TEXTS["ferry"])
    question = model.encode(QUESTION)
    kv, cut = model.prefill(header + document)[:, :, :, len(header) :], 19
    first, second = kv[:, :, :, :cut], kv[:, :, :, cut:].clone()
    for layer in range(model.geometry.layers):  # back to where a cartridge is stored: directly behind the header
        by = torch.full((second.shape[3],), -cut)
        second[layer, 0] = model.rope.shift(second[layer, 0], by, layer)
    cartridges = {"first": first, "second": second}
    layout = Layout("sequential", len(header), span=64)
    with torch.no_grad():
        truth = model.hf(input_ids=torch.tensor([header + document + question])).logits[0, -len(question) :]
        batch = Batch((len(question),), (("first", "second"),))
        for path in ("reference", "merged"):
            logits = packed(path, model, batch, torch.tensor([question]), cartridges, layout)
            torch.testing.assert_close(logits, truth, atol=1e-4, rtol=0)
        logits = decoded(model, [Prompt(tuple(question), ("first", "second"))], cartridges, layout)
        torch.testing.assert_close(logits[0], truth[-1], atol=1e-4, rtol=0)
        swapped = decoded(model, [Prompt(tuple(question), ("second", "first"))], cartridges, layout)
        assert (swapped[0] - truth[-1]).abs().max() > 1e-2  # here the order is part of the text


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("policy", ["fixed", "offset"])
@torch.no_grad()
def test_the_order_of_loading_does_not_matter(kind: str, policy: Any, tiny: Callable[..., FrozenModel]) -> None:
    model = tiny(kind)
    cartridges = tiny_cartridges(model, {"a": 16, "b": 48, "c": 32})
    layout = Layout(policy, model.layout_header, SPAN)
    ids = torch.tensor([model.encode(QUESTION)])
    orders = list(itertools.permutations(cartridges))
    for path in ("reference", "merged", "flex"):
        results = [packed(path, model, Batch((ids.shape[1],), (order,)), ids, cartridges, layout) for order in orders]
        assert all(close(result, results[0]) for result in results[1:])
        # Nor does the order in which the pool holds them.
        shuffled = {name: cartridges[name] for name in ("c", "a", "b")}
        assert close(packed(path, model, Batch((ids.shape[1],), (orders[0],)), ids, shuffled, layout), results[0])
    tokens = tuple(ids[0].tolist())
    results = [decoded(model, [Prompt(tokens, order)], cartridges, layout) for order in orders]
    assert all(close(result, results[0]) for result in results[1:])


@pytest.mark.parametrize("learner", [None, ("a", "c", "b", "a", "d", "c")], ids=["all-learn", "own-learns"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("policy", POLICIES)
def test_fast_paths_equal_the_reference(
    kind: str, policy: Any, learner: tuple[str, ...] | None, tiny: Callable[..., FrozenModel]
) -> None:
    """Outputs, and gradients of every cartridge, over mixed lengths, visible sets and sizes; from all conversations
    that see it, or from its own: next to each other in the pack, with others in between, or with another shift."""
    model = tiny(kind)
    batch, ids = conversations()
    batch = replace(batch, learner=learner)
    layout = Layout(policy, model.layout_header, SPAN)
    values = tiny_cartridges(model, SIZES)
    weights = torch.randn(ids.shape[1], 384, generator=torch.Generator().manual_seed(1))
    outputs: dict[str, Tensor] = {}
    gradients: dict[str, dict[str, Any]] = {}
    for path in ("reference", *paths(policy)):
        leaves = {name: kv.clone().requires_grad_() for name, kv in values.items()}
        logits = packed(path, model, batch, ids, leaves, layout)
        (logits.log_softmax(-1) * weights).mean().backward()
        outputs[path], gradients[path] = logits.detach(), {name: leaf.grad for name, leaf in leaves.items()}
    for path in paths(policy):
        assert close(outputs[path], outputs["reference"])
        for name in ("a", "b", "c", "d"):
            mine, truth = gradients[path][name], gradients["reference"][name]
            assert close(mine, truth, 1e-4)
            # Of mistral's layers, all slide, and the window hides short cartridges behind a long gap.
            assert truth.abs().max() > 0 or (kind == "mistral" and SIZES[name] < 48)
        unseen = gradients[path]["unseen"]
        assert unseen is None or not unseen.any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("policy", POLICIES)
def test_only_own_conversations_give_a_gradient(kind: str, policy: Any, tiny: Callable[..., FrozenModel]) -> None:
    """Exactly: what a cartridge's distractor role adds to the loss moves it no bit, on every path."""
    model = tiny(kind)
    layout = Layout(policy, model.layout_header, SPAN)
    batch, ids = conversations()
    for path in ("reference", *paths(policy)):
        leaves = {name: kv.requires_grad_() for name, kv in tiny_cartridges(model, SIZES).items()}
        logits = packed(path, model, replace(batch, learner=("a", "c", "b", "a", "b", "c")), ids, leaves, layout)
        start = batch.starts()[3]  # sees a, b, c and d; teaches a
        logits[start : start + batch.lengths[3]].square().mean().backward()
        for name, leaf in leaves.items():
            learned = leaf.grad is not None and bool(leaf.grad.any())
            assert learned == (name == "a") or kind == "mistral"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("policy", POLICIES)
def test_bfloat16_is_near_the_reference(kind: str, policy: Any) -> None:
    # Small weights: with sharp attention the rounding of bfloat16 alone moves logits far.
    hf = tiny_hf(kind, initializer_range=0.1).to(torch.bfloat16)
    model = FrozenModel(hf, tiny_tokenizer(), Source("folder", "tiny"))
    batch, ids = conversations()
    layout = Layout(policy, model.layout_header, SPAN)
    values = tiny_cartridges(model, SIZES)
    outputs: dict[str, Tensor] = {}
    gradients: dict[str, Any] = {}
    for path in ("reference", *paths(policy)):
        leaves = {name: kv.clone().requires_grad_() for name, kv in values.items()}
        logits = packed(path, model, batch, ids, leaves, layout)
        logits.log_softmax(-1)[:, 7].mean().backward()
        outputs[path], gradients[path] = logits.detach(), leaves["b"].grad
    for path in paths(policy):
        assert gradients[path].dtype == torch.float32
        assert close(outputs[path], outputs["reference"], 0.05)
        assert torch.cosine_similarity(gradients[path].flatten(), gradients["reference"].flatten(), dim=0) > 0.98


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("policy", POLICIES)
def test_what_is_not_visible_changes_no_bit(kind: str, policy: Any, tiny: Callable[..., FrozenModel]) -> None:
    model = tiny(kind)
    batch, ids = conversations()
    layout = Layout(policy, model.layout_header, SPAN)
    values = tiny_cartridges(model, SIZES)
    changed = values | {"unseen": 5 * torch.randn_like(values["unseen"])}
    for path in paths(policy):
        with torch.no_grad():
            before = packed(path, model, batch, ids, values, layout)
            assert torch.equal(before, packed(path, model, batch, ids, changed, layout))
            # A cartridge that some conversations see: to the bit the same in the others.
            after = packed(path, model, batch, ids, values | {"d": 2 * values["d"]}, layout)
        for start, length, seen in zip(batch.starts(), batch.lengths, batch.visible, strict=True):
            own = slice(start, start + length)
            if "d" not in seen:
                assert torch.equal(before[own], after[own])
            elif kind != "mistral":  # whose windows are too short to see d from here
                assert not torch.equal(before[own], after[own])
        # The gradient of a conversation's logits is exactly zero in what it does not see.
        leaves = {name: kv.clone().requires_grad_() for name, kv in values.items()}
        logits = packed(path, model, batch, ids, leaves, layout)
        start = batch.starts()[1]  # sees c and a
        logits[start : start + batch.lengths[1]].square().mean().backward()
        for name in ("b", "d", "unseen"):
            grad = leaves[name].grad
            assert grad is None or not grad.any()
        assert leaves["c"].grad is not None and (leaves["c"].grad.any() or kind == "mistral")


@pytest.mark.parametrize("policy", ["fixed", "offset"])
@pytest.mark.parametrize("block", [16, 32])
@pytest.mark.parametrize("learner", [None, ("a", "c", "b", "a", "d", "c", "b")], ids=["all-learn", "own-learns"])
def test_flex_blocks_are_those_that_the_mask_fills(
    block: int, policy: Any, learner: tuple[str, ...] | None, tiny: Callable[..., FrozenModel]
) -> None:
    """On a GPU blocks are skipped or not masked at all by these alone; the plain formula on a CPU never looks at them."""
    from torch.nn.attention.flex_attention import create_mask

    model = tiny("llama")
    batch, _ = conversations()
    long = Batch((*batch.lengths, 100), (*batch.visible, ("b", "d")), learner)
    context = GpuAttention(
        long,
        model.header_kv,
        {name: kv.requires_grad_(name != "c") for name, kv in tiny_cartridges(model, SIZES).items()},
        Layout(policy, model.layout_header, SPAN),
        model.dtype,
        block,
    )
    # Of the cartridges that learn, a, b and d are distractors too: once more, without a copy of their values.
    twice = 0 if learner is None else 3
    assert [len(part) for part in context.prefix] == [model.geometry.layers] * (1 + len(SIZES) + twice)
    assert len({part[0].untyped_storage().data_ptr() for part in context.prefix}) == 1 + len(SIZES)
    for window in (None, 40):
        mask = context.mask(window)
        size = (context.tokens, context.start + context.tokens)
        assert size[0] % block == size[1] % block == 0
        dense = create_mask(mask.mask_mod, 1, 1, *size, device="cpu")[0, 0]
        assert dense.any(1).all()
        cells = dense.view(size[0] // block, block, size[1] // block, block).transpose(1, 2).flatten(2)
        found = torch.zeros(2, *cells.shape[:2], dtype=torch.bool)
        for kind, (counts, places) in enumerate(
            [(mask.kv_num_blocks, mask.kv_indices), (mask.full_kv_num_blocks, mask.full_kv_indices)]
        ):
            for row, count in enumerate(counts[0, 0].tolist()):
                found[kind, row, places[0, 0, row, :count].long()] = True
        some, whole = found
        assert not (some & whole).any()
        if window is None:
            assert torch.equal(some | whole, cells.any(2)) and torch.equal(whole, cells.all(2))
            assert whole.any() and some.any() and not (some | whole).all()
        else:
            assert not whole.any() and not (cells.any(2) & ~some).any()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_flex_equals_the_reference_and_is_compiled_once(dtype: torch.dtype) -> None:
    from torch._dynamo.utils import counters

    hf = tiny_hf("llama", initializer_range=0.1, head_dim=16).to("cuda", dtype)
    model = FrozenModel(hf, tiny_tokenizer(), Source("folder", "tiny"))
    layout = Layout("fixed", model.layout_header, SPAN)
    values = {name: kv.cuda() for name, kv in tiny_cartridges(model, SIZES).items()}
    graphs = []
    for seed in range(6):
        batch, ids = conversations(seed)
        learner = (None, ("a", "c", "b", "b", "d", "c"))[seed % 2]
        batch = Batch((*batch.lengths[:-1], 26 + 150 * seed), batch.visible, learner)
        ids = torch.randint(3, 384, (1, sum(batch.lengths)), generator=torch.Generator().manual_seed(seed))
        if seed % 2:
            values["unseen"] = values["unseen"].repeat_interleave(10, dim=3)[:, :, :, : 16 * (seed + 1)]
        sizes = {name: kv.shape[3] for name, kv in values.items()}
        found = {}
        for path in (Reference, GpuAttention):
            leaves = {name: kv.clone().requires_grad_() for name, kv in values.items()}
            last: Any = model.rope if path is Reference else model.dtype
            context = path(batch, model.header_kv, leaves, layout, last)
            positions = packed_positions(batch, sizes, layout)
            logits = model.forward(ids, positions, context)[0].float()
            logits.log_softmax(-1)[:, 7].mean().backward()
            found[path] = logits.detach(), leaves["b"].grad
        (mine, my_grad), (truth, grad) = found[GpuAttention], found[Reference]
        assert close(mine, truth, 1e-2 if dtype == torch.float32 else 0.05)  # TF32 in the kernel
        assert my_grad is not None and grad is not None
        assert torch.cosine_similarity(my_grad.flatten(), grad.flatten(), dim=0) > 0.98
        graphs.append(counters["stats"]["unique_graphs"])
    assert len(set(graphs[2:])) == 1


@pytest.mark.parametrize("factor", [1.0, 100.0])
def test_scores_far_above_those_of_the_header(factor: float, tiny: Callable[..., FrozenModel]) -> None:
    """Exponentials relative to the header's scores would be infinite in some rows: these get their true maximum."""
    model = tiny("llama")
    layout = Layout("fixed", model.layout_header, SPAN)
    values = tiny_cartridges(model, {"a": 16, "b": 32})
    values["a"][:, 0] *= factor
    batch, generator = Batch((9, 4, 31), (("a",), ("b",), ("a", "b"))), torch.Generator().manual_seed(0)
    query = torch.randn(1, 4, 44, 12, generator=generator)
    key, value = torch.randn(2, 1, 2, 44, 12, generator=generator)
    found: list[list[Tensor]] = []
    for path in (CpuAttention, Reference):
        inputs = [x.clone().requires_grad_() for x in (query, key, value, values["a"], values["b"])]
        cartridges = {"a": inputs[3], "b": inputs[4]}
        more: Any = (model.dtype,) if path is CpuAttention else ()
        context: Any = path(batch, model.header_kv, cartridges, layout, model.rope, *more)
        out = context.attend(0, *inputs[:3], 1.0, None)
        out.square().sum().backward()
        found.append([out.detach(), *(x.grad for x in inputs if x.grad is not None)])
    scores = (query[0, :2, :9] @ values["a"][0, 0, 0].T).amax() - (query[0, :2] @ model.header_kv[0, 0, 0].T).amax()
    assert (scores > 89) == (factor == 100)  # e^89 is no float32
    assert len(found[0]) == len(found[1]) == 6
    for mine, truth in zip(*found, strict=True):
        assert close(mine, truth, 1e-4)


def test_gradients_are_the_same_bits_every_time(tiny: Callable[..., FrozenModel]) -> None:
    """Many conversations read one cartridge: their gradients must be added up in one fixed order, threads or not."""
    model = tiny("llama")
    layout = Layout("fixed", model.layout_header, SPAN)
    a = tiny_cartridges(model, {"a": 48})["a"]
    batch, generator = Batch((40,) * 48, (("a",),) * 48), torch.Generator().manual_seed(0)
    query = torch.randn(1, 4, 40 * 48, 12, generator=generator)
    key, value = torch.randn(2, 1, 2, 40 * 48, 12, generator=generator)
    gradients: list[Any] = []
    torch.set_num_threads(2)
    try:
        for _ in range(5):
            leaf = a.clone().requires_grad_()
            context = CpuAttention(batch, model.header_kv, {"a": leaf}, layout, model.rope, model.dtype)
            context.attend(0, query, key, value, 1.0, None).square().sum().backward()
            gradients.append(leaf.grad)
    finally:
        torch.set_num_threads(1)
    assert gradients[0].any() and all(torch.equal(gradient, gradients[0]) for gradient in gradients)


def test_causal_mask_with_and_without_window() -> None:
    queries, keys = torch.tensor([2, 5]), torch.tensor([0, 1, 2, 3, 5, 6])
    assert causal_mask(queries, keys, None).int().tolist() == [[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0]]
    assert causal_mask(queries, keys, 3).int().tolist() == [[1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 0]]
    assert causal_mask(queries, keys, 1).int().tolist() == [[0, 0, 1, 0, 0, 0], [0, 0, 0, 0, 1, 0]]


def test_packed_positions_follow_the_layout() -> None:
    batch, sizes = Batch((2, 3), (("a",), ("a", "b"))), {"a": 16, "b": 32}
    assert batch.starts() == [0, 2]
    assert packed_positions(batch, sizes, Layout("fixed", 5, 48)).tolist() == [[53, 54, 53, 54, 55]]
    assert packed_positions(batch, sizes, Layout("offset", 5, 48)).tolist() == [[21, 22, 53, 54, 55]]
    assert packed_positions(batch, sizes, Layout("sequential", 5, 48)).tolist() == [[21, 22, 53, 54, 55]]


@pytest.mark.parametrize("kind", ["mistral", "gemma3"])
def test_the_window_hides_a_cartridge_that_lies_too_far_back(kind: str, tiny: Callable[..., FrozenModel]) -> None:
    """Through sliding layers alone the cartridge is out of sight; through a full layer it is seen at any distance."""
    model = tiny(kind)
    cartridges = tiny_cartridges(model, {"a": 16})
    ids = torch.randint(3, 384, (1, 1), generator=torch.Generator().manual_seed(0))
    outputs = []
    for a in (cartridges["a"], 2 * cartridges["a"]):
        # The token stands WINDOW places behind the last position of the cartridge: one too many.
        layout = Layout("fixed", model.layout_header, span=15 + WINDOW)
        with torch.no_grad():
            outputs.append(packed("merged", model, Batch((1,), (("a",),)), ids, {"a": a}, layout))
    assert torch.equal(*outputs) == (kind == "mistral")
