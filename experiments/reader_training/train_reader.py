"""Train the embedded reader from scratch: a small Llama that reads fictional worlds, with its own tokenizer.

    python -m experiments.train_reader --output runs/reader

What it reads is in ``experiments/reader_training/scenes.py``. Scenes begin small and grow whenever nine of ten
questions about single facts are answered. The same command resumes an interrupted run.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

from cas import console
from cas.data.worlds import TWO, WHOLE
from cas.errors import ConfigError
from cas.options import parse
from experiments.reader_training.packing import LAYERS, LOOKS, Packed
from experiments.reader_training.scenes import LEVELS, Scene, scenes
from experiments.reader_training.tokenizer import make_tokenizer

ROPE_BASE = 1e8


@dataclass(frozen=True)
class Config:
    """Train the embedded reader."""

    output: str = "runs/reader"
    """Folder of the checkpoint, the curve and the model so far."""
    tokens: int = 22_000_000
    """Tokens to train on."""
    step_tokens: int = 1500
    """Approximate tokens of a step, estimated from characters and exchanges of scenes."""
    lr: float = 4e-4
    """Peak learning rate."""
    warmup: int = 300
    """Steps until the peak."""
    vocabulary: int = 3584
    """Tokens of the tokenizer."""
    hidden: int = 256
    """Width of the model."""
    layers: int = 8
    """Layers."""
    heads: int = 4
    """Attention heads."""
    intermediate: int = 288
    """Width of the MLP."""
    reading: float = 0.3
    """Weight of predicting the texts themselves."""
    looking: float = 0.5
    """Weight of the loss that shows a few attention heads where to look."""
    level: int = 0
    """Level of the curriculum to begin with."""
    seed: int = 0
    """Seed of weights and scenes; worlds of collections have other seeds."""
    init: str | None = None
    """Folder of a model to start from, in place of random weights."""


def make_model(config: Config, tokenizer: Any) -> Any:
    """Random weights, but some attention heads that begin as what looking a name up is made of; see :func:`look_up`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(config.seed)
    hf = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.hidden,
            intermediate_size=config.intermediate,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.heads,
            max_position_embeddings=8192,
            rope_parameters={"rope_type": "default", "rope_theta": ROPE_BASE},
            tie_word_embeddings=True,
            initializer_range=config.hidden**-0.5 / 2,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    hf.config.cas_reader = (
        True  # the format of its questions is its own: cas.selfstudy.seed_prompts.READER_SEED_PROMPTS
    )
    look_up(hf, config)
    return hf


