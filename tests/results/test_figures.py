"""Pictures of results: what is drawn is what the files say."""

from pathlib import Path

from helpers.results import DEVICE, make_config, read, write_run
from localgrad.results.figures import learning_curves, step_times, trade_off
from localgrad.results.kinds import StepTimes, TimedRow
from localgrad.results.tables import tables


def test_the_trade_off_has_the_errors_of_the_table(tmp_path: Path) -> None:
    """Costs of two devices cannot be compared, errors can."""
    for number, (name, device) in enumerate((("dgl", DEVICE), ("dgl", "another"), ("dgl-man", DEVICE))):
        config = make_config(f"cifar10-resnet32-k16-{name}", seed=number)
        write_run(tmp_path / f"{number}.json", config, 10.0 * (number + 1), device=device)
    (table,) = tables(read(tmp_path)[0].runs)
    drawn = trade_off(table, DEVICE, {0: 0.5, 1: None}).figure.axes[0].collections
    assert [float(points.get_offsets()[0][1]) for points in drawn if hasattr(points, "get_sizes")] == [15.0, 30.0]  # pyright: ignore


def test_a_long_name_leaves_room_for_its_bar() -> None:
    name = "Digits, ResNet-14, DGL + MAN (bias only, fused, depth 2), 15 blocks, optim.weight_decay 0.01, batch size 8"
    figure = step_times(StepTimes(rows=[TimedRow(name, 1.0), TimedRow("e2e", 0.5)], device=DEVICE))
    figure.canvas.draw()
    assert figure.axes[0].get_position().width > 0.4
    assert " ".join(figure.axes[0].get_yticklabels()[0].get_text().split()) == name


def test_a_seed_without_metrics_does_not_take_the_curve_of_the_others(folder: Path, tmp_path: Path) -> None:
    for seed, errors in ((0, [9.0, 4.0]), (1, [])):
        write_run(tmp_path / f"{seed}.json", make_config("digits-e2e", seed=seed), 4.0, test_errors=errors)
    (table,) = tables(read(tmp_path)[0].runs)
    drawn = learning_curves(table)
    assert drawn is not None
    assert [line.get_ydata().tolist() for line in drawn.figure.axes[0].lines] == [[9.0, 4.0]]  # pyright: ignore
