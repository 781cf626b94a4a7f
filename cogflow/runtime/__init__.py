"""Process runtime: ranks, heartbeats, stop signals, console output, and translation of library failures."""
