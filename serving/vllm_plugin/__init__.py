"""What runs inside somebody's vLLM server; it imports the vocabulary of architectures and little else."""
