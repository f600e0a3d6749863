"""The profile's figures are right: bandwidth, peak memory, floors, ratios. All cases of a group compute the same."""

import importlib.util
import time
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from distilspeed.kernels import reference
from distilspeed.kernels.implementation.backend import INTERPRETED
from distilspeed.kernels.profiling.cases import build_groups
from distilspeed.kernels.profiling.measurement import (
    Case,
    CpuStopwatch,
    Floor,
    Laps,
    measure_copy_bandwidth,
    measure_peak_memory,
    measure_rounds,
    peak_cpu_bytes,
)
from distilspeed.kernels.profiling.peers import (
    COMPILE,
    EAGER,
    LIGER,
    eager_losses,
    liger_linear,
    nemo_logits,
    project_back,
    project_both,
)
from distilspeed.kernels.profiling.problem import (
    GB_PER_S,
    Group,
    Problem,
    floor_bytes,
    projection_flops,
    random_labels,
    single_launch_floor_bytes,
)
from distilspeed.kernels.profiling.profile import report_group, warm_up
from distilspeed.kernels.profiling.report import CaseReport
from distilspeed.kernels.profiling.settings import ProfileError, ProfileSettings

CPU = torch.device("cpu")
MIB = 2**20
needs_liger = pytest.mark.skipif(
    importlib.util.find_spec("liger_kernel") is None, reason="liger-kernel is not installed"
)


def small_problem(**changes: Any) -> Problem:
    sizes: dict[str, Any] = {"tokens": 40, "vocab_size": 50, "hidden_size": 8, "temperature": 2.0}
    return Problem(**{**sizes, "dtype": torch.float32, "device": CPU, **changes})


def nothing(*_: object) -> tuple[Tensor, ...]:
    return ()


def fake_case(name: str, **changes: Any) -> Case:
    steps: dict[str, Any] = {"prepare": nothing, "forward": nothing, "backward": nothing}
    return Case(name, "nothing", Floor(2 * 10**9, 3 * 10**9), **{**steps, **changes})


# --- measuring ------------------------------------------------------------------------------------------


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
def test_copy_bandwidth_is_that_of_a_plain_copy() -> None:
    source = np.ones(64 * MIB, dtype=np.float32)
    target = np.ones_like(source)

    def plain_copy_bandwidth() -> float:
        seconds = []
        for _ in range(5):
            start = time.perf_counter()
            np.copyto(target, source)
            seconds.append(time.perf_counter() - start)
        return 2 * source.nbytes / min(seconds) / 1e9

    # NumPy's copy may bypass the cache when it writes, which saves a third of the traffic; PyTorch's does not. Other
    # processes may slow down one of the two, but not in every try.
    assert any(
        1 / 3 < measure_copy_bandwidth(CPU, buffer_bytes=source.nbytes) / plain_copy_bandwidth() < 2
        for _ in range(10)
    )


def test_peak_memory_is_exact() -> None:
    def run() -> Tensor:
        first = torch.empty(1000)  # 4000 bytes
        second = torch.empty(2000)  # 12000, the peak
        del first
        third = torch.empty(500)  # 10000
        del second, third
        return torch.empty(10)  # 40

    assert peak_cpu_bytes(run) == 12000


def test_peak_memory_includes_saved_tensors_and_the_gradient() -> None:
    def square_sum(values: Tensor) -> tuple[Tensor, ...]:
        return ((values * values).sum(),)

    case = fake_case("squares", prepare=lambda: (torch.ones(5000, requires_grad=True),), forward=square_sum)
    only_forward = measure_peak_memory(case, CPU)
    assert only_forward == 20000 + 4
    with_backward = Case(case.name, case.computes, case.floor, case.prepare, case.forward)
    # Two products of the gradient with a factor; their sum overwrites the first.
    assert 2 * 20000 <= measure_peak_memory(with_backward, CPU) <= 2 * 20000 + 64


def test_freeing_memory_from_before_the_measurement_does_not_reduce_the_peak() -> None:
    addresses: list[int] = []

    def note_addresses() -> list[Tensor]:
        tensors = [torch.empty(2000) for _ in range(100)]
        addresses.extend(tensor.data_ptr() for tensor in tensors)
        return tensors

    assert peak_cpu_bytes(note_addresses) == 100 * 8000
    # The profiler still knows these addresses: it records when a later tensor at such an address is freed, though it
    # did not see the allocation.
    others = []
    while (again := torch.empty(2000)).data_ptr() not in addresses:
        others.append(again)
        assert len(others) < 10_000
    held = [again]
    del again

    def run() -> Tensor:
        held.clear()
        return torch.empty(1000)

    assert peak_cpu_bytes(run) == 4000


