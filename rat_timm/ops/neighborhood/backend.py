"""Which implementation of neighbourhood attention runs."""

import os

BACKENDS = ("auto", "torch", "natten", "flex")
VARIABLE = "RAT_TIMM_ATTENTION"


def set_attention_backend(name: str) -> None:
    """Chooses what neighbourhood attention runs on, for the whole process.

    Args:
        name: "auto": NATTEN's kernels where they are built for the tensors' GPU and take the call, PyTorch elsewhere;
            "torch": tiles through PyTorch's fused attention, on every device; "natten": the package NATTEN; "flex":
            PyTorch's FlexAttention, compiled at the first call for each size. The environment variable
            ``RAT_TIMM_ATTENTION`` sets it before the package is imported. A call that the chosen one cannot run is an
            error that says why.

    Raises:
        ValueError: If there is no such backend.
    """
    global _chosen
    _chosen = _check(name, "name")


def attention_backend() -> str:
    """Returns what `set_attention_backend` or the environment variable chose."""
    return _chosen


def _check(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source} must be one of {BACKENDS}, got {name!r}")
    return name


_chosen = _check(os.environ.get(VARIABLE, "auto"), VARIABLE)
