"""What checks the paper and trains nothing."""
