"""Settings that learn, by algorithm and environment. The results they reach are in docs/results.md."""

from dataclasses import replace
from typing import Any, NamedTuple

from jrl import intrinsic, nets
from jrl.algos import dqn, ebu, grpo, ppo, ppo_cma, pqn, r2d2, sac, td3
from jrl.nets import transformer
from jrl.numerics import optim


class Preset(NamedTuple):
    """Budget, static settings and hyperparameters for one environment."""

    env_steps: int
    config: Any
    hyper: Any


# The setting of CleanRL and PureJaxRL for CartPole, and the default for every environment without one of its own.
PPO_DEFAULT = Preset(500_000, ppo.Config(), ppo.Hyper())

PPO: dict[str, Preset] = {
    "CartPole-v1": PPO_DEFAULT,
    "Acrobot-v1": Preset(
        500_000,
        ppo.Config(num_envs=16, num_steps=128, normalize_observations=True),
        ppo.Hyper(learning_rate=1e-3, gae_lambda=0.94, entropy_weight=0.0),
    ),
    "MountainCar-v0": Preset(
        1_000_000,
        ppo.Config(num_envs=16, num_steps=64, normalize_observations=True, normalize_rewards=True),
        ppo.Hyper(learning_rate=1e-3, gae_lambda=0.98, entropy_weight=0.01),
    ),
    "Pendulum-v1": Preset(
        1_000_000,
        ppo.Config(
            num_envs=8,
            num_steps=256,
            num_epochs=10,
            num_minibatches=16,
            value_clip=False,
            normalize_observations=True,
            normalize_rewards=True,
        ),
        ppo.Hyper(learning_rate=1e-3, gamma=0.9, entropy_weight=0.0),
    ),
    "Breakout-MinAtar": Preset(
        10_000_000,
        ppo.Config(
            num_envs=64,
            num_steps=128,
            num_minibatches=8,
            network=nets.Config(torso="mlp", activation="relu"),
        ),
        ppo.Hyper(learning_rate=5e-3),
    ),
    "Asterix-MinAtar": Preset(
        10_000_000,
        ppo.Config(
            num_envs=64,
            num_steps=128,
            num_minibatches=8,
            network=nets.Config(torso="mlp", hidden=(128, 128), activation="relu", norm="layer"),
        ),
        ppo.Hyper(learning_rate=2e-3),
    ),
    "DeepSea-bsuite": Preset(
        300_000,
        ppo.Config(num_envs=16, num_steps=80, bonus=intrinsic.Config(kind="counts")),
        ppo.Hyper(learning_rate=1e-3, entropy_weight=0.0),
    ),
    "Catch-bsuite": Preset(200_000, ppo.Config(num_envs=16, num_steps=32), ppo.Hyper(learning_rate=1e-3)),
    "MemoryChain-bsuite": Preset(
        500_000,
        ppo.Config(num_envs=16, num_steps=64, network=nets.Config(hidden=(64,), gru=64)),
        ppo.Hyper(learning_rate=1e-3),
    ),
}


# PPO-Penalty, with steps so large that the penalty has to hold them: at PPO-Clip's the KL stays a tenth of its target.
PPO_PENALTY = Preset(
    500_000,
    ppo.Config(loss="penalty", num_epochs=10, optimizer=optim.OptimizerConfig(schedule="constant")),
    ppo.Hyper(learning_rate=1e-3),
)


# The setting of the paper's code for CartPole, and the default for every environment without one of its own.
PQN_DEFAULT = Preset(500_000, pqn.Config(), pqn.Hyper(reward_scale=0.1))

# For MinAtar: the paper's setting with a network of dense layers, five times as fast on a CPU as its convolution.
PQN_MINATAR = Preset(
    10_000_000,
    pqn.Config(
        num_envs=128,
        num_steps=32,
        num_epochs=2,
        num_minibatches=32,
        network=nets.ValueConfig(torso="mlp"),
    ),
    pqn.Hyper(learning_rate=5e-4, q_lambda=0.65, epsilon_fraction=0.1),
)

