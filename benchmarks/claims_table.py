"""Tables of the papers' claims and our measurements: figures come from `results/`, verdicts are written by hand.

`documents.py` writes the tables. A verdict belongs to the figures beside it: check it again when a figure changes.
"""

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accuracy_tables import COMPARED, NETWORK, Row, cut_off, rows
from localgrad.results.tables import mean_std
from pictures import planned

HOLDS, NOT_SEEN, FAILS, OPEN = "holds", "not seen", "does not hold", "not tested yet"
FROZEN = f"{OPEN}: the EMA stood still ([why](beyond-classification.md))"
TEN = "CIFAR-10, ResNet-32, 15 blocks, ten epochs, CPU"
CUT_OFF = "CIFAR-10, ResNet-32, ten epochs, cut off on an H200"
H200 = "ResNet-50, batch 128, 224 px, float32, four blocks at planned cuts, H200"
IMAGENETTE = "Imagenette at 128 px, ResNet-50, four blocks, three epochs, CPU"
PROBES = "the ten-epoch networks of CIFAR-10"
TEXT = "characters of Shakespeare, three blocks, H200"
PIXELS = "CamVid, FCN on ResNet-18, four blocks, H200"
Claim = tuple[str, str, str, str, str]
"""Claim; measurement, with names of figures in braces; network and data; number of seeds; verdict."""

