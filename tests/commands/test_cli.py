"""The command lines: options, exit statuses, one line for a mistake."""

from __future__ import annotations

import dataclasses
import errno
import importlib
import json
import os
import re
import subprocess
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lmdb
import pytest
import yaml

import cas
from cas import console
from cas.__main__ import main
from cas.errors import ConfigError, StoreError
from cas.options import EFFORTS, Effort, QueryConfig, SelfStudy, TrainConfig, Training, memory, parse, store_folder
from cas.store.records import Row
from cas.store.store import Store
from retrieval import EmbedderUnavailable

ROOT = Path(__file__).parents[2]


def small_store(folder: Path) -> None:
    """An empty store, over no model."""
    model: Any = SimpleNamespace(describe=lambda: {"source": {"name": "none"}, "header_ids": []})
    Store.create(folder, model, tokens=4).close()


def run(*words: str, cwd: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    import os

    return subprocess.run(
        [sys.executable, "-m", *words], capture_output=True, text=True, cwd=cwd or ROOT, env={**os.environ, **env}
    )


def options(page: str) -> dict[str, list[str]]:
    """{command: its options, other spellings included} of what the commands print for --help."""
    parts = re.split(r"## python -m (.*)\n", page)[1:]
    return {
        command: re.findall(r"--[a-z][a-z-]*", " ".join(re.findall(r"^│ -.*", text, re.MULTILINE)))
        for command, text in zip(parts[::2], parts[1::2], strict=True)
    }


def test_options_are_the_golden_ones() -> None:
    """A new, renamed or dropped option has to be meant: it changes this list. Every spelling that was ever accepted stays."""
    golden = json.loads((ROOT / "tests" / "commands" / "golden_options.json").read_text())
    found = options((ROOT / "docs" / "cli.md").read_text())
    assert {command: sorted(set(flags)) for command, flags in found.items()} == golden


def test_help_has_named_groups() -> None:
    page = (ROOT / "docs" / "cli.md").read_text().split("## python -m cas.query")[0]
    groups = re.findall(r"╭─ ([a-z-]+) options", page)
    assert groups == ["collection", "model", "cartridge", "self-study", "training", "ranks", "memory", "output"]


def test_every_option_of_training_is_in_help() -> None:
    flags = options((ROOT / "docs" / "cli.md").read_text())["cas.train"]
    assert {f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(TrainConfig)} <= set(flags)


@pytest.mark.parametrize("page", ["cli", "worlds", "performance", "scaling"])
def test_generated_pages_are_what_their_commands_write(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    text = importlib.import_module(f"make_{page}").text()
    assert (ROOT / "docs" / f"{page}.md").read_text() == text, f"run: python docs/make_{page}.py"


@pytest.mark.parametrize(
    "command",
    [
        "train",
        "query",
        "serve",
        "report",
        "ls",
        "show",
        "verify",
        "export",
        "merge",
        "",
        "ls --store {store}",
        "show --store {store}",
    ],
)
def test_help_and_listing_need_no_torch(command: str, tmp_path: Path) -> None:
    if words := command.format(store=tmp_path / "s").split()[1:]:
        small_store(tmp_path / "s")
    words = [*command.split()[:1], *(words or ["--help"])]
    code = (
        f"import sys; from cas.__main__ import main\ntry: status = main({words!r})\n"
        "except SystemExit as e: status = e.code\nassert not status\n"
        "assert not {'torch', 'transformers', 'faiss', 'sentence_transformers'} & {*sys.modules}"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and done.stdout, done.stderr


@pytest.mark.parametrize("command", ["cas.train", "cas.query", "cas report", "cas ls"])
def test_ctrl_c_while_libraries_are_imported_is_one_line(command: str, tmp_path: Path) -> None:
    (tmp_path / "tyro.py").write_text("raise KeyboardInterrupt")
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    words = [sys.executable, "-m", *command.split()]
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
    assert (done.returncode, done.stderr) == (130, "cas: interrupted\n")


def test_flags_over_yaml_over_defaults(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("lr: 0.5\npool: 7\nmax-distractors: 3\nkinds: [question, creative]\nmerge: true\n")
    config = parse(TrainConfig, "x", ["--config", str(file), "--collection", "docs", "--pool", "9"])
    assert (config.lr, config.pool, config.max_distractors, config.kinds, config.merge) == (
        0.5,
        9,
        3,
        ("question", "creative"),
        True,
    )
    assert config.epochs == TrainConfig.epochs


def test_effort_fills_what_is_not_given(tmp_path: Path) -> None:
    def read(*words: str) -> tuple[str, int, float, int | None]:
        config = parse(TrainConfig, "x", list(words))
        return config.effort, config.wordings, config.epochs, config.conversations

    assert read() == read("--effort", "standard") == ("standard", 4, 4.0, None)
    assert EFFORTS["standard"] == Effort(64, 0.25, TrainConfig.wordings, TrainConfig.epochs)
    assert read("--effort", "quick") == ("quick", 1, 1.0, None)
    assert read("--effort", "thorough", "--epochs", "9") == ("thorough", 8, 9.0, None)
    file = tmp_path / "c.yaml"
    file.write_text("effort: quick\nwordings: 3\n")
    assert read("--config", str(file)) == ("quick", 3, 1.0, None)
    assert read("--config", str(file), "--effort", "thorough") == ("thorough", 3, 8.0, None)
    with pytest.raises(ConfigError, match="lazy"):
        file.write_text("effort: lazy\n")
        read("--config", str(file))


def test_the_help_of_effort_is_the_table() -> None:
    page = (ROOT / "docs" / "cli.md").read_text().split("## python -m cas.query")[0]
    shown = " ".join(re.sub(r"[│\n]", " ", page[page.index("--effort") : page.index("--conversations {")]).split())
    for name, effort in EFFORTS.items():
        part = shown.partition(f"{name}: ")[2].partition(";")[0].partition(" Reconstruction")[0]
        numbers = [int(number) for number in re.findall(r"\d+", part)]
        assert numbers == [effort.least, effort.wordings, effort.epochs], name


@pytest.mark.parametrize("old", ["initialisation: first\nguests: 3", "initialization: first\nfrozen-distractors: 3"])
def test_old_names_are_read(old: str, tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(
        f"{old}\nkinds: [summarisation, use case]\npool: null\nlr: 1\nbudget: 0\nrevision: 12\nratio: 8\nseed: 7\n"
    )
    config = parse(TrainConfig, "x", ["--config", str(file)])
    assert (config.initialization, config.guests, config.kinds) == ("first", 3, ("summarisation", "use case"))
    assert (config.pool, config.lr, config.budget, config.revision) == (None, 1.0, "0", "12")
    assert isinstance(config.lr, float) and isinstance(config.ratio, float)
    assert config.part(SelfStudy).seed == config.part(Training).seed == config.seed == 7
    assert parse(TrainConfig, "x", ["--config", str(file), "--seed", "8"]).part(SelfStudy).seed == 8


def test_both_spellings_of_flags_and_one_of_what_is_stored() -> None:
    new = parse(
        TrainConfig, "x", ["--initialization", "first", "--frozen-distractors", "2", "--kinds", "summarization"]
    )
    old = parse(TrainConfig, "x", ["--initialisation", "first", "--guests", "2", "--kinds", "summarisation"])
    assert new == old and new.part(SelfStudy) == SelfStudy(kinds=("summarisation",))


def test_saved_settings_are_read_back(tmp_path: Path) -> None:
    config = parse(TrainConfig, "x", ["--collection", "docs", "--merge", "--kinds", "use case", "--ratio", "8"])
    values = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(config).items()}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(values))
    read = parse(TrainConfig, "x", ["--config", str(tmp_path / "c.yaml")])
    assert dataclasses.replace(read, config=None) == config


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--isolation", "1.5"], "--isolation 1.5: from 0 to 1"),
        (["--kinds", "gossip"], "unknown kinds of seed prompt: gossip; choose from .*summarization"),
        (["--kinds"], "unknown kinds of seed prompt: none given"),
    ],
)
def test_bad_values_are_one_line(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        parse(TrainConfig, "x", words)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text",
    [
        "pool: true",
        "lr: true",
        "system: null",
        "collection: true",
        "isolation: 2",
        "dtype: 32",
        "objective: mse",
        "initialisation: [first]",
        "nonsense: 1",
        "lr: fast",
        "pool: 1.5",
        "merge: 1",
        "positions: sideways",
        "- a list",
        "a: [",
        "kinds: question",
    ],
)
def test_bad_yaml_is_one_line(tmp_path: Path, text: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as error:
        parse(TrainConfig, "x", ["--config", str(file)])
    assert "\n" not in str(error.value) and "c.yaml" in str(error.value)


def test_unknown_flag_exits_2() -> None:
    done = run("cas.train", "--colection", "x")
    assert done.returncode == 2 and done.stdout == ""


@pytest.mark.parametrize(
    "words",
    [
        ["cas.train"],
        ["cas.train", "--collection", "no-such-thing"],
        ["cas.query", "--store", "no/such/store", "Why?"],
        ["cas", "ls", "--store", "no/such/store"],
        ["cas", "verify", "--store", "no/such/store"],
        ["cas.train", "--config", "none.yaml"],
    ],
)
def test_user_mistakes_are_one_line_and_write_nothing(words: list[str], tmp_path: Path) -> None:
    done = run(*words, cwd=tmp_path, CAS_STORE="")
    assert done.returncode == 2, done
    assert done.stderr.startswith("cas: ") and done.stderr.count("\n") == 1 and done.stdout == ""
    assert not list(tmp_path.iterdir())


def test_question_is_the_bare_word() -> None:
    for words in (
        ["Which valve?", "--json", "--retrieve-k", "2"],
        ["--retrieve-k", "2", "--json", "Which valve?"],
        ["--retrieve-k=2", "Which valve?", "--json"],
    ):
        config = parse(QueryConfig, "x", words)
        assert (config.question, config.retrieve_k, config.json) == ("Which valve?", 2, True)
    assert parse(QueryConfig, "x", []).question is None
    assert parse(QueryConfig, "x", ["--json", "--", "-5 or 5?"]).question == "-5 or 5?"
    with pytest.raises(ConfigError, match='put the question into quotes: "Which valve"'):
        parse(QueryConfig, "x", ["Which", "valve"])


def test_memory_sizes() -> None:
    assert (
        memory("6GiB", "-") == 6 * 2**30
        and memory("1.5G", "-") == 3 * 2**29
        and memory("500MB", "-") == 500_000_000
        and memory("0", "-") == 0
    )
    for bad in ("", "six", "-1", "6 GBit", "1e9"):
        with pytest.raises(ConfigError):
            memory(bad, "--budget")


def test_store_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CAS_STORE", raising=False)
    assert store_folder(None, "a/manuals/") == Path("runs/manuals") and store_folder(None, "x.jsonl.gz") == Path(
        "runs/x"
    )
    with pytest.raises(ConfigError):
        store_folder(None)
    for n, name in enumerate(("old", "new")):
        file = tmp_path / "runs" / name / "cartridges.lmdb"
        file.parent.mkdir(parents=True)
        file.touch()
        os.utime(file, (n, n))
    assert store_folder(None) == Path("runs/new") and "newest" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"^runs is a folder of stores; give one of them: new, old$"):
        store_folder("runs")
    assert store_folder("runs", "manuals") == Path("runs")
    monkeypatch.setenv("CAS_STORE", "elsewhere")
    assert store_folder(None) == Path("elsewhere") and store_folder("given", "c") == Path("given")


def test_errors_become_statuses(capsys: pytest.CaptureFixture[str]) -> None:
    def fail(error: BaseException) -> int:
        def main() -> int:
            raise error

        return console.run(main)

    assert fail(ConfigError("bad")) == 2 and fail(StoreError("broken")) == 1 and fail(KeyboardInterrupt()) == 130
    assert re.fullmatch(r"cas: bad\ncas: broken\ncas: interrupted\n", capsys.readouterr().err)
    full, map_full = OSError(errno.ENOSPC, "No space left on device", "a/b\x1b[2J"), lmdb.MapFullError("mdb_put: full")
    assert fail(full) == fail(map_full) == fail(MemoryError()) == 1 and fail(EmbedderUnavailable("no embedder")) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "cas: a/b\ufffd[2J: No space left on device" and lines[1].startswith("cas: mdb_put: full")
    assert lines[2:] == ["cas: out of memory", "cas: no embedder"]
    with pytest.raises(RuntimeError):  # a fault of ours keeps its traceback
        fail(RuntimeError("shapes differ"))


def test_output_cannot_steer_a_terminal() -> None:
    kept = "Zürich\u00a0\u2009\u3000\u200d\u200c 文字\t\n"
    assert console.harmless(kept) == kept
    for bad in "\x00\x1b\r\x7f\x9b\u2028\u2029\u202a\u202e\u2066\u2069\ud800":
        assert console.harmless(f"a{bad}b") == "a\ufffdb"
        text = console.to_json({"a": f"a{bad}b"})
        assert bad not in text and json.loads(text) == {"a": f"a{bad}b"}


def test_titles_and_ids_are_printed_harmless(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    small_store(tmp_path / "s")
    row = Row("a\x1b[31m", "red\x9b2J", "h", 1, 4, 0, 0)
    monkeypatch.setattr(Store, "rows", lambda store: {row.id: row})
    monkeypatch.setattr(Store, "row", lambda store, document: row)
    for words in (["ls"], ["show", "a\x1b[31m"], ["ls", "--json"], ["show", "a\x1b[31m", "--json"]):
        assert main([*words, "--store", str(tmp_path / "s")]) == 0
        printed = capsys.readouterr().out
        assert "red" in printed and not re.search("[\x1b\x9b]", printed)


def test_what_a_begun_store_is_for_people(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    small_store(tmp_path / "s")
    monkeypatch.setattr(Store, "rows", lambda store: {"pump": Row("pump", "The pump", "h", 9, 4)})
    monkeypatch.setattr(Store, "verify", lambda store: [])
    assert main(["show", "--store", str(tmp_path / "s")]) == 0
    shown = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    assert "{" not in shown["model"] and "None" not in shown.values()
    assert main(["verify", "--store", str(tmp_path / "s")]) == 0
    assert "1 cartridges, 1 without values yet, 0 broken" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0 and capsys.readouterr().out == f"cas {cas.__version__}\n"


def test_warnings_are_lines(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> int:
        warnings.warn("nothing to train on", stacklevel=1)
        return 0

    assert console.run(main) == 0 and capsys.readouterr().err == "cas: nothing to train on\n"


def test_progress_in_plain_lines(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where stderr is no terminal: nothing at first, then a line now and then, with rate and time left."""
    monkeypatch.setattr(console, "SECONDS_BETWEEN_LINES", 0.05)
    with console.Display("self-study") as display:
        assert capsys.readouterr().err == ""
        display._entered -= 10
        display.show(29, 120)  # what an earlier run did
        display.show(30, 120, "loss 1.0")
        time.sleep(0.4)
    lines = capsys.readouterr().err.splitlines()
    assert lines and all(
        re.fullmatch(r"self-study  30 of 120, \S+ a minute, about .* left; loss 1\.0", line) for line in lines
    )
    rates = [float(line.split()[4]) for line in lines]
    assert rates[-1] < 60 / 0.1  # of the one since then, not of thirty
    time.sleep(0.2)
    assert capsys.readouterr().err == ""
    assert [console.duration(s) for s in (40, 420, 9000)] == ["40 seconds", "7 minutes", "2.5 hours"]
