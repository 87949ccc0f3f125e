"""Where images and tokens are: grids in physical space, what a user says of them, and resampling."""

from .context import geometry
from .grid import Grid, Pyramid, Tokens

__all__ = ["Grid", "Pyramid", "Tokens", "geometry"]
