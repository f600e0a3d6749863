"""Promises of loss.png: a panel for each trained loss that shows its fall."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

from distilspeed.trainer.objective.masked_lm import MaskedLM
from distilspeed.trainer.objective.registry import take_terms
from distilspeed.trainer.objective.term import Term
from distilspeed.trainer.training.loss_plot import loss_figure, plot_losses, smoothed
from distilspeed.trainer.training.metrics import StepMetrics

ALL = take_terms({})
TITLES = [
    "weighted sum of the losses",
    "soft targets",
    "MLM",
    "hidden states",
    "learning rate",
    "real tokens",
]


def a_run(steps: int, noise: float = 0.0, skipped: int = 0) -> list[StepMetrics]:
    """Return metrics whose losses fall from about 10 to 1, mostly in the first twentieth of the steps."""
    random = np.random.default_rng(0)
    lines = []
    for step in range(1, steps + 1):
        loss = 1 + 9 * np.exp(-step / (steps / 20)) + random.normal(0, noise)
        lines.append(
            StepMetrics(
                step=step,
                epoch=step / steps,
                tokens=1000 * step,
                loss=float(loss),
                losses=dict.fromkeys(("ce", "mlm", "cos"), float(loss)),
                lr=5e-4 * (steps - step) / steps,
                grad_norm=1.0,
                loss_scale=1.0,
                skipped=skipped if step > steps // 2 else 0,
                tokens_per_s=12_000.0,
                mfu=0.3,
                time=0.0,
            )
        )
    return lines


def panels(*arguments: object) -> dict[str, Axes]:
    axes = loss_figure(*arguments).axes  # type: ignore[arg-type]
    return {of.get_title("left"): of for of in axes}


def test_each_loss_has_a_panel_with_its_unit_and_linear_axes() -> None:
    found = panels(a_run(20), ALL)
    assert [title.startswith(start) for title, start in zip(found, TITLES, strict=True)] == [True] * 6
    assert all(axes.get_yscale() == axes.get_xscale() == "linear" for axes in found.values())
    assert list(found)[1:4] == [
        "soft targets, T² KL in nats",
        "MLM, cross-entropy in nats",
        "hidden states, 1 − cosine",
    ]


def test_a_loss_that_was_not_trained_has_no_panel() -> None:
    """The metrics have its values, but the plot does not show them."""
    found = panels(a_run(20), [MaskedLM()])
    assert [title.split(",")[0] for title in found] == [TITLES[0], "MLM", TITLES[4], "real tokens per second"]


@pytest.mark.parametrize("steps", [20, 2000])
def test_the_curve_fills_the_panel(steps: int) -> None:
    metrics = a_run(steps)
    axes = panels(metrics, ALL)["MLM, cross-entropy in nats"]
    low, high = axes.get_ylim()
    values = np.array([line.losses["mlm"] for line in metrics])
    assert low < values.min()
    assert values.max() < high
    assert np.ptp(values) > 0.8 * (high - low)
    assert axes.get_title("right") == f"{values[0]:.3g} → {values[-1]:.3g}"


def test_a_spike_at_the_start_does_not_flatten_the_rest() -> None:
    metrics = a_run(2000)
    metrics[0] = replace(metrics[0], losses={**metrics[0].losses, "mlm": 1000.0})
    assert panels(metrics, ALL)["MLM, cross-entropy in nats"].get_ylim()[1] < 20


def test_many_steps_are_drawn_as_a_light_raw_line_and_a_smoothed_one() -> None:
    metrics = a_run(2000, noise=0.5)
    raw, curve = panels(metrics, ALL)["MLM, cross-entropy in nats"].lines
    assert raw.get_alpha() < 0.5
    assert list(raw.get_ydata()) == [line.losses["mlm"] for line in metrics]
    assert np.diff(curve.get_ydata()).std() < 0.1 * np.diff(raw.get_ydata()).std()
    (few,) = panels(a_run(20), ALL)["MLM, cross-entropy in nats"].lines
    assert few.get_marker() == "."


def test_the_smoothed_line_is_the_mean_around_each_step() -> None:
    values = np.random.default_rng(0).normal(size=500)
    for place, mean in enumerate(smoothed(values)):
        before = min(place, 5)
        after = min(before, len(values) - 1 - place)
        assert mean == pytest.approx(values[place - before : place + after + 1].mean())


def test_skipped_batches_are_counted_in_the_headline() -> None:
    assert "3 batches skipped after fp16 overflows" in loss_figure(a_run(20, skipped=3), ALL).get_suptitle()
    assert loss_figure(a_run(20), ALL).get_suptitle() == "20 steps, 1.00 epochs, 20,000 real tokens"


@pytest.mark.parametrize(
    "terms", [[], ALL[1:2], ALL, [*ALL, ALL[0]]], ids=lambda terms: f"{len(terms)} losses"
)
def test_no_text_overlaps_another_or_is_cut_off(terms: list[Term], monkeypatch: pytest.MonkeyPatch) -> None:
    """The figure has a long headline, wide tick labels (1,250,000; 0.00025), and wide numbers beside the titles."""
    metrics = [
        replace(
            line,
            step=12_345 * line.step,
            tokens=123_456_789_012,
            loss=12_345 * line.loss,
            losses={name: 1e-4 * loss for name, loss in line.losses.items()},
            tokens_per_s=1_234_567.0,
        )
        for line in a_run(100, skipped=1234)
    ]
    drawn: list[Text] = []
    draw = Text.draw
    monkeypatch.setattr(Text, "draw", lambda text, renderer: (drawn.append(text), draw(text, renderer)))
    figure = loss_figure(metrics, terms)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    texts = [text for text in drawn if text.get_visible() and text.get_text()]
    boxes = [text.get_window_extent(canvas.get_renderer()) for text in texts]
    for text, box in zip(texts, boxes, strict=True):
        assert min(*box.min, *(figure.bbox.max - box.max)) >= 0, text
        assert box.count_overlaps(boxes) == 1, text


@pytest.mark.parametrize("steps", [1, 300])
def test_the_file_is_reproducible_and_no_other_file_is_left(tmp_path: Path, steps: int) -> None:
    for name in ("one.png", "other.png"):
        plot_losses(a_run(steps, noise=0.1), tmp_path / name, ALL)
    one, other = ((tmp_path / name).read_bytes() for name in ("one.png", "other.png"))
    assert one == other
    assert one.startswith(b"\x89PNG")
    assert len(list(tmp_path.iterdir())) == 2
