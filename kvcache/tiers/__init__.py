"""Tiers: where pages physically are, and how they come where an op can read them."""
