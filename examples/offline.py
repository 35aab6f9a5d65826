"""Complete a document offline, and print what attention read of it."""

import argparse
from pathlib import Path

from keysift.engine import LLM, SamplingParams


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", nargs="?", type=Path, default=Path(__file__), help="text to read")
    parser.add_argument("--model", help="folder, GGUF file or hub name; none: the embedded model")
    parser.add_argument("--strategy", default="sift+retrieval", help="PROMPT+TOKEN, or one name")
    args = parser.parse_args()

    llm = LLM(args.model, strategy=args.strategy)
    prompt = args.file.read_text(encoding="utf-8") + "\nIn short:"
    for completion in llm.generate([prompt], SamplingParams(max_new_tokens=32)):
        print(completion.text.strip())
        usage, timings, sparsity = completion.finish.usage, completion.finish.timings, completion.finish.sparsity
        print(f"{usage.prompt_tokens} prompt tokens, TTFT {timings.ttft_ms:.0f} ms, TPOT {timings.tpot_ms:.1f} ms")
        print(f"density: prompt {sparsity.prefill_density:.2f}, tokens {sparsity.decode_density:.2f}")


if __name__ == "__main__":
    main()
