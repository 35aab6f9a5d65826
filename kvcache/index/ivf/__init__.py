"""Inverted lists: keys in clusters, of which a query scans the nearest."""
