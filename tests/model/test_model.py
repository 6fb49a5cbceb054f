"""The frozen model: geometry, template, loading, refusals; and how a cartridge starts and is placed."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CHATML, KINDS, TEXTS, WINDOW, tiny_hf, tiny_model, tiny_tokenizer
from torch import Tensor

import cas.model.loading
from cas.errors import ConfigError, ModelError, UserError
from cas.model.attention import causal_mask
from cas.model.frozen import FrozenModel, Source
from cas.model.positions import Layout, Rope, cartridge_size
from cas.options import DEFAULT_SYSTEM
from cas.training.initialization import initialize

SOURCE = Source("folder", "tiny")


def one_line(error: pytest.ExceptionInfo[BaseException]) -> str:
    """The message, which must be a single line."""
    text = str(error.value)
    assert text and "\n" not in text
    return text


# -- geometry and forward -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "head_dim", "windows"),
    [
        ("llama", 12, (None, None, None)),
        ("qwen3", 16, (None, None, None)),
        ("mistral", 12, (WINDOW,) * 3),
        ("gemma3", 12, (WINDOW, None, WINDOW)),
    ],
)
def test_geometry_is_measured(kind: str, head_dim: int, windows: Any, tiny: Callable[..., FrozenModel]) -> None:
    model = tiny(kind)
    geometry = model.geometry
    assert (geometry.layers, geometry.query_heads, geometry.kv_heads, geometry.head_dim) == (3, 4, 2, head_dim)
    assert (geometry.hidden, geometry.vocabulary, geometry.max_positions) == (48, 384, 1024)
    assert geometry.windows == windows
    assert geometry.elements(16) == 3 * 2 * 2 * 16 * head_dim
    assert model.header_kv.shape == (3, 2, 2, model.layout_header, head_dim) and not model.header_kv.requires_grad
    assert model.layout_header == len(model.template.header_ids) > 10
    assert model.weight_bytes == 4 * sum(parameter.numel() for parameter in model.hf.parameters())
    assert not any(parameter.requires_grad for parameter in model.hf.parameters()) and not model.hf.training
    description = json.loads(json.dumps(model.describe()))
    assert description["fingerprint"] == model.fingerprint and description["dtype"] == "float32"
    assert description["source"] == {"kind": "folder", "name": f"tiny-{kind}", "revision": None}


def test_shared_weights_are_counted_once() -> None:
    tied = FrozenModel(tiny_hf("llama", tie_word_embeddings=True), tiny_tokenizer(), SOURCE)
    apart = FrozenModel(tiny_hf("llama"), tiny_tokenizer(), SOURCE)
    assert apart.weight_bytes - tied.weight_bytes == 4 * 384 * 48


def test_rotary_frequencies(tiny: Callable[..., FrozenModel]) -> None:
    def expected(base: float) -> Tensor:
        return base ** (-torch.arange(6) / 6)

    for frequency in tiny("llama").rope.frequencies:
        torch.testing.assert_close(frequency, expected(10_000.0))
    local, full, also_local = tiny("gemma3").rope.frequencies  # two bases in one model
    torch.testing.assert_close(local, expected(10_000.0))
    torch.testing.assert_close(full, expected(1_000_000.0))
    assert torch.equal(local, also_local)
    assert tiny("gemma3").rope_fingerprint != tiny("llama").rope_fingerprint == tiny("mistral").rope_fingerprint


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_prefill_equals_the_cache_of_transformers(kind: str, tiny: Callable[..., FrozenModel]) -> None:
    model = tiny(kind)
    ids = model.encode(TEXTS["crane"])[: WINDOW - 1]  # a longer text would leave the sliding layers' caches
    cache = model.hf(input_ids=torch.tensor([ids]), use_cache=True).past_key_values
    kv = model.prefill(ids)
    assert kv.shape == (3, 2, 2, len(ids), model.geometry.head_dim)
    for layer, mine in zip(cache.layers, kv, strict=True):
        torch.testing.assert_close(mine[0], layer.keys[0], atol=1e-5, rtol=0)
        torch.testing.assert_close(mine[1], layer.values[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_forward_returns_the_wanted_rows(kind: str, tiny: Callable[..., FrozenModel]) -> None:
    """Longer than the window, against the model's own masks."""
    model = tiny(kind)
    ids = torch.tensor([model.encode(TEXTS["crane"])])
    positions = torch.arange(ids.shape[1])[None]
    truth = model.hf(input_ids=ids).logits
    plain = Plain()
    every = model.forward(ids, positions, plain)
    torch.testing.assert_close(every, truth, atol=1e-4, rtol=0)
    torch.testing.assert_close(model.forward(ids, positions, plain, rows=3), truth[:, -3:], atol=1e-4, rtol=0)
    rows = torch.tensor([2, 11, 40])
    torch.testing.assert_close(model.forward(ids, positions, plain, rows=rows), truth[:, rows], atol=1e-4, rtol=0)
    assert len(plain.keys) == 3


