"""From task files to packed batches."""
