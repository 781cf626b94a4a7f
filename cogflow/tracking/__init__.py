"""What a run leaves behind for people: lines, bars, metrics.jsonl, Weights & Biases, and report.html."""
