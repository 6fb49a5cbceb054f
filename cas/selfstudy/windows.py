"""Windows of sentences: as much of a document as the teacher sees at a time."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random


def grow_window(lengths: Sequence[int], center: int, most: int, random: Random) -> range:
    """Sentences around one, of at most ``most`` tokens in all (or that sentence alone), extended to random sides."""
    low, high, used = center, center + 1, lengths[center]
    while True:
        left = low > 0 and used + lengths[low - 1] <= most
        right = high < len(lengths) and used + lengths[high] <= most
        if not (left or right):
            return range(low, high)
        if left and (not right or random.random() < 0.5):
            low -= 1
            used += lengths[low]
        else:
            used += lengths[high]
            high += 1


def sentence_windows(lengths: Sequence[int], most: int) -> list[tuple[range, range]]:
    """Windows of sentences with these lengths, of at most ``most`` tokens (or one sentence), and which of its sentences
    each window is for: together, every sentence once. Later windows begin earlier, so that a pronoun comes after its
    name."""
    windows, start = [], 0
    while start < len(lengths):
        end, used = start + 1, lengths[start]
        while end < len(lengths) and used + lengths[end] <= (most * 3 // 4 if start else most):
            used += lengths[end]
            end += 1
        low = start
        while low > 0 and used + lengths[low - 1] <= most:
            low -= 1
            used += lengths[low]
        windows.append((range(low, end), range(start, end)))
        start = end
    return windows
