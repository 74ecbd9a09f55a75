"""Preference pairs: load and validate records, cut them into tokens; layouts of public sets; the synthetic tasks."""
