"""Training a published language model: from examples, from preferences, from verified or learned rewards.

python experiments/lm.py sft --model MODEL --data chats.jsonl                 supervised learning from texts and chats
python experiments/lm.py reward --model MODEL --data pairs.jsonl              a reward model from preferences
python experiments/lm.py process --model MODEL --data steps.jsonl            a reward model from labels of steps, or of answers
python experiments/lm.py dpo --model MODEL --data pairs.jsonl                 DPO and its kin, on the same pairs
python experiments/lm.py ppo --model MODEL --dataset prompts.jsonl --reward runs/lm-reward        RLHF: actor, critic, reward model and reference
python experiments/lm.py grpo --model SmolLM2-135M-Instruct.Q4_1.gguf         GRPO on sums of reasoning-gym (chain_sum), which are verified
python experiments/lm.py grpo --model MODEL --dataset mine.py                 problems of your own: make(seed) -> verifiers.Source
python experiments/lm.py answer --model MODEL --dataset chain_sum              judged answers as data for reward, process and dpo; majority, best of n
python experiments/lm.py COMMAND --help                                       all settings of one

MODEL is a folder in Hugging Face's layout, a GGUF file, or the folder of another run. Each run lives in a folder (--run-dir): metrics.csv, TensorBoard
events, samples.csv, curve.png and checkpoints; the same command goes on after Ctrl-C. What was trained is left there in Hugging Face's layout, or PEFT's
where it is an adapter, which is the default.
"""

import importlib
import sys
from collections.abc import Callable

from jrl.run import cli

COMMANDS = {
    "sft": "lm_texts",
    "reward": "lm_texts",
    "process": "lm_texts",
    "dpo": "lm_texts",
    "ppo": "lm_answers",
    "grpo": "lm_answers",
    "answer": "lm_judged",
}


def main(argv: list[str]) -> None:
    if not argv or argv[0] in ("-h", "--help"):
        print((__doc__ or "").strip())
        return
    if argv[0] not in COMMANDS:
        raise ValueError(f"lm.py: the first word must be one of {', '.join(COMMANDS)}; got {argv[0]!r}")
    command: Callable[[list[str]], None] = getattr(importlib.import_module(COMMANDS[argv[0]]), argv[0])
    sys.argv[0] = f"{sys.argv[0]} {argv[0]}"  # as --help shows it
    command(argv[1:])


if __name__ == "__main__":
    cli.main(main)
