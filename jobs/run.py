"""Entry point of a Ray job: `ray job submit --working-dir jobs -- python run.py quickstart.yaml --root s3://...`."""

import sys

from mint_ray.cli import main

sys.argv.insert(1, "run")
main()
