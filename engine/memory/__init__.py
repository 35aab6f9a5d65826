"""Memory of the KV cache: how many pages there are, and where they live."""
