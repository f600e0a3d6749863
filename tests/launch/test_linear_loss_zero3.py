"""With the linear distillation loss under DeepSpeed a step equals that of plain PyTorch on whole logits.

Under ZeRO stage 3 the vocabulary projection's weight is sharded over the ranks, and the loss reads it outside the
projection's own forward. SGD, because its update is proportional to the gradient.
"""

from pathlib import Path

import pytest
import torch
from launcher import ranks_alone
from linear_loss_zero3_job import LEARNING_RATE, STEPS, global_batch, make_student
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, linear, log_softmax

pytestmark = pytest.mark.full

STAGES = (1, 3)


@pytest.fixture(scope="module")
def expected() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The parameters before and after the steps, computed without this project's code."""
    student = make_student()
    start = {name: parameter.detach().clone() for name, parameter in student.named_parameters()}
    optimizer = torch.optim.SGD(student.parameters(), lr=LEARNING_RATE)
    batch, teacher_weight = global_batch()
    log_p = log_softmax(linear(batch.teacher_hidden, teacher_weight) / 2, dim=-1).flatten(0, 1)
    for _ in range(STEPS):
        logits = student(batch.tokens).logits.flatten(0, 1)
        kl = kl_div(log_softmax(logits / 2, dim=-1), log_p, reduction="batchmean", log_target=True) * 2**2
        optimizer.zero_grad()
        (5 * kl + 2 * cross_entropy(logits, batch.labels.flatten())).backward()
        optimizer.step()
    return start, {name: parameter.detach() for name, parameter in student.named_parameters()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("linear")
    result = ranks_alone(Path(__file__).with_name("linear_loss_zero3_job.py"), folder, *STAGES, ranks=2)
    assert result.returncode == 0, result.stderr[-3000:]
    return folder


@pytest.mark.parametrize("stage", STAGES)
def test_step_equals_that_of_plain_pytorch(
    stage: int, trained: Path, expected: tuple[dict[str, Tensor], dict[str, Tensor]]
) -> None:
    start, after = expected
    parameters = load_file(trained / f"stage{stage}.safetensors")
    assert parameters.keys() == start.keys()
    update, expected_update = (
        torch.cat([(end[name] - start[name]).flatten() for name in start]) for end in (parameters, after)
    )
    assert (update - expected_update).norm() <= 1e-5 * expected_update.norm()
