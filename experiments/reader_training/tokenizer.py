"""The tokenizer of the embedded reader, with its chat template."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

from cas.options import DEFAULT_SYSTEM
from experiments.reader_training.scenes import LEVELS, scenes

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% if m['role'] == 'assistant' %}<|end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ("<|end|>", "<|system|>", "<|user|>", "<|assistant|>")


def make_tokenizer(vocabulary: int, count: int = 1500) -> Any:
    """A byte-level BPE tokenizer trained on scenes of its own seed; it can spell any text.

    A word is the same token at the start of a text or line as behind a space, or matching it would mean learning which
    token spells which: a space is put there, and taken away behind line breaks by the decoder.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.Replace(Regex(r"\n(?=\S)"), "\n ")
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    bpe.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace("\n ", "\n")])
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )

    def texts() -> Iterator[str]:
        for scene in islice(scenes(-1, len(LEVELS) - 1), count):
            yield from scene.texts
            for e in scene.exchanges:
                yield from (e.user, e.answer)
            yield DEFAULT_SYSTEM

    bpe.train_from_iterator(texts(), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<|system|>", eos_token="<|end|>", pad_token="<|end|>"
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer
