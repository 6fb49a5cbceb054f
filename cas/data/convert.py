"""Office documents, PDFs and web pages as Markdown, by the library markitdown (extra ``documents``)."""

from __future__ import annotations

import importlib.util
import io
import logging
import re
import warnings
from functools import cache
from typing import Any

INSTALL = "pip install 'cas-cartridges[documents]'"
# Endings that are converted -> (class in markitdown.converters, what such files are called)
FORMATS = {
    ".pdf": ("PdfConverter", "PDF"),
    ".docx": ("DocxConverter", "DOCX"),
    ".pptx": ("PptxConverter", "PPTX"),
    ".xlsx": ("XlsxConverter", "XLSX"),
    ".html": ("HtmlConverter", "HTML"),
    ".htm": ("HtmlConverter", "HTML"),
    ".xhtml": ("HtmlConverter", "HTML"),
    ".epub": ("EpubConverter", "EPUB"),
    ".ipynb": ("IpynbConverter", "Jupyter notebook"),
}
PAGES = (".html", ".htm", ".xhtml")
AS_TEXT = (*PAGES, ".ipynb")  # whose bytes are text in some encoding


class NotConverted(ValueError):
    """A file that its converter does not understand."""


def available() -> bool:
    """Whether markitdown is installed."""
    return importlib.util.find_spec("markitdown") is not None


def to_markdown(data: bytes, suffix: str) -> tuple[str, str | None]:
    """Text in Markdown, and the title that the file declares if it does; ``suffix`` is one of `FORMATS`.

    Raises: NotConverted with the reason in one line, whatever the libraries below raise.
    """
    quiet = logging.root.manager.disable
    logging.disable(logging.WARNING)  # pdfminer warns of every odd font
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            text, title = (_pdf_text(data), None) if suffix == ".pdf" else _convert(data, suffix)
    except MemoryError:
        raise
    except Exception as error:
        reason = next(iter(str(error).splitlines()), "").strip() or type(error).__name__
        raise NotConverted(reason[:200]) from error
    finally:
        logging.disable(quiet)
    text = text.replace("\r\n", "\n").replace("\0", "")
    return text.encode(errors="replace").decode(), title


def _pdf_text(data: bytes) -> str:
    """The text of a PDF, without glyphs that no character is known of. By pdfminer itself: markitdown takes paragraphs
    set in columns or justified for tables, and then joins the words of whole pages."""
    from pdfminer.high_level import extract_text

    return re.sub(r"\(cid:\d+\)", "", extract_text(io.BytesIO(data))).replace("\f", "\n")


def _convert(data: bytes, suffix: str) -> tuple[str, str | None]:
    from markitdown import StreamInfo

    if suffix in PAGES:
        data = _readable(data)
    # The converter of the ending, not whichever of markitdown's takes the file: its last resort passes bytes as text.
    info = StreamInfo(extension=suffix, charset="utf-8" if suffix in AS_TEXT else None)
    result = _converter(suffix).convert(io.BytesIO(data), info)
    return re.sub(r"<!-- Slide number: \d+ -->\n?", "", result.markdown or ""), result.title


def _readable(page: bytes) -> bytes:
    """A web page with what it says: without navigation, the sign behind a heading that links to it, and the addresses of
    images and of other pages of the same site. Addresses elsewhere stay."""
    from bs4 import BeautifulSoup

    soup = BeautifulSoup(page.decode(errors="replace"), "html.parser")
    for part in soup.find_all(lambda tag: tag.name == "nav" or tag.get("role") == "navigation"):
        part.decompose()
    for image in soup.find_all("img"):
        image.replace_with(str(image.get("alt") or ""))
    for link in soup.find_all("a"):
        if not re.search(r"\w", link.get_text()):
            link.decompose()
        elif not re.match(r"\w+:", str(link.get("href") or "")):
            link.unwrap()
    return str(soup).encode()


@cache
def _converter(suffix: str) -> Any:
    from markitdown import converters

    return getattr(converters, FORMATS[suffix][0])()