def test_forward_leaves_the_model_as_it_was() -> None:
    model = FrozenModel(tiny_hf("llama"), tiny_tokenizer(), SOURCE)
    ids = torch.tensor([[5, 6, 7]])
    before = model.hf(input_ids=ids).logits
    assert model.hf.config._attn_implementation == "sdpa"

    class Broken:
        def attend(self, *args: Any) -> Tensor:
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        model.forward(ids, torch.arange(3)[None], Broken())
    assert model.hf.config._attn_implementation == "sdpa"
    assert torch.equal(model.hf(input_ids=ids).logits, before)


def test_threads_share_a_model(tiny: Callable[..., FrozenModel]) -> None:
    """While one is inside a layer of ours, another runs plain transformers, and one a forward pass of ours."""
    from concurrent.futures import ThreadPoolExecutor

    model = tiny("gemma3")  # whose windows need masks
    ids = torch.tensor([model.encode(TEXTS["crane"])])
    positions = torch.arange(ids.shape[1])[None]
    plain, ours = model.hf(input_ids=ids).logits, model.forward(ids, positions, Plain())
    others: list[Tensor] = []

    class Interrupted(Plain):
        def attend(self, layer: int, *arguments: Any) -> Tensor:
            with ThreadPoolExecutor(1) as pool:
                others.append(pool.submit(lambda: model.hf(input_ids=ids).logits).result() - plain)
                others.append(pool.submit(lambda: model.forward(ids, positions, Plain())).result() - ours)
            return super().attend(layer, *arguments)

    assert torch.equal(model.forward(ids, positions, Interrupted()), ours)
    assert len(others) == 6 and not any(difference.any() for difference in others)


class Plain:
    """Causal attention written out, which keeps the keys it was given: layer -> [H, T, D]."""

    def __init__(self) -> None:
        self.keys: dict[int, Tensor] = {}

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
        self.keys[layer] = key[0].clone()
        position = torch.arange(query.shape[2])
        repeat = query.shape[1] // key.shape[1]
        scores = query @ key.repeat_interleave(repeat, 1).transpose(2, 3) * scale
        weights = scores.masked_fill(~causal_mask(position, position, window), -torch.inf).softmax(-1)
        return (weights @ value.repeat_interleave(repeat, 1)).transpose(1, 2)


# -- rotation and layout ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_turned_keys_are_the_keys_of_other_positions(kind: str, tiny: Callable[..., FrozenModel]) -> None:
    model = tiny(kind)
    ids = torch.tensor([model.encode(TEXTS["lamp"])])
    near, far, positions = Plain(), Plain(), torch.arange(ids.shape[1])[None]
    model.forward(ids, positions, near)
    model.forward(ids, positions + 301, far)
    for layer in range(3):
        turned = model.rope.shift(near.keys[layer], torch.full_like(positions[0], 301), layer)
        torch.testing.assert_close(turned, far.keys[layer], atol=2e-4, rtol=1e-4)
        back = model.rope.shift(turned, torch.full_like(positions[0], -301), layer)
        torch.testing.assert_close(back, near.keys[layer], atol=1e-5, rtol=1e-5)


