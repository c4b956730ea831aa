"""Well-known finite decision processes as arrays (``jrl.equations.mdp.MDP``), and any such process as an environment."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jrl.envs.types import Discrete, Environment, MaskedObs
from jrl.equations import mdp as mdps
from jrl.equations.mdp import MDP
from jrl.numerics import checks

Array = jax.Array
MOVES = ((0, -1), (1, 0), (0, 1), (-1, 0))  # left, down, right, up: (row, column)
FROZEN_LAKE = ("SFFF", "FHFH", "FFFH", "HFFG")


MOST = 10_000  # states or actions: a table has an entry for each pair of states


def _check_size(**counts: int) -> None:
    for name, count in counts.items():
        checks.positive_int(name, count)
        checks.within(name, count, 1, MOST)


def random_walk(num_states: int = 19, left: float = -1.0, right: float = 1.0) -> MDP:
    """A walk over ``num_states`` states that starts in the middle and ends beyond either end (examples 6.2 and 7.1).

    Its one action goes left or right by chance; leaving on the left pays ``left``, on the right ``right``. States 0 and
    ``num_states + 1`` are terminal.
    """
    _check_size(num_states=num_states)
    n = num_states + 2
    transition, reward = np.zeros((n, 1, n)), np.zeros((n, 1, n))
    for s in range(n):
        for to in (s - 1, s + 1) if 0 < s < n - 1 else (s, s):
            transition[s, 0, to] += 0.5
    reward[1, 0, 0], reward[n - 2, 0, n - 1] = left, right
    terminal = np.isin(np.arange(n), (0, n - 1))
    return mdps.make(transition, reward, terminal, np.eye(n)[n // 2])


def gridworld(
    rows: Sequence[str],
    step_reward: float = 0.0,
    rewards: dict[str, float] | None = None,
    terminals: str = "GH",
    teleport: dict[str, str] | None = None,
    slip: float = 0.0,
) -> MDP:
    """A grid from its map: S a start, # a wall, any other letter a cell; actions left, down, right, up.

    Args:
        rows: of the map, all of one length.
        step_reward: for every move.
        rewards: for arriving on a letter, instead.
        terminals: letters on which an episode ends.
        teleport: letters that send one who arrives to (the first cell of) another letter.
        slip: probability of going to each side instead, so that 2/3 of moves go astray at 1/3.

    Raises ``ValueError`` for a ragged map or one without a start.
    """
    if len({len(row) for row in rows}) != 1:
        raise ValueError("the rows of a gridworld must have one length")
    cells = np.array([list(row) for row in rows])
    height, width = cells.shape
    letters = cells.ravel()
    if "S" not in letters:
        raise ValueError("a gridworld needs a start, S")
    n = letters.size
    transition, reward = np.zeros((n, 4, n)), np.zeros((n, 4, n))
    terminal = np.isin(letters, [*terminals, "#"])  # nobody is inside a wall: terminal, so that it has a value

    def arrive(s: int, direction: int) -> tuple[int, float]:
        row, column = divmod(s, width)
        row = min(max(row + MOVES[direction][0], 0), height - 1)
        column = min(max(column + MOVES[direction][1], 0), width - 1)
        to = s if cells[row, column] == "#" else row * width + column
        letter = letters[to]
        earned = (rewards or {}).get(letter, step_reward)
        if teleport and letter in teleport:
            to = int(np.flatnonzero(letters == teleport[letter])[0])
        return to, earned

    for s in range(n):
        for action in range(4):
            for turn, probability in ((0, 1 - 2 * slip), (1, slip), (-1, slip)):
                to, earned = (s, 0.0) if terminal[s] else arrive(s, (action + turn) % 4)
                transition[s, action, to] += probability
                reward[s, action, to] += probability * earned
    reward /= np.where(transition > 0, transition, 1)  # the mean, where several ways lead to one cell
    start = letters == "S"
    return mdps.make(transition, reward, terminal, start / start.sum())


def cliff() -> MDP:
    """The cliff walk (example 6.6): -1 a step, -100 and back to the start for a step over the edge."""
    rows = [*(["." * 12] * 3), "S" + "C" * 10 + "G"]
    return gridworld(rows, step_reward=-1.0, rewards={"C": -100.0}, teleport={"C": "S"})


def frozen_lake(rows: Sequence[str] = FROZEN_LAKE, slippery: bool = True) -> MDP:
    """The frozen lake: 1 for the goal, holes end the episode; on ice a third of the moves goes to either side."""
    return gridworld(rows, rewards={"G": 1.0}, slip=1 / 3 if slippery else 0.0)


def key_and_door(size: int = 8) -> MDP:
    """Two rooms of a grid of ``size`` x ``size`` cells with a wall and a locked door between them: the key lies in the first room's far corner,
    the goal in that of the second. 1 for the goal; nothing else is rewarded.

    Actions are left, down, right, up. The key is taken by arriving on it, and the door is a wall without it. State ``s`` is the cell, row by
    row, with ``size**2`` added once the key was taken. Raises ``ValueError`` for a size below 5.
    """
    checks.positive_int("size", size, at_least=5)
    _check_size(states=2 * size**2)
    rows = [["."] * size for _ in range(size)]
    wall = size // 2
    for row in rows:
        row[wall] = "#"
    rows[0][0], rows[size - 1][wall - 1], rows[size // 2][wall], rows[0][size - 1] = "S", "K", "D", "G"
    plan = ["".join(row) for row in rows]
    without = gridworld([row.replace("D", "#") for row in plan], rewards={"G": 1.0})
    with_key = gridworld(plan, rewards={"G": 1.0})
    cells = size**2
    transition, reward = np.zeros((2 * cells, 4, 2 * cells)), np.zeros((2 * cells, 4, 2 * cells))
    transition[:cells, :, :cells], transition[cells:, :, cells:] = without.transition, with_key.transition
    reward[:cells, :, :cells], reward[cells:, :, cells:] = without.reward, with_key.reward
    key = (size - 1) * size + wall - 1
    transition[:cells, :, cells + key] = transition[:cells, :, key]  # who arrives on the key has it
    transition[:cells, :, key] = 0.0
    transition[key] = np.arange(2 * cells) == key  # nobody is there without it
    terminal = np.concatenate([without.terminal, with_key.terminal])
    terminal[key] = True
    return mdps.make(transition, reward, terminal, np.concatenate([without.start, np.zeros(cells)]))


FOUR_ROOMS = (
    "#############",
    "#.....#.....#",
    "#.....#.....#",
    "#...........#",
    "#.....#.....#",
    "#.....#.....#",
    "##.####.....#",
    "#.....###.###",
    "#.....#.....#",
    "#.....#.....#",
    "#...........#",
    "#.....#.....#",
    "#############",
)


def four_rooms(goal_row: int = 7, goal_column: int = 9, slip: float = 1 / 6) -> MDP:
    """Four rooms with doors between them (Sutton, Precup and Singh 1999), from any cell to a goal, by default the eastern door: 1 for arriving.

    A move goes astray to either side with probability ``slip``. Raises ``ValueError`` for a goal that is a wall or outside.
    """
    size = len(FOUR_ROOMS)
    if not (0 <= goal_row < size and 0 <= goal_column < size) or FOUR_ROOMS[goal_row][goal_column] == "#":
        raise ValueError(f"the goal must be a free cell of four rooms; got row {goal_row}, column {goal_column}")
    rows = [list(row.replace(".", "S")) for row in FOUR_ROOMS]
    rows[goal_row][goal_column] = "G"
    return gridworld(["".join(row) for row in rows], rewards={"G": 1.0}, slip=slip)


def delayed_choice(delay: int = 50, num_actions: int = 4, noise: float = 1.0) -> MDP:
    """A choice that is paid ``delay`` steps later: the first action counts, the last of them pays 1 on average and the others 0, with
    normal noise of standard deviation ``noise``. Later actions do nothing.

    State 0 is the start, ``1 + a delay + t`` is t steps after action a, the last state is terminal.
    """
    checks.positive_int("delay", delay)
    _check_size(num_actions=num_actions, states=num_actions * delay + 2)
    n = num_actions * delay + 2
    transition, reward, std = np.zeros((n, num_actions, n)), np.zeros((n, num_actions, n)), np.zeros((n, num_actions))
    for a in range(num_actions):
        first = 1 + a * delay
        transition[0, a, first] = 1
        for s in range(first, first + delay):
            transition[s, :, s + 1 if s < first + delay - 1 else n - 1] = 1
        std[first + delay - 1] = noise
    transition[n - 1, :, n - 1] = 1
    reward[n - 2] = 1
    return mdps.make(transition, reward, np.arange(n) == n - 1, np.arange(n) == 0, reward_std=std)


def maximization_bias(num_actions: int = 10) -> MDP:
    """Example 6.7: from A (state 1), right (action 1) ends with 0; left leads to B (state 0), all whose actions end with
    noise of mean -0.1 and standard deviation 1. State 2 is terminal."""
    transition, reward, std = np.zeros((3, num_actions, 3)), np.zeros((3, num_actions, 3)), np.zeros((3, num_actions))
    transition[:, :, 2] = 1
    transition[1, 0] = (1, 0, 0)
    reward[0], std[0] = -0.1, 1
    legal = np.ones((3, num_actions), bool)
    legal[1, 2:] = False
    return mdps.make(transition, reward, np.arange(3) == 2, np.arange(3) == 1, legal, std)


def baird() -> tuple[MDP, Array, Array, Array]:
    """Baird's counterexample (figure 11.1): the process, features ``[7, 8]``, behaviour and target policies ``[7, 2]``.

    Action 0 (dashed) goes to one of the upper six states, action 1 (solid) to the seventh; all rewards are 0.
    """
    transition = np.zeros((7, 2, 7))
    transition[:, 0, :6], transition[:, 1, 6] = 1 / 6, 1
    features = np.concatenate([2 * np.eye(7), np.ones((7, 1))], axis=1)
    features[6, 6], features[6, 7] = 1, 2
    behaviour, target = np.tile([6 / 7, 1 / 7], (7, 1)), np.tile([0.0, 1.0], (7, 1))
    as_array = (jnp.asarray(x, jnp.float32) for x in (features, behaviour, target))
    return (mdps.make(transition, np.zeros((7, 2))), *as_array)  # type: ignore[return-value]


def garnet(key: Array, num_states: int = 10, num_actions: int = 4, branching: int = 3) -> MDP:
    """A random process (Bhatnagar et al. 2009, section 8): ``branching`` next states with random probabilities, normal rewards.

    Nothing is terminal. Raises ``ValueError`` if ``branching`` is more than ``num_states``.
    """
    _check_size(num_states=num_states, num_actions=num_actions)
    if not 1 <= branching <= num_states:
        raise ValueError(f"branching must be between 1 and num_states = {num_states}; got {branching}")
    key_next, key_cuts, key_reward = jax.random.split(key, 3)
    shape = (num_states, num_actions)
    nexts = jnp.argsort(jax.random.uniform(key_next, (*shape, num_states), jnp.float32), axis=-1)[..., :branching]
    cuts = jnp.sort(jax.random.uniform(key_cuts, (*shape, branching - 1), jnp.float32), axis=-1)
    probabilities = jnp.diff(cuts, prepend=0.0, append=1.0, axis=-1)
    transition = jnp.sum(jax.nn.one_hot(nexts, num_states, dtype=jnp.float32) * probabilities[..., None], axis=-2)
    return mdps.make(transition, jax.random.normal(key_reward, shape, jnp.float32))


class Place(NamedTuple):
    """The state of a finite process as an environment."""

    state: Array  # int32
    time: Array  # int32: steps of the episode so far


def environment(mdp: MDP, name: str = "MDP", time_limit: int | None = None, one_hot: bool = True) -> Environment:
    """The process as an environment: its observation is the state as one-hot float32 ``[S]``, else int32 ``[]``.

    Where some actions are illegal (of a concrete process) it is a ``MaskedObs``. Episodes end in terminal states, and are truncated after
    ``time_limit`` steps.
    """
    num_states, num_actions, _ = mdp.transition.shape
    masked = not (isinstance(mdp.legal, jax.core.Tracer) or bool(mdp.legal.all()))

    def observe(s: Array) -> Array | MaskedObs:
        obs = jax.nn.one_hot(s, num_states, dtype=jnp.float32) if one_hot else s
        return MaskedObs(obs, mdp.legal[s]) if masked else obs

    def reset(key: Array):
        s = jax.random.categorical(key, jnp.log(mdp.start)).astype(jnp.int32)
        return observe(s), Place(s, jnp.int32(0))

    def step(key: Array, state: Place, action: Array):
        s, t = state
        key_next, key_reward = jax.random.split(key)
        to = jax.random.categorical(key_next, jnp.log(mdp.transition[s, action])).astype(jnp.int32)
        reward = mdp.reward[s, action, to] + mdp.reward_std[s, action] * jax.random.normal(
            key_reward, dtype=jnp.float32
        )
        truncated = jnp.bool_(False) if time_limit is None else t + 1 >= time_limit
        return observe(to), Place(to, t + 1), reward, mdp.terminal[to], truncated

    return Environment(name, reset, step, Discrete(num_actions), time_limit, time_limit)


def _walk(num_states: int = 19, one_hot: bool = True) -> Environment:
    return environment(random_walk(num_states), "RandomWalk", one_hot=one_hot)


def _cliff(time_limit: int = 1000, one_hot: bool = True) -> Environment:
    return environment(cliff(), "CliffWalking", time_limit, one_hot)


def _frozen_lake(slippery: bool = True, time_limit: int = 100, one_hot: bool = True) -> Environment:
    return environment(frozen_lake(slippery=slippery), "FrozenLake", time_limit, one_hot)


def _garnet(
    seed: int = 0,
    num_states: int = 10,
    num_actions: int = 4,
    branching: int = 3,
    time_limit: int = 100,
    one_hot: bool = True,
) -> Environment:
    process = garnet(jax.random.key(seed), num_states, num_actions, branching)
    return environment(process, "Garnet", time_limit, one_hot)


def _key_and_door(size: int = 8, time_limit: int = 256, one_hot: bool = True) -> Environment:
    return environment(key_and_door(size), "KeyAndDoor", time_limit, one_hot)


def _delayed_choice(delay: int = 50, num_actions: int = 4, noise: float = 1.0, one_hot: bool = True) -> Environment:
    return environment(delayed_choice(delay, num_actions, noise), "DelayedChoice", delay + 1, one_hot)


def _four_rooms(
    goal_row: int = 7, goal_column: int = 9, slip: float = 1 / 6, time_limit: int = 1000, one_hot: bool = True
) -> Environment:
    return environment(four_rooms(goal_row, goal_column, slip), "FourRooms", time_limit, one_hot)


NAMED: dict[str, Callable[..., Environment]] = {
    "RandomWalk": _walk,
    "CliffWalking": _cliff,
    "FrozenLake": _frozen_lake,
    "Garnet": _garnet,
    "KeyAndDoor": _key_and_door,
    "FourRooms": _four_rooms,
    "DelayedChoice": _delayed_choice,
}
