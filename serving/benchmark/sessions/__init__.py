"""One engine per module: how it is started, asked and stopped while it is measured."""
