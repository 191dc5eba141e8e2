"""Entry point for `ray job submit --working-dir . -- python jobs/annotate.py RECIPE`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.cli import main

if __name__ == "__main__":
    sys.argv = ["omnifer", "annotate", *sys.argv[1:]]
    main()
