"""Direct Preference Optimization with an input-dependent beta."""
