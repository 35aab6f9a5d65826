"""The heaviest pages of each list by their log masses, on a GPU."""