def look_up(hf: Any, config: Config) -> None:
    """Set some attention heads so that the model can continue a sequence it has seen (an induction circuit), and so
    that a value is found by the name that heads of an earlier layer looked at.

    Random weights had hardly begun to continue sequences after 600,000 tokens of them; from here twenty steps suffice.
    Some of the residual stream's components are kept free for a trail of the three tokens before, some for a name, one
    is constant, the rest hold the token's own embedding. Three heads of the first layer look one, two and three tokens
    back, by rotation alone, and write the trail. In the second layer keys are trails; the queries of half the heads are
    the token itself (what followed it before?), those of the others its trail, not nearby (where were these words
    read?); all copy the token they find. Heads that name (``LOOKS``), once they look at names, write them; heads that
    tell look where the same words were read, and copy the name written there; heads that find look where the same name
    has been written, and copy, in turns, token or name. In the next layer, half the heads look where the written name
    itself stands, the others where the name just found has been written; all copy. Everything else starts near zero.
    """
    import torch

    size, std = config.hidden // config.heads, config.hidden**-0.5 / 2
    half, fast = size // 2, size // 4  # fast rotary pairs distinguish positions, slow ones hardly rotate
    wide = 2 * (half - fast)
    slow = [*range(fast, half), *range(half + fast, size)]
    frequencies = ROPE_BASE ** (-torch.arange(half) / half)
    trail, name, own = slice(1, 1 + wide), slice(1 + wide, 1 + 2 * wide), slice(1 + 2 * wide, config.hidden)
    kept = config.hidden - 1 - 2 * wide
    same = torch.eye(wide)
    with torch.no_grad():
        for layer in hf.model.layers:
            layer.self_attn.o_proj.weight.mul_(0.1)
            layer.mlp.down_proj.weight.mul_(0.1)
        embedding = hf.model.embed_tokens.weight
        random = torch.randn(len(embedding), kept)
        embedding.zero_()
        embedding[:, own] = std * kept**0.5 * random / random.norm(dim=1, keepdim=True)
        embedding[:, 0] = 4 * std
        hf.model.norm.weight.fill_(2.0)
        known = torch.randn(wide, kept) * kept**-0.5  # what the trail keeps of a token
        names = [
            torch.randn(wide, kept) * kept**-0.5 for _ in range(2)
        ]  # what is written of its first, and of its last word
        layers: list[tuple[int, str, tuple[int, ...]]] = [(0, "", (0, 1, 2)), (1, "", (0, 1, 2, 3))]
        layers += [(layer, name, heads) for name, places in LOOKS.items() for layer, heads in places]
        for number, does, heads in layers:
            if number >= config.layers:
                continue
            attention = hf.model.layers[number].self_attn
            for head in [head for head in heads if head < config.heads]:
                rows = slice(head * size, (head + 1) * size)
                query, key, value = (getattr(attention, f"{n}_proj").weight[rows] for n in "qkv")
                output = attention.o_proj.weight[:, rows]
                for weight in (value, output) if does else (query, key, value, output):
                    weight.zero_()
                if number == 0:
                    query[:fast, 0] = 1.3
                    key[:fast, 0] = 1.3 * torch.cos((head + 1) * frequencies[:fast])
                    key[half : half + fast, 0] = 1.3 * torch.sin((head + 1) * frequencies[:fast])
                    value[:wide, own] = known
                    output[trail, :wide] = std * same
                    continue
                if does == "naming":
                    value[:wide, own] = names[head]
                    output[name, :wide] = std * same
                    continue
                if does == "finding":
                    query[slow, name], key[slow, name] = 1.2 * same, 1.2 * same
                elif does == "writing":
                    query[slow, name], key[slow, own] = 1.2 * same, 1.2 * names[head % 2]
                elif does == "second":
                    query[slow, own], key[slow, name] = 1.2 * (names[0] + names[1]), 1.2 * same
                else:
                    key[slow, trail] = 1.9 * same
                    if number == 1 and head % 2 == 0:
                        query[slow, own] = 1.9 * known
                    else:
                        query[slow, trail] = 1.9 * same
                        query[: fast // 2, 0], key[: fast // 2, 0] = 2.0, -2.0
                if does == "telling" or (does == "finding" and head % 2):
                    value[:wide, name], output[name, :wide] = same, std / len(heads) * same
                    continue
                copied = torch.randn(size, kept) * kept**-0.5
                value[:, own] = copied
                output[own] = 2 * std * copied.T * (2 / len(heads) if does else 1)


class Trainer:
    """Weights, their Adam state and the progress of the run; everything a checkpoint holds."""

    def __init__(self, config: Config) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from cas.model.frozen import FrozenModel
        from cas.model.loading import Source

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
        self.begun = 0  # steps since all parameters are trained
        self.level, self.right = config.level, 0.0
        self.looking = dict.fromkeys(LOOKS, 3.0 if config.looking else 0.0)
        self._resume()

    def learning_rate(self) -> float:
        """Warm-up, a long plateau, and a linear decay over the last fifth of the tokens."""
        left = (self.config.tokens - self.tokens) / (0.2 * self.config.tokens)
        return self.config.lr * min(1.0, (self.begun or self.step) / self.config.warmup, max(0.02, left))

    def train_step(self, part: Sequence[Scene]) -> dict[str, Any]:
        """One step on a few scenes: read the texts, answer over them, learn. Returns figures of the step."""
        import torch
        from torch.nn.functional import cross_entropy

        packed = Packed(
            part, self.model, Random(f"{self.config.seed}/layout/{self.step}"), look=self.config.looking > 0
        )
        with torch.autocast("cpu", torch.bfloat16):
            logits = self.model.forward(packed.ids, packed.positions, packed, rows=packed.rows)[0]
        losses = cross_entropy(logits.float(), packed.gold, reduction="none")
        answers = packed.answering
        answering, reading = losses[answers].mean(), losses[~answers].mean()
        looking = {name: torch.cat(parts).mean() for name, parts in packed.looking.items() if parts}
        for name, mean in looking.items():
            self.looking[name] += 0.02 * (float(mean.detach()) - self.looking[name])
        # First attention to names alone: anything else learned before would be undone by it.
        loss = self.config.looking * looking.get("naming", 0.0 * reading)
        if self.begun or self.looking["naming"] < 0.5:
            loss = loss + self.config.looking * sum(looked for name, looked in looking.items() if name != "naming")
            loss = loss + answering + self.config.reading * reading
            self.begun += 1
        loss.backward()
        if not self.begun:
            for name, parameter in self.parameters.items():
                if not re.search(rf"layers.{LOOKS['naming'][0][0]}.self_attn.[qk]_proj", name):
                    parameter.grad = None
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
            **{name: float(loss.detach()) for name, loss in looking.items()},
            "right": [(n, kind, bool(hit.all())) for (n, kind), hit in zip(packed.kinds, hits)],
            "tokens": packed.ids.shape[1],
        }

    def run(self, stop: Any) -> bool:
        """Train until the tokens are used up, or ``stop()``."""
        stream = scenes(self.config.seed, self.level, self.scene)
        seen: Counter[str] = Counter()
        right: Counter[str] = Counter()
        started, since = time.monotonic(), self.tokens
        losses: dict[str, list[float]] = {}
        while self.tokens < self.config.tokens and not stop():
            part, total = [], 0
            while total < self.config.step_tokens:
                scene = next(stream)
                self.scene += 1
                if scene.exchanges:
                    part.append(scene)
                    total += sum(len(t) for t in scene.texts) // 5 + 20 * len(scene.exchanges)
            figures = self.train_step(part)
            for name in ("loss", "reading", *LOOKS):
                losses.setdefault(name, []).extend([figures[name]] if name in figures else [])
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
                    **{name: round(sum(some) / len(some), 4) for name, some in losses.items() if some},
                    "rate": round(rate), "lr": self.learning_rate(),
                    "exact": {k: [round(right[k] / n, 3), n] for k, n in sorted(seen.items())},
                }  # fmt: skip
                with (self.folder / "curve.jsonl").open("a") as file:
                    file.write(json.dumps(line) + "\n")
                print(json.dumps({k: v for k, v in line.items() if k != "lr"}), file=sys.stderr, flush=True)
                seen, right, losses, started, since = Counter(), Counter(), {}, time.monotonic(), self.tokens
            if self.step % 500 == 0:
                self.save()
        self.save()
        return self.tokens >= self.config.tokens

    def save(self) -> None:
        """Write the checkpoint, atomically, and the model in Hugging Face's format."""
        import torch
        from safetensors.torch import save_file

        tensors = {f"weight.{n}": p.detach() for n, p in self.parameters.items()}
        for name, parameter in self.parameters.items():
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"{key}.{name}"] = value
        state = {k: getattr(self, k) for k in ("step", "tokens", "scene", "level", "right", "looking", "begun")}
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
        with safe_open(file, "pt") as checkpoint:
            for key, value in json.loads(checkpoint.metadata()["state"]).items():
                setattr(self, key, value)
            for name, parameter in self.parameters.items():
                parameter.data.copy_(checkpoint.get_tensor(f"weight.{name}"))
                if f"step.{name}" in checkpoint.keys():  # noqa: SIM118  (those not trained yet have none)
                    self.optimizer.state[parameter] = {
                        key: checkpoint.get_tensor(f"{key}.{name}") for key in ("step", "exp_avg", "exp_avg_sq")
                    }


