"""Loops over an algorithm: seeds, sweeps, devices, chunks, progress, metrics, checkpoints, evaluation, plots."""

from jrl.run import loggers, stats, sweep
from jrl.run.checkpoint import RunError
from jrl.run.evaluate import evaluate, record
from jrl.run.load import Loaded, export_parameters, load
from jrl.run.loop import Chunk, Result, train
from jrl.run.program import train_fn

__all__ = [
    "Chunk",
    "Loaded",
    "Result",
    "RunError",
    "evaluate",
    "export_parameters",
    "load",
    "loggers",
    "record",
    "stats",
    "sweep",
    "train",
    "train_fn",
]
