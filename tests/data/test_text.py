"""Encodings, titles, front matter and embedded files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cas.data.collection import Collection
from cas.data.text import decode, split_front_matter, title_in, without_data_uris

GERMAN = "Das Ventil schließt bei fünfzehn Bar. Die Brücke über den Fluß ist für Fußgänger gesperrt."
FRENCH = "Le café où nous étions hier est fermé à cause des élèves. Ça va très bien, merci."
RUSSIAN = "Клапан открывается при давлении пятнадцать бар. Насос стоит в подвале здания."
JAPANESE = "バルブは十五バールで開きます。ポンプは建物の地下にあります。"
CHINESE = "阀门在十五巴时打开。水泵位于大楼的地下室，每天检查一次。"


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        *[(text, e) for text in (GERMAN, RUSSIAN, CHINESE, "plain") for e in ("utf-8-sig", "utf-16", "utf-32")],
        *[(text, e) for text in (RUSSIAN, CHINESE, "It is plain text.") for e in ("utf-16-le", "utf-16-be")],
        (GERMAN, "latin-1"),
        (FRENCH, "cp1252"),
        ("Grüße", "cp1252"),
        ("The pump runs at 40 °C.\n", "cp1252"),
        ("Zażółć gęślą jaźń. Zawór otwiera się przy piętnastu barach.", "cp1250"),
        *[(RUSSIAN, e) for e in ("cp1251", "koi8-r", "cp866")],
        *[(JAPANESE, e) for e in ("shift_jis", "euc_jp")],
        (CHINESE, "gb18030"),
        ("閥門在十五巴時打開。水泵位於大樓的地下室。", "big5"),
        ("밸브는 15바에서 열립니다. 펌프는 건물 지하에 있습니다.", "cp949"),
    ],
)
def test_encodings(text: str, encoding: str) -> None:
    decoded = decode(text.encode(encoding))
    assert decoded is not None
    assert decoded[0] == text, decoded
    assert bool(decoded[1]) == (encoding != "utf-8-sig")


WORKSHOP = "The pump was designed by {} in the workshop at the harbor, and it opens the valve at fifteen bar. " * 3


@pytest.mark.parametrize(
    "words",
    [
        "Zoë",
        "Málaga",
        "Ångström",
        "£5 – “quoted”",
        "©2020 ACME®",
        "5 µm ± 2 °C",
        "¿Qué?",
        "½ inch",
        "€ 30",
        "§ 5",
        "l’été",
    ],
)
def test_a_few_western_words_are_enough(words: str) -> None:
    for text in (words, WORKSHOP.replace("{}", words)):
        assert decode(text.encode("cp1252")) == (text, "cp1252")


def test_damaged_text_is_read_and_said_to_be() -> None:
    assert decode(b"\xef\xbb\xbfabc\xff") == ("abc\ufffd", "utf-8 with wrong bytes")
    assert decode(GERMAN.encode() * 2 + b"\xff") == (GERMAN * 2 + "\ufffd", "utf-8 with wrong bytes")
    assert decode(b"line\n" * 100 + b"\0\0after a crash\n") == (
        "line\n" * 100 + "after a crash\n",
        "utf-8 without its NUL bytes",
    )
    cut = decode(GERMAN.encode("utf-16")[:-1])
    assert cut == (GERMAN[:-1] + "\ufffd", "utf-16 with wrong bytes")


@pytest.mark.parametrize(
    "data", [b"a\0b", b"\x01\x02\x03ab", bytes(range(256)) * 9, b"\0" * 100, b"\x7fELF\x02\x01\x01\0" + b"\0\xff" * 200]
)
def test_binary(data: bytes) -> None:
    assert decode(data) is None


def test_noise_is_no_text() -> None:
    assert [n for n in (100, 1000, 5000, 300_000) if decode(os.urandom(n)) is not None] == []


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300))
def test_whatever_is_decoded_can_be_written(data: bytes) -> None:
    decoded = decode(data)
    if decoded is not None:
        assert "\0" not in decoded[0].encode().decode()


def test_one_line_says_what_was_read_as_what(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(FRENCH.encode("cp1252"))
    (tmp_path / "b.csv").write_bytes(GERMAN.encode("utf-16"))
    (tmp_path / "c.md").write_text("plain")
    collection = Collection.load(tmp_path)
    assert [d.text for d in collection.documents] == [FRENCH, GERMAN, "plain"]
    assert collection.skipped == ("read as cp1252: 1 (a.txt); utf-16: 1 (b.csv)",)


@pytest.mark.parametrize(
    ("suffix", "text", "title"),
    [
        (".md", "```sh\n# venv\n```\n\n# Install\n", "Install"),
        (".md", "~~~~\n```\n# no\n~~~\n# no\n~~~~~\nText\n# Yes\n", "Yes"),
        (".md", "```\n# never closed\n", None),
        (".md", "Use ```x``` so:\n# Yes\n", "Yes"),
        (".md", "<!--\n# Draft\n-->\n# Real\n", "Real"),
        (".md", "<!-- open\n# Draft\n", None),
        (".md", "The Pump\n========\n\n# Later\n", "The Pump"),
        (".md", "text\n\n===\n# Yes\n", "Yes"),
        (".md", "### Low\n## High\n## Later\n", "High"),
        (".md", "## Low\n   # Indented title\n", "Indented title"),
        (".md", "    # code\n####### seven\n#none\n# #\n", None),
        (".md", "Title\n=\n", "Title"),
        (".md", "### Low\n\nTitle\n---\n", "Title"),
        (".md", "text\n- item\n---\n\n| a |\n---\n\n- item\n---\n", None),
        (".md", "# Closed ##  \n", "Closed"),
        (".md", "# In C#\n", "In C#"),
        (".markdown", "# A\n", "A"),
        (".txt", "Pump\n====\nText", None),
        (".txt", "Intro\n# Pump\n## Parts\n", "Pump"),
        (".txt", "# Pump", "Pump"),
        (".txt", "#\n# Written by a tool\n# from a list\n#\nvalve==1\n", None),
        (".txt", "# Written by a tool\n#   tool --list\nvalve==1\n    # via pump\n", None),
        (".rst", "=====\nPumps\n=====\n\nText.\n", "Pumps"),
        (".rst", ".. note\n\nValves\n~~~~~~\n", "Valves"),
        (".adoc", ":toc:\n= Harbor =\n", "Harbor ="),
        (".org", "#+TITLE: Harbor\n* x\n", "Harbor"),
        (".tex", "% \\title{No}\n\\title{Pumps}\n", "Pumps"),
        ("", "Pump\n====\n", "Pump"),
        ("", "# a comment\nall: x\n", None),
        (".py", "# a comment\n", None),
        (".yaml", "# a comment\n", None),
    ],
)
def test_titles(suffix: str, text: str, title: str | None) -> None:
    assert title_in(text, suffix) == title


def test_title_is_the_heading_else_the_front_matter_else_the_name(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("---\ntitle: From above\n---\n# Heading\nText\n")
    (tmp_path / "b.md").write_text('---\r\ntitle: "From: above"\r\ntags: [x]\r\n---\r\n\r\nText b\r\n', newline="")
    (tmp_path / "c-d_e.rst").write_text("Text c")
    for name in ("e.txt", "f.rst"):
        (tmp_path / name).write_text(f"---\ntitle: Of {name}\n---\nText of {name}")
    (tmp_path / "g.md").write_text("---\ntitle: From above\n---\n## Section\n")
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "__init__.py").write_text(f'"""Package {folder}."""\n')
    found = {d.id: (d.title, d.text) for d in Collection.load(tmp_path).documents}
    assert found == {
        "a": ("Heading", "# Heading\nText\n"),
        "b": ("From: above", "Text b\n"),
        "c-d_e.rst": ("c d e", "Text c"),
        "e": ("Of e.txt", "Text of e.txt"),
        "f.rst": ("Of f.rst", "Text of f.rst"),
        "g": ("From above", "## Section\n"),
        "x/__init__.py": ("x/__init__.py", '"""Package x."""\n'),
        "y/__init__.py": ("y/__init__.py", '"""Package y."""\n'),
    }


@pytest.mark.parametrize(
    "text",
    [
        "---\nnot: [yaml\n---\nx",
        "---\njust words\n---\nx",
        "---\ntitle: open\nx",
        "x\n---\ntitle: y\n---\n",
        "----\na: b\n---\n",
    ],
)
def test_what_is_no_front_matter_stays(text: str) -> None:
    assert split_front_matter(text) == (None, text)


def test_front_matter_without_a_title_goes_too() -> None:
    assert split_front_matter("---\nlayout: post\ndate: 2023-01-02\n---\n\nText") == (None, "Text")
    assert split_front_matter("---\ntitle: 7\n...\nText") == ("7", "Text")


def test_embedded_files_are_no_text() -> None:
    image = "data:image/png;base64," + "iVBORw0KGgo+/" * 20 + "=="
    assert without_data_uris(f"a ![The pump]({image}) b") == "a The pump b"
    assert without_data_uris(f'a ![]({image} "title")b') == "a b"
    assert without_data_uris(f'<img alt="x" src="{image}">') == '<img alt="x" src="">'
    assert without_data_uris(f"[image1]: <{image}>\n") == "[image1]: <>\n"
    assert without_data_uris(f"url({image})") == "url()"
    assert without_data_uris(f"bare {image} end") == "bare  end"
    assert without_data_uris("![](data:image/svg+xml,%3Csvg%20x%3D'1'%3E)") == ""
    assert without_data_uris("src='data:;base64,QUJD'") == "src=''"
    for text in (
        "import 'data:text/javascript,x=1;';",
        "data: a word",
        "(see data:image/png)",
        "A data:text/plain,hello URI is short.",
        "metadata: [1, 2]",
    ):
        assert without_data_uris(text) == text


def test_no_text_takes_for_ever() -> None:
    """Each of these took minutes with an expression that starts again at every character."""
    for text in (
        "![" * 200_000 + "data:",
        "![](data:" * 100_000,
        "data:a/" + "b;" * 300_000,
        "data:a/" + "b" * 1_000_000,
    ):
        assert without_data_uris(text) == text
    assert title_in("```\n" * 100_001 + "<!--" * 100_000, ".md") is None
    assert split_front_matter("---\n" + "a: b\n" * 200_000)[0] is None
