"""Sources in folders and in S3."""
