"""Networks. Algorithms see only the record ``Network``; flax modules stay inside this folder."""

from jrl.nets.action_values import ValueConfig, action_values, with_noise
from jrl.nets.actor_critic import Config, actor_critic, policy_features
from jrl.nets.backward import BackwardModel, backward_model
from jrl.nets.continuous import ContinuousConfig, critics, head
from jrl.nets.own import feed_forward, like, policy_network, starting_from, value_network
from jrl.nets.types import Network, Outputs, outputs, step_one

__all__ = [
    "BackwardModel",
    "Config",
    "ContinuousConfig",
    "Network",
    "Outputs",
    "ValueConfig",
    "action_values",
    "actor_critic",
    "backward_model",
    "critics",
    "feed_forward",
    "head",
    "like",
    "outputs",
    "policy_features",
    "policy_network",
    "starting_from",
    "step_one",
    "value_network",
    "with_noise",
]
