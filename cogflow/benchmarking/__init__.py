"""Speed and memory, measured: two things beside each other in one run."""
