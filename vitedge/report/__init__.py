"""Measurements for people and programs: the terminal table, and JSON."""