def _refuse(config: Config) -> None:
    """Raise ConfigError for what cannot be trained, or was begun with other options; only ``tokens`` may change."""
    if not 0 <= config.level < len(LEVELS):
        raise ConfigError(f"--level {config.level}: from 0 to {len(LEVELS) - 1}")
    if config.looking and config.layers < LAYERS:
        raise ConfigError(f"--layers {config.layers}: at least {LAYERS}, or --looking 0")
    if config.init and not Path(config.init, "config.json").exists():
        raise ConfigError(f"--init {config.init}: no folder of a model")
    file = Path(config.output) / "config.json"
    begun = json.loads(file.read_text()) if file.exists() else {}
    changed = [k for k, v in asdict(config).items() if k not in ("tokens", "output") and begun.get(k, v) != v]
    if changed:
        raise ConfigError(f"{config.output} was begun with another --{changed[0]}; give another --output")


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, or go on. Returns the exit status."""

    def train() -> int:
        config = parse(Config, "python -m experiments.train_reader", arguments)
        _refuse(config)
        trainer = Trainer(config)
        (trainer.folder / "config.json").write_text(json.dumps(asdict(config), indent=1) + "\n")
        with console.Interrupt().listening() as interrupt:
            if trainer.run(interrupt):
                return 0
            print("interrupted, saved; the same command goes on", file=sys.stderr)
            return interrupt.exit_status

    return console.run(train)


if __name__ == "__main__":
    sys.exit(main())
