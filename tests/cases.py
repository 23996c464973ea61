"""How many generated cases a property is tried on."""

from typing import Any

from hypothesis import settings

QUICK = False  # whether slow tests are left out; conftest.py knows, before any test file is read


def cases(count: int, quick: int = 0, **more: Any) -> settings:
    """`count` of them, in `make test` only `quick` (not given: a sixth); without a time limit on one."""
    return settings(max_examples=(quick or max(3, count // 6)) if QUICK else count, deadline=None, **more)
