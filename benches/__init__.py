"""Benchmark cases, one module per op family and model, and the runner that interleaves them with their peers."""
