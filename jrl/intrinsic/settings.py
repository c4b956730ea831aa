"""The settings of intrinsic rewards."""

from dataclasses import dataclass, field
from typing import Annotated, Literal, NamedTuple

from jrl.nets.torso import TorsoConfig
from jrl.numerics.settings import AboveZero, NonNegative, Positive, Settings, Unit, check

Kind = Literal["none", "rnd", "icm", "counts", "hash"]


def _network() -> TorsoConfig:
    return TorsoConfig(activation="relu")


@dataclass(frozen=True)
class Config(Settings, prefix="bonus"):
    """Static settings of the bonus for what is new."""

    # No bonus; random network distillation; the intrinsic curiosity module; exact counts, for observations that are one-hot or a single
    # integer; counts of hashed observations.
    kind: Kind = "none"
    normalize: bool = True  # Divide the bonus by the running deviation of its discounted sum.
    features: Positive = 64  # Width of the features that rnd and icm predict.
    table: Positive = 2**16  # Entries of the table of hash, and of counts for single integers.
    resolution: AboveZero = 2.0  # Cells of hash in a standard deviation of each number of an observation.
    calibration: Positive = 10_000  # Steps whose observations set the cells of hash, and are not counted.
    # Shape of the networks of rnd, icm and the value of bonuses.
    network: TorsoConfig = field(default_factory=_network)


class Hyper(NamedTuple):
    """Numbers of the bonus, floats or traced scalars; each may be swept."""

    # Weight of the bonus beside the reward; in PPO, of its advantage beside that of the reward.
    weight: NonNegative = 1.0
    gamma: Unit = 0.99  # Discount of the sum of bonuses that normalizes them, and of their value in PPO.
    # Learning rate of the model, and of the value of bonuses in PPO; constant, by Adam.
    learning_rate: NonNegative = 1e-3
    forward_share: Unit = 0.2  # Weight of icm's forward model in its loss; 1 less this is that of the inverse model.


Numbers = Annotated[Hyper, check]  # a field of an algorithm's hyperparameters
