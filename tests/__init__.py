"""The tests; they mirror `mint_ray` file by file."""
