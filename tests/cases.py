"""How many generated cases a property is tried on."""

from typing import Any

QUICK = False  # whether slow tests are left out; conftest.py knows, before any test file is read


def cases(count: int, quick: int = 0, **more: Any) -> Any:
    """hypothesis' settings for `count` of them, in `make test` only `quick` (not given: a sixth); without a time limit on one."""
    from hypothesis import settings  # here: xdist's own process need not wait for it

    return settings(max_examples=(quick or max(3, count // 6)) if QUICK else count, deadline=None, **more)
