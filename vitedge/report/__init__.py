"""Measurements for people and programs: the table of a bench and its JSON, and reports of any measurements in any format."""
