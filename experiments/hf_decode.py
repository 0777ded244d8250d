"""How fast `transformers` and torch decode greedily, in an environment of their own (see `hf_reference`).

    python -m experiments.hf_decode --model=DIR --batch_sizes=1,8,32 --threads=2

DIR holds Hugging Face files, as `merge` and `export_hf` write them. `decode_speed --reference_python` calls this and
puts its figures beside ours; differs from `hf_reference`, which trains. A line a batch size: the size, tokens a second
of all rows after the first token, and milliseconds to the first.
"""

import statistics
import time

import numpy as np
from absl import flags

from experiments.shared import common
from research.errors import FlagError


def define_flags() -> None:
    """Only where this is the script: other scripts' flags have the same names."""
    flags.DEFINE_string("model", None, "Directory of Hugging Face files.", required=True)
    flags.DEFINE_list("batch_sizes", ["1", "8", "32"], "Rows that are decoded together.")
    flags.DEFINE_integer("prompt", 16, "Tokens of a prompt.", lower_bound=1)
    flags.DEFINE_integer("tokens", 64, "Tokens a row gets.", lower_bound=2)
    flags.DEFINE_integer("rounds", 3, "Timed rounds; the median counts.", lower_bound=1)
    flags.DEFINE_integer("threads", 0, "Threads of torch; 0 for its own choice.", lower_bound=0)


def main() -> None:
    try:
        import torch
        from transformers import AutoModelForCausalLM
    except ImportError as error:
        raise FlagError(f"this script needs {error.name}: see `hf_reference` for what to install.") from None
    values = flags.FLAGS
    if values.threads:
        torch.set_num_threads(values.threads)
    model = AutoModelForCausalLM.from_pretrained(values.model, dtype=torch.float32).eval()
    rng = np.random.default_rng(0)
    for rows in map(int, values.batch_sizes):
        given = torch.from_numpy(rng.integers(3, model.config.vocab_size, (rows, values.prompt), np.int64))

        def seconds(new: int, given: torch.Tensor = given) -> float:
            began = time.perf_counter()
            with torch.inference_mode():
                out = model.generate(
                    given,
                    attention_mask=torch.ones_like(given),
                    do_sample=False,
                    min_new_tokens=new,
                    max_new_tokens=new,
                    pad_token_id=0,
                )
            assert out.shape[1] == values.prompt + new
            return time.perf_counter() - began

        seconds(2)
        first, whole = (statistics.median(seconds(new) for _ in range(values.rounds)) for new in (1, values.tokens))
        print(f"{rows} {rows * (values.tokens - 1) / (whole - first):.1f} {1e3 * first:.1f}", flush=True)


if __name__ == "__main__":
    define_flags()
    common.run(main)
