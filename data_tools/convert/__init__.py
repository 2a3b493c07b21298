"""From a Reader to shards: the part all formats share."""
