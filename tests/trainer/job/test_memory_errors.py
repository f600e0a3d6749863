"""Too little memory is reported as bad input, whichever library finds it."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from user_errors import raises_user_error

from distilspeed.trainer.errors import memory_errors_named

ON_A_GPU = "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 15.77 GiB."


def on_a_gpu() -> None:
    raise torch.OutOfMemoryError(ON_A_GPU)


@pytest.mark.parametrize(
    ("allocate", "size"),
    [
        (on_a_gpu, "2.50 GiB"),
        (lambda: torch.empty(2**47, dtype=torch.uint8), f"{2**47} bytes"),
        (lambda: np.empty(2**47, dtype=np.uint8), "128. TiB"),
    ],
    ids=["gpu", "torch", "numpy"],
)
def test_memory_errors_name_the_missing_memory(allocate: Callable[[], object], size: str) -> None:
    with raises_user_error("out-of-memory", size, "smaller batch"), memory_errors_named():
        allocate()


def test_other_errors_stay_as_they_are() -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), memory_errors_named():
        torch.ones(2, 3) @ torch.ones(2, 3)
