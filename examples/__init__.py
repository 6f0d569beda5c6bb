"""Scripts that show the packages at work, each run as `python -m examples.NAME`."""
