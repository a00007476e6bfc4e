"""A run's checkpoints: at most one is on its way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmfast.checkpoint.save import Saving
from llmfast.ranks import Ranks
from llmfast.training.parallel import Alone
from llmfast.training.watchdog import Watchdog

BRIEFLY = 10.0  # seconds that a run which failed waits for its disk


class Saver:
    """Every rank calls ``save`` and ``finish`` in turn. ``content`` is what every ``Saving`` is given."""

    def __init__(self, root: Path, ranks: Ranks, watchdog: Watchdog, **content: Any) -> None:
        self._root, self._ranks, self._watchdog, self._content = root, ranks, watchdog, content
        self._pending: Saving | None = None
        self.saved: Path | None = None  # the newest that is finished

    @property
    def writes(self) -> bool:
        """Whether this rank still writes its part."""
        return self._pending is not None and not self._pending.done()

    def save(self, step: int, parallel: Alone, **content: Any) -> None:
        """Begin a checkpoint, after the one before it is finished; without ``beside`` finish it, too."""
        self.finish()
        with self._watchdog.pause("saving"):
            parallel.rest()
            kind: type[Saving] = Saving
            if parallel.shards:
                from llmfast.checkpoint.shards import ShardSaving as kind  # takes a second to import
            self._pending = kind(self._root, step, ranks=self._ranks, **self._content, **content)
        if not self._content["beside"]:
            self.finish()

    def finish(self) -> None:
        """Wait for the checkpoint that is on its way, and publish it; raises what went wrong with it."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            with self._watchdog.pause("saving"):
                self.saved = pending.finish()

    def leave(self) -> None:
        """End without the other ranks."""
        if self._pending is not None:
            self._pending.abandon(BRIEFLY)
