"""The state of a training run: what a checkpoint holds besides tensors, and the settings that a run must keep."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from cas.errors import ConfigError
from cas.store.records import Row
from cas.store.store import Store
from cas.training.loss_guard import LossGuard


@dataclass
class TrainerState:
    """Where a run is.

    Attributes:
        step: steps done. pool, guests: ids of the resident cartridges, trained and read-only (the frozen distractors).
        rows: every document's figures; drawn: of these, the conversations drawn so far.
        settings: those of the run, by name.
    """

    step: int = 0
    pool: tuple[str, ...] = ()
    guests: tuple[str, ...] = ()
    rows: dict[str, Row] = field(default_factory=dict)
    drawn: dict[str, int] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    loss_guard: LossGuard = field(default_factory=LossGuard)

    @classmethod
    def load(cls, store: Store, settings: dict[str, Any]) -> TrainerState:
        """The state at the last checkpoint, or at step 0. Raises: ConfigError for other settings than the run's."""
        refuse_other_settings(store, settings)
        rows, saved = store.rows(), store.run_state() or {"step": 0, "pool": (), "guests": ()}
        return cls(
            step=int(saved["step"]),
            pool=tuple(saved["pool"]),
            guests=tuple(saved["guests"]),
            rows=rows,
            drawn={i: row.drawn for i, row in rows.items()},
            settings=settings,
            loss_guard=LossGuard(**saved.get("rescue", {})),
        )

    def save(self, store: Store) -> None:
        """Commit it with everything that was written since the last checkpoint, in one transaction."""
        run = {
            "step": self.step,
            "pool": self.pool,
            "guests": self.guests,
            "settings": self.settings,
            "rescue": asdict(self.loss_guard),  # the loss guard's name in stores
        }
        store.commit(self.rows, run)


def refuse_other_settings(store: Store, settings: Mapping[str, Any]) -> None:
    """Raise ConfigError if the training of a store was begun with other settings than these."""
    begun = (store.run_state() or {}).get("settings", {})
    if changed := [f"{k} {begun[k]} (now {v})" for k, v in settings.items() if k in begun and begun[k] != v]:
        raise ConfigError(
            f"{store.folder} was begun with {', '.join(changed)}; go on with the same settings, --effort included, or give a new --store"
        )
