"""What a run prints, on a terminal and without one."""

import io
import re

import pytest
from rich.console import Console

from localgrad.training.progress import Display, losses_in


def _console(width: int, terminal: bool) -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    return Console(file=file, width=width, force_terminal=terminal, highlight=False, color_system=None), file


def _line(losses: list[float], error: float | None = 9.5) -> dict[str, object]:
    return {"train_loss": losses, "test_error": error, "images_per_second": 1234.5}


def test_a_few_losses_are_all_numbers() -> None:
    assert losses_in(40, [2.3, 1.25, 0.5]) == "2.30 1.25 0.50"


@pytest.mark.parametrize("count", [15, 55])
@pytest.mark.parametrize("width", [12, 20, 54])
def test_many_losses_become_first_curve_and_last(count: int, width: int) -> None:
    losses = [2.0 - index / count for index in range(count)]
    shown = losses_in(width, losses)
    first, curve, last = shown.split(" ")
    assert len(shown) <= width
    assert (first, last) == ("2.00", f"{losses[-1]:.2f}")
    assert (curve[0], curve[-1]) == ("█", "▁")
    assert list(curve) == sorted(curve, reverse=True), "falling losses fall"


def test_equal_losses_do_not_divide_by_zero() -> None:
    assert losses_in(12, [1.0] * 55) == "1.00 ▁▁ 1.00"


@pytest.mark.parametrize("count", [1, 8, 55])
def test_lines_of_an_epoch_fit_sixty_columns(count: int) -> None:
    console, file = _console(60, terminal=False)
    with Display(console=console) as display:
        display.epoch("399/400", _line([2.0 - index / 60 for index in range(count)]))
        display.epoch("400/400", _line([2.0], error=None))
    first, second = file.getvalue().splitlines()
    assert first.startswith("epoch 399/400 error 9.50% 1,234 img/s loss 2.00")
    assert len(first) <= 60
    assert "error" not in second


@pytest.mark.parametrize("count", [1, 8, 55])
def test_the_bar_fits_sixty_columns(count: int) -> None:
    console, file = _console(60, terminal=True)
    with Display(console=console) as display:
        display.step(epoch="399/400", done=20, total=49, losses=[1.5] * count, images_per_second=1234.5)
    lines = re.sub(r"\x1b\[[?0-9;]*[a-zA-Z]", "", file.getvalue()).replace("\r", "\n").splitlines()
    assert max(map(len, lines)) <= 60
    assert any("epoch 399/400" in line and "20/49" in line and "1,234 img/s" in line for line in lines)
    assert any("loss 1.50" in line for line in lines)


def test_without_a_terminal_steps_are_plain_lines() -> None:
    console, file = _console(80, terminal=False)
    with Display(console=console) as display:
        display.step(epoch="1/2", done=3, total=49, losses=[1.5, 0.5], images_per_second=10.0)
    assert file.getvalue() == "epoch 1/2 batch 3/49 10 img/s loss 1.50 0.50\n"


def test_quiet_prints_nothing_and_reads_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with Display(quiet=True) as display:
        display.message("hello")
        display.interval = 0.0
        assert not display.is_due()
    assert capsys.readouterr() == ("", "")


def test_losses_are_read_at_most_once_an_interval() -> None:
    display = Display(console=_console(80, terminal=True)[0])
    assert display.interval == 1.0
    assert not display.is_due()
    display.interval = 0.0
    assert display.is_due()
