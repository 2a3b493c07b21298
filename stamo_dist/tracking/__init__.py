"""What a run tells while it trains: metrics, samples, pictures, progress."""
