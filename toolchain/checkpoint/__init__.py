"""Model directories as files: config, safetensors shards, quantised or not. Needs no Transformers."""
