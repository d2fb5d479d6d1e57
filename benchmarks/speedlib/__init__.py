"""Parts of ``benchmarks/speed.py``: machine facts, timing, models and images, oracles, report."""
