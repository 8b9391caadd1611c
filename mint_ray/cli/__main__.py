"""`python -m mint_ray.cli`, for machines where the `mint-ray` script is not on the path."""

from mint_ray.cli import main

main()
