"""What the benchmarks share: how is measured, against what, and how it is told."""
