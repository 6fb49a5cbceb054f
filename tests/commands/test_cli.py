"""The command lines: options, exit statuses, one line for a mistake."""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from cas import console
from cas.config import QueryConfig, TrainConfig, memory, parse, store_folder
from cas.errors import ConfigError, StoreError

ROOT = Path(__file__).parents[2]


def run(*words: str, cwd: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    import os

    return subprocess.run(
        [sys.executable, "-m", *words], capture_output=True, text=True, cwd=cwd or ROOT, env={**os.environ, **env}
    )


def test_options_are_the_golden_ones() -> None:
    """A new, renamed or dropped option has to be meant: it changes this list."""
    golden = json.loads((ROOT / "tests" / "golden_options.json").read_text())
    assert {c.__name__: [f.name for f in dataclasses.fields(c)] for c in (TrainConfig, QueryConfig)} == golden


@pytest.mark.parametrize("page", ["cli", "worlds", "performance"])
def test_generated_pages_are_what_their_commands_write(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    text = importlib.import_module(f"make_{page}").text()
    assert (ROOT / "docs" / f"{page}.md").read_text() == text, f"run: python docs/make_{page}.py"


@pytest.mark.parametrize("module", ["cas.train", "cas.query", "cas"])
def test_help_needs_no_torch(module: str) -> None:
    code = (
        f"import sys, runpy; sys.argv = ['x', '--help']\ntry: runpy.run_module('{module}', run_name='__main__')\n"
        "except SystemExit as e: assert not e.code\nassert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


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


@pytest.mark.parametrize(
    "text",
    [
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
        import os

        os.utime(file, (n, n))
    assert store_folder(None) == Path("runs/new") and "newest" in capsys.readouterr().err
    monkeypatch.setenv("CAS_STORE", "elsewhere")
    assert store_folder(None) == Path("elsewhere") and store_folder("given", "c") == Path("given")


def test_errors_become_statuses(capsys: pytest.CaptureFixture[str]) -> None:
    def fail(error: BaseException) -> int:
        def main() -> int:
            raise error

        return console.run(main)

    assert fail(ConfigError("bad")) == 2 and fail(StoreError("broken")) == 1 and fail(KeyboardInterrupt()) == 130
    assert re.fullmatch(r"cas: bad\ncas: broken\ncas: interrupted\n", capsys.readouterr().err)


def test_warnings_are_lines(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> int:
        warnings.warn("nothing to train on", stacklevel=1)
        return 0

    assert console.run(main) == 0 and capsys.readouterr().err == "cas: nothing to train on\n"
