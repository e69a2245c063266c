"""How a global batch is divided: pure arithmetic, so that no layout ever changes which samples a step sees."""

from __future__ import annotations

from dataclasses import dataclass

from mcore_swift.errors import InputError


@dataclass(frozen=True, kw_only=True)
class LoaderShape:
    """Sizes a loader is built for. `pad_multiple`: lengths are padded to a multiple of it (tp x 2·cp)."""

    global_batch_size: int
    micro_batch_size: int
    sequence_length: int
    dp_rank: int
    dp_size: int
    pad_multiple: int = 1

    def __post_init__(self) -> None:
        per_micro_batch = self.micro_batch_size * self.dp_size
        if self.global_batch_size % per_micro_batch:
            raise InputError(
                f"schedule.global_batch_size: {self.global_batch_size} is not a multiple of micro_batch_size x "
                f"data-parallel size = {self.micro_batch_size} x {self.dp_size} = {per_micro_batch}"
            )

    @property
    def num_micro_batches(self) -> int:
        return self.global_batch_size // (self.micro_batch_size * self.dp_size)

    def slots(self) -> list[list[int]]:
        """The positions in a global batch that this rank takes, a list for each of its micro-batches.

        Over all ranks each position in 0 … global_batch_size - 1 is taken exactly once.
        """
        size = self.micro_batch_size
        firsts = [(m * self.dp_size + self.dp_rank) * size for m in range(self.num_micro_batches)]
        return [list(range(first, first + size)) for first in firsts]

    def padded(self, length: int) -> int:
        """`length` rounded up to a multiple of `pad_multiple`."""
        return -(-length // self.pad_multiple) * self.pad_multiple
