"""Small tokenizers of our own with the traits of several families."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

from conftest import CHATML, TEXTS

from cas.options import DEFAULT_SYSTEM

OWN = ("qwen", "llama2", "metaspace", "gemma", "unigram")

GPT4 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% for m in messages %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %} {{ m['content'] }} {{ eos_token }}"
    "{% elif m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]{% endif %}{% endfor %}"
)
LINES = [*TEXTS.values(), *[DEFAULT_SYSTEM] * 3, "Who?\nWhy?\nWhen?\nWhere?\n" * 9, "system user model assistant: " * 3]
BYTES = [f"<0x{i:02X}>" for i in range(256)]


@cache
def own_tokenizer(family: str) -> Any:
    """A tokenizer of a few hundred ids with the traits of a family."""
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
        trainers,
    )
    from transformers import PreTrainedTokenizerFast

    options: dict[str, Any] = {"vocab_size": 700, "show_progress": False}
    spaces = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    if family == "qwen":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.normalizer = normalizers.NFC()
        split = pre_tokenizers.Split(Regex(GPT4), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), **options)
        names = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    elif family == "unigram":  # whose vocabulary would spell "</s>" as one piece
        pieces = ["<unk>", "<s>", "</s>", *BYTES, "▁", "</", "s", ">", *"abcdefghijklmnopqrtuvwxyz<?.", "▁the", "ing"]
        tokenizer = Tokenizer(models.Unigram([(p, -float(len(p) < 3)) for p in pieces], 0, byte_fallback=True))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
        tokenizer.decoder = decoders.Sequence([*spaces, decoders.Strip(" ", 1, 0)])
    else:
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        special = ["<pad>", "<eos>", "<bos>", "<unk>"] if family == "gemma" else ["<unk>", "<s>", "</s>"]
        trainer = trainers.BpeTrainer(special_tokens=[*special, *BYTES], **options)
        replace = normalizers.Replace(" ", "▁")
        if family == "llama2":
            tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace])
        elif family == "gemma":
            tokenizer.normalizer = replace
            names = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
        tokenizer.decoder = decoders.Sequence([*spaces, *([] if family == "gemma" else [decoders.Strip(" ", 1, 0)])])
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
            prepend_scheme="never" if family != "metaspace" else "always"
        )
    if family != "unigram":
        tokenizer.train_from_iterator(LINES, trainer)
        spec = json.loads(tokenizer.to_str())  # the trainer knows bytes as special tokens alone
        spec["added_tokens"] = [t for t in spec["added_tokens"] if t["content"] not in BYTES]
        tokenizer = Tokenizer.from_str(json.dumps(spec))
    if family in ("llama2", "gemma"):
        tokenizer.pre_tokenizer = None
    if family == "qwen":
        tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
        plain = ["<tool_call>", "</tool_call>", "<think>", "</think>"]
        tokenizer.add_tokens([AddedToken(t, normalized=False, special=False) for t in plain])
    elif family == "gemma":
        tokenizer.add_tokens([AddedToken(t, normalized=False) for t in ["\n", "\n\n", "<table>", "<unused0>"]])
        tokenizer.add_special_tokens(["<start_of_turn>", "<end_of_turn>"])
    if (bos := names.get("bos_token")) is not None:
        place = (bos, tokenizer.token_to_id(bos))
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[place])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    wrapped.chat_template = {"qwen": CHATML, "gemma": GEMMA, "llama2": INST}.get(family)
    return wrapped
