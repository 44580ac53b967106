"""Training: one explicit loop; techniques add losses, a per-step hook and a convert step."""
