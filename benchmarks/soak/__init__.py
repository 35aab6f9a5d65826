"""Soak: servers under mixed load for as long as one likes."""
