"""Prediction on images larger than memory, in tiles."""
