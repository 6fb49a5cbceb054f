"""A frozen Hugging Face decoder: its geometry, its chat template, its forward pass.

What can be measured about a model is not assumed: a probe at load records what the attention layers really pass
(heads, head dimension, windows, unknown keywords), and compares our attention with the model's own.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from cas.errors import ModelError
from cas.model import attention
from cas.model import fingerprint as identification
from cas.model.chat_template import render_template
from cas.model.loading import Source, first_line, halve, load, recorded_source
from cas.model.positions import Rope
from cas.model.probe import Geometry, KVRecorder, Probe, refuse_unsupported, refuse_without_gradients, rotary
from cas.model.text import TextCodec, TextStream
from cas.options import DEFAULT_MODEL, DEFAULT_SYSTEM

# Batches of varying lengths would fill oneDNN's default cache of 1,024 compiled products with hundreds of MiB.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")


class HasMeta(Protocol):
    """A store, as far as loading its model needs it."""

    meta: dict[str, Any]


class FrozenModel:
    """A decoder whose weights never change, and everything about it that cartridges depend on."""

    def __init__(
        self,
        hf: Any,
        tokenizer: Any,
        source: Source,
        system: str = DEFAULT_SYSTEM,
        identity: identification.Identity | None = None,
    ) -> None:
        """Wrap a loaded ``AutoModelForCausalLM`` and its tokenizer. ``identity``: read before the weights were converted.

        Raises: ModelError where cartridges cannot work.
        """
        attention.register()
        self.hf = hf.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.source = source
        self.system = system
        self.device: torch.device = hf.device
        self.dtype: torch.dtype = hf.dtype
        self.config = hf.config.get_text_config()
        self.reader = bool(getattr(self.config, "cas_reader", False))  # made by experiments/reader_training
        refuse_unsupported(hf)
        self._identity = identity
        self.text = TextCodec(tokenizer)
        self.template = render_template(self.text, system, self._stop_ids())
        self.head: torch.nn.Linear | None = None  # the output layer, where the logits are its plain output
        self.geometry, self.rope = self._probe()
        if getattr(hf, "is_quantized", False):
            refuse_without_gradients(hf)

    @classmethod
    def from_pretrained(
        cls,
        name: str = DEFAULT_MODEL,
        *,
        revision: str | None = None,
        dtype: str = "auto",
        device: str = "auto",
        system: str = DEFAULT_SYSTEM,
    ) -> FrozenModel:
        """Load by Hub name, local folder or GGUF file.

        Args:
            dtype: "float32", "bfloat16", "float16" (GPUs only) or "auto": bfloat16 where the device computes in it, else
                float16 on a GPU and float32 on a CPU.
            device: "cpu", "cuda", "cuda:1", … or "auto".
            system: the instruction in front of the documents; part of the header, so of every cartridge.
        Raises: ModelError with the reason.
        """
        try:
            place = (
                torch.device("cuda" if torch.cuda.is_available() else "cpu")
                if device == "auto"
                else torch.device(device)
            )
            torch.empty(0, device=place)
        except (RuntimeError, AssertionError) as error:
            raise ModelError(
                f"--device {device}: not usable here ({first_line(error)}); choose cpu, cuda, cuda:1, … or auto"
            ) from error
        kind = _dtype(dtype, place)
        hf, tokenizer, source = load(name, revision, kind, place)
        identity, quantized = None, getattr(hf, "is_quantized", False)
        if kind == torch.float16 and hf.dtype != kind and not quantized:  # whose bits bfloat16 could not be told from
            identity = identification.identify(hf, tokenizer)
            halve(hf)
        if not quantized:  # a quantized one is on its device already
            hf = hf.to(place)
        return cls(hf, tokenizer, source, system, identity)

    @classmethod
    def from_store(
        cls,
        store: HasMeta,
        model: str | None = None,
        revision: str | None = None,
        dtype: str = "auto",
        device: str = "auto",
    ) -> FrozenModel:
        """Load the model that a store was made with, with the system text that it recorded.

        Args: model, revision: load this instead; :meth:`cas.Store.check_model` tells whether it is the same.
            dtype, device: as in :meth:`from_pretrained`.
        Raises: ModelError with the reason.
        """
        recorded = store.meta["model"]
        options: dict[str, Any] = {"dtype": dtype, "device": device, "system": recorded["system"]}
        source = recorded["source"]
        if model in (None, source["name"]):
            with recorded_source(source):
                return cls.from_pretrained(source["name"], revision=revision or source["revision"], **options)
        return cls.from_pretrained(model, revision=revision, **options)

    # -- encoding and forward passes --------------------------------------------------------------------------------

    def encode(self, text: str) -> list[int]:
        """Token ids of content, without special tokens around it; control tokens that it names are spelled out."""
        return self.text.encode(text)

    def count_tokens(self, text: str) -> int:
        """Number of tokens of plain text."""
        return len(self.encode(text))

    def question_tokens(self, question: str) -> tuple[int, ...]:
        """Footer, question and suffix: what stands behind a document, or the cartridges in its place."""
        return (*self.template.footer_ids, *self.encode(question), *self.template.suffix_ids)

    def decode(self, ids: Sequence[int]) -> str:
        """The text that token ids spell, spaces and control tokens included: ``decode(encode(x)) == x``."""
        return self.text.decode(ids)

    def answer_text(self, ids: Sequence[int]) -> str:
        """The text of an answer: without the tokens that end it and other special tokens, and without outer spaces."""
        return self.continuation((), ids).strip()

    def continuation(self, prefix: Sequence[int], ids: Sequence[int]) -> str:
        """The text that ``ids`` add behind the token ids ``prefix``, special tokens left out."""
        return self.text.continuation(prefix, [i for i in ids if i not in self.template.stop_ids])

    def stream(self, prefix: Sequence[int] = ()) -> TextStream:
        """Turns tokens into text while they are decoded, in whole characters."""
        return TextStream(self.text, prefix)

    @property
    def layout_header(self) -> int:
        """Positions that the shared header takes."""
        return len(self.template.header_ids)

    @cached_property
    def header_kv(self) -> Tensor:
        """KV of the header, [L, 2, H, header, D] in the model's dtype: frozen, shared by all cartridges, attention sink."""
        return self.prefill(self.template.header_ids)

    def forward(
        self, ids: Tensor, positions: Tensor, context: attention.AttentionContext, rows: Tensor | int = 0
    ) -> Tensor:
        """Logits [B, rows, vocabulary] (model dtype) of tokens at explicit positions under an attention context.

        Args: ids, positions: integer [B, T]; rows: indices of the wanted rows, or the number of last ones, 0 for all.
        """
        if isinstance(rows, int):
            # As indices, not as a count: for a strided slice torch copies the output matrix once per row.
            rows = torch.arange(ids.shape[1] - rows if rows else 0, ids.shape[1])
        with self._our_attention():
            return self.hf(
                input_ids=ids.to(self.device),
                position_ids=positions.to(self.device),
                use_cache=False,
                logits_to_keep=rows.to(self.device),
                cas=context,
            ).logits

    @contextlib.contextmanager
    def _our_attention(self) -> Iterator[None]:
        with attention.our_masks():
            if (before := self.config._attn_implementation) == "sdpa":  # which hands its calls on: no shared state
                yield
                return
            self.config._attn_implementation = "cas"
            try:
                yield
            finally:
                self.config._attn_implementation = before

    def hidden(
        self,
        ids: Tensor,
        positions: Tensor,
        context: attention.AttentionContext,
        rows: Tensor | slice = slice(None),
    ) -> Tensor:
        """States [B, rows, hidden] before the output layer, of tokens as :meth:`forward` takes them."""
        with self._our_attention():
            states = self.hf.base_model(
                input_ids=ids.to(self.device), position_ids=positions.to(self.device), use_cache=False, cas=context
            ).last_hidden_state
        return states[:, rows.to(self.device) if isinstance(rows, Tensor) else rows]

    @contextlib.contextmanager
    def recomputing(self, wanted: bool = True) -> Iterator[None]:
        """Activation checkpointing: inside, decoder layers store only their input and run again during backward."""
        from torch.utils.checkpoint import checkpoint
        from transformers.modeling_layers import GradientCheckpointingLayer

        def run(layer: Callable[..., Any], *arguments: Any) -> Any:
            def again(
                *arguments: Any,
            ) -> Any:  # runs again during backward, outside the context manager
                with self._our_attention():
                    return layer(*arguments)

            return checkpoint(again, *arguments, use_reentrant=False)

        layers = [m for m in self.hf.modules() if wanted and isinstance(m, GradientCheckpointingLayer)]
        assert layers or not wanted
        for layer in layers:  # only these: their submodules stay in evaluation mode
            vars(layer).update(gradient_checkpointing=True, _gradient_checkpointing_func=run, training=True)
        try:
            yield
        finally:
            for layer in layers:
                vars(layer).update(gradient_checkpointing=False, training=False)

    @torch.no_grad()
    def prefill(self, ids: Sequence[int]) -> Tensor:
        """The KV cache of a text, positions 0.., [L, 2, H, T, D] in the model's dtype."""
        return self.kv_of(torch.tensor([list(ids)]))

    @torch.no_grad()
    def kv_of(self, ids: Tensor) -> Tensor:
        """As :meth:`prefill`, of token ids [1, T]."""
        recorder = KVRecorder()
        self.forward(ids, torch.arange(ids.shape[1])[None], recorder, rows=1)
        return torch.stack([torch.stack(recorder.kv[layer]) for layer in sorted(recorder.kv)])

    @cached_property
    def identity(self) -> identification.Identity:
        """What the weights and the vocabulary are, in any dtype."""
        return self._identity or identification.identify(self.hf, self.tokenizer)

    @property
    def legacy_fingerprint(self) -> str:
        """The fingerprint that earlier versions recorded in stores."""
        return self.identity.legacy

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits that identify model, tokenizer and chat template: the same for any dtype of the same weights."""
        g, t = self.geometry, self.template
        measured = [g.layers, g.query_heads, g.kv_heads, g.head_dim, g.hidden, g.vocabulary, g.windows, self._scales]
        return identification.fingerprint(
            self.identity.weights, self.config, measured, self.tokenizer, (t.footer_ids, t.suffix_ids, t.end_ids)
        )

    @cached_property
    def rope_fingerprint(self) -> str:
        """16 hex digits of the rotary frequencies of every layer."""
        data = b"".join(f.cpu().float().numpy().tobytes() for f in self.rope.frequencies)
        return hashlib.sha256(data).hexdigest()[:16]

    def describe(self) -> dict[str, Any]:
        """What a store records about its model (JSON)."""
        return {
            "source": asdict(self.source),
            "fingerprint": self.fingerprint,
            "rope": self.rope_fingerprint,
            "dtype": str(self.dtype).removeprefix("torch."),
            "system": self.system,
            "geometry": asdict(self.geometry),
            "header_ids": list(self.template.header_ids),
        }

    @cached_property
    def weight_bytes(self) -> int:
        """Bytes of the weights, shared ones counted once."""
        return sum(
            t.numel() * t.element_size() for t in {t.data_ptr(): t for t in self.hf.state_dict().values()}.values()
        )

    # -- checks at load ---------------------------------------------------------------------------------------------

    def _stop_ids(self) -> set[int]:
        stop = self.hf.generation_config.eos_token_id if self.hf.generation_config else None
        ids = {stop} if isinstance(stop, int) else set(stop or ())
        return ids | ({self.tokenizer.eos_token_id} if self.tokenizer.eos_token_id is not None else set())

    @torch.no_grad()
    def _probe(self) -> tuple[Geometry, Rope]:
        kind = self.config.model_type
        ids = torch.arange(12)[None] % self.config.vocab_size + min(5, self.config.vocab_size - 12)
        positions, probe = torch.arange(12)[None], Probe()
        try:
            ours = self.forward(ids, positions, probe).float()
        except Exception as error:  # a model's code may fail on an unknown keyword in any way
            raise ModelError(
                f"{kind}: does not run through the attention interface of transformers ({first_line(error)})"
            ) from error
        # The model's own attention, with the mask that transformers makes.
        theirs = self.hf(input_ids=ids.to(self.device), use_cache=False).logits.float()
        if not probe.layers:
            raise ModelError(f"{kind}: does not run through the attention interface of transformers")
        layers = [probe.layers[i] for i in sorted(probe.layers)]
        if sorted(probe.layers) != list(range(self.config.num_hidden_layers)):
            raise ModelError(
                f"{kind}: only {len(layers)} of {self.config.num_hidden_layers} layers use the attention interface"
            )
        extra = set().union(*(layer["extra"] for layer in layers))
        if extra:
            raise ModelError(
                f"{kind}: its attention also needs {', '.join(sorted(extra))}, which cartridges do not carry"
            )
        shapes = {(layer["query_heads"], layer["kv_heads"], layer["head_dim"]) for layer in layers}
        if len(shapes) != 1:
            raise ModelError(f"{kind}: layers have different attention heads {sorted(shapes)}")
        tolerance = 1e-3 if self.dtype == torch.float32 else 0.1
        if not torch.allclose(ours, theirs, atol=tolerance * float(theirs.abs().max())):
            raise ModelError(
                f"{kind}: its attention differs from softmax(QK)V; cartridges would not mean what they should"
            )
        # Whether the logits are the plain output of this layer: some models scale or cap them.
        head = self.hf.get_output_embeddings()
        if isinstance(head, torch.nn.Linear) and head.bias is None:
            self.head = head if torch.equal(head(self.hidden(ids, positions, Probe())).float(), ours) else None
        query_heads, kv_heads, head_dim = shapes.pop()
        geometry = Geometry(
            layers=len(layers),
            query_heads=query_heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            hidden=self.config.hidden_size,
            vocabulary=self.config.vocab_size,
            windows=tuple(layer["window"] for layer in layers),
            max_positions=self.config.max_position_embeddings,
        )
        frequencies, scales = rotary(self.hf)
        rope = Rope(frequencies)
        self._scales = [[float(layer["scale"]) for layer in layers], scales, [f.tolist() for f in frequencies]]
        self._check_rotation(rope, ids[:, :1])
        return geometry, rope

    def _check_rotation(self, rope: Rope, ids: Tensor) -> None:
        """A single token attends to itself alone, so its key at another position must be the same key, shifted."""
        near, far = Probe(), Probe()
        self.forward(ids, torch.zeros_like(ids), near)
        self.forward(ids, torch.full_like(ids, 37), far)
        for layer in near.layers:
            shifted = rope.shift(near.layers[layer]["key"], torch.tensor([37]), layer).float()
            expected = far.layers[layer]["key"].float()
            tolerance = 1e-4 if self.dtype == torch.float32 else 2e-2
            if (shifted - expected).abs().max() > tolerance * expected.abs().max().clamp(min=1.0):
                raise ModelError(
                    f"{self.config.model_type}: layer {layer} does not rotate its keys by standard half-split RoPE"
                )


def _dtype(name: str, device: torch.device) -> torch.dtype:
    """The compute type of a name that ``from_pretrained`` takes."""
    if name == "auto":
        slow = torch.float32 if device.type == "cpu" else torch.float16
        return torch.bfloat16 if _computes_bfloat16(device) else slow
    if name == "float16" and device.type == "cpu":
        raise ModelError("--dtype float16: needs a GPU; choose float32, bfloat16 or auto")
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in dtypes:
        raise ModelError(f"--dtype {name}: choose float32, bfloat16, float16 or auto")
    return dtypes[name]


def _computes_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 products are a machine instruction here (else they are slower than float32)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())
