"""From numbers to sentences and pictures: tables, statistics, evaluation of a policy, plots, the report."""
