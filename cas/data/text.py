"""From bytes to text: encodings, what is binary and of which kind, titles, and what of a page is not text."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise

MARKDOWN = (".md", ".markdown", ".mdown", ".mkd", ".mdx", ".qmd", ".rmd")
FRONT_MATTER = (*MARKDOWN, ".txt", ".rst")  # whose pages may begin with a block of YAML
_BOMS = (  # UTF-32 first: its mark begins with that of UTF-16
    (b"\xff\xfe\x00\x00", "utf-32"), (b"\x00\x00\xfe\xff", "utf-32"), (b"\xef\xbb\xbf", "utf-8-sig"),
    (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16"),
)  # fmt: skip
_WIDE = ["utf_16_le", "utf_16_be", "utf_32_le", "utf_32_be"]
# Encodings to guess from. The rarer ones that charset-normalizer knows win over these on short texts.
_COMMON = [
    *_WIDE, "cp1252", "cp1250", "cp1251", "koi8_r", "cp1253", "cp1254", "cp1255", "cp1256", "cp1257", "cp932", "euc_jp",
    "gb18030", "big5", "cp949", "iso8859_2", "iso8859_5", "mac_roman", "cp850", "cp866",
]  # fmt: skip
_SAMPLE = 1 << 18  # bytes from which an encoding is guessed
_CONTROLS = re.compile(r"[\x00-\x08\x0b\x0e-\x1f]")
_BINARY = {
    "image": "png jpg jpeg gif bmp tif tiff webp ico icns heic heif avif psd svg svgz eps ai xcf",
    "video": "mp4 m4v mov avi mkv webm mpg mpeg wmv flv",
    "sound": "mp3 wav flac ogg oga opus m4a aac wma mid midi aiff",
    "archive": "zip gz tgz bz2 xz zst 7z rar tar jar war whl egg deb rpm iso dmg apk cab",
    "font": "ttf otf woff woff2 eot",
    "program": "exe dll so dylib o a obj lib pyc pyo pyd class wasm msi bin",
    "database": "sqlite sqlite3 db mdb accdb parquet arrow feather orc",
    "array file": "npy npz pt pth safetensors gguf onnx h5 hdf5 pkl ckpt mat",
    "of another format": "doc dot ppt pps xls odt ods odp rtf pages numbers key msg mobi azw azw3 djvu ps vsd vsdx one",
}
_KINDS = {f".{ending}": kind for kind, endings in _BINARY.items() for ending in endings.split()}
_MAGIC = {
    b"\x89PNG": "image", b"\xff\xd8\xff": "image", b"GIF8": "image", b"BM": "image", b"PK\x03\x04": "archive",
    b"\x1f\x8b": "archive", b"BZh": "archive", b"\xfd7zXZ": "archive", b"7z\xbc\xaf": "archive", b"Rar!": "archive",
    b"\x7fELF": "program", b"MZ": "program", b"\xca\xfe\xba\xbe": "program", b"SQLite format 3": "database",
    b"ID3": "sound", b"OggS": "sound", b"fLaC": "sound", b"\x93NUMPY": "array file", b"wOFF": "font", b"wOF2": "font",
    b"\xd0\xcf\x11\xe0": "of another format", b"{\\rtf": "of another format",
    b"%!PS": "of another format",
}  # fmt: skip
_HIGH_BYTES = re.compile(rb"[\x80-\xff]")
_CONTROL_BYTES = re.compile(rb"[\x01-\x08\x0b\x0e-\x1a\x1c-\x1f]")
# In a word a sign other than an apostrophe or hyphen, or a capital after a small letter: Windows-1252 was another encoding.
_NOT_WESTERN = re.compile("[A-Za-z][^\x00-\x7fÀ-ÖØ-öø-ÿŒœŠšŽžŸ’\xad·–—][A-Za-z]|[a-zà-öø-ÿ][À-ÖØ-ÞŒŠŽŸ]")
_NOT_ASCII = re.compile("[^\x00-\x7f\ufffd]")
_DATA_IMAGE = re.compile(r"!\[([^\[\]\n]{0,1000})\]\([ \t]{0,9}<?data:[^()\n]*\)")
_DATA_START = r"data:(?:[\w.+-]+/[\w.+-]+(?:;[\w.+-]+(?:=[\w.+-]+)?)*|;base64),"
# Pictures and base64 in quotes, brackets or parentheses go however short; anything else only from a length that nobody
# writes by hand, since pages about such addresses have examples.
_DATA_QUOTED = r"data:(?:(?:image|font)/[\w.+-]+(?:;[\w.+=-]+)*|(?:[\w.+-]+/[\w.+-]+)?(?:;[\w.+-]+=[\w.+-]+)*;base64),"
_DATA_URI = re.compile(rf"(?<=[\"'(<=]){_DATA_QUOTED}[\w+/=%.~-]+|{_DATA_START}[\w+/=%.~-]{{64,}}")
_UNDERLINED = r"^(?=.*\w)(\S.*)\n([=\-~^\"'`#*+.:_])\2{2,}[ \t]*$"
_HEADING = re.compile(r" {0,3}(#{1,6})[ \t]+(\S.*)")
_TITLES = {
    ".txt": r"(?:\A|^(?!#\s).*\n)#[ \t]+(\S.*)$(?!\n#(?:\s|\Z))",  # not in a block of comments
    ".rst": _UNDERLINED,
    "": r"^(?=.*\w)(\S.*)\n=+[ \t]*$",
    ".adoc": r"^=[ \t]+(\S.*)",
    ".asciidoc": r"^=[ \t]+(\S.*)",
    ".org": r"(?i)^#\+title:[ \t]*(\S.*)",
    ".tex": r"\\title\{([^{}]+)\}",
}


def binary_kind(suffix: str, head: bytes) -> str:
    """What a file that is not text is counted as."""
    magic = next((kind for start, kind in _MAGIC.items() if head.startswith(start)), "other binary file")
    return _KINDS.get(suffix, magic)


def is_drawing(suffix: str, head: bytes) -> bool:
    """Whether a file is text as far as bytes go, but says nothing to a reader: drawings, PostScript and RTF."""
    if suffix in (".txt", ".md"):
        return False
    plain = head.replace(b"\0", b"").lstrip(b"\xef\xbb\xbf\xff\xfe\x04 \t\r\n")  # in UTF-16, too
    if plain.startswith((b"{\\rtf", b"%!PS")):
        return True
    if suffix == ".svg":
        return re.search(rb"<(\w+:)?svg\b", plain) is not None
    return suffix in (".ps", ".eps", ".ai") and re.search(rb"^%!", plain[:1024], re.MULTILINE) is not None


def may_guess(suffix: str, data: bytes) -> bool:
    """Whether bytes that are not valid UTF-8 may be text in another encoding. With an ending of files that are binary as a
    rule, only those without any control character may, and most of them ASCII."""
    if suffix not in _KINDS:
        return True
    magic = any(data.startswith(start) for start in _MAGIC)
    return (
        not magic
        and b"\0" not in data
        and not _CONTROL_BYTES.search(data)
        and 2 * len(_HIGH_BYTES.findall(data)) < len(data)
    )


def decode(data: bytes, guess: bool = True) -> tuple[str, str] | None:
    """Text and what it was read as ("" for plain UTF-8); None for what is no text.

    A byte order mark decides, else UTF-8 if it is valid or nearly so, else, with ``guess``, what charset-normalizer finds
    most likely.
    """
    for mark, codec in _BOMS:
        if data.startswith(mark):
            try:
                text = data.decode(codec)
            except UnicodeDecodeError:
                text = data.decode(codec, errors="replace")
                if codec == "utf-32" or (codec == "utf-16" and _share("\ufffd", text) > 0.1):
                    continue  # the mark was something else
                return _without_nuls(text, f"{codec.removesuffix('-sig')} with wrong bytes")
            return _without_nuls(text, "" if codec == "utf-8-sig" else codec)
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return _guess(data) if guess else None
    if "\0" in text:
        wide = _guess(data, _WIDE) if guess and _share("\0", text) > 0.01 else None
        return wide or _without_nuls(text, "")
    return None if 2 * len(_CONTROLS.findall(text)) > len(text) else (text, "")


def _share(character: str, text: str) -> float:
    return text.count(character) / max(1, len(text))


def _without_nuls(text: str, codec: str) -> tuple[str, str] | None:
    """A stray NUL, as a crash leaves it in a log, is dropped; with many, or other control characters, it is no text."""
    if "\0" in text and _share("\0", text) > 0.01:
        return None
    plain = text.replace("\0", "")
    if 2 * len(_CONTROLS.findall(plain)) > len(plain) > 0:
        return None
    return plain, (codec or "utf-8 without its NUL bytes") if "\0" in text else codec


def _guess(data: bytes, encodings: list[str] = _COMMON) -> tuple[str, str] | None:
    """Text that is not valid UTF-8, and what it was read as."""
    from charset_normalizer import from_bytes  # not needed for most folders

    sample = data[:_SAMPLE]
    if len(data) > len(sample) and b"\0" not in sample:
        sample = sample[: sample.rfind(b"\n") + 1] or sample  # no character is cut in two
    controls = len(_CONTROL_BYTES.findall(sample))
    if b"\0" in sample or 50 * controls > len(sample):
        encodings = _WIDE
    else:
        nearly = data.decode(errors="replace")
        wrong = nearly.count("\ufffd")
        if len(_NOT_ASCII.findall(nearly)) > 5 * wrong:
            return nearly, "utf-8 with wrong bytes"
    matches = list(from_bytes(sample, cp_isolation=encodings, enable_fallback=False))
    if not matches:
        return None
    best, codec = matches[0], matches[0].encoding
    equal = [match for match in matches if (match.chaos, match.coherence) == (best.chaos, best.coherence)]
    if any("cp1252" in match.could_be_from_charset for match in equal) or (encodings is not _WIDE and _western(sample)):
        codec = "cp1252"  # by far the most frequent of those that fit
    text = data.decode(codec, errors="replace")
    if _share("\ufffd", text) > 0.01 or _CONTROLS.search(text.replace("\x1b", "").replace("\x1a", "")):
        return None
    return text, codec.replace("_", "-")


def _western(sample: bytes) -> bool:
    """Whether bytes read as Windows-1252 look like a Western European language with few letters beyond ASCII, too few to
    tell encodings apart by the frequencies of letters."""
    text = sample.decode("cp1252", errors="replace")
    runs = re.findall("[^\x00-\x7f]+", text)
    foreign, ascii_letters = "".join(runs), len(re.findall("[A-Za-z]", text))
    paired = len(foreign) - len(runs)  # as all bytes of Chinese or Cyrillic are
    if 5 * paired > len(foreign) or 2 * sum(map(str.isalpha, foreign)) > ascii_letters or len(set(foreign)) > 4:
        return False
    return "\ufffd" not in text and not _NOT_WESTERN.search(text)


# -- pages -------------------------------------------------------------------------------------------------------------


def split_front_matter(text: str) -> tuple[str | None, str]:
    """The title in the YAML block at the start of a page, if any, and the page without that block."""
    import yaml

    block = re.match(r"---[ \t]*\n(.{0,65536}?)^(?:---|\.\.\.)[ \t]*(?:\n|\Z)", text, re.DOTALL | re.MULTILINE)
    if block is None:
        return None, text
    try:
        values = yaml.safe_load(block[1])
    except (yaml.YAMLError, ValueError, RecursionError):
        return None, text  # a page that begins with a rule
    if not isinstance(values, dict):
        return None, text
    title = values.get("title")
    return str(title) if isinstance(title, str | int | float) else None, text[block.end() :].lstrip("\n")


def without_data_uris(text: str) -> str:
    """Embedded files (``data:image/png;base64,…``) are no text; of an image in Markdown its description stays."""
    if "data:" not in text:
        return text
    return _DATA_URI.sub("", _DATA_IMAGE.sub(r"\1", text))


def title_in(text: str, suffix: str, lowest: int = 6) -> str | None:
    """The first heading of the highest level, in the notation that the ending (lower case) stands for. In Markdown, only
    headings of the levels 1 to ``lowest`` count."""
    if suffix in MARKDOWN:
        return min(_markdown_headings(text, lowest), key=lambda heading: heading[0], default=(0, None))[1]
    if suffix == ".tex":
        text = re.sub(r"(?<!\\)%.*", "", text)
    pattern = _TITLES.get(suffix)
    heading = re.search(pattern, text, re.MULTILINE) if pattern else None
    return heading[1] if heading else None


def _markdown_headings(text: str, lowest: int) -> Iterator[tuple[int, str]]:
    """(level, heading) outside code fences and comments, up to the first of level 1; both of CommonMark's notations."""
    text = re.sub(r"<!--.*?(?:-->|\Z)", lambda comment: re.sub(r"[^\n]", " ", comment[0]), text, flags=re.DOTALL)
    fence, above = "", ""
    for line, below in pairwise([*text.split("\n"), ""]):
        mark = re.match(r" {0,3}(`{3,}|~{3,})(.*)", line)
        level, heading = 0, ""
        if fence:
            if mark and mark[1].startswith(fence) and not mark[2].strip():
                fence = ""
        elif mark and not ("`" in mark[1] and "`" in mark[2]):
            fence = mark[1]
        elif hashes := _HEADING.match(line):
            level, heading = len(hashes[1]), _without_closing(hashes[2])
        elif re.search(r"\w", line) and (underline := re.fullmatch(r" {0,3}(=+|-+)[ \t]*", below)):
            if underline[1][0] == "=":
                level, heading = 1, line
            elif not above.strip() and re.match(r" {0,3}\w", line):  # else a list, a table or a quotation above a rule
                level, heading = 2, line
        if heading and level <= lowest:
            yield level, heading
            if level == 1:
                return
        above = line


def _without_closing(heading: str) -> str:
    """A heading without the ``##`` behind it that close it."""
    heading = heading.rstrip()
    plain = heading.rstrip("#")
    return plain.rstrip() if not plain or plain[-1] in " \t" else heading
