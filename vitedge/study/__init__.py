"""Studies (many recipes, one table) and searches (many settings, one Pareto front), on Optuna's storage.

Importing this loads neither Optuna nor torch; both are imported by the functions that need them.
"""
