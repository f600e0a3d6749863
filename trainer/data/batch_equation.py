"""The batch equation: the number of rows in an optimiser step."""

from dataclasses import dataclass


@dataclass(frozen=True)
class BatchEquation:
    """global batch = micro-batch per GPU x gradient accumulation steps x world size, in rows."""

    train_batch_size: int
    micro_batch_size: int
    gradient_accumulation_steps: int
    world_size: int

    def micro_batch_number(self, accumulation_step: int, rank: int) -> int:
        """Return the index (from 0) in the global batch of a rank's micro-batch in an accumulation step."""
        return accumulation_step * self.world_size + rank

    def __str__(self) -> str:
        return (
            f"global batch {self.train_batch_size} = micro-batch {self.micro_batch_size} x "
            f"{self.gradient_accumulation_steps} accumulation steps x {self.world_size} ranks"
        )
