"""How many generated cases a property is tried on."""

from typing import Any

from hypothesis import settings

QUICK = False  # whether slow tests are left out; conftest.py knows, before any test file is read


def cases(count: int, **more: Any) -> settings:
    """`count` of them, and a sixth in `make test`; without a time limit on one."""
    return settings(max_examples=max(3, count // 6) if QUICK else count, deadline=None, **more)