def test_every_round_runs_every_case_once_in_another_order() -> None:
    turns: list[str] = []

    def noting(name: str) -> Case:
        return fake_case(name, forward=lambda: turns.append(name) or ())

    measure_rounds([noting(name) for name in "abcde"], 3, CpuStopwatch())
    rounds = [turns[start : start + 5] for start in range(0, 15, 5)]
    assert all(sorted(order) == list("abcde") for order in rounds)
    assert rounds[0] != rounds[1] != rounds[2]


class FakeStopwatch:
    """A clock that only the cases move."""

    def __init__(self) -> None:
        self.now = 0.0

    def start(self) -> None:
        self.marks = [self.now]

    def lap(self) -> None:
        self.marks.append(self.now)

    def laps(self) -> list[float]:
        return [end - begin for begin, end in pairwise(self.marks)]


def test_ratios_are_of_the_same_round() -> None:
    stopwatch = FakeStopwatch()

    def lasting(name: str, forward: Sequence[float], backward: Sequence[float]) -> Case:
        """Return a case that takes these seconds in each round."""
        forward_seconds, backward_seconds = iter(forward), iter(backward)

        def move(seconds: Iterator[float]) -> tuple[Tensor, ...]:
            stopwatch.now += next(seconds)
            return ()

        return fake_case(
            name, forward=lambda: move(forward_seconds), backward=lambda *_: move(backward_seconds)
        )

    # The machine is busy in the second of three rounds. The peer takes 3, 2 and 4 times as long as ours; the ratio of
    # the median times would be 4.
    ours = lasting("ours", [0.4, 4.0, 0.8], [0.6, 6.0, 1.2])
    other = lasting("peer", [1.0, 5.0, 4.0], [2.0, 15.0, 4.0])
    our_laps, laps = measure_rounds([ours, other], 3, stopwatch)
    peer = CaseReport.of(other, laps, our_laps, roof=10.0, peak_memory_bytes=7)
    assert peer.both.ratio_to_ours == pytest.approx(3.0)
    assert peer.forward.ratio_to_ours == pytest.approx(2.5)
    assert (peer.both.min_ms, peer.both.first_quartile_ms) == pytest.approx((3000, 5500))
    assert (peer.both.median_ms, peer.both.third_quartile_ms) == pytest.approx((8000, 14000))
    # 2, 3 and 5 GB in 4, 4 and 8 seconds.
    assert (peer.forward.rate, peer.backward.rate, peer.both.rate) == pytest.approx((0.5, 0.75, 0.625))
    assert peer.both.share_of_roof == pytest.approx(0.0625)


def test_no_work_has_no_rate() -> None:
    case = fake_case("single launch")
    case = Case(case.name, case.computes, Floor(3, 0), nothing, nothing, nothing)
    report = CaseReport.of(case, [Laps(1.0, 0.1)], [Laps(1.0, 0.1)], roof=10.0, peak_memory_bytes=0)
    assert (report.backward.rate, report.backward.share_of_roof) == (None, None)


# --- cases ----------------------------------------------------------------------------------------------


def test_floors_count_every_tensor_once_per_pass() -> None:
    u = 4096 * 30522 * 2
    logits = floor_bytes(4096, 30522, torch.float16)
    assert (logits.forward, logits.backward, logits.both) == (2 * u, 3 * u, 5 * u)
    single = single_launch_floor_bytes(4096, 30522, torch.float16)
    assert (single.forward, single.backward, single.both) == (3 * u, 0, 3 * u)
    assert projection_flops(4096, 30522, 768).both == 4 * 2 * 4096 * 30522 * 768


def test_every_case_has_the_floor_of_its_group() -> None:
    problem = small_problem(dtype=torch.bfloat16)
    logits, linear, cosine = build_groups(problem)
    for case in logits.cases:
        passes = 3 if case.name.startswith("weighted") else 5
        assert case.floor.both == passes * 40 * 50 * 2, case.name
    assert {case.floor.both for case in linear.cases} == {4 * 2 * 40 * 50 * 8}
    assert {case.floor.both for case in cosine.cases} == {5 * 40 * 8 * 2}


def test_labels_are_in_15_percent_of_the_rows_and_at_least_one() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = random_labels(small_problem(tokens=1000), generator)
    assert int((labels != -100).sum()) == 150
    assert labels.max() < 50
    assert int((random_labels(small_problem(tokens=1), generator) != -100).sum()) == 1


@pytest.mark.parametrize("index", range(3), ids=["logits", "linear", "cosine"])
def test_all_of_a_group_compute_the_same(index: int) -> None:
    group = build_groups(small_problem(), EAGER)[index]
    ours, *others = [case for case in group.cases if case.name != group.roof]
    expected = loss_and_gradients(ours)
    assert len(others) >= 1
    for case in others:
        torch.testing.assert_close(
            loss_and_gradients(case), expected, msg=lambda text, case=case: f"{case.name}: {text}"
        )


