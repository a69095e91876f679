"""Worlds in which a policy acts turn by turn; `envs/base.py` has their contract."""
