"""What a training would need, worked out before anything is loaded: pure functions of sizes and settings."""