PQN: dict[str, Preset] = {
    "CartPole-v1": PQN_DEFAULT,
    "Asterix-MinAtar": PQN_MINATAR,
    "Breakout-MinAtar": PQN_MINATAR,
    "Freeway-MinAtar": PQN_MINATAR,
    "SpaceInvaders-MinAtar": PQN_MINATAR,
}


DQN_DEFAULT = Preset(500_000, dqn.Config(), dqn.Hyper())

# Classic control: many gradient steps at a high learning rate that falls to 0, and a target network that follows softly.
_CONTROL = dqn.Config(num_envs=8, capacity=50_000, target_every=0, network=nets.ValueConfig())

DQN: dict[str, Preset] = {
    "CartPole-v1": Preset(500_000, _CONTROL, dqn.Hyper(learning_rate=1e-3, tau=0.02, epsilon_fraction=0.1)),
    "Acrobot-v1": Preset(100_000, _CONTROL, dqn.Hyper(learning_rate=2.5e-3, tau=0.02, epsilon_fraction=0.15)),
    "MountainCar-v0": Preset(200_000, _CONTROL, dqn.Hyper(learning_rate=2.5e-3, tau=0.02, epsilon_fraction=0.3)),
    "Breakout-MinAtar": Preset(
        2_000_000,
        dqn.Config(
            num_envs=32,
            capacity=100_000,
            learning_starts=5_000,
            target_every=0,
            n_step=3,
            network=nets.ValueConfig(torso="mlp"),
        ),
        dqn.Hyper(learning_rate=1e-3, epsilon_fraction=0.1, epsilon_end=0.02),
    ),
}


R2D2_DEFAULT = Preset(500_000, r2d2.Config(), r2d2.Hyper())

R2D2: dict[str, Preset] = {"MemoryChain-bsuite": R2D2_DEFAULT}


# The papers' settings, for every environment without one of its own.
SAC_DEFAULT = Preset(1_000_000, sac.Config(), sac.Hyper())
TD3_DEFAULT = Preset(1_000_000, td3.Config(learning_starts=25_000), td3.Hyper())

# Small networks at a high learning rate, and half a gradient step for each step.
_PENDULUM: dict[str, Any] = {
    "num_envs": 4,
    "num_gradient_steps": 2,
    "batch_size": 128,
    "capacity": 50_000,
    "learning_starts": 1_000,
    "network": nets.ContinuousConfig(hidden=(64, 64)),
}

SAC: dict[str, Preset] = {
    "Pendulum-v1": Preset(50_000, sac.Config(**_PENDULUM), sac.Hyper(learning_rate=1e-3)),
}

TD3: dict[str, Preset] = {
    "Pendulum-v1": Preset(50_000, td3.Config(**_PENDULUM), td3.Hyper(learning_rate=1e-3)),
}


PPO_CMA_DEFAULT = Preset(1_000_000, ppo_cma.Config(), ppo_cma.Hyper())

PPO_CMA: dict[str, Preset] = {
    "Pendulum-v1": Preset(
        300_000,
        ppo_cma.Config(normalize_observations=True, normalize_rewards=True),
        ppo_cma.Hyper(learning_rate=1e-3, gamma=0.9),
    ),
}

EBU_DEFAULT = Preset(500_000, ebu.Config(), ebu.Hyper())

EBU: dict[str, Preset] = {
    "DelayedChoice": Preset(
        50_000,
        ebu.Config(capacity=20_000, network=nets.ValueConfig(norm="none")),
        ebu.Hyper(learning_rate=3e-3, gamma=1.0, diffusion=1.0, epsilon_fraction=0.4),
    ),
}


def ppo_preset(name: str, env: str) -> Preset:
    """PPO's preset ``name`` for ``env``: see ``find``; ``penalty`` is PPO-Penalty's."""
    return find({**PPO, "penalty": PPO_PENALTY}, PPO_DEFAULT, name, env)


