"""Networks. Algorithms see only the record ``Network``; flax modules stay inside this folder."""

from jrl.nets.action_values import ValueConfig, action_values, with_noise
from jrl.nets.actor_critic import Config, actor_critic
from jrl.nets.continuous import ContinuousConfig, critics, head
from jrl.nets.own import feed_forward, like, policy_network, starting_from, value_network
from jrl.nets.types import Network, Outputs, outputs, step_one

__all__ = [
    "Config",
    "ContinuousConfig",
    "Network",
    "Outputs",
    "ValueConfig",
    "action_values",
    "actor_critic",
    "critics",
    "feed_forward",
    "head",
    "like",
    "outputs",
    "policy_network",
    "starting_from",
    "step_one",
    "value_network",
    "with_noise",
]
