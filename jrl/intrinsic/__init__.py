"""Intrinsic rewards: what PPO, PQN and DQN may be paid for what is new, besides the environment's reward."""

from jrl.intrinsic.learner import Learner, State, ValueState, make
from jrl.intrinsic.settings import Config, Hyper, Numbers
from jrl.intrinsic.types import Intrinsic, Transitions

__all__ = ["Config", "Hyper", "Intrinsic", "Learner", "Numbers", "State", "Transitions", "ValueState", "make"]