def test_turn_by_hand() -> None:
    """Pairs (x[i], x[i + R/2]) turn by their own angle; dimensions behind R stay."""
    rope = Rope((torch.tensor([1.0, 0.1]),))
    keys = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    by = torch.tensor([0, 2, -7])
    pairs = torch.complex(keys[..., 0:2], keys[..., 2:4])
    turned = pairs * torch.exp(1j * by[:, None] * torch.tensor([1.0, 0.1]))
    expected = torch.cat([turned.real, turned.imag, keys[..., 4:]], dim=-1)
    result = rope.shift(keys, by, 0)
    torch.testing.assert_close(result, expected)
    assert torch.equal(result[:, 0], keys[:, 0])
    assert rope.shift(keys.bfloat16(), by, 0).dtype == torch.bfloat16


def test_layout_places_keys_and_tokens() -> None:
    fixed, offset, sequential = (Layout(policy, header=5, span=64) for policy in ("fixed", "offset", "sequential"))
    for sizes in ([16], [16, 64, 32]):
        assert fixed.shifts(sizes) == offset.shifts(sizes) == [0] * len(sizes)
        assert fixed.token_start(sizes) == 5 + 64
        assert offset.token_start(sizes) == sequential.token_start(sizes) == 5 + sum(sizes)
    assert sequential.shifts([16, 64, 32]) == [0, 16, 80]
    # With nothing loaded every policy is plain text behind the header.
    assert fixed.token_start([]) == offset.token_start([]) == sequential.token_start([]) == 5


# -- cartridges ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("document_tokens", "tokens", "ratio", "span", "expected"),
    [
        (1000, 64, None, None, 64),
        (10, 64, None, None, 64),
        (1000, 64, None, 32, 32),
        (1000, None, 10.0, None, 100),
        (960, None, 10.0, None, 96),
        (961, None, 10.0, None, 96),  # rounded down to a multiple of 4
        (3, None, 16.0, None, 4),
        (0, None, 16.0, None, 4),
        (100, None, 1.0, None, 100),
        (10_000, None, 2.0, 1024, 1024),
    ],
)
def test_cartridge_size(document_tokens: int, tokens: Any, ratio: Any, span: Any, expected: int) -> None:
    assert cartridge_size(document_tokens, tokens, ratio, span) == expected


@pytest.mark.parametrize(
    ("tokens", "ratio", "message"),
    [
        (None, None, "either as --tokens or as --ratio"),
        (64, 8.0, "either as --tokens or as --ratio"),
        (0, None, "--tokens 0"),
        (-16, None, "--tokens -16"),
        (42, None, "--tokens 42"),
        (None, 0.5, "--ratio 0.5"),
        (None, float("nan"), "--ratio nan"),
        (None, float("inf"), "--ratio inf"),
    ],
)
def test_bad_cartridge_sizes_are_refused(tokens: Any, ratio: Any, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        cartridge_size(1000, tokens, ratio, None)
    assert message in one_line(error)


@pytest.mark.parametrize("kind", KINDS)
def test_first_initialisation_is_a_piece_of_prefill(kind: str, tiny: Callable[..., FrozenModel]) -> None:
    model = tiny(kind)
    document, header = model.encode(TEXTS["lamp"]), model.layout_header
    whole = model.prefill([*model.template.header_ids, *document])[:, :, :, header:]
    for p in (16, 32, len(document)):
        kv = initialize(model, document, p, "first", seed=0)
        assert kv.dtype == torch.float32 and not kv.requires_grad
        torch.testing.assert_close(kv, whole[:, :, :, :p], atol=1e-5, rtol=1e-5)
    # A document shorter than its cartridge is repeated.
    kv = initialize(model, document[:5], 16, "first", seed=0)
    repeated = model.prefill([*model.template.header_ids, *(document[:5] * 4)[:16]])[:, :, :, header:]
    torch.testing.assert_close(kv, repeated)


class Reader:
    """A model that writes down what it is asked to read."""

    def __init__(self, model: FrozenModel) -> None:
        self.model = model
        self.read: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def prefill(self, ids: list[int]) -> Tensor:
        self.read = list(ids)
        return self.model.prefill(ids)


def test_sampled_initialisation_reads_chunks_in_order(tiny: Callable[..., FrozenModel]) -> None:
    reader: Any = Reader(tiny("llama"))
    header = list(reader.template.header_ids)
    document = torch.randperm(380).tolist()  # every token once, so that its place is known
    place = {token: i for i, token in enumerate(document)}
    starts = set()
    for seed in range(8):
        kv = initialize(reader, document, 192, "sampled", seed)
        assert kv.shape[3] == 192 and kv.dtype == torch.float32
        assert reader.read[: len(header)] == header
        places = [place[token] for token in reader.read[len(header) :]]
        chunks = [places[i : i + 64] for i in (0, 64, 128)]
        assert all(chunk == list(range(chunk[0], chunk[0] + 64)) for chunk in chunks)
        assert chunks[0][0] <= chunks[1][0] <= chunks[2][0]
        starts |= {chunk[0] for chunk in chunks}
        again = initialize(reader, document, 192, "sampled", seed)
        assert torch.equal(kv, again)
    assert len(starts) > 12
    for p in (16, 80, 144):  # smaller than a chunk; not a multiple of one
        kv = initialize(reader, document, p, "sampled", 3)
        assert kv.shape[3] == p and len(reader.read) == len(header) + p
    # A document no longer than its cartridge is read from its start.
    initialize(reader, document[:64], 64, "sampled", 3)
    assert reader.read == header + document[:64]
    assert initialize(reader, document[:7], 32, "sampled", 3).shape[3] == 32


def test_random_initialisation_has_the_spread_of_the_header(tiny: Callable[..., FrozenModel]) -> None:
    model = tiny("qwen3")
    kv = initialize(model, [5, 6, 7], 2048, "random", seed=1)
    assert kv.shape == (3, 2, 2, 2048, 16) and kv.dtype == torch.float32
    torch.testing.assert_close(kv.std(dim=3), model.header_kv.std(dim=3), rtol=0.1, atol=0)
    assert torch.equal(kv, initialize(model, [8], 2048, "random", seed=1))  # of the seed alone
    assert not torch.equal(kv, initialize(model, [5, 6, 7], 2048, "random", seed=2))


# -- the chat template --------------------------------------------------------------------------------------------------


def rendered(model: FrozenModel, document: str, question: str) -> str:
    """The prompt as the chat template itself would write it."""
    messages = [{"role": "system", "content": f"{DEFAULT_SYSTEM}\n\n{document}"}, {"role": "user", "content": question}]
    return str(model.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))


