"""The engines of student and teacher, observed in a real job of two ranks."""

import json
from pathlib import Path
from typing import Any

import pytest
from launcher import ranks_alone

pytestmark = pytest.mark.full

RANKS = 2


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory, small_corpus_dir: Path) -> list[dict[str, Any]]:
    """The observations of each rank."""
    folder = tmp_path_factory.mktemp("engines")
    result = ranks_alone(Path(__file__).with_name("engines_job.py"), small_corpus_dir, folder, ranks=RANKS)
    assert result.returncode == 0, result.stderr[-3000:]
    return [json.loads((folder / f"seen{rank}.json").read_text()) for rank in range(RANKS)]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1])
def test_ranks_do_not_communicate_between_accumulation_boundaries(
    seen: list[dict[str, Any]], stage: int, precision: str
) -> None:
    # Two optimiser steps of three micro-steps.
    for rank in seen:
        counts = rank["collectives"][f"zero{stage}_{precision}"]
        assert [bool(count) for count in counts] == 2 * [False, False, True]


@pytest.mark.parametrize("stage", [2, 3])
def test_higher_stages_communicate_at_every_micro_step(seen: list[dict[str, Any]], stage: int) -> None:
    # The reason for the shipped configs' stage 1; if DeepSpeed changes this, docs/configuration.md is wrong.
    for rank in seen:
        assert all(rank["collectives"][f"zero{stage}_fp32"])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_sharded_teacher_is_half_as_large_on_two_ranks_with_the_same_outputs(
    seen: list[dict[str, Any]], precision: str
) -> None:
    for rank in seen:
        teacher = rank["teacher"][precision]
        assert teacher["same_outputs"]
        # Biases and norms stay whole on every rank.
        assert 0.5 <= teacher["sharded_elements"] / teacher["replicated_elements"] < 0.53


@pytest.mark.parametrize("optimizer", ["AdamW", "Lamb"])
def test_a_half_precision_optimizer_without_zero_starts_without_state(
    seen: list[dict[str, Any]], optimizer: str
) -> None:
    # DeepSpeed makes one step with zero gradients: the optimiser counts it, and weight decay would change the weights.
    assert all(rank["starts_untouched"][optimizer] for rank in seen)
