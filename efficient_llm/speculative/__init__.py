"""Speculative decoding: drafts, trees, lossless verification, engine."""
