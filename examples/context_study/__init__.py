"""The parts of `run_context_study.py`; README.md is its report."""