MAN: list[Claim] = [
    (
        "MAN lowers the error of DGL: 14.08 to 9.11 % (ResNet-32, K=16, 400 epochs)",
        "{dgl} to {man} %",
        TEN,
        "3",
        "holds in part: in ten epochs the gain is {gain:.1f} points",
    ),
    (
        "the same",
        "after six of ten epochs {dgl_gpu6} without and {man_gpu6} % with MAN; of thirty {dgl_thirty6} and "
        "{man_thirty6} %",
        CUT_OFF,
        "1",
        "not seen in six epochs",
    ),
    (
        "MAN helps any local method, in every configuration",
        "InfoPro {infopro} to {infopro_man} %, PredSim {predsim} to {predsim_man} %",
        TEN,
        "1",
        "holds, one seed",
    ),
    (
        "the same, on natural images",
        "DGL {nette_dgl} to {nette_dgl_man} %, InfoPro {nette_infopro} to {nette_infopro_man} %",
        IMAGENETTE,
        "1",
        NOT_SEEN,
    ),
    (
        "the same, beyond the paper: pixels",
        "mean IoU {iou:.1f} without and {iou_man:.1f} % with a frozen copy in place of the EMA",
        PIXELS,
        "1",
        FROZEN,
    ),
    (
        "the EMA alone brings three fifths of the gain: 14.08 to 11.07 %",
        "{dgl} to {ema} %: {ema_share:.0f} % of the gain",
        TEN,
        "3",
        "holds in part",
    ),
    (
        "the same, beyond the paper: text",
        "loss {text:.3f} plain, with a frozen copy in place of the EMA {text_ema:.3f}, and {text_man:.3f} with a "
        "trained copy beside it",
        TEXT,
        "1",
        FROZEN,
    ),
    (
        "the same, in short training",
        "loss {short:.3f} plain, {short_ema:.3f} with the EMA alone, {short_man:.3f} with MAN; end-to-end "
        "{short_e2e:.3f}",
        "characters of Shakespeare, three blocks, 1,200 steps, CPU",
        "3",
        "not seen: MAN is behind, and local training ahead of end-to-end",
    ),
    (
        "the same, with one layer a block",
        "loss {three:.3f} plain, {three_man:.3f} with MAN, {three_bias:.3f} with the trained copy alone; end-to-end "
        "{three_e2e:.3f}",
        "characters of Shakespeare, three layers in three blocks, 1,200 steps, CPU",
        "3",
        "not seen: MAN closes the gap, and the trained copy without the EMA does so too",
    ),
    (
        "EMA and bias complement each other: both 9.11 %, the EMA alone 11.07 % (the cell of the bias alone is empty)",
        "both {man} %, the trained copy alone {bias} %, the EMA alone {ema} %",
        TEN,
        "3",
        "not seen: the trained copy alone does as well as both",
    ),
    (
        "the bias is light: 1 % more memory (the released code trains a whole unit)",
        "peak {dgl_peak:.2f} of end-to-end's for DGL, {ema_peak:.2f} with the EMA, {man_peak:.2f} with both",
        "a float32 step of ResNet-32, batch 128, counted",
        "exact",
        "does not hold for the released code",
    ),
    (
        "the EMA costs next to no time",
        "operations {dgl_ops:.2f} of end-to-end's for DGL, {ema_ops:.2f} with the EMA, {man_ops:.2f} with both; "
        "{dgl_ms:.1f}, {ema_ms:.1f} and {man_ms:.1f} ms a step",
        "the same; seconds on an H200 with CUDA graphs",
        "exact; 30 steps",
        FAILS,
    ),
    (
        "InfoPro+MAN takes less than half of end-to-end's memory, 1 % more than InfoPro (ResNet-101, four blocks; the "
        "paper's own table has 10.47 of 19.71 GB, which is 53 %)",
        "end-to-end {e2e_gib:.1f} GiB, InfoPro {infopro_gib:.1f}, with MAN {infopro_man_gib:.1f}, its branches "
        "recomputed {infopro_lean_gib:.1f}; DGL {dgl_gib:.1f}, with MAN {man_gib:.1f}",
        H200,
        "exact",
        "does not hold with MAN; holds for InfoPro and DGL alone",
    ),
    (
        "the same, for DGL+MAN on the paper's network",
        "end-to-end {large_e2e:.1f} GiB, DGL {large_dgl:.1f}, DGL+MAN {large_man:.1f}; checkpointing "
        "{large_checkpointed:.1f}, accumulation over four micro-batches {large_parts:.1f}",
        "ResNet-101, batch 128, 224 px, float32, four blocks at planned cuts, counted",
        "exact",
        "holds in part: {large_man_share:.2f} of end-to-end's, but {large_man_more:.0f} % more than DGL; checkpointing "
        "and accumulation take less",
    ),
    (
        "InfoPro+MAN with half of the memory is better than end-to-end on ImageNet",
        "ImageNet was not trained. After 60 epochs DGL {nette64_dgl} %, end-to-end {nette64_e2e} %; the rows with MAN "
        "were cut off before they began",
        "Imagenette at 64 px, ResNet-18, four blocks, H200",
        "1",
        "not tested yet; DGL is level with end-to-end (one standard error of 3,925 images is 0.6)",
    ),
    (
        "the same",
        "local rows {nette_infopro} to {nette_infopro_man} %, end-to-end {nette_e2e} %",
        IMAGENETTE,
        "1",
        "holds in part: ahead without MAN too, and far from the end of training",
    ),
    (
        "the gap to end-to-end grows with the number of blocks",
        "loss {text_gap3:.3f} behind at three blocks, {text_gap6:.3f} at six",
        "characters of Shakespeare, H200",
        "1",
        HOLDS,
    ),
    (
        "the same, on images",
        "DGL {four} % in four blocks, {eight} % in eight, {dgl} % in fifteen; end-to-end {e2e} %",
        "CIFAR-10, ResNet-32, ten epochs, CPU",
        "1, 1, 3 and 2",
        "holds; four blocks of DGL are ahead of fifteen with MAN",
    ),
    (
        "with MAN early units tell classes apart less, late ones more",
        "linear probes {probe_dgl} % without, {probe_man} % with MAN, after the first unit and the last of each stage",
        PROBES,
        "1",
        "holds in part: less after the first unit alone",
    ),
    (
        "MAN makes features more like end-to-end's",
        "mean CKA {cka_dgl:.2f} without, {cka_man:.2f} with MAN",
        PROBES,
        "1",
        "holds, one seed",
    ),
    (
        "on CIFAR-10 MAN stays behind end-to-end (a limit that the paper names)",
        "{man} against {e2e} %",
        TEN,
        "3 and 2",
        HOLDS,
    ),
    ("the next block's weights used directly, without the EMA, help little", "", "", "0", OPEN),
    ("the EMA of more than the next block's first unit may help more", "", "", "0", OPEN),
    ("results on SVHN, STL-10, ImageNet, ResNet-110", "", "", "0", OPEN),
]