def pqn_preset(name: str, env: str) -> Preset:
    """PQN's preset ``name`` for ``env``: see ``find``."""
    return find(PQN, PQN_DEFAULT, name, env)


def dqn_preset(name: str, env: str) -> Preset:
    """DQN's preset ``name`` for ``env``: see ``find``."""
    return find(DQN, DQN_DEFAULT, name, env)


def ppo_cma_preset(name: str, env: str) -> Preset:
    """PPO-CMA's preset ``name`` for ``env``: see ``find``."""
    return find(PPO_CMA, PPO_CMA_DEFAULT, name, env)


def ebu_preset(name: str, env: str) -> Preset:
    """EBU's preset ``name`` for ``env``: see ``find``."""
    return find(EBU, EBU_DEFAULT, name, env)


def r2d2_preset(name: str, env: str) -> Preset:
    """R2D2's preset ``name`` for ``env``: see ``find``."""
    return find(R2D2, R2D2_DEFAULT, name, env)


def sac_preset(name: str, env: str) -> Preset:
    """SAC's preset ``name`` for ``env``: see ``find``."""
    return find(SAC, SAC_DEFAULT, name, env)


def td3_preset(name: str, env: str) -> Preset:
    """TD3's preset ``name`` for ``env``: see ``find``."""
    return find(TD3, TD3_DEFAULT, name, env)


def find(table: dict[str, Preset], default: Preset, name: str, env: str) -> Preset:
    """``auto``: the environment's own or the default; ``none``: the default; else that environment's.

    Raises ``ValueError`` listing the presets.
    """
    if name == "auto":
        return table.get(env, default)
    if name == "none":
        return default
    if name not in table:
        raise ValueError(f"unknown preset {name!r}; there are: auto, none, {', '.join(table)}")
    return table[name]


class TaskPreset(NamedTuple):
    """Updates, static settings and hyperparameters for one task of a language model."""

    updates: int
    config: grpo.Config
    hyper: grpo.Hyper


# A head of its own starts larger than embeddings do, which spares a long plateau.
_SMALL = transformer.Config(dim=64, num_layers=1, num_heads=4, num_kv_heads=4, tie_embeddings=False)
_DEEPER = replace(_SMALL, num_layers=2)
_STEPS: dict[str, Any] = {"num_prompts": 32, "group_size": 8, "num_epochs": 2, "num_minibatches": 2}

# Adam's first steps are as long as any, and would undo some of what was learned under supervision.
_WARM = optim.OptimizerConfig("adamw", warmup=0.2)

_STARTED = grpo.Config(model=_DEEPER, supervised=600, optimizer=_WARM, **_STEPS)

# Where most answers are right already, what is left to learn is faint beside the noise of a step.
_GENTLE = grpo.Hyper(learning_rate=1e-4, supervised_learning_rate=2e-3, close_weight=0.5, kl_weight=0.001)

# From scratch a policy must keep exploring; after a supervised start it need not.
GRPO: dict[str, TaskPreset] = {
    "modular_addition": TaskPreset(
        500,
        grpo.Config(model=_SMALL, **_STEPS),
        grpo.Hyper(learning_rate=1e-3, close_weight=0.5, entropy_weight=0.1, kl_weight=0.0),
    ),
    "countdown": TaskPreset(
        500,
        replace(_STARTED, supervised=400),
        grpo.Hyper(learning_rate=3e-4, entropy_weight=0.01, kl_weight=0.001),
    ),
    "addition": TaskPreset(60, replace(_STARTED, supervised=1200), _GENTLE),
}
GRPO_DEFAULT = TaskPreset(60, _STARTED, _GENTLE)


def grpo_preset(task: str) -> TaskPreset:
    """The preset of a task, or the default: a supervised start first."""
    return GRPO.get(task, GRPO_DEFAULT)
