"""Analysis: evaluation of a policy, tables, statistics, plots, the report."""
