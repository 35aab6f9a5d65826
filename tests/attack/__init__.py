"""Attacks on a real server: what strangers may send, and failures at every seam. `make attack` runs them longer."""
