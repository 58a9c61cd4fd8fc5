"""What got worse: texts, tasks and written answers of the pruned model against the original's."""
