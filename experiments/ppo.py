"""PPO with a value head, GAE and a KL price in the reward (arXiv 1707.06347, 1909.08593), with any PEFT method.

    python -m experiments.ppo --task=sort                                # a policy of its own: SFT, then PPO
    python -m experiments.ppo --model=smollm2-135m-instruct --reward=runs/reward_model/adapter --kl_target=6

Differs from `grpo`, whose advantages come from the other completions of a prompt. The reference is the base with the
adapters off, and the value head reads the policy's own hidden states: one model is in memory. The same command goes on
where an interrupted run was. Writes config.json, metrics.jsonl, curve.png, frontier.png (reward against KL),
checkpoints, adapter (with the value head), samples.jsonl and result.json under --workdir.
"""

from absl import flags

from experiments.shared import common, on_policy, policy_run


def define_flags() -> None:
    """Only where this is the script: other scripts' flags have the same names."""
    policy_run.define_flags("runs/ppo", steps=600, batch_size=128, epochs=4, kl_coef=0.05)
    flags.DEFINE_float("kl_target", None, "Nats a completion, for an adaptive price that starts at --kl_coef.")
    flags.DEFINE_integer("kl_horizon", 10_000, "Completions in which the adaptive price moves.", lower_bound=1)
    flags.DEFINE_float("gamma", 1.0, "Discount.", lower_bound=0.0, upper_bound=1.0)
    flags.DEFINE_float("lam", 0.95, "Lambda of GAE.", lower_bound=0.0, upper_bound=1.0)
    flags.DEFINE_float("value_coef", 0.1, "Weight of the value loss.", lower_bound=0.0)
    flags.DEFINE_float("value_clip", 0.2, "How far a value may move in a rollout; 0 for any.", lower_bound=0.0)


def main() -> None:
    values = flags.FLAGS
    own = common.flag_values("kl_target", "kl_horizon", "gamma", "lam", "value_coef", "value_clip")
    policy_run.main(values, lambda given: on_policy.Settings("ppo", **given, **own))


if __name__ == "__main__":
    define_flags()
    common.run(main)
