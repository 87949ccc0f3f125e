"""Where images and tokens are: grids in physical space, what a user says of them, and resampling."""

from .grid import Grid, Pyramid, Tokens
from .read import geometry
from .sample import sample_at

__all__ = ["Grid", "Pyramid", "Tokens", "geometry", "sample_at"]
