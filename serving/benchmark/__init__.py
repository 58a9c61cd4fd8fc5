"""Original against pruned: latency and throughput, measured in turn."""
