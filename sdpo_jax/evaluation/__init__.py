"""Evaluates models: samples responses to fixed questions, judges them, and summarises."""
