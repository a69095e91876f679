"""Brings task files to packed batches."""
