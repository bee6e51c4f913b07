"""How fast s2cd is, beside the peers, and why: `python -m benchmarks prepare|run|compare|report|europe`."""
