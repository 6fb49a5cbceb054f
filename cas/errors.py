"""One error tree: everything CAS raises on purpose is a :class:`CasError`.

The command lines catch :class:`CasError` once, print its one line and leave with ``exit_status``:
2 for a mistake the user can mend (nothing was written), 1 for a check or a run that failed.
Breaches of our own invariants are asserts, never one of these.

::

    CasError                    exit status 1
    ├── UserError               exit status 2; also a ValueError
    │   ├── ConfigError         settings
    │   ├── CollectionError     documents
    │   ├── ModelError          the language model
    │   ├── EmbedderError       the embedding model
    │   ├── BudgetError         memory or disk too small
    │   └── StoreProblem        a store that cannot be used as asked
    │       ├── StoreMissing    there is none
    │       ├── StoreExists     there is one already
    │       ├── StoreLocked     a trainer, or this process, has it open
    │       └── StoreMismatch   made with another model, format or settings
    ├── StoreError              a store that is damaged or cannot be written
    └── RunError                a run that failed
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


class EmbedderError(UserError):
    """An embedding model that cannot be found or loaded; the message has the reason."""


class StoreProblem(UserError):
    """A store that cannot be used as asked."""


class StoreMissing(StoreProblem):
    """A folder that holds no store."""


class StoreExists(StoreProblem):
    """A folder that holds a store already, where a new one was asked for."""


class StoreLocked(StoreProblem):
    """A store that another trainer, or this process, has open."""


class StoreMismatch(StoreProblem):
    """A store made with another model, format or settings."""


class StoreError(CasError):
    """A store that is broken or could not be written (disk full, failed checksum)."""


class RunError(CasError):
    """A run that could not reach its end."""
