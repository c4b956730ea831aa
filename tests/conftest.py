"""Settings that every test shares."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # libtpu is here only to compile; do not ask for a machine
os.environ["JRL_CPU_DEVICES"] = "2"

import jax
import pytest

import jrl  # noqa: F401  (lays out the CPU devices before the first use of JAX)

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def key():
    return jax.random.key(0)
