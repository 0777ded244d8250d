"""Policy gradients on rewards relative to the other completions of a prompt: GRPO and its kin, with any PEFT method.

    python -m experiments.grpo --task=sort                               # a policy of its own: SFT, then GRPO
    python -m experiments.grpo --task=arithmetic --variant=dr_grpo
    python -m experiments.grpo --model=smollm2-135m-instruct --reward=runs/reward_model/adapter --peft=lora:rank=8
    python -m experiments.grpo --model=smollm2-135m-instruct --reward=my.module:function --data=prompts.txt

A reward function maps prompts and completions, two lists of strings, to numbers, None where a completion can't be
scored. Differs from `ppo`, whose advantages come from a value head. The same command goes on where an interrupted run
was. Writes config.json, metrics.jsonl, curve.png, frontier.png (reward against KL), checkpoints, adapter,
samples.jsonl and result.json under --workdir.
"""

from absl import flags

from experiments.shared import common, on_policy, policy_run

VARIANTS = ("grpo", "dr_grpo", "dapo", "bnpo", "gspo", "cispo", "rloo", "reinforce_pp")


def define_flags() -> None:
    """Only where this is the script: other scripts' flags have the same names."""
    flags.DEFINE_enum("variant", "grpo", VARIANTS, "Which of the family.")
    policy_run.define_flags("runs/grpo", steps=300, batch_size=256)


def main() -> None:
    values = flags.FLAGS
    policy_run.main(values, lambda given: on_policy.Settings(values.variant, **given))


if __name__ == "__main__":
    define_flags()
    common.run(main)
