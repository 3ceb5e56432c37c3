"""Formats and generated worlds: knows arrays, knows no system and nothing of the library."""
