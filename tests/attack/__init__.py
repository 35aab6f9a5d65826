"""Attacks: what strangers may send to a real server, failures at every seam, random schedules and lives of requests."""
