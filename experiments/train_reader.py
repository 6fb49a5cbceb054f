"""Train the embedded reader from scratch: a small Llama that reads fictional worlds, with its own tokenizer.

    python -m experiments.train_reader --output runs/reader

What it reads stands in ``experiments/reader_scenes.py``. Scenes begin small and grow whenever the reader answers nine of ten
at its present level. Interrupted, the same command goes on.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from cas import console
from cas.config import DEFAULT_SYSTEM, parse
from cas.worlds import TWO, WHOLE
from experiments.reader_scenes import LEVELS, Scene, scenes

if TYPE_CHECKING:
    from torch import Tensor

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% if m['role'] == 'assistant' %}<|end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ("<|end|>", "<|system|>", "<|user|>", "<|assistant|>")


@dataclass(frozen=True)
class Config:
    """Train the embedded reader."""

    output: str = "runs/reader"
    """Folder of the checkpoint, the curve and, at the end, the model."""
    tokens: int = 300_000_000
    """Tokens to train on."""
    step_tokens: int = 3000
    """Tokens of a step, texts and exchanges together."""
    lr: float = 2e-3
    """Peak learning rate."""
    warmup: int = 300
    """Steps until it is reached."""
    vocabulary: int = 3072
    """Tokens of the tokenizer."""
    hidden: int = 256
    """Width of the model."""
    layers: int = 6
    """Layers."""
    heads: int = 8
    """Attention heads."""
    intermediate: int = 512
    """Width of the MLP."""
    reading: float = 0.3
    """Weight of predicting the texts themselves."""
    level: int = 0
    """Level of the curriculum to begin with."""
    seed: int = 0
    """Seed of weights and scenes; worlds of collections have other seeds."""
    init: str | None = None
    """Folder of a model to start from, in place of random weights."""


def make_tokenizer(vocabulary: int, count: int = 1500) -> Any:
    """A byte-level BPE tokenizer trained on scenes of its own seed; it can spell any text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )

    def texts() -> Iterator[str]:
        for scene in islice(scenes(-1, len(LEVELS) - 1), count):
            yield from scene.texts
            yield from (f"{e.user} {e.answer}" for e in scene.exchanges)
            yield DEFAULT_SYSTEM

    bpe.train_from_iterator(texts(), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<|system|>", eos_token="<|end|>", pad_token="<|end|>"
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def make_model(config: Config, tokenizer: Any) -> Any:
    """Random weights, but heads that do from the start what matching by name is made of.

    Every embedding has the same length and one large constant component, from which half of the first layer's heads and a quarter of the
    second's make a query and a key that fit best one, two or three tokens back. All other heads have the same
    matrix for queries and keys, in the slow rotary dimensions only, so that tokens attend to their like at any distance.
    Outputs are the transposed value matrices: a head copies what it attends to.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(config.seed)
    std = config.hidden**-0.5 / 2
    hf = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.hidden,
            intermediate_size=config.intermediate,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.heads,
            max_position_embeddings=8192,
            rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
            tie_word_embeddings=True,
            initializer_range=std,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    hf.config.cas_reader = True  # the format of its questions is its own: cas.seeds.READER_SEEDS
    size = config.hidden // config.heads
    half = size // 2
    frequencies = 100_000.0 ** (-torch.arange(half) / half)
    with torch.no_grad():
        embedding = hf.model.embed_tokens.weight
        random = torch.randn_like(embedding)
        embedding.copy_(config.hidden**0.5 * std * random / random.norm(dim=1, keepdim=True))
        embedding[:, 0] = 4 * std
        for number, layer in enumerate(hf.model.layers):
            attention = layer.self_attn
            content = torch.randn(config.heads, size, config.hidden) * (2 / config.hidden) ** 0.5
            content[:, : half // 2], content[:, half : half + half // 2] = 0.0, 0.0
            content[:, :, 0] = 0.0
            query, key = content.clone(), content.clone()
            value = torch.randn(config.heads, size, config.hidden) * config.hidden**-0.5
            output = std * value
            for head in range(config.heads // 2 if number == 0 else 0):
                query[head], key[head] = 0.0, 0.0
                query[head, : half // 2, 0] = 1.3
                key[head, : half // 2, 0] = 1.3 * torch.cos((head + 1) * frequencies[: half // 2])
                key[head, half : half + half // 2, 0] = 1.3 * torch.sin((head + 1) * frequencies[: half // 2])
                value[head] = value[0]
                output[head] = 3 * std * value[0]
            value[:, :, 0] = 0.0
            attention.q_proj.weight.copy_(query.flatten(0, 1))
            attention.k_proj.weight.copy_(key.flatten(0, 1))
            attention.v_proj.weight.copy_(value.flatten(0, 1))
            attention.o_proj.weight.copy_(output.flatten(0, 1).T)
    return hf


class Trainer:
    """Weights, their Adam state and where the run is; everything a checkpoint holds."""

    def __init__(self, config: Config) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from cas.loading import Source
        from cas.model import FrozenModel

        self.config, self.folder = config, Path(config.output)
        self.folder.mkdir(parents=True, exist_ok=True)
        at = self.folder / "tokenizer"
        if not (at / "tokenizer.json").exists():
            source = config.init and AutoTokenizer.from_pretrained(config.init)
            (source or make_tokenizer(config.vocabulary)).save_pretrained(at)
        tokenizer = AutoTokenizer.from_pretrained(at)
        hf = (
            AutoModelForCausalLM.from_pretrained(config.init, dtype=torch.float32)
            if config.init
            else make_model(config, tokenizer)
        )
        self.model = FrozenModel(hf, tokenizer, Source("folder", "reader"))
        self.parameters = dict(hf.named_parameters())
        hf.requires_grad_(True)
        decayed = [p for p in self.parameters.values() if p.dim() > 1]
        rest = [p for p in self.parameters.values() if p.dim() < 2]
        self.optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}],
            lr=config.lr,
            betas=(0.9, 0.98),
        )
        self.step = self.tokens = self.scene = 0
        self.level, self.right = config.level, 0.0
        self._resume()

    def learning_rate(self) -> float:
        """Warm-up, a long plateau, and a linear decay over the last fifth of the tokens."""
        left = (self.config.tokens - self.tokens) / (0.2 * self.config.tokens)
        return self.config.lr * min(1.0, (self.step + 1) / self.config.warmup, max(0.02, left))

    def train_step(self, part: Sequence[Scene]) -> dict[str, Any]:
        """One step on a few scenes: read the texts, answer over them, learn. Returns figures of the step."""
        import torch
        from torch.nn.functional import cross_entropy

        packed = Packed(part, self.model, Random(f"{self.config.seed}/layout/{self.step}"))
        with torch.autocast("cpu", torch.bfloat16):
            logits = self.model.forward(packed.ids, packed.positions, packed, rows=packed.rows)[0]
        losses = cross_entropy(logits.float(), packed.gold, reduction="none")
        answers = packed.answering
        answering, reading = losses[answers].mean(), losses[~answers].mean()
        (answering + self.config.reading * reading).backward()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        self.optimizer.step()
        self.optimizer.zero_grad()
        hits = (logits[answers].argmax(-1) == packed.gold[answers]).split(packed.answer_lengths)
        self.step, self.tokens = self.step + 1, self.tokens + packed.ids.shape[1]
        return {
            "loss": float(answering.detach()),
            "reading": float(reading.detach()),
            "norm": float(norm),
            "right": [(n, kind, bool(hit.all())) for (n, kind), hit in zip(packed.kinds, hits)],
            "tokens": packed.ids.shape[1],
        }

    def run(self, stop: Any) -> bool:
        """Train until the tokens are used up, or ``stop()``."""
        stream = scenes(self.config.seed, self.level, self.scene)
        seen: Counter[str] = Counter()
        right: Counter[str] = Counter()
        started, since = time.monotonic(), self.tokens
        losses: list[float] = []
        while self.tokens < self.config.tokens and not stop():
            part, total = [], 0
            while total < self.config.step_tokens:
                scene = next(stream)
                self.scene += 1
                if scene.exchanges:
                    part.append(scene)
                    total += sum(len(t) for t in scene.texts) // 5 + 20 * len(scene.exchanges)
            figures = self.train_step(part)
            losses.append(figures["loss"])
            hits = []
            for number, kind, hit in figures["right"]:
                key = kind if len(part[number].texts) == 1 else f"{kind} x{len(part[number].texts)}"
                seen[key] += 1
                right[key] += hit
                if kind not in ("write", WHOLE, TWO):
                    hits.append(hit)
            if hits:
                self.right += 0.01 * (sum(hits) / len(hits) - self.right)
            if self.right > 0.9 and self.level < len(LEVELS) - 1:
                self.level, self.right = self.level + 1, 0.0
                stream = scenes(self.config.seed, self.level, self.scene)
            if self.step % 100 == 0:
                rate = (self.tokens - since) / (time.monotonic() - started)
                line = {
                    "step": self.step, "tokens": self.tokens, "level": self.level, "right": round(self.right, 3),
                    "loss": round(sum(losses) / len(losses), 4), "rate": round(rate), "lr": self.learning_rate(),
                    "exact": {k: [round(right[k] / n, 3), n] for k, n in sorted(seen.items())},
                }  # fmt: skip
                with (self.folder / "curve.jsonl").open("a") as file:
                    file.write(json.dumps(line) + "\n")
                print(json.dumps({k: v for k, v in line.items() if k != "lr"}), file=sys.stderr, flush=True)
                seen, right, losses, started, since = Counter(), Counter(), [], time.monotonic(), self.tokens
            if self.step % 500 == 0:
                self.save()
        self.save()
        return self.tokens >= self.config.tokens

    def save(self) -> None:
        """Everything to go on with, in one file, whole or not at all; and the model as others load it."""
        import torch
        from safetensors.torch import save_file

        tensors = {f"weight.{n}": p.detach() for n, p in self.parameters.items()}
        for name, parameter in self.parameters.items():
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"{key}.{name}"] = value
        state = {k: getattr(self, k) for k in ("step", "tokens", "scene", "level", "right")}
        partial = self.folder / "checkpoint.partial"
        save_file(tensors, partial, metadata={"state": json.dumps(state)})
        os.replace(partial, self.folder / "checkpoint.safetensors")
        model = self.folder / "model"
        self.model.hf.to(torch.bfloat16).save_pretrained(model)
        self.model.tokenizer.save_pretrained(model)
        self.model.hf.float()
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(tensors[f"weight.{name}"])

    def _resume(self) -> None:
        from safetensors import safe_open

        file = self.folder / "checkpoint.safetensors"
        if not file.exists():
            return
        with safe_open(file, "pt") as found:
            for key, value in json.loads(found.metadata()["state"]).items():
                setattr(self, key, value)
            for name, parameter in self.parameters.items():
                parameter.data.copy_(found.get_tensor(f"weight.{name}"))
                self.optimizer.state[parameter] = {
                    key: found.get_tensor(f"{key}.{name}") for key in ("step", "exp_avg", "exp_avg_sq")
                }


class Packed:
    """Scenes packed one behind the other, and the attention over them.

    A scene is the header, its texts, its exchanges. Texts see the header and themselves; an exchange sees the header, the
    texts it names and itself. Under both layouts, one drawn for each step, every text's keys stand behind the header, as
    those of cartridges do; ``fixed`` and ``offset`` differ in where an exchange's own tokens stand.
    """

    def __init__(self, part: Sequence[Scene], model: Any, random: Random) -> None:
        import torch

        template = model.template
        header, h = list(template.header_ids), len(template.header_ids)
        policy, slack = random.choice(("fixed", "offset")), random.randint(0, 64)
        ids: list[int] = []
        positions: list[int] = []
        rows: list[int] = []
        gold: list[int] = []
        answering: list[bool] = []
        self.header = h
        # Of every scene: where it starts, its texts' lengths, where it ends, and what its exchanges see of it.
        self.scenes: list[tuple[int, list[int], int, Tensor]] = []
        self.kinds: list[tuple[int, str]] = []
        self.answer_lengths: list[int] = []
        for number, scene in enumerate(part):
            start = len(ids)
            texts = [model.encode(text) for text in scene.texts]
            owner = [-1] * h  # of every token: the header, a text, an exchange
            ids += header
            positions += range(h)
            for i, text in enumerate(texts):
                rows += range(len(ids), len(ids) + len(text) - 1)
                gold += text[1:]
                answering += [False] * (len(text) - 1)
                ids += text
                positions += range(h, h + len(text))
                owner += [i] * len(text)
            middle = len(ids)
            for i, e in enumerate(scene.exchanges):
                user = [*template.footer_ids, *model.encode(e.user), *template.suffix_ids]
                answer = [*model.encode(e.answer), *template.end_ids]
                sizes = [len(texts[t]) for t in e.texts]
                first = h + (max(map(len, texts)) + slack if policy == "fixed" else sum(sizes))
                rows += range(len(ids) + len(user) - 1, len(ids) + len(user) + len(answer) - 1)
                gold += answer
                answering += [True] * len(answer)
                ids += [*user, *answer[:-1]]
                positions += range(first, first + len(user) + len(answer) - 1)
                owner += [len(texts) + i] * (len(user) + len(answer) - 1)
                self.kinds.append((number, e.kind))
                self.answer_lengths.append(len(answer))
            sees = torch.eye(len(texts) + len(scene.exchanges) + 1, dtype=torch.bool)
            sees[:, -1] = True  # the header
            for i, e in enumerate(scene.exchanges):
                sees[len(texts) + i, list(e.texts)] = True
            of = torch.tensor(owner)
            order = torch.arange(len(owner))
            mask = sees[of[middle - start :, None], of[None]] & (order[middle - start :, None] >= order[None])
            self.scenes.append((start, [len(text) for text in texts], len(ids), mask))
        self.ids, self.positions = torch.tensor([ids]), torch.tensor([positions])
        self.rows, self.gold, self.answering = torch.tensor(rows), torch.tensor(gold), torch.tensor(answering)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
        """query [1, Q, T, D], key and value [1, H, T, D] -> [1, T, Q, D]."""
        import torch
        from torch.nn.functional import scaled_dot_product_attention as attention

        out = []
        for start, texts, end, mask in self.scenes:
            low = start + self.header
            behind = [x[:, :, start:low] for x in (query, key, value)]
            for length in texts:
                q, k, v = (
                    torch.cat([h, x[:, :, low : low + length]], dim=2) for h, x in zip(behind, (query, key, value))
                )
                read = attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
                out.append(read if low == start + self.header else read[:, :, self.header :])
                low += length
            out.append(
                attention(
                    query[:, :, low:end],
                    key[:, :, start:end],
                    value[:, :, start:end],
                    attn_mask=mask,
                    scale=scale,
                    enable_gqa=True,
                )
            )
        return torch.cat(out, dim=2).transpose(1, 2)


def main() -> int:
    """Train, or go on. Returns the exit status."""

    def train() -> int:
        config = parse(Config, "python -m experiments.train_reader", sys.argv[1:])
        trainer = Trainer(config)
        (trainer.folder / "config.json").write_text(json.dumps(asdict(config), indent=1) + "\n")
        with console.Interrupt().listening() as interrupt:
            return 0 if trainer.run(interrupt) else interrupt.exit_status

    return console.run(train)


if __name__ == "__main__":
    sys.exit(main())