OTHERS: list[Claim] = [
    (
        "MAN++: the learnt scale at each cut is better than MAN's sum",
        "MAN++ {manpp} %, MAN {man} %",
        TEN,
        "1 and 3",
        "not seen: within MAN's spread",
    ),
    (
        "AugLocal: the best of the local methods (ResNet-110, K=55: 6.04 %, DGL+MAN 9.73 %)",
        "after six epochs AugLocal (depth 2) {aug_gpu6} %, DGL+MAN {man_gpu6} %, DGL {dgl_gpu6} %; after eight "
        "AugLocal {aug_gpu8} %, DGL {dgl_gpu8} %",
        CUT_OFF,
        "1",
        "holds so far, for ResNet-32",
    ),
    (
        "the same, with heads on maps of half the size (ours: `pool=2`)",
        "AugLocal (depth 2) {half} %, DGL+MAN {man} %, DGL {dgl} %",
        TEN,
        "3",
        "holds, in half of MAN's time",
    ),
    (
        "AugLocal: comparable to end-to-end (6.04 against 5.39 %)",
        "after eight epochs {aug_gpu8} against {e2e_gpu8} %",
        CUT_OFF,
        "1",
        "not seen in eight epochs",
    ),
    (
        "the same, with heads on maps of half the size and `reach=3`",
        "{half_reach} against {e2e} %",
        TEN,
        "3 and 2",
        "not seen: 1.6 points behind",
    ),
    (
        "AugLocal: about 40 % less memory",
        "peak {aug2_peak:.2f} of end-to-end's at depth 2, {aug5_peak:.2f} at depth 5",
        "a float32 step of ResNet-32, batch 128, counted",
        "exact",
        HOLDS,
    ),
    (
        "AugLocal: what reviewers objected, that it costs operations",
        "{aug2_ops:.2f} of end-to-end's at depth 2, {aug5_ops:.2f} at depth 5",
        "the same",
        "exact",
        HOLDS,
    ),
    ("AugLocal: deeper heads are better; a pyramid of depths loses nothing", "", "", "0", OPEN),
    (
        "HPFF, LoCo: gradients over two blocks help (ours: `reach=2`)",
        "after eight epochs DGL {dgl_gpu8} to {reach_gpu8} %, AugLocal {aug_gpu8} to {aug_reach_gpu8} %",
        CUT_OFF,
        "1",
        "holds so far for AugLocal, not surely for DGL; seeds differ by 1 to 2 points",
    ),
    (
        "the same",
        "DGL {dgl} to {reach} %, DGL+MAN {man} %",
        TEN,
        "3, 1 and 3",
        "holds, one seed: as much as MAN, at half of its operations",
    ),
    (
        "InfoPro: better than DGL (12.93 against 14.08 % in MAN's tables)",
        "InfoPro {infopro} %, DGL {dgl} %",
        TEN,
        "1 and 3",
        "does not hold after ten epochs",
    ),
    (
        "InfoPro: better than DGL, on natural images",
        "InfoPro {nette_infopro} %, DGL {nette_dgl} %",
        IMAGENETTE,
        "1",
        "not seen: level",
    ),
    (
        "InfoPro: the memory saved, spent on larger crops, buys accuracy beyond end-to-end (Cityscapes)",
        "mean IoU {iou_wide:.1f} % in four local blocks on whole images, {iou_e2e:.1f} % end-to-end on crops, at "
        "{wide_share:.0f} % of its peak",
        PIXELS,
        "1",
        "holds in part, with `dense` heads in place of InfoPro's: neither checkpointing nor end-to-end on whole images "
        "was tried",
    ),
    (
        "InfoPro: four blocks take less memory than checkpointing (ResNet-110: 3.52 against 3.91 GB)",
        "InfoPro {infopro_gib:.1f} GiB, checkpointing {checkpointed_gib:.1f} GiB",
        H200,
        "exact",
        "does not hold here; DGL comes near, with {dgl_gib:.1f} GiB",
    ),
    (
        "DGL: blocks run side by side on several devices",
        "{parallel:.2f} times one rank; end-to-end data-parallel {data_parallel:.2f}, GPipe {gpipe:.2f}",
        "ResNet-32, four blocks, two ranks of one thread",
        "2 rounds",
        "holds: ahead of pipelines, level with data parallelism",
    ),
    (
        "critics: accumulation saves as much as local learning, at no operations",
        "peak {accumulated_peak:.2f} in four micro-batches, {both_peak:.2f} checkpointed too; DGL {dgl_peak:.2f}, "
        "DGL+MAN {man_peak:.2f}",
        "a float32 step of ResNet-32, batch 128, counted",
        "exact",
        "holds; batch norm then sees a quarter of the batch",
    ),
]


