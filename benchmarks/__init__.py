"""What `make bench` runs: the service against its bare engine, the engine against diffusers' own pipeline."""
