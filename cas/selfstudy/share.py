"""How much of what the model writes is kept: said after the first hundred questions of a run, with the time to go."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable

from cas.console import duration
from cas.errors import RunError

FIRST_QUESTIONS = 100
LEAST_SHARE = 0.25  # kept of the first questions; below it self-study stops
FEW_QUESTIONS = 300  # to go: it goes on whatever the share


class KeptShare:
    """Counts what a run keeps and drops. ``say``: gets the line; ``advice``: what to do when too little is kept."""

    def __init__(self, say: Callable[[str], None] | None, advice: str, keep_going: bool) -> None:
        self.say, self.advice, self.keep_going = say, advice, keep_going
        self.kept, self.dropped, self.started, self.is_said = 0, Counter[str](), time.monotonic(), False

    def add(self, kept: int, dropped: Counter[str]) -> None:
        """Count a unit."""
        self.kept += kept
        self.dropped.update(dropped)

    def check(self, conversations: int, most_questions: int) -> None:
        """Say the share kept, once and after enough questions.

        Args: conversations: still wanted; most_questions: that will be asked at most.
        Raises: RunError when the share is low and the rest would take long.
        """
        written = self.kept + self.dropped.total()
        judged = written - self.dropped["duplicate"]  # another wording of a question is no fault of the model
        if self.is_said or judged < FIRST_QUESTIONS:
            return
        self.is_said = True
        questions = min(most_questions, int(conversations * written / max(self.kept, 1)))
        time_left = duration(questions * (time.monotonic() - self.started) / written)
        aside = " without duplicates" if judged < written else ""
        line = (
            f"kept {self.kept} of the first {written} questions ({self.kept / judged:.0%}{aside}; dropped: "
            f"{reasons(self.dropped, 3)}); about {time_left} to go"
        )
        if self.kept >= LEAST_SHARE * judged or questions <= FEW_QUESTIONS or self.keep_going:
            if self.say is not None:
                self.say(f"self-study  {line}")
            return
        raise RunError(
            f"self-study {line}: stopped, with everything kept; {self.advice}, or go on with --keep-going (keep_going=True)"
        )


def reasons(dropped: Counter[str], most: int | None = None) -> str:
    """Why questions and answers were dropped, the most frequent reasons first: "91 off topic, 26 loop"."""
    return ", ".join(f"{count} {reason}" for reason, count in dropped.most_common(most)) or "none"
