"""The trainer on a CUDA device: `pytest -m gpu`."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.runs import LOCAL, weights
from helpers.training import CrashError, crash, eventful, spoil
from localgrad.errors import LocalGradError
from localgrad.runs.folder import RunFolder
from localgrad.training.build import build_run
from localgrad.training.nonfinite import DeviceCheck, HostCheck
from localgrad.training.trainer import fit, train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here"),
]
CUDA = replace(LOCAL, accelerator="cuda")


def test_the_device_checks_fused_optimizers() -> None:
    assert isinstance(build_run(CUDA).check, DeviceCheck)


@pytest.mark.parametrize("changes", [{}, {"step_each_block": True}, {"on_nonfinite": "skip"}])
def test_recorded_steps_train_what_others_do(changes: dict[str, Any], tmp_path: Path) -> None:
    """The learning rate is a float32 on the device, and kernels may add up in another order."""
    config = replace(CUDA, **changes)
    fit(config, tmp_path / "plain", quiet=True)
    fit(replace(config, cuda_graph=True), tmp_path / "recorded", quiet=True)
    torch.testing.assert_close(weights(tmp_path / "recorded"), weights(tmp_path / "plain"), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_a_crashed_run_is_resumed(cuda_graph: bool, tmp_path: Path) -> None:
    config = replace(CUDA, cuda_graph=cuda_graph, checkpoint_every=2)
    with pytest.raises(CrashError):
        fit(config, tmp_path, quiet=True, images=eventful(config, {6: crash}))
    result = fit(config, tmp_path, resume=True, quiet=True)
    assert 0 <= result.test_error <= 100


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_bad_batches_are_skipped_and_too_many_stop_the_run(cuda_graph: bool, tmp_path: Path) -> None:
    config = replace(CUDA, cuda_graph=cuda_graph, on_nonfinite="skip", max_skips=2)
    images = eventful(config, dict.fromkeys((2, 3, 6), spoil))
    assert fit(config, tmp_path / "run", quiet=True, images=images).skipped == 3
    assert all(value.isfinite().all() for value in weights(tmp_path / "run").values())
    with pytest.raises(LocalGradError, match=" 2 batches"):
        fit(config, tmp_path / "stopped", quiet=True, images=eventful(config, dict.fromkeys((3, 4, 5), spoil)))


def test_host_and_device_check_train_the_same(tmp_path: Path) -> None:
    for name in ("device", "host"):
        run = build_run(CUDA)
        if name == "host":
            for optimizer in run.optimizers:
                del optimizer.found_inf
            run.check = HostCheck(run.check.skips, run.optimizers)
        train(run, RunFolder(tmp_path / name), quiet=True)
    torch.testing.assert_close(weights(tmp_path / "host"), weights(tmp_path / "device"), rtol=1e-2, atol=1e-2)
