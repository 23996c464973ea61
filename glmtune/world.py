"""The seam for several processes: which one this is, and sums over all of them.

In one process every function is the identity. Whatever writes, measures, refuses, counts or reduces in a run asks its World, so that training
on several processes is another World and nothing else. Laws:

- every process plans the same steps (batch.py follows from seed and lengths) and computes the same number of micro-batches;
- one process writes (`is_main`); a refusal of one is a refusal of all (`agree` before anything collective);
- gradients are sums over processes, never means: each process divides by the denominator of the whole step.
"""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


class World:
    """One process, alone."""

    rank = 0
    size = 1

    @property
    def is_main(self) -> bool:
        """Whether this process writes the run's folder and speaks to the user."""
        return self.rank == 0

    def all_reduce(self, values: Mapping[str, float]) -> dict[str, float]:
        """The sum over all processes, name by name. Every process gives the same names."""
        return dict(values)

    def largest(self, value: float) -> float:
        """Over all processes: of peak memory, and of seconds."""
        return value

    def agree(self, here: bool) -> bool:
        """Whether it is so in any process: out of memory, a loss that is not finite, Ctrl-C."""
        return here

    def sum_gradients(self, parameters: "Iterable[nn.Parameter]") -> None:
        """Replaces every gradient by its sum over all processes, in place; a missing one counts as zero."""

    def wait(self) -> None:
        """Until every process is here: what the main one wrote can be read by all."""


ALONE = World()
