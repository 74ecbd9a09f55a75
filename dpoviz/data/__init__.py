"""Preference pairs: records, tokens, layouts of public data sets, synthetic tasks."""
