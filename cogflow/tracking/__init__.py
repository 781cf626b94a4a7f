"""Record a run: metrics.jsonl, events.jsonl, stage records, Weights & Biases, and report.html."""
