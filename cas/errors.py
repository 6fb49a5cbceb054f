"""One error tree: everything CAS raises on purpose is a :class:`CasError`.

The command lines catch :class:`CasError` once, print its one line and leave with ``exit_status``:
2 for a mistake the user can mend (nothing was written), 1 for a check or a run that failed.
Breaches of our own invariants are asserts, never one of these.
"""

from __future__ import annotations


class CasError(Exception):
    """Base of the tree. ``str(error)`` is one line that says what to do."""

    exit_status = 1


class UserError(CasError, ValueError):
    """A mistake in what the user asked for; nothing has been written."""

    exit_status = 2


class ConfigError(UserError):
    """A setting that is unknown, malformed or contradicts another one."""


class CollectionError(UserError):
    """A collection that cannot be read."""


class ModelError(UserError):
    """A model that cannot be found or cannot carry cartridges; the message has the reason."""


class BudgetError(UserError):
    """A memory or disk budget that cannot hold what was asked for; the message has the figures."""


class StoreMismatch(UserError):
    """A store made with another model, format or settings, or in use by another trainer."""


class StoreError(CasError):
    """A store that is broken or could not be written (disk full, failed checksum)."""


class RunError(CasError):
    """A run that could not reach its end."""
