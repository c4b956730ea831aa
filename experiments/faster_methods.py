"""The tasks and the methods of faster.py."""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jrl import envs, intrinsic, nets, run
from jrl.algorithm import Algorithm
from jrl.algos import auxiliary_tasks, bc, dqfd, dqn, ebu, fbrl, ppo, reverse_curriculum, rudder, self_imitation
from jrl.envs import Environment, tabular, wrappers
from jrl.equations import mdp
from jrl.experience import replay

Array = jax.Array
PREDICTOR_UPDATES = 5  # of RUDDER, whose steps count
CLONING_UPDATES = 100
SHOWN = 1_000  # steps of demonstrations


class Task(NamedTuple):
    """A task: its environment, its budget, the return that solves it, the agent's discount, whether observations are one-hot, the process
    whose exact values shape the reward, the episodes of an evaluation, first states of episodes close to the goal, and demonstrations."""

    env: Environment
    env_steps: int
    threshold: float
    gamma: float
    one_hot: bool = True
    process: mdp.MDP | None = None
    episodes: int = 16
    near_goal: Callable[[Array], tuple[Any, Any]] | None = None
    shown: replay.Step | None = None


def deep_sea() -> Task:
    return Task(envs.make("DeepSea-bsuite", size=12), 60_000, 0.95, 0.99)


def mountain_car() -> Task:
    env = wrappers.goal_reward(envs.make("MountainCar-v0"))

    def near_goal(key: Array) -> tuple[Any, Any]:
        """On the slope just before the goal, at 0.5, and on the way up."""
        key_position, key_velocity = jax.random.split(key)
        position = jax.random.uniform(key_position, minval=0.4, maxval=0.49)
        velocity = jax.random.uniform(key_velocity, maxval=0.03)
        state = env.reset(key)[1].replace(position=position, velocity=velocity)
        return jnp.stack([position, velocity]), state

    return Task(env, 150_000, 0.95, 0.99, one_hot=False, near_goal=near_goal)


def key_and_door() -> Task:
    return Task(envs.make("KeyAndDoor"), 60_000, 0.95, 0.99, process=tabular.key_and_door())


def delayed_choice() -> Task:
    return Task(envs.make("DelayedChoice", noise=0.5), 45_000, 0.6, 1.0)


def umbrella_chain() -> Task:
    """Its rewards on the way are noise, so that a return is measured over many episodes."""
    return Task(envs.make("UmbrellaChain-bsuite", chain_length=20), 45_000, 0.5, 1.0, one_hot=False, episodes=1_000)


TASKS = {
    "DeepSea": deep_sea,
    "MountainCar": mountain_car,
    "KeyAndDoor": key_and_door,
    "DelayedChoice": delayed_choice,
    "UmbrellaChain": umbrella_chain,
}


DQN = dqn.Config(num_envs=8, capacity=20_000, network=nets.ValueConfig(norm="none"))
NUMBERS: dict[str, Any] = {"learning_rate": 1e-3, "epsilon_fraction": 0.3, "epsilon_end": 0.02}


def ppo_on(task: Task, bonus: str = "none", imitation: int = 0, auxiliary: int = 0) -> Algorithm:
    """PPO, with a bonus, and so many gradient steps of self-imitation and of auxiliary tasks per update."""
    return ppo.make(task.env, *ppo_settings(task, bonus, imitation, auxiliary))


def shaped_ppo_on(task: Task) -> Algorithm:
    """PPO whose reward is shaped by the exact values, measured without the shaping."""
    return ppo.make(shaped(task), *ppo_settings(task))._replace(env=task.env)


def shaped(task: Task) -> Environment:
    """The task's environment with the exact values as the potential."""
    assert task.process is not None
    v = mdp.value_iteration(task.process, task.gamma)
    return wrappers.shaped(task.env, lambda obs: obs @ v, task.gamma)


def curriculum_on(task: Task) -> Algorithm:
    """PPO whose episodes begin near the goal, and then ever farther from it."""
    assert task.near_goal is not None
    settings = reverse_curriculum.Config(walk=50, horizon=100)
    return reverse_curriculum.make(lambda env: ppo.make(env, *ppo_settings(task)), task.env, task.near_goal, settings)


def cloned_ppo_on(task: Task, key: Array) -> tuple[Algorithm, int]:
    """PPO that begins with a policy cloned from demonstrations, which sees observations as they are."""
    assert task.shown is not None
    obs, action = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), (task.shown.obs, task.shown.action))
    clone = bc.make(task.env, bc.Demonstrations(obs, action))
    cloned, _ = run.train_fn(clone, CLONING_UPDATES * clone.env_steps_per_update)(key)
    config, hyper = ppo_settings(task)
    return ppo.make(task.env, replace(config, normalize_observations=False), hyper, start=cloned), 0


def ppo_settings(
    task: Task, bonus: str = "none", imitation: int = 0, auxiliary: int = 0
) -> tuple[ppo.Config, ppo.Hyper]:
    config = ppo.Config(
        num_envs=8,
        num_steps=128,
        bonus=bonus_on(task, bonus),
        imitation=self_imitation.Config(num_gradient_steps=imitation, horizon=256),
        auxiliary=auxiliary_tasks.Config(num_gradient_steps=auxiliary),
        normalize_observations=not task.one_hot,
    )
    return config, ppo.Hyper(learning_rate=5e-4, gamma=task.gamma, imitation=self_imitation.Hyper(weight=1.0))


