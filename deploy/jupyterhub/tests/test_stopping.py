"""A stop saves, within its bound, whatever the manager answers."""

import asyncio
import json
from typing import Any

from jupyterhub_upperdeck.manager import Manager, Problem
from jupyterhub_upperdeck.stopping import Outcome, save_before_stop
from jupyterhub_upperdeck.words import words_in


class Scripted(Manager):
    """Answers each call by the next of `answers`; the last one again and again."""

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)
        self.calls: list[tuple[str, str]] = []

    async def call(self, method: str, where: str, owner: str, **more: Any) -> dict[str, Any]:
        self.calls.append((method, where))
        await asyncio.sleep(0)
        answer = self.answers[0] if len(self.answers) == 1 else self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


def save(state: str, **more: Any) -> dict[str, Any]:
    return {"id": "0190", "state": state, "name": "notebook", "tag": "monday", **more}


async def stop(manager: Manager, bound: float = 30) -> Outcome:
    return await save_before_stop(manager, "alice", "f" * 64, bound=bound)


async def test_the_end_is_waited_for() -> None:
    outcome = await stop(
        Scripted(save("queued"), save("running"), save("succeeded", result={"layer_bytes": 12_000_000}))
    )
    assert outcome.saved
    assert outcome.text() == "Saved as notebook:monday (12.0 MB of changes)."
    assert outcome.text(words_in("ko")) == "notebook:monday(으)로 저장되었습니다 (변경 12.0 MB)."


async def test_after_the_bound_the_save_is_cancelled() -> None:
    manager = Scripted(save("queued", waiting={"reason": "retry"}))
    outcome = await stop(manager, bound=0.5)
    assert not outcome.saved
    assert outcome.text() == (
        "Not saved: it took longer than 0 s. The last attempt failed, and the next one was waited for. "
        "The save was cancelled."
    )
    assert manager.calls[-1] == ("DELETE", "/api/v1/saves/0190")


async def test_the_save_that_the_user_began_is_followed_and_not_cancelled() -> None:
    conflict = Problem(409, {"code": "conflict", "save": "0190", "detail": "it is being saved"})
    followed = Scripted(conflict, save("running"), save("succeeded"))
    assert (await stop(followed)).saved
    slow = Scripted(conflict, save("running"))
    assert not (await stop(slow, bound=0.5)).saved
    assert "DELETE" not in [method for method, _ in slow.calls]


async def test_a_manager_that_is_away_does_not_hold_the_stop() -> None:
    outcome = await stop(Scripted(Problem.unavailable("refused")), bound=0.5)
    assert not outcome.saved
    assert "longer than" in outcome.text()


async def test_refusals_end_it_at_once() -> None:
    refused = Scripted(Problem(404, {"code": "not_found", "detail": "No such session."}))
    outcome = await stop(refused)
    assert outcome.text() == "Not saved: No such session."
    assert len(refused.calls) == 1
    failed = Scripted(save("queued"), save("failed", error={"message": "the quota is used up"}))
    assert (await stop(failed)).text() == "Not saved: the quota is used up"


def test_outcomes_are_kept() -> None:
    outcome = Outcome.now(True, ("saved", {"image": "x:{y}"}))
    assert outcome.text() == "Saved as x:{y}."
    assert Outcome.read(json.loads(json.dumps(outcome.as_json()))) == outcome
    kept = {"saved": True, "at": ""}
    # Of another version, or not written by it.
    said: list[Any] = [7, [7], [["saved"]], [["saved", {}]], [["unknown", {}]], [["saved", 7]]]
    for wrong in (None, [], "", {}, {**kept, "text": "Saved."}, *({**kept, "said": one} for one in said)):
        assert Outcome.read(wrong) is None, wrong
