"""Board and card games of pgx. In a game of two the agent plays a random seat against a given opponent."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pgx

from jrl.envs.spaces import Discrete
from jrl.envs.types import Environment, MaskedObs
from jrl.numerics.types import EnvState

Array = jax.Array
Opponent = Callable[[MaskedObs, Array], Array]  # ``(observation, key) -> action``


def names() -> list[str]:
    return sorted(name for name in pgx.available_envs() if name != "sparrow_mahjong")  # which has three players


def make(name: str, opponent: str | Opponent = "random") -> Environment:
    """A game for one or two players. The reward is what the game gives to the agent. Episodes end with the game; a limit on its moves is one of its
    rules, so that it terminates them.

    ``opponent`` plays at random among the legal moves, or is a function such as ``policy`` gives.
    Raises ``ValueError`` for a game of more than two players.
    """
    env: Any = pgx.make(name)
    if env.num_players > 2:
        raise ValueError(f"pgx/{name} has {env.num_players} players; our algorithms learn games of one or two")
    if opponent != "random" and not callable(opponent):
        raise ValueError(f"opponent must be random or a function (observation, key) -> action; got {opponent!r}")
    reply: Opponent = random_move if opponent == "random" else opponent  # type: ignore[assignment]

    def others(key: Array, state: Any, seat: Array) -> tuple[Any, Array]:
        """The state when it is the agent's turn again, or the game is over, and what the agent earned meanwhile."""

        def waits(carry: Any) -> Array:
            state = carry[1]
            return (state.current_player != seat) & ~(state.terminated | state.truncated)

        def move(carry: Any) -> Any:
            key, state, earned = carry
            key, key_move, key_step = jax.random.split(key, 3)
            state = env.step(state, reply(observe(state), key_move), key_step)
            return key, state, earned + state.rewards[seat]

        _, state, earned = jax.lax.while_loop(waits, move, (key, state, jnp.float32(0)))
        return state, earned

    def reset(key: Array) -> tuple[Any, Any]:
        key_init, key_seat, key_others = jax.random.split(key, 3)
        seat = jax.random.randint(key_seat, (), 0, env.num_players)
        state, _ = others(key_others, env.init(key_init), seat)
        return observe(state), (state, seat)

    def step(key: Array, both: EnvState, action: Array) -> tuple[Any, Any, Array, Array, Array]:
        state, seat = both
        key_step, key_others = jax.random.split(key)
        state = env.step(state, action, key_step)
        earned = state.rewards[seat]
        state, more = others(key_others, state, seat)
        return observe(state), (state, seat), earned + more, state.terminated, state.truncated

    def draw(states: list[Any], path: str) -> None:
        pgx.save_svg_animation([state for state, _ in states], path, frame_duration_seconds=0.5)

    return Environment(name, reset, step, Discrete(env.num_actions), draw=draw, drawn_as=".svg")


def observe(state: Any) -> MaskedObs:
    """What the player whose turn it is sees, and which moves are legal."""
    return MaskedObs(state.observation, state.legal_action_mask)


def random_move(obs: MaskedObs, key: Array) -> Array:
    """A legal move, each as likely."""
    return jax.random.categorical(key, jnp.where(obs.mask, 0.0, -jnp.inf))


def policy(act: Callable[..., Any], state: Any) -> Opponent:
    """A trained policy as an opponent, which draws its moves: ``loaded.algo.act`` and ``loaded.member()`` of ``run.load``.

    Raises ``ValueError`` when it is asked for a move if it has a memory, which it could not keep.
    """

    def trained(obs: MaskedObs, key: Array) -> Array:
        action, memory = act(state, obs, key)
        if jax.tree.leaves(memory):
            raise ValueError("an opponent must do without a memory: this policy has one")
        return action

    return trained
