"""`python -m mint_ray.cli`, for nodes where the `mint-ray` script is not on the path.

Tested by tests/remote/test_jobs.py.
"""

from mint_ray.cli import main

main()
