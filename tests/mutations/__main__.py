"""Run the named mutations, or all: one line each, exit code 1 if one survives."""

from __future__ import annotations

import os
import sys

os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

from mutations import MUTATIONS
from mutations.mutation import survivors

names = sys.argv[1:]
unknown = sorted(set(names) - {m.name for m in MUTATIONS})
if unknown:
    sys.exit(f"no mutation is called {', '.join(map(repr, unknown))}; their names are in mutations/*.py")
failed = False
for mutation, defect in survivors(m for m in MUTATIONS if not names or m.name in names):
    sys.stdout.write(f"{'killed  ' if defect is None else 'SURVIVES'} {mutation.name}\n{defect or ''}")
    sys.stdout.flush()
    failed |= defect is not None
sys.exit(failed)