def bonus_on(task: Task, kind: Any) -> intrinsic.Config:
    """Counts are of cells where observations are not one-hot."""
    return intrinsic.Config(kind="hash" if kind == "counts" and not task.one_hot else kind)


def dqn_on(
    task: Task, bonus: str = "none", weight: float = 1.0, env: Environment | None = None, **changed: Any
) -> Algorithm:
    """DQN, with a bonus of some weight and with parts changed."""
    config = replace(DQN, bonus=bonus_on(task, bonus), normalize_observations=not task.one_hot, **changed)
    hyper = dqn.Hyper(gamma=task.gamma, bonus=intrinsic.Hyper(weight=weight), **NUMBERS)
    return dqn.make(env or task.env, config, hyper)


def ebu_on(task: Task, diffusion: float) -> Algorithm:
    """Targets made backwards."""
    return ebu.make(task.env, like_dqn(task, ebu.Config()), ebu.Hyper(gamma=task.gamma, diffusion=diffusion, **NUMBERS))


def fbrl_on(task: Task) -> Algorithm:
    """DQN that also imagines how what was rewarded could have been reached."""
    config = fbrl.Config(predecessor="one_hot" if task.one_hot else "difference")
    return fbrl.make(task.env, like_dqn(task, config), fbrl.Hyper(gamma=task.gamma, **NUMBERS))


def dqfd_on(task: Task) -> Algorithm:
    """Deep Q-learning that was shown how."""
    assert task.shown is not None
    numbers = NUMBERS | {"epsilon_end": dqfd.Hyper().epsilon_end}
    return dqfd.make(task.env, task.shown, like_dqn(task, dqfd.Config()), dqfd.Hyper(gamma=task.gamma, **numbers))


def like_dqn(task: Task, config: Any) -> Any:
    """Settings of another algorithm, with those of ``DQN`` that both have to choose."""
    return replace(
        config,
        num_envs=DQN.num_envs,
        capacity=DQN.capacity,
        network=DQN.network,
        normalize_observations=not task.one_hot,
    )


def redistributed_on(task: Task, key: Array) -> tuple[Algorithm, int]:
    """DQN that does not look ahead, on rewards that were redistributed by a predictor of returns, and the steps that the predictor took."""
    predictor = rudder.make(task.env)
    spent = PREDICTOR_UPDATES * predictor.env_steps_per_update
    state, _ = run.train_fn(predictor, spent)(key)
    algo = dqn_on(task._replace(gamma=0.0), env=rudder.redistributed(predictor, state))
    return algo._replace(env=predictor.env), spent


PLAIN: dict[str, Callable[[Task], Algorithm]] = {
    "ppo": ppo_on,
    "ppo+rnd": lambda task: ppo_on(task, "rnd"),
    "ppo+icm": lambda task: ppo_on(task, "icm"),
    "ppo+counts": lambda task: ppo_on(task, "counts"),
    "ppo+sil": lambda task: ppo_on(task, imitation=40),
    "ppo+rnd+sil": lambda task: ppo_on(task, "rnd", imitation=40),
    "ppo+auxiliary": lambda task: ppo_on(task, auxiliary=16),
    "ppo+shaping": shaped_ppo_on,
    "ppo+curriculum": curriculum_on,
    "dqn": dqn_on,
    "dqn+noisy": lambda task: dqn_on(task, network=replace(DQN.network, noisy=True)),
    "dqn+dueling": lambda task: dqn_on(task, network=replace(DQN.network, dueling=True)),
    "dqn+n-step": lambda task: dqn_on(task, n_step=5),
    "dqn+per": lambda task: dqn_on(task, prioritized=True),
    "dqn+rnd": lambda task: dqn_on(task, "rnd"),
    "dqn+counts": lambda task: dqn_on(task, "counts"),
    "dqn+rnd 0.1": lambda task: dqn_on(task, "rnd", weight=0.1),
    "dqn+counts 0.1": lambda task: dqn_on(task, "counts", weight=0.1),
    "dqn+shaping": lambda task: dqn_on(task, env=shaped(task))._replace(env=task.env),
    "dqfd": dqfd_on,
    "fbrl": fbrl_on,
    "ebu 0.5": lambda task: ebu_on(task, 0.5),
    "ebu 1": lambda task: ebu_on(task, 1.0),
}
# Each makes its algorithm of a task and a key, and says how many steps were spent already.
METHODS: dict[str, Callable[[Task, Array], tuple[Algorithm, int]]] = {
    **{name: functools.partial(lambda make, task, key: (make(task), 0), make) for name, make in PLAIN.items()},
    "dqn+rudder": redistributed_on,
    "ppo+cloning": cloned_ppo_on,
}
ONLY = {  # tasks of those that do not fit all
    "ppo+shaping": ("KeyAndDoor",),
    "dqn+shaping": ("KeyAndDoor",),
    "ppo+curriculum": ("MountainCar",),
    "dqn+rudder": ("DelayedChoice",),
}
ARE_SHOWN = ("dqfd", "ppo+cloning")
