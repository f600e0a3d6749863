"""The base class of the modules of weighted losses."""

from torch import nn


class WeightedLossModule(nn.Module):
    """Temperature and weights; the defaults are those of Sanh et al. 2019 without the cosine term."""

    def __init__(self, temperature: float = 2.0, soft_weight: float = 5.0, hard_weight: float = 2.0) -> None:
        super().__init__()
        self.temperature = temperature
        self.soft_weight = soft_weight
        self.hard_weight = hard_weight

    def extra_repr(self) -> str:
        return (
            f"temperature={self.temperature}, soft_weight={self.soft_weight}, hard_weight={self.hard_weight}"
        )
