"""One module an adapter; its name is its `--vit_type`. See `patchsae_ray/backbone/adapter.py`."""
