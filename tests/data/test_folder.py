"""A folder as it is: which files are documents, and what is said of the others."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import tracemalloc
import unicodedata
from pathlib import Path

import pytest

from cas.data.collection import Collection, resolve_source, same_source
from cas.errors import CollectionError

ROOT = Path(__file__).parents[2]


def write(path: Path, content: str | bytes = "text of it") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def texts(folder: Path, *names: str) -> None:
    """Files that each say their own name."""
    for name in names:
        write(folder / name, f"This is {name}.\n")


def ids(folder: Path | str, **options: list[str]) -> list[str]:
    return [document.id for document in Collection.load(folder, **options).documents]


def left_out(folder: Path, **options: list[str]) -> list[str]:
    return sorted(map(str, Collection.load(folder, **options).left_out))


# What is read in such a folder: ids, titles and texts of ordinary files do not change unnoticed, since their cartridges
# would be trained again.
FROZEN = {
    "a": ("a.txt", b"Plain \xc3\xbc.\n", "a", "Plain ü.\n"),
    "b.c": ("b.c.md", b"Intro.\r\n\r\n#  The Pump #\r\n\r\n<!-- x -->\r\n", "The Pump", None),
    "d_e-f": ("d_e-f.TXT", b"\xef\xbb\xbfone\rtwo\x07 \n", "d e f", "one\rtwo\x07 \n"),
    "sub/read me": ("sub/read me.md", b"## Two\n#tag\n", "Two", "## Two\n#tag\n"),
    "sub/x": ("sub/x.Md", b"data:, and ![x](y.png)\n\n\n", "x", "data:, and ![x](y.png)\n\n\n"),
    "y": ("y.txt", b"```\n# In a fence\n```\n", "In a fence", "```\n# In a fence\n```\n"),
    "z": ("z.md", b"---\nA rule, no front matter.\n---\n", "z", "---\nA rule, no front matter.\n---\n"),
}


def test_ordinary_text_files_are_read_as_ever(tmp_path: Path) -> None:
    for name, data, _, _ in FROZEN.values():
        write(tmp_path / name, data)
    expected = {
        id: (title, data.decode().replace("\r\n", "\n") if text is None else text)
        for id, (_, data, title, text) in FROZEN.items()
    }
    assert {d.id: (d.title, d.text) for d in Collection.load(tmp_path).documents} == expected


def test_files_of_other_kinds_never_take_the_place_of_ordinary_ones(tmp_path: Path) -> None:
    write(tmp_path / "pump.md", "The pump.")
    write(tmp_path / "apump.rst", "The pump.")  # earlier by name, the same text
    texts(tmp_path, "pump", "pump.txt", "pump.py", "LICENSE", "notes.txt")
    collection = Collection.load(tmp_path)
    assert collection["pump"].text == "The pump."
    assert [d.id for d in collection.documents] == ["LICENSE", "notes", "pump", "pump.", "pump.py", "pump.txt"]
    assert list(map(str, collection.left_out)) == ["apump.rst: same text as pump.md"]


def test_text_has_any_ending_or_none(tmp_path: Path) -> None:
    names = ["README", "a.rst", "b.adoc", "c.org", "d.log", "e.csv", "f.json", "g.yaml", "h.toml", "i.tex", "j.py"]
    names += ["k.markdown", "l.weird", "Makefile", "src/m.rs", "n.xml", "photo.jpg"]  # text whatever it is called
    names += ["door.lock", "play.ps", "notes.ai", "notes.svg", "notes.eps", "notes.rtf"]
    texts(tmp_path, *names)
    assert ids(tmp_path) == sorted(names)
    letter = "Ma chère amie, la clé du café est restée chez la gérante.\n"
    for name in ("letter.doc", "letter.key"):
        write(tmp_path / name, f"{name}: {letter}".encode("latin-1"))
    collection = Collection.load(tmp_path)
    assert [collection[name].text for name in ("letter.doc", "letter.key")] == [
        f"letter.doc: {letter}",
        f"letter.key: {letter}",
    ]


def test_what_is_no_text_is_counted_by_kind(tmp_path: Path) -> None:
    write(tmp_path / "a.txt")
    write(tmp_path / "1.png", b"\x89PNG\r\n\x1a\n\0\0")
    write(tmp_path / "2.jpg", b"\xff\xd8\xff\xe0")
    write(tmp_path / "logo.svg", "<svg/>")
    write(tmp_path / "film.mp4", b"\0\0\0 ftyp" + os.urandom(200_000))
    write(tmp_path / "x.zip", b"PK\x03\x04\0\0")
    write(tmp_path / "nameless", b"\x7fELF\x02\x01\0\0")
    write(tmp_path / "noise", bytes(range(256)) * 20)
    write(tmp_path / "old.doc", b"\xd0\xcf\x11\xe0\0")
    write(tmp_path / "letter.rtf", r"{\rtf1 Hello}")
    write(tmp_path / "figure", "%!PS-Adobe-3.0\n0 0 moveto\n")
    write(tmp_path / "old.ai", "%!\n0 0 moveto\n")
    write(tmp_path / "cut.doc", b"\xe9\x8d\xb9\xa0abc")
    write(tmp_path / "wide.svg", "<?xml version='1.0'?>\n<svg/>".encode("utf-16"))
    write(tmp_path / "empty.py", "")
    write(tmp_path / "rows.jsonl", '{"id": "a", "text": "x"}\n')
    write(tmp_path / "hard.jsonl", '{"id": "q", "document_ids": ["a"], "question": "?", "answers": ["x"]}\n')
    write(tmp_path / "questions.jsonl", '{"document_ids": ["a"], "question": "?", "answers": ["x"]}\n')
    write(tmp_path / "sub" / "questions.jsonl", "")
    (line,) = Collection.load(tmp_path).skipped
    assert line == (
        "not read: 5 images, 4 of another format (cut.doc, figure, letter.rtf, …), "
        "2 question files (hard.jsonl, sub/questions.jsonl), 1 JSON lines file (rows.jsonl), 1 archive, "
        "1 empty (empty.py), 1 other binary file, 1 program, 1 video; cas.train --dry-run lists them"
    )


def test_generated_and_hidden_folders_are_left_out(tmp_path: Path) -> None:
    texts(tmp_path, "a.md", ".env", ".git/config", ".github/flow.yml", "x/node_modules/p/README.md")
    texts(
        tmp_path, "__pycache__/a.txt", "env/pyvenv.cfg", "env/lib/n.py", "runs/s/config.yaml", "runs/s/cartridges.lmdb"
    )
    collection = Collection.load(tmp_path)
    assert [d.id for d in collection.documents] == ["a"]
    assert collection.skipped == (
        "not read: 3 hidden, 1 CAS store, 1 __pycache__ folder, 1 node_modules folder, 1 virtual environment; "
        "cas.train --dry-run lists them",
    )
    texts(tmp_path, "~$a.docx", "a.md~", "desktop.ini")
    assert Collection.load(tmp_path).skipped[0].startswith("not read: 6 hidden, ")
    assert ids(tmp_path, include=[".github/**"]) == [".github/flow.yml"]
    assert ids(tmp_path, include=["node_modules/"]) == ["x/node_modules/p/README"]
    texts(tmp_path, "uv.lock", "x/package-lock.json")
    assert " 2 lock files, " in Collection.load(tmp_path).skipped[0]
    assert ids(tmp_path, include=["uv.lock"]) == ids(tmp_path, include=["*.lock"]) == ["uv.lock"]
    assert ids(tmp_path, include=[".*"]) == [".env", ".git/config", ".github/flow.yml"]


def test_include_and_exclude(tmp_path: Path) -> None:
    texts(
        tmp_path,
        "a.md",
        "b.PY",
        "guides/c.md",
        "guides/deep/d.md",
        "guides/deep/e.txt",
        "drafts/f.md",
        "1.log",
        "2.log",
    )
    assert ids(tmp_path, include=["*.md"]) == ["a", "drafts/f", "guides/c", "guides/deep/d"]
    assert [d.id for d in Collection.load(tmp_path, include="*.log", exclude="2*").documents] == ["1.log"]
    assert ids(tmp_path, include=["*.py", "guides/*.md"]) == ["b.PY", "guides/c"]
    assert ids(tmp_path, include=["guides/**"]) == ids(tmp_path, include=["./guides/"])
    assert ids(tmp_path, include=["guides/**/*.md"]) == ["guides/c", "guides/deep/d"]
    assert ids(tmp_path, include=["[0-1].log"]) == ["1.log"]
    assert ids(tmp_path, include=["[!1].log"]) == ["2.log"]
    assert ids(tmp_path, include=["*.md"], exclude=["drafts", "deep"]) == ["a", "guides/c"]
    assert ids(tmp_path, exclude=["*.md", "*.log", "b.?Y"]) == ["guides/deep/e"]
    chosen = Collection.load(tmp_path, include=["*.md"], exclude=["drafts/"])
    assert chosen.skipped == ("not read: 4 not in --include, 1 by --exclude; cas.train --dry-run lists them",)
    with pytest.raises(CollectionError, match="no document to read; not read: 4 not in --include"):
        Collection.load(tmp_path, include=["*.pdf"], exclude=["guides", "drafts"])
    with pytest.raises(CollectionError, match="--include and --exclude choose files of a folder"):
        Collection.load(write(tmp_path / "rows.jsonl", '{"id": "a", "text": "x"}\n'), include=["*.md"])
    with pytest.raises(CollectionError, match="not of a known name"):
        Collection.load("examples", exclude=["*.md"])


def test_links(tmp_path: Path) -> None:
    docs, away = tmp_path / "docs", tmp_path / "away"
    texts(docs, "a.md", "sub/b.md")
    texts(away, "c.md", "deep/d.md")
    (docs / "loop").symlink_to(docs)
    (docs / "sub" / "self").symlink_to(".")
    (docs / "linked").symlink_to(away)
    (docs / "gone.md").symlink_to(tmp_path / "nothing")
    (docs / "round.md").symlink_to("round.md")
    (docs / "e.md").symlink_to(away / "c.md")
    collection = Collection.load(docs)
    assert [d.id for d in collection.documents] == ["a", "e", "sub/b"]
    assert collection.skipped == (
        "not read: 3 linked folders (linked/, loop/, sub/self/), 2 broken links (gone.md, round.md); cas.train --dry-run lists them",
        "read through links out of the folder: 1 (e.md)",
    )
    (docs / "Inlink.md").symlink_to("a.md")
    assert "Inlink.md: same text as a.md" in left_out(docs)
    assert f"linked/: linked folder, to {away}" in left_out(docs)
    asked = Collection.load(docs, include=["linked/**", "loop/**"])
    assert [d.id for d in asked.documents] == ["linked/c", "linked/deep/d"]
    assert asked.skipped[1] == "read through links out of the folder: 2 (linked/c.md, linked/deep/d.md)"


def test_special_and_unreadable_files_stop_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts(tmp_path, "a.md", "secret.md", "locked/b.md")
    os.mkfifo(tmp_path / "pipe.txt")
    with socket.socket(socket.AF_UNIX) as listener:
        monkeypatch.chdir(tmp_path)
        listener.bind("socket.txt")
        really, scan = open, os.scandir

        def refuse(path: object, *more: object) -> object:
            if str(path).endswith("secret.md"):
                raise PermissionError(13, "Permission denied")
            return really(path, *more)  # type: ignore[call-overload]

        def refuse_listing(path: object) -> object:
            if str(path).endswith("locked"):
                raise PermissionError(13, "Permission denied")
            return scan(path)  # type: ignore[call-overload]

        monkeypatch.setattr("builtins.open", refuse)
        monkeypatch.setattr(os, "scandir", refuse_listing)
        collection = Collection.load(tmp_path)
    assert [d.id for d in collection.documents] == ["a"]
    assert sorted(map(str, collection.left_out)) == [
        "locked/: unreadable (Permission denied)",
        "pipe.txt: special file",
        "secret.md: unreadable (Permission denied)",
        "socket.txt: special file",
    ]
    assert {item.id for item in collection.left_out if "secret" in item.where} == {"secret"}


def test_names_are_unicode_in_nfc_whatever_the_system_says(tmp_path: Path) -> None:
    composed, decomposed = unicodedata.normalize("NFC", "Prüfung"), unicodedata.normalize("NFD", "Prüfung")
    assert composed != decomposed
    texts(tmp_path, f"{decomposed}.md")
    raw = os.path.join(os.fsencode(tmp_path), b"caf\xe9.txt")
    with open(raw, "wb") as file:
        file.write(b"A Latin-1 name.")
    write(tmp_path / "a\nb.txt", "x")
    write(tmp_path / f"{'long' * 40}" / f"{'name' * 40}.txt", "y")
    assert ids(tmp_path) == sorted([composed, "café"])
    assert ids(tmp_path, include=[f"{composed}.*"]) == [composed]
    lines = left_out(tmp_path)
    assert len(lines) == 2 and all("bad id" in line and line.endswith("rename the file") for line in lines)
    texts(tmp_path, f"{composed}.md")  # beside the other spelling
    assert ids(tmp_path) == sorted([composed, "café"])
    assert f"{composed}.md: same name as {composed}.md" in left_out(tmp_path)
    code = (
        "import sys; from cas.data.collection import Collection; "
        "sys.stdout.buffer.write(' '.join(d.id for d in Collection.load(sys.argv[1]).documents).encode())"
    )
    for locale in ({"LC_ALL": "C"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}):
        done = subprocess.run(
            [sys.executable, "-c", code, tmp_path],
            capture_output=True,
            cwd=ROOT,
            check=True,
            env={**os.environ, **locale},
        )
        assert done.stdout.decode().split() == ids(tmp_path)


def test_one_folder_has_one_spelling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    docs = write(tmp_path / "docs" / "a.md").parent
    (tmp_path / "link").symlink_to(docs)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    spellings = ["docs", "docs/", "./docs", "../" + tmp_path.name + "/docs", str(docs), f"{docs}/", "link", "~/docs"]
    assert {resolve_source(spelling) for spelling in spellings} == {str(docs.resolve())}
    assert all(ids(spelling) == ["a"] for spelling in spellings)
    assert resolve_source("examples") == "examples" and resolve_source("niah:300+examples") == "niah:300+examples"
    assert (
        same_source("docs", "link/") and not same_source("docs", "elsewhere") and not same_source("niah", "niah:8000")
    )
    # An older store recorded a relative path; now the command is given elsewhere.
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert same_source("docs", str(docs)) and same_source("./docs/", "../docs") and not same_source("ocs", str(docs))
    write(elsewhere / "docs" / "b.md")
    assert not same_source("docs", str(docs))  # here it is another one
    with pytest.raises(CollectionError, match="nobody-here"):
        Collection.load("~nobody-here/docs")


def test_ten_thousand_files_take_seconds_and_little_more_memory_than_their_text(tmp_path: Path) -> None:
    count, text = 2_000, "The valve opens at fifteen bar. " * 60
    for n in range(count):
        write(tmp_path / f"part{n % 20}" / f"page{n}.md", f"# Page {n}\n\n{text}")
    tracemalloc.start()
    started = time.monotonic()
    collection = Collection.load(tmp_path)
    seconds, (kept, peak) = time.monotonic() - started, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(collection) == count
    size = sum(len(document.text) for document in collection.documents)
    assert peak < 1.5 * size + (1 << 20), (kept, peak, size)
    assert seconds < 60  # a fraction of a second alone; tracemalloc and a busy machine cost the rest
