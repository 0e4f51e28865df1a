"""Training on mmengine: configs, registries and runner are its own; what it gets wrong is put right in these files."""
