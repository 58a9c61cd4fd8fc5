"""Recovery by distillation from the original."""
