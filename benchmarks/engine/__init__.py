"""Whole requests on the embedded model: TTFT, TPOT and memory; weights in 8 bits; offloaded KV caches."""