@pytest.mark.full
@pytest.mark.parametrize("index", [0, 2], ids=["logits", "cosine"])
def test_compiled_cases_compute_the_same(index: int) -> None:
    cases = build_groups(small_problem(), COMPILE)[index].cases
    expected = loss_and_gradients(cases[0])
    compiled = [case for case in cases if case.peers]
    assert len(compiled) == 2
    for case in compiled:
        torch.testing.assert_close(loss_and_gradients(case), expected)


@needs_liger
def test_ligers_fused_linear_loss_is_the_same_with_soft_targets_in_labelled_rows_only() -> None:
    generator = torch.Generator().manual_seed(0)
    problem = small_problem()
    student_hidden, teacher_hidden = (torch.randn(40, 8, generator=generator) for _ in range(2))
    student_weight, teacher_weight = (torch.randn(50, 8, generator=generator) for _ in range(2))
    labels = random_labels(problem, generator)
    loss = liger_linear(
        student_hidden, student_weight, teacher_hidden, teacher_weight, labels, 2.0, compiled=False
    )
    logits = project_both(student_hidden, student_weight, teacher_hidden, teacher_weight)
    expected = reference.distillation_loss(*logits, labels, soft_mask=labels != -100)
    torch.testing.assert_close(loss, 5 * expected.kl + 2 * expected.hard_ce)


@pytest.mark.skipif(
    importlib.util.find_spec("nemo_automodel") is None, reason="nemo-automodel is not installed"
)
@pytest.mark.skipif(not INTERPRETED, reason="TRITON_INTERPRET is not 1")
def test_nemos_kernel_is_the_recipe_and_the_teachers_entropy() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(40, 50, generator=generator) for _ in range(2))
    labels = random_labels(small_problem(), generator)
    mine, theirs = (student.clone().requires_grad_() for _ in range(2))
    expected, loss = (
        f(logits, teacher, labels, 2.0) for f, logits in ((eager_losses, mine), (nemo_logits, theirs))
    )
    log_p = (teacher / 2.0).log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1).mean()
    torch.testing.assert_close(loss, expected + 5 * 4 * entropy)
    torch.testing.assert_close(
        *(torch.autograd.grad(of, logits)[0] for of, logits in ((loss, theirs), (expected, mine)))
    )


def test_the_bare_matrix_products_are_those_of_training() -> None:
    hidden, weight = torch.randn(5, 3, requires_grad=True), torch.randn(7, 3, requires_grad=True)
    logits, teacher_logits = project_both(hidden, weight, hidden.detach() + 1, weight.detach())
    assert not teacher_logits.requires_grad
    gradient = torch.randn(5, 7)
    expected = torch.autograd.grad(logits, (hidden, weight), gradient)
    torch.testing.assert_close(project_back(hidden, weight, gradient), expected)


def loss_and_gradients(case: Case) -> tuple[Tensor, ...]:
    inputs = case.prepare()
    [loss] = case.forward(*inputs)
    return (loss.detach(), *case.backward(inputs, (loss,)))


# --- failures -------------------------------------------------------------------------------------------


def failing(*_: object) -> tuple[Tensor, ...]:
    raise RuntimeError("no compiler here\nand a long story")


def test_a_failed_peer_is_skipped_with_its_reason() -> None:
    group = Group(
        "fakes", "nothing", GB_PER_S, (fake_case("ours"), fake_case("peer", forward=failing, peers=LIGER))
    )
    warm = warm_up(group, CPU, CpuStopwatch())
    assert [case.name for case in warm.cases] == ["ours"]
    assert [(peer.name, peer.reason) for peer in warm.skipped] == [("peer", "no compiler here")]
    table = report_group(warm, {"ours": [Laps(1.0, 1.0)]}, copy_bandwidth=10.0).table()
    [row] = [line for line in table.splitlines() if line.startswith("| peer ")]
    assert "| not run: no compiler here |" in " ".join(row.split())


def test_a_failed_case_of_ours_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="no compiler here"):
        warm_up(
            Group("fakes", "nothing", GB_PER_S, (fake_case("ours", forward=failing),)), CPU, CpuStopwatch()
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": 0}, "--tokens must be at least 1"),
        ({"vocab_size": 0}, "--vocab_size"),
        ({"hidden_size": -1}, "--hidden_size"),
        ({"repeats": 0}, "--repeats"),
        ({"temperature": float("nan")}, "--temperature"),
        ({"dtype": "fp8"}, "--dtype must be one of fp16, bf16, fp32"),
        ({"peers": frozenset({"apex"})}, "--peers"),
        ({"tokens": 10**9}, "use fewer --tokens"),
    ],
)
def test_invalid_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ProfileError, match=message):
        ProfileSettings(**options, device="cpu")
