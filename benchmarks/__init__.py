"""Measurements: commands that rewrite the figures under results/."""