def joined(model: FrozenModel, document: str, question: str) -> str:
    """The prompt as every arm puts it together from tokens."""
    t = model.template
    ids = [*t.header_ids, *model.encode(document), *t.footer_ids, *model.encode(question), *t.suffix_ids]
    return str(model.tokenizer.decode(ids))


def with_template(template: str | None, **tokens: Any) -> FrozenModel:
    hf, tokenizer = tiny_hf("llama"), tiny_tokenizer(template)
    if tokens:
        tokenizer = tokenizer.__class__(tokenizer_object=tokenizer.backend_tokenizer, **tokens)
        tokenizer.chat_template = template
    hf.generation_config.eos_token_id = tokenizer.eos_token_id
    return FrozenModel(hf, tokenizer, SOURCE)


def test_the_template_in_parts_is_the_template(tiny: Callable[..., FrozenModel]) -> None:
    model = tiny("llama")
    assert joined(model, TEXTS["pump"], "Which valve?") == rendered(model, TEXTS["pump"], "Which valve?")
    assert joined(model, "x", "y").startswith(f"<|im_start|>system\n{DEFAULT_SYSTEM}\n\nx<|im_end|>")
    end = model.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert model.template.end_ids == (end,) and model.template.stop_ids == {end}
    assert model.answer_text([*model.encode("Red."), end]) == "Red."
    assert model.decode([*model.encode("Red."), end]) == "Red.<|im_end|>"


def test_another_system_instruction_is_another_header() -> None:
    tokenizer = tiny_tokenizer()
    model = FrozenModel(tiny_hf("llama"), tokenizer, SOURCE, system="Be brief.")
    assert tokenizer.decode(model.template.header_ids) == "<|im_start|>system\nBe brief.\n\n"
    assert model.describe()["system"] == "Be brief."


NO_SYSTEM = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{% if strict %}{{ raise_exception('no system role') }}{% endif %}"
    "{% else %}<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("strict", [True, False], ids=["refuses", "drops"])
