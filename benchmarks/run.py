"""``foldscan bench`` as a script: see ``foldscan.bench.driver``.

python benchmarks/run.py                                   every op at its standard shapes
python benchmarks/run.py --op scan --dtype bfloat16 --mode fwd+bwd --out benchmarks/results/cpu.jsonl
python benchmarks/run.py --list
"""

import os
import sys

# Threads that wait should sleep: on a shared machine spinning costs everyone, ours and the peers alike.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from foldscan.bench.driver import main

sys.exit(main())
