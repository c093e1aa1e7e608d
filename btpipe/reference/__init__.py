"""The published formulation, written independently: for selftest, tests and benchmarks."""
