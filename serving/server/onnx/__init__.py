"""OpenAI's API over ONNX exports."""