def figures(root: Path) -> dict[str, Any]:
    """The values of all names in braces."""
    return {**_cifar10(root), **_imagenette(root), **_memory(root), **_features(root), **_tasks(root)}


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def _cifar10(root: Path) -> dict[str, Any]:
    """Errors, operations, peaks and times of ResNet-32."""
    found = {row.name: row for row in rows(root)}
    named = {
        **{"e2e": "e2e", "dgl": "k16-dgl", "man": "k16-dgl-man", "manpp": "k16-dgl-manpp"},
        **{"ema": "k16-dgl-man-ema-only", "bias": "k16-dgl-man-bias-only", "four": "k4-dgl", "eight": "k8-dgl"},
        "reach": "k16-dgl-reach2",
        **{"half": "k16-auglocal-d2-pool2", "half_reach": "k16-auglocal-d2-pool2-reach3"},
        **{name.replace("-", "_"): f"k16-{name}" for name in ("infopro", "infopro-man", "predsim", "predsim-man")},
    }
    values: dict[str, Any] = {name: mean_std(found[row].errors(10)) for name, row in named.items()}
    mean = {name: statistics.mean(found[named[name]].errors(10)) for name in ("dgl", "ema", "man")}
    values["gain"] = mean["dgl"] - mean["man"]
    values["ema_share"] = 100 * (mean["dgl"] - mean["ema"]) / values["gain"]
    costs: dict[str, Row] = {name: found[named[name]] for name in ("dgl", "ema", "man")}
    costs |= {"aug2": found["k16-auglocal-d2"], "aug5": found["k16-auglocal-d5"]}
    costs |= {"accumulated": found["e2e-accumulate4"], "both": found["e2e-accumulate4-checkpointed"]}
    for name, row in costs.items():
        values |= {f"{name}_peak": row.peak, f"{name}_ops": row.operations, f"{name}_ms": row.milliseconds}
    gpu = {"e2e": "e2e", "dgl": "k16-dgl", "man": "k16-dgl-man", "aug": "k16-auglocal-d2"}
    gpu |= {"reach": "k16-dgl-reach2", "aug_reach": "k16-auglocal-d2-reach2"}
    for name, row in gpu.items():
        for epoch in (6, COMPARED):
            if len(found[row].gpu) >= epoch:
                values[f"{name}_gpu{epoch}"] = f"{found[row].gpu[epoch - 1]:.2f}"
    longer = {run["recipe"].removeprefix(NETWORK): run["test_errors"] for run in cut_off(root, 30)}
    return values | {f"{name}_thirty6": longer[gpu[name]][5] for name in ("dgl", "man")}


def _imagenette(root: Path) -> dict[str, Any]:
    short, long = root / "results" / "imagenette-three-epochs", root / "results" / "imagenette64-sixty-epochs"
    values = {}
    for name in ("e2e", "k4-dgl", "k4-dgl-man", "k4-infopro", "k4-infopro-man"):
        error = _read(short / f"imagenette-resnet50-{name}-seed0.json")["test_error"]
        values[f"nette_{name.removeprefix('k4-').replace('-', '_')}"] = f"{error:.2f}"
    for name in ("e2e", "k4-dgl"):
        error = _read(long / f"imagenette64-resnet18-{name}-seed0.json")["test_error"]
        values[f"nette64_{name.removeprefix('k4-')}"] = f"{error:.2f}"
    return values


