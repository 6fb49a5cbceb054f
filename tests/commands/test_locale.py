"""A system that knows no Unicode: names and texts are Unicode all the same, from the folder to the answer."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers_commands import TRAIN

from cas import query, train
from cas.model.frozen import FrozenModel
from cas.store.store import Store


def test_a_folder_with_names_and_texts_beyond_ascii(manuals: FrozenModel) -> None:
    Path("manuals/Prüfung 阀门.md").write_text("# Das Ventil 阀门\n\nDas rote Ventil öffnet bei 5 °C. 阀门是红色的。\n")
    for words in (
        [*TRAIN],
        ["--json", "--max-new-tokens", "4", "--documents", "Prüfung 阀门", "Wann öffnet das Ventil 阀门?"],
    ):
        code = "import sys, test_locale; sys.exit(test_locale.elsewhere(sys.argv[1:]))"
        done = subprocess.run(
            [sys.executable, "-c", code, *words],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "LC_ALL": "C"}, capture_output=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr.decode(errors="replace")
    assert "Prüfung 阀门".encode() in done.stdout and "Das Ventil 阀门".encode() in done.stdout
    with Store.open("runs/manuals") as store:
        assert store.row("Prüfung 阀门").title == "Das Ventil 阀门" and store.verify() == []
        assert "öffnet bei 5 °C. 阀门是红色的。" in store.text("Prüfung 阀门")


@pytest.mark.parametrize(
    ("environment", "status"),
    [({"PYTHONIOENCODING": "ascii"}, 0), ({"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, 2)],
)
def test_a_system_that_cannot_write_what_is_asked(environment: dict[str, str], status: int) -> None:
    code = "import sys; from cas import console; sys.exit(console.run(lambda: print('Pr\\xfcfung \\u9600\\u95e8')))"
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True)
    assert done.returncode == status
    if status:
        assert done.stderr.count(b"\n") == 1 and b"PYTHONUTF8=1" in done.stderr
    else:
        assert done.stdout.decode().strip() == r"Pr\xfcfung \u9600\u95e8"


def elsewhere(words: list[str]) -> int:
    """A command in a process of its own, as in the fixture ``manuals``."""
    from helpers_writer import prepare

    with pytest.MonkeyPatch.context() as patch:
        prepare(patch)
        return (query if "--json" in words else train).main(words)
