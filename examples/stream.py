"""Print tokens as the engine computes them, in this process and without a server."""

import argparse

from keysift.engine import Engine, EngineConfig, Finish, PrefillProgress, Request, SamplingParams, TokenOutput


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="folder, GGUF file or hub name; none: the embedded model")
    parser.add_argument("--prompt", default="The three largest rivers of Europe are")
    parser.add_argument("--temperature", type=float, default=0.0)
    args = parser.parse_args()

    engine = Engine(EngineConfig(model=args.model))
    params = SamplingParams(max_new_tokens=32, temperature=args.temperature, seed=1)
    engine.add(Request("stream-1", tuple(engine.tokenizer.encode(args.prompt)), params))
    while engine.has_work:
        for output in engine.step():
            if isinstance(output, PrefillProgress):
                print(f"[{output.processed} of {output.total} prompt tokens] {args.prompt}", end="")
            elif isinstance(output, TokenOutput):
                print(output.text, end="", flush=True)
            elif isinstance(output, Finish):
                print(f"\n[{output.reason.value} after {output.usage.completion_tokens} tokens]")


if __name__ == "__main__":
    main()
