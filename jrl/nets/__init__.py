"""Networks. Algorithms see only the record ``Network``; flax modules stay inside this folder."""

from jrl.nets.action_values import ValueConfig, action_values, with_noise
from jrl.nets.actor_critic import Config, actor_critic
from jrl.nets.types import Network, step_one

__all__ = ["Config", "Network", "ValueConfig", "action_values", "actor_critic", "step_one", "with_noise"]
