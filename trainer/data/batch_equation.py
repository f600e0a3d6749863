"""How many rows make an optimiser step."""

from dataclasses import dataclass


@dataclass(frozen=True)
class BatchEquation:
    """global batch = micro-batch per GPU x gradient accumulation steps x world size, in rows."""

    train_batch_size: int
    micro_batch_size: int
    gradient_accumulation_steps: int
    world_size: int

    def micro_batch_number(self, accumulation_step: int, rank: int) -> int:
        """Which of the global batch's micro-batches, counted from 0, a rank takes in an accumulation step."""
        return accumulation_step * self.world_size + rank

    def __str__(self) -> str:
        return (
            f"global batch {self.train_batch_size} = micro-batch {self.micro_batch_size} x "
            f"{self.gradient_accumulation_steps} accumulation steps x {self.world_size} ranks"
        )
