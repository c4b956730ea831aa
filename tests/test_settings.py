"""Settings whose annotations hold their checks."""

import inspect
import itertools
from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import pytest
from settings_table import descriptions

from jrl import intrinsic, nets
from jrl.algos import (
    auxiliary_tasks,
    bc,
    dpo,
    dqfd,
    dqn,
    ebu,
    fbrl,
    grpo,
    off_policy,
    option_critic,
    ppo,
    ppo_cma,
    ppo_lm,
    pqn,
    process_reward,
    r2d2,
    reverse_curriculum,
    reward_model,
    rudder,
    sac,
    self_imitation,
    sft,
    td,
    td3,
)
from jrl.attention import dsa, mla, nsa, rotary
from jrl.nets import adapters, memory, moe, transformer
from jrl.numerics import optim, settings
from jrl.numerics.settings import NonNegativeInt, Positive, Settings, Unit

FLOATS = [getattr(settings, name) for name in ("Unit", "NonNegative", "AtLeastOne", "AboveZero", "BelowOne", "Finite")]


@dataclass(frozen=True)
class Parent(Settings, prefix="tower"):
    floors: Positive = 1
    widths: tuple[NonNegativeInt, ...] = (2, 0)
    roof: Literal["flat", "steep"] = "flat"
    name: str = ""


@dataclass(frozen=True)
class Child(Parent):
    shade: Unit = 0.5


class Hyper(NamedTuple):
    gamma: Unit = 0.9
    optimizer: optim.Numbers = optim.Hyper()


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"floors": 0}, "tower.floors must be an integer of at least 1; got 0"),
        ({"floors": True}, "tower.floors must be an integer of at least 1; got True"),
        ({"widths": (3, -1)}, "tower.widths must be an integer of at least 0; got -1"),
        ({"roof": "round"}, "tower.roof must be one of flat, steep; got 'round'"),
        ({"shade": 1.5}, "tower.shade must be between 0 and 1; got 1.5"),
    ],
)
def test_a_field_is_checked_by_its_annotation(fields, message):
    assert Child(name="anything") == Child(1, (2, 0), "flat", "anything", 0.5)
    with pytest.raises(ValueError, match=message):
        Child(**fields)


def test_hyperparameters_are_checked_with_those_of_the_optimizer_and_traced_ones_pass():
    settings.check_hyper(Hyper())
    with pytest.raises(ValueError, match=r"hyper.gamma must be between 0 and 1; got 2"):
        settings.check_hyper(Hyper(gamma=2.0))
    with pytest.raises(ValueError, match=r"hyper.optimizer.b1 must be at least 0 and below 1; got 1"):
        settings.check_hyper(Hyper(optimizer=optim.Hyper(b1=1.0)))
    jax.jit(lambda gamma: settings.check_hyper(Hyper(gamma=gamma)))(2.0)


WITH_SETTINGS = (
    *(
        auxiliary_tasks,
        bc,
        dpo,
        dqfd,
        dqn,
        ebu,
        fbrl,
        grpo,
        intrinsic,
        option_critic,
        ppo,
        ppo_cma,
        ppo_lm,
        pqn,
        process_reward,
        r2d2,
        reverse_curriculum,
        reward_model,
        rudder,
    ),
    *(sac, self_imitation, sft, td, td3),
)
KINDS = {
    f"{kind.__module__}.{kind.__name__}": kind
    for kind in (
        *itertools.chain(*((m.Config, m.Hyper) for m in WITH_SETTINGS)),
        *(
            off_policy.OffPolicyConfig,
            nets.Config,
            nets.ValueConfig,
            nets.ContinuousConfig,
            memory.AttentionConfig,
            moe.Config,
            transformer.Config,
            adapters.Config,
        ),
        *(mla.Config, nsa.Config, dsa.Config, rotary.Scaling, optim.OptimizerConfig, optim.Hyper),
    )
}


@pytest.mark.parametrize("kind", [Positive, NonNegativeInt, *FLOATS])
def test_what_is_infinite_in_float32_is_refused(kind):
    for value in (float("inf"), 1e39, float("nan")):
        with pytest.raises(ValueError, match="x must be"):
            settings._check_of(kind)("x", value)


@pytest.mark.parametrize("name", KINDS)
def test_every_field_is_described_on_its_line_or_above_it(name):
    """``--help`` and the documentation show these comments."""
    described = descriptions(KINDS[name])
    for field in inspect.get_annotations(KINDS[name]):
        assert described[field].endswith("."), field
