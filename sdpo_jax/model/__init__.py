"""The one decoder, its configuration and its weights."""
