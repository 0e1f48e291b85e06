"""Times by a formula, for all tests of this folder."""

from __future__ import annotations

import pytest

from llmq.planner import costs as planning


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times by a formula: tests of choices must not depend on the machine, nor wait for it."""

    def seconds(N: int, K: int, names: tuple, M: int, *rest: object) -> dict[str, float]:
        speed = {"w8a8": 4, "w8a16": 3, "w4a16-g32": 5, "sparse 50 % w8a8": 6}
        return {n: N * K * M / speed.get(n, 1) * 1e-9 for n in ("float", *names)}

    monkeypatch.setattr(planning, "seconds_a_call", seconds)
