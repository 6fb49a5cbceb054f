"""The text of an answer as its reader sees it while it is decoded."""

from __future__ import annotations

from collections.abc import Sequence


class VisibleText:
    """Takes pieces of decoded text and returns what may be shown: without outer spaces, and only up to the first of
    some stop strings, of which no beginning is shown either. The pieces returned, joined, are :attr:`text` at the end.

    Attributes: text: all of it so far; stopped: whether a stop string ended it.
    """

    def __init__(self, stop: Sequence[str] = ()) -> None:
        self.text, self.stopped = "", False
        self._stop, self._shown = [s for s in stop if s], 0
        self._longest = max(map(len, self._stop), default=1)

    def push(self, piece: str) -> str:
        """What can be shown now that ``piece`` was decoded."""
        before = len(self.text)
        self.text = self.text + piece if self.text else piece.lstrip()
        first = max(0, before - self._longest + 1)
        found = [at for at in (self.text.find(stop, first) for stop in self._stop) if at >= 0]
        if found:
            self.text, self.stopped = self.text[: min(found)], True
            return self.finish()
        return self._show(len(self.text) - self._held_back())

    def finish(self) -> str:
        """The rest, where nothing follows any more."""
        rest = self._show(len(self.text))
        self.text = self.text.rstrip()
        return rest

    def _show(self, end: int) -> str:
        end = max(self._shown, len(self.text[:end].rstrip()))
        shown, self._shown = self._shown, end
        return self.text[shown:end]

    def _held_back(self) -> int:
        """Length of the longest end of the text that a stop string begins with."""
        for length in range(min(self._longest - 1, len(self.text)), 0, -1):
            end = self.text[-length:]
            if any(stop.startswith(end) for stop in self._stop):
                return length
        return 0
