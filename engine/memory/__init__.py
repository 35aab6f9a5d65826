"""Memory of the KV cache: number of pages, backing store and pool sizes."""
