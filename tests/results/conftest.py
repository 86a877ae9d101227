"""A folder with results of every kind, and its page."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from helpers.results import RESULTS, UNITS, about, make_config, read, write_run
from localgrad.results.report import page


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folders, flat results, analyses, a plan and step times."""
    folder = tmp_path_factory.mktemp("results")
    man = "cifar10-resnet32-k16-dgl-man"
    for seed, error in enumerate((30.25, 31.5, 29.0)):
        write_run(folder / f"{man}-seed{seed}" / "result.json", make_config(man, seed=seed), error)
    write_run(folder / "flat" / "e2e.json", make_config("cifar10-resnet32-e2e"), 20.125)
    write_run(folder / "flat" / "checkpointed.json", make_config("cifar10-resnet32-e2e", recompute=True), 20.125)
    changed = make_config(man)
    changed = replace(changed, momentum=replace(changed.momentum, decay=0.9))
    write_run(folder / "flat" / "decay.json", changed, 33.75)
    write_run(folder / "digits.json", make_config("digits-dgl", epochs=8), 5.5)
    probed = {"analysis": "probe", **about(man), "settings": {"train_images": 50_000}, "units": UNITS}
    accuracies = [40.0, 51.23, 62.5, 71.0]
    (folder / "probe.json").write_text(json.dumps({**probed, "blocks": [1, 1, 2, 3], "accuracies": accuracies}))
    alignment = [[1.0, 0.5, None, 0.1] for _ in UNITS]
    compared = {**about(man, "cifar10-resnet32-e2e"), "units": UNITS, "other_units": UNITS, "alignment": alignment}
    (folder / "cka.json").write_text(json.dumps({"analysis": "cka", **compared, "mean_diagonal": 0.4321}))
    maps = [[[[0.1, 0.2], [0.3, 0.4]]] * 2, [[[0.5]]] * 2, [[[1.0]]] * 2, None]
    drawn = {**about(man), "units": UNITS, "blocks": [1, 1, 2, 3], "settings": {"projection": "pca"}, "maps": maps}
    drawn |= {"image_labels": [3, 7], "thumbnails": [[[[9, 9, 9]]]] * 2, "point_labels": [0, 1, 2]}
    drawn |= {"points": [[[0, 0], [1, 1], [2, 0]]] * 4}
    (folder / "pictures.json").write_text(json.dumps({"analysis": "pictures", **drawn}))
    for name in ("speed.json", "plan-resnet101"):
        copy = shutil.copytree if (RESULTS / name).is_dir() else shutil.copy
        copy(RESULTS / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def text(folder: Path) -> str:
    found, warnings = read(folder)
    assert warnings == []
    return page(found, folder)
