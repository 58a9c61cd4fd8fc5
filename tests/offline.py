"""No test may reach a model hub. Libraries look at these variables when they are imported."""

import os
import tempfile

_HOME = tempfile.TemporaryDirectory(prefix="sentei-tests-")
os.environ.update(HF_HUB_OFFLINE="1", HF_HOME=_HOME.name, TOKENIZERS_PARALLELISM="false")
