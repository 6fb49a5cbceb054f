"""Train the embedded reader from scratch: a small Llama that reads fictional worlds, with its own tokenizer.

    python -m experiments.train_reader --output runs/reader

Every step reads *scenes*: some texts, each prefilled by itself, and exchanges (a user's message and the answer) that see one
or several of them. Four kinds of scene come equally often: one whole document; retrieved chunks of several documents in one
text; a chunk with requests to write questions about it; a chunk with these questions to answer. Half of all scenes with
whole documents load several, as composed cartridges would be: at the same positions, blind to one another.

Scenes begin small and grow whenever the reader answers nine of ten at its present level. Interrupted, the same command goes on.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice, pairwise
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from cas import console
from cas.config import DEFAULT_SYSTEM, parse
from cas.lexicon import FIRST, LAST, PERSON
from cas.worlds import SUMMARY, TWO, WHOLE, Asked, Record, Shape, make_records, single, summary, two, whole
from retrieval.chunk import split_sentences, with_title

if TYPE_CHECKING:
    pass

KINDS = ("whole", "rag", "write", "answer", "lists")
SEED_KINDS = ("question", "structuring", "use case", "creative")  # in the order of an attribute's wordings
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


# -- what is read -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Exchange:
    """A user's message and the answer, which sees these texts of its scene."""

    kind: str
    user: str
    answer: str
    texts: tuple[int, ...]


@dataclass(frozen=True)
class Scene:
    """Texts, each prefilled by itself behind the header, and exchanges about them."""

    texts: tuple[str, ...]
    exchanges: tuple[Exchange, ...]


SMALL = Shape(people=(1, 1), facts=(2, 3), place_facts=(1, 2), event_facts=(0, 0), filler=0.0, indirect=0.0)
# Shape of the records, most documents loaded side by side, most chunks in one text.
LEVELS: tuple[tuple[Shape, int, int], ...] = (
    (SMALL, 2, 2),  # lists only
    (SMALL, 2, 2),
    (replace(SMALL, people=(1, 2), facts=(2, 3)), 3, 3),
    (replace(SMALL, people=(2, 3), facts=(3, 4), indirect=0.1), 4, 4),
    (replace(SMALL, people=(2, 3), facts=(4, 4), event_facts=(0, 3), filler=0.1, indirect=0.3), 6, 5),
    (Shape((3, 5), (3, 5), (2, 5), (0, 4), 0.2, 0.4), 8, 6),
    (Shape((4, 8), (4, 6), (3, 6), (2, 4), 0.3, 0.5), 10, 8),
    (Shape(), 12, 8),
)


def scenes(seed: int, level: int, start: int = 0) -> Iterator[Scene]:
    """Scenes without end, a function of seed and number alone; half of them at ``level``, the rest below."""
    number = start
    while True:
        random = Random(f"reader/{seed}/{number}")
        chosen = level if random.random() < 0.5 else random.randint(0, level)
        shape, side_by_side, chunks = LEVELS[chosen]
        kind = KINDS[number % 5] if chosen else "lists"
        yield _scene(random, f"reader/{seed}/{number}", kind, shape, side_by_side, chunks)
        number += 1


