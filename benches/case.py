"""What a benchmark case is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

Outputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Work:
    """The least that any implementation has to do, to tell how near to the machine's limit a time is."""

    gathered_bytes: float = 0.0  # rows read at random ...
    table_rows: int = 0  # ... out of a table of so many
    row_bytes: int = 0
    flops: float = 0.0


@dataclass(frozen=True)
class Part:
    """What a peer does where the whole would take it too long, or too much memory."""

    share: float  # of the whole; the time of the part is divided by it
    expected: Callable[[], Outputs]  # in float64


@dataclass(frozen=True)
class Problem:
    """Inputs turned into calls that all do the same work and return the same tensors, but for the parts named."""

    ours: Callable[[], Outputs]
    peers: Mapping[str, Callable[[], Outputs]]
    expected: Callable[[], Outputs]  # in float64
    work: Work
    parts: Mapping[str, Part] = field(default_factory=dict)  # peers that do a part only


@dataclass(frozen=True, eq=False)
class Case:
    """One row of the speed table. ``peers`` names everything it is compared with, installed or not."""

    name: str
    family: str
    shape: str
    build: Callable[[], Problem]
    peers: tuple[str, ...]
    floors: Mapping[str, float] = field(default_factory=dict)  # peer → least ratio of the times
    memory_floors: Mapping[str, float] = field(default_factory=dict)  # peer → least ratio of the peak memories
    tolerance: float = 1e-5  # largest error, as a share of the largest absolute value of each tensor
