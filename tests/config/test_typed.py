"""The typed reader: strict about types, all problems at once, each with the way to its field."""

import json
from dataclasses import dataclass, field

import pytest

from localgrad.config.saved import from_dict, to_dict
from localgrad.config.schema import OptimConfig, TrainConfig
from localgrad.config.typed import MOST_PROBLEMS, parse
from localgrad.errors import LocalGradError


@dataclass(frozen=True)
class Leaf:
    number: float
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Tree:
    leaves: list[Leaf]
    config: TrainConfig = field(default_factory=TrainConfig)
    maybe: int | None = None

    def __post_init__(self) -> None:
        if self.maybe == 13:
            raise LocalGradError("maybe is 13: give another number")


def test_dataclasses_in_dataclasses_are_made_and_an_integer_is_a_float() -> None:
    read = parse(Tree, {"leaves": [{"number": 1, "names": ["a"]}], "config": {"seed": 3}, "later": 1})
    assert read == Tree([Leaf(1.0, ("a",))], TrainConfig(seed=3))
    assert isinstance(read.leaves[0].number, float)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "it has no 'leaves'"),
        ([], "it is []"),
        ({"leaves": [{}]}, "leaves.0 has no 'number'"),
        ({"leaves": [{"number": "1"}]}, "leaves.0.number is '1'"),
        ({"leaves": [{"number": True}]}, "leaves.0.number is True"),
        ({"leaves": [{"number": float("nan")}]}, "leaves.0.number is nan"),
        ({"leaves": [], "maybe": 1.5}, "maybe is 1.5"),
        ({"leaves": [], "maybe": 13}, "maybe is 13: give another number"),
        ({"leaves": [], "config": {"optim": {"lrr": 1}}}, "config.optim has no field 'lrr' ("),
        ({"leaves": [], "config": {"data": {"image_size": 0}}}, "config.data: "),
        ({"leaves": [object()]}, "it holds what is no JSON"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(values: object, message: str) -> None:
    with pytest.raises(LocalGradError) as caught:
        parse(Tree, values)
    assert message in str(caught.value)


def test_many_problems_are_counted_and_long_values_cut() -> None:
    with pytest.raises(LocalGradError) as caught:
        parse(Tree, {"leaves": [{"number": "x" * 10_000}] * 50})
    message = str(caught.value)
    assert message.count("; it should be") == MOST_PROBLEMS
    assert message.endswith(f"and {50 - MOST_PROBLEMS} more")
    assert "\n" not in message
    assert len(message) < 1000


def test_a_config_stays_what_it_is_through_a_file() -> None:
    config = TrainConfig(cuts=("a", "b"), optim=OptimConfig(lr=1, clip_norm=2))
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config
