"""Saves a session before its server stops, within a bound."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from .manager import Json, Manager, Problem, path
from .text import shorten, size
from .words import Words, english

Said = tuple[str, dict[str, str]]
"""A sentence: its name among the words, and its values."""
MESSAGE = "Saved when the server stopped"
_FIRST_LOOK_S = 0.3
_LAST_LOOK_S = 3.0
_CANCEL_S = 5.0
_UNKNOWN_LOOK_S = 1.0


@dataclass(frozen=True)
class Outcome:
    """What the last stop of a server saved, as sentences."""

    saved: bool
    at: str
    said: tuple[Said, ...]

    @classmethod
    def now(cls, saved: bool, *said: Said) -> Outcome:
        return cls(saved, datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"), said)

    def text(self, words: Words = english) -> str:
        """Returns the sentences for people."""
        return shorten(" ".join(words(code, **values) for code, values in self.said), 400)

    @property
    def image(self) -> str | None:
        """Name and tag of what was saved."""
        return next((values["image"] for code, values in self.said if code in ("saved", "saved_changes")), None)

    def as_json(self) -> Json:
        return {"saved": self.saved, "at": self.at, "said": [[code, values] for code, values in self.said]}

    @classmethod
    def read(cls, kept: Any) -> Outcome | None:
        """Reads what :meth:`as_json` wrote; `None` for anything else."""
        try:
            said = tuple((str(code), {**values}) for code, values in kept["said"])
            found = cls(bool(kept["saved"]), str(kept["at"]), said)
            # Its words and values are those of this version.
            found.text()
        except (KeyError, TypeError, ValueError, IndexError):
            return None
        return found


def not_saved(reason: str) -> Said:
    """Returns the sentence that nothing was saved, and why."""
    return "saved_not", {"reason": shorten(reason, 300)}


async def save_before_stop(
    manager: Manager, owner: str, which: str | Json, *, bound: float, name: str | None = None
) -> Outcome:
    """Saves a session and waits for the end of the save, at most `bound` seconds for everything.

    A save that has not ended by then is cancelled, as it would fail with the session's end. Never fails: what went
    wrong is in the outcome.
    """
    saving = _Saving(manager, owner, which, name)
    try:
        async with asyncio.timeout(bound):
            return await saving.run()
    except TimeoutError:
        await saving.cancel()
        return Outcome.now(False, ("too_long", {"bound": f"{bound:.0f}"}), *saving.why, *saving.left)
    except Problem as problem:
        return Outcome.now(False, not_saved(str(problem)))


class _Saving:
    def __init__(self, manager: Manager, owner: str, which: str | Json, name: str | None) -> None:
        self.manager = manager
        self.owner = owner
        self.which = which
        self.name = name
        self.save: Json | None = None
        self.ours = False

    @property
    def why(self) -> list[Said]:
        """What the save was waiting for."""
        save = self.save or {}
        error, reason = save.get("error") or {}, (save.get("waiting") or {}).get("reason")
        if error.get("message"):
            return [("waiting_error", {"reason": shorten(error["message"], 300)})]
        return [(f"waiting_{reason}", {})] if reason in ("retry", "node", "slot", "queue") else []

    @property
    def left(self) -> list[Said]:
        """What became of the save."""
        return [("cancelled", {})] if self.ours and self.save else []

    async def run(self) -> Outcome:
        await self._request()
        pause = _FIRST_LOOK_S
        while self.save is not None and self.save.get("state") not in ("succeeded", "failed", "cancelled"):
            await asyncio.sleep(pause)
            pause = min(pause * 1.5, _LAST_LOOK_S)
            try:
                self.save = await self.manager.call("GET", path("saves", str(self.save["id"])), self.owner)
            except Problem as problem:
                # The manager may be restarted meanwhile; the bound ends this.
                if problem.status < 500 and problem.status != 429:
                    raise
        return self._outcome()

    async def _request(self) -> None:
        """Requests the save, or follows the one that the user has begun."""
        body: Json = {"session": self.which, "message": MESSAGE, "replace": "own"}
        if self.name:
            body["image"] = {"name": self.name}
        key = f"stop-{time.time_ns():x}"
        while self.save is None:
            try:
                self.save = await self.manager.call("POST", path("saves"), self.owner, body=body, key=key)
                self.ours = True
            except Problem as problem:
                under_way = problem.body.get("save")
                if problem.code == "conflict" and under_way:
                    self.save = await self.manager.call("GET", path("saves", str(under_way)), self.owner)
                elif problem.status >= 500 or problem.status == 429:
                    await asyncio.sleep(_UNKNOWN_LOOK_S)
                else:
                    raise

    def _outcome(self) -> Outcome:
        save = self.save or {}
        image = f"{save.get('name', '')}:{save.get('tag', '')}"
        if save.get("state") == "succeeded":
            result = save.get("result") or {}
            changed = result.get("layer_bytes")
            values = {"image": shorten(image, 260)}
            if changed:
                return Outcome.now(True, ("saved_changes", {**values, "size": size(changed)}))
            return Outcome.now(True, ("saved", values))
        error = (save.get("error") or {}).get("message") or f"the save was {save.get('state')}"
        return Outcome.now(False, not_saved(str(error)))

    async def cancel(self) -> None:
        """Cancels the save if it was requested here; the user's own one is theirs."""
        if self.save is None or not self.ours:
            return
        try:
            async with asyncio.timeout(_CANCEL_S):
                await self.manager.call("DELETE", path("saves", str(self.save["id"])), self.owner)
        except (Problem, TimeoutError):
            # It fails by itself when the session is gone.
            pass
