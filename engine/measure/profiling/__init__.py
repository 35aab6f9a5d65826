"""Where the time of prompts and tokens goes: latency over strategies, lengths and batch sizes."""