def test_a_template_without_a_system_role(strict: bool) -> None:
    model = with_template(NO_SYSTEM.replace("strict", str(strict).lower()))
    assert (
        joined(model, "DOC", "Q?")
        == f"<|im_start|>user\n{DEFAULT_SYSTEM}\n\nDOC\n\nQ?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_tokenizer_without_a_template() -> None:
    model = with_template(None)
    text = f"<|im_start|>{DEFAULT_SYSTEM}\n\nDOC\n\nQuestion: Q?\nAnswer: "
    assert joined(model, "DOC", "Q?") == text
    assert model.template.end_ids == (2,) and model.template.stop_ids == {2}


def test_thinking_is_off() -> None:
    """Templates that think write an empty block in front of the answer, which belongs to the suffix."""
    thinking = CHATML.replace(
        "<|im_start|>assistant\n{% endif %}",
        "<|im_start|>assistant\n{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}",
    )
    model = with_template(thinking)
    assert joined(model, "DOC", "Q?").endswith("<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert model.template.end_ids == (2,)


@pytest.mark.parametrize("date", ["{{ date_string }}", "{{ strftime_now('%d %B %Y') }}"])
def test_the_header_does_not_change_from_day_to_day(date: str) -> None:
    model = with_template(CHATML.replace("{% for message", "Today: " + date + "\n{% for message", 1))
    assert joined(model, "DOC", "Q?").startswith("Today: 01 Jan 2026\n<|im_start|>system")


def test_plain_characters_do_not_end_answers() -> None:
    """Some templates put a blank between the answer and the token that ends it."""
    model = with_template(CHATML.replace("<|im_end|>", " <|im_end|>"))
    assert model.template.end_ids == (2,) and model.template.stop_ids == {2}


def test_the_template_may_end_turns_by_another_token_than_the_tokenizer() -> None:
    model = with_template(
        CHATML, bos_token="<|im_start|>", eos_token="<|endoftext|>", additional_special_tokens=["<|im_end|>"]
    )
    assert model.template.end_ids == (2,) and model.template.stop_ids == {0, 2}


BACKWARDS = "{% for m in messages[::-1] %}{{ m['content'].split()[::-1] | join(' ') }}<|im_end|>{% endfor %}"


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('never') }}",
        "{{ messages[-1]['role'] }}",  # shows no text
        BACKWARDS,  # the question before the document
        CHATML + "{{ messages[0]['content'] }}",  # the document twice
    ],
)
def test_templates_that_cannot_be_cut_are_refused(template: str) -> None:
    with pytest.raises(ModelError, match="chat template") as error:
        with_template(template)
    one_line(error)


def test_a_model_that_never_ends_its_turn_is_refused() -> None:
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    with pytest.raises(ModelError, match="end-of-turn") as error:
        with_template(template, pad_token="<|endoftext|>")
    one_line(error)


# -- refusals -----------------------------------------------------------------------------------------------------------


def other(name: str, **settings: Any) -> Any:
    """A tiny random model of any architecture."""
    import transformers

    base = {
        "vocab_size": 384, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.3,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    config = getattr(transformers, f"{name}Config")(**(base | settings))
    torch.manual_seed(0)
    kind = transformers.AutoModelForSeq2SeqLM if name == "T5" else transformers.AutoModelForCausalLM
    return kind.from_config(config, dtype=torch.float32)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("GPT2", {"n_embd": 48, "n_layer": 2, "n_head": 4}, "gpt2: no rotary position embedding"),
        ("T5", {"d_model": 48}, "t5: an encoder-decoder"),
        ("Gemma2", {"head_dim": 12, "attn_logit_softcapping": 50.0}, "gemma2: its attention also needs softcap"),
        ("GptOss", {"head_dim": 12, "num_local_experts": 4}, "gpt_oss: its attention also needs s_aux"),
        ("Glm", {"head_dim": 12}, "glm: layer 0 does not rotate its keys by standard half-split RoPE"),
        ("Cohere", {}, "cohere: layer 0 does not rotate its keys by standard half-split RoPE"),
        ("SmolLM3", {"num_hidden_layers": 4}, "smollm3: layer 3 does not rotate"),  # every fourth layer has no RoPE
        ("Qwen3Next", {"head_dim": 12}, "qwen3_next: layers of type linear_attention"),
        ("Nemotron", {}, "nemotron: does not run through the attention interface"),
        ("Falcon", {"alibi": False}, "falcon: does not run through the attention interface"),
        (
            "Llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "llama: RoPE type 'dynamic'",
        ),
        (
            "Phi3",
            {
                "original_max_position_embeddings": 128,
                "rope_parameters": {
                    "rope_type": "longrope",
                    "rope_theta": 1e4,
                    "short_factor": [1.0] * 6,
                    "long_factor": [2.0] * 6,
                },
            },
            "phi3: RoPE type 'longrope'",
        ),
    ],
)
def test_models_that_cannot_carry_cartridges_are_refused(name: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError) as error:
        FrozenModel(other(name, **settings), tiny_tokenizer(), SOURCE)
    assert message in one_line(error)


