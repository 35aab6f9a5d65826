"""Score strategies on questions of your own, and print the summary of results.json."""

import argparse
from pathlib import Path

from keysift.engine import Engine, EngineConfig
from keysift.engine.measure.evaluation.output import write_results
from keysift.engine.measure.evaluation.runner import Run
from keysift.engine.measure.evaluation.settings import Evaluation

QUESTIONS = Path(__file__).with_suffix(".jsonl")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="folder, GGUF file or hub name; none: the embedded model")
    parser.add_argument("--strategy", default="sift+retrieval")
    parser.add_argument("--output-dir", type=Path, default=Path("keysift-own-evaluation"))
    args = parser.parse_args()

    settings = Evaluation(
        tasks=(str(QUESTIONS),),
        strategies=(args.strategy,),
        always_sparse=True,  # the questions are short: at their length a served strategy reads everything
        agreement=False,
        output_dir=args.output_dir,
    )
    run = Run.open(settings, Engine(EngineConfig(model=args.model)))
    run.go(lambda done, total, title: print(f"{done:,} of {total:,} tokens: {title}"), lambda: None)
    for row in write_results(run)["summary"]:
        if row["length"] is None:  # all lengths
            print(f"{row['strategy']}: score {row['score']:.2f} ({row['low']:.2f} to {row['high']:.2f})")
    print(f"written: {args.output_dir / 'results.json'}")


if __name__ == "__main__":
    main()
