"""What ``benchmarks.cuda`` is made of: times by events, the cases, the roofline, the report."""
