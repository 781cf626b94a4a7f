"""Tests are imported by path; this makes their helpers (golden_sets.py) importable, too."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