def _scene(random: Random, seed: str, kind: str, shape: Shape, side_by_side: int, chunks: int) -> Scene:
    if kind == "lists":
        return _lists(random, side_by_side)
    if kind == "whole":
        count = random.randint(2, side_by_side) if random.random() < 0.6 else 1
        records = list(make_records(seed, 0, shape, count))
        texts = tuple(with_title(r.document.title, r.document.text) for r in records)
        found = []
        for i, record in enumerate(records):
            sums = _summaries(record, texts[i])
            asked = [*single(record), *whole(record, random), *random.sample(sums, min(1, len(sums)))]
            pairs = two(record, records[(i + 1) % count]) if count > 1 else ()
            visible = tuple(range(count))
            some = random.sample(asked, min(len(asked), max(2, 24 // count)))
            found += [_asked(random, a, visible if random.random() < 0.8 else (i,)) for a in some]
            two_asked = list(pairs)
            found += [_asked(random, a, visible) for a in random.sample(two_asked, min(2, len(two_asked)))]
        return Scene(texts, tuple(found))
    records = list(make_records(seed, 0, shape, random.randint(2, 4) if kind == "rag" else 1))
    if kind == "rag":
        pieces = [(r, chunk) for r in records for chunk in _chunks(random, r.document.text, random.randint(2, 8))]
        pieces = random.sample(pieces, min(len(pieces), chunks))
        text = "\n\n".join(with_title(r.document.title, chunk) for r, chunk in pieces)
        asked = [a for r in records for a in _told_in(r, [c for record, c in pieces if record is r])]
        some = random.sample(asked, min(len(asked), 16))
        return Scene((text,), tuple(_asked(random, a, (0,)) for a in some))
    record = records[0]
    sentences = [record.document.text[a:b].strip() for a, b in split_sentences(record.document.text)]
    size = random.randint(min(4, len(sentences)), min(40, len(sentences)))
    low = random.randint(0, len(sentences) - size)
    chunk = sentences[low : low + size]
    text = with_title(record.document.title, " ".join(chunk))
    told = [*_told_in(record, [" ".join(chunk)]), *_summaries(record, text)]
    random.shuffle(told)
    if kind == "answer":
        return Scene((text,), tuple(_asked(random, a, (0,)) for a in told[:16]))
    exchanges = []
    for a in told[:16]:
        sentence = random.choice(a.sentences)
        if chunk.count(sentence) == 1:  # else nobody knows about whom
            which = random.randrange(len(a.asks))
            seed = "summarisation" if a.kind == SUMMARY else SEED_KINDS[which]
            exchanges.append(Exchange("write", f"{seed}: {sentence}", a.asks[which], (0,)))
    return Scene((text,), tuple(exchanges))


def _asked(random: Random, a: Asked, texts: tuple[int, ...]) -> Exchange:
    return Exchange(a.kind, random.choice((*a.asks, *a.tests)), a.answer, texts)


def _told_in(record: Record, chunks: Sequence[str]) -> Iterator[Asked]:
    """The facts whose sentence and whose subject's name stand together in one of the chunks."""
    for a in single(record):
        if any(a.sentences[0] in chunk and a.subject.lower() in chunk.lower() for chunk in chunks):
            yield a


def _summaries(record: Record, text: str) -> list[Asked]:
    return [a for subject in record.subjects if (a := summary(subject, text)) is not None]


def _chunks(random: Random, text: str, size: int) -> list[str]:
    sentences = [text[a:b].strip() for a, b in split_sentences(text)]
    return [" ".join(sentences[i : i + size]) for i in range(0, len(sentences), size)]


def _lists(random: Random, side_by_side: int) -> Scene:
    """Values by name, by name and attribute, or by attribute under a name's heading: what matching is, with no prose around.

    The few attributes come back under every name, so that neither name nor attribute alone finds a value.
    """
    count, each, style = random.randint(1, side_by_side), random.randint(2, 6), random.choice(("pair", "row", "card"))
    firsts, lasts = (random.sample(some, count * each // 2 + 2) for some in (FIRST, LAST))
    names = random.sample([f"{a} {b}" for a in firsts for b in lasts], count * each)
    kinds = [a for a in PERSON if a.values]
    kinds = random.sample(kinds, 1 if style == "pair" else random.randint(2, 3))
    values = {(n, a.name): random.choice(a.values or ()) for n in names for a in kinds}
    lines = {
        "pair": lambda n: [f"{n}: {values[n, kinds[0].name]}"],
        "row": lambda n: [f"{n}, {a.name}: {values[n, a.name]}" for a in random.sample(kinds, len(kinds))],
        "card": lambda n: [n, *(f"{a.name}: {values[n, a.name]}" for a in random.sample(kinds, len(kinds)))],
    }[style]
    texts = []
    for i in range(count):
        # Told again in another order: predicting the second telling is matching, too, and every token of it teaches.
        for again in range(random.choice((1, 2, 2))):
            rows = [lines(n) for n in random.sample(names[i::count], len(names[i::count]))]
            flat = [row for some in rows for row in some]
            told = "\n".join(random.sample(flat, len(flat)) if style == "row" else flat)
            texts[i:] = [told if not again else f"{texts[i]}\n{told}"]
    asked = random.sample(list(values), min(12, len(values)))
    return Scene(
        tuple(texts),
        tuple(
            Exchange(style, n if style == "pair" else f"{n}, {a}", values[n, a], tuple(range(count))) for n, a in asked
        ),
    )


PG, GAIN = 3.0, 1.0
# -- the model ----------------------------------------------------------------------------------------------------------


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
            content = torch.randn(config.heads, size, config.hidden) * (2 / config.hidden) ** 0.5 * GAIN
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
                output[head] = PG * std * value[0]
            value[:, :, 0] = 0.0
            attention.q_proj.weight.copy_(query.flatten(0, 1))
            attention.k_proj.weight.copy_(key.flatten(0, 1))
            attention.v_proj.weight.copy_(value.flatten(0, 1))
            attention.o_proj.weight.copy_(output.flatten(0, 1).T)
    return hf


# -- training -----------------------------------------------------------------------------------------------------------


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
        """One step on a few scenes: prefill the texts, answer over them, learn. Returns figures of the step."""
        import torch
        from torch.nn.functional import cross_entropy

        from cas.attention import Batch, Gathered, packed_positions
        from cas.cartridge import Layout

        model, template = self.model, self.model.template
        random = Random(f"{self.config.seed}/layout/{self.step}")
        header = list(template.header_ids)
        texts = [header + model.encode(text) for scene in part for text in scene.texts]
        asked, answers, visible, kinds, first = [], [], [], [], 0
        for number, scene in enumerate(part):
            for e in scene.exchanges:
                user = [*template.footer_ids, *model.encode(e.user), *template.suffix_ids]
                answers.append([*model.encode(e.answer), *template.end_ids])
                asked.append(user + answers[-1][:-1])
                visible.append(tuple(f"{first + i}" for i in e.texts))
                kinds.append((number, e.kind))
            first += len(scene.texts)
        with torch.autocast("cpu", torch.bfloat16):
            plain = Layout("offset", 0, 0)
            batch = Batch(tuple(map(len, texts)), ((),) * len(texts))
            keeping = _keeping()(batch, _empty(model), {}, plain, model.rope, torch.bfloat16)
            ids = torch.tensor([[t for text in texts for t in text]])
            read = model.forward(ids, packed_positions(batch, {}, plain), keeping)[0]
            kv = torch.stack([torch.stack(keeping.kv[layer]) for layer in sorted(keeping.kv)])  # [L, 2, H, sum T, D]
            h, ends = len(header), [*batch.starts(), ids.shape[1]]
            cartridges = {f"{i}": kv[:, :, :, ends[i] + h : ends[i + 1]] for i in range(len(texts))}
            longest = max(len(text) - h for text in texts)
            policy = random.choice(("fixed", "offset"))
            layout = Layout(policy, h, longest + random.randint(0, 64))  # type: ignore[arg-type]
            batch = Batch(tuple(map(len, asked)), tuple(visible))
            context = Gathered(batch, kv[:, :, :, :h], cartridges, layout, model.rope, torch.bfloat16)
            rows = torch.cat(
                [torch.arange(s + n - len(a), s + n) for s, n, a in zip(batch.starts(), batch.lengths, answers)]
            )
            sizes = {n: c.shape[3] for n, c in cartridges.items()}
            ids_asked = torch.tensor([[t for one in asked for t in one]])
            logits = model.forward(ids_asked, packed_positions(batch, sizes, layout), context, rows=rows)[0].float()
        gold = torch.tensor([t for a in answers for t in a])
        answering = cross_entropy(logits, gold)
        follows = torch.ones(ids.shape[1], dtype=torch.bool)  # within a text, behind the header
        for start, end in pairwise(ends):
            follows[start : start + h - 1] = False
            follows[end - 1] = False
        where = follows.nonzero()[:, 0]
        reading = cross_entropy(read[where].float(), ids[0, where + 1])
        (answering + self.config.reading * reading).backward()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        self.optimizer.step()
        self.optimizer.zero_grad()
        hits = (logits.argmax(-1) == gold).split([len(a) for a in answers])
        counts = ids.shape[1] + ids_asked.shape[1]
        self.step, self.tokens = self.step + 1, self.tokens + counts
        return {
            "loss": float(answering.detach()),
            "reading": float(reading.detach()),
            "norm": float(norm),
            "right": [(n, kind, bool(hit.all())) for (n, kind), hit in zip(kinds, hits)],
            "tokens": counts,
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


def _keeping() -> Any:
    """The packed attention, which also keeps every layer's keys and values (with their gradients)."""
    from cas.attention import Gathered

    class Keeping(Gathered):
        def attend(self, layer: int, query: Any, key: Any, value: Any, scale: float, window: int | None) -> Any:
            self.__dict__.setdefault("kv", {})[layer] = (key[0], value[0])
            return super().attend(layer, query, key, value, scale, window)

    return Keeping


def _empty(model: Any) -> Any:
    import torch

    g = model.geometry
    return torch.zeros(g.layers, 2, g.kv_heads, 0, g.head_dim)


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
