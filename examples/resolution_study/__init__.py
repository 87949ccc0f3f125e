"""The parts of `run_resolution_study.py`; README.md is its report."""
