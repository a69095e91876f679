"""Test-time self-distillation: one hard question, a budget, and the arms that may spend it."""