@pytest.mark.parametrize(
    ("name", "settings", "windows"),
    [
        ("GPTNeoX", {}, (None, None)),  # rotates a quarter of each head
        ("Gemma2", {"head_dim": 12, "attn_logit_softcapping": None, "sliding_window": 8}, (8, None)),
        ("Qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, (None, 8)),
        ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}, (None, None)),
        (
            "Mistral",
            {
                "rope_parameters": {
                    "rope_type": "yarn",
                    "rope_theta": 1e4,
                    "factor": 4.0,
                    "original_max_position_embeddings": 64,
                }
            },
            (4096, 4096),
        ),
    ],
)
@torch.no_grad()
def test_other_models_that_can(name: str, settings: dict[str, Any], windows: Any) -> None:
    model = FrozenModel(other(name, **settings), tiny_tokenizer(), SOURCE)
    assert model.geometry.windows == windows
    assert (model.head is None) == (name == "Gemma2")  # which caps its logits
    ids = torch.tensor([model.encode(TEXTS["tide"])])
    ours = model.forward(ids, torch.arange(ids.shape[1])[None], Plain())
    torch.testing.assert_close(ours, model.hf(input_ids=ids).logits, atol=1e-4, rtol=1e-4)


# -- loading ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny-qwen3"
    tiny_hf("qwen3").save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def test_a_folder_is_loaded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = FrozenModel.from_pretrained(str(folder), dtype="float32", device="cpu")
    assert model.source == Source("folder", str(folder)) and model.dtype == torch.float32
    assert model.template == tiny_model("qwen3").template
    ids = torch.tensor([[5, 6, 7, 8]])
    assert torch.equal(model.hf(input_ids=ids).logits, tiny_model("qwen3").hf(input_ids=ids).logits)
    monkeypatch.chdir(folder.parent)
    assert FrozenModel.from_pretrained(folder.name, dtype="float32", device="cpu").source == model.source
    assert FrozenModel.from_pretrained(f"./{folder.name}", device="auto", dtype="auto").source == model.source


def test_fingerprints(folder: Path) -> None:
    """One for all dtypes of the same weights; another one for other weights, another tokenizer, another architecture."""
    full, half = (
        FrozenModel.from_pretrained(str(folder), dtype=dtype, device="cpu") for dtype in ("float32", "bfloat16")
    )
    assert half.dtype == torch.bfloat16 and half.header_kv.dtype == torch.bfloat16
    assert full.fingerprint == half.fingerprint == tiny_model("qwen3").fingerprint
    assert full.rope_fingerprint == half.rope_fingerprint
    assert len(full.fingerprint) == len(full.rope_fingerprint) == 16
    again = FrozenModel(tiny_hf("qwen3"), tiny_tokenizer(), SOURCE, system="Be brief.")
    assert again.fingerprint == full.fingerprint  # the instruction is recorded apart
    others = [tiny_model("qwen3", seed=1), tiny_model("llama"), tiny_model("mistral")]
    changed = tiny_hf("qwen3")
    with torch.no_grad():
        changed.model.layers[2].mlp.down_proj.weight.mul_(1.1)
    others.append(FrozenModel(changed, tiny_tokenizer(), SOURCE))
    tokenizer = tiny_tokenizer().__class__.from_pretrained(folder)
    tokenizer.add_tokens(["harbour master"])
    others.append(FrozenModel(tiny_hf("qwen3"), tokenizer, SOURCE))
    fingerprints = [model.fingerprint for model in others]
    assert len({full.fingerprint, *fingerprints}) == 1 + len(others)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no-such/model", "no-such/model: not loaded"),
        ("no-such-model", "no-such-model: not loaded"),
        ("not a model!", "not a model!: not loaded"),
        ("./missing", "./missing: no such folder"),
        ("/nowhere/at/all", "/nowhere/at/all: no such folder"),
        ("missing.gguf", "missing.gguf: no such file"),
        ("package:no/such", "pip package"),
    ],
)
def test_wrong_names_fail_quickly_with_one_line(name: str, message: str) -> None:
    started = time.perf_counter()
    with pytest.raises(ModelError) as error:
        FrozenModel.from_pretrained(name, device="cpu")
    assert message in one_line(error) and isinstance(error.value, UserError)
    assert time.perf_counter() - started < 10


