"""Brute-force oracles in NumPy, written from the papers' words, not from our code."""
