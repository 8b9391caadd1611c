"""`python -m mint_ray.cli`, for machines where the package's scripts are not on the path."""

from mint_ray.cli import main

main()
