"""What a run shows: metrics.jsonl, TensorBoard, progress bar, ledger."""
