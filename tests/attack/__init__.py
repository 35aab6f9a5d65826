"""Attacks: what strangers may send, and failures at every seam, against a real server. `make attack` runs them longer."""
