"""The gate before deployment: budgets, verdicts that can be trusted, and their outputs."""
