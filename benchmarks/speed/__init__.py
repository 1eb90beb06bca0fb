"""Parts of `benchmarks/full_size.py`: the models with random weights, and what is measured of them."""
