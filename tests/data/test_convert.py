"""PDF, office files, web pages and notebooks: converted where markitdown is installed, counted where not."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from random import Random

import pytest

from cas.data import convert
from cas.data.collection import Collection

NEEDED = pytest.mark.skipif(not convert.available(), reason="needs pip install 'cas-cartridges[documents]'")


def pdf(text: str = "") -> bytes:
    """A PDF of one page with this line, or with none."""
    return pdf_of(f"BT /F1 12 Tf 72 720 Td ({text}) Tj ET" if text else "")


def pdf_of(drawing: str) -> bytes:
    """A PDF of one page with what these operators draw."""
    content = drawing.encode()
    bodies = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents 4 0 R "
        b"/Resources << /Font << /F1 5 0 R >> >> >>",
        b"<< /Length %d >>\nstream\n%s\nendstream" % (len(content), content),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    out, at = b"%PDF-1.4\n", []
    for number, body in enumerate(bodies, 1):
        at.append(len(out))
        out += b"%d 0 obj\n%s\nendobj\n" % (number, body)
    table = b"".join(b"%010d 00000 n \n" % place for place in at)
    end = b"trailer << /Size 6 /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF\n" % len(out)
    return out + b"xref\n0 6\n0000000000 65535 f \n" + table + end


def docx(path: Path, *paragraphs: tuple[str, str]) -> None:
    """A Word file of (style, text)."""
    office = "http://schemas.openxmlformats.org"
    main = "application/vnd.openxmlformats-officedocument.wordprocessingml"
    word = "".join(
        f'<w:p><w:pPr><w:pStyle w:val="{style}"/></w:pPr><w:r><w:t>{text}</w:t></w:r></w:p>'
        for style, text in paragraphs
    )
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(
            "[Content_Types].xml",
            f'<Types xmlns="{office}/package/2006/content-types">'
            '<Default Extension="rels" ContentType="application/vnd.openxmlformats-package.relationships+xml"/>'
            f'<Override PartName="/word/document.xml" ContentType="{main}.document.main+xml"/></Types>',
        )
        file.writestr(
            "_rels/.rels",
            f'<Relationships xmlns="{office}/package/2006/relationships"><Relationship Id="r1" '
            f'Type="{office}/officeDocument/2006/relationships/officeDocument" Target="word/document.xml"/></Relationships>',
        )
        file.writestr(
            "word/document.xml",
            f'<w:document xmlns:w="{office}/wordprocessingml/2006/main"><w:body>{word}</w:body></w:document>',
        )


def epub(path: Path, title: str, body: str) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("mimetype", "application/epub+zip")
        file.writestr(
            "META-INF/container.xml",
            '<container version="1.0" xmlns="urn:oasis:names:tc:opendocument:xmlns:container"><rootfiles>'
            '<rootfile full-path="c.opf" media-type="application/oebps-package+xml"/></rootfiles></container>',
        )
        file.writestr(
            "c.opf",
            '<package xmlns="http://www.idpf.org/2007/opf" version="3.0">'
            f'<metadata xmlns:dc="http://purl.org/dc/elements/1.1/"><dc:title>{title}</dc:title></metadata><manifest>'
            '<item id="a" href="a.xhtml" media-type="application/xhtml+xml"/></manifest><spine><itemref idref="a"/></spine>'
            "</package>",
        )
        file.writestr("a.xhtml", f"<html><body>{body}</body></html>")


@NEEDED
def test_every_format(tmp_path: Path) -> None:
    import openpyxl
    import pptx

    (tmp_path / "valve.pdf").write_bytes(pdf("The valve opens at 15 bar."))
    (tmp_path / "no_ending").write_bytes(pdf("A PDF by its content."))
    docx(tmp_path / "pump.docx", ("Heading1", "The Pump"), ("Normal", "Sie fördert Öl."))
    epub(tmp_path / "book.epub", "The Book", "<p>Once.</p>")
    page = '<html><head><title>Site</title><script>no()</script></head><body><h1>Café</h1><img src="data:image/png;base64,AA">'
    (tmp_path / "page.html").write_bytes(f"{page}<p>Fermé à midi, très tôt.</p></body></html>".encode("cp1252"))
    (tmp_path / "untitled.htm").write_text(
        "<html><head><title>From the head</title></head><body><p>Text.</p></body></html>"
    )
    cells = [
        {"cell_type": "markdown", "source": ["# Note\n"]},
        {"cell_type": "code", "source": ["x = 1"], "outputs": ["QUJD"]},
    ]
    (tmp_path / "n.ipynb").write_text(json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))
    book = openpyxl.Workbook()
    assert book.active is not None
    book.active.append(["part", "bar"])
    book.active.append(["valve", 15])
    book.save(tmp_path / "parts_list.xlsx")
    slides = pptx.Presentation()
    slide = slides.slides.add_slide(slides.slide_layouts[0])
    slide.shapes.title.text = "Deck"
    slides.save(str(tmp_path / "deck.pptx"))

    collection = Collection.load(tmp_path)
    found = {d.id: (d.title, d.text.strip()) for d in collection.documents}
    assert found == {
        "valve.pdf": ("valve", "The valve opens at 15 bar."),
        "no_ending": ("no_ending", "A PDF by its content."),
        "pump.docx": ("The Pump", "# The Pump\n\nSie fördert Öl."),
        "book.epub": ("The Book", "**Title:** The Book\n\nOnce."),
        "page.html": ("Café", "# Café\n\nFermé à midi, très tôt."),
        "untitled.htm": ("From the head", "Text."),
        "n.ipynb": ("Note", "# Note\n\n\n```python\nx = 1\n```"),
        "parts_list.xlsx": ("parts list", "## Sheet\n| part | bar |\n| --- | --- |\n| valve | 15 |"),
        "deck.pptx": ("Deck", "# Deck"),
    }
    assert collection.skipped == ("read as cp1252: 1 (page.html)",)


@NEEDED
def test_a_pdf_with_aligned_words_keeps_its_sentences_and_the_spaces_between_words(tmp_path: Path) -> None:
    """Typesetters move on by a distance instead of writing a space; words below each other are no table."""
    lines = ["# The valve opens at", "15 bar and closes at", "12 bar by its spring."]
    columns = [72, 140, 220, 300, 380]
    drawing = "".join(
        f"BT /F1 9 Tf {x} {700 - 12 * y} Td ({word}) Tj ET\n"
        for y in range(4)
        for x, word in zip(columns, ("Part", str(y), "bar", "steel", "ok"))
    )
    for y, line in enumerate(lines):
        words = " -280 ".join(f"({word})" for word in line.split())
        drawing += f"BT /F1 8 Tf 72 {600 - 10 * y} Td [{words}] TJ ET\n"
    (tmp_path / "valve_sheet.pdf").write_bytes(pdf_of(drawing))
    document = Collection.load(tmp_path)["valve_sheet.pdf"]
    assert "\n".join(lines) in document.text and "|" not in document.text
    assert document.title == "valve sheet"  # "#" is no mark of a heading here


@NEEDED
def test_a_web_page_is_read_without_navigation_and_addresses_on_its_site(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text(
        "<html><head><title>Site</title></head><body><nav><a href='b.html'>Next</a></nav>"
        "<div role='navigation'><h1>Menu</h1></div><h1>The <code>Pump</code><a href='#pump' title='Link here'>¶</a></h1>"
        "<p>See <a href='b.html#x' title='B'>the valve</a>, <a href='https://example.org/v'>its maker</a> and "
        "<a href='c.html'><img src='c.png' alt='the plan'></a>.<img src='d.png'></p>"
        "<pre>[kept](b.html)</pre></body></html>"
    )
    document = Collection.load(tmp_path)["a.html"]
    assert document.title == "The `Pump`"
    assert " ".join(document.text.split()) == (
        "# The `Pump` See the valve, [its maker](https://example.org/v) and the plan. ``` [kept](b.html) ```"
    )


@NEEDED
def test_a_file_that_cannot_be_converted_is_named_and_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("text")
    (tmp_path / "scan.pdf").write_bytes(pdf())
    (tmp_path / "empty.pdf").write_bytes(b"")
    for ending in ("pdf", "docx", "pptx", "xlsx", "epub", "ipynb"):
        (tmp_path / f"broken.{ending}").write_bytes(
            b"%PDF-1.4 no" if ending == "pdf" else b"PK\x03\x04 garbage \xff\xfe"
        )
    collection = Collection.load(tmp_path)
    assert [d.id for d in collection.documents] == ["a"]
    assert collection.skipped == (
        "not read: 6 that cannot be converted (broken.docx, broken.epub, broken.ipynb, …), 1 empty (empty.pdf), "
        "1 without text (scan.pdf); cas.train --dry-run lists them",
    )
    lines = [str(item) for item in collection.left_out if item.kind == "that cannot be converted"]
    assert len(lines) == 6 and all("cannot be converted (" in line and len(line.splitlines()) == 1 for line in lines)


@NEEDED
def test_bytes_with_the_ending_of_a_page_are_no_document(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text("<h1>Pump</h1><p>It pumps.</p>")
    (tmp_path / "bad.html").write_bytes(Random(0).randbytes(2000))
    collection = Collection.load(tmp_path)
    assert [d.id for d in collection.documents] == ["a.html"]
    assert [str(item) for item in collection.left_out] == ["bad.html: binary, not HTML"]


def test_without_the_extra_they_are_counted_with_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convert, "available", lambda: False)
    (tmp_path / "a.md").write_text("text")
    for name in ("1.pdf", "2.PDF", "3.docx", "4.html"):
        (tmp_path / name).write_bytes(b"whatever")
    (tmp_path / "x.png").write_bytes(b"\x89PNG")
    collection = Collection.load(tmp_path)
    assert collection.skipped == (
        "not read: 1 image, 2 PDF, 1 DOCX, 1 HTML (pip install 'cas-cartridges[documents]'); cas.train --dry-run lists them",
    )
    assert "2.PDF: PDF, which needs: pip install 'cas-cartridges[documents]'" in map(str, collection.left_out)
