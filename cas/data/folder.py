"""The files of a folder that may be documents: which are opened, and a record of every one that is not."""

from __future__ import annotations

import os
import re
import stat
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from cas.data.documents import one_line

MAX_NAMED = 3  # files that one line names
CLASSIC = (".txt", ".md")  # their ids have no ending
_LEFTOVER = re.compile(r"~\$.*|.+~|desktop\.ini|Thumbs\.db", re.IGNORECASE)  # of office programs, editors and Windows
_GENERATED = ("node_modules", "__pycache__")
_LOCK = re.compile(  # of package managers: hashes
    r"(poetry|cargo|yarn|uv|pdm|pixi|pipfile|composer|gemfile|podfile|pubspec|mix|flake|deno|bun|package)\.lock"
    r"|(package-lock|npm-shrinkwrap)\.json|pnpm-lock\.yaml|go\.sum",
    re.IGNORECASE,
)
# Files that mark the folder they lie in.
_MARKS = {"pyvenv.cfg": "virtual environment", "conda-meta": "virtual environment", "cartridges.lmdb": "CAS store"}
# Kinds that are counted as nouns, and those of which the summary names some.
_NOUNS = (
    "image", "video", "sound", "archive", "font", "program", "database", "array file", "virtual environment",
    "CAS store", "node_modules folder", "__pycache__ folder", "linked folder", "broken link", "special file",
    "JSON lines file", "question file", "lock file", "other binary file",
)  # fmt: skip
_NAMED = (
    "empty", "with the text of another", "unreadable", "linked folder", "broken link", "JSON lines file", "question file",
    "that cannot be converted", "without text", "repeated", "with an unusable name", "with the name of another", "of another format",
    "questions about documents that are not there",
)  # fmt: skip


@dataclass(frozen=True)
class LeftOut:
    """A file, folder or row that is no document.

    Attributes:
        where: its path below the folder, or file and line. kind: what it is counted as in the summary.
        why: the reason, if the kind does not say it. id: of the document that it would be, if it would be one.
    """

    where: str
    kind: str
    why: str = ""
    id: str | None = None

    def __str__(self) -> str:
        return f"{self.where}: {self.why or self.kind}"


def summary(left_out: Iterable[LeftOut], install: str) -> str:
    """One line, "not read: 12 images, 3 empty (a.md, …), 2 PDF (pip install …)"; "" if there is nothing to say."""
    places: defaultdict[str, list[str]] = defaultdict(list)
    for item in left_out:
        places[item.kind].append(item.where)
    counts = Counter({kind: len(found) for kind, found in places.items()})
    parts, missing = list[str](), list[str]()
    for kind, n in sorted(counts.items(), key=lambda pair: (-pair[1], pair[0])):
        if kind.startswith("needs "):
            missing.append(f"{n} {kind.removeprefix('needs ')}")
            continue
        if n == 1:
            kind_shown = kind.replace("questions", "question")
        else:
            kind_shown = _plural(kind) if kind in _NOUNS else kind
        text = f"{n} {kind_shown}"
        parts.append(f"{text} ({names(places[kind])})" if kind in _NAMED else text)
    if missing:
        parts.append(f"{', '.join(missing)} ({install})")
    return f"not read: {', '.join(parts)}" if parts else ""


def _plural(noun: str) -> str:
    return noun[:-1] + "ies" if noun.endswith("ry") else noun + "s"


def names(places: Sequence[str]) -> str:
    """The first few places, and an ellipsis if there are more."""
    return ", ".join(places[:MAX_NAMED]) + (", …" if len(places) > MAX_NAMED else "")


@dataclass(frozen=True)
class Entry:
    """A file to read. ``name``: its path below the folder, POSIX, Unicode in NFC whatever the locale; ``path``: to open."""

    path: str
    name: str
    outside: bool  # a link out of the folder
    repeats: bool = False  # a link to another file of the folder

    @property
    def suffix(self) -> str:
        """The ending in lower case, "" without one."""
        return os.path.splitext(self.name)[1].lower()

    @property
    def order(self) -> tuple[bool, bool, tuple[str, ...], str]:
        """Of reading: files before links to them, .txt and .md before others: the later never take the ids of the former
        or count as the original."""
        return self.repeats, self.suffix not in CLASSIC, tuple(self.name.split("/")), self.path


def unicode_name(name: str) -> str:
    """A file name as Unicode in NFC: its bytes as UTF-8, else as Latin-1, whatever the locale makes of them."""
    raw = os.fsencode(name)
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        text = raw.decode("latin-1")
    return unicodedata.normalize("NFC", text)


