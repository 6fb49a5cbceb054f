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
AS_TEXT = (".html", ".htm", ".xhtml", ".ipynb")  # whose bytes are text in some encoding


class NotConverted(ValueError):
    """A file that its converter does not understand."""


def available() -> bool:
    """Whether markitdown is installed."""
    return importlib.util.find_spec("markitdown") is not None


def to_markdown(data: bytes, suffix: str) -> tuple[str, str | None]:
    """Text in Markdown, and the title that the file declares if it does; ``suffix`` is one of `FORMATS`.

    Raises: NotConverted with the reason in one line, whatever the libraries below raise.
    """
    from markitdown import StreamInfo

    # The converter of the ending, not whichever of markitdown's takes the file: its last resort passes bytes as text.
    info = StreamInfo(extension=suffix, charset="utf-8" if suffix in AS_TEXT else None)
    quiet = logging.root.manager.disable
    logging.disable(logging.WARNING)  # pdfminer warns of every odd font
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = _converter(suffix).convert(io.BytesIO(data), info)
    except MemoryError:
        raise
    except Exception as error:
        reason = next(iter(str(error).splitlines()), "").strip() or type(error).__name__
        raise NotConverted(reason[:200]) from error
    finally:
        logging.disable(quiet)
    text = re.sub(r"<!-- Slide number: \d+ -->\n?", "", result.markdown or "").replace("\r\n", "\n").replace("\0", "")
    return text.encode(errors="replace").decode(), result.title


@cache
def _converter(suffix: str) -> Any:
    from markitdown import converters

    return getattr(converters, FORMATS[suffix][0])()
