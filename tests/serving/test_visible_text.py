"""Pieces of an answer as a reader sees them."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cas.serving.visible_text import VisibleText


def shown(pieces: list[str], *stop: str) -> list[str]:
    visible, found = VisibleText(stop), []
    for piece in pieces:
        found.append(visible.push(piece))
        if visible.stopped:
            break
    found.append(visible.finish())
    assert "".join(found) == visible.text
    return found


def test_outer_spaces_are_not_shown() -> None:
    assert shown([" ", " The", " red ", "\n", "valve", " ", ""]) == ["", "The", " red", "", " \nvalve", "", "", ""]


def test_a_stop_string_over_several_pieces() -> None:
    assert shown(["one #", "#", "# two"], "###") == ["one", "", "", ""]
    assert shown(["one #", "#", " two"], "###") == ["one", "", " ## two", ""]
    assert shown(["a", "b"], "ab") == ["", "", ""]
    assert shown(["Paris. London"], ".", "is") == ["Par", ""]  # the first place counts, not the first string


@pytest.mark.parametrize("stop", [(), ("",)])
def test_no_stop_string(stop: tuple[str, ...]) -> None:
    assert "".join(shown(["a", " b"], *stop)) == "a b"


@settings(deadline=None)  # other tests may run beside it
@given(
    st.lists(st.text("ab \n", max_size=4), max_size=12), st.lists(st.text("ab \n", min_size=1, max_size=3), max_size=3)
)
def test_what_is_shown_is_the_text_before_the_first_stop(pieces: list[str], stop: list[str]) -> None:
    text = "".join(pieces).lstrip()
    end = min([text.find(s) for s in stop if s in text], default=len(text))
    assert "".join(shown(pieces, *stop)) == text[:end].rstrip()
