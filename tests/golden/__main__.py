"""``python -m tests.golden`` measures the tiny models and rewrites ``fires.json``."""

from __future__ import annotations

from tests.golden.fires import FILE, store
from tests.tiny import CASES, OTHER_CASES, ZOO_CASES

if __name__ == "__main__":
    store(sorted(CASES + OTHER_CASES + ZOO_CASES, key=str))
    print(f"wrote {FILE}; read the difference before you commit it")
