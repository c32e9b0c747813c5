"""The evidence: methods that a user could pick, side by side on tasks, with their cost and the statistics of the comparison."""
