"""``flash-rocm tune``: tuning ahead of time, and its results as config files."""
