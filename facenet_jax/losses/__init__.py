"""Objectives on embeddings."""
