"""Models that answer in this process: Transformers, vLLM and ONNX Runtime."""
