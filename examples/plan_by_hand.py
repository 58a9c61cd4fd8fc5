"""A plan written by hand: the middle third of the layers gives half of its FFN neurons, and one of them its attention.

    python examples/plan_by_hand.py MODEL TEXT OUT [options of sentei prune]

sentei prune first measures how much each neuron matters. Those scores stay with the plan, so a person may choose other
widths; which neurons are kept follows from the scores. Nothing is searched again.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

ALIGN = 64  # widths that processors multiply fastest are multiples of this


def sentei(*words: object) -> None:
    """Runs a command; its own message says what is wrong if it fails."""
    subprocess.run(["sentei", *map(str, words)], check=True)


model, text, out, *options = sys.argv[1:]
searched, written, pruned = (Path(out) / name for name in ("searched", "written", "pruned"))
sentei("prune", model, "-o", searched, "--sparsity", "0.1", "--calibration", text, *options)

plan = json.loads((searched / "plan.json").read_text())
layers, whole = plan["layers"], plan["base_model"]["intermediate_size"]
third = len(layers) // 3
for layer in layers:
    layer |= {"attention": "keep", "intermediate_size": whole}
for layer in layers[third : 2 * third]:
    layer["intermediate_size"] = whole // 2 // ALIGN * ALIGN
layers[third]["attention"] = "remove"

written.mkdir()
(written / "plan.json").write_text(json.dumps(plan, indent=2))
shutil.copy(searched / "plan.safetensors", written)
sentei("plan", "diff", searched, written)
sentei("apply", written, model, "-o", pruned, "--calibration", text)