def list_files(folder: Path, include: Sequence[str], exclude: Sequence[str], left_out: list[LeftOut]) -> list[Entry]:
    """The files below a folder in the order of reading; what is left out is added to ``left_out``.

    Hidden, generated and linked folders, and hidden files, are read only if a part of an ``include`` pattern names them.
    Raises OSError if the folder itself cannot be listed.
    """
    root, found = os.path.realpath(folder), list[Entry]()
    named = tuple(part for p in include for part in p.strip("/").split("/") if part and not part.startswith("*"))
    pending, seen = [(root, "")], {root}
    while pending:
        place, prefix = pending.pop()
        try:
            with os.scandir(place) as listing:
                items = list(listing)
        except OSError as error:
            if place == root:
                raise
            left_out.append(LeftOut(one_line(prefix), "unreadable", f"unreadable ({error.strerror})"))
            continue
        mark = next((kind for name, kind in _MARKS.items() if any(item.name == name for item in items)), None)
        if mark is not None and prefix and not _is_named(prefix.split("/")[-2], named):
            left_out.append(LeftOut(one_line(prefix), mark))
            continue
        outside = not _within(place, root)
        for item in items:
            name = prefix + unicode_name(item.name)
            try:
                folder_inside = item.is_dir()
                kind = _kind_left_out(item, name, folder_inside, named, include, exclude)
                why = f"linked folder, to {one_line(os.path.realpath(item.path))}" if kind == "linked folder" else ""
            except OSError as error:
                folder_inside, kind, why = False, "unreadable", f"unreadable ({error.strerror})"
                if item.is_symlink():  # to itself
                    kind, why = "broken link", ""
            if kind is not None:
                left_out.append(LeftOut(one_line(name) + "/" * folder_inside, kind, why))
            elif not folder_inside:
                link = item.is_symlink()
                leaves = link and not _within(item.path, root)
                found.append(Entry(item.path, name, outside or leaves, link and not leaves))
            elif (real := os.path.realpath(item.path)) not in seen:  # else a link back to what is read anyway
                seen.add(real)
                pending.append((item.path, f"{name}/"))
    left_out.sort(key=lambda item: item.where)  # not in the order of the disk
    return sorted(found, key=lambda entry: entry.order)


def _kind_left_out(
    item: os.DirEntry[str],
    name: str,
    folder: bool,
    named: Sequence[str],
    include: Sequence[str],
    exclude: Sequence[str],
) -> str | None:
    """Why a file is not opened, or a folder not entered; None if it is."""
    if any(_selects(name, pattern) for pattern in exclude):
        return "by --exclude"
    plain = name.rpartition("/")[2]
    if plain.startswith(".") and not _is_named(plain, [part for part in named if part.startswith(".")]):
        return "hidden"
    if _LEFTOVER.fullmatch(plain) and not _is_named(plain, named):
        return "hidden"
    if folder:
        if plain in _GENERATED and not _is_named(plain, named):
            return f"{plain} folder"
        return "linked folder" if item.is_symlink() and not _is_named(plain, named) else None
    if _LOCK.fullmatch(plain):
        locks = [part for p in include if (part := p.rpartition("/")[2]).lower().endswith((".lock", ".sum"))]  # *.lock
        if not _is_named(plain, [*named, *locks]):
            return "lock file"
    if item.is_symlink() and not os.path.exists(item.path):
        return "broken link"
    if not stat.S_ISREG(item.stat().st_mode):
        return "special file"  # a pipe would wait for ever
    return "not in --include" if include and not any(_selects(name, pattern) for pattern in include) else None


def _within(path: str, root: str) -> bool:
    real = os.path.realpath(path)
    return real == root or real.startswith(os.path.join(root, ""))


def _is_named(plain: str, patterns: Iterable[str]) -> bool:
    return any(_matches(plain, pattern) for pattern in patterns)


def _selects(name: str, pattern: str) -> bool:
    """Whether a pattern names this path or a folder above it. One without "/" may match at any depth."""
    pattern = pattern.removeprefix("./").rstrip("/")
    if "/" not in pattern:
        pattern = f"**/{pattern}"
    parts = name.split("/")
    return any(_matches("/".join(parts[:n]), pattern.lstrip("/")) for n in range(1, len(parts) + 1))


def _matches(name: str, pattern: str) -> bool:
    return _compiled(pattern).fullmatch(name) is not None


@lru_cache(maxsize=1024)
def _compiled(pattern: str) -> re.Pattern[str]:
    """A glob: ``*`` and ``?`` stay within a name, ``**`` does not, ``[…]`` is a set; case does not count."""
    parts = re.split(r"(\*\*/|\*\*|\*|\?|\[!?\]?[^\]]*\])", unicodedata.normalize("NFC", pattern))
    special = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    out = ""
    for i, part in enumerate(parts):
        if i % 2 == 0:
            out += re.escape(part)
        elif part in special:
            out += special[part]
        else:
            inner = part[1:-1]
            out += f"[^/{_set(inner[1:])}]" if inner.startswith("!") else f"[{_set(inner)}]"
    try:
        return re.compile(out, re.IGNORECASE | re.DOTALL)
    except re.error:  # such as the range [z-a]: it stands for itself
        return re.compile(re.escape(pattern), re.IGNORECASE)


def _set(inner: str) -> str:
    """The inside of a set with its ranges."""
    return re.escape(inner).replace(r"\-", "-")