def test_folders_that_are_no_model_are_refused(folder: Path, tmp_path: Path) -> None:
    import shutil

    empty = tmp_path / "empty"
    empty.mkdir()
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    (broken / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0nonsense")
    pickled = tmp_path / "pickled"
    shutil.copytree(folder, pickled)
    torch.save(tiny_hf("qwen3").state_dict(), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    gguf = tmp_path / "broken.gguf"
    gguf.write_bytes(b"GGUF" + b"\xff" * 64)
    for path in (empty, broken, pickled, gguf):
        with pytest.raises(ModelError) as error:
            FrozenModel.from_pretrained(str(path), device="cpu")
        assert one_line(error).startswith(f"{path}: not loaded")


def test_bad_dtypes_and_devices_are_refused(folder: Path) -> None:
    for options, message in (
        ({"dtype": "float16"}, "--dtype float16"), ({"device": "abacus"}, "--device abacus"), ({"device": "cuda:99"}, "--device cuda:99")
    ):  # fmt: skip
        with pytest.raises(ModelError) as error:
            FrozenModel.from_pretrained(str(folder), **({"device": "cpu"} | options))
        assert message in one_line(error)


def test_a_packaged_copy_stands_in_for_a_hub_that_does_not_answer(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cas.model.loading, "_packaged", lambda name: str(folder) if name == "some/model" else None)
    expected = Source("package", "package:some/model")
    for answers in (False, True):  # dead; or alive, but without this model
        monkeypatch.setattr(cas.model.loading, "_hub_answers", lambda answers=answers: answers)
        assert FrozenModel.from_pretrained("some/model", dtype="float32", device="cpu").source == expected
        with pytest.raises(ModelError):  # a revision was asked for, and the copy has none
            FrozenModel.from_pretrained("some/model", revision="v2", device="cpu")
    # What a store has written down opens the copy, and looks nowhere else.
    monkeypatch.setattr(cas.model.loading, "_hub_answers", lambda: pytest.fail("asked the hub"))
    assert FrozenModel.from_pretrained("package:some/model", dtype="float32", device="cpu").source == expected


def test_from_store_loads_what_was_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(
        FrozenModel, "from_pretrained", classmethod(lambda _, *names, **rest: calls.append((names, rest)))
    )

    class Recorded:
        meta: dict[str, Any] = {"model": {"source": {"name": "a/b", "revision": "r1"}, "system": "Be brief."}}  # noqa: RUF012

    FrozenModel.from_store(Recorded(), device="cpu")
    FrozenModel.from_store(Recorded(), "c/d", dtype="float32")
    FrozenModel.from_store(Recorded(), revision="r2")
    auto = {"dtype": "auto", "device": "auto", "system": "Be brief."}
    assert calls == [
        (("a/b",), {**auto, "revision": "r1", "device": "cpu"}),
        (("c/d",), {**auto, "revision": None, "dtype": "float32"}),
        (("a/b",), {**auto, "revision": "r2"}),
    ]


def test_question_tokens_and_counts(tiny: Callable[..., FrozenModel]) -> None:
    model = tiny("llama")
    ids, template = model.encode("Which valve?"), model.template
    assert model.question_tokens("Which valve?") == (*template.footer_ids, *ids, *template.suffix_ids)
    assert model.count_tokens("Which valve?") == len(ids)
