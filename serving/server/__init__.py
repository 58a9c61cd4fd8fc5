"""Processes that answer over HTTP: vLLM's server, and one for ONNX exports."""
