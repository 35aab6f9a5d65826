"""Tiers: memories that hold pages and make selected ones readable by ops."""
