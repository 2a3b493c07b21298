"""From simulators and datasets to shards."""