def _memory(root: Path) -> dict[str, float]:
    """GiB of ResNet-50 on the GPU and of ResNet-101 as planned, and throughput on two ranks."""
    named = {
        "e2e": "end-to-end",
        "checkpointed": "end-to-end, checkpointed",
        "dgl": "DGL",
        "man": "DGL+MAN",
        "infopro": "InfoPro",
        "infopro_man": "InfoPro+MAN",
        "infopro_lean": "InfoPro+MAN, recomputed",
    }
    measured = {row["row"]: row["measured_gib"] for row in _read(root / "results" / "gpu" / "memory.json")["rows"]}
    values = {f"{name}_gib": measured[f"torchvision:resnet50, {row}, 32-true"] for name, row in named.items()}
    rivals = {"e2e": "end-to-end", "checkpointed": "end-to-end, checkpointed", "parts": "end-to-end, 4 micro-batches"}
    rivals |= {"dgl": "DGL, 4 blocks", "man": "DGL+MAN, 4 blocks"}
    large = dict(planned(root / "results" / "plan-resnet101" / "plan.json"))
    values |= {f"large_{name}": large[row]["peak"] / 2**30 for name, row in rivals.items()}
    values["large_man_share"] = values["large_man"] / values["large_e2e"]
    values["large_man_more"] = 100 * (values["large_man"] / values["large_dgl"] - 1)
    ranks = {
        row["row"]: row["times_one_rank"] for row in _read(root / "results" / "pipeline.json")["measured"][0]["rows"]
    }
    return values | {
        "parallel": ranks["DGL, block-parallel"],
        "data_parallel": ranks["end-to-end, data-parallel"],
        "gpipe": ranks["end-to-end, GPipe, 8 micro-batches"],
    }


def _features(root: Path) -> dict[str, Any]:
    """Probes after the first unit and the last of each stage, and CKA with end-to-end."""
    values: dict[str, Any] = {}
    folder = root / "results" / "cifar10-ten-epochs" / "analysis"
    for name, row in (("dgl", "k16-dgl"), ("man", "k16-dgl-man")):
        probe = _read(folder / row / "probe.json")
        accuracies = dict(zip(probe["units"], probe["accuracies"], strict=True))
        shown = [accuracies[unit] for unit in ("layer1.0", "layer1.4", "layer2.4", "layer3.4")]
        values[f"probe_{name}"] = ", ".join(f"{accuracy:.1f}" for accuracy in shown)
        values[f"cka_{name}"] = _read(next((folder / row).glob("cka-*.json")))["mean_diagonal"]
    return values


def _tasks(root: Path) -> dict[str, float]:
    """Losses of the language model, by seed 0 and in short training by the mean over seeds; IoU, by seed 0."""
    language, pixels = root / "results" / "tasks" / "language", root / "results" / "tasks" / "segmentation"
    names = {"text_e2e": "e2e", "text": "k3-readout", "text_ema": "k3-ema", "text_man": "k3-man", "text6": "k6-readout"}
    values = {name: _read(language / f"large-{row}-seed0.json")["validation_loss"] for name, row in names.items()}
    values |= {"text_gap3": values["text"] - values["text_e2e"], "text_gap6": values["text6"] - values["text_e2e"]}
    means = {"short_e2e": "mid-e2e", "short": "mid-k3-readout", "short_ema": "mid-k3-ema", "short_man": "mid-k3-man"}
    means |= {"three_e2e": "three-e2e", "three": "three-k3-readout"}
    means |= {"three_man": "three-k3-man", "three_bias": "three-k3-bias"}
    for name, row in means.items():
        seeds = [_read(path)["validation_loss"] for path in language.glob(f"{row}-seed*.json")]
        values[name] = statistics.fmean(seeds)
    runs = {"iou_e2e": "e2e", "iou": "k4", "iou_man": "k4-man-recompute", "iou_wide": "k4-wide"}
    found = {name: _read(pixels / f"{row}-seed0.json") for name, row in runs.items()}
    values |= {name: run["mean_iou"] for name, run in found.items()}
    return values | {"wide_share": 100 * found["iou_wide"]["peak_mib"] / found["iou_e2e"]["peak_mib"]}


def claims_table(claims: list[Claim], root: Path) -> str:
    """Markdown table with one row per claim."""
    known = figures(root)
    lines = ["| claim | measured | on | n | verdict |", "|---|---|---|---|---|"]
    lines += [f"| {' | '.join(cell.format(**known) for cell in claim)} |" for claim in claims]
    return "\n".join(lines)


def tables(root: Path) -> dict[str, Callable[[], str]]:
    """Functions that make the tables, by the name of their marks in the documents."""
    return {"claims-man": lambda: claims_table(MAN, root), "claims-others": lambda: claims_table(OTHERS, root)}
