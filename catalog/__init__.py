"""What is in the lake: layout, manifests, tables, runs and findings. Imports numpy, pyarrow, zarr and fsspec only."""
