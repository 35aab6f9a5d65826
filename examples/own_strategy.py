"""Define a strategy in a script, run it next to dense attention, and print how much each of them reads."""

import argparse
from dataclasses import dataclass

from torch import Tensor

from keysift.attention import Strategy, registry
from keysift.attention.strategy import Positive, option
from keysift.engine import LLM, SamplingParams
from keysift.kvcache import Context, Selection


@dataclass(frozen=True, slots=True, kw_only=True)
class Newest(Strategy):
    """Only the last tokens, in whole pages."""

    window: Positive = option(256, "last tokens that every query reads, itself included")

    def prefill(self, q: Tensor, context: Context) -> Selection:
        return context.zones(sink=0, window=self.window)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="folder, GGUF file or hub name; none: the embedded model")
    args = parser.parse_args()

    registry.BUILT_IN["newest"] = f"{__name__}:Newest"  # a package names it as an entry point instead
    llm = LLM(args.model, strategy="newest", strategy_args=("newest.window=64",))
    for strategy in ("dense", None):  # None: the engine's own, with its options
        for completion in llm.generate([__doc__ * 30], SamplingParams(max_new_tokens=8), strategy=strategy):
            sparsity = completion.finish.sparsity
            print(f"{sparsity.strategy}: prompt density {sparsity.prefill_density:.2f}: {completion.text!r}")


if __name__ == "__main__":
    main()
