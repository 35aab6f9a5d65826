"""The `keysift` command line."""
