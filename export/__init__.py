"""A checkpoint directory in, a deployable directory out."""
