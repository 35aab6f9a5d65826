"""`keysift load`: load generation against a running server."""
